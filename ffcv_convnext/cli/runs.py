"""Commands about runs: train, report, export."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ffcv_convnext.cli.parsing import parser_of
from ffcv_convnext.config import add_flags, config_from_args
from ffcv_convnext.errors import EXIT_FAILURE, complain


def train(argv: Sequence[str]) -> int:
    """Train, continue or evaluate a run; with --job_dir, submit it as a job."""
    from ffcv_convnext.cluster import add_cluster_flags, cluster_from_args, split_slurm_options, submit_run
    from ffcv_convnext.training import run_config

    parser = parser_of("train", train)
    add_flags(parser)
    add_cluster_flags(parser)
    # torch.distributed.launch passes it as an argument, torchrun in the environment only.
    parser.add_argument("--local-rank", "--local_rank", type=int, help=argparse.SUPPRESS)
    rest, sbatch = split_slurm_options(argv)
    config, options = config_from_args(parser, rest)
    cluster = cluster_from_args(options, sbatch)
    if options.local_rank is not None:
        os.environ.setdefault("LOCAL_RANK", str(options.local_rank))
    if cluster.job_dir is None:
        return run_config(config)
    command = [sys.argv[0], *argv]
    return submit_run(config, cluster, command=command, dry_run=options.dry_run, say=partial(print, flush=True))


def report(argv: Sequence[str]) -> int:
    """Compare finished runs with the paper: table, figure, HTML page."""
    parser = parser_of("report", report)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folders, or folders of run folders")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for ladder.md, .csv, .json, .png and .svg (default: DIR, if it is one folder of run folders)",
    )
    parser.add_argument("--html", action="store_true", help="also write ladder.html, a page with training curves")
    parser.add_argument(
        "--configs", type=Path, metavar="DIR", help="folder of the ladder (default rn_configs, if it exists)"
    )
    parser.add_argument(
        "--sort", metavar="NAME", help="print all runs as one table, ordered by a setting or a score, e.g. lr or top1"
    )
    parser.add_argument("--descending", action="store_true", help="with --sort: the largest first")
    parser.add_argument("--csv", action="store_true", help="print that table as CSV; no file is written")
    options = parser.parse_args(argv)
    from ffcv_convnext.report import flat_table, read_runs, summarise, to_markdown, write_files
    from ffcv_convnext.run_folder import is_run

    if options.descending and options.sort is None:
        raise ValueError("--descending needs --sort NAME")
    if options.csv or options.sort is not None:
        if options.out is not None or options.html:
            raise ValueError("--sort and --csv print one table and write no file; leave out --out and --html")
        runs, notes = read_runs(options.folders)
        table = flat_table(runs, options.sort, descending=options.descending)
        print(table.to_csv() if options.csv else table.to_markdown(), end="" if options.csv else "\n")
        for note in notes:
            complain(note, 0)
        return 0
    out, configs = options.out, options.configs
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be created: {error.strerror}; choose another folder") from None
    elif len(options.folders) == 1 and not is_run(options.folders[0]):
        out = options.folders[0]
    elif options.html:
        raise ValueError("--html: no folder for the page; give one with --out DIR")
    if configs is None and Path("rn_configs").is_dir():
        configs = Path("rn_configs")
    found = summarise(options.folders, configs)
    print(to_markdown(found), flush=True)
    if out is None:
        return 0
    if not os.access(out, os.W_OK):
        status = 0 if options.out is None else EXIT_FAILURE
        return complain(
            f"{out} cannot be written, so no files were written; choose another folder with --out DIR", status
        )
    written = write_files(found, out, page=options.html)
    return complain(f"wrote {', '.join(path.name for path in written)} to {out}", 0)


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint's weights with the parameter names of timm, torchvision or the paper's released files."""
    parser = parser_of("export", export)
    parser.add_argument("checkpoint", type=Path, help="checkpoint in a run folder")
    parser.add_argument("--out", type=Path, required=True, help="file to write: .safetensors, or else torch.save's")
    parser.add_argument(
        "--layout",
        choices=["timm", "torchvision", "released", "ours"],
        default="ours",
        help="parameter names; released: those of the paper's released files (default ours)",
    )
    parser.add_argument("--ema", action="store_true", help="averaged weights instead of raw weights")
    options = parser.parse_args(argv)
    from ffcv_convnext.models import export_weights

    export_weights(options.checkpoint, options.out, options.layout, ema=options.ema)
    print(f"wrote {options.out}")
    return 0
