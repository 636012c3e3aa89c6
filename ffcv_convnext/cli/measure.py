"""Commands that measure: bench, doctor."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffcv_convnext.cli.parsing import check_json, parser_of
from ffcv_convnext.config import SETTINGS, add_flags, config_from_args
from ffcv_convnext.files import write_atomically

BENCHMARKS = {
    "loader": "training batches from images in memory",
    "cold": "training batches from a file that is not in memory",
    "convert": "an ImageFolder converted to a .beton",
    "startup": "from the start of a process to its first batch",
    "augment": "the augmentation of batches, beside timm's for single images",
    "step": "the training step, beside timm's and torchvision's, or every step of the ladder",
}


def bench(argv: Sequence[str]) -> int:
    """Measure loading, conversion, start-up, the augmentation or the training step beside their peers."""
    parser = parser_of("bench", bench)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    for name, what in BENCHMARKS.items():
        kind = kinds.add_parser(name, help=what, description=f"Measure {what}.", allow_abbrev=False)
        flag = kind.add_argument
        flag("--photographs", type=Path, metavar="DIR", help="pictures to make images of (default: some at hand)")
        flag("--rounds", type=int, default=5, help="rounds of each contestant that count (default 5)")
        flag("--peers", help="rows wanted: how their names begin, comma-separated (default: all)")
        flag("--json", type=Path, metavar="FILE", help="write the figures there too")
        if name in ("augment", "step"):
            flag("--seconds", type=float, default=2.0, help="of a round of each contestant (default 2)")
            if name == "step":
                flag(
                    "--ladder",
                    type=Path,
                    nargs="?",
                    const=Path("rn_configs"),
                    metavar="DIR",
                    help="measure every step's file in DIR (rn_configs) instead, with the settings given here",
                )
            add_flags(kind)
            kind.usage = "%(prog)s [--config YAML ...] [--rounds N --seconds S] [--SETTING VALUE ...]"
        else:
            flag("--data_path", type=Path, help="an ImageFolder, of which train/ is used")
            flag("--num_images", type=int, default=1280, help="images of a round, at most (default 1280)")
            flag("--cores", type=int, help="processor cores to use (default all)")
    what = argv[0] if argv else ""
    given: dict[str, Any]
    if what in ("augment", "step"):
        config, options = config_from_args(kinds.choices[what], argv[1:])
        given = {"config": config, "seconds": options.seconds}
        if what == "step":
            flags = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
            given |= {"ladder": options.ladder, "flags": flags}
    else:
        options = parser.parse_args(argv)
        given = {name: getattr(options, name) for name in ("data_path", "num_images", "cores")}
    check_json(options.json)
    from ffcv_convnext import bench as benchmarks

    found = getattr(benchmarks, f"bench_{what}")(
        **given,
        photographs=options.photographs,
        rounds=options.rounds,
        peers=options.peers.split(",") if options.peers else None,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(found.format())
    if options.json:
        options.json.write_text(found.to_json() + "\n")
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Measure what bounds a run: storage, decode, transfer, augmentation and step apart."""
    parser = parser_of("doctor", doctor)
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
    check_json(options.json)
    from ffcv_convnext.doctor import diagnose

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
