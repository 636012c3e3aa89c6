"""A run folder: its files, their forms, its lock and the state of its run.

config.yaml     the resolved settings; `train.py --config <folder>/config.yaml` repeats the run
run.json        run id, command, versions, git commit, hardware, data; one entry in `starts` for every (re)start
log.jsonl       one object per epoch;  steps.jsonl  one per log point
rankN.log       log of process N
attempts.jsonl  one object per job that ended before the run was finished
done            final scores, written when the run is finished
.lock           locked by the main process while it trains; holds its process id and host

Only a checkpoint is needed to continue a run. Of a damaged file the readers here return what can be used, and warn.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import socket
import time
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import IO, Any, Literal

from ffcv_convnext.config import Config, differences, read_mapping, read_yaml
from ffcv_convnext.errors import EXIT_INTERRUPTED
from ffcv_convnext.files import (
    Damaged,
    Form,
    Warn,
    append_lines,
    damaged_copy,
    read_lines,
    read_object,
    warn_once,
    write_atomically,
)

CONFIG, FACTS, EPOCHS, STEPS, DONE = "config.yaml", "run.json", "log.jsonl", "steps.jsonl", "done"
ATTEMPTS, LOCK = "attempts.jsonl", ".lock"
SUBMISSIONS = "submissions.jsonl"  # in a job_dir: what was submitted from there

_NUMBER = (float, NoneType)  # it may also be NaN: not measured
START = Form(optional={"time": str, "processes": int, "device_type": str, "device": str, "git": str, "from_step": int})
RUN = Form(
    {"starts": [START]},
    {
        "run_id": str,
        "wandb_id": str,
        "first_step": int,
        "n_parameters": int,
        "num_classes": int,
        "global_batch": int,
        "steps_per_epoch": int,
        "data": Form(optional={"train": str, "val": str}),
        "images": Form(optional={"train": int, "val": int}),
    },
)
EPOCH = Form(
    {"epoch": int},
    {"step": int, **dict.fromkeys(("test_acc1", "test_acc1_ema", "images_per_s", "epoch_s"), _NUMBER)},
    unique="epoch",
)
STEP = Form({"step": int}, {"loss": _NUMBER}, unique="step")
ATTEMPT = Form({"time": str, "job": str, "status": int}, {"checkpoint_saved": _NUMBER})
SCORES = Form(
    {"epochs": int},
    {f"test_{name}{suffix}": float for name in ("acc1", "acc5", "loss") for suffix in ("", "_ema")},
)

LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"
_RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) \S+: (.*)$", re.MULTILINE)  # of LOG_FORMAT
_CHECKSUM = re.compile(rb"# checksum ([0-9a-f]{8}) of the lines below")
_TAIL_BYTES = 1 << 16
MAX_EPOCHS = 1_000_000  # more are not looked for
RECENT_S = 900  # without a lock that this host can see, a run is running if it wrote a file this recently
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)  # of a file system without locks

RunState = Literal["done", "running", "failed", "stopped"]


def log_of_rank(folder: Path, rank: int) -> Path:
    """Return the path of a process's log."""
    return folder / f"rank{rank}.log"


def is_run(folder: Path) -> bool:
    """Return whether the folder holds a run that has started."""
    return (folder / CONFIG).is_file() and (folder / FACTS).is_file()


def read_facts(folder: Path, warn: Warn = warn_once) -> dict[str, Any]:
    """Return the content of run.json; {} if there is none, or, with a warning, if it cannot be used."""
    try:
        return read_object(folder / FACTS, RUN) or {}
    except Damaged as error:
        warn(f"{error}; the next start of the run keeps it as {FACTS}.damaged and begins a new one")
        return {}


