"""Runs compared with the ladder: one row per step, averaged over seeds, one section per recipe and data set."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ffcv_convnext.config import SETTINGS, format_value
from ffcv_convnext.ladder import size_of
from ffcv_convnext.report.reference import (
    BESIDE_THE_RECIPE,
    ReferenceLadder,
    ReferenceStep,
    find_step,
    read_ladders,
    recipe_changes,
)
from ffcv_convnext.report.runs import Metric, Run, read_runs

WITHIN = 0.2  # points of top-1: the paper's seeds have a std of 0.02 to 0.18
ORDER = ("done", "running", "stopped", "failed")  # the first one counts where a seed was run twice


@dataclass(frozen=True, slots=True)
class Stats:
    """Mean and standard deviation over n seeds."""

    mean: float
    std: float | None  # of the sample (n - 1); None for one seed
    n: int


def stats_of(values: Iterable[float | None]) -> Stats | None:
    """Return the statistics of the values that are not None; None if there are none."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Stats(statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None, len(known))


def finished(runs: Iterable[Run]) -> list[Run]:
    """Return the runs that are done."""
    return [run for run in runs if run.state == "done"]


def mean_of(values: Iterable[float | None]) -> float | None:
    """Return the mean of the values that are not None; None if there are none."""
    stats = stats_of(values)
    return stats.mean if stats else None


def scores_of(runs: Iterable[Run], metric: Metric) -> Stats | None:
    """Return the scores of the finished runs after their last epoch."""
    return stats_of(run.last(metric) for run in finished(runs))


class Facts(NamedTuple):
    """Data and global batch of a run. Runs that differ here are not averaged. None: unknown."""

    num_classes: int | None
    train_images: int | None
    val_images: int | None
    train_data: str | None  # the manifests' hashes
    val_data: str | None
    global_batch: int | None


def facts_of(run: Run) -> Facts:
    """Return the facts in a run's run.json."""
    images, hashes = run.facts.get("images", {}), run.facts.get("data", {})
    classes, batch = run.facts.get("num_classes"), run.facts.get("global_batch")
    return Facts(classes, images.get("train"), images.get("val"), hashes.get("train"), hashes.get("val"), batch)


@dataclass(frozen=True, slots=True)
class Row:
    """A step and its runs of one recipe: at most one per seed, ordered by seed."""

    reference: ReferenceStep
    runs: list[Run]
    parameters: int
    gmacs: float
    to_base: float | None  # points of top-1, raw weights on both sides
    paper: float | None  # percent; None if the runs cannot be compared with it

    @property
    def name(self) -> str:
        """Name of the step."""
        return self.reference.name

    @property
    def top1(self) -> Stats | None:
        """Percent after the last epoch of the finished runs, for the weights that the paper evaluates."""
        return scores_of(self.runs, self.reference.metric)

    @property
    def to_paper(self) -> float | None:
        """Points above the paper's value."""
        return None if self.paper is None or self.top1 is None else self.top1.mean - self.paper

    @property
    def within(self) -> bool | None:
        """Whether the mean, rounded to two digits as in the paper, is within 0.2 points of the paper's."""
        return None if self.to_paper is None else round(abs(self.to_paper), 2) <= WITHIN

    @property
    def images_per_s(self) -> float | None:
        """Training rate of one run, mean over the finished ones, or over all if none is finished."""
        return mean_of(run.images_per_s for run in finished(self.runs) or self.runs)

    @property
    def gpu_hours(self) -> float | None:
        """GPU-hours of one run, mean over the finished ones."""
        return mean_of(run.gpu_hours for run in finished(self.runs))

    @property
    def state(self) -> str:
        """States of the runs: 'done', 'missing', 'running 120/300', '2 done, 1 failed 3/300'."""
        counts = Counter(run.progress for run in sorted(self.runs, key=lambda run: ORDER.index(run.state)))
        if not counts:
            return "missing"
        if set(counts) == {"done"} or len(self.runs) == 1:
            return next(iter(counts))
        return ", ".join(f"{count} {progress}" for progress, count in counts.items())


@dataclass(frozen=True, slots=True)
class Section:
    """The steps of one ladder, trained with one recipe on one data set."""

    title: str
    ladder: ReferenceLadder
    recipe: tuple[str, ...]  # changes from the configs' recipe, e.g. ("--epochs 100", "--warmup_epochs 7")
    facts: Facts
    rows: list[Row]
    why_not: str  # the reason why it is not compared with the paper; '' if it is

    @property
    def runs(self) -> list[Run]:
        """The runs of all rows."""
        return [run for row in self.rows for run in row.runs]


@dataclass(frozen=True, slots=True)
class Report:
    """Runs compared with the ladder."""

    sections: list[Section]
    others: list[Run]  # of networks that are not a step
    notes: list[str]  # shown below the tables

    @property
    def runs(self) -> list[Run]:
        """The runs of all sections, then the others."""
        return [*(run for section in self.sections for run in section.runs), *self.others]


