"""Finished and unfinished run folders -> one table. Reads run folders only."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ffcv_convnext.config import load_config
from ffcv_convnext.training import read_lines


@dataclass(frozen=True, slots=True)
class RunSummary:
    """What a run folder tells. Accuracies are percent of the validation set after the last epoch logged."""

    name: str
    epochs: int
    num_epochs: int
    finished: bool
    parameters: int | None
    acc1: float | None
    acc1_ema: float | None
    images_per_s: float | None
    hours: float


def find_runs(paths: Iterable[Path]) -> list[Path]:
    """Run folders among the given folders and directly below them, in order.

    Raises ValueError for a folder that neither is nor holds one, FileNotFoundError for one that does not exist.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder; expected a run folder, or one that holds some")
        inside = [path] if _is_run(path) else sorted(p for p in path.iterdir() if p.is_dir() and _is_run(p))
        if not inside:
            raise ValueError(f"{path} is no run folder and holds none: expected config.yaml and run.json in it")
        found.extend(inside)
    return found


def _is_run(path: Path) -> bool:
    return (path / "config.yaml").exists() and (path / "run.json").exists()


def summarise(folder: Path) -> RunSummary:
    config = load_config(folder / "config.yaml")
    facts = json.loads((folder / "run.json").read_text())
    epochs = read_lines(folder / "log.jsonl")
    last = epochs[-1] if epochs else {}
    rates = [entry["images_per_s"] for entry in epochs if entry["images_per_s"]]
    return RunSummary(
        name=folder.name,
        epochs=len(epochs),
        num_epochs=config.schedule.epochs,
        finished=(folder / "done").exists(),
        parameters=facts.get("n_parameters"),
        acc1=last.get("test_acc1"),
        acc1_ema=last.get("test_acc1_ema"),
        images_per_s=sorted(rates)[len(rates) // 2] if rates else None,
        hours=sum(entry["epoch_s"] for entry in epochs) / 3600,
    )


def format_table(runs: Sequence[RunSummary]) -> str:
    """A Markdown table, aligned so that it reads well on a terminal too."""
    header = ["run", "epochs", "parameters", "top-1 %", "averaged top-1 %", "images/s", "minutes"]
    rows = [
        [
            run.name,
            f"{run.epochs}/{run.num_epochs}" + ("" if run.finished else " unfinished"),
            _number(run.parameters, ",d"),
            _number(run.acc1, ".2f"),
            _number(run.acc1_ema, ".2f"),
            _number(run.images_per_s, ".0f"),
            f"{60 * run.hours:.1f}",
        ]
        for run in runs
    ]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True))]
        return "| " + " | ".join(padded) + " |"

    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (w + 1) + ":" for w in widths[1:])]) + "|"
    return "\n".join([line(header), rule, *(line(row) for row in rows)])


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
