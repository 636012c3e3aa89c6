"""The command line: `ffcv-convnext write|train|ladder|report|export|bench|doctor|verify|data`.

Exit status: 0 done, 1 failed, 2 wrong usage, 75 interrupted and ready to be resumed. What a user can mend is one
line on stderr; anything else keeps its traceback.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

from ffcv_convnext import __version__
from ffcv_convnext.config import add_flags, config_from_args, settings_from_args
from ffcv_convnext.errors import EXIT_FAILURE, EXIT_USAGE, complain, exit_status
from ffcv_convnext.files import write_atomically


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other usage error here."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; {self.prog} --help lists the options")


def write(argv: Sequence[str]) -> int:
    """Convert an ImageFolder to .beton files and manifests."""
    from ffcv_convnext.data import ConversionOptions, convert, ending_like_ctrl_c, join_parts
    from ffcv_convnext.settings import nearest

    script = Path(sys.argv[0]).name
    parser = _Parser(
        prog=script if script.startswith("write_") else "ffcv-convnext write",
        description="Convert an ImageFolder (DATA_PATH/train/<class>/<image>, DATA_PATH/val/...) to train.beton and "
        "val.beton, which FFCV reads, each with a manifest (.json) and the list of its original files (.files.txt).",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    flag = parser.add_argument
    flag("--data_path", type=Path, help="folder that holds train/ and val/")
    flag("--out_dir", type=Path, required=True, help="folder for the .beton files, made if missing")
    flag("--split", choices=("train", "val", "all"), help="what to convert; val takes the class list of train (all)")
    flag(
        "--max_resolution",
        type=_number_or("none", None),
        metavar="PIXELS",
        help="longest side of a stored image; larger ones are shrunk; none: all keep their size (500)",
    )
    flag(
        "--jpeg_quality",
        type=_number_or("original", "original"),
        metavar="Q",
        help="1 to 100; original: JPEGs that are not shrunk keep their coefficients, others get 95 (90)",
    )
    flag("--subsampling", choices=("420", "422", "444"), help="of chroma, in what is encoded (420)")
    flag(
        "--compress_probability",
        type=float,
        metavar="P",
        help="share of images stored as JPEG, drawn with the seed; the others are stored as raw pixels (1)",
    )
    flag(
        "--shuffle_indices",
        type=_true_or_false,
        metavar="BOOL",
        help="store train in a random order, which --order quasi_random needs; val keeps the folder's (true)",
    )
    flag("--num_workers", type=int, metavar="N", help="processes that decode and encode (one a core)")
    flag("--subset", type=int, metavar="N", help="only N images of each split, drawn at random (all)")
    flag("--seed", type=int, help="of subset, compress_probability and shuffle_indices (0)")
    flag(
        "--skip_bad",
        action="store_true",
        help="leave out files that cannot be decoded and list them in the manifest, instead of stopping",
    )
    flag("--overwrite", action="store_true", help="replace .beton files that exist")
    flag("--resume", action="store_true", help="go on where the same command was interrupted")
    flag("--shard", type=_shard, metavar="I/N", help="convert only the I-th of N parts, I from 0 (see --join)")
    flag(
        "--join", action="store_true", help="put the N parts in OUT_DIR together; takes --out_dir, --split, --overwrite"
    )
    known = [name[2:] for action in parser._actions for name in action.option_strings if name.startswith("--")]
    for word in argv:  # before argparse, which would complain of a missing --out_dir where --out_dri was given
        if word.startswith("--") and (name := word[2:].split("=")[0]) not in known:
            parser.error(f"nobody declared '{word}'{nearest(name, known)}")
    values = vars(parser.parse_args(argv))
    say = partial(print, flush=True)
    with ending_like_ctrl_c():
        if not values.pop("join", False):
            if "data_path" not in values:
                parser.error("the following arguments are required: --data_path")
            convert(ConversionOptions(**values), say=say)
            return 0
        if useless := sorted(values.keys() - {"out_dir", "split", "overwrite"}):
            parser.error(f"--join takes --out_dir, --split and --overwrite only, not --{useless[0]}")
        for split in ("train", "val") if values.get("split", "all") == "all" else (values["split"],):
            join_parts(values["out_dir"], split, overwrite=values.get("overwrite", False), say=say)
    return 0


def _number_or(word: str, meaning: str | None) -> Callable[[str], int | str | None]:
    def number(text: str) -> int | str | None:  # argparse says: invalid number value
        return meaning if text == word else int(text)

    return number


def _true_or_false(text: str) -> bool:
    try:
        return {"true": True, "false": False}[text.lower()]
    except KeyError:
        raise argparse.ArgumentTypeError(f"'{text}': expected true or false") from None


def _shard(text: str) -> tuple[int, int]:
    try:
        index, number = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N, such as 0/8") from None
    return index, number


def train(argv: Sequence[str]) -> int:
    """Train a network, continue a run, or evaluate a checkpoint; with --job_dir, as a job on a cluster."""
    from ffcv_convnext.cluster import add_cluster_flags, cluster_from_args, run_config, split_slurm_options, submit_run

    parser = _parser("train", train)
    add_flags(parser)
    add_cluster_flags(parser)
    rest, sbatch = split_slurm_options(argv)
    config, options = config_from_args(parser, rest)
    cluster = cluster_from_args(options, sbatch)
    if cluster.job_dir is None:
        return run_config(config)
    command = [sys.argv[0], *argv]
    return submit_run(config, cluster, command=command, dry_run=options.dry_run, say=partial(print, flush=True))


def ladder(argv: Sequence[str]) -> int:
    """The ladder: its steps (describe), and their runs as jobs (submit, status, cancel, logs)."""
    actions = {
        "describe": ladder_describe,
        "submit": ladder_submit,
        "status": ladder_status,
        "cancel": ladder_cancel,
        "logs": ladder_logs,
    }
    listing = "\n".join(f"  {name:8} {(action.__doc__ or '').splitlines()[0]}" for name, action in actions.items())
    if argv[:1] and argv[0] in ("-h", "--help"):
        print(f"usage: ffcv-convnext ladder ACTION ...\n\n{listing}\n\nffcv-convnext ladder ACTION --help tells more.")
        return 0
    if not argv or argv[0] not in actions:
        found = f"no action '{argv[0]}'" if argv else "no action given"
        raise ValueError(f"ladder: {found}; there are: {', '.join(actions)}")
    return actions[argv[0]](argv[1:])


def ladder_describe(argv: Sequence[str]) -> int:
    """Each step's change, size and published accuracy."""
    parser = _parser("ladder describe", ladder_describe)
    _add_configs_flag(parser)
    parser.add_argument("--json", action="store_true", help="print a list of objects instead of a table")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import describe, format_table

    rows = describe(options.configs)
    print(json.dumps(rows, indent=2) if options.json else format_table(rows))
    return 0


