"""Explain a broken connection between the processes of a run: which of them was lost first.

Each process holds a lock on its own rankN.log, which the operating system releases when the process ends, however it
ends. A process that ends with an error writes it there before it leaves the process group, so before the connections
to it break. The others find the first loss in these files; without a run folder, or if a node is gone together with its
locks, they only report that a process was lost.
"""

from __future__ import annotations

import fcntl
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from ffcv_convnext.errors import LostRank
from ffcv_convnext.run_folder import last_record, log_of_rank, try_lock
from ffcv_convnext.signals import ignore_sigterm
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.runlog import log_end

PATIENCE_S = 3.0  # a killed process's connections may break before its lock is released
_NEXT = "fix the cause there; started again, the run continues from its newest checkpoint"
_SECONDARY = re.compile(r"(rank \d+|another process) was lost first")  # the error of a process that lost another one
_FROM_COLLECTIVE = re.compile(r"\bgloo\b|\bnccl|process ?group|c10d", re.IGNORECASE)
_DISCONNECTED = re.compile(
    r"connection (closed|reset) by|broken pipe|socket closed|recv, got 0 bytes|remote process exited", re.IGNORECASE
)


@contextmanager
def ending(processes: Processes, folder: Path | None) -> Iterator[None]:
    """Log the error that ends the block to this process's own log, then leave the process group.

    folder: the run folder, None without one.   Raises LostRank instead of an error of gloo, NCCL or torch's store that
    was caused by the loss of another process. All other errors, also of a collective, stay as they are.
    """
    try:
        yield
    except Exception as error:
        if processes.world > 1:
            ignore_sigterm()
        lost = _explain(error, processes, folder)
        if lost is None:
            log_end(error)
            raise
        lost.__cause__ = error
        log_end(lost)
        raise lost from error
    finally:
        processes.leave()


def _explain(error: Exception, processes: Processes, folder: Path | None) -> LostRank | None:
    """Return an error that names the process that was lost first; None if `error` has another cause."""
    text = f"{type(error).__name__}: {error}"
    from_collective = isinstance(error, RuntimeError) and (
        isinstance(error, dist.DistError) or _FROM_COLLECTIVE.search(text)
    )
    if processes.world == 1 or not from_collective:
        return None
    deadline = time.monotonic() + PATIENCE_S
    while folder is not None and time.monotonic() < deadline:
        if found := find_lost_rank(folder, processes):
            return LostRank(f"{found}; {_NEXT}")
        time.sleep(0.05)
    if not _DISCONNECTED.search(text):
        return None
    logs = "the output of the other processes" if folder is None else f"{folder}/rank*.log"
    return LostRank(f"another process was lost first (connection closed); see {logs}; {_NEXT}")


def find_lost_rank(folder: Path, processes: Processes) -> str | None:
    """Return a description of the process that was lost first, from the logs of the others; None if all seem alive."""
    killed = None
    for rank in range(processes.world):
        path = log_of_rank(folder, rank)
        if rank == processes.rank or not path.is_file():
            continue
        level, text = last_record(path)
        if _SECONDARY.match(text):
            continue
        if level == "ERROR":
            return f"rank {rank} was lost first: {text} ({path})"
        if killed is None and not _is_locked(path):
            killed = f"rank {rank} was lost first, without an error: killed, out of memory or crashed ({path})"
    return killed


def _is_locked(path: Path) -> bool:
    with open(path) as file:
        return try_lock(file, fcntl.LOCK_SH) != "free"
