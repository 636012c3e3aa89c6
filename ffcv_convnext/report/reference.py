"""The reference that runs are compared with: the ladders in rn_configs/, and the step that a run belongs to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ffcv_convnext.config import SETTINGS, Config, format_value
from ffcv_convnext.ladder import PaperResult, Step, natural_order, read_ladder, read_paper, read_released
from ffcv_convnext.report.runs import Metric

VARIANTS = "kernel_sizes"  # folder of steps that no other step builds on
# Settings that depend on seed, machine or storage and leave the recipe as it is. Runs that differ only in these are
# averaged, and a note lists the difference (except for the seed).
BESIDE_THE_RECIPE = frozenset(
    {"seed", "batch_size", "amp", "model_ema", "model_ema_eval", "order", "shuffle_window_mb", "bad_samples"}
)


@dataclass(frozen=True, slots=True)
class ReferenceStep:
    """A step of a ladder and its result in the paper."""

    step: Step
    optional: bool  # a variant: no step builds on it
    paper: PaperResult
    metric: Metric  # the accuracy that the paper reports for it

    @property
    def name(self) -> str:
        """Name of the step, its file name without .yaml."""
        return self.step.name

    @property
    def is_released(self) -> bool:
        """Whether it is the network at the ladder's end, which the paper evaluates by averaged weights."""
        return self.metric == "test_acc1_ema"


@dataclass(frozen=True, slots=True)
class ReferenceLadder:
    """A ladder from its first step to the released network, with the variants between the steps."""

    folder: Path
    steps: list[ReferenceStep]

    @property
    def title(self) -> str:
        """First and last step."""
        return f"{self.steps[0].name} to {self.steps[-1].name}"


def read_ladders(configs: Path) -> list[ReferenceLadder]:
    """Return the ladder in `configs` and those in its subfolders (ResNet-200).

    Raises what `read_ladder` and `read_paper` raise.
    """
    inner = sorted(path.parent for path in configs.glob("*/00_*.yaml") if path.parent.name != VARIANTS)
    return [_read_ladder(folder) for folder in [configs, *inner]]


def _read_ladder(folder: Path) -> ReferenceLadder:
    steps = _reference(folder, read_ladder(folder), optional=False, metric="test_acc1")
    if (folder / VARIANTS).is_dir():
        steps += _reference(folder / VARIANTS, read_ladder(folder / VARIANTS), optional=True, metric="test_acc1")
    steps.sort(key=lambda step: natural_order(step.name))
    # The paper evaluates averaged weights for the released networks only (Appendix A.1).
    released = _reference(folder, read_released(folder), optional=False, metric="test_acc1_ema")
    return ReferenceLadder(folder, steps + released)


def _reference(folder: Path, steps: Iterable[Step], *, optional: bool, metric: Metric) -> list[ReferenceStep]:
    paper = read_paper(folder)
    return [ReferenceStep(step, optional, paper.get(step.name, PaperResult(step.name)), metric) for step in steps]


def find_step(ladders: Iterable[ReferenceLadder], config: Config) -> tuple[ReferenceLadder, ReferenceStep] | None:
    """Return the step with the same network as `config`, and its ladder; None if there is none."""
    ours = config.model.architecture
    return next(
        ((ladder, s) for ladder in ladders for s in ladder.steps if s.step.config.model.architecture == ours), None
    )


def recipe_changes(ours: Config, step: Config) -> tuple[str, ...]:
    """Return the settings, as '--name value', in which a run's recipe differs from its step's."""
    mine, theirs = ours.flat(), step.flat()
    return tuple(
        f"--{name} {format_value(mine[name])}"
        for name, declared in SETTINGS.items()
        if mine[name] != theirs[name]
        and not declared.free
        and (declared.group != "model" or name in ("drop_path", "head_init_scale"))  # the network is the same
        and name not in BESIDE_THE_RECIPE
    )
