"""Check that two versions of the source compute the same bits: files, batches, training steps.

    python scripts/golden.py compare c523ea6     # that commit and this working tree, in turn, on this machine
    python scripts/golden.py record OUT.json     # the digests of this working tree alone

Nothing is stored in the repository: digests depend on the versions of torch, Pillow and libjpeg-turbo, so both
versions of the source are run in the same environment. `compare` prints one line for each check and exits with 1 if
any of them differs. It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
NUM_TRAIN, NUM_VAL = 160, 20
# Every way an image can be stored, and a file that was put together from parts.
CONVERSIONS: dict[str, list[list[str]]] = {
    "default": [["--split", "all"]],
    "small_444": [["--max_resolution", "96", "--jpeg_quality", "75", "--subsampling", "444"]],
    "original": [["--jpeg_quality", "original", "--max_resolution", "none"]],
    "mixed": [["--compress_probability", "0.5", "--seed", "7", "--num_workers", "3"]],
    "raw_in_order": [["--compress_probability", "0", "--max_resolution", "none", "--shuffle_indices", "false"]],
    "joined": [
        *([["--split", "train", "--subset", "40", "--seed", "3", "--shard", f"{i}/2"] for i in range(2)]),
        ["--split", "val", "--subset", "12", "--seed", "3"],
        ["--join", "--split", "train"],
    ],
    "raw_shuffled": [["--compress_probability", "0", "--max_resolution", "600"]],  # of several pages, for quasi_random
}
TRAINING: dict[str, list[str]] = {
    "resnet": ["--resnet_stem", "original", "--opt", "sgd", "--clip_grad", "1", "--repeated_aug", "2"],
    "convnext": [
        *("--resnet_stem", "patch_embed", "--resnet_depthwise", "true", "--resnet_block", "inverted"),
        *("--resnet_conv_first", "true", "--resnet_kernel_size", "7", "--resnet_act_layer", "gelu"),
        *("--resnet_del_act", "true", "--resnet_reorg_norm", "true", "--resnet_norm_layer", "ln"),
        *("--resnet_final_norm", "true", "--resnet_sep_downsample", "true", "--resnet_ls_init_values", "1e-6"),
        *("--resnet_stem_norm", "true", "--resnet_ds_norm", "pre", "--resnet_init", "trunc"),
    ],
}
COMMON = [
    *("--device", "cpu", "--amp", "off", "--batch_size", "8", "--update_freq", "1", "--input_size", "64"),
    *("--resnet_layers", "1-1-2-1", "--resnet_embed_dim", "16", "--drop_path", "0.2", "--epochs", "1"),
    *("--warmup_epochs", "0", "--lr", "2e-3", "--model_ema", "true", "--model_ema_decay", "0.9", "--log_every", "1"),
    *("--recipe_batch", "8", "--num_workers", "2", "--aa", "rand-m9-mstd0.5-inc1"),
]  # 20 optimiser steps


def make_images(root: Path) -> None:
    """Cut an ImageFolder of 4 classes out of two photographs, in the kinds of files that people have."""
    from sklearn.datasets import load_sample_images

    photographs = load_sample_images().images
    draw = np.random.default_rng(0)
    for split, number in (("train", NUM_TRAIN), ("val", NUM_VAL)):
        for index in range(number):
            photograph = photographs[index % 2]
            height, width = int(draw.integers(60, 420)), int(draw.integers(60, 600))
            top = int(draw.integers(photograph.shape[0] - height + 1))
            left = int(draw.integers(photograph.shape[1] - width + 1))
            image = Image.fromarray(photograph[top : top + height, left : left + width])
            folder = root / split / f"class_{index % 4}"
            folder.mkdir(parents=True, exist_ok=True)
            kind = index % 10
            if kind == 7:
                image.save(folder / f"{index:03d}.png")
            elif kind == 8:
                image.convert("L").save(folder / f"{index:03d}.JPEG", quality=90)
            elif kind == 9:
                image.convert("CMYK").save(folder / f"{index:03d}.JPEG", quality=90)
            else:
                image.save(
                    folder / f"{index:03d}.JPEG", quality=70 + 3 * kind, subsampling=kind % 3, progressive=kind == 5
                )


def digest_of(*contents: bytes) -> str:
    """Return a short SHA-256 of some byte strings."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:16]


def digest_of_tensors(value: Any) -> str:
    """Of nested dicts, lists, tensors and numbers, in their order."""
    parts: list[bytes] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            for key, inner in node.items():
                parts.append(str(key).encode())
                walk(inner)
        elif isinstance(node, list | tuple):
            for inner in node:
                walk(inner)
        elif hasattr(node, "numpy"):
            parts.append(np.ascontiguousarray(node.detach().numpy()).tobytes())
        else:
            parts.append(repr(node).encode())

    walk(value)
    return digest_of(*parts)


def run_command(name: str, *words: str) -> None:
    """Run a command of ffcv-convnext; exit if it fails."""
    from ffcv_convnext.cli import run_command

    if status := run_command(name, list(words)):
        raise SystemExit(f"{name} {' '.join(words)}: exit status {status}")


def convert_all(images: Path, work: Path) -> Iterator[tuple[str, str]]:
    """Yield a name and a digest for each converted file."""
    for name, commands in CONVERSIONS.items():
        out = work / name
        for command in commands:
            source = [] if "--join" in command else ["--data_path", str(images)]
            run_command("write", *source, "--out_dir", str(out), *command)
        for split in ("train", "val"):
            beton = out / f"{split}.beton"
            manifest = json.loads(beton.with_suffix(".json").read_text())
            # The version is part of the identity, and a new version may be a new file without a change of its bytes.
            kept = {key: value for key, value in manifest.items() if key not in ("package_version", "identity")}
            yield (
                f"file {name}/{split}",
                digest_of(
                    beton.read_bytes(),
                    beton.with_suffix(".files.txt").read_bytes(),
                    json.dumps(kept, sort_keys=True).encode(),
                ),
            )


