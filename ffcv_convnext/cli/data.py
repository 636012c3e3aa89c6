"""Commands about data: write, verify, data."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from ffcv_convnext.cli.parsing import Parser, check_json, number_or, parser_of, true_or_false
from ffcv_convnext.config import Config, add_flags, config_from_args
from ffcv_convnext.errors import EXIT_FAILURE
from ffcv_convnext.files import write_atomically


def write(argv: Sequence[str]) -> int:
    """Convert an ImageFolder to .beton files and manifests."""
    from ffcv_convnext.config import nearest
    from ffcv_convnext.data.convert import ConversionOptions, convert, ending_like_ctrl_c, join_parts

    script = Path(sys.argv[0]).name
    parser = Parser(
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
        type=number_or("none", None),
        metavar="PIXELS",
        help="longest side of a stored image; larger ones are shrunk; none: all keep their size (500)",
    )
    flag(
        "--jpeg_quality",
        type=number_or("original", "original"),
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
        type=true_or_false,
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
            parser.error(f"unknown option '{word}'{nearest(name, known, prefix='--')}")
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


def _shard(text: str) -> tuple[int, int]:
    try:
        index, number = map(int, text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}': expected I/N, such as 0/8") from None
    return index, number


def verify(argv: Sequence[str]) -> int:
    """Check .beton files: manifest, tables, and every image decoded in full."""
    parser = parser_of("verify", verify)
    parser.add_argument("data", type=Path, help="folder with train.beton and val.beton (or one of them), or a .beton")
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that decode (default one a core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all that was found there, as an object")
    parser.add_argument(
        "--repair", action="store_true", help="make damaged pages anew from the original files, where those are there"
    )
    parser.epilog = "Exit status: 0 all is good, 1 something is bad, 2 wrong usage."
    options = parser.parse_args(argv)
    check_json(options.json)
    from ffcv_convnext.data.check import repair_data, verify_data

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
    """Look into .beton files: what they hold (data info), what a run makes of them (data preview)."""
    parser = parser_of("data", data)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    describing = "classes, sizes, encoding and origin of the images, without decoding them"
    info = actions.add_parser("info", help=describing, description=f"Print {describing}.", allow_abbrev=False)
    info.add_argument("data", type=Path, help="folder with train.beton and val.beton (or one of them), or a .beton")
    info.add_argument("--json", action="store_true", help="print an object instead of a page")
    seeing = "training images as the network sees them at any step of a run"
    preview = actions.add_parser("preview", help=seeing, description=f"Draw {seeing}.", allow_abbrev=False)
    flag = preview.add_argument
    flag("--out", type=Path, required=True, metavar="FILE", help="picture to write: .png or .jpg")
    flag("--epoch", type=int, default=0, metavar="N", help="epoch of the run, from 0 (default 0)")
    flag("--step", type=int, default=0, metavar="N", help="optimiser step in the epoch, from 0 (default 0)")
    flag("--num", type=int, metavar="N", help="images, from the first of the step's global batch on (default 18)")
    flag(
        "--raw",
        type=true_or_false,
        default=False,
        metavar="BOOL",
        help="each beside its crop before the augmentation (default false)",
    )
    add_flags(preview)
    preview.usage = (
        "%(prog)s [--config YAML ...] --out FILE [--epoch N --step N --num N --raw BOOL] [--SETTING VALUE ...]"
    )
    if argv[:1] == ["preview"]:
        return _preview(*config_from_args(preview, argv[1:]))
    options = parser.parse_args(argv)
    from ffcv_convnext.data.check import describe_data

    described = describe_data(options.data)
    print(described.to_json() if options.json else described.format())
    return 0


def _preview(config: Config, options: argparse.Namespace) -> int:
    from ffcv_convnext.preview import preview

    line = preview(
        config,
        options.out,
        config_names=tuple(map(str, options.config)),
        epoch=options.epoch,
        step=options.step,
        num=options.num,
        raw=options.raw,
    )
    print(line)
    return 0
