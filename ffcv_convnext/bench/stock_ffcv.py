"""FFCV as it comes: the peer that the benchmarks measure against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ffcv_convnext.data.beton.ffcv_import import importing_ffcv

with importing_ffcv(unchanged=True):
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import RandomResizedCropRGBImageDecoder
    from ffcv.loader import Loader, OrderOption
    from ffcv.transforms import RandomHorizontalFlip, ToTensor, ToTorchImage
    from ffcv.writer import DatasetWriter


def write_stock_beton(
    path: Path, dataset: Any, indices: list[int], *, max_resolution: int, jpeg_quality: int, num_workers: int
) -> None:
    """Write samples (PIL image, label) of an indexable dataset with FFCV's own DatasetWriter."""
    image = RGBImageField(write_mode="jpg", max_resolution=max_resolution, jpeg_quality=jpeg_quality)
    writer = DatasetWriter(str(path), {"image": image, "label": IntField()}, num_workers=num_workers)
    writer.from_indexed_dataset(dataset, indices=indices)


def stock_train_loader(path: Path, *, size: int, batch_size: int, num_workers: int) -> Any:
    """FFCV's own Loader with its random resized crop (INTER_AREA) and flip: iterable of (images, labels)."""
    image = [RandomResizedCropRGBImageDecoder((size, size)), RandomHorizontalFlip(), ToTensor(), ToTorchImage()]
    return Loader(
        str(path),
        batch_size=batch_size,
        num_workers=num_workers,
        order=OrderOption.RANDOM,
        drop_last=True,
        os_cache=True,
        seed=0,
        pipelines={"image": image, "label": [IntDecoder(), ToTensor()]},
    )
