"""The whole ladder as jobs: one run per step and seed, in DIR/STEP/seedN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ffcv_convnext.cluster import ClusterConfig, Task, await_data, num_processes, plan_task, submit_tasks
from ffcv_convnext.config import Config, load_config
from ffcv_convnext.formatting import format_count
from ffcv_convnext.ladder.steps import Step
from ffcv_convnext.run_folder import EPOCHS, known, read_epochs, read_starts

Say = Callable[[str], None]


def plan_ladder(
    steps: Sequence[Step],
    seeds: Sequence[int],
    cluster: ClusterConfig,
    *,
    configs: Sequence[Path] = (),
    overrides: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Return one checked task per step and seed. configs, overrides: settings that override the steps'.

    The global batch is the recipe's by default, on any number of GPUs. Raises ValueError or FileNotFoundError if a run
    cannot start.
    """
    assert cluster.job_dir is not None
    tasks: list[Task] = []
    for step in steps:
        config = load_config(step.path, *configs, overrides=overrides)
        if config.data.global_batch is None and config.data.update_freq == 1:
            config = config.replace(global_batch=config.schedule.recipe_batch)
        world, awaited = num_processes(cluster, config), await_data(cluster, config)
        plan = None
        for seed in seeds:
            folder = cluster.job_dir / step.name / f"seed{seed}"
            tasks.append(plan_task(step.name, config.replace(seed=seed, output_dir=folder), world, plan, awaited))
            plan = tasks[-1].plan
    return tasks


def submit_ladder(
    tasks: Sequence[Task],
    cluster: ClusterConfig,
    *,
    command: Sequence[str],
    dry_run: bool,
    max_parallel: int | None,
    images_per_s: float | None,
    say: Say,
) -> int:
    """Print the expected cost and submit the runs that are not done, queued or running; return an exit status.

    images_per_s: training rate of one run on all its GPUs; None: as measured in runs of the same folder.
    """

    def announce(wanted: Sequence[Task]) -> None:
        if not wanted:
            say(f"nothing to submit: all {format_count(len(tasks), 'run')} are finished, queued or running")
            return
        world = num_processes(cluster, wanted[0].config)
        say(budget(wanted, world, images_per_s, parallel=max_parallel))

    return submit_tasks(
        tasks, cluster, command=command, dry_run=dry_run, max_parallel=max_parallel, announce=announce, say=say
    )


def budget(tasks: Sequence[Task], world: int, images_per_s: float | None, *, parallel: int | None = None) -> str:
    """Return one line: number of training images, and predicted hours on `world` processes per run."""
    images = [task.config.schedule.epochs * task.plan.steps_per_epoch * task.plan.global_batch for task in tasks]
    text = f"budget: {format_count(len(tasks), 'run')}, {sum(images):,} training images"
    shares = [task.config.relative_pixels() for task in tasks]
    if min(shares) < 1:  # rates are those of the largest images
        pixels = sum(share * number for share, number in zip(shares, images, strict=True)) / sum(images)
        text += f" with {100 * pixels:.0f} % of the pixels of their largest size"
    if images_per_s is not None:
        rates, source = [images_per_s] * len(tasks), "given"
    else:
        measured = measured_rates(tasks[0].folder.parents[1], world, {task.name: task.config for task in tasks})
        if not measured:
            return (
                f"{text}; hours unknown: no run in this folder has been measured yet. Give the rate of one run on "
                f"{format_count(world, 'process')} with --images_per_s; ffcv-convnext doctor predicts it"
            )
        rates, source = [measured.get(task.name, median(measured.values())) for task in tasks], "measured here"
    hours = [n * share / rate / 3600 for n, share, rate in zip(images, shares, rates, strict=True)]
    lanes = [0.0] * min(parallel or len(tasks), len(tasks))
    for duration in hours:  # each run starts in the lane that is free first
        lanes[lanes.index(min(lanes))] += duration
    speed = " to ".join(dict.fromkeys(f"{rate:,.0f}" for rate in (min(rates), max(rates))))
    return (
        f"{text}; at {speed} images/s per run ({source}): {sum(hours):,.1f} h one after "
        f"the other, {max(lanes):,.1f} h with {len(lanes)} at a time, {world * sum(hours):,.0f} GPU-hours (training "
        "only, without queueing and evaluation)"
    )


def measured_rates(job_dir: Path, world: int, configs: Mapping[str, Config]) -> dict[str, float]:
    """Return the median images/s of the runs below a folder by step, scaled to `world` processes.

    With progressive resizing, also scaled to the pixels of the largest images.   configs: of the steps, by name.
    """
    rates: dict[str, list[float]] = {}
    for log in job_dir.glob(f"*/seed*/{EPOCHS}"):
        starts = read_starts(log.parent)
        if starts and (processes := starts[-1].get("processes")):
            name = log.parts[-3]
            size = configs[name].data.max_train_size if name in configs else None
            rates.setdefault(name, []).extend(
                rate * world / processes * (entry.get("train_size", size) / size if size else 1) ** 2
                for entry in read_epochs(log.parent)
                for rate in known([entry], "images_per_s")
                if rate > 0
            )
    return {name: median(values) for name, values in rates.items() if values}


def with_gpus_per_job(cluster: ClusterConfig, gpus: int | None) -> ClusterConfig:
    """Return the settings with `gpus` GPUs of this machine for each run. Raises ValueError for another executor."""
    if gpus is None:
        return cluster
    if cluster.executor != "local":
        raise ValueError(f"gpus_per_job = {gpus} is for --executor local; on a cluster use --nodes and --ngpus")
    return replace(cluster, ngpus=gpus)


def parse_seeds(text: str) -> list[int]:
    """Return [0, 1, 2] for '0,1,2'. Raises ValueError for other text and for repeated seeds."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds = {text}: expected whole numbers such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds = {text}: expected different numbers from 0")
    return seeds


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raise ValueError for settings that the ladder sets for each run."""
    for name, instead in (("seed", "--seeds 0,1,2"), ("output_dir", "--job_dir DIR")):
        if name in overrides:
            raise ValueError(f"--{name} is set for each run of a ladder; use {instead}")
