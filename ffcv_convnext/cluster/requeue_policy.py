"""Decide whether a job that ended before its run was finished is requeued.

A run that makes progress is requeued without limit: every newer checkpoint resets the count. A run that fails
MAX_FAILURES times at the same checkpoint would fail again; a run that is interrupted MAX_INTERRUPTIONS times at the
same checkpoint never gets enough time to reach the next one.
"""

from __future__ import annotations

import time
from pathlib import Path

from ffcv_convnext.errors import EXIT_INTERRUPTED
from ffcv_convnext.run_folder import read_attempts, record_attempt

MAX_FAILURES = 3
MAX_INTERRUPTIONS = 10


def should_requeue(folder: Path, job: str, status: int) -> bool:
    """Record in attempts.jsonl that a job ended with exit status `status` (not 0), and decide.

    folder: the run folder.   job: its id; each job has its own count.
    """
    saved = max((path.stat().st_mtime for path in folder.glob("checkpoint-*.pth")), default=None)
    folder.mkdir(parents=True, exist_ok=True)
    now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    record_attempt(folder, {"time": now, "job": job, "status": status, "checkpoint_saved": saved})
    statuses = [
        attempt["status"]
        for attempt in read_attempts(folder)
        if attempt["job"] == job and attempt.get("checkpoint_saved") == saved
    ]
    interruptions = statuses.count(EXIT_INTERRUPTED)
    return len(statuses) - interruptions < MAX_FAILURES and interruptions < MAX_INTERRUPTIONS
