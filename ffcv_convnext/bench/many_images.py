"""A folder of very many tiny pictures that takes little room: each class has one file, under many names."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

MAX_LINKS = 60_000  # names of one file; ext4 allows 65,000


def write_many_images(folder: Path, num_images: int, num_classes: int = 1000, side: int = 32) -> None:
    """Write an ImageFolder split with `num_images` JPEGs of noise, `side` x `side` pixels, spread over the classes.

    The names are as long as ImageNet's. Raises FileExistsError if `folder` exists, ValueError for fewer images than
    classes.
    """
    if not 1 <= num_classes <= num_images:
        raise ValueError(f"num_images = {num_images}, num_classes = {num_classes}: expected at least one image a class")
    if folder.exists():
        raise FileExistsError(f"{folder} exists; name another folder, or remove it")
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    for label in range(num_classes):
        name = f"n{label:08d}"
        inside = os.path.join(folder, name)
        os.mkdir(inside)
        first = ""
        for number in range(num_images * label // num_classes, num_images * (label + 1) // num_classes):
            path = os.path.join(inside, f"{name}_{number:08d}.JPEG")
            if number % MAX_LINKS == 0 or not first:
                noise = random.integers(256, size=(side, side, 3), dtype=np.uint8)
                Image.fromarray(noise).save(path, quality=90)
                first = path
            else:
                os.link(first, path)
