"""Learning rate and weight decay of a step: hand-worked values, and the paper's own arrays for whole runs."""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import NDArray

from ffcv_convnext.config import Config
from ffcv_convnext.training.schedule import Schedule, Schedules, build_schedules


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


@pytest.mark.parametrize("shape", ["cosine", "linear", "cyclic"])
def test_a_schedule_of_warm_up_only_divides_by_nothing(shape: Literal["cosine", "linear", "cyclic"]) -> None:
    start = 1e-4 if shape == "cyclic" else 0
    assert Schedule(1.0, 0.1, 1, 1, shape)(0) == start
    assert Schedule(1.0, 0.1, 2, 2, shape)(0) == start
    assert Schedule(1.0, 0.1, 2, 2, shape)(2) == 0.1
    assert Schedule(1.0, 0.1, 0, 2, shape)(0) == 1.0


# --- other schedules, and cooldown -----------------------------------------------------------------------------------


def test_linear_is_the_warm_up_and_a_line() -> None:
    """60 steps, 10 of them warm-up: 50 from 1 to 0.2."""
    lr = schedules(sched="linear", min_lr=0.2).lr
    assert [lr(step) for step in (0, 3, 9, 10)] == pytest.approx([0, 1 / 3, 1, 1])
    assert [lr(step) for step in (15, 35, 59, 60)] == pytest.approx([0.92, 0.6, 0.2 + 0.8 / 50, 0.2])


def test_cyclic_is_two_lines_that_meet_at_the_peak() -> None:
    lr = schedules(sched="cyclic", min_lr=0.2).lr
    assert [lr(step) for step in (0, 5, 9, 10)] == pytest.approx([1e-4, 0.50005, 0.90001, 1])
    assert [lr(step) for step in (15, 35, 59, 60)] == pytest.approx([0.92, 0.6, 0.2 + 0.8 / 50, 0.2])


@pytest.mark.parametrize(("epochs", "peak", "lr"), [(16, 2, 1.7), (88, 2, 0.5), (6, 5, 1.0), (6, 0, 1.0)])
def test_cyclic_is_ffcv_imagenets(epochs: int, peak: int, lr: float) -> None:
    """Its rate of an epoch is between (0, lr / 10000), (peak, lr) and (epochs, 0), and a line inside an epoch."""
    rates = np.interp(range(epochs + 1), *(([0, peak, epochs], [1e-4 * lr, lr, 0]) if peak else ([0, epochs], [lr, 0])))
    expected = [np.interp(step, [0, 10], rates[epoch : epoch + 2]) for epoch in range(epochs) for step in range(10)]
    ours = schedules(sched="cyclic", epochs=epochs, warmup_epochs=peak, lr=lr, min_lr=0.0).lr
    assert np.allclose([ours(step) for step in range(10 * epochs)], expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sched", ["cosine", "linear", "cyclic"])
def test_the_cooldown_is_the_last_epochs_at_min_lr(sched: str) -> None:
    """6 epochs of 10 steps, 2 of them cooldown, equal 4 epochs and 20 steps at min_lr."""
    lr = schedules(sched=sched, cooldown_epochs=2, min_lr=0.2, weight_decay=0.1, weight_decay_end=0.3)
    shorter = schedules(sched=sched, epochs=4, min_lr=0.2)
    assert [lr.lr(step) for step in range(40)] == [shorter.lr(step) for step in range(40)]
    assert lr.lr(25) == pytest.approx(0.6)
    assert {lr.lr(step) for step in range(40, 60)} == {0.2}
    assert lr.weight_decay(30) == pytest.approx(0.2), "the weight decay has no cooldown"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cooldown_epochs": 6}, "cooldown_epochs = 6: expected fewer than epochs = 6"),
        (
            {"cooldown_epochs": 4, "warmup_epochs": 3},
            "warmup_epochs = 3: expected at most epochs = 6 without cooldown_epochs = 4, 2",
        ),
        (
            {"cooldown_epochs": 4, "warmup_steps": 21},
            "warmup_steps = 21: longer than the run of 20 optimiser steps before its cooldown",
        ),
        ({"sched": "step"}, "sched = step: expected one of cosine, linear, cyclic"),
        ({"cooldown_epochs": -1}, "cooldown_epochs = -1: expected a whole number >= 0"),
    ],
)
def test_schedules_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        schedules(**settings)
    schedules(cooldown_epochs=4, warmup_epochs=2)  # nothing between them
