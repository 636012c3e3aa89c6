"""The whole ladder as jobs: a run for each step and seed, in DIR/STEP/seedN."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from ffcv_convnext.cluster import ClusterConfig, Task, num_processes, plan_task, submit_tasks, unfinished
from ffcv_convnext.config import load_config
from ffcv_convnext.files import read_lines
from ffcv_convnext.ladder.status import read_starts
from ffcv_convnext.ladder.steps import Step

Say = Callable[[str], None]


def plan_ladder(
    steps: Sequence[Step],
    seeds: Sequence[int],
    cluster: ClusterConfig,
    *,
    configs: Sequence[Path] = (),
    overrides: Mapping[str, Any] | None = None,
) -> list[Task]:
    """Every run, checked. configs, overrides: settings that win over the steps'.

    A run's global batch is its recipe's unless told otherwise, whatever the number of GPUs. Raises ValueError or
    FileNotFoundError for what cannot be run.
    """
    assert cluster.job_dir is not None
    tasks = []
    for step in steps:
        config = load_config(step.path, *configs, overrides=overrides)
        if config.data.global_batch is None and config.data.update_freq == 1:
            config = config.replace(global_batch=config.schedule.recipe_batch)
        world = num_processes(cluster, config)
        for seed in seeds:
            folder = cluster.job_dir / step.name / f"seed{seed}"
            tasks.append(plan_task(step.name, config.replace(seed=seed, output_dir=folder), world))
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
    """Submit what is neither done nor queued, after a line that tells what it will cost; returns an exit status.

    images_per_s: what one run trains on all its GPUs; None: as measured in runs of the same folder.
    """
    assert cluster.job_dir is not None
    wanted = unfinished(tasks, cluster.job_dir, say)
    if not wanted:
        say(f"nothing to submit: all {len(tasks)} runs are finished or on their way")
        return 0
    world = num_processes(cluster, wanted[0].config)
    say(budget(wanted, world, images_per_s, parallel=max_parallel))
    return submit_tasks(wanted, cluster, command=command, dry_run=dry_run, max_parallel=max_parallel, say=say)


def budget(tasks: Sequence[Task], world: int, images_per_s: float | None, *, parallel: int | None = None) -> str:
    """One line: how many images the runs train on, and how long that takes on `world` processes each."""
    images = [task.config.schedule.epochs * task.plan.steps_per_epoch * task.plan.global_batch for task in tasks]
    text = f"budget: {len(tasks)} runs, {sum(images):,} training images"
    if images_per_s is not None:
        rates, source = [images_per_s] * len(tasks), "given"
    else:
        measured = _measured(tasks[0].folder.parents[1], world)
        if not measured:
            return (
                f"{text}; hours unknown: no run here has been measured yet. Give what one run trains on its {world} "
                "processes with --images_per_s (ffcv-convnext doctor foresees it)"
            )
        rates, source = [measured.get(task.name, median(measured.values())) for task in tasks], "measured here"
    hours = [number / rate / 3600 for number, rate in zip(images, rates, strict=True)]
    lanes = [0.0] * min(parallel or len(tasks), len(tasks))
    for duration in hours:  # each run begins where one ends first
        lanes[lanes.index(min(lanes))] += duration
    speed = " to ".join(dict.fromkeys(f"{rate:,.0f}" for rate in (min(rates), max(rates))))
    return (
        f"{text}; at {speed} images/s a run ({source}): {sum(hours):,.1f} h one after "
        f"the other, {max(lanes):,.1f} h with {len(lanes)} at a time, {world * sum(hours):,.0f} GPU-hours (training "
        "only, without queueing and evaluation)"
    )


def _measured(job_dir: Path, world: int) -> dict[str, float]:
    """Median images/s of the runs below a folder by step, scaled to `world` processes."""
    rates: dict[str, list[float]] = {}
    for log in job_dir.glob("*/seed*/log.jsonl"):
        starts = read_starts(log.parent)
        if starts:
            scale = world / starts[-1]["processes"]
            rates.setdefault(log.parts[-3], []).extend(
                entry["images_per_s"] * scale for entry in read_lines(log) if entry["images_per_s"]
            )
    return {name: median(values) for name, values in rates.items() if values}


def with_gpus_per_job(cluster: ClusterConfig, gpus: int | None) -> ClusterConfig:
    """The same with so many of this machine's GPUs for each run. Raises ValueError on a cluster."""
    if gpus is None:
        return cluster
    if cluster.executor != "local":
        raise ValueError(f"gpus_per_job = {gpus} is for --executor local; on a cluster say --nodes and --ngpus")
    return replace(cluster, ngpus=gpus)


def parse_seeds(text: str) -> list[int]:
    """'0,1,2' -> [0, 1, 2]. Raises ValueError for anything else and for a seed that comes twice."""
    try:
        seeds = [int(word) for word in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds = {text}: expected whole numbers such as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"seeds = {text}: expected different numbers from 0")
    return seeds


def check_overrides(overrides: Mapping[str, Any]) -> None:
    """Raises ValueError for settings that the ladder itself gives to each run."""
    for name, instead in (("seed", "--seeds 0,1,2"), ("output_dir", "--job_dir DIR")):
        if name in overrides:
            raise ValueError(f"--{name} is set for each run of a ladder; say {instead}")
