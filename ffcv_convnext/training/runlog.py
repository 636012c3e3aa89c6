"""Logs of a run: what was run, on what, and how it went (see run_folder.py for the files)."""

from __future__ import annotations

import fcntl
import logging
import os
import platform
import secrets
import socket
import sys
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure, Interrupted, LostRank
from ffcv_convnext.files import append_lines, damaged_copy, keep_lines, write_object
from ffcv_convnext.host import processor_name
from ffcv_convnext.run_folder import (
    DONE,
    EPOCH,
    EPOCHS,
    FACTS,
    LOG_FORMAT,
    STEP,
    STEPS,
    log_of_rank,
    missing_epochs,
    read_facts,
    try_lock,
    write_config,
)
from ffcv_convnext.snapshot import source_commit
from ffcv_convnext.training.compile_cache import places
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.trackers import Trackers

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "timm", "ffcv", "numba", "numpy", "pillow")


def setup_logging(folder: Path | None, processes: Processes) -> None:
    """Log to the console on rank 0 (above a progress bar), and on every rank to its own file in `folder`.

    The file stays locked until this process ends, and a first line tells the start apart from earlier ones: so the
    other processes see whether this one lives, and with which error it ended (lost_ranks.py).
    """
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
        folder.mkdir(parents=True, exist_ok=True)  # other ranks may get here before rank 0
        file = logging.FileHandler(log_of_rank(folder, processes.rank))
        file.setFormatter(logging.Formatter(LOG_FORMAT))
        assert file.stream is not None
        try_lock(file.stream, fcntl.LOCK_EX)
        handlers.append(file)
    for handler in handlers:
        root.addHandler(handler)
    _log_to_file(
        logging.INFO, f"process {processes.rank} of {processes.world}: {os.getpid()} on {socket.gethostname()}"
    )


def log_end(error: Exception) -> None:
    """Write the error that ended the run to this process's own log; the command line prints it on the console.

    An error that is not ours is followed by its traceback, and a lost process by that of the broken connection.
    """
    level = logging.WARNING if isinstance(error, Interrupted) else logging.ERROR
    plain = isinstance(error, Failure | Interrupted | ValueError | FileNotFoundError)
    text = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
    _log_to_file(level, text, error.__cause__ if isinstance(error, LostRank) else None if plain else error)


def _log_to_file(level: int, text: str, error: BaseException | None = None) -> None:
    """Log to this process's own file only, with the traceback of `error`."""
    trace = None if error is None else (type(error), error, error.__traceback__)
    for handler in logging.getLogger("ffcv_convnext").handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handle(log.makeRecord(log.name, level, __file__, 0, text, (), trace))


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


class _LevelFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


def describe_machine(processes: Processes) -> dict[str, Any]:
    """Return versions, commit and hardware, so that every result can be traced back."""
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
        "float32": {  # how torch computes with float32 on a GPU: ieee, tf32, or none if nothing was chosen
            "matmul_precision": torch.get_float32_matmul_precision(),
            "matmul": torch.backends.cuda.matmul.fp32_precision,
            "convolution": torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # torch declares no types
        },
        "compile_cache": places(),
        "git": source_commit(),
        "versions": versions,
        "command": sys.argv,
    }


