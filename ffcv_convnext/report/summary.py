"""Runs held against the ladder: one row a step, seeds averaged, in one section for each recipe and data set."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ffcv_convnext.config import SETTINGS, format_value
from ffcv_convnext.ladder import size_of
from ffcv_convnext.report.reference import BESIDE_THE_RECIPE, Column, Rung, find_rung, other_recipe, read_columns
from ffcv_convnext.report.runs import Metric, Run, read_runs

WITHIN = 0.2  # points of top-1: the paper's seeds have a std of 0.02 to 0.18
ORDER = ("done", "running", "stopped", "failed")  # which run of a seed that was run twice counts


@dataclass(frozen=True, slots=True)
class Stats:
    """Over n seeds."""

    mean: float
    std: float | None  # of the sample (n - 1); None for one seed
    n: int


def stats_of(values: Iterable[float | None]) -> Stats | None:
    """None when nothing was measured."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stats(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def finished(runs: Iterable[Run]) -> list[Run]:
    return [run for run in runs if run.state == "done"]


def scores_of(runs: Iterable[Run], metric: Metric) -> Stats | None:
    """Of the finished ones, after their last epoch."""
    return stats_of(run.last(metric) for run in finished(runs))


class Facts(NamedTuple):
    """What a run computed on that its settings do not tell; runs that differ here are not averaged. None: unknown."""

    num_classes: int | None
    train_images: int | None
    val_images: int | None
    train_data: str | None  # the manifests' hashes
    val_data: str | None
    global_batch: int | None


def facts_of(run: Run) -> Facts:
    images, hashes = run.facts.get("images", {}), run.facts.get("data", {})
    return Facts(
        run.facts.get("num_classes"),
        images.get("train"),
        images.get("val"),
        hashes.get("train"),
        hashes.get("val"),
        run.facts.get("global_batch"),
    )


@dataclass(frozen=True, slots=True)
class Row:
    """A step, with its runs of one recipe: at most one a seed, ordered by seed."""

    rung: Rung
    runs: list[Run]
    parameters: int
    gmacs: float
    to_base: float | None  # points of top-1, raw weights on both sides
    paper: float | None  # percent; None where the runs cannot be compared with it

    @property
    def name(self) -> str:
        return self.rung.name

    @property
    def finished(self) -> list[Run]:
        return finished(self.runs)

    @property
    def top1(self) -> Stats | None:
        """Percent after the last epoch of the finished runs, of the weights whose accuracy the paper reports."""
        return scores_of(self.runs, self.rung.metric)

    @property
    def to_paper(self) -> float | None:
        return None if self.paper is None or self.top1 is None else self.top1.mean - self.paper

    @property
    def within(self) -> bool | None:
        """Whether the mean, to the two digits that the paper prints, is within 0.2 points of the paper's."""
        return None if self.to_paper is None else round(abs(self.to_paper), 2) <= WITHIN

    @property
    def images_per_s(self) -> float | None:
        stats = stats_of(run.images_per_s for run in self.finished or self.runs)
        return stats.mean if stats else None

    @property
    def gpu_hours(self) -> float | None:
        """Of one run, the mean over the finished ones."""
        stats = stats_of(run.gpu_hours for run in self.finished)
        return stats.mean if stats else None

    @property
    def state(self) -> str:
        """'done', 'missing', 'running 120/300', '2 done, 1 failed 3/300'."""
        counts = Counter(run.progress for run in sorted(self.runs, key=lambda run: ORDER.index(run.state)))
        if not counts:
            return "missing"
        if set(counts) == {"done"} or len(self.runs) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {progress}" for progress, count in counts.items())


@dataclass(frozen=True, slots=True)
class Section:
    """One column of the ladder, run by one recipe on one data set."""

    title: str
    column: Column
    recipe: tuple[str, ...]  # how it departs from the configs, e.g. ("--epochs 100", "--warmup_epochs 7")
    facts: Facts
    rows: list[Row]
    why_not: str  # compared with the paper; '' when it is

    @property
    def runs(self) -> list[Run]:
        return [run for row in self.rows for run in row.runs]


@dataclass(frozen=True, slots=True)
class Report:
    sections: list[Section]
    others: list[Run]  # of networks that are no step
    notes: list[str]  # what a reader must know beside the tables

    @property
    def runs(self) -> list[Run]:
        return [*(run for section in self.sections for run in section.runs), *self.others]


