"""Decide whether a run that ended before it was finished is started again: one policy for Slurm and for this machine.

A run that makes progress is started again without limit: every newer checkpoint resets the count. A run that fails
MAX_FAILURES times at the same checkpoint would fail again; a run that is interrupted MAX_INTERRUPTIONS times at the
same checkpoint never gets enough time to reach the next one. Wrong settings stay wrong. docs/cluster.md has the table.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ffcv_convnext.config import Config
from ffcv_convnext.errors import EXIT_INTERRUPTED, EXIT_USAGE, FULL_DISK
from ffcv_convnext.run_folder import ATTEMPTS, read_attempts, read_starts, record_attempt

MAX_FAILURES = 3
MAX_INTERRUPTIONS = 10
RESUMABLE = "checkpoint-last.pth"  # a run also saves its best weights, but does not continue from them


class Decision(NamedTuple):
    """Whether a run is started again, and why."""

    again: bool
    reason: str  # '<run> <reason>' is a sentence


def decide(folder: Path, job: str, status: int, progress: Sequence[Path] | None = None) -> Decision:
    """Record in attempts.jsonl that a job ended with exit status `status` (not 0), and decide.

    folder: the run folder.   job: its id; each job has its own count.   status: of the process that failed first; 128
    plus the signal for a killed one, 75 if all were interrupted.   progress: files from which the work continues; it
    has made progress if one of them is newer. None: the run's checkpoint.
    """
    files = [folder / RESUMABLE] if progress is None else progress
    saved = max((path.stat().st_mtime for path in files if path.exists()), default=None)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        record_attempt(folder, {"time": now, "job": job, "status": status, "checkpoint_saved": saved})
    except OSError as error:
        if error.errno not in FULL_DISK:
            raise
        return Decision(
            False, f"ended with exit status {status}, and {folder / ATTEMPTS} cannot be written: {error.strerror}"
        )
    if status == EXIT_USAGE:
        return Decision(False, "ended with exit status 2: a setting or a path is wrong, so another start cannot help")
    statuses = [
        attempt["status"]
        for attempt in read_attempts(folder)
        if attempt["job"] == job and attempt.get("checkpoint_saved") == saved
    ]
    interruptions = statuses.count(EXIT_INTERRUPTED)
    failures = len(statuses) - interruptions
    if failures < MAX_FAILURES and interruptions < MAX_INTERRUPTIONS:
        return Decision(True, f"ended with exit status {status} before it was finished")
    times = f"failed {failures}" if failures >= MAX_FAILURES else f"was interrupted {interruptions}"
    saving = "a newer checkpoint" if progress is None else "saving more images"
    return Decision(False, f"ended with exit status {status} and {times} times without {saving}")


def next_start(config: Config, num_starts: int) -> Config:
    """Return the config of a job's next start: with `auto_resume false`, only its first start begins from step 0.

    num_starts: number of starts in the run folder when the job was submitted.
    """
    folder = config.run.output_dir
    assert folder is not None
    if config.run.auto_resume or len(read_starts(folder)) == num_starts:
        return config
    return config.replace(auto_resume=True)
