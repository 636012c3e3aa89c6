"""Whether a job that ended before its run did is worth another try.

A run goes on as long as it gets anywhere: what has saved a newer checkpoint than the time before is started again
without limit. What fails MAX_FAILURES times at the same checkpoint would fail again; what is interrupted
MAX_INTERRUPTIONS times there is never given the time to reach the next.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from ffcv_convnext.errors import EXIT_INTERRUPTED
from ffcv_convnext.files import read_lines

ATTEMPTS = "attempts.jsonl"  # in the run folder: how each start ended that did not finish the run
MAX_FAILURES = 3
MAX_INTERRUPTIONS = 10


def is_worth_another_try(folder: Path, job: str, status: int) -> bool:
    """Write down that a job ended with exit status `status` (not 0), and decide.

    folder: the run's.   job: its id; another job starts counting anew.
    """
    saved = max((path.stat().st_mtime for path in folder.glob("checkpoint-*.pth")), default=None)
    folder.mkdir(parents=True, exist_ok=True)
    entry = {"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "job": job, "status": status, "checkpoint_saved": saved}
    with open(folder / ATTEMPTS, "a") as file:
        file.write(json.dumps(entry) + "\n")
    here = [
        attempt["status"]
        for attempt in read_lines(folder / ATTEMPTS)
        if attempt["job"] == job and attempt["checkpoint_saved"] == saved
    ]
    interruptions = here.count(EXIT_INTERRUPTED)
    return len(here) - interruptions < MAX_FAILURES and interruptions < MAX_INTERRUPTIONS
