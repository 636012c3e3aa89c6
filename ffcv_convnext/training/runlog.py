"""The run folder: what was run, on what, and how it went.

config.yaml    the resolved settings; `train.py --config <folder>/config.yaml` repeats the run
run.json       command, versions, git commit, hardware, data; one entry in `starts` for every (re)start
log.jsonl      one object an epoch;  steps.jsonl  one a log point;  TensorBoard events beside them
done           final scores, written when the run has finished
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import platform
import socket
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import IO, Any

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from ffcv_convnext.config import Config, differences, load_config
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.files import read_lines, write_atomically
from ffcv_convnext.host import processor_name
from ffcv_convnext.snapshot import source_commit
from ffcv_convnext.training.distributed import Processes

log = logging.getLogger(__name__)

CONFIG, RUN, EPOCHS, STEPS, DONE = "config.yaml", "run.json", "log.jsonl", "steps.jsonl", "done"
PACKAGES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy", "pillow")


class FolderLock:
    """Held while a run writes to its folder; the kernel lets go of it however the process ends."""

    def __init__(self, folder: Path) -> None:
        """Raises ValueError when another run holds it, PermissionError when the folder cannot be written."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self.file: IO[str] = open(folder / ".lock", "a+")
        except OSError as error:
            raise PermissionError(
                f"output_dir = {folder} cannot be written: {error.strerror}; choose another"
            ) from None
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.seek(0)
            holder = self.file.read().strip()
            self.file.close()
            raise ValueError(
                f"output_dir = {folder} is in use by another run ({holder}); "
                "wait for it, stop it, or choose another output_dir"
            ) from None
        self.file.truncate(0)
        self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self.file.flush()

    def release(self) -> None:
        self.file.close()


def setup_logging(folder: Path | None, processes: Processes) -> None:
    """Warnings and news to the console from rank 0 (past a progress bar), and everything to a file of each rank."""
    root = logging.getLogger("ffcv_convnext")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    handlers: list[logging.Handler] = []
    if processes.is_main:
        handlers.append(_ConsoleHandler())
        handlers[-1].setFormatter(_LevelFormatter())
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)  # rank 0 may be later than the others
        handlers.append(logging.FileHandler(folder / f"rank{processes.rank}.log"))
        handlers[-1].setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    for handler in handlers:
        root.addHandler(handler)


def log_end(error: Exception) -> None:
    """Write what ended the run to this process's own file; the console hears it from the command line."""
    level = logging.WARNING if isinstance(error, Interrupted) else logging.ERROR
    plain = isinstance(error, Failure | Interrupted | ValueError | FileNotFoundError)
    text = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
    for handler in logging.getLogger("ffcv_convnext").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, level, __file__, 0, text, (), None))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def check_same_config(folder: Path, config: Config) -> None:
    """Raises ValueError when the folder holds a run of settings that compute something else."""
    path = folder / CONFIG
    if not path.exists():
        return
    changed = differences(config, load_config(path))
    if changed:
        raise ValueError(
            f"output_dir = {folder} holds a run with other settings ({'; '.join(changed[:5])}); "
            "choose another output_dir, or remove it to start anew"
        )


def is_done(folder: Path) -> dict[str, Any] | None:
    """Final scores of a finished run, or None."""
    path = folder / DONE
    return json.loads(path.read_text()) if path.exists() else None