def read_starts(folder: Path, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Return the entries of run.json for every (re)start; [] before the first."""
    return read_facts(folder, warn).get("starts") or []


def read_scores(folder: Path, warn: Warn = warn_once) -> dict[str, Any] | None:
    """Return the final scores of a finished run; None if there are none, or, with a warning, if they cannot be used."""
    try:
        return read_object(folder / DONE, SCORES)
    except Damaged as error:
        warn(f"{error}; the run counts as unfinished: its command, repeated, writes the file again")
        return None


def read_epochs(folder: Path, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Return the entries of log.jsonl that can be used, with a warning about others and about missing ones."""
    found: list[str] = []
    epochs = read_lines(folder / EPOCHS, EPOCH, found.append)
    for message in found or missing_epochs(folder, epochs):
        warn(message)
    return epochs


def finite(value: Any) -> float | None:
    """Return `value` as a float, or None if it is missing, null, NaN or infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def known(entries: Sequence[Mapping[str, Any]], key: str) -> list[float]:
    """Return the values of a key in those entries that have a finite one."""
    return [value for entry in entries if (value := finite(entry.get(key))) is not None]


def missing_epochs(folder: Path, epochs: list[dict[str, Any]], *, completed: int = 0) -> list[str]:
    """Return a message if log.jsonl lacks epochs, else [].   completed: epochs of the checkpoint that is continued."""
    present = {entry["epoch"] for entry in epochs}
    facts = read_facts(folder, lambda _: None)
    per_epoch, starts = facts.get("steps_per_epoch", 0), facts.get("starts") or [{}]
    if per_epoch > 0:
        completed = max(completed, starts[-1].get("from_step", 0) // per_epoch)
    first = min(present, default=completed)
    if per_epoch > 0 and "first_step" in facts:
        first = facts["first_step"] // per_epoch
    scores = read_scores(folder, lambda _: None) or {}
    end = max(completed, scores.get("epochs", 0), max(present, default=-1) + 1)
    if end - first > MAX_EPOCHS or not (missing := [epoch for epoch in range(first, end) if epoch not in present]):
        return []
    numbers = ", ".join(map(str, missing[:10])) + (", ..." if len(missing) > 10 else "")
    return [f"{folder / EPOCHS} lacks epoch{'s' if len(missing) > 1 else ''} {numbers}: lines were lost"]


def read_attempts(folder: Path, warn: Warn = warn_once) -> list[dict[str, Any]]:
    """Return the ends of jobs before the run was finished."""
    return read_lines(folder / ATTEMPTS, ATTEMPT, warn)


def record_attempt(folder: Path, attempt: dict[str, Any]) -> None:
    """Add an entry to attempts.jsonl."""
    append_lines(folder / ATTEMPTS, [attempt])


def write_config(folder: Path, config: Config) -> None:
    """Write config.yaml, with a checksum in its first line; keep an unreadable one as config.yaml.damaged."""
    path, text = folder / CONFIG, config.to_yaml()
    try:
        read_config(folder)
    except FileNotFoundError:
        pass
    except ValueError:
        path.replace(damaged_copy(path))
    write_atomically(path, f"# checksum {zlib.crc32(text.encode()):08x} of the lines below\n{text}".encode())


def read_config(folder: Path) -> Config:
    """Return the settings of a run folder. Raises FileNotFoundError, or ValueError if they cannot be used."""
    path = folder / CONFIG
    settings = read_yaml(path)
    try:
        config = Config.recorded(settings)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if not read_mapping(path):
        raise ValueError(f"{path} holds no settings")
    first, _, rest = path.read_bytes().partition(b"\n")
    written = _CHECKSUM.fullmatch(first)
    if written and int(written[1], 16) != zlib.crc32(rest):
        raise ValueError(
            f"{path} was changed after the run wrote it: its checksum does not match; if that was on purpose, remove "
            "the file's first line"
        )
    return config


def check_same_config(folder: Path, config: Config) -> None:
    """Raise ValueError if the folder holds a run with settings that compute something else.

    A config.yaml that cannot be used is a warning: the checkpoint holds the settings, too, and they must be the same.
    """
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        theirs = read_config(folder)
    except ValueError as error:
        warn_once(f"{error}; the next start of the run keeps it as {CONFIG}.damaged and writes a new one")
        return
    if changed := differences(config, theirs):
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
            self.file: IO[str] = open(folder / LOCK, "a+", errors="replace")  # noqa: SIM115  it stays open as long as the lock is held
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
        with open(folder / LOCK, errors="replace") as file:
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


def read_error(folder: Path, warn: Warn = warn_once) -> str | None:
    """Return the error that ended the run's last start; None if there was none or the run only stopped.

    It is the error at the end of a process's log, or else the exit status in attempts.jsonl.
    """
    last = (read_starts(folder, warn) or [{}])[-1]
    logs = [path for path in folder.glob("rank*.log") if path.stem[4:].isdecimal() and path.is_file()]
    for path in sorted(logs, key=lambda path: int(path.stem[4:])):
        if int(path.stem[4:]) >= last.get("processes", 1):  # of an earlier start
            break
        level, text = last_record(path)
        if level in ("ERROR", "CRITICAL"):
            return text
    attempt = (read_attempts(folder, warn) or [{}])[-1]
    if attempt.get("status", EXIT_INTERRUPTED) != EXIT_INTERRUPTED and attempt["time"] >= last.get("time", ""):
        return f"job {attempt['job']} ended with exit status {attempt['status']}"
    return None


def run_state(folder: Path, warn: Warn = warn_once) -> RunState:
    """Return the state of a run from its folder alone, for `report` and `ladder status`, which adds the queue's."""
    if read_scores(folder, warn) is not None:
        return "done"
    if is_running(folder):
        return "running"
    if read_scores(folder, warn) is not None:  # it has just finished
        return "done"
    return "failed" if read_error(folder, warn) else "stopped"
