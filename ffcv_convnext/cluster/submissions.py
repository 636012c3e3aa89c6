"""What was submitted from a job_dir: submissions.jsonl, one object a job."""

from __future__ import annotations

import fcntl
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ffcv_convnext.files import read_lines

SUBMISSIONS = "submissions.jsonl"
LOCAL = "local-"


@dataclass(frozen=True, kw_only=True, slots=True)
class Submission:
    """One run handed to the scheduler."""

    time: str
    job: str  # its id; tasks of an array are 17_0, 17_1, ...; LOCAL and a process for what runs on this machine
    name: str  # of the config
    seed: int
    folder: str  # the run folder
    world: int  # processes
    epochs: int
    code: str  # the snapshot it runs
    commit: str
    command: list[str]

    @property
    def is_local(self) -> bool:
        return self.job.startswith(LOCAL)


def write_submissions(job_dir: Path, submissions: list[Submission]) -> None:
    with open(job_dir / SUBMISSIONS, "a") as file:
        file.writelines(json.dumps(asdict(submission)) + "\n" for submission in submissions)


def read_submissions(job_dir: Path) -> list[Submission]:
    """In the order they were made; [] where nothing was."""
    return [Submission(**entry) for entry in read_lines(job_dir / SUBMISSIONS)]


def holder(folder: Path) -> str | None:
    """The process that trains in a run folder at this moment, in words; None when there is none."""
    try:
        with open(folder / ".lock") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return file.read().strip() or "a process that has just started"
    except FileNotFoundError:
        pass
    return None
