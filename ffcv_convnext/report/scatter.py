"""Rankings as a picture: one panel for each pair of recipes, one point for each step."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ffcv_convnext.report.figure import END, INK, START, STEP, STYLE, Kind, shorten, themed
from ffcv_convnext.report.ranking import Point, Ranking

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIDE = 4.0  # inches of a panel
COLUMNS = 2
MAX_WORDS = 46  # characters of a recipe in a title or at an axis


def draw_rankings(found: Sequence[Ranking], kinds: Sequence[Kind]) -> list[bytes]:
    """Return the figure in some formats. Raises ModuleNotFoundError without matplotlib."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    columns = min(COLUMNS, len(found))
    lines = -(-len(found) // columns)
    files = {kind: io.BytesIO() for kind in kinds}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(SIDE * columns, (SIDE + 0.3) * lines), layout="constrained")
        axes = figure.subplots(lines, columns, squeeze=False).ravel()
        for panel, ranking in zip(axes, found, strict=False):
            _draw(panel, ranking)
        for unused in axes[len(found) :]:
            unused.set_visible(False)
        for kind, file in files.items():
            figure.savefig(file, format=kind, dpi=200, facecolor="white" if kind == "png" else "none")
    return [themed(file.getvalue()) if kind == "svg" else file.getvalue() for kind, file in files.items()]


def _draw(axes: Axes, ranking: Ranking) -> None:
    points = ranking.points
    for place, point in enumerate(points):
        colour = START if place == 0 else END if place == len(points) - 1 else STEP
        axes.errorbar(
            point.reference.mean, point.ours.mean, xerr=point.reference.std, yerr=point.ours.std,
            fmt="o", color=INK, markerfacecolor=colour, markeredgecolor=INK, markersize=6, linewidth=0.8, capsize=2,
        )  # fmt: skip
        axes.annotate(_number(point), (point.reference.mean, point.ours.mean), (5, 4), textcoords="offset points")
    interval = (
        "" if ranking.tau_interval is None else f" ({ranking.tau_interval.low:.2f} to {ranking.tau_interval.high:.2f})"
    )
    tau = "not defined" if math.isnan(ranking.tau) else f"{ranking.tau:.2f}{interval}"
    axes.set_title(f"Kendall's tau-b {tau}, {len(points)} steps", loc="left", weight="bold", fontsize=9)
    axes.set_xlabel(shorten(f"top-1 %, {ranking.reference}", MAX_WORDS))
    axes.set_ylabel(shorten(f"top-1 %, {ranking.recipe}", MAX_WORDS))
    axes.margins(0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.patch.set_alpha(0)


def _number(point: Point) -> str:
    """Return the number at the start of a step's name, or the name without one."""
    number, _, rest = point.name.partition("_")
    return number if number.isdigit() and rest else point.name
