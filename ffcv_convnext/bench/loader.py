"""`bench loader`: training batches per second, ours beside other loaders (contestants/loaders.py)."""

from __future__ import annotations

import importlib.util
import io
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from ffcv_convnext.bench.compare import Comparison, Entry, compare, timeout_for, use_cores
from ffcv_convnext.bench.contestants.loaders import BATCH
from ffcv_convnext.bench.options import FolderOptions

REFERENCE = "stock FFCV (area)"
CONTESTANTS = f"{__package__}.contestants.loaders"


class Peer(NamedTuple):
    """A loader to measure."""

    function: str  # in contestants/loaders.py
    source: Literal["ours", "stock", "folder", "shards"]  # the files it reads: our .beton, stock FFCV's, JPEGs, tar
    package: str  # it needs this package
    options: Mapping[str, Any] = {}


PEERS = {  # row, with the interpolation of its resize
    REFERENCE: Peer("stock_ffcv", "stock", "ffcv"),
    "ours (bicubic)": Peer("ours", "ours", "ffcv", {"interpolation": "bicubic"}),
    "ours, all pages checked (bicubic)": Peer(
        "ours", "ours", "ffcv", {"interpolation": "bicubic", "check_pages": True}
    ),
    "ours (bilinear)": Peer("ours", "ours", "ffcv", {"interpolation": "bilinear"}),
    "ours from stock's file (bicubic)": Peer("ours", "stock", "ffcv", {"interpolation": "bicubic"}),
    "torchvision (PIL bicubic)": Peer("torchvision_pil", "folder", "torchvision"),
    "timm (PIL bicubic)": Peer("timm_loader", "folder", "timm"),
    "DALI CPU (cubic)": Peer("dali", "folder", "nvidia.dali"),
    "WebDataset (PIL bicubic)": Peer("webdataset", "shards", "webdataset"),
    "SPDL (FFmpeg bicubic)": Peer("spdl", "folder", "spdl.io"),
}


def bench_loader(options: FolderOptions) -> Comparison:
    """Measure loaders on one folder of images.

    Rows whose package is missing are left out and named in the facts. Raises ValueError if `peers` names one of them.
    """
    options.check_num_images(BATCH)
    chosen = options.choose(list(PEERS), REFERENCE)
    missing = [name for name in chosen if not _installed(PEERS[name].package)]
    if REFERENCE in missing or (options.peers is not None and missing):
        raise ValueError(f"peers = {missing[0]}: {PEERS[missing[0]].package} is not installed; {_install(missing)}")
    chosen = [name for name in chosen if name not in missing]
    num_workers = use_cores(options.cores)
    with tempfile.TemporaryDirectory(prefix="bench-loader-") as temporary:
        work = Path(temporary)
        folder = options.image_folder(work)
        options.progress(f"converting {folder}")
        inputs = {**convert_with_both(folder, work, num_workers), "folder": folder / "train"}
        if any(PEERS[name].source == "shards" for name in chosen):
            inputs["shards"] = _write_shards(folder / "train", work / "shards", num_workers)
        contestants: list[Entry] = []
        for name in chosen:
            function, source, _, more = PEERS[name]
            kind = source if source in ("folder", "shards") else "beton"
            arguments = {kind: str(inputs[source]), "num_workers": num_workers, **more}
            contestants.append((name, f"{CONTESTANTS}:{function}", arguments))
        facts = size_facts(folder, inputs["ours"]) | {"torch": version("torch")}
        if missing:
            facts["not installed"] = " and ".join(missing)
        return compare(
            "loader", contestants, options, reference=REFERENCE, facts=facts, timeout_s=timeout_for(facts["images"])
        )


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # its parent package is missing
        return False


def _install(names: Sequence[str]) -> str:
    extras = sorted({"ffcv" if PEERS[name].package == "ffcv" else "bench" for name in names})
    return f"pip install -e '.[{','.join(extras)}]'"


def convert_with_both(folder: Path, work: Path, num_workers: int) -> dict[str, Path]:
    """Convert the images with our writer ("ours") and with FFCV's own ("stock"), with the same settings."""
    from torchvision.datasets import ImageFolder

    from ffcv_convnext.bench.stock_ffcv import write_stock_beton
    from ffcv_convnext.data.convert import ConversionOptions, convert

    convert(ConversionOptions(data_path=folder, out_dir=work, split="train"))
    dataset = ImageFolder(str(folder / "train"))
    stock = work / "stock.beton"
    indices = list(range(len(dataset)))
    write_stock_beton(stock, dataset, indices, max_resolution=500, jpeg_quality=90, num_workers=num_workers)
    return {"ours": work / "train.beton", "stock": stock}


def size_facts(folder: Path, beton: Path) -> dict[str, Any]:
    """Return the number of images in the folder, and the size of the .beton made of them."""
    images = sum(file.is_file() for file in (folder / "train").rglob("*"))
    return {"images": images, "megabytes": round(beton.stat().st_size / 1e6)}


def _write_shards(folder: Path, out: Path, num_workers: int) -> Path:
    """Write the images in random order to four tar files per worker: n.jpg, and its class number in n.cls."""
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
