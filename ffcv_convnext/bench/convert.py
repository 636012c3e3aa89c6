"""`bench convert`: images a second from an ImageFolder into a .beton, ours beside FFCV's own DatasetWriter.

Same folder, longest side, quality and number of worker processes; a round is one conversion, from the call to the
finished file, in a process whose imports are done. The folder lies in the page cache. Ours starts its workers anew,
writes a manifest and waits until the file is on the disk; stock forks its workers and leaves the file to the kernel.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from ffcv_convnext.bench.compare import Comparison, Contestant, compare, imports_done, patience, use_cores
from ffcv_convnext.bench.loader import choose
from ffcv_convnext.bench.synthetic_data import image_folder

REFERENCE = "stock FFCV"
QUALITIES: dict[str, int | Literal["original"]] = {REFERENCE: 90, "ours": 90, "ours (original JPEGs)": "original"}
MAX_RESOLUTION = 500


def bench_convert(
    *,
    data_path: Path | None,
    photographs: Path | None,
    num_images: int,
    rounds: int,
    cores: int | None,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure on an ImageFolder, or on photographs with sizes as ImageNet's originals have when data_path is None.

    peers: how names in QUALITIES begin, whose rows are wanted beside stock FFCV's (None: all).
    """
    chosen = choose(list(QUALITIES), peers, REFERENCE)
    num_workers = use_cores(cores)
    with tempfile.TemporaryDirectory(prefix="bench-convert-") as temporary:
        work = Path(temporary)
        folder = image_folder(work / "images", num_images, data_path=data_path, photographs=photographs, originals=True)
        files = [file for file in (folder / "train").rglob("*") if file.is_file()]
        outputs = {name: work / f"out{number}" / "train.beton" for number, name in enumerate(chosen)}
        contestants = []
        for name, beton in outputs.items():
            beton.parent.mkdir()
            arguments = {"folder": str(folder), "beton": str(beton), "num_workers": num_workers}
            if name == REFERENCE:
                contestants.append((name, f"{__name__}:stock_ffcv", arguments))
            else:
                contestants.append((name, f"{__name__}:ours", {**arguments, "jpeg_quality": QUALITIES[name]}))
        facts = {
            "images": len(files),
            "megabytes": round(sum(file.stat().st_size for file in files) / 1e6),
            "longest side": MAX_RESOLUTION,
            "quality": QUALITIES[REFERENCE],
            "torch": version("torch"),
        }
        comparison = compare(
            "converter",
            contestants,
            reference=REFERENCE,
            rounds=rounds,
            facts=facts,
            say=say,
            result="file",
            patience_s=patience(len(files)),
        )
        sizes = {row.name: outputs[row.name].stat().st_size / 1e6 for row in comparison.rows if not row.error}
        comparison.columns["file MB"] = sizes
        return comparison


def ours(folder: str, beton: str, num_workers: int, jpeg_quality: int | Literal["original"]) -> Contestant:
    from ffcv_convnext.bench.stock_ffcv import write_stock_beton  # noqa: F401  brings ffcv, as convert
    from ffcv_convnext.data.convert import ConversionOptions, convert

    imports_done()
    options = ConversionOptions(
        data_path=Path(folder),
        out_dir=Path(beton).parent,
        split="train",
        max_resolution=MAX_RESOLUTION,
        jpeg_quality=jpeg_quality,
        num_workers=num_workers,
        overwrite=True,
    )
    return lambda: sum(manifest.num_samples for manifest in convert(options)), None


def stock_ffcv(folder: str, beton: str, num_workers: int) -> Contestant:
    from torchvision.datasets import ImageFolder

    from ffcv_convnext.bench.stock_ffcv import write_stock_beton

    imports_done()

    def work() -> int:
        dataset = ImageFolder(str(Path(folder) / "train"))
        indices = list(range(len(dataset)))
        write_stock_beton(
            Path(beton),
            dataset,
            indices,
            max_resolution=MAX_RESOLUTION,
            jpeg_quality=int(QUALITIES[REFERENCE]),
            num_workers=num_workers,
        )
        return len(dataset)

    return work, None
