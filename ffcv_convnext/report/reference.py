"""The ladder that runs are held against: rn_configs/ as columns of steps, and which of them a run is."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import yaml

from ffcv_convnext.config import SETTINGS, Config, format_value
from ffcv_convnext.ladder import Step, read_ladder, read_paper, read_released
from ffcv_convnext.report.runs import Metric, reading_order

VARIANTS = "kernel_sizes"  # the folder of steps that no other step builds on
NETWORK = [
    name
    for name, declared in SETTINGS.items()
    if declared.group == "model" and not declared.free and name not in ("nb_classes", "drop_path")
]
# Settings that leave the recipe as it is: what the seeds, the machine or the storage decide. Runs that differ in
# these alone are averaged together, and a note tells of it (of the seed it does not).
BESIDE_THE_RECIPE = frozenset(
    {"seed", "batch_size", "amp", "model_ema", "model_ema_eval", "order", "shuffle_window_mb", "bad_samples"}
)


@dataclass(frozen=True, slots=True)
class Rung:
    """A step of a column with what the paper reports of it."""

    step: Step
    base: str | None  # the name of the step it builds on
    optional: bool  # a variant: no step builds on it
    paper: float | None  # top-1 in percent
    paper_std: float | None
    metric: Metric  # the accuracy that the paper's is of

    @property
    def name(self) -> str:
        return self.step.name


@dataclass(frozen=True, slots=True)
class Column:
    """A ladder from its first step to the released network, variants between the steps."""

    folder: Path
    rungs: list[Rung]

    @property
    def title(self) -> str:
        return f"{self.rungs[0].name} to {self.rungs[-1].name}"


def read_columns(configs: Path) -> list[Column]:
    """The ladder of `configs` and those of the folders directly in it (the ResNet-200 column).

    Raises what `read_ladder` and `read_paper` raise.
    """
    inner = sorted(path.parent for path in configs.glob("*/00_*.yaml") if path.parent.name != VARIANTS)
    return [_read_column(folder) for folder in [configs, *inner]]


def _read_column(folder: Path) -> Column:
    rungs = _rungs(folder, read_ladder(folder), optional=False, metric="test_acc1")
    if (folder / VARIANTS).is_dir():
        rungs += _rungs(folder / VARIANTS, read_ladder(folder / VARIANTS), optional=True, metric="test_acc1")
    rungs.sort(key=lambda rung: reading_order(rung.name))
    # The paper evaluated the averaged weights of the released networks only (Appendix A.1).
    return Column(folder, rungs + _rungs(folder, read_released(folder), optional=False, metric="test_acc1_ema"))


def _rungs(folder: Path, steps: Iterable[Step], *, optional: bool, metric: Metric) -> list[Rung]:
    paper = read_paper(folder)
    return [
        Rung(
            step=step,
            base=_base(step.path),
            optional=optional,
            paper=paper.get(step.name, {}).get("top1"),
            paper_std=paper.get(step.name, {}).get("std"),
            metric=metric,
        )
        for step in steps
    ]


def _base(path: Path) -> str | None:
    base = (yaml.safe_load(path.read_text()) or {}).get("base")
    return None if base is None else Path(str(base)).stem


def find_rung(columns: Iterable[Column], config: Config) -> tuple[Column, Rung] | None:
    """The step whose network is this one, whatever its run is called; None for a network of its own."""
    ours = config.flat()
    for column in columns:
        for rung in column.rungs:
            theirs = rung.step.config.flat()
            if all(ours[name] == theirs[name] for name in NETWORK):
                return column, rung
    return None


def other_recipe(ours: Config, step: Config) -> tuple[str, ...]:
    """The settings, as '--name value', by which a run's recipe differs from its step's."""
    mine, theirs = ours.flat(), step.flat()
    return tuple(
        f"--{name} {format_value(mine[name])}"
        for name, declared in SETTINGS.items()
        if not declared.free
        and name not in NETWORK
        and name not in BESIDE_THE_RECIPE
        and name != "nb_classes"  # run.json tells how many there were
        and mine[name] != theirs[name]
    )
