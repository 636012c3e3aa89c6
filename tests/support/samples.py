"""Lists of samples, and samples with copies as one number each, which tests compare and sort."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import EncodedImage, Manifest, tables_digest
from ffcv_convnext.data.convert.encode import Encoding
from ffcv_convnext.data.load.sampler import Samples

COPY = 1 << 32  # copy c of sample s is packed as s + c * COPY


def lists(*indices: Iterable[int]) -> list[Samples]:
    """Copy 0 of some samples, a batch for each argument."""
    return [Samples.of(np.array(list(each), np.int64)) for each in indices]


def pack(samples: Samples) -> NDArray[np.int64]:
    return samples.indices + samples.copies * COPY


def pack_all(batches: Iterable[Samples]) -> NDArray[np.int64]:
    return np.concatenate([pack(samples) for samples in batches])


def write_again(beton: Path, manifest: Manifest, samples: list[tuple[EncodedImage, int]], page_size: int) -> None:
    """A .beton of given samples, with a manifest for it."""
    from ffcv_convnext.data.beton.writer import BetonWriter

    beton.parent.mkdir(parents=True, exist_ok=True)
    encoding = Encoding(max_resolution=None, jpeg_quality=90, max_bytes=page_size)
    writer = BetonWriter(beton, encoding, capacity=len(samples))
    writer.write(samples, on_page=lambda _page: None)
    changed = dataclasses.replace(
        manifest,
        num_samples=len(samples),
        page_bytes=page_size,
        page_crc32=tuple(page.crc32 for page in writer.pages),
        num_bytes=beton.stat().st_size,
        sha256=tables_digest(beton),
    )
    changed.write(Manifest.path_for(beton))
