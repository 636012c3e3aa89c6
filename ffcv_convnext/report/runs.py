"""Run folders as objects. Nothing else is read."""

from __future__ import annotations

import math
import os
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ffcv_convnext.config import Config
from ffcv_convnext.files import Warn
from ffcv_convnext.ladder import natural_order
from ffcv_convnext.run_folder import (
    RunState,
    finite,
    is_run,
    known,
    log_of_rank,
    read_config,
    read_epochs,
    read_error,
    read_facts,
    read_scores,
    run_state,
)

Metric = Literal["test_acc1", "test_acc1_ema"]

IMAGENET_1K = {"train": 1_281_167, "val": 50_000}


@dataclass(frozen=True, slots=True)
class Run:
    """A run folder. Accuracies are percent of the validation set."""

    folder: Path
    name: str  # path below the folder given by the user
    config: Config
    seed: int
    num_epochs: int
    facts: Mapping[str, Any]  # run.json
    epochs: Sequence[Mapping[str, Any]]  # log.jsonl, one per epoch
    final: Mapping[str, Any]  # scores in `done`; empty if the run is not finished
    state: RunState
    error: str | None  # that ended a failed run

    @property
    def progress(self) -> str:
        """State and epochs: 'done', 'running 120/300', 'failed 3/300'."""
        return self.state if self.state == "done" else f"{self.state} {len(self.epochs)}/{self.num_epochs}"

    def last(self, metric: Metric) -> float | None:
        """Return the value after the last epoch, or None if it was not measured."""
        last = self.epochs[-1] if self.epochs else {}
        return finite(self.final.get(metric, last.get(metric)))

    def best(self, metric: Metric) -> tuple[float, int] | None:
        """Return the highest value of any epoch, and that epoch, counted from 1."""
        scores = [(value, entry["epoch"] + 1) for entry in self.epochs if (value := finite(entry.get(metric)))]
        return max(scores, key=lambda score: score[0], default=None)

    @property
    def images_per_s(self) -> float | None:
        """Training rate of all processes together, median over epochs."""
        rates = known(self.epochs, "images_per_s")
        return statistics.median(rates) if rates else None

    @property
    def hours(self) -> float:
        """Time of the epochs in the log; a resumed epoch counts from where it was resumed."""
        return sum(known(self.epochs, "epoch_s")) / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Hours times GPUs, which may differ between starts; None on a CPU."""
        total = 0.0
        for entry in self.epochs:
            start = self._start_of(entry)
            if start.get("device_type") == "cpu" or "processes" not in start:
                return None
            total += (finite(entry.get("epoch_s")) or 0.0) * start["processes"] / 3600
        return total if self.epochs else None

    @property
    def devices(self) -> str:
        """Devices of the newest start, '8 x NVIDIA H200'; '' if run.json has none."""
        start = (self.facts.get("starts") or [{}])[-1]
        return f"{start['processes']} x {start['device']}" if {"processes", "device"} <= start.keys() else ""

    def _start_of(self, entry: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the start that computed this epoch's end: the newest one that continued from before it."""
        starts = self.facts.get("starts") or [{}]
        before = [start for start in starts if start.get("from_step", 0) < entry.get("step", math.inf)]
        return (before or starts)[-1]  # type: ignore[no-any-return]

    @property
    def on_imagenet_1k(self) -> bool:
        """Whether the data has 1,000 classes and ImageNet-1k's number of images, except for a few bad ones."""
        images = self.facts.get("images", {})
        return self.facts.get("num_classes") == 1000 and all(
            0.999 * number <= images.get(split, 0) <= number for split, number in IMAGENET_1K.items()
        )


def read_runs(paths: Iterable[Path]) -> tuple[list[Run], list[str]]:
    """Return the runs in the given folders and below them, and a note on each folder that cannot be read.

    Raises FileNotFoundError if a folder does not exist, ValueError if it holds no run.
    """
    runs: list[Run] = []
    notes: dict[str, None] = {}  # a set in order: a file is read several times
    seen: set[Path] = set()

    def note(message: str) -> None:
        notes[message] = None

    for root in paths:
        if not root.is_dir():
            raise FileNotFoundError(f"{root} is not a folder; expected a run folder, or a folder of run folders")
        found = 0
        for folder in _find(root):
            if folder.resolve() in seen:
                found += 1
                continue
            seen.add(folder.resolve())
            name = folder.relative_to(root).as_posix() if folder != root else folder.resolve().name
            if not is_run(folder):
                error = read_error(folder, note)
                reason = f": {error}" if error else ""
                note(f"{name} has no settings yet: it is starting, or failed at the start{reason}")
                continue
            found += 1
            try:
                runs.append(read_run(folder, name, note))
            except (ValueError, OSError) as unreadable:
                note(f"{name} cannot be read: {' '.join(str(unreadable).split())}")
        if not found:
            raise ValueError(f"{root} is not a run folder and contains none: expected config.yaml and run.json in it")
    return runs, list(notes)


def _find(root: Path) -> Iterator[Path]:
    """Yield run folders and folders of starting runs, in natural order; follow links, skip hidden folders."""
    entered: set[Path] = set()
    for here, folders, files in os.walk(root, followlinks=True):
        folder = Path(here)
        if folder.resolve() in entered:  # a link that leads back
            folders.clear()
            continue
        entered.add(folder.resolve())
        if is_run(folder):
            folders.clear()
        if is_run(folder) or log_of_rank(folder, 0).name in files:
            yield folder
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_order)


def read_run(folder: Path, name: str, warn: Warn) -> Run:
    """Return the run in a folder; warn of files that cannot be used. Raises ValueError if the settings cannot."""
    state, config = run_state(folder, warn), read_config(folder)
    return Run(
        folder=folder,
        name=name,
        config=config,
        seed=config.run.seed,
        num_epochs=config.schedule.epochs,
        facts=read_facts(folder, warn),
        epochs=read_epochs(folder, warn),
        final=read_scores(folder, warn) or {},
        state=state,
        error=read_error(folder, warn) if state == "failed" else None,
    )