def describe_machine(processes: Processes) -> dict[str, Any]:
    """Versions, commit and hardware, so that any figure leads back to what produced it."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    device = processes.device
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": socket.gethostname(),
        "processes": processes.world,
        "device_type": device.type,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{processor_name()} CPU",
        "cpu_cores": os.cpu_count(),
        "git": source_commit(),
        "versions": versions,
        "command": sys.argv,
    }


class RunLog:
    """Writes a run folder's logs, from `resume_at` on; on processes other than the main one it writes nothing."""

    def __init__(self, folder: Path, config: Config, processes: Processes, facts: dict[str, Any]) -> None:
        self.folder = folder
        self.config = config
        self.processes = processes
        self.active = processes.is_main
        self.bar: tqdm[Any] | None = None
        self.tensorboard: SummaryWriter | None = None
        self.wandb: Any = None
        if not self.active:
            return
        path = folder / RUN
        self.run = json.loads(path.read_text()) if path.exists() else {"starts": []}
        self.run.update(facts)
        self.run["starts"].append(describe_machine(processes))

    def _write_run(self) -> None:
        write_atomically(self.folder / RUN, (json.dumps(self.run, indent=2) + "\n").encode())

    def resume_at(self, step: int, epoch: int) -> None:
        """Write down settings and facts, drop what was logged after the state the run continues from, open trackers."""
        if not self.active:
            return
        write_atomically(self.folder / CONFIG, self.config.to_yaml().encode())
        (self.folder / DONE).unlink(missing_ok=True)  # of a run that is done anew (auto_resume false)
        _keep_lines(self.folder / EPOCHS, lambda entry: entry["epoch"] < epoch)
        _keep_lines(self.folder / STEPS, lambda entry: entry["step"] <= step)
        self.run["starts"][-1]["from_step"] = step
        self._write_run()
        self.tensorboard = SummaryWriter(str(self.folder), purge_step=step + 1)
        if self.config.run.log_wandb:
            self._start_wandb()

    def _start_wandb(self) -> None:
        try:
            import wandb
        except ImportError:
            raise ValueError("log_wandb = true: wandb is not installed; pip install wandb, or drop the flag") from None
        self.wandb = wandb.init(
            project=self.config.run.project,
            name=self.folder.name,
            dir=str(self.folder),
            id=self.run.get("wandb_id"),
            resume="allow",
            config=self.config.flat(),
        )
        self.run["wandb_id"] = self.wandb.id
        self._write_run()

    def start_epoch(self, epoch: int, first_step: int, num_steps: int) -> None:
        """Show a progress bar on a terminal."""
        if self.active and sys.stderr.isatty():
            total = f"{epoch + 1}/{self.config.schedule.epochs}"
            self.bar = tqdm(desc=f"epoch {total}", initial=first_step, total=num_steps, unit="step", leave=False)

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update()

    def train(self, entry: dict[str, Any], num_steps: int) -> None:
        """Log one point within an epoch. entry: step, epoch, loss, lr, weight_decay, images_per_s (may be None)."""
        if not self.active:
            return
        self._append(STEPS, entry)
        self._track(entry, "train", entry["step"])
        rate = f"{entry['images_per_s']:.0f} images/s" if entry["images_per_s"] else "first interval, not timed"
        if self.bar is not None:
            self.bar.set_postfix_str(f"loss {entry['loss']:.3f}, {rate}")
        else:
            log.info(
                "epoch %d/%d step %d/%d: loss %.4f, lr %.2e, %s",
                entry["epoch"] + 1,
                self.config.schedule.epochs,
                entry["step"] % num_steps or num_steps,
                num_steps,
                entry["loss"],
                entry["lr"],
                rate,
            )

    def epoch(self, entry: dict[str, Any]) -> None:
        """Log an epoch with its evaluation; keys as documented in docs/run-folder.md."""
        self.end_bar()
        if not self.active:
            return
        self._append(EPOCHS, entry)
        self._track(entry, "epoch", entry["step"])
        averaged = f", averaged weights {entry['test_acc1_ema']:.2f} %" if "test_acc1_ema" in entry else ""
        log.info(
            "epoch %d/%d: train loss %.4f, val top-1 %.2f %%%s%s",
            entry["epoch"] + 1,
            self.config.schedule.epochs,
            entry["train_loss"],
            entry["test_acc1"],
            averaged,
            f", {entry['images_per_s']:.0f} images/s" if entry["images_per_s"] else "",
        )

    def done(self, scores: dict[str, Any]) -> None:
        if self.active:
            write_atomically(self.folder / DONE, (json.dumps(scores) + "\n").encode())

    def flush(self) -> None:
        """Hand buffered events over to the system, which keeps them if this process is killed."""
        if self.tensorboard is not None:
            self.tensorboard.flush()

    def end_bar(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        self.end_bar()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _append(self, name: str, entry: dict[str, Any]) -> None:
        with open(self.folder / name, "a") as file:
            file.write(json.dumps(entry) + "\n")

    def _track(self, entry: dict[str, Any], group: str, step: int) -> None:
        numbers = {
            f"{group}/{key}": value
            for key, value in entry.items()
            if key not in ("step", "epoch") and isinstance(value, int | float)
        }
        assert self.tensorboard is not None
        for key, value in numbers.items():
            self.tensorboard.add_scalar(key, value, step)
        if self.wandb is not None:
            self.wandb.log(numbers, step=step)


def _keep_lines(path: Path, wanted: Any) -> None:
    if path.exists():
        kept = [entry for entry in read_lines(path) if wanted(entry)]
        write_atomically(path, "".join(json.dumps(entry) + "\n" for entry in kept).encode())
