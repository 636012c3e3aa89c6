"""A report as Markdown (also readable on a terminal), as CSV and as JSON."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from typing import Any

from ffcv_convnext.formatting import format_number, markdown_table
from ffcv_convnext.report.ranking import (
    neighbour_record,
    neighbours,
    neighbours_caption,
    neighbours_table,
    neighbours_title,
    ranking_caption,
    ranking_table,
    rankings,
)
from ffcv_convnext.report.runs import Metric, Run
from ffcv_convnext.report.summary import WITHIN, Report, Row, Section, Stats

Table = tuple[list[str], list[list[str]]]  # a header and its rows
METRICS: tuple[Metric, ...] = ("test_acc1", "test_acc1_ema")  # raw and averaged weights


def to_markdown(report: Report) -> str:
    """Return every section's table and caption, then the other runs, then the notes."""
    parts: list[str] = []
    for section in report.sections:
        parts += [f"## {escape(section.title)}", _table(section_table(section)), _list(caption(section))]
    for section in report.sections:
        if found := neighbours(section):
            parts += [f"## {escape(neighbours_title(section))}", _table(neighbours_table(found))]
            parts += [_list(neighbours_caption(found))]
    if ranked := rankings(report):
        parts += ["## Order of the steps", _table(ranking_table(ranked)), _list(ranking_caption(ranked))]
    if report.others:
        parts += ["## Other runs"] if report.sections else []
        parts += [_table(others_table(report.others)), _list(others_caption(report.others))]
    if report.notes:
        parts += ["Notes:", _list(report.notes)]
    return "\n\n".join(parts)


def section_table(section: Section) -> Table:
    """Return a section as a table with one row per step; '-' stands for a missing value."""
    paper = [] if section.why_not else ["paper", "to paper", f"within {WITHIN}"]
    header = ["step", "seeds", "top-1 %", "to base", *paper, "GMACs", "parameters", "images/s", "GPU-hours", "state"]
    return header, [_section_row(section, row) for row in section.rows]


def _section_row(section: Section, row: Row) -> list[str]:
    paper = [
        "-" if row.paper is None else plus_minus(Stats(row.paper, row.reference.paper.std, 3)),
        _points(row.to_paper),
        {None: "-", True: "yes", False: "no"}[row.within],
    ]
    return [
        f"({row.name})" if row.reference.optional else row.name,
        str(row.top1.n) if row.top1 else "-",
        plus_minus(row.top1),
        _points(row.to_base),
        *([] if section.why_not else paper),
        f"{row.gmacs:.3f}",
        f"{row.parameters:,}",
        format_number(row.images_per_s, ".0f"),
        format_number(row.gpu_hours, ".1f"),
        row.state,
    ]


def caption(section: Section) -> list[str]:
    """Return the lines below a section's table that explain it."""
    averaged = [row.name for row in section.rows if row.reference.is_released]
    facts, members = section.facts, section.runs
    devices = sorted({run.devices for run in members if run.devices})
    hours = [run.gpu_hours for run in members if run.gpu_hours is not None]
    variants = any(row.reference.optional for row in section.rows)
    return [
        "top-1: validation accuracy after the last epoch (not the best epoch), mean and sample standard deviation over "
        "the finished seeds; raw weights" + (f", but averaged weights for {', '.join(averaged)}" if averaged else ""),
        "to base: difference to the step that this one changes, raw weights on both sides"
        + ("; names in brackets are variants that no step builds on" if variants else ""),
        f"Not compared with the paper: {section.why_not}"
        if section.why_not
        else "paper: arXiv:2201.03545, Tables 1, 10 and 11; 300 epochs, three seeds where a deviation is given",
        *([f"Recipe: the configs' recipe with {' '.join(section.recipe)}"] if section.recipe else []),
        f"Data: {_count(facts.num_classes, 'classes')}, {_count(facts.train_images, 'training images')}, "
        f"{_count(facts.val_images, 'validation images')} (train.beton {(facts.train_data or 'unknown')[:8]}); "
        f"global batch {facts.global_batch or 'unknown'}; GMACs at {members[0].config.data.input_size} pixels",
        "images/s: training rate of all devices together"
        + (f" ({', '.join(devices)})" if devices else "")
        + "; GPU-hours: one run"
        + (f" ({sum(hours):,.1f} for all runs)" if hours else ""),
    ]


def _count(count: int | None, noun: str) -> str:
    return f"unknown number of {noun}" if count is None else f"{count:,} {noun}"


def others_table(runs: Sequence[Run]) -> Table:
    """Return the runs of networks that are not a step as a table."""
    header = ["run", "epochs", "parameters", "top-1 %", "averaged top-1 %", "images/s", "minutes"]
    rows = [
        [
            run.name,
            f"{len(run.epochs)}/{run.num_epochs}" + ("" if run.state == "done" else f" {run.state}"),
            format_number(run.facts.get("n_parameters"), ",d"),
            *(format_number(run.last(metric), ".2f") for metric in METRICS),
            format_number(run.images_per_s, ".0f"),
            f"{60 * run.hours:.1f}",
        ]
        for run in runs
    ]
    return header, rows


def others_caption(runs: Sequence[Run]) -> list[str]:
    """Return the lines below that table."""
    classes = sorted({_count(run.facts.get("num_classes"), "classes") for run in runs})
    return [f"Networks that are not a step of the ladder ({', '.join(classes)}): not compared with the paper"]


