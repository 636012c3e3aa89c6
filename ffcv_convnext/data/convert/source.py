"""Sources of images: what a conversion reads. A folder of class folders is one; others implement `Source`."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
LAYOUT = "expected an ImageFolder: data_path/train/<class>/<image> and data_path/val/<class>/<image>"


class Source(Protocol):
    """Labelled images of one split in a fixed order, read by index.

    Worker processes get small selections of a source, so a source must be picklable.
    """

    @property
    def location(self) -> Path:
        """Where the images are; stored in the manifest. Messages show `location / name(index)`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names; a label is an index into them."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the content of an image file. Raises OSError."""

    def label(self, index: int) -> int:
        """Return the label of an image."""

    def name(self, index: int) -> str:
        """Return the name of an image: unique in this source, without line breaks."""

    def is_regular(self, index: int) -> bool:
        """Return False if `read` may block forever, e.g. for a named pipe."""

    def select(self, indices: Sequence[int]) -> Source:
        """Return a source of these images, in this order."""


@dataclass(frozen=True, slots=True)
class ImageFolder:
    """A split's folder: one folder per class, images ordered by class, then by path.

    Classes, files and order are those of torchvision's ImageFolder, whose import takes seconds; a test compares both.
    """

    location: Path
    classes: tuple[str, ...]
    files: list[str]  # relative to `location`
    labels: list[int]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        with open(os.path.join(self.location, self.files[index]), "rb") as file:
            return file.read()

    def label(self, index: int) -> int:  # noqa: D102  see Source
        return self.labels[index]

    def name(self, index: int) -> str:  # noqa: D102  see Source
        return self.files[index]

    def is_regular(self, index: int) -> bool:  # noqa: D102  see Source
        try:
            return stat.S_ISREG(os.stat(os.path.join(self.location, self.files[index])).st_mode)
        except OSError:
            return False

    def select(self, indices: Sequence[int]) -> ImageFolder:  # noqa: D102  see Source
        files, labels = [self.files[i] for i in indices], [self.labels[i] for i in indices]
        return ImageFolder(self.location, self.classes, files, labels)


def list_classes(folder: Path) -> tuple[str, ...]:
    """Return the sorted class names of a split's folder. Raises FileNotFoundError if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; {LAYOUT}")
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not classes:
        raise FileNotFoundError(f"{folder} has no class folders; {LAYOUT}")
    return classes


def scan(folder: Path, classes: Sequence[str], *, all_classes: bool) -> ImageFolder:
    """List the images of a split's folder.

    classes: the full class list, which determines the labels.
    all_classes: whether each class must have an image here, as in train.
    Raises FileNotFoundError for missing images, ValueError for a class that is not in `classes`.
    """
    present = list_classes(folder)
    if unknown := sorted(set(present) - set(classes)):
        raise ValueError(
            f"{folder}: {_format_classes(unknown)} not among the {len(classes)} classes of train; remove or rename it"
        )
    files: list[str] = []
    labels: list[int] = []
    empty = []
    for label, name in enumerate(classes):
        found = _list_images(folder / name) if name in present else []
        if not found:
            empty.append(name)
        files += [path[len(str(folder)) + 1 :] for path in found]
        labels += [label] * len(found)
    if not files:
        raise FileNotFoundError(f"{folder} has no images ({', '.join(IMAGE_EXTENSIONS)}); {LAYOUT}")
    if empty and all_classes:
        raise FileNotFoundError(f"{folder}: no images in {_format_classes(empty)}; add some or remove the folder")
    for file in files:
        if "\n" in file or "\r" in file:
            raise ValueError(f"{folder}: the file name {file!r} contains a line break; rename it")
    return ImageFolder(folder, tuple(classes), files, labels)


def _list_images(folder: Path) -> list[str]:
    return [
        os.path.join(root, name)
        for root, _, names in sorted(os.walk(folder, followlinks=True))
        for name in sorted(names)
        if name.lower().endswith(IMAGE_EXTENSIONS)
    ]


def _format_classes(classes: list[str]) -> str:
    """Return 'class a' or '7 classes (a, b, c, ...)'."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
