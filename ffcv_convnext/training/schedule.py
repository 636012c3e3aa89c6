"""Optimiser step -> learning rate and weight decay: functions of the step only, so a resumed run needs no replay."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from ffcv_convnext.config import Config

CYCLIC_START = 1e-4  # of the peak; ffcv-imagenet's first learning rate


@dataclass(frozen=True, slots=True)
class Schedule:
    """Linear warm-up, then a decay from `start` to `end`, which all later steps keep.

    cosine, as in the paper's code, and linear: the first warm-up step has value 0 and the last one `start`.
    cyclic, as in ffcv-imagenet: one line from `start` / 10000 to `start` at step `warmup_steps`, and one to `end`.
    decay_end: the step that has `end`.
    """

    start: float
    end: float
    warmup_steps: int
    decay_end: int
    shape: Literal["cosine", "linear", "cyclic"] = "cosine"

    def __call__(self, step: int) -> float:
        """Return the value at an optimiser step, from 0."""
        if step < self.warmup_steps:
            if self.shape == "cyclic":
                return self.start * (CYCLIC_START + (1 - CYCLIC_START) * step / self.warmup_steps)
            return self.start * step / max(self.warmup_steps - 1, 1)
        if step >= self.decay_end:
            return self.end
        progress = (step - self.warmup_steps) / (self.decay_end - self.warmup_steps)
        left = 0.5 * (1 + math.cos(math.pi * progress)) if self.shape == "cosine" else 1 - progress
        return self.end + (self.start - self.end) * left


@dataclass(frozen=True, slots=True)
class Schedules:
    """Values for an optimiser step."""

    lr: Schedule
    weight_decay: Schedule


def build_schedules(config: Config, steps_per_epoch: int) -> Schedules:
    """Convert epochs to optimiser steps. Raises ValueError if warm-up and cooldown are longer than the run.

    The weight decay follows a cosine over the whole run, whatever the learning rate does.
    """
    schedule, optim = config.schedule, config.optim
    total = schedule.epochs * steps_per_epoch
    warmup = schedule.warmup_steps if schedule.warmup_steps > 0 else schedule.warmup_epochs * steps_per_epoch
    decay_end = total - schedule.cooldown_epochs * steps_per_epoch
    if warmup > decay_end:
        before = " before its cooldown" if decay_end < total else ""
        raise ValueError(f"warmup_steps = {warmup}: longer than the run of {decay_end} optimiser steps{before}")
    last_decay = optim.weight_decay if optim.weight_decay_end is None else optim.weight_decay_end
    return Schedules(
        lr=Schedule(schedule.lr, schedule.min_lr, warmup, decay_end, schedule.sched),
        weight_decay=Schedule(optim.weight_decay, last_decay, 0, total),
    )
