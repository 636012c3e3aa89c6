"""Checkpoints that survive a kill at any moment.

A file is written under a temporary name, flushed to disk, then renamed; the previous one stays as
`checkpoint-previous.pth` until the next save. Reading verifies the checksums that torch.save stores: if the newest file
is truncated or damaged, the previous one is used. The training loop waits for a copy in host memory only; a thread
writes it.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

import torch

from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.files import Form, replacing
from ffcv_convnext.training.host_copy import HostCopy

log = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"
BEST = "checkpoint-best.pth"
BEST_EMA = "checkpoint-best-ema.pth"

_LOSS = Form({"total": float, "num_steps": int})
STATE = Form(  # of the newest and the previous checkpoint; `run` is the run's id
    {
        **dict.fromkeys(("model", "optimizer", "scaler", "best", "config"), dict),
        **dict.fromkeys(("epoch", "step", "global_batch"), int),
        **dict.fromkeys(("epoch_loss", "interval_loss"), _LOSS),
        "data": str,
    },
    {"ema": (dict, NoneType), "run": str},
)


class UnreadableCheckpoint(ValueError):
    """A file is not a complete checkpoint."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: after a crash `path` has the old or the new content. Raises Failure on a full disk."""
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise Failure(
            f"could not write {path}: {' '.join(str(error).split())}; make room or fix permissions, then run the same "
            "command again: it continues from the previous checkpoint"
        ) from error


def read_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint after verifying its checksums.

    Raises FileNotFoundError, or UnreadableCheckpoint if it is truncated, damaged or another kind of file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UnreadableCheckpoint(
            f"{path} is not a checkpoint of ffcv-convnext: it contains Python objects besides tensors and numbers"
        ) from None
    except Interrupted:  # a signal during a start is not damage
        raise
    except Exception as error:  # a damaged table of contents raises almost any type
        reason = " ".join(str(error).split())[:200]
        raise UnreadableCheckpoint(f"{path} is truncated or damaged: {reason}") from None
    if damaged is not None:
        raise UnreadableCheckpoint(f"{path} is damaged: the checksum of its part {damaged} does not match")
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _link(path: Path) -> Path:
    """Return the same file under a temporary name: a hard link, or a copy if the file system has no links."""
    link = path.with_name(f".{path.name}.link.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    return link


class Checkpoints:
    """The checkpoints of one run folder.

    `save` and `save_best` return once the content is copied; a thread writes the copies in the order of the calls. A
    save waits while the copy before it of the same file is still being written. An error of the thread is raised by the
    next save of that file, by `check` or by `wait`, once.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writes: dict[str, Future[None]] = {}  # of each file the last one, unless its outcome is known
        self._copies: dict[str, HostCopy] = {}

    def save(self, content: dict[str, Any]) -> Path:
        """Save the newest checkpoint and keep the previous one. Raises Failure on a full disk."""
        self._write(LAST, content, self._write_last)
        return self.folder / LAST

    def check(self) -> None:
        """Raise Failure if a checkpoint could not be written; does not wait for one that is being written."""
        for name in [name for name, write in self._writes.items() if write.done()]:
            self._finish(name)

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written."""
        return not all(write.done() for write in self._writes.values())

    def wait(self) -> None:
        """Wait until every checkpoint is on disk. Raises Failure if one could not be written."""
        for name in list(self._writes):
            self._finish(name)

    def close(self) -> None:
        """Wait for the thread when a run ends with another error; log the errors of the thread."""
        while self._writes:
            try:
                self.wait()
            except Failure as error:
                log.error("%s", error)
        self._thread.shutdown()

    def _write(self, name: str, content: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        self._finish(name)  # it reads the memory that the next copy fills
        copied = self._copies.setdefault(name, HostCopy()).take(content)
        self._writes[name] = self._thread.submit(write, copied)

    def _finish(self, name: str) -> None:
        if name in self._writes:
            wait([self._writes[name]])  # a signal may end the waiting; the write is not forgotten then
            self._writes.pop(name).result()

    def _write_last(self, content: dict[str, Any]) -> None:
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        new = self.folder / ".checkpoint-next.pth"
        write_checkpoint(new, content)
        if last.exists():
            os.replace(_link(last), previous)  # a complete `last` exists at every moment
        os.replace(new, last)

    def clear(self) -> None:
        """Remove the folder's checkpoints."""
        for name in (LAST, PREVIOUS, BEST, BEST_EMA):
            (self.folder / name).unlink(missing_ok=True)

    def save_best(self, name: str, content: dict[str, Any]) -> Path:
        """Save the checkpoint of the best epoch."""
        self._write(name, content, partial(write_checkpoint, self.folder / name))
        return self.folder / name

    def newest(self, *, map_location: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]] | None:
        """Return the newest complete checkpoint, or None if there is none.

        If it is damaged, logs a warning and uses the previous one. Raises Failure if all are damaged.
        """
        found = [path for name in (LAST, PREVIOUS) if (path := self.folder / name).exists()]
        for path in found:
            try:
                return path, read_checkpoint(path, map_location=map_location)
            except UnreadableCheckpoint as error:
                log.warning("%s; trying the previous one", error)
        if found:
            raise Failure(
                f"no checkpoint in {self.folder} can be read; remove {', '.join(p.name for p in found)} to restart, "
                "or continue from another one with --resume"
            )
        return None
