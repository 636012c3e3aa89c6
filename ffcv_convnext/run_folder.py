"""A run folder: its files, its lock and the state of its run.

config.yaml     the resolved settings; `train.py --config <folder>/config.yaml` repeats the run
run.json        command, versions, git commit, hardware, data; one entry in `starts` for every (re)start
log.jsonl       one object per epoch;  steps.jsonl  one per log point
rankN.log       log of process N
attempts.jsonl  one object per job that ended before the run was finished
done            final scores, written when the run is finished
.lock           locked by the main process while it trains; holds its process id and host
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Literal

from ffcv_convnext.config import Config, differences, load_config
from ffcv_convnext.errors import EXIT_INTERRUPTED
from ffcv_convnext.files import read_lines

CONFIG, FACTS, EPOCHS, STEPS, DONE = "config.yaml", "run.json", "log.jsonl", "steps.jsonl", "done"
ATTEMPTS, LOCK = "attempts.jsonl", ".lock"
SUBMISSIONS = "submissions.jsonl"  # in a job_dir: what was submitted from there

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) \S+: (.*)$", re.MULTILINE)  # of LOG_FORMAT
_TAIL_BYTES = 1 << 16
RECENT_S = 900  # without a lock that this host can see, a run is running if it wrote a file this recently
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of a file system without locks

RunState = Literal["done", "running", "failed", "stopped"]


def log_of_rank(folder: Path, rank: int) -> Path:
    """Return the path of a process's log."""
    return folder / f"rank{rank}.log"


def is_run(folder: Path) -> bool:
    """Return whether the folder holds a run that has started."""
    return (folder / CONFIG).is_file() and (folder / FACTS).is_file()


def read_facts(folder: Path) -> dict[str, Any]:
    """Return the content of run.json, or {} if there is none."""
    path = folder / FACTS
    facts: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return facts


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of run.json for every (re)start; [] before the first."""
    return read_facts(folder).get("starts") or []


def read_scores(folder: Path) -> dict[str, Any] | None:
    """Return the final scores of a finished run, or None."""
    path = folder / DONE
    return json.loads(path.read_text()) if path.exists() else None


def check_same_config(folder: Path, config: Config) -> None:
    """Raise ValueError if the folder holds a run with settings that compute something else."""
    path = folder / CONFIG
    if path.exists() and (changed := differences(config, load_config(path))):
        raise ValueError(
            f"output_dir = {folder} holds a run with other settings ({'; '.join(changed[:5])}); "
            "choose another output_dir, or remove this one to start again"
        )


class FolderLock:
    """The lock of a run folder. The operating system releases it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Take the lock, and create the folder if it is missing.

        On a file system without locks, `.lock` is written but protects nothing.
        Raises ValueError if another run holds the lock, PermissionError if the folder cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: IO[str] = open(folder / LOCK, "a+")  # noqa: SIM115  it stays open as long as the lock is held
        except OSError as error:
            raise PermissionError(
                f"output_dir = {folder} cannot be written: {error.strerror}; choose another"
            ) from None
        patience_s = 0.5 if _read(self.file) else 5.0  # readers hold the lock for an instant; a run leaves its name
        deadline = time.monotonic() + patience_s
        while (lock := try_lock(self.file, fcntl.LOCK_EX)) == "held" and time.monotonic() < deadline:
            time.sleep(0.05)
        if lock == "held":
            holder = _read(self.file)
            self.file.close()
            raise ValueError(
                f"output_dir = {folder} is in use by another run ({holder}); "
                "wait for it, stop it, or choose another output_dir"
            )
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        """Release the lock and clear the holder's name."""
        with self.file, suppress(OSError):  # the run's result counts, not this
            self.file.truncate(0)


def try_lock(file: IO[str], kind: int) -> Literal["free", "held", "unsupported"]:
    """Take a lock on an open file without waiting; return whether it was free, which means that it is ours now.

    kind: fcntl.LOCK_EX or LOCK_SH.   It is released when the last process that has inherited the open file ends.
    """
    try:
        fcntl.flock(file, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return "held"
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return "unsupported"
    return "free"


def _read(file: IO[str]) -> str:
    file.seek(0)
    return file.read().strip()


def _inspect_lock(folder: Path) -> tuple[Literal["free", "held", "unsupported"], str]:
    """Return the lock's state and the process that took it last, '' if there is none."""
    try:
        with open(folder / LOCK) as file:
            lock = try_lock(file, fcntl.LOCK_SH)
            if lock == "free":
                fcntl.flock(file, fcntl.LOCK_UN)  # before the read, which may take long on a network disk
            return lock, _read(file)
    except FileNotFoundError:
        return "free", ""
    except OSError:  # e.g. another user's file
        return "unsupported", "an unknown process"


def lock_holder(folder: Path) -> str | None:
    """Return 'process N on HOST' for the process that holds the folder's lock, or None."""
    lock, process = _inspect_lock(folder)
    return (process or "a process that has just started") if lock == "held" else None


def is_running(folder: Path) -> bool:
    """Return whether a process trains in the folder at this moment.

    A lock that is held means yes. A free lock means no if it was last taken on this host. If it was taken on another
    host, or the file system has no locks, this host may not see it: then the run counts as running if it wrote to its
    logs in the last RECENT_S seconds, and no end of its job was noted since.
    """
    lock, process = _inspect_lock(folder)
    if lock == "held" or not process:
        return lock == "held"
    if lock == "free" and process.endswith(f" on {socket.gethostname()}"):
        return False
    written = _last_write(folder / EPOCHS, folder / STEPS, log_of_rank(folder, 0))
    return written > _last_write(folder / ATTEMPTS) and time.time() - written < RECENT_S


def _last_write(*paths: Path) -> float:
    """Return when the last of some files was written, seconds since 1970; 0 if none exists."""
    return max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)


def last_record(path: Path) -> tuple[str, str]:
    """Return level and text of the last record in a process's log; ('', '') if it has none."""
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        records = _RECORD.findall(file.read().decode(errors="replace"))
    level, text = records[-1] if records else ("", "")
    return str(level), str(text)


def read_error(folder: Path) -> str | None:
    """Return the error that ended the run's last start; None if there was none or the run only stopped.

    It is the error at the end of a process's log, or else the exit status in attempts.jsonl.
    """
    starts = read_starts(folder)
    last = starts[-1] if starts else {}
    for rank in range(last.get("processes", 1)):
        path = log_of_rank(folder, rank)
        if not path.is_file():
            continue
        level, text = last_record(path)
        if level in ("ERROR", "CRITICAL"):
            return text
    attempt = (read_lines(folder / ATTEMPTS) or [{}])[-1]
    if attempt.get("status", EXIT_INTERRUPTED) != EXIT_INTERRUPTED and attempt.get("time", "") >= last.get("time", ""):
        return f"job {attempt['job']} ended with exit status {attempt['status']}"
    return None


def run_state(folder: Path) -> RunState:
    """Return the state of a run from its folder alone, for `report` and `ladder status`, which adds the queue's."""
    if (folder / DONE).exists():
        return "done"
    if is_running(folder):
        return "running"
    if (folder / DONE).exists():  # it has just finished
        return "done"
    return "failed" if read_error(folder) else "stopped"
