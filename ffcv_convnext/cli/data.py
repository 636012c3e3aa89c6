"""Commands about data: write, verify, data."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ffcv_convnext.cli.parsing import check_json, parser_of, true_or_false
from ffcv_convnext.config import add_flags, config_from_args
from ffcv_convnext.errors import EXIT_FAILURE
from ffcv_convnext.files import write_atomically

DATA_HELP = "folder with train.beton, val.beton or both, or a .beton file"


def write(argv: Sequence[str]) -> int:
    """Convert images to .beton files, which FFCV reads, each with a manifest and a list of original files."""
    from ffcv_convnext.cluster import add_cluster_flags, split_slurm_options
    from ffcv_convnext.config import add_setting_flags, collect_settings, settings_from_args
    from ffcv_convnext.data.convert import ConversionOptions, convert, join_shards
    from ffcv_convnext.signals import sigterm_as_keyboard_interrupt

    parser = parser_of("write", write, script="write_ffcv_dataset.py")
    parser.usage = (
        "%(prog)s --data_path DIR --out_dir DIR [--OPTION VALUE ...]\n"
        "       %(prog)s --join --out_dir DIR [--split SPLIT] [--overwrite]\n"
        "       %(prog)s --job_dir DIR --shards N --data_path DIR --out_dir DIR [--CLUSTER VALUE ...] [...]\n"
        "       %(prog)s --job_dir DIR --status"
    )
    groups: dict[str, type] = {"conversion": ConversionOptions}
    add_setting_flags(parser, groups)
    parser.add_argument("--join", action="store_true", help="join the shards in out_dir to one file for each split")
    parser.add_argument("--shards", type=int, metavar="N", help="with --job_dir: number of parts, one task each")
    parser.add_argument("--max_parallel", type=int, metavar="N", help="with --job_dir: max parts at the same time")
    parser.add_argument("--status", action="store_true", help="with --job_dir: show the state of each part")
    add_cluster_flags(parser)
    settings = collect_settings(groups)
    if "--join" in argv:
        settings = {name: settings[name] for name in ("out_dir", "split", "overwrite")}
    elif "--status" in argv:
        settings = {}
    rest, sbatch = split_slurm_options(argv)
    given, namespace = settings_from_args(parser, rest, settings)
    known = parser.parse_args([])
    others = [
        name for name, value in vars(namespace).items() if name not in settings and value != getattr(known, name, None)
    ]
    if namespace.join and (wrong := sorted({*others, *(f"slurm_{name}" for name in sbatch)} - {"join"})):
        parser.error(f"--join accepts only --out_dir, --split and --overwrite, not --{wrong[0]}")
    if namespace.status and sorted(others) != ["job_dir", "status"]:
        parser.error("--status accepts only --job_dir DIR")
    if namespace.status:
        from ffcv_convnext.cluster import conversion_status

        print(conversion_status(Path(namespace.job_dir)))
        return 0
    values = {name: settings[name].parse(word) for name, word in given.items()}
    say = partial(print, flush=True)
    if (others and not namespace.join) or sbatch:
        return _submit_conversion(values, namespace, sbatch, argv)
    with sigterm_as_keyboard_interrupt():
        if not namespace.join:
            convert(ConversionOptions(**values), say=say)
            return 0
        options = ConversionOptions(data_path=values["out_dir"], **values)  # no images are read
        for split in options.splits:
            join_shards(options.out_dir, split, overwrite=options.overwrite, say=say)
    return 0


def _submit_conversion(
    values: dict[str, Any], namespace: argparse.Namespace, sbatch: dict[str, str], argv: Sequence[str]
) -> int:
    from ffcv_convnext.cluster import cluster_from_args, submit_conversion

    cluster = cluster_from_args(namespace, sbatch)
    if cluster.job_dir is None or namespace.shards is None:
        raise ValueError("a conversion as jobs needs --job_dir DIR, which all nodes see, and --shards N")
    return submit_conversion(
        values,
        namespace.shards,
        cluster,
        command=["write_ffcv_dataset.py", *argv],
        dry_run=namespace.dry_run,
        max_parallel=namespace.max_parallel,
        say=partial(print, flush=True),
    )


def verify(argv: Sequence[str]) -> int:
    """Check .beton files: manifest, tables, checksums, and a full decode of each image."""
    parser = parser_of("verify", verify)
    parser.add_argument("data", type=Path, help=DATA_HELP)
    parser.add_argument("--num_workers", type=int, metavar="N", help="threads that decode (default one per core)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the complete result to this file")
    parser.add_argument("--repair", action="store_true", help="rebuild damaged pages from the original image files")
    parser.epilog = "Exit status: 0 all files are good, 1 a file is bad, 2 wrong usage."
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
    """Show the contents of .beton files (data info) or the training images made from them (data preview)."""
    parser = parser_of("data", data)
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    contents = "classes, sizes, encoding and origin of the images, without decoding them"
    info = actions.add_parser("info", help=contents, description=f"Print {contents}.", allow_abbrev=False)
    info.add_argument("data", type=Path, help=DATA_HELP)
    info.add_argument("--json", action="store_true", help="print JSON")
    images = "training images as the network gets them at any step of a run"
    preview = actions.add_parser("preview", help=images, description=f"Draw {images}.", allow_abbrev=False)
    flag = preview.add_argument
    flag("--out", type=Path, required=True, metavar="FILE", help="image file to write: .png or .jpg")
    flag("--epoch", type=int, default=0, metavar="N", help="epoch of the run, from 0 (default 0)")
    flag("--step", type=int, default=0, metavar="N", help="optimiser step in the epoch, from 0 (default 0)")
    flag(
        "--num", type=int, metavar="N", help="number of images, from the start of the step's global batch (default 18)"
    )
    flag(
        "--raw",
        type=true_or_false,
        default=False,
        metavar="BOOL",
        help="show each image beside its crop before augmentation (default false)",
    )
    add_flags(preview)
    preview.usage = (
        "%(prog)s [--config YAML ...] --out FILE [--epoch N --step N --num N --raw BOOL] [--SETTING VALUE ...]"
    )
    if argv[:1] == ["preview"]:
        config, given = config_from_args(preview, argv[1:])
        from ffcv_convnext.preview import preview as draw_preview

        names = tuple(map(str, given.config))
        how = {name: getattr(given, name) for name in ("epoch", "step", "num", "raw")}
        print(draw_preview(config, given.out, config_names=names, **how))
        return 0
    options = parser.parse_args(argv)
    from ffcv_convnext.data.check import describe_data

    described = describe_data(options.data)
    print(described.to_json() if options.json else described.format())
    return 0
