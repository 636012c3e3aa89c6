"""Whether a recipe ranks the steps as the paper or another recipe does, and which neighbours its seeds tell apart."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean
from typing import Any

from ffcv_convnext.ladder.statistics import (
    Interval,
    bootstrap,
    kendall_tau_b,
    mean_interval,
    spearman_rho,
)
from ffcv_convnext.report.runs import Metric
from ffcv_convnext.report.summary import Report, Row, Section, Stats, finished, stats_of

MIN_STEPS = 3  # fewer have hardly an order
CONFIGS_RECIPE = "the configs' recipe"
PAPER = "the paper"


@dataclass(frozen=True, slots=True)
class Point:
    """A step in both recipes; top-1, percent."""

    name: str
    label: str
    reference: Stats
    ours: Stats


@dataclass(frozen=True, slots=True)
class Ranking:
    """One recipe's steps beside those of the paper or of another recipe."""

    ladder: str  # title
    recipe: str
    reference: str  # the other recipe, or PAPER
    points: list[Point]
    tau: float  # Kendall's tau-b; nan if all scores of one side are equal
    rho: float  # Spearman's
    tau_interval: Interval | None  # None: one seed of each step
    rho_interval: Interval | None

    def record(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "ladder": self.ladder,
            "recipe": self.recipe,
            "reference": self.reference,
            "steps": [point.name for point in self.points],
            "tau_b": _number(self.tau),
            "tau_b_interval": self.tau_interval,
            "rho": _number(self.rho),
            "rho_interval": self.rho_interval,
        }


@dataclass(frozen=True, slots=True)
class Neighbours:
    """A step and its base, trained with one recipe; points of top-1, raw weights."""

    step: str
    base: str
    differences: list[float]  # of the seeds that both have
    interval: Interval | None

    @property
    def difference(self) -> float:
        """Mean over the seeds."""
        return fmean(self.differences)

    @property
    def told_apart(self) -> bool | None:
        """Whether the interval leaves out 0; None without one."""
        return None if self.interval is None else not self.interval.low <= 0 <= self.interval.high


def recipe_name(section: Section) -> str:
    """Return what distinguishes a section's recipe, its length first: '--epochs 30 --warmup_epochs 3'."""
    flags = sorted(section.recipe, key=lambda flag: not flag.startswith("--epochs "))
    return " ".join(flags) or CONFIGS_RECIPE


def rankings(report: Report) -> list[Ranking]:
    """Return each recipe beside the paper, and each pair of recipes for one ladder and data set.

    Only of recipes with at least MIN_STEPS finished steps in common.
    """
    found = [_with_paper(section) for section in report.sections]
    found += [_pair(one, other) for one, other in combinations(report.sections, 2) if _comparable(one, other)]
    return [ranking for ranking in found if ranking is not None]


def _comparable(one: Section, other: Section) -> bool:
    """Return whether two sections differ in their recipe only."""
    facts = (each.facts._replace(global_batch=None) for each in (one, other))
    return one.ladder is other.ladder and len(set(facts)) == 1 and one.recipe != other.recipe


def _scores(row: Row, metric: Metric) -> list[float]:
    return [score for run in finished(row.runs) if (score := run.last(metric)) is not None]


def _with_paper(section: Section) -> Ranking | None:
    ours, theirs, points = [], [], []
    for row in section.rows:
        paper, scores = row.reference.paper, _scores(row, row.reference.metric)
        if paper.top1 is not None and scores:
            ours.append(scores)
            theirs.append([paper.top1])
            points.append((row, Stats(paper.top1, paper.std, 3)))
    return _ranking(section, PAPER, points, ours, theirs)


def _pair(reference: Section, section: Section) -> Ranking | None:
    rows = {row.name: row for row in reference.rows}
    ours, theirs, points = [], [], []
    for row in section.rows:
        if row.name in rows:
            mine, other = (_scores(each, row.reference.metric) for each in (row, rows[row.name]))
            if mine and other and (stats := stats_of(other)):
                ours.append(mine)
                theirs.append(other)
                points.append((row, stats))
    return _ranking(section, recipe_name(reference), points, ours, theirs)


