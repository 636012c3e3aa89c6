"""`bench convert`: images per second from an ImageFolder into a .beton, ours beside FFCV's own DatasetWriter.

All use the same folder, longest side, quality and number of worker processes; a round is one conversion, from the call
to the finished file, in a process whose imports are done. The folder is in the page cache. Ours starts new workers,
writes a manifest and waits until the file is on the disk; stock forks its workers and does not wait for the disk. One
row reads the same images from an archive in the form of ILSVRC2012_img_train.tar, which includes its index. The facts
also tell how long Pillow and our code take to shrink the luma plane of a photograph.
"""

from __future__ import annotations

import tarfile
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ffcv_convnext.bench.compare import Comparison, compare, timeout_for, use_cores
from ffcv_convnext.bench.options import FolderOptions

REFERENCE = "stock FFCV"
FROM_TAR = "ours (from a tar)"
QUALITIES: dict[str, int | Literal["original"]] = {
    REFERENCE: 90,
    "ours": 90,
    FROM_TAR: 90,
    "ours (original JPEGs)": "original",
}
MAX_RESOLUTION = 500


def bench_convert(options: FolderOptions) -> Comparison:
    """Measure conversion; synthetic images have the sizes of ImageNet's originals."""
    chosen = options.choose(list(QUALITIES), REFERENCE)
    num_workers = use_cores(options.cores)
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
        work = Path(temporary)
        folder = options.image_folder(work, originals=True)
        files = [file for file in (folder / "train").rglob("*") if file.is_file()]
        archives = work / "tars"
        if FROM_TAR in chosen:
            pack_like_imagenet(folder / "train", archives)
        outputs = {name: work / f"out{number}" / "train.beton" for number, name in enumerate(chosen)}
        contestants = []
        for name, beton in outputs.items():
            beton.parent.mkdir()
            arguments = {
                "folder": str(archives if name == FROM_TAR else folder),
                "beton": str(beton),
                "max_resolution": MAX_RESOLUTION,
                "jpeg_quality": QUALITIES[name],
                "num_workers": num_workers,
            }
            function = "stock_ffcv" if name == REFERENCE else "ours"
            contestants.append((name, f"{__package__}.contestants.convert:{function}", arguments))
        facts = {
            "images": len(files),
            "megabytes": round(sum(file.stat().st_size for file in files) / 1e6),
            "longest side": MAX_RESOLUTION,
            "quality": QUALITIES[REFERENCE],
            "torch": version("torch"),
            **time_resize(),
        }
        comparison = compare(
            "converter",
            contestants,
            options,
            reference=REFERENCE,
            facts=facts,
            result="file",
            timeout_s=timeout_for(len(files)),
        )
        sizes = {row.name: outputs[row.name].stat().st_size / 1e6 for row in comparison.rows if not row.error}
        comparison.columns["file MB"] = sizes
        return comparison


def pack_like_imagenet(train: Path, out: Path) -> None:
    """Write out/ILSVRC2012_img_train.tar from a folder of class folders: a tar of one tar for each class."""
    out.mkdir()
    with tarfile.open(out / "ILSVRC2012_img_train.tar", "w", format=tarfile.USTAR_FORMAT) as whole:
        for folder in sorted(path for path in train.iterdir() if path.is_dir()):
            inner = out / f"{folder.name}.tar"
            with tarfile.open(inner, "w", format=tarfile.USTAR_FORMAT, dereference=True) as archive:
                for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                    archive.add(file, str(file.relative_to(folder)))
            whole.add(inner, inner.name)
            inner.unlink()


def time_resize(num_rounds: int = 20) -> dict[str, float]:
    """Return the milliseconds of a plane's resize from 1600 x 1280 to 500 x 400 pixels, the best of some rounds.

    Pillow's and ours take turns; both compute the same bytes.
    """
    import numpy as np
    from PIL import Image

    from ffcv_convnext.data.codec.resample import resample

    plane = np.random.default_rng(0).integers(0, 256, (1280, 1600), dtype=np.uint8)
    image, size = Image.fromarray(plane), (500, 400)
    ways: dict[str, Callable[[], object]] = {
        "Pillow's resize ms": lambda: np.asarray(image.resize(size, Image.Resampling.BICUBIC)),
        "our resize ms": lambda: resample(plane, size),
    }
    best = dict.fromkeys(ways, float("inf"))
    for _ in range(num_rounds):
        for name, work in ways.items():
            started = time.perf_counter()
            work()
            best[name] = min(best[name], time.perf_counter() - started)
    return {name: round(1e3 * seconds, 2) for name, seconds in best.items()}
