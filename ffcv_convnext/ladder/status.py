"""State of a ladder's runs, from their folders, the submissions and the queue."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ffcv_convnext import run_folder
from ffcv_convnext.cluster import Submission, cancel, last_error, output_of, read_submissions, states
from ffcv_convnext.formatting import format_count, format_duration, format_number, markdown_table
from ffcv_convnext.run_folder import ATTEMPTS, known, lock_holder, read_epochs, read_starts, run_state

RunState = Literal[run_folder.RunState, "pending", "requeued", "missing", "unknown"]
NUM_RECENT = 5  # epochs whose mean time predicts the time left


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One row of the table. Accuracies are percent, the best so far."""

    name: str
    seed: int
    job: str
    state: RunState
    epoch: int
    epochs: int
    left_s: float | None  # None unless it is running
    top1: float | None
    top1_ema: float | None
    images_per_s: float | None
    restarts: int
    error: str  # last line of stderr with an error


def latest_submissions(job_dir: Path) -> list[Submission]:
    """Return every run's latest submission, in the order of the first ones.

    Raises FileNotFoundError if there are none.
    """
    latest = {submission.folder: submission for submission in read_submissions(job_dir)}
    if not latest:
        raise FileNotFoundError(f"{job_dir} holds no submissions; see ffcv-convnext ladder submit --help")
    return list(latest.values())


def read_status(job_dir: Path) -> list[RunStatus]:
    """Return the status of every run submitted from job_dir."""
    submissions = latest_submissions(job_dir)
    jobs = [submission.job for submission in submissions if not submission.is_local]
    queue = states(jobs) if not jobs or shutil.which("squeue") else None
    return [_status(submission, job_dir, queue) for submission in submissions]


def _status(submission: Submission, job_dir: Path, queue: dict[str, str] | None) -> RunStatus:
    folder = Path(submission.folder)
    epochs = read_epochs(folder)
    starts = read_starts(folder)
    state = _state(submission, queue, began=bool(starts) or (folder / ATTEMPTS).exists())
    recent = known(epochs[-NUM_RECENT:], "epoch_s")
    epoch = epochs[-1]["epoch"] + 1 if epochs else 0
    rates = known(epochs, "images_per_s")
    return RunStatus(
        name=submission.name,
        seed=submission.seed,
        job=submission.job,
        state=state,
        epoch=epoch,
        epochs=submission.epochs,
        left_s=sum(recent) / len(recent) * (submission.epochs - epoch) if state == "running" and recent else None,
        top1=max(known(epochs, "test_acc1"), default=None),
        top1_ema=max(known(epochs, "test_acc1_ema"), default=None),
        images_per_s=rates[-1] if rates else None,
        restarts=max(len(starts) - 1, 0),
        error="" if state in ("done", "running", "pending") else last_error(output_of(submission, job_dir)),
    )


def _state(submission: Submission, queue: dict[str, str] | None, *, began: bool) -> RunState:
    """Return the state of the run folder (as `report` does), refined by the job's state in the queue."""
    state = run_state(Path(submission.folder))
    if state in ("done", "running"):
        return state
    if queue is None and not submission.is_local:
        return "unknown"
    job = (queue or {}).get(submission.job)
    if job is not None:
        return "running" if job in ("RUNNING", "CONFIGURING") else "requeued" if began else "pending"
    return state if began or state == "failed" else "missing"


def format_status(rows: Sequence[RunStatus], *, width: int = 60) -> str:
    """Return a table and a line of totals. width: max characters of an error."""
    header = ("run", "seed", "job", "state", "epoch", "left", "top-1", "ema", "images/s", "restarts", "last error")
    cells = [
        (
            row.name,
            str(row.seed),
            row.job,
            row.state,
            f"{row.epoch}/{row.epochs}",
            format_duration(row.left_s),
            format_number(row.top1, ".2f"),
            format_number(row.top1_ema, ".2f"),
            format_number(row.images_per_s, ",.0f"),
            str(row.restarts),
            row.error if len(row.error) <= width else f"{row.error[: width - 3]}...",
        )
        for row in rows
    ]
    found = [row.state for row in rows]
    totals = ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found))
    return f"{markdown_table(header, cells, '<><<>>>>>><')}\n{format_count(len(rows), 'run')}: {totals}"


def watch(job_dir: Path, say: Callable[[str], None], *, every_s: float = 10.0) -> None:
    """Print the table repeatedly until no run is queued or running."""
    while True:
        rows = read_status(job_dir)
        say(f"\x1b[2J\x1b[H{time.strftime('%H:%M:%S')}\n{format_status(rows)}")
        if not any(row.state in ("running", "pending", "requeued") for row in rows):
            return
        time.sleep(every_s)


def find_submissions(job_dir: Path, names: Sequence[str]) -> list[Submission]:
    """Return the latest submissions of some runs, each 'STEP' (all its seeds) or 'STEP/seedN'; no names: all runs.

    Raises ValueError if a name was not submitted.
    """
    submissions = latest_submissions(job_dir)
    for name in names:
        if not any(name in (s.name, f"{s.name}/seed{s.seed}") for s in submissions):
            known = dict.fromkeys(s.name for s in submissions)
            raise ValueError(f"{name} was not submitted from {job_dir}; submitted: {', '.join(known)}")
    return [s for s in submissions if not names or s.name in names or f"{s.name}/seed{s.seed}" in names]


def cancel_runs(job_dir: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Cancel the queued and running jobs of some runs; `ladder submit` continues them."""
    chosen = find_submissions(job_dir, names)
    queue = states(submission.job for submission in chosen if not submission.is_local)
    for submission in chosen:
        if submission.job in queue:
            say(f"cancelled job {submission.job}, which was {queue[submission.job]}: {submission.folder}")
        elif process := lock_holder(Path(submission.folder)):
            say(f"{submission.folder} runs outside the queue ({process}); stop it there with Ctrl-C")
    if queue:
        cancel(sorted(queue))
    else:
        say("none of these runs has a job in the queue")


def read_log(job_dir: Path, name: str, num_lines: int) -> str:
    """Return the last lines of stderr of the latest job of each of a step's runs, each after its path."""
    parts = []
    for submission in find_submissions(job_dir, [name]):
        path = output_of(submission, job_dir)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else ["(no output yet)"]
        parts.append("\n".join([f"==> {path} <==", *lines[-num_lines:]]))
    return "\n\n".join(parts)