def _ranking(
    section: Section,
    reference: str,
    rows: Sequence[tuple[Row, Stats]],
    ours: Sequence[Sequence[float]],
    theirs: Sequence[Sequence[float]],
) -> Ranking | None:
    if len(rows) < MIN_STEPS:
        return None
    x, y = ([fmean(scores) for scores in side] for side in (theirs, ours))
    points = [
        Point(row.name, row.reference.paper.label, other, mine)
        for (row, other), scores in zip(rows, ours, strict=True)
        if (mine := stats_of(scores))
    ]
    tau, rho = kendall_tau_b(x, y), spearman_rho(x, y)
    ladder, recipe = section.ladder.title, recipe_name(section)
    intervals = [
        None if math.isnan(value) else bootstrap(theirs, ours, statistic)
        for value, statistic in ((tau, kendall_tau_b), (rho, spearman_rho))
    ]
    return Ranking(ladder, recipe, reference, points, tau, rho, *intervals)


def neighbours(section: Section) -> list[Neighbours]:
    """Return the steps whose base has a finished run of the same seed, in the ladder's order."""
    rows = {row.name: row for row in section.rows}
    return list(_neighbours(section, rows))


def _neighbours(section: Section, rows: dict[str, Row]) -> Iterator[Neighbours]:
    for row in section.rows:
        base = rows.get(row.reference.step.base or "")
        if base is None:
            continue
        before = {run.seed: run.last("test_acc1") for run in finished(base.runs)}
        differences = [
            mine - theirs
            for run in finished(row.runs)
            if (mine := run.last("test_acc1")) is not None and (theirs := before.get(run.seed)) is not None
        ]
        if differences:
            yield Neighbours(row.name, base.name, differences, mean_interval(differences))


def ranking_table(found: Sequence[Ranking]) -> tuple[list[str], list[list[str]]]:
    """Return the rankings as a table: a header and its rows."""
    header = ["recipe", "ranked as", "steps", "Kendall's tau-b", "95 %", "Spearman's rho", "95 %"]
    rows = [
        [
            *(each.recipe, each.reference, str(len(each.points))),
            *(_correlation(each.tau), _interval(each.tau_interval)),
            *(_correlation(each.rho), _interval(each.rho_interval)),
        ]
        for each in found
    ]
    return header, rows


def ranking_caption(found: Sequence[Ranking]) -> list[str]:
    """Return the lines below that table."""
    lines = [
        "1: the same order; 0: no relation; -1: the opposite order. 95 %: bootstrap over the seeds, rough with few",
        "Steps compared with the paper need neither its recipe nor its data: only the order of the steps counts",
    ]
    if all(each.reference != PAPER for each in found):
        lines.pop()
    if any(math.isnan(each.tau) for each in found):
        lines.append("-: all scores of one side are equal")
    return lines


def neighbours_table(found: Sequence[Neighbours]) -> tuple[list[str], list[list[str]]]:
    """Return the neighbours as a table: a header and its rows."""
    header = ["step", "seeds", "to base", "95 %", "told apart", "base"]
    rows = [
        [
            *(each.step, str(len(each.differences)), f"{round(each.difference, 2) + 0.0:+.2f}"),
            *(_interval(each.interval, "+.2f"), {None: "-", True: "yes", False: "no"}[each.told_apart], each.base),
        ]
        for each in found
    ]
    return header, rows


def neighbours_caption(found: Sequence[Neighbours]) -> list[str]:
    """Return the lines below that table: which neighbours the seeds cannot tell apart."""
    unsure = [each.step for each in found if each.told_apart is False]
    single = sum(each.interval is None for each in found)
    lines = ["Differences of the same seeds, raw weights; 95 %: Student's t over the seeds"]
    if unsure:
        lines.append(f"These seeds cannot tell apart from their base: {', '.join(unsure)}")
    elif not single:
        lines.append("These seeds tell every step apart from its base")
    if single:
        lines.append(f"{single} of {len(found)} have one seed, so nothing is known about their spread")
    return lines


def neighbours_title(section: Section) -> str:
    """Return the heading of that table."""
    return f"Neighbouring steps: {section.title}"


def neighbour_record(each: Neighbours) -> dict[str, Any]:
    """Return it for JSON."""
    return {
        "step": each.step,
        "base": each.base,
        "differences": [round(value, 4) for value in each.differences],
        "interval": each.interval,
        "told_apart": each.told_apart,
    }


def _number(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 4)


def _correlation(value: float) -> str:
    return "-" if math.isnan(value) else f"{round(value, 2) + 0.0:.2f}"


def _interval(interval: Interval | None, form: str = ".2f") -> str:
    return "-" if interval is None else " to ".join(f"{round(limit, 2) + 0.0:{form}}" for limit in interval)
