"""Commands that measure: bench, doctor."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ffcv_convnext.cli.parsing import check_json, parser_of
from ffcv_convnext.config import SETTINGS, add_flags, config_from_args
from ffcv_convnext.errors import EXIT_FAILURE, complain
from ffcv_convnext.files import write_atomically

FOLDER_BENCHMARKS = {
    "loader": "training batches from images in memory",
    "cold": "training batches from a file that is not in memory",
    "convert": "the conversion of an ImageFolder to a .beton",
    "startup": "the time from process start to the first batch, and quick commands",
}
GPU_HELP = "everything that needs a GPU, in nine minutes: separate stages, figures as JSON and Markdown"
GPU_CODE_HELP = "the code of a training step for a GPU that need not be there: bytes, launches, registers, estimates"
SCALE_HELP = "time and memory of loading, converting, joining, reporting and training by the number of images"
SCALE_STAGES = ("load", "convert", "join", "runs", "ranks")
STEP_BENCHMARKS = {
    "augment": "the augmentation of batches, beside timm's for single images",
    "step": "the training step, beside timm's and torchvision's, or every step of the ladder",
    "progressive": "the training time that progressive resizing saves: every image size of a schedule, in turn",
    "checkpoint": "how long a save holds up training, written by the loop and by the thread",
}


def bench(argv: Sequence[str]) -> int:
    """Measure loading, conversion, start-up, augmentation or the training step beside other libraries; try a GPU."""
    if argv and argv[0] == "gpu":
        return _bench_gpu(argv[1:])
    if argv and argv[0] == "gpu-code":
        return _bench_gpu_code(argv[1:])
    if argv and argv[0] == "scale":
        return _bench_scale(argv[1:])
    parser = parser_of("bench", bench)
    kinds = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    kinds.add_parser("gpu", help=GPU_HELP)
    kinds.add_parser("gpu-code", help=GPU_CODE_HELP)
    kinds.add_parser("scale", help=SCALE_HELP)
    for name, what in (FOLDER_BENCHMARKS | STEP_BENCHMARKS).items():
        kind = kinds.add_parser(name, help=what, description=f"Measure {what}.", allow_abbrev=False)
        flag = kind.add_argument
        flag("--photographs", type=Path, metavar="DIR", help="cut images from these pictures (default: installed ones)")
        flag("--rounds", type=int, default=5, help="measured rounds of each contestant (default 5)")
        flag("--peers", help="rows to measure: beginnings of their names, comma-separated (default: all)")
        flag("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
        if name in STEP_BENCHMARKS:
            flag("--seconds", type=float, default=2.0, help="length of a round of each row (default 2)")
            if name == "step":
                flag(
                    "--ladder",
                    type=Path,
                    nargs="?",
                    const=Path("rn_configs"),
                    metavar="DIR",
                    help="measure each step's file in DIR (rn_configs) instead of the peers, with the given settings",
                )
            add_flags(kind)
            kind.usage = "%(prog)s [--config YAML ...] [--rounds N --seconds S] [--SETTING VALUE ...]"
        else:
            flag("--data_path", type=Path, help="an ImageFolder; its train/ is used")
            flag("--num_images", type=int, default=1280, help="maximum number of images per round (default 1280)")
            flag("--cores", type=int, help="processor cores to use (default: all)")
    what = argv[0] if argv else ""
    is_step = what in STEP_BENCHMARKS
    if is_step:
        config, options = config_from_args(kinds.choices[what], argv[1:])
    else:
        options = parser.parse_args(argv)
    check_json(options.json)
    from ffcv_convnext.bench import FolderOptions, StepOptions, bench_folder, bench_training

    shared: dict[str, Any] = {
        "photographs": options.photographs,
        "rounds": options.rounds,
        "peers": options.peers.split(",") if options.peers else None,
        "progress": _progress,
    }
    if is_step:
        ladder = getattr(options, "ladder", None)
        flags = {name: getattr(options, name) for name in SETTINGS if hasattr(options, name)}
        training = StepOptions(**shared, config=config, seconds=options.seconds, ladder=ladder, flags=flags)
        found = bench_training(what, training)
    else:
        shared |= {name: getattr(options, name) for name in ("data_path", "num_images", "cores")}
        found = bench_folder(what, FolderOptions(**shared))
    print(found.format())
    if options.json:
        write_atomically(options.json, (found.to_json() + "\n").encode())
    return 0


def _bench_scale(argv: Sequence[str]) -> int:
    parser = parser_of("bench scale", _bench_scale)
    parser.description = f"Measure {SCALE_HELP}."
    flag = parser.add_argument
    flag(
        "--counts",
        metavar="N,N",
        help="numbers of images (default 10000,100000,1281167, and with the stage load alone 14197122)",
    )
    flag(
        "--stages",
        default="load",
        metavar="A,B",
        help="load: generated files of black images, up to 14 million; convert: tiny pictures: plan, conversion with "
        "a kill and a resume, verify, data info; join: of 4 parts; runs: report and ladder status of 45 runs; ranks: "
        "training by --processes processes, then by half of them (default load)",
    )
    flag("--processes", type=int, default=8, metavar="N", help="also this many at the same time (default 8; 1: not)")
    flag(
        "--work",
        type=Path,
        metavar="DIR",
        help="folder for the files: 50 bytes an image, to convert 4 kB (default: a temporary one)",
    )
    flag("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    options = parser.parse_args(argv)
    stages = options.stages.split(",")
    if unknown := [stage for stage in stages if stage not in SCALE_STAGES]:
        raise ValueError(f"stages = {unknown[0]}: expected some of {', '.join(SCALE_STAGES)}")
    largest = ",14197122" if stages == ["load"] else ""  # its images are not made one by one
    try:
        counts = [int(word) for word in (options.counts or f"10000,100000,1281167{largest}").split(",")]
    except ValueError:
        raise ValueError(f"counts = {options.counts}: expected whole numbers such as 10000,1281167") from None
    if min(counts) < 8 * 64:
        raise ValueError(f"counts = {min(counts)}: expected at least 512, a batch of 64 for each of 8 ranks")
    if options.processes < 1:
        raise ValueError(f"processes = {options.processes}: expected at least 1")
    if options.work is not None and not options.work.is_dir():
        raise ValueError(f"work = {options.work} is not a folder; create it first")
    check_json(options.json)
    from ffcv_convnext.bench.scale import bench_scale

    found = bench_scale(counts, _progress, options.work, options.processes, stages)
    print(found.format())
    if options.json:
        write_atomically(options.json, (found.to_json() + "\n").encode())
    return 0


def _bench_gpu(argv: Sequence[str]) -> int:
    parser = parser_of("bench gpu", _bench_gpu)
    parser.description = f"Try {GPU_HELP}."
    flag = parser.add_argument
    flag("--out", type=Path, default=Path("runs/gpu"), metavar="DIR", help="folder of gpu.json, gpu.md and the logs")
    flag("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: try all of it with small shapes")
    flag("--stages", metavar="A,B", help="only these stages (default: all)")
    flag("--minutes", type=float, default=9.0, help="no stage starts later (default 9)")
    flag("--wheels", type=Path, metavar="DIR", help="wheels of packages that the machine lacks, e.g. ffcv's")
    words = "on a GPU, write which kernels are faster into the table of --kernels auto"
    flag("--write_choice", action="store_true", help=words)
    options = parser.parse_args(argv)
    from ffcv_convnext.bench.gpu import (
        STAGES,
        GpuOptions,
        bench_gpu,
        choice_row,
        describe_row,
        merge_row,
        to_markdown,
    )

    found = bench_gpu(
        GpuOptions(
            out=options.out,
            device=options.device,
            stages=options.stages.split(",") if options.stages else tuple(STAGES),
            minutes=options.minutes,
            wheels=options.wheels,
            progress=_progress,
        )
    )
    text = to_markdown(found)
    write_atomically(options.out / "gpu.md", (text + "\n").encode())
    print(text)
    if options.device == "cuda":
        device, row = choice_row(found, time.strftime("%Y-%m-%d"))
        print(f"\n{describe_row(device, row)}")
        if options.write_choice:
            merge_row(device, row)
    failed = [name for name, stage in found["stages"].items() if stage["status"] in ("failed", "timeout")]
    if failed:
        return complain(f"{', '.join(failed)} failed; see the logs in {options.out}", EXIT_FAILURE)
    return 0


def _bench_gpu_code(argv: Sequence[str]) -> int:
    parser = parser_of("bench gpu-code", _bench_gpu_code)
    parser.description = (
        f"Generate {GPU_CODE_HELP}. Needs torch's CUDA version, Triton and a C compiler, no GPU and no driver. "
        "All times are estimates. A step takes a few minutes."
    )
    flag = parser.add_argument
    flag("--config", type=Path, metavar="YAML", help="the settings of the step")
    flag(
        "--ladder",
        type=Path,
        nargs="?",
        const=Path("rn_configs"),
        metavar="DIR",
        help="one row for each step's file in DIR (rn_configs) as soon as it is known; minutes each",
    )
    flag("--arch", default="sm_90", choices=["sm_80", "sm_90"], help="sm_80: A100, sm_90: H100, H200 (default sm_90)")
    flag("--kernels", default="both", choices=["torch", "triton", "both"], help="default both")
    flag("--batch_size", type=int, default=128, help="images (default 128)")
    flag("--size", type=int, default=224, help="pixels of an image's side (default 224)")
    flag("--counts_only", action="store_true", help="do not compile the kernels: no registers and spills, much faster")
    flag("--phases", metavar="A,B", help="only these of augmentation, forward, backward, optimiser + EMA")
    flag("--debug", action="store_true", help="show the traceback if code generation fails")
    flag("--json", type=Path, metavar="FILE", help="write all figures to FILE too, with every launch and kernel")
    options = parser.parse_args(argv)
    if (options.config is None) == (options.ladder is None):
        parser.error("expected either --config or --ladder")
    check_json(options.json)
    from ffcv_convnext.bench.gpu_code import (
        LADDER_HEADER,
        NOTE,
        PHASES,
        GpuCodeOptions,
        bench_gpu_code,
        ladder_rows,
        ladder_steps,
    )

    phases = tuple(each.strip() for each in options.phases.split(",")) if options.phases else PHASES
    chosen = GpuCodeOptions(
        arch=options.arch,
        compile=not options.counts_only,
        phases=phases,
        debug=options.debug,
        progress=_progress,
    )
    kernels = ("torch", "triton") if options.kernels == "both" else (options.kernels,)
    overrides = {"batch_size": options.batch_size, "input_size": options.size}
    if options.config is not None:
        found = bench_gpu_code(options.config, chosen, kernels=kernels, overrides=overrides)
        print(found.format())
        text = found.to_json()
    else:
        steps = ladder_steps(options.ladder)
        print(f"{NOTE}\n\n| {' | '.join(LADDER_HEADER)} |\n|{'---|' * len(LADDER_HEADER)}", flush=True)
        texts = []
        for file in steps:
            found = bench_gpu_code(file, chosen, kernels=kernels, overrides=overrides)
            for row in ladder_rows(found):
                print(f"| {' | '.join(row)} |", flush=True)
            texts.append(found.to_json())
        text = f"[{', '.join(texts)}]"
    if options.json:
        write_atomically(options.json, (text + "\n").encode())
    return 0


def doctor(argv: Sequence[str]) -> int:
    """Find the bottleneck of a run: measure storage, decode, transfer, augmentation and step separately."""
    parser = parser_of("doctor", doctor)
    flag = parser.add_argument
    flag("--gpus", type=int, metavar="N", help="GPUs of the node to predict (default: this machine's)")
    flag("--cores", type=int, metavar="N", help="processor cores of the node (default: this machine's)")
    flag(
        "--gpu_images_per_s",
        type=float,
        metavar="RATE",
        help="training rate of one of its GPUs, from a run's log, if this machine does not have the GPU",
    )
    flag("--seconds", type=float, default=4.0, help="time to measure a stage (default 4; about 40 in total)")
    flag("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    add_flags(parser)
    parser.usage = "%(prog)s [--config YAML ...] [--gpus N --cores N] [--SETTING VALUE ...]"
    config, options = config_from_args(parser, argv)
    check_json(options.json)
    from ffcv_convnext.doctor import diagnose, format_page

    diagnosis = diagnose(
        config,
        config_names=tuple(map(str, options.config)),
        gpus=options.gpus,
        cores=options.cores,
        gpu_images_per_s=options.gpu_images_per_s,
        seconds=options.seconds,
        progress=_progress,
    )
    print(format_page(diagnosis))
    if options.json:
        write_atomically(options.json, (diagnosis.to_json() + "\n").encode())
    return 0


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