class RunLog:
    """Logs of a run folder, written from `resume_at` on. Only the main process reads and writes."""

    def __init__(
        self, folder: Path, config: Config, processes: Processes, facts: Mapping[str, Any], start: Mapping[str, Any]
    ) -> None:
        """Open nothing yet. facts: of the run; start: of this start, beside the machine's."""
        self.folder = folder
        self.config = config
        self.processes = processes
        self.active = processes.is_main
        self.bar: tqdm[Any] | None = None
        self.trackers: Trackers | None = None
        self.run_id = ""  # each checkpoint holds it; from `resume_at` on
        if not self.active:
            return
        before = read_facts(folder)
        self.damaged = not before and (folder / FACTS).exists()
        self.run = {"starts": [], **before, **facts}
        self.run["starts"].append({**describe_machine(processes), **start})

    def _write_run(self) -> None:
        write_object(self.folder / FACTS, self.run, indent=2)

    def resume_at(
        self, step: int, epoch: int, *, run_id: str | None = None, continued: bool = False, interval: int = 0
    ) -> None:
        """Write settings and facts, remove log lines after the state the run starts from, open the trackers.

        continued: from a checkpoint of this folder, so its logs go on.   run_id: the checkpoint's; None: run.json's.
        interval: steps since the last log point.
        """
        if not self.active:
            return
        self.run_id = run_id or (continued and self.run.get("run_id")) or secrets.token_hex(8)
        if self.damaged:
            (self.folder / FACTS).replace(damaged_copy(self.folder / FACTS))
        write_config(self.folder, self.config)
        (self.folder / DONE).unlink(missing_ok=True)  # left from a run that is repeated (auto_resume false)
        self.run["run_id"] = self.run_id
        if not continued:
            self.run["first_step"] = step
        self.run["starts"][-1]["from_step"] = step
        self._write_run()
        epochs = self._trim_logs(step, epoch, continued=continued, logged=step - interval)
        wandb = self._start_wandb() if self.config.run.log_wandb else None
        self.trackers = Trackers(self.folder, self.config, step=step, epochs=epochs, continued=continued, wandb=wandb)

    def _trim_logs(self, step: int, epoch: int, *, continued: bool, logged: int) -> list[dict[str, Any]]:
        """Keep the lines up to the checkpoint, and return the epochs; warn if some are damaged or missing.

        logged: the checkpoint's last log point.
        """
        found: list[str] = []
        epochs = keep_lines(
            self.folder / EPOCHS, EPOCH, lambda entry: continued and entry["epoch"] < epoch, found.append
        )
        if continued and not found:
            found = missing_epochs(self.folder, epochs, completed=epoch)
        damaged: list[str] = []
        steps = keep_lines(self.folder / STEPS, STEP, lambda entry: continued and entry["step"] <= step, damaged.append)
        last = steps[-1]["step"] if steps else 0
        if continued and not damaged and last < logged and logged > self.run.get("first_step", 0):
            damaged = [f"{self.folder / STEPS} ends at step {last} instead of {logged}: lines were lost"]
        for message in found + damaged:
            log.warning(message)
        return epochs

    def _start_wandb(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise ValueError("log_wandb = true: wandb is not installed; pip install wandb, or omit the flag") from None
        run = wandb.init(
            project=self.config.run.project,
            name=self.folder.name,
            dir=str(self.folder),
            id=self.run.get("wandb_id"),
            resume="allow",
            config=self.config.flat(),
            allow_val_change=True,  # workers and the like may differ after a restart
        )
        self.run["wandb_id"] = run.id
        self._write_run()
        return run

    def start_epoch(self, epoch: int, first_step: int, num_steps: int) -> None:
        """Show a progress bar on a terminal."""
        if self.active and sys.stderr.isatty():
            total = f"{epoch + 1}/{self.config.schedule.epochs}"
            self.bar = tqdm(desc=f"epoch {total}", initial=first_step, total=num_steps, unit="step", leave=False)

    def advance(self, step_s: float) -> None:
        """Move the progress bar one step; of a process's first step log the time step_s, in seconds."""
        if self.active and "first_step_s" not in self.run["starts"][-1]:
            self.run["starts"][-1]["first_step_s"] = step_s
            self._write_run()
            log.info("the first step took %.1f s, with waiting for data and compiling", step_s)
        if self.bar is not None:
            self.bar.update()

    def train(self, entry: dict[str, Any], num_steps: int) -> None:
        """Log one point within an epoch. entry: step, epoch, loss, lr, weight_decay, images_per_s (may be None)."""
        if not self.active:
            return
        append_lines(self.folder / STEPS, [entry])
        assert self.trackers is not None
        self.trackers.step(entry)
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
        append_lines(self.folder / EPOCHS, [entry])
        assert self.trackers is not None
        self.trackers.epoch(entry)
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
        """Write the final scores, which mark the run as finished."""
        if self.active:
            if self.trackers is not None:
                self.trackers.done(scores)
                self.trackers.flush()
            write_object(self.folder / DONE, scores)

    def flush(self) -> None:
        """Write buffered events to disk, so that they survive if this process is killed."""
        if self.trackers is not None:
            self.trackers.flush()

    def end_bar(self) -> None:
        """Remove the progress bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        self.end_bar()
        if self.trackers is not None:
            self.trackers.close()