def ladder_submit(argv: Sequence[str]) -> int:
    """Submit a run for each step and seed, as one job array; what is done or queued is left out."""
    from ffcv_convnext.cluster import add_cluster_flags, cluster_from_args, split_slurm_options
    from ffcv_convnext.ladder import (
        check_overrides,
        parse_seeds,
        plan_ladder,
        select_steps,
        submit_ladder,
        with_gpus_per_job,
    )

    parser = _parser("ladder submit", ladder_submit)
    _add_configs_flag(parser)
    flag = parser.add_argument
    flag("--seeds", default="0,1,2", metavar="S,S,...", help="a run of each step for each seed (default 0,1,2)")
    flag("--only", metavar="STEPS", help="some steps only, e.g. 05..08,convnext_tiny")
    flag("--kernel_sizes", action="store_true", help="step 7's other kernel sizes too")
    flag("--max_parallel", type=int, metavar="N", help="runs at the same time, at most")
    flag("--gpus_per_job", type=int, metavar="N", help="with --executor local: GPUs of a run; others get the rest")
    flag(
        "--images_per_s", type=float, metavar="RATE", help="what one run trains on its GPUs, to foresee the hours from"
    )
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
    """Show how every run stands: state, epoch, time left, best top-1, images/s, restarts, last error."""
    parser = _parser("ladder status", ladder_status)
    parser.add_argument("job_dir", type=Path, metavar="DIR", help="--job_dir of ladder submit")
    parser.add_argument("--watch", action="store_true", help="show it anew every 10 s until nothing is on its way")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import format_status, read_status, watch

    if options.watch:
        watch(options.job_dir, partial(print, flush=True))
    else:
        print(format_status(read_status(options.job_dir)))
    return 0


def ladder_cancel(argv: Sequence[str]) -> int:
    """Take runs out of the queue; their folders stay, and submitting again continues them."""
    parser = _parser("ladder cancel", ladder_cancel)
    parser.add_argument("job_dir", type=Path, metavar="DIR", help="--job_dir of ladder submit")
    parser.add_argument("names", nargs="*", metavar="STEP", help="STEP or STEP/seedN (default: all runs)")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import cancel_runs

    cancel_runs(options.job_dir, options.names, print)
    return 0


