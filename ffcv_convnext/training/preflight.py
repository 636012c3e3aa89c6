"""What `train` would refuse, found out on a machine without the run's devices: before a job is submitted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from ffcv_convnext.config import Config
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.models import build_model
from ffcv_convnext.training.optim import build_optimizer
from ffcv_convnext.training.run import check_same_classes, count_classes
from ffcv_convnext.training.runlog import check_same_config
from ffcv_convnext.training.schedule import build_schedules


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run will go through."""

    num_images: int  # in the training set
    global_batch: int
    steps_per_epoch: int


def check_config(config: Config, world: int) -> Plan:
    """Check data, batch arithmetic, network, optimiser, schedule and run folder of a run of `world` processes.

    Takes about a second and writes nothing. Raises ValueError or FileNotFoundError.
    """
    train, val = (_manifest(config.data.data_path, split) for split in ("train", "val"))
    check_same_classes(train, val, config.data.data_path)
    from ffcv_convnext.data.load import GlobalBatchSampler

    shares = GlobalBatchSampler(config.data.batch_size, config.for_world(world).data.update_freq, world)
    steps_per_epoch = shares.num_steps(train.num_samples)
    with torch.device("meta"):
        network = build_model(config.model, count_classes(config.model, len(train.classes)))
    build_optimizer(network, config.optim, peak_lr=config.schedule.lr)
    build_schedules(config, steps_per_epoch)
    for name in ("resume", "finetune"):
        path: Path | None = getattr(config.run, name)
        if path is not None and not path.is_file():
            raise FileNotFoundError(f"{name} = {path} does not exist")
    if config.run.output_dir is not None:
        check_same_config(config.run.output_dir, config)
    return Plan(train.num_samples, shares.global_batch, steps_per_epoch)


def _manifest(folder: Path | None, split: str) -> Manifest:
    if folder is None:
        raise ValueError("data_path is not set; give the folder with train.beton: --data_path BETON_DIR")
    return Manifest.check(folder / f"{split}.beton")
