"""Run folders -> what each of them tells. Nothing else is read."""

from __future__ import annotations

import json
import math
import os
import re
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ffcv_convnext.config import Config, load_config
from ffcv_convnext.files import read_lines

State = Literal["done", "running", "stopped", "failed"]
Metric = Literal["test_acc1", "test_acc1_ema"]

QUIET_AFTER_S = 900  # a run that wrote nothing for so long does not run: evaluation and start-up take less
IMAGENET_1K = {"train": 1_281_167, "val": 50_000}
RECORD = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} ([A-Z]+) \S+: (.*)$", re.MULTILINE)
TAIL_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder. Accuracies are percent of the validation set."""

    folder: Path
    name: str  # its path below the folder that was asked for
    config: Config
    facts: Mapping[str, Any]  # run.json
    epochs: Sequence[Mapping[str, Any]]  # log.jsonl, one an epoch
    final: Mapping[str, Any]  # the scores in `done`; empty when there is none
    state: State
    error: str | None  # of a failed run: its last words

    @property
    def seed(self) -> int:
        return self.config.run.seed

    @property
    def num_epochs(self) -> int:
        return self.config.schedule.epochs

    @property
    def progress(self) -> str:
        """'done', 'running 120/300', 'failed 3/300'."""
        return self.state if self.state == "done" else f"{self.state} {len(self.epochs)}/{self.num_epochs}"

    def last(self, metric: Metric) -> float | None:
        """After the last epoch; None before the first one, and where it was not measured."""
        last = self.epochs[-1] if self.epochs else {}
        return finite(self.final.get(metric, last.get(metric)))

    def best(self, metric: Metric) -> tuple[float, int] | None:
        """The highest value of any epoch, and that epoch, counted from 1."""
        scores = [(value, entry["epoch"] + 1) for entry in self.epochs if (value := finite(entry.get(metric)))]
        return max(scores, key=lambda score: score[0], default=None)

    @property
    def images_per_s(self) -> float | None:
        """In training, of all processes together: the median over epochs."""
        rates = [rate for entry in self.epochs if (rate := finite(entry.get("images_per_s")))]
        return statistics.median(rates) if rates else None

    @property
    def hours(self) -> float:
        """Of the epochs in the log; an epoch that was resumed counts from there on."""
        return sum(finite(entry.get("epoch_s")) or 0.0 for entry in self.epochs) / 3600

    @property
    def gpu_hours(self) -> float | None:
        """The same times the GPUs at work, which may differ between starts; None on a CPU."""
        total = 0.0
        for entry in self.epochs:
            start = self._start_of(entry)
            if start.get("device_type") == "cpu" or "processes" not in start:
                return None
            total += (finite(entry.get("epoch_s")) or 0.0) * start["processes"] / 3600
        return total if self.epochs else None

    @property
    def devices(self) -> str:
        """'8 x NVIDIA H200', of the newest start; '' when run.json does not tell."""
        start = (self.facts.get("starts") or [{}])[-1]
        return f"{start['processes']} x {start['device']}" if {"processes", "device"} <= start.keys() else ""

    def _start_of(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """The start that computed this epoch's end: the newest one that continued from before it."""
        starts = self.facts.get("starts") or [{}]
        before = [start for start in starts if start.get("from_step", 0) < entry.get("step", math.inf)]
        return (before or starts)[-1]  # type: ignore[no-any-return]

    @property
    def on_imagenet_1k(self) -> bool:
        """Whether run.json tells of 1,000 classes and ImageNet-1k's number of images, but for a few bad ones."""
        images = self.facts.get("images", {})
        return self.facts.get("num_classes") == 1000 and all(
            0.999 * number <= images.get(split, 0) <= number for split, number in IMAGENET_1K.items()
        )


def finite(value: Any) -> float | None:
    """The number, or None for what is none: absent, null, NaN, infinite."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """The runs among the given folders and below them, and a line on each folder that cannot be read.

    Raises FileNotFoundError for a folder that does not exist, ValueError for one with no run in it.
    """
    runs: list[Run] = []
    notes: list[str] = []
    seen: set[Path] = set()
    for root in paths:
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is no folder; expected a run folder, or one that holds some")
        found = 0
        for folder in _find(root):
            if folder.resolve() in seen:
                found += 1
                continue
            seen.add(folder.resolve())
            name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
            if not is_run(folder):
                notes.append(f"{name} holds no settings yet: it is starting, or failed before{_reason(folder)}")
                continue
            found += 1
            try:
                runs.append(read_run(folder, name))
            except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
                notes.append(f"{name} cannot be read: {' '.join(str(error).split())}")
        if not found:
            raise ValueError(f"{root} is no run folder and holds none: expected config.yaml and run.json in it")
    return runs, notes


def _find(root: Path) -> Iterator[Path]:
    """Run folders, and those about to become one, in reading order; links are followed, hidden folders are not."""
    entered: set[Path] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        folder = Path(here)
        if folder.resolve() in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(folder.resolve())
        if is_run(folder):
            folders.clear()
        if is_run(folder) or "rank0.log" in files:
            yield folder
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=reading_order)


def reading_order(text: str) -> list[tuple[bool, int, str]]:
    """A key that sorts numbers by value: seed2 before seed10."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", text)]


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").is_file() and (folder / "run.json").is_file()


def read_run(folder: Path, name: str) -> Run:
    """Raises ValueError for settings or facts that cannot be read."""
    done = folder / "done"
    finished = done.exists()
    facts = json.loads((folder / "run.json").read_text())
    error = None if finished else _error(folder, (facts.get("starts") or [{}])[-1].get("processes", 1))
    state: State = "done" if finished else "failed" if error else "running" if _is_active(folder) else "stopped"
    return Run(
        folder=folder,
        name=name,
        config=load_config(folder / "config.yaml"),
        facts=facts,
        epochs=read_lines(folder / "log.jsonl"),
        final=json.loads(done.read_text()) if finished else {},
        state=state,
        error=error,
    )


def _is_active(folder: Path) -> bool:
    written = [
        path.stat().st_mtime for name in ("log.jsonl", "steps.jsonl", "rank0.log") if (path := folder / name).exists()
    ]
    return time.time() - max(written, default=0) < QUIET_AFTER_S


def _error(folder: Path, num_processes: int) -> str | None:
    """The error that a process's log ends with; None when the run went on after it, or just stopped."""
    for rank in range(num_processes):
        path = folder / f"rank{rank}.log"
        if not path.is_file():
            continue
        with open(path, "rb") as file:
            file.seek(max(0, path.stat().st_size - TAIL_BYTES))
            records = RECORD.findall(file.read().decode(errors="replace"))
        if records and records[-1][0] in ("ERROR", "CRITICAL"):
            return str(records[-1][1])
    return None


def _reason(folder: Path) -> str:
    error = _error(folder, 1)
    return f": {error}" if error else ""
