"""The ladder as a picture like the paper's Figure 2: bars of accuracy down the steps, GMACs beside them.

Colours are Okabe and Ito's (2008), which are safe with colour blindness; start, end and variants also differ in
lightness, hatching and weight, so that a grey print keeps the difference.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ffcv_convnext.ladder import size_of
from ffcv_convnext.report.reference import ReferenceLadder, ReferenceStep
from ffcv_convnext.report.runs import Run
from ffcv_convnext.report.summary import Report, Row, Section, Stats
from ffcv_convnext.report.tables import plus_minus

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Kind = Literal["png", "svg"]

INK = "#1a1a1b"  # only for text, axes, whiskers and hatching: an SVG replaces it with the reader's text colour
STEP, START, END, COST = "#56b4e9", "#0072b2", "#d55e00", "#999999"
WIDTH, ROW, MARGIN = 8.0, 0.335, 0.85  # inches: figure, one bar, a panel's title and axis together
SPACE = 0.2  # rows, above the first bar and below the last together
MAX_CHANGE = 40  # characters of a change below its label
MAX_TITLE = 80  # characters of a panel's title
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans", "Verdana", "sans-serif"],
    "font.size": 9,
    "text.parse_math": False,  # a run's name may contain dollar signs
    "hatch.linewidth": 0.8,
    "svg.fonttype": "none",  # text stays text: small and searchable
    "svg.hashsalt": "ladder",  # equal input gives equal bytes
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
}
THEME = (  # its own background, light or dark as the reader's system is set
    "<style>svg{color:#1a1a1b}.page{fill:#fff}"
    "@media (prefers-color-scheme:dark){svg{color:#e6e7ea}.page{fill:#16181c}}</style>"
    '<rect class="page" width="100%" height="100%"/>'
)


@dataclass(frozen=True, slots=True)
class Bar:
    """One row of a panel. Accuracies are percent."""

    label: str
    words: str  # the accuracy, or the reason why there is none
    accuracy: Stats | None = None
    other: Stats | None = None  # drawn as a mark: the paper's value, or in the paper's ladder the measured one
    gmacs: float | None = None
    change: str = ""
    colour: str = STEP
    bold: bool = False
    hatched: bool = False


@dataclass(frozen=True, slots=True)
class Panel:
    """Bars with a title. legend: the meaning of the mark."""

    title: str
    bars: Sequence[Bar]
    legend: str = "the paper"
    mark: str = "v"


def draw(report: Report, kinds: Sequence[Kind]) -> list[bytes]:
    """Return the figure of a report in some formats: one panel per section, or one of the other runs if there is none.

    Raises ModuleNotFoundError without matplotlib.
    """
    panels = [Panel(section.title, [_bar(section, row) for row in section.rows]) for section in report.sections]
    if not panels:
        panels = [Panel("Networks that are not a step of the ladder", [_other_bar(run) for run in report.others])]
    return _render(panels, kinds)


def draw_paper(ladder: ReferenceLadder, report: Report | None, kind: Kind) -> bytes:
    """Return the paper's own ladder as a figure, and on its bars the finished runs of a report that can be compared."""
    measured = {
        row.name: row.top1
        for section in (report.sections if report else [])
        if section.ladder.folder == ladder.folder and not section.why_not
        for row in section.rows
    }
    bars = []
    for step in ladder.steps:
        if step.optional:
            continue
        paper = None if step.paper.top1 is None else Stats(step.paper.top1, step.paper.std, 3)
        _, gmacs = size_of(step.step.config.model, 224, 1000)  # as in the paper
        words = "no value in the paper" if paper is None else plus_minus(paper)
        bars.append(_reference_bar(ladder, step, paper, words, other=measured.get(step.name), gmacs=gmacs))
    first, last = bars[0].label, bars[-1].label
    title = f"{first} to {last} in the paper: ImageNet-1k, arXiv:2201.03545"
    return _render([Panel(title, bars, "measured with this code", "o")], [kind])[0]


def _render(panels: Sequence[Panel], kinds: Sequence[Kind]) -> list[bytes]:
    files = {kind: io.BytesIO() for kind in kinds}
    with _figure([len(panel.bars) for panel in panels]) as (figure, axes):
        for panel, pair in zip(panels, axes, strict=True):
            _draw_panel(*pair, panel)
        dpi = min(200, 60_000 / figure.get_figheight())  # a PNG has at most 65,535 lines
        for kind, file in files.items():
            figure.savefig(file, format=kind, dpi=dpi, facecolor="white" if kind == "png" else "none")
            figure.set_layout_engine("none")  # the first one stays
    return [themed(file.getvalue()) if kind == "svg" else file.getvalue() for kind, file in files.items()]


def themed(svg: bytes) -> bytes:
    """Return an SVG without date and version, with THEME's background and text colour."""
    text = re.sub(r"<metadata>.*?</metadata>\s*| +(?=\n)", "", svg.decode(), flags=re.DOTALL)
    text = text.replace(INK, "currentColor")
    start = text.index(">", text.index("<svg")) + 1
    return f"{text[:start]}{THEME}{text[start:]}".encode()


def to_inline(svg: bytes) -> str:
    """Return `draw`'s SVG for an HTML page, with the page's background and text colour."""
    text = svg.decode()
    return text[text.index("<svg") :].replace(THEME, "")


