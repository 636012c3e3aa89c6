"""The command ladder and its actions."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ffcv_convnext.cli.parsing import parser_of
from ffcv_convnext.config import add_flags, nearest, settings_from_args


def ladder(argv: Sequence[str]) -> int:
    """Show the ladder (describe, figure), plan it (plan) and manage its runs as jobs (submit, status, cancel, logs)."""
    actions = {
        "describe": ladder_describe,
        "figure": ladder_figure,
        "plan": ladder_plan,
        "submit": ladder_submit,
        "status": ladder_status,
        "cancel": ladder_cancel,
        "logs": ladder_logs,
    }
    listing = "\n".join(f"  {name:8} {(action.__doc__ or '').splitlines()[0]}" for name, action in actions.items())
    if argv[:1] and argv[0] in ("-h", "--help"):
        print(f"usage: ffcv-convnext ladder ACTION ...\n\n{listing}\n\noptions: ffcv-convnext ladder ACTION --help")
        return 0
    if not argv or argv[0] not in actions:
        found = f"unknown action '{argv[0]}'{nearest(argv[0], actions)}" if argv else "no action given"
        raise ValueError(f"ladder: {found}; actions: {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def ladder_describe(argv: Sequence[str]) -> int:
    """Print each step's change, size and published accuracy."""
    parser = parser_of("ladder describe", ladder_describe)
    _add_configs_flag(parser)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import describe, format_table

    rows = describe(options.configs)
    print(json.dumps(rows, indent=2) if options.json else format_table(rows))
    return 0


def ladder_figure(argv: Sequence[str]) -> int:
    """Draw the paper's results as a picture, with your finished runs if there are any."""
    parser = parser_of("ladder figure", ladder_figure)
    _add_configs_flag(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="picture to write: .svg or .png")
    parser.add_argument(
        "--runs", type=Path, nargs="+", default=[], metavar="DIR", help="run folders, or folders of run folders"
    )
    options = parser.parse_args(argv)
    kind = options.out.suffix.lower().removeprefix(".")
    if kind not in ("svg", "png"):
        raise ValueError(f"--out {options.out}: expected a file name that ends in .svg or .png")
    if not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out {options.out}: {options.out.parent} does not exist; create it first")
    from ffcv_convnext.report import write_paper_figure

    write_paper_figure(options.out, kind, options.configs, options.runs)
    print(f"wrote {options.out}")
    return 0


def ladder_plan(argv: Sequence[str]) -> int:
    """Propose recipe and seeds that fit into a budget of GPU-hours, with the differences that they can resolve."""
    parser = parser_of("ladder plan", ladder_plan)
    _add_configs_flag(parser)
    flag = parser.add_argument
    flag("--budget", required=True, metavar="NxKIND:HOURSh", help="devices and hours, e.g. 8xH100:12h")
    flag(
        "--images_per_s",
        type=float,
        metavar="RATE",
        help="images of 224 pixels that a run on all these devices trains per second (default: as measured in --runs)",
    )
    flag("--runs", type=Path, metavar="DIR", help="--job_dir of earlier runs, for rates and the spread over seeds")
    flag("--only", metavar="STEPS", help="only these steps, e.g. 05..08,convnext_tiny")
    flag(
        "--recipes",
        metavar="A,B",
        help="only these files in the ladder's recipes/ (default: those that change the length)",
    )
    flag("--num_images", type=int, default=1_281_167, metavar="N", help="training images (default ImageNet-1k's)")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import (
        Budget,
        find_recipes,
        format_plan,
        make_offers,
        rates_of,
        read_paper,
        select_steps,
        spread_of,
    )

    budget = Budget.parse(options.budget)
    if options.num_images < 1:
        raise ValueError(f"num_images = {options.num_images}: expected at least 1")
    if options.runs is not None and not options.runs.is_dir():
        raise FileNotFoundError(f"runs = {options.runs} is not a folder; give the --job_dir of ladder submit")
    steps = select_steps(options.configs, options.only)
    rates, source = rates_of(steps, budget, options.images_per_s, options.runs)
    names = options.recipes.split(",") if options.recipes else None
    recipes, left_out = find_recipes(options.configs / "recipes", names)
    offers = make_offers(steps, recipes, budget, rates, options.num_images)
    paper = read_paper(options.configs)
    words = f" --only {options.only}" if options.only else ""
    spread = spread_of(options.runs, paper)
    print(format_plan(offers, budget, steps, paper, spread=spread, rate_source=source, left_out=left_out, words=words))
    return 0


