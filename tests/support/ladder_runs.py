"""Run folders of a ladder, written by hand: their numbers are INVENTED, close to the paper's."""

from __future__ import annotations

import json
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

from support import REPOSITORY

from ffcv_convnext.ladder import Step, read_ladder, read_released

CONFIGS = REPOSITORY / "rn_configs"
IMAGENET = {"num_classes": 1000, "images": {"train": 1_281_167, "val": 50_000}}
HASHES = {"train": "89f3d8e49c8b", "val": "4a4b0cf9c4e2"}


def write_run(
    folder: Path,
    step: Step,
    *,
    top1: float = 80.0,
    seed: int = 0,
    epochs: int | None = None,
    facts: dict[str, Any] | None = None,
    world: int = 8,
    error: str | None = None,
    age_s: float = 0.0,
    **settings: Any,
) -> Path:
    """A run of a step whose last epoch has `top1` (averaged weights: 0.1 more), done unless `epochs` is smaller.

    age_s: time since its last write.   error: last line of its log.   settings: differences from the step's.
    """
    config = step.config.replace(seed=seed, **settings)
    total = config.schedule.epochs
    epochs = total if epochs is None else epochs
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.to_yaml())
    start = {"processes": world, "device_type": "cuda", "device": "NVIDIA H200", "git": "0" * 40, "from_step": 0}
    run = {"n_parameters": 28_589_128, "global_batch": 4096, "data": HASHES, **IMAGENET, "starts": [start]}
    (folder / "run.json").write_text(json.dumps({**run, **(facts or {})}))
    noise = random.Random(f"{folder.name} {seed}")
    with open(folder / "log.jsonl", "w") as file:
        for epoch in range(epochs):
            rising = 1 - (1 - (epoch + 1) / total) ** 2
            wobble = 0 if epoch + 1 == total else noise.gauss(0, 0.3)
            file.write(
                json.dumps(
                    {
                        "epoch": epoch,
                        "step": 312 * (epoch + 1),
                        "train_loss": 7 - 4 * rising,
                        "test_acc1": max(0.1, top1 * (0.1 + 0.9 * rising) + wobble),
                        "test_loss": 6.9 - 6 * rising,
                        "test_acc1_ema": max(0.1, (top1 + 0.1) * rising**2),
                        "test_loss_ema": 6.9 - 6.05 * rising**2,
                        "images_per_s": noise.gauss(9000, 40),
                        "epoch_s": 150.0,
                    }
                )
                + "\n"
            )
    if epochs == total:
        (folder / "done").write_text(json.dumps({"epochs": total}))
    lines = ["2026-11-20 10:00:00,123 INFO ffcv_convnext.training.run: resnet, 28.59 M parameters"]
    if error is not None:
        lines.append(f"2026-11-20 11:00:00,456 ERROR ffcv_convnext.training.runlog: {error}")
    (folder / "rank0.log").write_text("\n".join(lines) + "\n")
    for path in folder.iterdir():
        os.utime(path, (time.time() - age_s,) * 2)
    return folder


@cache
def steps_of(folder: str = "") -> list[Step]:
    """A ladder's steps and its released network."""
    return [*read_ladder(CONFIGS / folder), *read_released(CONFIGS / folder)]
