"""Run folders -> the ladder's table, figure and page. Reads run folders and the configs only."""

from __future__ import annotations

from pathlib import Path

from ffcv_convnext.errors import Failure
from ffcv_convnext.files import write_atomically
from ffcv_convnext.report.figure import draw
from ffcv_convnext.report.page import to_html
from ffcv_convnext.report.runs import Run, is_run, read_runs
from ffcv_convnext.report.summary import Report, Row, Section, summarise
from ffcv_convnext.report.tables import to_csv, to_json, to_markdown

__all__ = [
    "Report",
    "Row",
    "Run",
    "Section",
    "draw",
    "is_run",
    "read_runs",
    "summarise",
    "to_csv",
    "to_html",
    "to_json",
    "to_markdown",
    "write_files",
]


def write_files(report: Report, folder: Path, *, page: bool = False) -> list[Path]:
    """Write ladder.md, .csv, .json, .png and .svg, and with `page` ladder.html; none is ever there in part.

    Raises Failure without matplotlib, after the tables are written.
    """
    written = []

    def write(suffix: str, content: bytes) -> None:
        written.append(folder / f"ladder.{suffix}")
        write_atomically(written[-1], content)

    write("md", (to_markdown(report) + "\n").encode())
    write("csv", to_csv(report).encode())
    write("json", to_json(report).encode())
    try:
        write("png", draw(report, "png"))
        write("svg", draw(report, "svg"))
        if page:
            write("html", to_html(report).encode())
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise Failure(
            f"the tables are in {folder}; the figure needs matplotlib: pip install 'ffcv-convnext[report]'"
        ) from None
    return written
