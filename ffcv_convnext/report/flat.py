"""All runs in one table: the settings that differ between them and their scores, in any order."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ffcv_convnext.config import SETTINGS, format_value, nearest
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.ladder import natural_order
from ffcv_convnext.report.runs import Run
from ffcv_convnext.report.tables import escape

PLACES = ("output_dir", "resume")  # differ between all runs and say nothing
RESULTS = ("state", "epochs_done", "top1", "top1_ema", "best_top1", "best_top1_ema", "images_per_s", "minutes")
DECIMALS = {"top1": 2, "top1_ema": 2, "best_top1": 2, "best_top1_ema": 2, "images_per_s": 0, "minutes": 1}


@dataclass(frozen=True, slots=True)
class FlatTable:
    """One row for each run. Accuracies are percent; a missing value is None."""

    columns: list[str]
    rows: list[dict[str, Any]]

    def to_csv(self) -> str:
        """Return CSV; missing values are empty."""
        file = io.StringIO()
        writer = csv.DictWriter(file, fieldnames=self.columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _text(value, None) for name, value in row.items()} for row in self.rows)
        return file.getvalue()

    def to_markdown(self) -> str:
        """Return a table; '-' stands for a missing value."""
        cells = [[escape(_text(row[name], DECIMALS.get(name)) or "-") for name in self.columns] for row in self.rows]
        align = "".join(
            ">" if all(isinstance(row[name], int | float | None) for row in self.rows) else "<" for name in self.columns
        )
        return markdown_table(self.columns, cells, align)


def flat_table(runs: Sequence[Run], sort: str | None = None, *, descending: bool = False) -> FlatTable:
    """Return all runs, ordered by a column or by any setting: numbers by value, text naturally, missing values last.

    sort: None: in the order given.   Raises ValueError for an unknown name.
    """
    flats = [run.config.flat() for run in runs]
    differing = [name for name in SETTINGS if name not in ("seed", *PLACES) and len({repr(f[name]) for f in flats}) > 1]
    if sort in SETTINGS and sort not in ("seed", *differing):
        differing.append(sort)
    columns = ["run", "seed", *differing, *RESULTS]
    if sort is not None and sort not in columns:
        known = [*columns, *SETTINGS]
        raise ValueError(f"--sort {sort}: unknown{nearest(sort, known)}; columns: {', '.join(columns)}, or any setting")
    rows = [
        dict(zip(columns, [run.name, run.seed, *(flat[name] for name in differing), *_results(run)], strict=True))
        for run, flat in zip(runs, flats, strict=True)
    ]
    if sort is not None:
        known_rows = [row for row in rows if row[sort] is not None]
        known_rows.sort(key=lambda row: _key(row[sort]), reverse=descending)
        rows = [*known_rows, *(row for row in rows if row[sort] is None)]
    return FlatTable(columns, rows)


def _results(run: Run) -> list[Any]:
    best = [run.best(metric) for metric in ("test_acc1", "test_acc1_ema")]
    return [
        run.state,
        len(run.epochs),
        run.last("test_acc1"),
        run.last("test_acc1_ema"),
        *(None if found is None else found[0] for found in best),
        run.images_per_s,
        60 * run.hours if run.epochs else None,
    ]


def _key(value: Any) -> tuple[bool, float, list[tuple[bool, int, str]]]:
    if isinstance(value, bool | int | float):
        return False, float(value), []
    return True, 0.0, natural_order(format_value(value))


def _text(value: Any, decimals: int | None) -> str:
    """Return '' for a missing value."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.{decimals}f}" if decimals is not None else f"{value:.10g}"
    return format_value(value)
