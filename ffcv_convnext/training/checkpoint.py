"""Checkpoints that survive a kill at any moment.

A file is written under a temporary name, flushed to disk, then renamed; the one before it stays as
`checkpoint-previous.pth` until the next save. Reading verifies the checksums that torch.save stores, so a truncated
or damaged file is told from a good one, and the previous one is taken.
"""

from __future__ import annotations

import logging
import os
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch

from ffcv_convnext.errors import Failure
from ffcv_convnext.files import replacing

log = logging.getLogger(__name__)

LAST = "checkpoint-last.pth"
PREVIOUS = "checkpoint-previous.pth"
BEST = "checkpoint-best.pth"
BEST_EMA = "checkpoint-best-ema.pth"


class UnreadableCheckpoint(ValueError):
    """A file that is no complete checkpoint; the message says what is wrong with it."""


def write_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write atomically: after a crash `path` holds the old content or the new one. Raises Failure on a full disk."""
    try:
        with replacing(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:  # torch.save reports a full disk as a RuntimeError
        raise Failure(
            f"could not write {path}: {' '.join(str(error).split())}; make room or fix permissions, then run the same "
            "command again: it continues from the checkpoint before"
        ) from error


def read_checkpoint(path: Path, *, map_location: torch.device | str = "cpu") -> dict[str, Any]:
    """Read a checkpoint after verifying its checksums.

    Raises FileNotFoundError, or UnreadableCheckpoint when it is truncated, damaged or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        content = None if damaged else torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError:
        raise UnreadableCheckpoint(
            f"{path} is no checkpoint of ours: it holds Python objects beside tensors, numbers and words"
        ) from None
    except Exception as error:  # a damaged table of contents shows as almost any kind of error
        reason = " ".join(str(error).split())[:200]
        raise UnreadableCheckpoint(f"{path} is truncated or damaged: {reason}") from None
    if damaged is not None:
        raise UnreadableCheckpoint(f"{path} is damaged: the checksum of its part {damaged} does not match")
    if not isinstance(content, dict):
        raise UnreadableCheckpoint(f"{path} holds a {type(content).__name__}, not a checkpoint")
    return content


def _another_name(path: Path) -> Path:
    """The same file under a temporary name: a hard link, or a copy where the file system has none."""
    link = path.with_name(f".{path.name}.link.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    return link


class Checkpoints:
    """The checkpoints of one run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def save(self, content: dict[str, Any]) -> Path:
        """Make `content` the newest checkpoint and keep the one before it."""
        last, previous = self.folder / LAST, self.folder / PREVIOUS
        coming = self.folder / ".checkpoint-next.pth"
        write_checkpoint(coming, content)
        if last.exists():
            os.replace(_another_name(last), previous)  # there is a complete `last` at every moment
        os.replace(coming, last)
        return last

    def clear(self) -> None:
        """Remove the folder's checkpoints."""
        for name in (LAST, PREVIOUS, BEST, BEST_EMA):
            (self.folder / name).unlink(missing_ok=True)

    def save_best(self, name: str, content: dict[str, Any]) -> Path:
        write_checkpoint(self.folder / name, content)
        return self.folder / name

    def newest(self, *, map_location: torch.device | str = "cpu") -> tuple[Path, dict[str, Any]] | None:
        """The newest complete checkpoint, or None when there is none at all.

        A damaged one is reported and the one before it taken. Raises Failure when all that exist are damaged.
        """
        found = [path for name in (LAST, PREVIOUS) if (path := self.folder / name).exists()]
        for path in found:
            try:
                return path, read_checkpoint(path, map_location=map_location)
            except UnreadableCheckpoint as error:
                log.warning("%s; trying the one before it", error)
        if found:
            raise Failure(
                f"no checkpoint in {self.folder} can be read; remove {', '.join(p.name for p in found)} to start anew, "
                "or continue from another one with --resume"
            )
        return None