def ladder_submit(argv: Sequence[str]) -> int:
    """Submit one run per step and seed as a job array; skip runs that are done, queued or running."""
    from ffcv_convnext.cluster import add_cluster_flags, cluster_from_args, split_slurm_options
    from ffcv_convnext.ladder import (
        check_overrides,
        parse_seeds,
        plan_ladder,
        select_steps,
        submit_ladder,
        with_gpus_per_job,
    )

    parser = parser_of("ladder submit", ladder_submit)
    _add_configs_flag(parser)
    flag = parser.add_argument
    flag("--seeds", default="0,1,2", metavar="S,S,...", help="seeds of each step (default 0,1,2)")
    flag("--only", metavar="STEPS", help="only these steps, e.g. 05..08,convnext_tiny")
    flag("--kernel_sizes", action="store_true", help="also the other kernel sizes of step 7")
    flag("--max_parallel", type=int, metavar="N", help="max runs at the same time")
    flag("--gpus_per_job", type=int, metavar="N", help="with --executor local: GPUs of each run")
    flag("--images_per_s", type=float, metavar="RATE", help="training rate of one run, to predict the hours")
    add_flags(parser)
    add_cluster_flags(parser)
    parser.usage = "%(prog)s --job_dir DIR [--seeds 0,1,2] [--only STEPS] [--CLUSTER VALUE ...] [--SETTING VALUE ...]"
    rest, sbatch = split_slurm_options(argv)
    overrides, options = settings_from_args(parser, rest)
    cluster = with_gpus_per_job(cluster_from_args(options, sbatch), options.gpus_per_job)
    if cluster.job_dir is None:
        parser.error("the following arguments are required: --job_dir")
    check_overrides(overrides)
    steps = select_steps(options.configs, options.only, kernel_sizes=options.kernel_sizes)
    tasks = plan_ladder(steps, parse_seeds(options.seeds), cluster, configs=options.config, overrides=overrides)
    return submit_ladder(
        tasks,
        cluster,
        command=["ffcv-convnext", "ladder", "submit", *argv],
        dry_run=options.dry_run,
        max_parallel=options.max_parallel,
        images_per_s=options.images_per_s,
        say=partial(print, flush=True),
    )


def ladder_status(argv: Sequence[str]) -> int:
    """Print every run's state, epoch, time left, best top-1, images/s, restarts and last error."""
    parser = parser_of("ladder status", ladder_status)
    parser.add_argument("job_dir", type=Path, metavar="DIR", help="--job_dir of ladder submit")
    parser.add_argument("--watch", action="store_true", help="repeat every 10 s until no run is queued or running")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import format_status, read_status, watch

    if options.watch:
        watch(options.job_dir, partial(print, flush=True))
    else:
        print(format_status(read_status(options.job_dir)))
    return 0


def ladder_cancel(argv: Sequence[str]) -> int:
    """Cancel queued and running jobs; run folders stay, and submitting again continues the runs."""
    parser = parser_of("ladder cancel", ladder_cancel)
    parser.add_argument("job_dir", type=Path, metavar="DIR", help="--job_dir of ladder submit")
    parser.add_argument("names", nargs="*", metavar="STEP", help="STEP or STEP/seedN (default: all runs)")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import cancel_runs

    cancel_runs(options.job_dir, options.names, print)
    return 0


def ladder_logs(argv: Sequence[str]) -> int:
    """Print the last lines of stderr of a step's latest jobs."""
    parser = parser_of("ladder logs", ladder_logs)
    parser.add_argument("name", metavar="STEP", help="STEP or STEP/seedN")
    parser.add_argument("--job_dir", type=Path, required=True, metavar="DIR", help="--job_dir of ladder submit")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="max lines per job (default 40)")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import read_log

    print(read_log(options.job_dir, options.name, options.lines))
    return 0


def _add_configs_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", type=Path, default=Path("rn_configs"), help="folder of steps (default rn_configs)")
