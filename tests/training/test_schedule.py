"""Learning rate and weight decay of a step: hand-worked values, and the paper's own arrays for whole runs."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ffcv_convnext.config import Config
from ffcv_convnext.training.schedule import CosineSchedule, Schedules, build_schedules


def schedules(steps_per_epoch: int = 10, **settings: Any) -> Schedules:
    return build_schedules(Config.from_flat({"epochs": 6, "warmup_epochs": 1, "lr": 1.0, **settings}), steps_per_epoch)


def paper_s_array(base: float, final: float, epochs: int, per_epoch: int, warmup: int) -> NDArray[np.float64]:
    """A run's values as the paper's code builds them: a linspace from 0 to base, then half a cosine to final."""
    steps = np.arange(epochs * per_epoch - warmup)
    cosine = final + 0.5 * (base - final) * (1 + np.cos(np.pi * steps / max(len(steps), 1)))
    return np.concatenate([np.linspace(0, base, warmup), cosine])


def test_known_values_of_a_run() -> None:
    """60 steps, 10 of them warm-up: 50 of cosine."""
    lr = schedules(min_lr=0.2).lr
    assert lr(0) == 0
    assert lr(3) == pytest.approx(1 / 3)
    assert lr(9) == 1  # last warm-up step
    assert lr(10) == 1  # first cosine step
    assert lr(35) == pytest.approx(0.6)  # half-way between 1 and 0.2
    assert lr(10 + 50 / 3) == pytest.approx(0.2 + 0.4 * 1.5)  # cos(60 degrees) is a half
    assert lr(59) == pytest.approx(0.2 + 0.4 * (1 + math.cos(math.pi * 49 / 50)))
    assert lr(60) == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "warmup"),
    [
        ({"epochs": 300, "warmup_epochs": 20, "lr": 4e-3, "min_lr": 1e-6}, 6240),  # the recipe's 312 steps an epoch
        ({"epochs": 30, "warmup_epochs": 0}, 0),
        ({"epochs": 3, "warmup_steps": 100, "warmup_epochs": 2}, 100),
        ({"epochs": 3, "warmup_steps": 0, "warmup_epochs": 2}, 624),
        ({"epochs": 2, "warmup_epochs": 2}, 624),
        ({"epochs": 2, "warmup_steps": 1}, 1),
    ],
)
def test_every_step_has_the_value_of_the_paper_s_array(settings: dict[str, Any], warmup: int) -> None:
    config = Config.from_flat({"warmup_epochs": 1, **settings}).schedule
    expected = paper_s_array(config.lr, config.min_lr, config.epochs, 312, warmup)
    lr = schedules(312, **settings, **({} if "lr" in settings else {"lr": config.lr})).lr
    assert np.allclose([lr(step) for step in range(len(expected))], expected, rtol=1e-12, atol=1e-18)


def test_weight_decay_stays_or_follows_a_cosine_without_warm_up() -> None:
    constant = schedules(weight_decay=0.05).weight_decay
    assert {constant(step) for step in (0, 5, 9, 30, 59)} == {0.05}
    moving = schedules(weight_decay=0.05, weight_decay_end=0.45).weight_decay
    expected = paper_s_array(0.05, 0.45, 6, 10, 0)
    assert np.allclose([moving(step) for step in range(60)], expected, rtol=1e-12)
    assert moving(30) == pytest.approx(0.25)
    assert schedules(weight_decay=0.05, weight_decay_end=0).weight_decay(60) == pytest.approx(0)


def test_a_step_s_value_needs_no_earlier_step() -> None:
    lr = schedules().lr
    assert [lr(step) for step in (40, 3, 40)] == [lr(40), lr(3), lr(40)]


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    with pytest.raises(ValueError, match="warmup_steps = 61: longer than the run of 60 optimiser steps"):
        schedules(warmup_steps=61)
    schedules(warmup_steps=60)


def test_a_schedule_of_warm_up_only_divides_by_nothing() -> None:
    assert [CosineSchedule(1.0, 0.1, 2, 2)(step) for step in range(3)] == [0, 1, 1]
    assert CosineSchedule(1.0, 0.1, 1, 1)(0) == 0
