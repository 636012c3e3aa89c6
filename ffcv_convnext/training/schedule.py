"""Optimiser step -> learning rate and weight decay: functions of the step only, so a resumed run needs no replay."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ffcv_convnext.config import Config


@dataclass(frozen=True, slots=True)
class CosineSchedule:
    """Linear warm-up from 0, then a cosine from `start` to `end`, as in the paper's code.

    The first warm-up step has value 0 and the last one `start`; the cosine would reach `end` at `total_steps`.
    """

    start: float
    end: float
    warmup_steps: int
    total_steps: int

    def __call__(self, step: int) -> float:
        """Return the value at an optimiser step, from 0."""
        if step < self.warmup_steps:
            return self.start * step / max(self.warmup_steps - 1, 1)
        progress = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
        return self.end + 0.5 * (self.start - self.end) * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, slots=True)
class Schedules:
    """Values for an optimiser step."""

    lr: CosineSchedule
    weight_decay: CosineSchedule


def build_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """Convert epochs to optimiser steps. Raises ValueError if the warm-up is longer than the run."""
    schedule, optim = config.schedule, config.optim
    total = schedule.epochs * steps_per_epoch
    warmup = schedule.warmup_steps if schedule.warmup_steps > 0 else schedule.warmup_epochs * steps_per_epoch
    if warmup > total:
        raise ValueError(f"warmup_steps = {warmup}: longer than the run of {total} optimiser steps")
    decay_end = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    return Schedules(
        lr=CosineSchedule(schedule.lr, schedule.min_lr, warmup, total),
        weight_decay=CosineSchedule(optim.weight_decay, decay_end, 0, total),
    )
