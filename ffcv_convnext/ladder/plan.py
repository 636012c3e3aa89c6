"""Which recipe, how many seeds and which steps fit into a budget, and which differences they can resolve."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, variance

from ffcv_convnext.config import Config, load_config, read_mapping
from ffcv_convnext.formatting import format_count, markdown_table
from ffcv_convnext.ladder.jobs import measured_rates
from ffcv_convnext.ladder.statistics import CONFIDENCE, POWER, resolved_difference
from ffcv_convnext.ladder.steps import PaperResult, Step
from ffcv_convnext.run_folder import read_epochs, read_scores

IMAGENET_IMAGES = 1_281_167
SIDE = 224  # pixels, for which rates are given
MAX_SEEDS = 20  # more are not counted
WISHED_SEEDS = 3  # as in the paper
CONFIGS_RECIPE = "the configs' recipe"
# A recipe with other settings than these changes more than the length: its steps are not those of the ladder made
# shorter.
LENGTH = frozenset(
    {"epochs", "warmup_epochs", "cooldown_epochs", "min_res", "max_res", "start_ramp", "end_ramp", "res_batch",
     "test_input_size", "test_crop_pct", "model_ema_decay"}
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Budget:
    """Devices for some hours."""

    devices: int
    kind: str
    hours: float

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read '8xH100:12h'. Raises ValueError."""
        found = re.fullmatch(r"(\d+)x([A-Za-z][\w-]*):(\d+(?:\.\d+)?)h", text.strip())
        if not found or not int(found[1]) or not float(found[3]):
            raise ValueError(f"budget = {text}: expected devices, their kind and hours, e.g. 8xH100:12h")
        return cls(int(found[1]), found[2], float(found[3]))

    @property
    def gpu_hours(self) -> float:
        """Hours of one device."""
        return self.devices * self.hours


@dataclass(frozen=True, slots=True)
class Spread:
    """Standard deviation of a step's top-1 over seeds, points, pooled over steps, and where it comes from."""

    std: float
    source: str


@dataclass(frozen=True, slots=True)
class Offer:
    """One recipe. Costs are of training alone."""

    name: str
    path: Path | None  # None: the configs' own
    epochs: int
    million_images: float  # of SIDE pixels, for one seed of all steps: as many pixels
    gpu_hours: float  # of one seed of all steps
    step_gpu_hours: Mapping[str, float]
    num_seeds: int  # that fit


def find_recipes(folder: Path, names: Sequence[str] | None = None) -> tuple[list[Path], list[str]]:
    """Return the recipes that shorten the steps' own, and the names of the others.

    names: of files in `folder`, with or without .yaml, whatever they change; None: all that change the length only.
    Raises ValueError for a name without a file.
    """
    paths = sorted(folder.glob("*.yaml"))
    if names is None:
        short = [path for path in paths if read_mapping(path).keys() <= LENGTH]
        return short, [path.stem for path in paths if path not in short]
    known = {path.stem: path for path in paths}
    if unknown := [name for name in names if name.removesuffix(".yaml") not in known]:
        raise ValueError(f"recipes = {unknown[0]}: {folder} has {', '.join(known) or 'no recipes'}")
    return [known[name.removesuffix(".yaml")] for name in names], []


def make_offers(
    steps: Sequence[Step],
    recipes: Sequence[Path],
    budget: Budget,
    rates: Mapping[str, float],
    num_images: int = IMAGENET_IMAGES,
) -> list[Offer]:
    """Return what each recipe and the configs' own would cost, from the cheapest on.

    rates: images of SIDE pixels that a run on all devices of the budget trains per second, by step.
    """
    offers = []
    for path in (*recipes, None):
        configs = [load_config(step.path, *([path] if path else [])) for step in steps]
        images = [_images(config, num_images) for config in configs]
        hours = {
            step.name: number / rates[step.name] / 3600 * budget.devices
            for step, number in zip(steps, images, strict=True)
        }
        total = sum(hours.values())
        offers.append(
            Offer(
                name=path.stem if path else CONFIGS_RECIPE,
                path=path,
                epochs=configs[0].schedule.epochs,
                million_images=sum(images) / 1e6,
                gpu_hours=total,
                step_gpu_hours=hours,
                num_seeds=min(MAX_SEEDS, math.floor(budget.gpu_hours / total)),
            )
        )
    return sorted(offers, key=lambda offer: offer.gpu_hours)