def table_of_runs(runs: Sequence[Run]) -> Table:
    """Return every run of a report as a table, with the best epoch beside the last one."""
    header = ["run", "seed", "state", "last top-1 %", "best top-1 %", "in epoch", "last averaged %", "best averaged %"]
    rows = []
    for run in runs:
        starts = run.facts.get("starts") or [{}]
        row = [run.name, str(run.seed), run.progress]
        for metric in METRICS:
            value, epoch = run.best(metric) or (None, None)
            row += [format_number(run.last(metric), ".2f"), format_number(value, ".2f"), format_number(epoch, "d")]
        rows.append([*row, format_number(run.gpu_hours, ".1f"), str(len(starts)), str(starts[-1].get("git", "-"))[:10]])
    return [*header, "in epoch", "GPU-hours", "starts", "commit"], rows


def _list(lines: Sequence[str]) -> str:
    return "\n".join(f"- {escape(line)}" for line in lines)


def _table(table: Table) -> str:
    header, rows = table
    align = "".join("<" if i == 0 or name == "state" else ">" for i, name in enumerate(header))
    return markdown_table(header, [[escape(cell) for cell in row] for row in rows], align)


def plus_minus(stats: Stats | None) -> str:
    """Return '80.57 +- 0.14', or '80.57' without a standard deviation, or '-'."""
    if stats is None:
        return "-"
    return f"{stats.mean:.2f}" if stats.std is None else f"{stats.mean:.2f} +- {stats.std:.2f}"


def _points(value: float | None) -> str:
    return format_number(None if value is None else round(value, 2) + 0.0, "+.2f")  # + 0.0: no -0.00


def escape(text: str) -> str:
    """Escape text for Markdown and a terminal: a run's name may contain any character that a file name may."""
    shown = "".join(char if char.isprintable() else "\N{REPLACEMENT CHARACTER}" for char in text)
    return re.sub(r"([\\`*|<>\[\]~]|(?<!\w)_|_(?!\w))", r"\\\1", shown)


# --- Data -------------------------------------------------------------------------------------------------


def to_csv(report: Report) -> str:
    """Return CSV with one line per step and one per run that is not a step; missing values are empty."""
    records = [_row_record(section, row) for section in report.sections for row in section.rows]
    records += [_other_record(run) for run in report.others]
    file = io.StringIO()
    writer = csv.DictWriter(file, fieldnames=list(FIELDS), restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: value for name, value in record.items() if name in FIELDS} for record in records)
    return file.getvalue()


def to_json(report: Report) -> str:
    """Return JSON with the content of tables and figure, and every run with its folder, commit and scores."""
    content = {
        "sections": [
            {
                "title": section.title,
                "configs": str(section.ladder.folder),
                "recipe": list(section.recipe),
                **section.facts._asdict(),
                "compared_with_paper": not section.why_not,
                "why_not": section.why_not or None,
                "rows": [
                    {**_row_record(section, row), "runs": [_run_record(run) for run in row.runs]}
                    for row in section.rows
                ],
                "neighbours": [neighbour_record(each) for each in neighbours(section)],
            }
            for section in report.sections
        ],
        "rankings": [ranking.record() for ranking in rankings(report)],
        "others": [_run_record(run) for run in report.others],
        "notes": report.notes,
    }
    return json.dumps(content, indent=2, allow_nan=False) + "\n"


FIELDS = (
    *("section", "name", "change", "optional", "state", "metric", "seeds", "top1", "top1_std", "to_base"),
    *("paper", "paper_std", "to_paper", "within", "gmacs", "parameters", "images_per_s", "gpu_hours"),
)


def _row_record(section: Section, row: Row) -> dict[str, Any]:
    top1, reference = row.top1, row.reference
    record = {
        "section": section.title,
        "change": reference.step.change,
        "optional": reference.optional,
        "metric": reference.metric,
        "seeds": top1.n if top1 else 0,
        "top1": top1.mean if top1 else None,
        "top1_std": top1.std if top1 else None,
        "paper_std": None if row.paper is None else reference.paper.std,
    }
    return _rounded({name: record[name] if name in record else getattr(row, name) for name in FIELDS})


def _other_record(run: Run) -> dict[str, Any]:
    """Return a run that is not a step with the same keys as a step."""
    record = {
        "section": "other runs",
        "name": run.name,
        "optional": False,
        "state": run.progress,
        "metric": "test_acc1",
        "seeds": 1,
        "top1": run.last("test_acc1"),
        "parameters": run.facts.get("n_parameters"),
        "images_per_s": run.images_per_s,
        "gpu_hours": run.gpu_hours,
    }
    return _rounded(record)


def _run_record(run: Run) -> dict[str, Any]:
    starts = run.facts.get("starts") or [{}]
    names = ("name", "seed", "state", "error", "num_epochs", "devices", "images_per_s", "hours", "gpu_hours")
    record: dict[str, Any] = {
        **{name: getattr(run, name) for name in names},
        "folder": str(run.folder),
        "epochs": len(run.epochs),
        "starts": len(starts),
        "git": starts[-1].get("git"),
        "parameters": run.facts.get("n_parameters"),
    }
    for metric in METRICS:
        record[metric] = run.last(metric)
        record[f"best_{metric}"], record[f"best_{metric}_epoch"] = run.best(metric) or (None, None)
    return _rounded(record)


def _rounded(record: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in record.items()}
