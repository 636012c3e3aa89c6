"""Checks that need none of the run's devices: before a job is submitted, and again in training.

For `model: resnet` and a common optimiser they do without torch and timm, whose imports take seconds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from ffcv_convnext.config import Config, ModelConfig, fixed_size, steps_per_epoch
from ffcv_convnext.data.beton import Manifest, Split
from ffcv_convnext.data.convert import Contents
from ffcv_convnext.run_folder import check_same_config
from ffcv_convnext.training.schedule import build_schedules

if TYPE_CHECKING:
    from torch import nn

Described = Manifest | Contents  # both have num_samples and classes
ADAM_LIKE = ("adam", "adamw", "lamb")  # optimisers with two betas and an epsilon, without momentum


@dataclass(frozen=True, slots=True)
class Plan:
    """Size of a run."""

    num_images: int  # in the training set
    global_batch: int
    steps_per_epoch: int


@dataclass(frozen=True, slots=True)
class TestedClasses:
    """The classes of an evaluation set, in the order of its labels."""

    names: tuple[str, ...]
    num_trained: int  # classes that the network was trained on
    columns: list[int] | None  # the network's output for each class; None: output i is class i


def check_config(config: Config, world: int, expected: Mapping[Split, Contents] | None = None) -> Plan:
    """Check data, batch sizes, network, optimiser, schedule and run folder of a run of `world` processes.

    expected: what data_path will hold when the run starts; None: it is there already.
    Writes nothing. Raises ValueError or FileNotFoundError.
    """
    config = config.for_world(world)
    data = config.data
    train, val = _contents(data.data_path, expected)
    check_same_classes(train, val, data.data_path)
    num_steps = steps_per_epoch(train.num_samples, data.batch_size, data.update_freq, world, data.repeated_aug)
    num_classes = count_classes(config.model, len(train.classes))
    check_sizes(config)
    if config.run.eval:
        tested_classes(config)
    for name in ("resume", "finetune"):
        path: Path | None = getattr(config.run, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{name} = {path} does not exist")
    our_own = config.model.model == "resnet" and config.optim.opt in ADAM_LIKE and config.optim.momentum is None
    if not our_own or config.run.finetune is not None or config.run.model_ema_bn == "recompute":
        _build(config, num_classes)
    build_schedules(config, num_steps)
    if config.run.output_dir is not None:
        check_same_config(config.run.output_dir, config)
    return Plan(train.num_samples, data.batch_size * data.update_freq * world, num_steps)


def _contents(folder: Path | None, expected: Mapping[Split, Contents] | None) -> tuple[Described, Described]:
    """Return what is known of train.beton and val.beton."""
    if expected is None:
        return _manifest(folder, "train"), _manifest(folder, "val")
    if missing := [split for split in get_args(Split) if split not in expected]:
        raise ValueError(f"data_path = {folder}: the conversion writes no {missing[0]}.beton; convert --split all")
    return expected["train"], expected["val"]


def _manifest(folder: Path | None, split: str) -> Manifest:
    if folder is None:
        raise ValueError("data_path is not set; give the folder with train.beton: --data_path BETON_DIR")
    return Manifest.check(folder / f"{split}.beton")


def _build(config: Config, num_classes: int) -> None:
    """Build network and optimiser without memory for the weights, to let timm raise its errors; fit --finetune."""
    import torch

    from ffcv_convnext.models import build_model, fit_pretrained
    from ffcv_convnext.training.optim import build_optimizer

    with torch.device("meta"):
        network = build_model(config.model, num_classes)
    check_model_ema_bn(config, network)
    build_optimizer(network, config.optim, peak_lr=config.schedule.lr)
    run = config.run
    if run.finetune is not None:
        fit_pretrained(network, run.finetune, model_key=run.model_key, model_prefix=run.model_prefix)


def check_model_ema_bn(config: Config, network: nn.Module) -> None:
    """Raise ValueError if statistics are to be recomputed in a network without BatchNorm."""
    from ffcv_convnext.models import batch_norms

    if config.run.model_ema_bn == "recompute" and not batch_norms(network):
        raise ValueError(
            f"model_ema_bn = recompute has no effect: model = {config.model.model} has no BatchNorm with these "
            "settings; remove it"
        )


def check_sizes(config: Config) -> None:
    """Raise ValueError if the network accepts images of one size only, and this is another one."""
    only = None if config.model.model == "resnet" else fixed_size(config.model.model)
    if only is not None and {*config.train_sizes(), *(config.run.test_sizes or (config.data.test_size,))} != {only}:
        raise ValueError(
            f"model = {config.model.model} accepts images of {only} pixels only; use --input_size {only} without "
            "progressive resizing, test_input_size and test_sizes"
        )


def tested_classes(config: Config) -> TestedClasses:
    """Return the classes of the evaluation set: val.beton in eval_data_path, or else in data_path.

    With eval_data_path the manifest of train.beton in data_path, or else of val.beton, lists the trained classes.
    Raises FileNotFoundError or ValueError, also for a class that is not a trained one.
    """
    other, folder = config.run.eval_data_path, config.data.data_path
    if other is None:
        names = _manifest(folder, "val").classes
        return TestedClasses(names, len(names), None)
    names = _manifest(other, "val").classes
    manifests = [] if folder is None else [folder / "train.json", folder / "val.json"]
    found = next((path for path in manifests if path.is_file()), None)
    if found is None:
        raise ValueError(
            f"eval_data_path = {other}: the classes that the network was trained on are unknown, because data_path = "
            f"{folder} has no train.json; give the folder of the training data: --data_path BETON_DIR"
        )
    trained = Manifest.read(found).class_to_idx
    if unknown := [name for name in names if name not in trained]:
        raise ValueError(
            f"eval_data_path = {other}: {len(unknown)} of {len(names)} classes are not in {found}: "
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''}; name the class folders as in "
            "training, and convert again with write_ffcv_dataset.py"
        )
    return TestedClasses(names, len(trained), [trained[name] for name in names])


def check_same_classes(train: Described, val: Described, folder: Path | None) -> None:
    """Raise ValueError if a label means different classes in training and validation."""
    if val.classes != train.classes:
        raise ValueError(
            f"data_path = {folder}: train.beton and val.beton list different classes; write both "
            "again from one folder with write_ffcv_dataset.py --split all --overwrite"
        )


def count_classes(config: ModelConfig, in_data: int) -> int:
    """Return the number of outputs of the network. Raises ValueError if the data has more classes."""
    if config.nb_classes is not None and config.nb_classes < in_data:
        raise ValueError(f"nb_classes = {config.nb_classes}: the data has {in_data} classes; remove it, or raise it")
    return config.nb_classes or in_data