def _images(config: Config, num_images: int) -> float:
    """Return how many images of SIDE pixels have as many pixels as a run's training images."""
    share = config.relative_pixels() * config.data.max_train_size**2 / SIDE**2
    return config.schedule.epochs * num_images * share


def choose(offers: Sequence[Offer]) -> Offer | None:
    """Return the longest recipe that fits with three seeds, else with two, else with one; None if none fits."""
    for number in range(WISHED_SEEDS, 0, -1):
        fitting = [offer for offer in offers if offer.num_seeds >= number]
        if fitting:
            return fitting[-1]
    return None


def rates_of(
    steps: Sequence[Step], budget: Budget, images_per_s: float | None, runs: Path | None
) -> tuple[dict[str, float], str]:
    """Return the rate of each step, and where the rates come from.

    images_per_s: of a run on all devices of the budget at SIDE pixels; None: as measured in the runs, a step without
    one gets the median. Raises ValueError if there is neither.
    """
    if images_per_s is not None:
        if images_per_s <= 0:
            raise ValueError(f"images_per_s = {images_per_s:g}: expected a positive rate")
        return {step.name: images_per_s for step in steps}, "given, for every step"
    found = measured_rates(runs, budget.devices, {step.name: step.config for step in steps}) if runs else {}
    if not found:
        where = f"no run in {runs} has been measured" if runs else "no rate is given"
        raise ValueError(
            f"{where}: give the images of {SIDE} pixels that {format_count(budget.devices, 'device')} train per second "
            "with --images_per_s (ffcv-convnext doctor predicts it), or measured runs with --runs DIR"
        )
    scaled = {
        step.name: found[step.name] * step.config.data.max_train_size**2 / SIDE**2
        for step in steps
        if step.name in found
    }
    usual = median(scaled.values()) if scaled else median(found.values())
    source = f"measured in {runs}: {len(scaled)} of {format_count(len(steps), 'step')}, scaled to the budget's devices"
    return {step.name: scaled.get(step.name, usual) for step in steps}, source


def spread_of(runs: Path | None, paper: Mapping[str, PaperResult]) -> Spread | None:
    """Return the spread over the seeds of finished runs in DIR/STEP/seedN, else the paper's; None if neither is known.

    Pooled: the root of the mean variance, weighted by degrees of freedom.
    """
    if runs is not None:
        scores: dict[Path, list[float]] = {}
        for folder in runs.glob("**/seed*"):
            found = read_scores(folder) if folder.is_dir() else None
            if found is not None and isinstance(score := found.get("test_acc1", _last(folder)), (int, float)):
                scores.setdefault(folder.parent, []).append(float(score))
        several = [values for values in scores.values() if len(values) > 1]
        if several:
            freedom = sum(len(values) - 1 for values in several)
            pooled = math.sqrt(sum((len(values) - 1) * variance(values) for values in several) / freedom)
            return Spread(pooled, f"measured in {runs}, {format_count(len(several), 'step')} with several seeds")
    known = [result.std for result in paper.values() if result.std is not None]
    if not known:
        return None
    return Spread(math.sqrt(sum(std**2 for std in known) / len(known)), "the paper's, 300 epochs")


def _last(folder: Path) -> float | None:
    epochs = read_epochs(folder)
    return epochs[-1].get("test_acc1") if epochs else None


def close_neighbours(steps: Sequence[Step], paper: Mapping[str, PaperResult], points: float) -> list[str]:
    """Return the steps whose published difference from their base is smaller than `points`."""
    found = []
    for step in steps:
        mine, theirs = (paper[name].top1 if name in paper else None for name in (step.name, step.base or ""))
        if mine is not None and theirs is not None and abs(mine - theirs) < points:
            found.append(step.name)
    return found