def summarise(paths: Sequence[Path], configs: Path | None) -> Report:
    """What the run folders tell of the ladder in `configs`; without one, of themselves.

    Raises what `read_runs` and `read_columns` raise.
    """
    columns = read_columns(configs) if configs else []
    runs, notes = read_runs(paths)
    if configs is None:
        notes.append("no ladder is known here, so no run is a step of one; --configs names its folder")
    others: list[Run] = []
    groups: dict[tuple[int, tuple[str, ...], Facts], list[tuple[Rung, Run]]] = {}
    for run in runs:
        found = find_rung(columns, run.config)
        if found is None:
            others.append(run)
        else:
            column, rung = found
            key = (columns.index(column), other_recipe(run.config, rung.step.config), facts_of(run))
            groups.setdefault(key, []).append((rung, run))
    # The first section of a column shows its missing steps: that by the configs' own recipe, else the one of most runs.
    keys = sorted(groups, key=lambda key: (key[0], len(key[1]) > 0, -len(groups[key]), key[1]))
    firsts = {key[0]: key for key in reversed(keys)}
    sections = []
    for key in keys:
        column, (_, recipe, facts) = columns[key[0]], key
        title = " ".join([column.title, *(["with", *recipe] if recipe else [])])
        if sum(other[:2] == key[:2] for other in keys) > 1:
            title += f" on data {(facts.train_data or 'unknown')[:8]}, global batch {facts.global_batch}"
        sections.append(_section(title, column, recipe, facts, groups[key], whole=key is firsts[key[0]], notes=notes))
    for run in runs:
        if run.state == "failed":
            notes.append(f"{run.name} failed after {len(run.epochs)} of {run.num_epochs} epochs: {run.error}")
    return Report(sections, others, notes)


def _section(
    title: str,
    column: Column,
    recipe: tuple[str, ...],
    facts: Facts,
    members: Sequence[tuple[Rung, Run]],
    *,
    whole: bool,
    notes: list[str],
) -> Section:
    why_not = _why_not(recipe, facts, members[0])
    input_size = members[0][1].config.data.input_size
    rows: dict[str, Row] = {}
    for rung in column.rungs:
        runs = _one_a_seed(rung, [run for other, run in members if other is rung], notes)
        if not runs and (rung.optional or not whole):
            continue
        notes += _differences(rung, runs)
        parameters, gmacs = size_of(rung.step.config.model, input_size, facts.num_classes or 1000)
        rows[rung.name] = Row(
            rung=rung,
            runs=runs,
            parameters=parameters,
            gmacs=gmacs,
            to_base=_raw_gain(runs, rows[rung.base].runs) if rung.base in rows else None,
            paper=None if why_not else rung.paper,
        )
        top1 = rows[rung.name].top1
        if (top1.n if top1 else 0) < len(finished(runs)):
            notes.append(f"{rung.name}: a finished run has no {rung.metric}, so it does not count")
    return Section(title, column, recipe, facts, list(rows.values()), why_not)


def _raw_gain(ours: Iterable[Run], base: Iterable[Run]) -> float | None:
    mine, theirs = scores_of(ours, "test_acc1"), scores_of(base, "test_acc1")
    return mine.mean - theirs.mean if mine and theirs else None


def _why_not(recipe: tuple[str, ...], facts: Facts, member: tuple[Rung, Run]) -> str:
    rung, run = member
    if not run.on_imagenet_1k:
        return "the data is not ImageNet-1k"
    if recipe:
        return "the recipe is another one"
    expected = rung.step.config.schedule.recipe_batch
    if facts.global_batch != expected:
        return f"the global batch is {facts.global_batch}, not {expected}"
    return ""


def _one_a_seed(rung: Rung, runs: Iterable[Run], notes: list[str]) -> list[Run]:
    """A seed's second run repeats the first and must not make the std smaller: the one that came farthest counts."""
    chosen: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.seed, ORDER.index(run.state), -len(run.epochs))):
        if run.seed in chosen:
            notes.append(
                f"{rung.name}: seed {run.seed} was run twice; {chosen[run.seed].name} counts, "
                f"{run.name} ({run.progress}) does not"
            )
        else:
            chosen[run.seed] = run
    return list(chosen.values())


def _differences(rung: Rung, runs: Sequence[Run]) -> list[str]:
    """A line on each setting beside the recipe that differs among runs that are averaged."""
    flats = [run.config.flat() for run in runs]
    lines = []
    for name in SETTINGS:
        values = sorted({format_value(flat[name]) for flat in flats})
        if name in BESIDE_THE_RECIPE and name != "seed" and len(values) > 1:
            lines.append(f"{rung.name}: its runs differ in {name} ({', '.join(values)})")
    return lines