def ladder_logs(argv: Sequence[str]) -> int:
    """Print the end of what a step's latest jobs said on stderr."""
    parser = _parser("ladder logs", ladder_logs)
    parser.add_argument("name", metavar="STEP", help="STEP or STEP/seedN")
    parser.add_argument("--job_dir", type=Path, required=True, metavar="DIR", help="as of ladder submit")
    parser.add_argument("--lines", type=int, default=40, metavar="N", help="of each job, at most (default 40)")
    options = parser.parse_args(argv)
    from ffcv_convnext.ladder import read_log

    print(read_log(options.job_dir, options.name, options.lines))
    return 0


def _add_configs_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--configs", type=Path, default=Path("rn_configs"), help="folder of steps (default rn_configs)")


def report(argv: Sequence[str]) -> int:
    """Hold run folders against the ladder: table, figure and page."""
    parser = _parser("report", report)
    parser.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="run folders, or folders that hold some")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="write ladder.md, .csv, .json, .png and .svg there (default: the DIR, where one is given that holds runs)",
    )
    parser.add_argument("--html", action="store_true", help="write ladder.html too, one page with training curves")
    parser.add_argument("--configs", type=Path, metavar="DIR", help="the ladder (default rn_configs, where it is)")
    options = parser.parse_args(argv)
    from ffcv_convnext.report import is_run, summarise, to_markdown, write_files

    out, configs = options.out, options.configs
    if out is not None:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--out {out} cannot be made: {error.strerror}; choose another folder") from None
    elif len(options.folders) == 1 and not is_run(options.folders[0]):
        out = options.folders[0]
    elif options.html:
        raise ValueError("--html: say where the page shall be, with --out DIR")
    if configs is None and Path("rn_configs").is_dir():
        configs = Path("rn_configs")
    found = summarise(options.folders, configs)
    print(to_markdown(found), flush=True)
    if out is None:
        return 0
    if not os.access(out, os.W_OK):
        status = 0 if options.out is None else EXIT_FAILURE
        return complain(f"{out} cannot be written, so no files were; --out DIR puts them elsewhere", status)
    written = write_files(found, out, page=options.html)
    return complain(f"wrote {', '.join(path.name for path in written)} to {out}", 0)


def export(argv: Sequence[str]) -> int:
    """Write a checkpoint's weights under the names that timm or torchvision use."""
    parser = _parser("export", export)
    parser.add_argument("checkpoint", type=Path, help="a checkpoint of a run folder")
    parser.add_argument("--out", type=Path, required=True, help="file to write, readable with torch.load")
    parser.add_argument(
        "--layout", choices=["timm", "torchvision", "ours"], default="ours", help="names of the weights"
    )
    parser.add_argument("--ema", action="store_true", help="the averaged weights instead of the raw ones")
    options = parser.parse_args(argv)
    from ffcv_convnext.models import export_weights

    export_weights(options.checkpoint, options.out, options.layout, ema=options.ema)
    print(f"wrote {options.out}")
    return 0


