"""Files of several pages, to load from."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("ffcv.reader")

from support.samples import write_again

from ffcv_convnext.data.beton import EncodedImage, Manifest

MB = 1 << 20


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
