"""Builds the parts of a run from its config, then trains or evaluates.

Paths, data, batch arithmetic and combinations of settings are checked before the network is built.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from timm.loss import SoftTargetCrossEntropy
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ffcv_convnext.augment import TrainAugment
from ffcv_convnext.config import Config, ModelConfig, differences, format_value
from ffcv_convnext.files import remove_leftovers
from ffcv_convnext.models import build_model, load_pretrained, use_triton
from ffcv_convnext.rng import Stream, step_seed
from ffcv_convnext.training.checkpoint import Checkpoints, read_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, Run, State, autocast, fit, input_dtype, memory_format
from ffcv_convnext.training.metrics import LossTracker, evaluate
from ffcv_convnext.training.optim import build_optimizer
from ffcv_convnext.training.runlog import FolderLock, RunLog, check_same_config, is_done, log_end, setup_logging
from ffcv_convnext.training.schedule import build_schedules

if TYPE_CHECKING:  # at run time `data` imports it, and ffcv with it, when a run is built
    from ffcv_convnext.data.beton import Manifest
    from ffcv_convnext.data.load import EvalLoader, TrainLoader

log = logging.getLogger(__name__)


def train(config: Config) -> dict[str, Any]:
    """Train as the config says, or continue; returns the final scores.

    With torchrun every process calls this. Raises ValueError or FileNotFoundError before work begins, Failure when
    it cannot go on, Interrupted when a signal stopped it after saving.
    """
    folder = config.run.output_dir
    if folder is None:
        raise ValueError("output_dir is not set; say where the run folder shall be: --output_dir runs/NAME")
    processes = _processes(config)
    config = config.for_world(processes.world)
    lock = FolderLock(folder) if processes.is_main else None
    try:
        if lock is not None:
            remove_leftovers(folder)
        setup_logging(folder, processes)
        check_same_config(folder, config)
        finished = is_done(folder)
        if finished is not None and config.run.auto_resume:
            log.info("%s is finished: %s. Nothing to do; choose another output_dir to train anew", folder, finished)
            return finished
        with _joined(processes), _loaders(config, processes) as (train_loader, val_loader):
            run = build_run(config, processes, train_loader, val_loader)
            with closing(run.log):
                _resume(run)
                train_loader.prepare()
                val_loader.prepare()
                scores: dict[str, Any] = {"epochs": config.schedule.epochs, **fit(run)}
                run.log.done(scores)
        log.info("finished: %s", ", ".join(f"{key} {value:.4g}" for key, value in scores.items()))
        return scores
    except Exception as error:
        log_end(error)
        raise
    finally:
        if lock is not None:
            lock.release()


def _processes(config: Config) -> Processes:
    processes = Processes.from_environment(config.run.device)
    if config.run.amp == "fp16" and processes.device.type == "cpu":
        raise ValueError("amp = fp16 needs a CUDA device; use --amp bf16 or --amp off on a CPU")
    if config.run.kernels == "triton" and processes.device.type == "cpu":
        raise ValueError("kernels = triton needs a CUDA device; use --kernels torch on a CPU")
    return processes


@contextmanager
def _joined(processes: Processes) -> Iterator[None]:
    processes.join()
    try:
        yield
    finally:
        processes.leave()


@contextmanager
def _loaders(config: Config, processes: Processes) -> Iterator[tuple[TrainLoader, EvalLoader]]:
    from ffcv_convnext.data.load import TrainLoader

    train_loader = TrainLoader(
        config.data,
        processes.device,
        seed=config.run.seed,
        rank=processes.rank,
        world=processes.world,
        local_rank=processes.local_rank,
        num_local=processes.num_local,
    )
    with closing(train_loader), closing(_val_loader(config, processes)) as val_loader:
        check_same_classes(train_loader.manifest, val_loader.manifest, config.data.data_path)
        yield train_loader, val_loader


def check_same_classes(train: Manifest, val: Manifest, folder: Path | None) -> None:
    """Raises ValueError when a label means one class in training and another in validation."""
    if val.classes != train.classes:
        raise ValueError(
            f"data_path = {folder}: train.beton and val.beton list different classes; write both "
            "anew from one folder with write_ffcv_dataset.py --split all --overwrite"
        )


def _val_loader(config: Config, processes: Processes) -> EvalLoader:
    shared = config.run.dist_eval
    from ffcv_convnext.data.load import EvalLoader

    return EvalLoader(
        config.data,
        processes.device,
        rank=processes.rank if shared else 0,
        world=processes.world if shared else 1,
        local_rank=processes.local_rank,
        num_local=processes.num_local,
    )


def count_classes(config: ModelConfig, in_data: int) -> int:
    """Outputs of the network. Raises ValueError for fewer than there are classes in the data."""
    if config.nb_classes is not None and config.nb_classes < in_data:
        raise ValueError(f"nb_classes = {config.nb_classes}: the data has {in_data} classes; leave it out, or raise it")
    return config.nb_classes or in_data


def build_learner(config: Config, processes: Processes, *, num_classes: int, steps_per_epoch: int) -> Learner:
    """What takes a run's optimiser steps, freshly initialised. With torchrun the processes have joined.

    num_classes: of the network's head.   Raises ValueError for settings that do not go together.
    """
    device, seed = processes.device, config.run.seed
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True  # batches have one size: the fastest convolutions are found once
    schedules = build_schedules(config, steps_per_epoch)
    torch.manual_seed(step_seed(seed, 0, 0, Stream.INITIALISATION))
    network = _network(config, num_classes, device)
    ema = ModelEmaV3(network, decay=config.run.model_ema_decay) if config.run.model_ema else None
    compile = compiles(config, device)
    model = compiled(network, config) if compile else network
    if processes.world > 1:  # around the compiled network: DDP cuts the graph at its buckets, and its own forward,
        # which is another one in micro-batches that do not reduce, is in no graph
        model = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
        )
        # not as an argument, of which torch 2.13 and newer warn; running statistics are averaged before evaluation and
        # saving instead
        model.broadcast_buffers = False
    return Learner(
        config=config,
        processes=processes,
        network=network,
        model=model,
        ema=ema,
        optimizer=build_optimizer(network, config.optim, peak_lr=config.schedule.lr),
        scaler=torch.amp.GradScaler(device.type, enabled=config.run.amp == "fp16"),
        schedules=schedules,
        augment=TrainAugment(
            config.augment,
            num_classes=num_classes,
            seed=seed,
            device=device,
            interpolation=config.data.train_interpolation,
            compile=compile,  # a graph of its own, beside the network's
            dtype=input_dtype(config),
        ),
        criterion=SoftTargetCrossEntropy(),
        tracker=LossTracker(processes),
        state=State(),
    )


def compiles(config: Config, device: torch.device) -> bool:
    """Whether the network is compiled for training.

    Raises ValueError when it shall be and there is no compiler: torch builds C++ for a CPU, C around a GPU's kernels.
    """
    choice = config.run.compile
    if choice == "false" or (choice == "auto" and device.type != "cuda"):
        return False
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if variable not in os.environ and not any(map(shutil.which, names)):
        raise ValueError(
            f"compile = {choice}: torch.compile needs {' or '.join(names)}, or another compiler named in {variable}; "
            "install one, or use --compile false"
        )
    return True


def compiled(network: nn.Module, config: Config) -> nn.Module:
    """`network` behind torch.compile, for batches of one size: parameters, buffers and names stay its own.

    Ours is one graph. A network of timm's may break into several, which is slower and no error.
    """
    whole = config.model.model == "resnet"
    model: nn.Module = torch.compile(network, fullgraph=whole, dynamic=False)  # type: ignore[assignment]
    return model


def build_run(config: Config, processes: Processes, train_loader: TrainLoader, val_loader: EvalLoader) -> Run:
    """All parts of a run at its beginning: nothing is restored yet."""
    assert config.run.output_dir is not None
    num_classes = count_classes(config.model, train_loader.num_classes)
    learner = build_learner(config, processes, num_classes=num_classes, steps_per_epoch=train_loader.steps_per_epoch)
    parameters = sum(p.numel() for p in learner.network.parameters())
    facts = {
        "n_parameters": parameters,
        "num_classes": num_classes,
        "global_batch": train_loader.sampler.global_batch,
        "steps_per_epoch": train_loader.steps_per_epoch,
        "data": {"train": train_loader.manifest.sha256, "val": val_loader.manifest.sha256},
        "images": {"train": train_loader.num_samples, "val": val_loader.num_samples},
    }
    run = Run(
        **{part.name: getattr(learner, part.name) for part in fields(learner)},
        train_loader=train_loader,
        val_loader=val_loader,
        checkpoints=Checkpoints(config.run.output_dir),
        log=RunLog(config.run.output_dir, config, processes, facts),
    )
    _announce(run, parameters)
    return run


def _network(config: Config, num_classes: int, device: torch.device) -> nn.Module:
    network = build_model(config.model, num_classes)
    fixed = getattr(network, "pretrained_cfg", {}) or {}
    if fixed.get("fixed_input_size") and fixed["input_size"][-1] != config.data.input_size:
        raise ValueError(
            f"model = {config.model.model} takes images of {fixed['input_size'][-1]} pixels only; "
            f"use --input_size {fixed['input_size'][-1]}"
        )
    if config.run.kernels == "triton":
        use_triton(network)
    return network.to(device, memory_format=memory_format(config))  # type: ignore[call-overload, no-any-return]


def _announce(run: Run, parameters: int) -> None:
    config, shares, loader = run.config, run.train_loader.sampler, run.train_loader
    log.info(
        "%s, %.2f M parameters, %d classes; %d training and %d validation images",
        config.model.model,
        parameters / 1e6,
        loader.num_classes,
        loader.num_samples,
        run.val_loader.num_samples,
    )
    log.info(
        "global batch %d = batch_size %d x update_freq %d x %d processes on %s; peak lr %g; %d epochs of %d steps",
        shares.global_batch,
        shares.batch_size,
        shares.update_freq,
        shares.world,
        run.processes.device,
        config.schedule.lr,
        config.schedule.epochs,
        loader.steps_per_epoch,
    )
    if compiles(config, run.processes.device):
        log.info("the network and the augmentation are compiled in the first step, which may take minutes")
    recipe = config.schedule.recipe_batch
    if shares.global_batch != recipe:
        log.warning(
            "the global batch is %d, but lr = %g is meant for %d (recipe_batch): set update_freq so that the product "
            "is %d, or scale lr (linearly: %.3g) and set recipe_batch to %d",
            shares.global_batch,
            config.schedule.lr,
            recipe,
            recipe,
            config.schedule.lr * shares.global_batch / recipe,
            shares.global_batch,
        )


def _resume(run: Run) -> None:
    """Continue from the newest checkpoint of the run folder, else from --resume, else start at the beginning."""
    config, device = run.config.run, run.processes.device
    found = run.checkpoints.newest(map_location=device) if config.auto_resume else None
    if found is None and config.resume is not None:
        found = config.resume, read_checkpoint(config.resume, map_location=device)
        if "optimizer" not in found[1]:
            raise ValueError(
                f"resume = {config.resume} holds weights only, not a run's state; start from them with --finetune, "
                "or evaluate them with --eval true"
            )
        _check_resumable(*found, run.config)
    if found is not None:
        path, content = found
        run.restore(content)
        if path.parent.resolve() != run.checkpoints.folder.resolve():
            run.state.best.clear()  # this folder has no best checkpoint yet
        log.info("continuing from %s: epoch %d, optimiser step %d", path, run.state.epoch, run.state.step)
        _announce_world(run, content["config"]["update_freq"])
    elif config.finetune is not None:
        load_pretrained(run.network, config.finetune)
        if run.ema is not None:
            run.ema.module.load_state_dict(run.network.state_dict())
    if not config.auto_resume and run.processes.is_main:
        run.checkpoints.clear()  # a kill before the first save must not bring the old run back
    run.log.resume_at(run.state.step, run.state.epoch)


def _announce_world(run: Run, update_freq: int) -> None:
    """Say so when the run was on another number of processes. update_freq: what it had there."""
    shares = run.train_loader.sampler
    if update_freq != shares.update_freq:
        log.info(
            "it was made on %d processes with update_freq %d and continues on %d with %d: the same global batch of %d, "
            "cut into the same micro-batches",
            shares.global_batch // (shares.batch_size * update_freq),
            update_freq,
            shares.world,
            shares.update_freq,
            shares.global_batch,
        )


def _check_resumable(path: Path, content: dict[str, Any], config: Config) -> None:
    """Raises ValueError when the state of another run cannot be taken over, and warns of what differs otherwise."""
    _check_same_network(path, content, config)
    theirs = Config.from_flat(content["config"])
    for name, ours, other in (
        ("opt", config.optim.opt, theirs.optim.opt),
        ("model_ema", config.run.model_ema, theirs.run.model_ema),
        ("amp", config.run.amp, theirs.run.amp),
    ):
        if ours != other:
            raise ValueError(
                f"{name} = {format_value(ours)}, but {path} was made with {format_value(other)}: a resumed run must "
                "keep it; start from the weights alone with --finetune"
            )
    if changed := differences(config, theirs):
        log.warning("%s was made with other settings, these hold from now on: %s", path, "; ".join(changed))


def evaluate_only(config: Config) -> dict[str, float]:
    """Evaluate a checkpoint's raw and averaged weights, whichever it holds, on the validation set.

    The checkpoint is --resume, or else the newest in output_dir. Weights from elsewhere (timm's, torchvision's, a
    published state dict) are evaluated with --finetune.
    """
    processes = _processes(config)
    setup_logging(None, processes)
    path, content = _weights_to_evaluate(config)
    with _joined(processes), closing(_val_loader(config, processes)) as val_loader:
        network = _network(config, count_classes(config.model, val_loader.num_classes), processes.device)
        counted_by = processes if config.run.dist_eval else replace(processes, rank=0, world=1)
        scores: dict[str, float] = {}
        for part, ending in (("model", ""), ("ema", "_ema")):
            if content is None and part == "model":
                load_pretrained(network, path)
            elif content is not None and content.get(part) is not None:
                network.load_state_dict(content[part])
            else:
                continue
            result = evaluate(
                network, val_loader, counted_by, lambda: autocast(config, processes.device), memory_format(config)
            )
            scores |= {f"test_{key}{ending}": result[key] for key in ("acc1", "acc5", "loss")}
            scores["images"] = result["images"]
    log.info("%s: %s", path, ", ".join(f"{key} {value:.4f}" for key, value in scores.items()))
    return scores


def _weights_to_evaluate(config: Config) -> tuple[Path, dict[str, Any] | None]:
    """A file and, unless it is --finetune's, which is read later, what it holds."""
    run = config.run
    if run.finetune is not None:
        if run.resume is not None:
            raise ValueError("eval = true: --resume and --finetune both name weights; give one of them")
        return run.finetune, None
    found = None
    if run.resume is not None:
        found = run.resume, read_checkpoint(run.resume)
    elif run.output_dir is not None:
        found = Checkpoints(run.output_dir).newest()
    if found is None:
        raise ValueError(
            "eval = true: there is no checkpoint; name one with --resume, a run folder with --output_dir, or weights "
            "from elsewhere with --finetune"
        )
    _check_same_network(*found, config)
    return found


def _check_same_network(path: Path, content: dict[str, Any], config: Config) -> None:
    if "config" not in content or ("model" not in content and "ema" not in content):
        raise ValueError(
            f"{path} is no checkpoint of ours: expected 'config' and 'model' or 'ema' in it, found "
            f"{', '.join(map(str, content))[:200]}"
        )
    theirs = Config.from_flat(content["config"]).model
    if replace(theirs, nb_classes=None, drop_path=0.0) != replace(config.model, nb_classes=None, drop_path=0.0):
        raise ValueError(
            f"{path} holds another network than these settings; take its own: --config {path.parent / 'config.yaml'}"
        )
