"""An ImageNet-like folder made of photographs that are at hand.

Crops of scikit-image's and scikit-learn's photographs (and of any folder that is named), scaled so that sizes are
spread as ImageNet's are after a limit of 500 pixels: 464 x 396 on average, JPEG quality 90, about 60 KB.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

NUM_CLASSES = 10


def find_photographs(folder: Path | None = None) -> list[Image.Image]:
    """RGB photographs: of `folder`, searched recursively, else those that scikit-image and scikit-learn ship.

    Raises ValueError when there are none.
    """
    if folder is not None:
        found = [
            Image.open(p).convert("RGB")
            for p in sorted(folder.rglob("*"))
            if p.suffix.lower() in (".jpg", ".jpeg", ".png")
        ]
    else:
        found = list(_shipped())
    found = [image for image in found if min(image.size) >= 200]
    if not found:
        raise ValueError(
            "no photographs found; install scikit-image or scikit-learn, or give an ImageFolder: --data_path DIR"
        )
    return found


def _shipped() -> Iterator[Image.Image]:
    try:
        from skimage import data

        for name in ("astronaut", "coffee", "chelsea", "rocket"):
            yield Image.fromarray(getattr(data, name)())
    except (ImportError, OSError):  # not installed, or a picture that its package would have to download
        pass
    try:
        from sklearn.datasets import load_sample_images

        yield from (Image.fromarray(image) for image in load_sample_images().images)
    except ImportError:
        pass


def write_photo_folder(out: Path, num: int, *, photographs: Path | None = None, seed: int = 0) -> Path:
    """Write `num` JPEGs to out/train/<class>/ and a tenth as many to out/val/<class>/, unless they are there."""
    if (out / "complete").exists():
        return out
    sources = find_photographs(photographs)
    random = np.random.default_rng(seed)
    for split, count in (("train", num), ("val", max(num // 10, NUM_CLASSES))):
        for i in range(count):
            folder = out / split / f"class{i % NUM_CLASSES}"
            folder.mkdir(parents=True, exist_ok=True)
            source = sources[int(random.integers(len(sources)))]
            width, height = (
                (500, int(random.integers(330, 460)))
                if random.random() < 0.7
                else (int(random.integers(330, 420)), 500)
            )
            share = random.uniform(0.7, 1.0) * min(source.width / width, source.height / height)
            box_width, box_height = int(width * share), int(height * share)
            left = int(random.integers(0, source.width - box_width + 1))
            top = int(random.integers(0, source.height - box_height + 1))
            crop = source.resize(
                (width, height), Image.Resampling.BICUBIC, (left, top, left + box_width, top + box_height)
            )
            crop.save(folder / f"{i:06d}.jpg", quality=90)
    (out / "complete").touch()
    return out
