"""Sources of images: what a conversion reads. A folder of class folders is one; others implement `Source`."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.convert.folders import (
    IMAGE_EXTENSIONS,
    LAYOUT,
    NO_CLASS,
    describe_left_out,
    ending,
    explain_nesting,
    explain_no_classes,
    explain_no_images,
    explain_unknown_class,
    is_hidden,
)
from ffcv_convnext.data.convert.names import Names

_BLOCK = 1 << 14  # images whose names are unpacked at once


class Stamp(NamedTuple):
    """State of a file: if its content changes, this changes too, unless somebody sets the time back."""

    num_bytes: int
    mtime_ns: int  # time of the last change; -1: there is no such file

    @classmethod
    def of(cls, path: str | Path) -> Stamp:
        """Read it."""
        try:
            found = os.stat(path)
        except OSError:
            return cls(0, -1)
        return cls(found.st_size, found.st_mtime_ns)


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

    @property
    def left_out(self) -> Mapping[str, int]:
        """Number of files that were left out, by the ending for which they were: '.gif' -> 9."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> bytes:
        """Return the content of an image file. Raises OSError."""

    def label(self, index: int) -> int:
        """Return the label of an image."""

    def name(self, index: int) -> str:
        """Return the name of an image: unique in this source, without line breaks."""

    def stamp(self, index: int) -> Stamp:
        """Return the state of the file that holds an image."""

    def is_regular(self, index: int) -> bool:
        """Return False if `read` may block forever, e.g. for a named pipe."""

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Source:
        """Return a source of these images, in this order.

        It goes to workers, which need neither `classes` nor `left_out`: they may be empty.
        """


def names_of(source: Source, order: NDArray[np.int64] | None = None) -> Iterator[str]:
    """Yield the names of the images at `order`, of all by default; only some of them are in memory."""
    number = len(source) if order is None else len(order)
    for start in range(0, number, _BLOCK):
        stop = min(start + _BLOCK, number)
        some = source.select(np.arange(start, stop) if order is None else order[start:stop])
        yield from map(some.name, range(stop - start))


def labels_of(source: Source, order: NDArray[np.int64]) -> Iterator[int]:
    """Yield the labels of the images at `order`."""
    for start in range(0, len(order), _BLOCK):
        yield from map(source.label, order[start : start + _BLOCK].tolist())


@dataclass(frozen=True, slots=True, eq=False)
class ImageFolder:
    """A split's folder: one folder per class, images ordered by class, then by path.

    Classes, files and order are those of torchvision's ImageFolder, whose import takes seconds; a test compares both.
    """

    location: Path
    classes: tuple[str, ...]
    files: Names  # relative to `location`
    labels: NDArray[np.int32]  # (N,)
    left_out: Mapping[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.files)

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        with open(os.path.join(self.location, self.files[index]), "rb") as file:
            return file.read()

    def label(self, index: int) -> int:  # noqa: D102  see Source
        return int(self.labels[index])

    def name(self, index: int) -> str:  # noqa: D102  see Source
        return self.files[index]

    def stamp(self, index: int) -> Stamp:  # noqa: D102  see Source
        return Stamp.of(os.path.join(self.location, self.files[index]))

    def is_regular(self, index: int) -> bool:  # noqa: D102  see Source
        try:
            return stat.S_ISREG(os.stat(os.path.join(self.location, self.files[index])).st_mode)
        except OSError:
            return False

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> ImageFolder:  # noqa: D102  see Source
        chosen = np.asarray(indices, np.int64)
        return ImageFolder(self.location, (), self.files.select(chosen), self.labels[chosen])


def list_classes(folder: Path) -> tuple[str, ...]:
    """Return the sorted class names of a split's folder. Raises FileNotFoundError if there are none."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} does not exist; {LAYOUT}")
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()))
    if not classes:
        raise FileNotFoundError(explain_no_classes(folder))
    if nesting := explain_nesting(folder, classes):
        raise FileNotFoundError(nesting)
    return classes


def scan(
    folder: Path, classes: Sequence[str], *, all_classes: bool, extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> ImageFolder:
    """List the images of a split's folder.

    classes: the full class list, which determines the labels.
    all_classes: whether each class must have an image here, as in train.   extensions: endings of images.
    Raises FileNotFoundError for missing images, ValueError for a class that is not in `classes`.
    """
    present = list_classes(folder)
    if unknown := sorted(set(present) - set(classes)):
        named = f"{_format_classes(unknown)} not among the {len(classes)} classes of train"
        raise ValueError(explain_unknown_class(folder, present) or f"{folder}: {named}; remove or rename it")
    empty: list[str] = []
    counts = np.zeros(len(classes), np.int64)
    beside = [entry.name for entry in os.scandir(folder) if entry.is_file() and not is_hidden(entry.name)]
    left_out = Counter(NO_CLASS if name.lower().endswith(extensions) else ending(name) for name in beside)
    in_empty: Counter[str] = Counter()
    exists = set(present)

    def images() -> Iterator[str]:
        for label, name in enumerate(classes):
            found, others = _list_images(folder / name, extensions) if name in exists else ([], Counter())
            left_out.update(others)
            counts[label] = len(found)
            if not found:
                empty.append(name)
                in_empty.update(others)
            yield from (path[len(str(folder)) + 1 :] for path in found)

    files = Names.of(images())
    if not files:
        raise FileNotFoundError(explain_no_images(folder, left_out))
    if empty and all_classes:
        described = describe_left_out(in_empty)
        raise FileNotFoundError(
            f"{folder}: no images in {_format_classes(empty)}"
            + (f" ({described})" if described else "")
            + "; add some or remove the folder"
        )
    if b"\n" in files.packed or b"\r" in files.packed:
        file = next(file for file in files if "\n" in file or "\r" in file)
        raise ValueError(f"{folder}: the file name {file!r} contains a line break; rename it")
    by_number = sorted(left_out.items(), key=lambda item: (-item[1], item[0]))
    labels = np.repeat(np.arange(len(classes), dtype=np.int32), counts)
    return ImageFolder(folder, tuple(classes), files, labels, dict(by_number))


def _list_images(folder: Path, extensions: tuple[str, ...]) -> tuple[list[str], Counter[str]]:
    """Return the images below a class folder, and the number of other files by their ending."""
    images, others = [], []
    for root, _, names in sorted(os.walk(folder, followlinks=True)):
        for name in sorted(names):
            if name.lower().endswith(extensions):
                images.append(os.path.join(root, name))
            elif not is_hidden(name):
                others.append(ending(name))
    return images, Counter(others)


def _format_classes(classes: list[str]) -> str:
    """Return 'class a' or '7 classes (a, b, c, ...)'."""
    if len(classes) == 1:
        return f"class {classes[0]}"
    return f"{len(classes)} classes ({', '.join(classes[:3])}{', ...' if len(classes) > 3 else ''})"