def shorten(text: str, length: int) -> str:
    """Return a text that has at most `length` characters; its end is left out."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


@contextmanager
def _figure(lengths: Sequence[int]) -> Iterator[tuple[Figure, list[tuple[Axes, Axes]]]]:
    """Yield a figure with a wide and a narrow axis per panel; our style is active until the block ends."""
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches between a panel's axis and the next one's title
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(WIDTH, sum(MARGIN + ROW * length for length in lengths)), layout=layout)
        grid = figure.add_gridspec(len(lengths), 2, height_ratios=[n + SPACE for n in lengths], width_ratios=(4, 1))
        yield figure, [(figure.add_subplot(grid[i, 0]), figure.add_subplot(grid[i, 1])) for i in range(len(lengths))]


def _bar(section: Section, row: Row) -> Bar:
    words = row.state
    if row.top1 is not None:
        words = plus_minus(row.top1) + ("" if row.top1.n == len(row.runs) else f", {row.top1.n} of {len(row.runs)}")
    paper = None if row.paper is None else Stats(row.paper, None, 1)
    return _reference_bar(section.ladder, row.reference, row.top1, words, other=paper, gmacs=row.gmacs)


def _reference_bar(
    ladder: ReferenceLadder,
    step: ReferenceStep,
    accuracy: Stats | None,
    words: str,
    *,
    other: Stats | None,
    gmacs: float,
) -> Bar:
    start = step is ladder.steps[0]
    change = "" if step.step.base is None else step.step.change
    if len(change) > MAX_CHANGE:
        first, *more = change.split(" --")
        change = f"{first} and {len(more)} more"
    return Bar(
        label=step.paper.label,
        words=words,
        accuracy=accuracy,
        other=other,
        gmacs=gmacs,
        change=change,
        colour=START if start else END if step.is_released else STEP,
        bold=start or step.is_released,
        hatched=step.optional,
    )


def _other_bar(run: Run) -> Bar:
    top1 = run.last("test_acc1") if run.state == "done" else None
    stats = None if top1 is None else Stats(top1, None, 1)
    return Bar(run.name, run.progress if stats is None else plus_minus(stats), stats)


def _draw_panel(accuracy: Axes, cost: Axes, panel: Panel) -> None:
    bars = panel.bars
    widest = max((bar.gmacs or 0.0 for bar in bars), default=0.0)
    low, high = _limits(bars)
    beside = accuracy.get_yaxis_transform()  # x in axes, y in rows
    for place, bar in enumerate(bars):
        weight = "bold" if bar.bold else "normal"
        looks: dict[str, Any] = {
            "height": 0.72,
            "edgecolor": INK,
            "linewidth": 0.6 * bar.hatched,
            "hatch": "////" * bar.hatched,
        }
        text: dict[str, Any] = {"va": "center", "transform": beside}
        accuracy.text(-0.015, place - 0.2 * bool(bar.change), bar.label, ha="right", weight=weight, **text)
        if bar.change:
            accuracy.text(-0.015, place + 0.24, bar.change, ha="right", fontsize=7, alpha=0.75, **text)
        if bar.accuracy is None:
            accuracy.text(low + 0.01 * (high - low), place, bar.words, va="center", style="italic")
        else:
            colour = "none" if bar.hatched else bar.colour
            accuracy.barh(place, bar.accuracy.mean - low, left=low, color=colour, **looks)
            accuracy.errorbar(bar.accuracy.mean, place, xerr=bar.accuracy.std, color=INK, capsize=2.5, linewidth=1)
            accuracy.text(1.015, place, bar.words.replace("+-", "\N{PLUS-MINUS SIGN}"), weight=weight, **text)
        if bar.other is not None:
            above = 0.3 if panel.mark == "v" else 0.0
            accuracy.errorbar(
                bar.other.mean, place - above, xerr=bar.other.std, fmt=panel.mark, color=INK, capsize=2.5,
                markeredgecolor="white", markersize=7, zorder=4,
            )  # fmt: skip
        if bar.gmacs is not None:
            cost.barh(place, bar.gmacs, color="none" if bar.hatched else COST, **looks)
            cost.text(bar.gmacs + 0.06 * widest, place, f"{bar.gmacs:.{2 if widest >= 1 else 3}f}", va="center")
    accuracy.set_xlim(low, high)
    accuracy.set_title(shorten(panel.title, MAX_TITLE), loc="left", weight="bold", fontsize=10)
    accuracy.set_xlabel(_axis_label(panel, low))
    cost.set_xlabel("GMACs")
    cost.set_xlim(0, 1.5 * widest or 1)
    cost.set_visible(widest > 0)
    for axes in (accuracy, cost):
        axes.set_yticks([])
        axes.set_ylim(len(bars) - 0.5 + SPACE / 2, -0.5 - SPACE / 2)  # from top to bottom
        axes.spines[["top", "right"]].set_visible(False)
        axes.patch.set_alpha(0)


def _limits(bars: Sequence[Bar]) -> tuple[float, float]:
    """Return the range of the accuracy axis, percent; the shortest bar fills at least a quarter of it."""
    values: list[float] = []
    for stats in (stats for bar in bars for stats in (bar.accuracy, bar.other) if stats is not None):
        values += [stats.mean - (stats.std or 0.0), stats.mean + (stats.std or 0.0)]
    if not values:
        return 0.0, 100.0
    low, high = min(values), max(values)
    return max(0.0, math.floor(low - max(1.0, (high - low) / 2.5))), min(100.0, high + max(0.25, (high - low) / 20))


def _axis_label(panel: Panel, low: float) -> str:
    words = ["top-1 accuracy, %", *([f"axis starts at {low:.0f}"] if low else [])]
    if any(bar.accuracy is not None and bar.accuracy.std is not None for bar in panel.bars):
        words.append("whiskers: std over seeds")
    if any(bar.other is not None for bar in panel.bars):
        symbol = {"v": "\N{BLACK DOWN-POINTING TRIANGLE}", "o": "\N{BLACK CIRCLE}"}[panel.mark]
        words.append(f"{symbol} {panel.legend}")
    return "; ".join(words)
