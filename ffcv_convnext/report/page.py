"""A report as one self-contained HTML page: the figure, tables, training curves, every run."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from ffcv_convnext.report.figure import draw, to_inline
from ffcv_convnext.report.ranking import (
    neighbours,
    neighbours_caption,
    neighbours_table,
    neighbours_title,
    ranking_caption,
    ranking_table,
    rankings,
)
from ffcv_convnext.report.runs import Run
from ffcv_convnext.report.scatter import draw_rankings
from ffcv_convnext.report.summary import Report, Row
from ffcv_convnext.report.tables import Table, caption, others_caption, others_table, section_table, table_of_runs
from ffcv_convnext.run_folder import finite

CURVES = ("test_acc1", "test_acc1_ema", "test_loss", "test_loss_ema", "train_loss", "images_per_s")


def to_html(report: Report, svg: bytes | None = None) -> str:
    """Return the page; its script draws the curves. svg: the report's figure; None: drawn here.

    Raises ModuleNotFoundError without matplotlib.
    """
    if svg is None:
        (svg,) = draw(report, ["svg"])
    template = files("ffcv_convnext.report").joinpath("page.html").read_text(encoding="utf-8")
    parts = {
        "TABLES": _tables(report) + _order(report),
        "FIGURE": to_inline(svg),
        "RUNS": _table(table_of_runs(report.runs)),
        "CURVES": _curves(report),
    }
    return re.sub(r"<!--([A-Z]+)-->", lambda marker: parts[marker[1]], template)


def _tables(report: Report) -> str:
    parts = []
    for section in report.sections:
        marks = [_mark(row) for row in section.rows]
        parts.append(f"<section><h2>{_text(section.title)}</h2>{_table(section_table(section), marks)}")
        parts.append(f"{_list(caption(section))}</section>")
    if report.others:
        parts.append(f"<section><h2>Other runs</h2>{_table(others_table(report.others))}")
        parts.append(f"{_list(others_caption(report.others))}</section>")
    if report.notes:
        parts.append(f"<section><h2>Notes</h2>{_list(report.notes)}</section>")
    return "\n".join(parts)


def _order(report: Report) -> str:
    """Return the tables of neighbours and rankings, and the rankings' picture."""
    parts = []
    for section in report.sections:
        if found := neighbours(section):
            parts.append(f"<section><h2>{_text(neighbours_title(section))}</h2>{_table(neighbours_table(found))}")
            parts.append(f"{_list(neighbours_caption(found))}</section>")
    if ranked := rankings(report):
        (svg,) = draw_rankings(ranked, ["svg"])
        parts.append(f"<section><h2>Order of the steps</h2>{_table(ranking_table(ranked))}")
        parts.append(f"{_list(ranking_caption(ranked))}<div class='wide' id='scatter'>{to_inline(svg)}</div></section>")
    return "\n".join(parts)


def _mark(row: Row) -> str:
    """Return attributes of a table row: its change as a tooltip, and a class for the comparison with the paper."""
    kind = {None: "", True: "within", False: "outside"}[row.within]
    return f' class="{kind}" title="{_text(row.reference.step.change)}"'


def _curves(report: Report) -> str:
    """Return the curves as JSON that is safe inside a script element."""
    folders = {section.ladder.folder for section in report.sections}
    curves = []
    for section in report.sections:
        ladder = f"{section.ladder.folder.name}/" if len(folders) > 1 else ""
        recipe = section.title.removeprefix(section.ladder.title)
        for row in section.rows:
            curves += [_curve(run, f"{ladder}{row.name}{recipe}") for run in row.runs]
    curves += [_curve(run, run.name) for run in report.others]
    text = json.dumps([curve for curve in curves if curve["epochs"]], separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


def _curve(run: Run, group: str) -> dict[str, Any]:
    """Return the measured series of a run, with null for missing values. group: the same for all seeds of a step."""
    series = {
        name: [None if (value := finite(entry.get(name))) is None else round(value, 3) for entry in run.epochs]
        for name in CURVES
    }
    return {
        "group": group,
        "name": run.name,
        "state": run.progress,
        "epochs": [entry["epoch"] + 1 for entry in run.epochs],
        "series": {name: values for name, values in series.items() if any(value is not None for value in values)},
    }


def _table(table: Table, marks: Sequence[str] = ()) -> str:
    header, rows = table
    head = "".join(f"<th>{_text(name)}</th>" for name in header)
    lines = [
        f"<tr{mark}><th>{_text(row[0])}</th>{''.join(map(_cell, row[1:]))}</tr>"
        for row, mark in zip(rows, marks or [""] * len(rows), strict=True)
    ]
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _cell(text: str) -> str:
    return f"<td>{_text(text)}</td>".replace("+-", "\N{PLUS-MINUS SIGN}")


def _list(lines: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{_text(line)}</li>' for line in lines)}</ul>"


def _text(text: str) -> str:
    return html.escape(text)