def format_plan(
    offers: Sequence[Offer],
    budget: Budget,
    steps: Sequence[Step],
    paper: Mapping[str, PaperResult],
    *,
    spread: Spread | None,
    rate_source: str,
    left_out: Sequence[str] = (),
    words: str = "",
) -> str:
    """Return the plan as Markdown: every recipe, the proposal, and the command that submits it.

    words: flags of the command that chose the steps, for the proposed one.
    """
    header = [
        "recipe",
        "epochs",
        f"M images of {SIDE} px",
        "GPU-hours",
        "seeds that fit",
        "resolves",
        "closer in the paper",
    ]
    rows = [
        [
            *(offer.name, str(offer.epochs), f"{offer.million_images:,.0f}", f"{offer.gpu_hours:,.1f}"),
            f"{offer.num_seeds}" + ("+" if offer.num_seeds == MAX_SEEDS else ""),
            *_resolution(offer.num_seeds, steps, paper, spread),
        ]
        for offer in offers
    ]
    lines = [
        f"budget: {budget.devices} x {budget.kind} for {budget.hours:g} h, {budget.gpu_hours:g} GPU-hours; "
        f"{format_count(len(steps), 'step')}",
        "",
        markdown_table(header, rows, "<>>>>><"),
        "",
        "- GPU-hours: training of one seed of all steps; evaluation, queueing and compiling come on top",
        f"- rate: {rate_source}",
    ]
    if spread is None:
        lines.append("- resolves: unknown, because neither runs with several seeds nor the paper give a spread")
    else:
        lines.append(
            f"- resolves: points of top-1 between two steps that a t test of these seeds finds with {100 * POWER:.0f} "
            f"% probability at {100 * CONFIDENCE:.0f} % confidence; std over seeds {spread.std:.2f} ({spread.source}). "
            "Shorter recipes may spread more: measure, and repeat with --runs"
        )
    if left_out:
        lines.append(f"- left out: {', '.join(left_out)}, which change more than the length (--recipes takes them)")
    return "\n".join([*lines, "", *_proposal(offers, budget, words)])


def _resolution(
    num_seeds: int, steps: Sequence[Step], paper: Mapping[str, PaperResult], spread: Spread | None
) -> tuple[str, str]:
    points = resolved_difference(spread.std, num_seeds) if spread else None
    if points is None:
        return "-", "-"
    return f"{points:.2f}", ", ".join(map(_short, close_neighbours(steps, paper, points))) or "none"


def _short(name: str) -> str:
    """Return the number of a step, or its name without one."""
    number = name.partition("_")[0]
    return number if number.isdigit() else name


def _proposal(offers: Sequence[Offer], budget: Budget, words: str) -> list[str]:
    chosen = choose(offers)
    if chosen is None:
        cheapest = offers[0]
        names, used = [], 0.0
        for name, hours in cheapest.step_gpu_hours.items():
            used += hours
            if used <= budget.gpu_hours:
                names.append(name)
        some = f"; {format_count(len(names), 'step')} would fit: --only {','.join(names)}" if names else ""
        return [
            f"nothing fits: the cheapest, {cheapest.name} with one seed, needs {cheapest.gpu_hours:,.1f} GPU-hours, "
            f"{cheapest.gpu_hours / budget.devices:,.1f} h on {budget.devices} x {budget.kind}{some}"
        ]
    seeds = min(chosen.num_seeds, WISHED_SEEDS)
    hours = seeds * chosen.gpu_hours
    number = "one seed, so nothing will be known about the spread" if seeds == 1 else f"{seeds} seeds"
    config = f" --config {chosen.path}" if chosen.path else ""
    return [
        f"proposal: {chosen.name}, {number}: {hours:,.1f} GPU-hours, {hours / budget.devices:,.1f} h",
        "",
        "    ffcv-convnext ladder submit --job_dir DIR --data_path BETON_DIR --nodes 1 "
        f"--ngpus {budget.devices}{config} --seeds {','.join(map(str, range(seeds)))}{words}",
    ]