def bench(argv: Sequence[str]) -> int:
    """Measure the loader (cold: from a file not in memory), the conversion or start-up beside their peers."""
    parser = _parser("bench", bench)
    parser.add_argument("what", choices=["loader", "cold", "convert", "startup"])
    parser.add_argument("--data_path", type=Path, help="an ImageFolder, of which train/ is used")
    parser.add_argument(
        "--photographs", type=Path, metavar="DIR", help="pictures to make one of (default: some at hand)"
    )
    parser.add_argument("--num_images", type=int, default=1280, help="images of a round, at most (default 1280)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each contestant that count (default 5)")
    parser.add_argument("--cores", type=int, help="processor cores to use (default all)")
    parser.add_argument("--peers", help="rows wanted: how their names begin, comma-separated (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args(argv)
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that exists")
    from ffcv_convnext import bench as benchmarks

    found = getattr(benchmarks, f"bench_{options.what}")(
        data_path=options.data_path,
        photographs=options.photographs,
        num_images=options.num_images,
        rounds=options.rounds,
        cores=options.cores,
        peers=options.peers.split(",") if options.peers else None,
        say=lambda line: print(line, file=sys.stderr),
    )
    print(found.format())
    if options.json:
        options.json.write_text(found.to_json() + "\n")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Measure what bounds a run: storage, decode, transfer, augmentation and step apart."""
    parser = _parser("doctor", doctor)
    flag = parser.add_argument
    flag("--gpus", type=int, metavar="N", help="GPUs of the node to foresee (default: this machine's)")
    flag("--cores", type=int, metavar="N", help="its processor cores (default: this machine's)")
    flag(
        "--gpu_images_per_s",
        type=float,
        metavar="RATE",
        help="what one of its GPUs trains, from a run's log, where the GPU is not in this machine",
    )
    flag("--seconds", type=float, default=4.0, help="to measure a stage (default 4; all of them: about 40)")
    flag("--json", type=Path, metavar="FILE", help="write the figures there too")
    add_flags(parser)
    parser.usage = "%(prog)s [--config YAML ...] [--gpus N --cores N] [--SETTING VALUE ...]"
    config, options = config_from_args(parser, argv)
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that exists")
    from ffcv_convnext.bench import diagnose

    diagnosis = diagnose(
        config,
        config_names=tuple(map(str, options.config)),
        gpus=options.gpus,
        cores=options.cores,
        gpu_images_per_s=options.gpu_images_per_s,
        seconds=options.seconds,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(diagnosis.format())
    if options.json:
        write_atomically(options.json, (diagnosis.to_json() + "\n").encode())
    return 0


def verify(argv: Sequence[str]) -> int:
    """Check .beton files: manifest, tables, and every image decoded in full."""
    parser = _parser("verify", verify)
    parser.add_argument("data", type=Path, help="folder with train.beton and val.beton (or one of them), or a .beton")
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that decode (default one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there, as an object")
    parser.add_argument(
        "--repair", action="store_true", help="make damaged pages anew from the original files, where those are there"
    )
    parser.epilog = "Exit status: 0 all is good, 1 something is bad, 2 wrong usage."
    options = parser.parse_args(argv)
    if options.json and (options.json.is_dir() or not options.json.resolve().parent.is_dir()):
        raise ValueError(f"--json {options.json}: expected a file in a folder that exists")
    from ffcv_convnext.data import repair_data, verify_data

    verification = verify_data(options.data, options.num_workers)
    print(verification.format())
    if options.repair and not verification.good:
        for page in repair_data(options.data, options.num_workers or 1):
            print(page.format())
        verification = verify_data(options.data, options.num_workers)
        print(f"after the repair: {verification.summary()}")
    if options.json:
        write_atomically(options.json, (verification.to_json() + "\n").encode())
    return 0 if verification.good else EXIT_FAILURE


def data(argv: Sequence[str]) -> int:
    """Look into .beton files: what they hold (data info)."""
    parser = _parser("data", data)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    describing = "classes, sizes, encoding and origin of the images, without decoding them"
    info = actions.add_parser("info", help=describing, description=f"Print {describing}.", allow_abbrev=False)
    info.add_argument("data", type=Path, help="folder with train.beton and val.beton (or one of them), or a .beton")
    info.add_argument("--json", action="store_true", help="print an object instead of a page")
    options = parser.parse_args(argv)
    from ffcv_convnext.data import describe_data

    described = describe_data(options.data)
    print(described.to_json() if options.json else described.format())
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "write": write,
    "train": train,
    "ladder": ladder,
    "report": report,
    "export": export,
    "bench": bench,
    "doctor": doctor,
    "verify": verify,
    "data": data,
}


def _parser(name: str, command: Callable[..., int]) -> argparse.ArgumentParser:
    """A parser that answers to the name it was called by and tells what its function's docstring tells."""
    script = Path(sys.argv[0]).name
    prog = script if script == f"{name}.py" else f"ffcv-convnext {name}"
    return _Parser(prog=prog, description=command.__doc__, allow_abbrev=False)


def run_command(name: str, argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; argv defaults to the process's."""
    return exit_status(lambda: COMMANDS[name](sys.argv[1:] if argv is None else argv))


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    listing = "\n".join(f"  {name:8} {(command.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items())
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: ffcv-convnext COMMAND ...\n\ncommands:\n{listing}\n\nffcv-convnext COMMAND --help tells more.")
        return 0 if arguments else EXIT_USAGE
    if arguments[0] == "--version":
        print(__version__)
        return 0
    if arguments[0] not in COMMANDS:
        return complain(f"error: no command '{arguments[0]}'; there are: {', '.join(COMMANDS)}", EXIT_USAGE)
    return run_command(arguments[0], arguments[1:])


if __name__ == "__main__":
    sys.exit(main())
