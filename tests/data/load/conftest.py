"""Files of several pages, to load from."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ffcv.reader")

from ffcv_convnext.data.beton import EncodedImage, Manifest, tables_digest
from ffcv_convnext.data.beton.writer import BetonWriter
from ffcv_convnext.data.convert.encode import Encoding

MB = 1 << 20


def write_again(beton: Path, manifest: Manifest, samples: list[tuple[EncodedImage, int]], page_size: int) -> None:
    """A .beton of given samples, with a manifest for it."""
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


@pytest.fixture(scope="module")
def paged(beton_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """300 pictures of noise in six pages of 2 MiB, in a random order and in class order; the label is their number
    divided by 75."""
    random = np.random.default_rng(0)
    samples = []
    folder = tmp_path_factory.mktemp("paged")
    for number in range(300):
        image = Image.fromarray(random.integers(0, 256, (100, 150, 3), dtype=np.uint8))
        image.save(folder / "one.jpg", quality=95, subsampling=0)
        samples.append((EncodedImage(150, 100, (folder / "one.jpg").read_bytes(), "jpg"), number // 75))
    manifest = Manifest.read(beton_dir / "train.json")
    write_again(folder / "in_order/train.beton", manifest, samples, 2 * MB)
    write_again(folder / "shuffled/train.beton", manifest, [samples[i] for i in random.permutation(300)], 2 * MB)
    return {"in order": folder / "in_order", "shuffled": folder / "shuffled"}
