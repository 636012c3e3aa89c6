"""Exactly one job for a submission, whenever the submitting process is killed.

Before sbatch is called, everything that the job reads is on disk, and submitting.json holds what will be recorded in
submissions.jsonl. The job's name in the queue ends with an id that no other submission has. A later command that finds
submitting.json asks Slurm for that name first: a job that is there is recorded, and only without one it submits. If
Slurm does not answer, nothing is submitted. A lock keeps two commands apart; sbatch inherits it, so that it holds even
if sbatch outlives the command that called it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO

from ffcv_convnext.cluster import slurm
from ffcv_convnext.cluster.submissions import Submission, read_submissions, write_submissions
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import write_atomically
from ffcv_convnext.run_folder import try_lock

INTENT = "submitting.json"  # in job_dir
LOCK = ".submitting"
PATIENCE_S = 10.0  # for another submission to end


@contextmanager
def submitting(job_dir: Path) -> Iterator[IO[str]]:
    """Hold the lock of a job_dir's submissions; yield its file. Raises ValueError if another process holds it."""
    job_dir.mkdir(parents=True, exist_ok=True)
    with open(job_dir / LOCK, "a+") as lock:
        deadline = time.monotonic() + PATIENCE_S
        while try_lock(lock, fcntl.LOCK_EX) == "held":
            if time.monotonic() > deadline:
                lock.seek(0)
                raise ValueError(
                    f"job_dir = {job_dir}: another submission is running ({lock.read().strip()}, or the sbatch that it "
                    "called); nothing submitted. Wait for it or end it, then repeat the command"
                )
            time.sleep(0.05)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        lock.flush()
        yield lock


def submit_once(job_dir: Path, submissions: Sequence[Submission], script: Path, lock: IO[str]) -> list[Submission]:
    """Call sbatch and record the submissions, whose job ids are still empty; return them with their ids.

    Raises Failure if Slurm refuses the job, or if it is unknown whether Slurm has it.
    """
    write_atomically(job_dir / INTENT, json.dumps([asdict(submission) for submission in submissions]).encode())
    name = submissions[0].job_name
    try:
        job = slurm.sbatch(script, name, lock)
    except Failure as error:
        try:
            found = slurm.find_job(name, submissions[0].time)
        except Failure as silence:
            raise Failure(
                f"{error}; it is unknown whether Slurm has the job {name}, because {silence}. Repeat the command when "
                "squeue answers: it looks for the job first"
            ) from None
        if found is None:
            raise Failure(f"nothing submitted: {error}. Change that option; --dry_run prints the script") from None
        job = found
    return _record(job_dir, submissions, job)


def recover(job_dir: Path, say: Callable[[str], None]) -> None:
    """Finish a submission that was interrupted. The caller holds the lock.

    Raises Failure if it is unknown whether Slurm has its job.
    """
    path = job_dir / INTENT
    if not path.exists():
        return
    try:
        submissions = [Submission(**entry) for entry in json.loads(path.read_bytes())]
        name, since = submissions[0].job_name, submissions[0].time
    except (ValueError, TypeError, IndexError) as error:
        raise Failure(
            f"{path}, left by an interrupted submission, is damaged ({error}); nothing submitted. Look for jobs of "
            "this folder with squeue, cancel them, remove the file, then repeat the command"
        ) from None
    try:
        job = slurm.find_job(name, since)
    except Failure as error:
        raise Failure(
            f"an earlier submission was interrupted, and it is unknown whether Slurm has its job {name}: {error}; "
            "nothing submitted. Repeat the command when squeue answers"
        ) from None
    if job is None:
        path.unlink()
        return
    _record(job_dir, submissions, job)
    say(f"job {job} of an interrupted submission found in Slurm and recorded")


def _record(job_dir: Path, submissions: Sequence[Submission], job: str) -> list[Submission]:
    """Write the submissions with their ids unless they are recorded, and remove the intent."""
    array = len(submissions) > 1
    known = [replace(each, job=f"{job}_{index}" if array else job) for index, each in enumerate(submissions)]
    if all(each.job_name != known[0].job_name for each in read_submissions(job_dir)):
        write_submissions(job_dir, known)
    (job_dir / INTENT).unlink()
    return known
