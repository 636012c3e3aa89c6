"""Checkpoints survive a kill, a full disk and damage."""

from __future__ import annotations

import argparse
import os
import pickle
import resource
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import assert_equal

from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.files import remove_leftovers
from ffcv_convnext.training.checkpoint import (
    LAST,
    PREVIOUS,
    Checkpoints,
    UnreadableCheckpoint,
    read_checkpoint,
    write_checkpoint,
)


def content(step: int) -> dict[str, Any]:
    """A checkpoint of some 10 kB whose numbers tell its step."""
    return {
        "model": {"weight": torch.full((50, 50), float(step)), "count": torch.tensor(step)},
        "step": step,
        "best": {"test_acc1": 12.5},
    }


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """Writing a file beyond this size fails, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_checkpoint_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, content(3))
    assert_equal(read_checkpoint(path), content(3))
    assert_equal(torch.load(path, weights_only=True), content(3))
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_full_disk_is_a_failure_and_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, content(1))
    with largest_file(4096), pytest.raises(Failure, match=rf"could not write {path}: .*make room or fix permissions"):
        write_checkpoint(path, content(2))
    assert_equal(read_checkpoint(path), content(1))
    assert os.listdir(tmp_path) == ["a.pth"], "no temporary file takes the room that is missing"


def test_a_missing_folder_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"could not write .*No such file or directory"):
        write_checkpoint(tmp_path / "gone" / "a.pth", content(1))


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_unreadable(share: float, tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, content(1))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UnreadableCheckpoint, match=f"{path} is truncated or damaged"):
        read_checkpoint(path)


def test_a_flipped_bit_is_found_wherever_it_changes_the_content(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    write_checkpoint(path, content(1))
    whole = path.read_bytes()
    random = np.random.default_rng(0)
    positions = random.choice(len(whole), 300, replace=False).tolist() + list(range(len(whole) - 400, len(whole)))
    num_found = 0
    for position in positions:
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(random.integers(8))
        path.write_bytes(damaged)
        try:
            assert_equal(read_checkpoint(path), content(1))  # padding and unused header fields may be damaged
        except UnreadableCheckpoint:
            num_found += 1
    assert num_found > 300


def test_other_files_are_unreadable(tmp_path: Path) -> None:
    path = tmp_path / "a.pth"
    foreign = {"args": argparse.Namespace(lr=1.0), "model": {}}  # what the paper's code stores
    torch.save(foreign, path)
    with pytest.raises(UnreadableCheckpoint, match="not a checkpoint of ffcv-convnext: it contains Python objects"):
        read_checkpoint(path)
    path.write_bytes(pickle.dumps(foreign))
    with pytest.raises(UnreadableCheckpoint, match="not a zip file"):
        read_checkpoint(path)
    torch.save(torch.ones(3), path)
    with pytest.raises(UnreadableCheckpoint, match="holds a Tensor, not a checkpoint"):
        read_checkpoint(path)
    with pytest.raises(FileNotFoundError, match=r"b\.pth does not exist"):
        read_checkpoint(tmp_path / "b.pth")


def test_the_newest_complete_checkpoint_wins(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    checkpoints = Checkpoints(tmp_path)
    assert checkpoints.newest() is None
    for step in (1, 2, 3):
        checkpoints.save(content(step))
    checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest[0].name, newest[1]["step"]) == (LAST, 3)

    (tmp_path / LAST).write_bytes(b"nonsense")
    newest = checkpoints.newest()
    assert newest is not None
    assert (newest[0].name, newest[1]["step"]) == (PREVIOUS, 2)
    assert f"{tmp_path / LAST} is truncated or damaged: File is not a zip file; trying the previous one" in caplog.text

    (tmp_path / PREVIOUS).write_bytes(b"")
    with pytest.raises(Failure, match=f"remove {LAST}, {PREVIOUS} to restart"):
        checkpoints.newest()


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_save_that_ends_between_its_renames_loses_at_most_itself(
    call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(content(1))
    checkpoints.wait()
    calls = []

    def replace(*names: Any) -> None:
        calls.append(names)
        if len(calls) == call:
            raise KeyboardInterrupt
        original(*names)

    original = os.replace
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        checkpoints.save(content(2))
        with pytest.raises(KeyboardInterrupt):
            checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1]["step"] == 1
    checkpoints.save(content(3))
    checkpoints.wait()
    newest = checkpoints.newest()
    assert newest is not None
    assert newest[1]["step"] == 3


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path: Path) -> None:
    for name in (".checkpoint-last.pth.123.tmp", "..checkpoint-next.pth.7.tmp", "notes.tmp", ".lock", "config.yaml"):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".lock", "config.yaml", "notes.tmp"]


def test_a_signal_while_a_checkpoint_is_read_is_not_taken_for_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "checkpoint-last.pth", {"step": 1})

    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Interrupted):
        Checkpoints(tmp_path).newest()


def test_later_steps_do_not_change_what_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    released, original = threading.Event(), torch.save

    def slow(*arguments: Any) -> None:
        assert released.wait(30)
        original(*arguments)

    monkeypatch.setattr(torch, "save", slow)
    checkpoints, state = Checkpoints(tmp_path), content(1)
    checkpoints.save(state)
    state["model"]["weight"].zero_()
    state["best"]["test_acc1"] = 99.0
    assert not (tmp_path / LAST).exists(), "save returned before the file was written"
    released.set()
    checkpoints.wait()
    assert_equal(read_checkpoint(tmp_path / LAST), content(1))


def test_a_full_disk_in_the_thread_is_raised_by_the_next_save_or_wait(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(content(1))
    checkpoints.wait()
    with largest_file(4096):
        checkpoints.save(content(2))
        with pytest.raises(Failure, match=r"could not write .*make room"):
            checkpoints.save(content(3))
        checkpoints.save(content(4))
        with pytest.raises(Failure, match=r"could not write .*make room"):
            checkpoints.wait()
    checkpoints.wait()  # an error is raised once
    assert_equal(read_checkpoint(tmp_path / LAST), content(1))
