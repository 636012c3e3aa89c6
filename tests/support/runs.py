"""Helpers for tests of run folders."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from ffcv_convnext.config import Config
from ffcv_convnext.files import read_lines
from ffcv_convnext.training import engine
from ffcv_convnext.training.checkpoint import read_checkpoint
from ffcv_convnext.training.run import train

TIMINGS = ("images_per_s", "data_wait_s", "train_s", "epoch_s")
STATE = ("model", "ema", "optimizer", "epoch", "step", "best", "epoch_loss", "interval_loss")
TOLERANCE = 1e-6  # between numbers of processes: sums are added in another order


def config_from(settings: dict[str, Any], **changes: Any) -> Config:
    return Config.from_flat({**settings, **changes})


def train_here(settings: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """Train in this process, with one thread: as the nursery does, which is fast beside other processes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train(Config.from_flat({**settings, **changes}))
    finally:
        torch.set_num_threads(threads)


def send_at_step(patch: pytest.MonkeyPatch, step: int, number: signal.Signals) -> None:
    """This process sends itself a signal while it takes the given optimiser step."""

    def train_step(run: engine.Learner, micro_batches: Any) -> None:
        original(run, micro_batches)
        if run.state.step + 1 == step:
            os.kill(os.getpid(), number)

    original = engine.train_step
    patch.setattr(engine, "train_step", train_step)


def log_without_timings(folder: Path, name: str = "log.jsonl") -> list[dict[str, Any]]:
    return [{k: v for k, v in entry.items() if k not in TIMINGS} for entry in read_lines(folder / name)]


def assert_equal(ours: Any, theirs: Any, *, where: str = "state", tolerance: float = 0.0) -> None:
    """Compare nested dicts and lists of tensors and numbers, bit for bit unless a tolerance is given."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs), where
        for key in theirs:
            assert_equal(ours[key], theirs[key], where=f"{where}.{key}", tolerance=tolerance)
    elif isinstance(theirs, list | tuple):
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(a, b, where=f"{where}[{i}]", tolerance=tolerance)
    elif isinstance(theirs, torch.Tensor):
        difference = (ours.double() - theirs.double()).abs().max().item() if theirs.numel() else 0.0
        assert difference <= tolerance, f"{where} differs by {difference:g}"
    elif isinstance(theirs, float):
        assert math.isclose(ours, theirs, rel_tol=tolerance, abs_tol=tolerance), f"{where}: {ours} != {theirs}"
    else:
        assert ours == theirs, where


def assert_same_run(folder: Path, other: Path) -> None:
    """Assert that two finished runs have the same state, bit for bit, and the same logs except timings."""
    assert (folder / "done").read_text() == (other / "done").read_text()
    ours, theirs = (read_checkpoint(f / "checkpoint-last.pth") for f in (folder, other))
    for key in STATE:
        assert_equal(ours[key], theirs[key], where=key)
    for name in ("checkpoint-best.pth", "checkpoint-best-ema.pth"):
        ours, theirs = (read_checkpoint(f / name) for f in (folder, other))
        assert_equal({**ours, "config": 0}, {**theirs, "config": 0}, where=name)
    for name in ("log.jsonl", "steps.jsonl"):
        assert log_without_timings(folder, name) == log_without_timings(other, name)


def assert_same_training(folder: Path, other: Path, *, buffers: bool = True, tolerance: float = TOLERANCE) -> None:
    """Assert that weights, optimiser state and logged losses of two runs agree to a tolerance."""
    ours, theirs = (read_checkpoint(f / "checkpoint-last.pth") for f in (folder, other))
    assert ours["step"] == theirs["step"]
    for part in ("model", "ema"):
        for name in theirs[part]:
            if buffers or not re.search("running|num_batches", name):
                assert_equal(ours[part][name], theirs[part][name], where=name, tolerance=tolerance)
    assert_equal(ours["optimizer"]["state"], theirs["optimizer"]["state"], where="optimizer", tolerance=tolerance)
    keys = ["epoch", "step", "train_loss"] + (["test_acc1", "test_acc5", "test_loss", "test_loss_ema"] * buffers)
    logs = ([{key: entry[key] for key in keys} for entry in log_without_timings(f)] for f in (folder, other))
    assert_equal(*logs, where="log", tolerance=tolerance)