def load_all(work: Path) -> Iterator[tuple[str, str]]:
    """Yield a name and a digest for the batches of each loader."""
    import torch

    from ffcv_convnext.config import DataConfig

    try:
        from ffcv_convnext.data.load import EvalLoader, TrainLoader
    except ImportError:  # before 0.2
        from ffcv_convnext.data import EvalLoader, TrainLoader

    def batches_of(loader: Any) -> str:
        parts: list[bytes] = []
        with closing(loader):
            if isinstance(loader, TrainLoader):
                for epoch, first_step in ((0, 0), (1, 2)):
                    for step in loader.steps(epoch, first_step):
                        parts += [part.numpy().tobytes() for batch in step for part in batch]
            else:
                parts += [part.numpy().tobytes() for batch in loader for part in batch]
        return digest_of(*parts)

    cpu = torch.device("cpu")
    choices = product(("os", "process", "ram"), ("random", "quasi_random"), (1, 3), ("bicubic", "bilinear", "random"))
    for cache, order, copies, interpolation in choices:
        config = DataConfig(
            data_path=work / "raw_shuffled", batch_size=6, update_freq=2, input_size=64, num_workers=2,
            data_cache=cache, order=order, shuffle_window_mb=9, repeated_aug=copies, train_interpolation=interpolation,
        )  # fmt: skip
        name = f"batches {cache} {order} copies={copies} {interpolation}"
        yield name, batches_of(TrainLoader(config, cpu, seed=5))
    for name in CONVERSIONS:
        for size, workers in ((96, 1), (224, 3)):
            config = DataConfig(data_path=work / name, batch_size=5, input_size=size, num_workers=workers)
            for rank in range(2):
                loader = TrainLoader(config, cpu, seed=1, rank=rank, world=2)
                yield f"batches {name} {size} px rank {rank}/2", batches_of(loader)
            yield f"batches {name} {size} px val", batches_of(EvalLoader(config, cpu))


def train_all(work: Path) -> Iterator[tuple[str, str]]:
    """Yield a name and a digest for the losses and checkpoints of each run."""
    import torch

    torch.set_num_threads(1)
    for name, flags in TRAINING.items():
        folder = work / f"run_{name}"
        run_command("train", "--data_path", str(work / "default"), "--output_dir", str(folder), *COMMON, *flags)
        losses = [json.loads(line)["loss"] for line in (folder / "steps.jsonl").read_text().splitlines()]
        yield f"losses {name} ({len(losses)} steps)", digest_of(json.dumps(losses).encode())
        for file in ("checkpoint-last.pth", "checkpoint-best.pth", "checkpoint-best-ema.pth"):
            content = torch.load(folder / file, weights_only=True)
            kept = {key: content[key] for key in ("model", "ema", "optimizer", "epoch", "step") if key in content}
            yield f"{file} {name}", digest_of_tensors(kept)


def record(out: Path, images: Path | None = None) -> dict[str, str]:
    """Compute every digest with the package that this process imports, and write them to `out`."""
    import ffcv_convnext

    source = Path(ffcv_convnext.__file__).parent.parent
    if source != Path.cwd():
        raise SystemExit(f"{source} was imported instead of {Path.cwd()}; set PYTHONPATH")
    found: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        if images is None:
            images = work / "images"
            make_images(images)
        parts: list[Callable[[], Iterator[tuple[str, str]]]] = [
            lambda: convert_all(images, work),
            lambda: load_all(work),
            lambda: train_all(work),
        ]
        for part in parts:
            found |= dict(part())
    out.write_text(json.dumps(found, indent=1) + "\n")
    return found


def compare(revision: str, out: Path | None) -> int:
    """Record both versions on the same images, print a line for each check; 1 if any differs."""
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        make_images(work / "images")
        base = work / "base"
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(base), revision], cwd=ROOT, check=True)
        try:
            found = []
            for number, source in enumerate((base, ROOT)):
                digests = work / f"{number}.json"
                command = [sys.executable, str(Path(__file__).resolve()), "record", str(digests)]
                command += ["--images", str(work / "images")]
                environment = {**os.environ, "PYTHONPATH": str(source)}
                log = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
                if log.returncode:
                    sys.stderr.write(log.stdout[-2000:] + log.stderr[-5000:])
                    return 1
                found.append(json.loads(digests.read_text()))
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", str(base)], cwd=ROOT, check=True)
    theirs, ours = found
    lines = []
    for name in theirs | ours:
        before, now = theirs.get(name, "missing"), ours.get(name, "missing")
        lines.append(f"{'same     ' if before == now else 'DIFFERENT'} {before:16} {now:16} {name}")
    different = sum(line.startswith("DIFFERENT") for line in lines)
    lines.append(f"{len(lines)} checks, {different} different from {revision}")
    print("\n".join(lines))
    if out is not None:
        out.write_text("\n".join(lines) + "\n")
    return int(different > 0)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(dest="action", required=True)
    recording = actions.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--images", type=Path)
    comparing = actions.add_parser("compare")
    comparing.add_argument("revision")
    comparing.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.action == "record":
        record(options.out, options.images)
        return 0
    return compare(options.revision, options.out)


if __name__ == "__main__":
    sys.exit(main())
