"""The contestants of `bench convert`: a round is one conversion of folder/train to the .beton."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from ffcv_convnext.bench.compare import Contestant, imports_done


def ours(
    folder: str, beton: str, max_resolution: int, jpeg_quality: int | Literal["original"], num_workers: int
) -> Contestant:
    """Convert with our writer."""
    from ffcv_convnext.bench.stock_ffcv import write_stock_beton  # noqa: F401  imports ffcv, as convert() does later
    from ffcv_convnext.data.convert import ConversionOptions, convert

    imports_done()
    options = ConversionOptions(
        data_path=Path(folder),
        out_dir=Path(beton).parent,
        split="train",
        max_resolution=max_resolution,
        jpeg_quality=jpeg_quality,
        num_workers=num_workers,
        overwrite=True,
    )
    return lambda: sum(manifest.num_samples for manifest in convert(options)), None


def stock_ffcv(folder: str, beton: str, max_resolution: int, jpeg_quality: int, num_workers: int) -> Contestant:
    """Convert with FFCV's own DatasetWriter."""
    from torchvision.datasets import ImageFolder

    from ffcv_convnext.bench.stock_ffcv import write_stock_beton

    imports_done()

    def work() -> int:
        dataset = ImageFolder(str(Path(folder) / "train"))
        write_stock_beton(
            Path(beton),
            dataset,
            list(range(len(dataset))),
            max_resolution=max_resolution,
            jpeg_quality=jpeg_quality,
            num_workers=num_workers,
        )
        return len(dataset)

    return work, None
