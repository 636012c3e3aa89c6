"""How the runs of a ladder stand: from their folders, what was submitted, and the queue."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ffcv_convnext.cluster import Submission, cancel, holder, log_of, log_of_job, read_submissions, states
from ffcv_convnext.errors import EXIT_INTERRUPTED
from ffcv_convnext.files import read_lines

RunState = Literal["done", "running", "pending", "requeued", "failed", "stopped", "missing", "unknown"]
ERROR = re.compile(r"error: |slurmstepd: |[\w.]*(Error|Exception|Failure)\b")
RECENT = 5  # epochs that the time left is reckoned from


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """One line of the table. Accuracies are percent, the best so far."""

    name: str
    seed: int
    job: str
    state: RunState
    epoch: int
    epochs: int
    left_s: float | None  # of a running one
    top1: float | None
    top1_ema: float | None
    images_per_s: float | None
    restarts: int
    error: str  # the last line that tells of one


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The entries of a run folder's run.json, one for each (re)start; [] before the first."""
    path = folder / "run.json"
    starts: list[dict[str, Any]] = json.loads(path.read_text())["starts"] if path.exists() else []
    return starts


def latest_submissions(job_dir: Path) -> list[Submission]:
    """Every run's latest, in the order the runs were first submitted. Raises FileNotFoundError where none was."""
    latest = {submission.folder: submission for submission in read_submissions(job_dir)}
    if not latest:
        raise FileNotFoundError(f"nothing was submitted from {job_dir}; see ffcv-convnext ladder submit --help")
    return list(latest.values())


def read_status(job_dir: Path) -> list[RunStatus]:
    """How every run that was submitted from job_dir stands."""
    submissions = latest_submissions(job_dir)
    jobs = [submission.job for submission in submissions if not submission.is_local]
    queue = states(jobs) if not jobs or shutil.which("squeue") else None
    return [_status(submission, job_dir, queue) for submission in submissions]


def _status(submission: Submission, job_dir: Path, queue: dict[str, str] | None) -> RunStatus:
    folder = Path(submission.folder)
    epochs = read_lines(folder / "log.jsonl")
    state = _state(submission, folder, queue)
    recent = [entry["epoch_s"] for entry in epochs[-RECENT:]]
    epoch = epochs[-1]["epoch"] + 1 if epochs else 0
    rates = [entry["images_per_s"] for entry in epochs if entry["images_per_s"]]
    return RunStatus(
        name=submission.name,
        seed=submission.seed,
        job=submission.job,
        state=state,
        epoch=epoch,
        epochs=submission.epochs,
        left_s=sum(recent) / len(recent) * (submission.epochs - epoch) if state == "running" and recent else None,
        top1=max((entry["test_acc1"] for entry in epochs), default=None),
        top1_ema=max((entry["test_acc1_ema"] for entry in epochs if "test_acc1_ema" in entry), default=None),
        images_per_s=rates[-1] if rates else None,
        restarts=max(len(read_starts(folder)) - 1, 0),
        error="" if state in ("done", "running", "pending") else last_error(log_path(submission, job_dir)),
    )


def _state(submission: Submission, folder: Path, queue: dict[str, str] | None) -> RunState:
    if (folder / "done").exists():
        return "done"
    if holder(folder):
        return "running"
    attempts = read_lines(folder / "attempts.jsonl")
    began = bool(attempts or read_starts(folder))
    if queue is None and not submission.is_local:
        return "unknown"
    job = (queue or {}).get(submission.job)
    if job is not None:
        return "running" if job in ("RUNNING", "CONFIGURING") else "requeued" if began else "pending"
    if attempts and attempts[-1]["status"] != EXIT_INTERRUPTED and attempts[-1]["job"] == submission.job:
        return "failed"
    return "stopped" if began else "missing"


def log_path(submission: Submission, job_dir: Path) -> Path:
    """The file of what a run's rank 0 prints on stderr."""
    if submission.is_local:
        return log_of(job_dir, submission.name, submission.seed)
    return log_of_job(job_dir, submission.job)


def last_error(path: Path) -> str:
    """The last line of a log that tells of an error; '' when none does."""
    if not path.exists():
        return ""
    lines = path.read_text(errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if ERROR.match(line.strip())), "")


def format_status(rows: Sequence[RunStatus], *, width: int = 60) -> str:
    """An aligned table and a line of totals. width: characters of an error that are shown."""
    header = ("run", "seed", "job", "state", "epoch", "left", "top-1", "ema", "images/s", "restarts", "last error")
    cells = [
        (
            row.name,
            str(row.seed),
            row.job,
            row.state,
            f"{row.epoch}/{row.epochs}",
            _duration(row.left_s),
            _number(row.top1, ".2f"),
            _number(row.top1_ema, ".2f"),
            _number(row.images_per_s, ",.0f"),
            str(row.restarts),
            row.error if len(row.error) <= width else f"{row.error[: width - 3]}...",
        )
        for row in rows
    ]
    widths = [max(len(line[i]) for line in (header, *cells)) for i in range(len(header))]
    lines = [
        "  ".join(word.ljust(w) for word, w in zip(line, widths, strict=True)).rstrip() for line in (header, *cells)
    ]
    found = [row.state for row in rows]
    totals = ", ".join(f"{found.count(state)} {state}" for state in dict.fromkeys(found))
    return "\n".join([*lines, f"{len(rows)} runs: {totals}"])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def watch(job_dir: Path, say: Callable[[str], None], *, every_s: float = 10.0) -> None:
    """Show the table again and again, until no run is on its way."""
    while True:
        rows = read_status(job_dir)
        say(f"\x1b[2J\x1b[H{time.strftime('%H:%M:%S')}\n{format_status(rows)}")
        if not any(row.state in ("running", "pending", "requeued") for row in rows):
            return
        time.sleep(every_s)


def find_submissions(job_dir: Path, names: Sequence[str]) -> list[Submission]:
    """The latest submissions of these runs, each 'STEP' (all its seeds) or 'STEP/seedN'; no names: of all.

    Raises ValueError for a name that was not submitted.
    """
    submissions = latest_submissions(job_dir)
    for name in names:
        if not any(name in (s.name, f"{s.name}/seed{s.seed}") for s in submissions):
            known = dict.fromkeys(s.name for s in submissions)
            raise ValueError(f"{name} was not submitted from {job_dir}; there are: {', '.join(known)}")
    return [s for s in submissions if not names or s.name in names or f"{s.name}/seed{s.seed}" in names]


def cancel_runs(job_dir: Path, names: Sequence[str], say: Callable[[str], None]) -> None:
    """Take runs out of the queue, or stop them; their folders stay, and `ladder submit` continues them."""
    chosen = find_submissions(job_dir, names)
    queue = states(submission.job for submission in chosen if not submission.is_local)
    for submission in chosen:
        if submission.job in queue:
            say(f"cancelled job {submission.job}, which was {queue[submission.job]}: {submission.folder}")
        elif process := holder(Path(submission.folder)):
            say(f"{submission.folder} runs outside of the queue ({process}); stop it there, with Ctrl-C")
    if queue:
        cancel(sorted(queue))
    else:
        say("no job of these is in the queue")


def read_log(job_dir: Path, name: str, num_lines: int) -> str:
    """The end of what the latest job of each of a step's runs printed on stderr, each headed by its path."""
    parts = []
    for submission in find_submissions(job_dir, [name]):
        path = log_path(submission, job_dir)
        lines = path.read_text(errors="replace").splitlines() if path.exists() else ["(nothing yet)"]
        parts.append("\n".join([f"==> {path} <==", *lines[-num_lines:]]))
    return "\n\n".join(parts)
