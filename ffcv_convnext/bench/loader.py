"""`bench loader`: training batches a second, ours beside the loaders people use (peers.py)."""

from __future__ import annotations

import importlib.util
import io
import os
import tarfile
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import numpy as np

from ffcv_convnext.bench.compare import Comparison, compare, patience, use_cores
from ffcv_convnext.bench.synthetic_data import image_folder

REFERENCE = "stock FFCV (area)"

# Name, with the interpolation of its resize -> its function in peers.py, what that reads, the package it needs
PEERS: dict[str, tuple[str, str, str]] = {
    REFERENCE: ("stock_ffcv", "stock", "ffcv"),
    "ours (bicubic)": ("ours", "ours", "ffcv"),
    "ours (bilinear)": ("ours_bilinear", "ours", "ffcv"),
    "ours from stock's file (bicubic)": ("ours_on_stock", "stock", "ffcv"),
    "torchvision (PIL bicubic)": ("torchvision_pil", "folder", "torchvision"),
    "timm (PIL bicubic)": ("timm_loader", "folder", "timm"),
    "DALI CPU (cubic)": ("dali", "folder", "nvidia.dali"),
    "WebDataset (PIL bicubic)": ("webdataset", "shards", "webdataset"),
    "SPDL (FFmpeg bicubic)": ("spdl", "folder", "spdl.io"),
}


def bench_loader(
    *,
    data_path: Path | None,
    photographs: Path | None,
    num_images: int,
    rounds: int,
    cores: int | None,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure on an ImageFolder, or on photographs (of a folder, or those at hand) when data_path is None.

    peers: how names in PEERS begin, whose rows are wanted beside stock FFCV's; None: all whose packages are
    installed, the others are told in the facts. Raises ValueError for one that is unknown or not installed.
    """
    chosen = choose(list(PEERS), peers, REFERENCE)
    missing = [name for name in chosen if not _installed(PEERS[name][2])]
    if REFERENCE in missing or (peers is not None and missing):
        raise ValueError(f"peers = {missing[0]}: {PEERS[missing[0]][2]} is not installed; {_install(missing)}")
    chosen = [name for name in chosen if name not in missing]
    num_workers = use_cores(cores)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        work = Path(temporary)
        folder = image_folder(
            work / "images", num_images, data_path=data_path, photographs=photographs, originals=False
        )
        say(f"converting {folder}")
        sources = {**convert_for_all(folder, work), "folder": folder / "train"}
        if any(PEERS[name][1] == "shards" for name in chosen):
            sources["shards"] = _write_shards(folder / "train", work / "shards", num_workers)
        contestants = [
            (name, f"{__package__}.peers:{function}", {need: str(sources[need]), "num_workers": num_workers})
            for name, (function, need, _) in PEERS.items()
            if name in chosen
        ]
        images = sum(file.is_file() for file in (folder / "train").rglob("*"))
        facts = {
            "images": images,
            "megabytes": round(sources["ours"].stat().st_size / 1e6),
            "torch": version("torch"),
            **({"not installed": " and ".join(missing)} if missing else {}),
        }
        return compare(
            "loader",
            contestants,
            reference=REFERENCE,
            rounds=rounds,
            facts=facts,
            say=say,
            patience_s=patience(images),
        )


def choose(names: Sequence[str], beginnings: Sequence[str] | None, reference: str) -> list[str]:
    """The names that start with one of the words, and the reference; all when words is None."""
    if beginnings is None:
        return list(names)
    for word in beginnings:
        if not any(name.lower().startswith(word.strip().lower()) for name in names):
            raise ValueError(f"peers = {word}: expected how some of these begin: {'; '.join(names)}")
    words = tuple(word.strip().lower() for word in beginnings)
    return [name for name in names if name == reference or name.lower().startswith(words)]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # the package that it should be a part of
        return False


def _install(names: Sequence[str]) -> str:
    extras = sorted({"ffcv" if PEERS[name][2] == "ffcv" else "bench" for name in names})
    return f"pip install -e '.[{','.join(extras)}]'"


def convert_for_all(folder: Path, work: Path) -> dict[str, Path]:
    """Both files of the same images: ours, and one by FFCV's own writer with the same settings."""
    from torchvision.datasets import ImageFolder

    from ffcv_convnext.bench.stock_ffcv import write_stock_beton
    from ffcv_convnext.data.convert import ConversionOptions, convert

    convert(ConversionOptions(data_path=folder, out_dir=work, split="train"))
    dataset = ImageFolder(str(folder / "train"))
    stock = work / "stock.beton"
    indices = list(range(len(dataset)))
    num_workers = len(os.sched_getaffinity(0))
    write_stock_beton(stock, dataset, indices, max_resolution=500, jpeg_quality=90, num_workers=num_workers)
    return {"ours": work / "train.beton", "stock": stock}


def _write_shards(folder: Path, out: Path, num_workers: int) -> Path:
    """The images in random order, in four tar files a worker: n.jpg, and its class's number in n.cls."""
    out.mkdir()
    classes = enumerate(sorted(folder.iterdir()))
    files = [(file, label) for label, each in classes for file in sorted(each.rglob("*")) if file.is_file()]
    order = np.random.default_rng(0).permutation(len(files))
    for shard, part in enumerate(np.array_split(order, min(4 * num_workers, len(files)))):
        with tarfile.open(out / f"{shard:04d}.tar", "w") as tar:
            for index in part:
                file, label = files[index]
                for name, content in ((f"{index:07d}.jpg", file.read_bytes()), (f"{index:07d}.cls", b"%d" % label)):
                    member = tarfile.TarInfo(name)
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return out