def summarise(paths: Sequence[Path], configs: Path | None) -> Report:
    """Compare the runs in some folders with the ladders in `configs`; None: only list them.

    Raises what `read_runs` and `read_ladders` raise.
    """
    ladders = read_ladders(configs) if configs else []
    runs, notes = read_runs(paths)
    if configs is None:
        notes.append("no ladder found, so no run is compared with a step; give its folder with --configs")
    others: list[Run] = []
    groups: dict[tuple[int, tuple[str, ...], Facts], list[tuple[ReferenceStep, Run]]] = {}
    for run in runs:
        found = find_step(ladders, run.config)
        if found is None:
            others.append(run)
        else:
            ladder, step = found
            key = (ladders.index(ladder), recipe_changes(run.config, step.step.config), facts_of(run))
            groups.setdefault(key, []).append((step, run))
    # A ladder's first section also lists missing steps: the section with the configs' recipe, else with the most runs.
    keys = sorted(groups, key=lambda key: (key[0], len(key[1]) > 0, -len(groups[key]), key[1]))
    firsts = {key[0]: key for key in reversed(keys)}
    sections = []
    for key in keys:
        ladder, (_, recipe, facts) = ladders[key[0]], key
        title = " ".join([ladder.title, *(["with", *recipe] if recipe else [])])
        if sum(other[:2] == key[:2] for other in keys) > 1:
            title += f" on data {(facts.train_data or 'unknown')[:8]}, global batch {facts.global_batch}"
        sections.append(_section(title, ladder, recipe, facts, groups[key], whole=key is firsts[key[0]], notes=notes))
    for run in runs:
        if run.state == "failed":
            notes.append(f"{run.name} failed after {len(run.epochs)} of {run.num_epochs} epochs: {run.error}")
    return Report(sections, others, notes)


def _section(
    title: str,
    ladder: ReferenceLadder,
    recipe: tuple[str, ...],
    facts: Facts,
    members: Sequence[tuple[ReferenceStep, Run]],
    *,
    whole: bool,
    notes: list[str],
) -> Section:
    why_not = _why_not(recipe, facts, members[0])
    input_size = members[0][1].config.data.input_size
    rows: dict[str, Row] = {}
    for step in ladder.steps:
        runs = _one_per_seed(step, [run for other, run in members if other is step], notes)
        if not runs and (step.optional or not whole):
            continue
        notes += _differences(step, runs)
        parameters, gmacs = size_of(step.step.config.model, input_size, facts.num_classes or 1000)
        rows[step.name] = row = Row(
            reference=step,
            runs=runs,
            parameters=parameters,
            gmacs=gmacs,
            to_base=_raw_gain(runs, rows[step.step.base].runs) if step.step.base in rows else None,
            paper=None if why_not else step.paper.top1,
        )
        if (row.top1.n if row.top1 else 0) < len(finished(runs)):
            notes.append(f"{step.name}: a finished run has no {step.metric}, so it does not count")
    return Section(title, ladder, recipe, facts, list(rows.values()), why_not)


def _raw_gain(ours: Iterable[Run], base: Iterable[Run]) -> float | None:
    mine, theirs = scores_of(ours, "test_acc1"), scores_of(base, "test_acc1")
    return mine.mean - theirs.mean if mine and theirs else None


def _why_not(recipe: tuple[str, ...], facts: Facts, member: tuple[ReferenceStep, Run]) -> str:
    step, run = member
    if not run.on_imagenet_1k:
        return "the data is not ImageNet-1k"
    if recipe:
        return "the recipe is different"
    expected = step.step.config.schedule.recipe_batch
    if facts.global_batch != expected:
        return f"the global batch is {facts.global_batch}, not {expected}"
    return ""


def _one_per_seed(step: ReferenceStep, runs: Iterable[Run], notes: list[str]) -> list[Run]:
    """Return one run per seed, the most advanced one: a repeated seed must not make the std smaller."""
    chosen: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: (run.seed, ORDER.index(run.state), -len(run.epochs))):
        if run.seed in chosen:
            notes.append(
                f"{step.name}: seed {run.seed} was run twice; {chosen[run.seed].name} counts, "
                f"{run.name} ({run.progress}) does not"
            )
        else:
            chosen[run.seed] = run
    return list(chosen.values())


def _differences(step: ReferenceStep, runs: Sequence[Run]) -> list[str]:
    """Return a note for each setting beside the recipe that differs among averaged runs."""
    flats = [run.config.flat() for run in runs]
    names = [name for name in SETTINGS if name in BESIDE_THE_RECIPE and name != "seed"]
    values = {name: sorted({format_value(flat[name]) for flat in flats}) for name in names}
    return [
        f"{step.name}: its runs differ in {n} ({', '.join(found)})" for n, found in values.items() if len(found) > 1
    ]
