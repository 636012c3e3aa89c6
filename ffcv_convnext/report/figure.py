"""The ladder as a picture, in the manner of the paper's Figure 2: bars of accuracy down the steps, GMACs beside.

Colours are Okabe and Ito's (2008), told apart by the colour-blind; the start, the end and the variants differ in
lightness, hatching and type as well, so that a grey print keeps them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ffcv_convnext.report.runs import Run
from ffcv_convnext.report.summary import Report, Row, Section, Stats
from ffcv_convnext.report.tables import plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1a1a1b"  # of nothing but text, axes, whiskers and hatching: a page may put its own colour in its place
STEP, START, END, COST = "#56b4e9", "#0072b2", "#d55e00", "#999999"
WIDTH, BAR, MARGIN = 9.0, 0.27, 0.95  # inches: of the figure, a bar's row, a panel's title and axis
SPACE = 0.2  # rows, above the first bar and below the last together
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,  # a run's name may hold dollars
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: small, searchable, in the reader's font
    "svg.hashsalt": "ladder",  # the same file for the same runs
    **{name: INK for name in ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")},
}


@dataclass(frozen=True, slots=True)
class Bar:
    """One line of a panel."""

    label: str
    top1: Stats | None
    words: str  # the accuracy, or why there is none
    colour: str
    bold: bool = False
    hatched: bool = False
    paper: float | None = None
    gmacs: float | None = None


def draw(report: Report, kind: Literal["png", "svg"], *, background: str = "white") -> bytes:
    """The figure as a file's content; a panel each section, or one of the other runs where there is none.

    background: matplotlib's name of a colour, or "none".   Raises ModuleNotFoundError without matplotlib.
    """
    panels = [(section.title, [_bar(section, row) for row in section.rows]) for section in report.sections]
    if not panels:
        panels = [("Networks that are no step of the ladder", [_other_bar(run) for run in report.others])]
    with _figure([len(bars) for _, bars in panels]) as (figure, axes):
        for (title, bars), pair in zip(panels, axes, strict=True):
            _draw_panel(*pair, title, bars)
        file = io.BytesIO()
        dpi = min(200, 60_000 / figure.get_figheight())  # a PNG has 65,535 lines at most
        undated = {"Date": None} if kind == "svg" else None
        figure.savefig(file, format=kind, dpi=dpi, facecolor=background, metadata=undated)
        return file.getvalue()


@contextmanager
def _figure(lengths: Sequence[int]) -> Iterator[tuple[Figure, list[tuple[Axes, Axes]]]]:
    """A figure with a wide and a narrow axis side by side for every panel, in our style while it is drawn."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches between a panel's axis and the next one's title
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(MARGIN + BAR * length for length in lengths)), layout=layout)
        grid = figure.add_gridspec(len(lengths), 2, height_ratios=[n + SPACE for n in lengths], width_ratios=(4, 1))
        yield figure, [(figure.add_subplot(grid[i, 0]), figure.add_subplot(grid[i, 1])) for i in range(len(lengths))]


def _bar(section: Section, row: Row) -> Bar:
    start, end = row.rung is section.column.rungs[0], row.rung.metric == "test_acc1_ema"
    words = row.state
    if row.top1 is not None:
        words = plus_minus(row.top1) + ("" if row.top1.n == len(row.runs) else f", {row.top1.n} of {len(row.runs)}")
    return Bar(
        label=row.name,
        top1=row.top1,
        words=words,
        colour=START if start else END if end else STEP,
        bold=start or end,
        hatched=row.rung.optional,
        paper=row.paper,
        gmacs=row.gmacs,
    )


def _other_bar(run: Run) -> Bar:
    top1 = run.last("test_acc1") if run.state == "done" else None
    stats = None if top1 is None else Stats(top1, None, 1)
    return Bar(run.name, stats, run.progress if stats is None else plus_minus(stats), STEP)


def _draw_panel(accuracy: Axes, cost: Axes, title: str, bars: Sequence[Bar]) -> None:
    places = range(len(bars))
    widest = max((bar.gmacs or 0.0 for bar in bars), default=0.0)
    low, high = _limits(bars)
    for place, bar in enumerate(bars):
        looks: dict[str, Any] = {"height": 0.72, "edgecolor": INK, "linewidth": 0.6, "hatch": "////" * bar.hatched}
        if bar.top1 is None:
            accuracy.text(low + 0.01 * (high - low), place, bar.words, va="center", style="italic")
        else:
            colour = "none" if bar.hatched else bar.colour
            accuracy.barh(place, bar.top1.mean - low, left=low, color=colour, **looks)
            accuracy.errorbar(bar.top1.mean, place, xerr=bar.top1.std, color=INK, capsize=2.5, linewidth=1)
            accuracy.text(
                1.015,
                place,
                bar.words.replace("+-", "\N{PLUS-MINUS SIGN}"),
                va="center",
                weight="bold" if bar.bold else "normal",
                transform=accuracy.get_yaxis_transform(),
            )
        if bar.paper is not None:
            accuracy.plot(bar.paper, place - 0.3, "v", color=INK, markeredgecolor="white", markersize=7, zorder=4)
        if bar.gmacs is not None:
            cost.barh(place, bar.gmacs, color="none" if bar.hatched else COST, **looks)
            cost.text(bar.gmacs + 0.04 * widest, place, f"{bar.gmacs:.{2 if widest >= 1 else 3}f}", va="center")
    accuracy.set_xlim(low, high)
    accuracy.set_yticks(places, [bar.label for bar in bars])
    for text, bar in zip(accuracy.get_yticklabels(), bars, strict=True):
        text.set_fontweight("bold" if bar.bold else "normal")
    accuracy.set_title(title, loc="left", weight="bold", fontsize=10)
    accuracy.set_xlabel(_axis_label(bars, low))
    cost.set_xlabel("GMACs")
    cost.set_yticks([])
    cost.set_xlim(0, 1.5 * widest or 1)
    cost.set_visible(widest > 0)
    for axes in (accuracy, cost):
        axes.set_ylim(len(bars) - 0.5 + SPACE / 2, -0.5 - SPACE / 2)  # from top to bottom
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_alpha(0)


def _limits(bars: Sequence[Bar]) -> tuple[float, float]:
    """Of the accuracy axis, percent: wide enough that the shortest bar is still a quarter of it."""
    values = [bar.paper for bar in bars if bar.paper is not None]
    for bar in bars:
        if bar.top1 is not None:
            std = bar.top1.std or 0.0
            values += [bar.top1.mean - std, bar.top1.mean + std]
    if not values:
        return 0.0, 100.0
    low, high = min(values), max(values)
    return max(0.0, math.floor(low - max(1.0, (high - low) / 2.5))), min(100.0, high + max(0.25, (high - low) / 20))


def _axis_label(bars: Sequence[Bar], low: float) -> str:
    words = ["top-1 accuracy, %", *([f"axis starts at {low:.0f}"] if low else [])]
    if any(bar.top1 is not None and bar.top1.std is not None for bar in bars):
        words.append("whiskers: std of the seeds")
    if any(bar.paper is not None for bar in bars):
        words.append("\N{BLACK DOWN-POINTING TRIANGLE} the paper")
    return "; ".join(words)
