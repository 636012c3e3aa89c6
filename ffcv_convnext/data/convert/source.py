"""An ImageFolder: one folder a split, in it one folder a class.

Classes, files and their order are those of torchvision's ImageFolder, whose import takes seconds and is not
needed to list folders; a test holds the two together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "expected an ImageFolder: data_path/train/<class>/<image> and data_path/val/<class>/<image>"


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A split's images, ordered by class, then by path."""

    source: Path
    classes: tuple[str, ...]  # in index order
    files: list[str]  # relative to source
    labels: list[int]  # indices into classes, one a file


def list_classes(source: Path) -> tuple[str, ...]:
    """The class names under a split's folder, sorted. Raises FileNotFoundError when there are none."""
    if not source.is_dir():
        raise FileNotFoundError(f"{source} does not exist; {LAYOUT}")
    classes = tuple(sorted(entry.name for entry in os.scandir(source) if entry.is_dir()))
    if not classes:
        raise FileNotFoundError(f"{source} holds no class folders; {LAYOUT}")
    return classes


def scan(source: Path, classes: Sequence[str], *, all_classes: bool) -> ImageFolder:
    """List a split's images.

    classes: the full class list, which fixes the labels.
    all_classes: whether each of them must have an image here, as in train.
    Raises FileNotFoundError for missing images, ValueError for a class that `classes` lacks.
    """
    present = list_classes(source)
    if unknown := sorted(set(present) - set(classes)):
        raise ValueError(
            f"{source}: {_named(unknown)} not among the {len(classes)} classes of train; remove or rename it"
        )
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = _images_below(source / name) if name in present else []
        if not found:
            empty.append(name)
        files += [path[len(str(source)) + 1 :] for path in found]
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"{source} holds no images ({', '.join(IMAGE_EXTENSIONS)}); {LAYOUT}")
    if empty and all_classes:
        raise FileNotFoundError(f"{source}: no images in {_named(empty)}; add some or remove the folder")
    for file in files:
        if "\n" in file or "\r" in file:
            raise ValueError(f"{source}: the file name {file!r} holds a line break; rename it")
    return ImageFolder(source=source, classes=tuple(classes), files=files, labels=labels)


def _images_below(folder: Path) -> list[str]:
    return [
        os.path.join(root, name)
        for root, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_EXTENSIONS)
    ]


def _named(classes: list[str]) -> str:
    """'class a' or '7 classes (a, b, c, ...)'."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
