"""Finished runs compared with the paper: table, figure, HTML page. Reads only run folders and configs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ffcv_convnext.errors import Failure
from ffcv_convnext.files import write_atomically
from ffcv_convnext.report.figure import Kind, draw, draw_paper
from ffcv_convnext.report.flat import FlatTable, flat_table
from ffcv_convnext.report.page import to_html
from ffcv_convnext.report.ranking import Neighbours, Ranking, neighbours, rankings
from ffcv_convnext.report.reference import read_ladders
from ffcv_convnext.report.runs import Run, read_runs
from ffcv_convnext.report.scatter import draw_rankings
from ffcv_convnext.report.summary import Report, Row, Section, summarise
from ffcv_convnext.report.tables import to_csv, to_json, to_markdown

__all__ = [
    "FlatTable",
    "Neighbours",
    "Ranking",
    "Report",
    "Row",
    "Run",
    "Section",
    "draw",
    "draw_paper",
    "flat_table",
    "neighbours",
    "rankings",
    "read_ladders",
    "read_runs",
    "summarise",
    "to_csv",
    "to_html",
    "to_json",
    "to_markdown",
    "write_files",
    "write_paper_figure",
]


def write_files(report: Report, folder: Path, *, page: bool = False) -> list[Path]:
    """Write ladder.md, .csv, .json, .png and .svg, and with `page` ladder.html; each file is replaced as a whole.

    If there are rankings, also their pictures order.png and order.svg.
    Raises Failure without matplotlib, after the tables are written.
    """
    written = []

    def write(suffix: str, content: bytes, stem: str = "ladder") -> None:
        written.append(folder / f"{stem}.{suffix}")
        write_atomically(written[-1], content)

    write("md", (to_markdown(report) + "\n").encode())
    write("csv", to_csv(report).encode())
    write("json", to_json(report).encode())
    with _matplotlib(f"the tables are in {folder}; "):
        svg, png = draw(report, ["svg", "png"])
        write("png", png)
        write("svg", svg)
        if ranked := rankings(report):
            for kind, picture in zip(("svg", "png"), draw_rankings(ranked, ["svg", "png"]), strict=True):
                write(kind, picture, "order")
        if page:
            write("html", to_html(report, svg).encode())
    return written


def write_paper_figure(path: Path, kind: Kind, configs: Path, runs: Sequence[Path]) -> None:
    """Draw the paper's results for the ladder in `configs`, with the finished runs in `runs`.

    Raises ValueError if the ladder has no results of the paper, Failure without matplotlib.
    """
    ladder = read_ladders(configs)[0]
    if all(step.paper.top1 is None for step in ladder.steps):
        raise ValueError(f"{configs} has no results of the paper to draw: expected {configs / 'paper.json'}")
    report = summarise(runs, configs) if runs else None
    with _matplotlib():
        write_atomically(path, draw_paper(ladder, report, kind))


@contextmanager
def _matplotlib(before: str = "") -> Iterator[None]:
    """Turn a missing matplotlib into a Failure."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise Failure(f"{before}the figure needs matplotlib: pip install 'ffcv-convnext[report]'") from None
