"""Image files whose classes stand in a text file: a list of `path<TAB>class` lines, and a flat folder `val/`."""

from __future__ import annotations

import os
import stat
from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.convert.folders import IMAGE_EXTENSIONS, ending, is_hidden
from ffcv_convnext.data.convert.imagenet import GroundTruth
from ffcv_convnext.data.convert.labels import ClassList, RawLabels, check_every_class_has_images
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.source import Stamp


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ListedImages:
    """Image files in a fixed order."""

    location: Path
    classes: tuple[str, ...]
    names: Names  # relative to `location`, or absolute; of flat folders: behind the class
    labels: NDArray[np.int32]  # (N,)
    flat: bool  # the files lie in `location` itself
    left_out: Mapping[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()  # class of each integer label, if the list has integers

    def __len__(self) -> int:
        return len(self.labels)

    def path(self, index: int) -> str:
        """Return the path of an image file."""
        name = self.names[index]
        return os.path.join(self.location, name.rpartition("/")[2] if self.flat else name)

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        with open(self.path(index), "rb") as file:
            return file.read()

    def label(self, index: int) -> int:  # noqa: D102  see Source
        return int(self.labels[index])

    def name(self, index: int) -> str:  # noqa: D102  see Source
        return self.names[index]

    def stamp(self, index: int) -> Stamp:  # noqa: D102  see Source
        return Stamp.of(self.path(index))

    def is_regular(self, index: int) -> bool:  # noqa: D102  see Source
        try:
            return stat.S_ISREG(os.stat(self.path(index)).st_mode)
        except OSError:
            return False

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> ListedImages:  # noqa: D102  see Source
        chosen = np.asarray(indices, np.int64)
        names, labels = self.names.select(chosen), self.labels[chosen]
        return replace(self, classes=(), names=names, labels=labels, left_out={}, label_names=())


def open_flat(
    folder: Path, classes: Sequence[str], truth: Mapping[str, str], extensions: tuple[str, ...] = IMAGE_EXTENSIONS
) -> ListedImages:
    """List a folder of validation images without class folders, in the order and with the names of class folders.

    truth: class of each image by its name.   Raises ValueError as `GroundTruth` does.
    """
    truth_of = GroundTruth(truth, classes, folder)
    left_out: Counter[str] = Counter()
    found: list[tuple[int, str]] = []
    with os.scandir(folder) as entries:
        names = [entry.name for entry in entries if not is_hidden(entry.name) and not entry.is_dir()]
    for name in names:
        if name.lower().endswith(extensions):
            found.append((truth_of.label(name), name))
        else:
            left_out[ending(name)] += 1
    truth_of.check_all_seen()
    found.sort()
    return ListedImages(
        location=folder,
        classes=tuple(classes),
        names=Names.of(f"{classes[label]}/{name}" for label, name in found),
        labels=np.array([label for label, _ in found], np.int32),
        flat=True,
        left_out=dict(left_out),
    )


class ImageList:
    """The images of a list, whose classes may not be known yet."""

    def __init__(self, path: Path, extensions: tuple[str, ...] = IMAGE_EXTENSIONS) -> None:
        """Read `path<TAB>class` lines; paths are absolute or relative to the list's folder.

        Raises FileNotFoundError, and ValueError for a line of another form or an image that is listed twice.
        """
        if not path.is_file():
            raise FileNotFoundError(f"{path} does not exist; expected a file with one `path<TAB>class` a line")
        self.path = path
        self.raw = RawLabels()
        self._left_out: Counter[str] = Counter()
        self._codes, names = array("i"), _Packed()
        with open(path, encoding="utf-8", errors="surrogateescape") as lines:
            for number, line in enumerate(lines, 1):
                line = line.rstrip("\n").rstrip("\r")
                if not line.strip():
                    continue
                file, tab, text = line.partition("\t")
                file, text = file.strip(), text.strip()
                if not tab or not file or not text or "\t" in text:
                    raise ValueError(f"{path}, line {number}: {line[:60]!r}; expected `path<TAB>class`")
                if not file.lower().endswith(extensions):
                    self._left_out[ending(file)] += 1
                    continue
                self._codes.append(self.raw.code(text, (str(path), f"line {number}")))
                names.add(os.path.normpath(file))
        if not len(names):
            raise ValueError(f"{path} lists no images ({', '.join(extensions)})")
        self._names = names.finish()

    def finish(
        self, stated: Sequence[str], train: ClassList | None, source: str, *, all_classes: bool
    ) -> tuple[ListedImages, ClassList]:
        """Return the images with labels, and the classes. Arguments as of `RawLabels.resolve`.

        If all files lie in folders of their classes below one folder, names are relative to that one, as ImageFolder's.
        all_classes: each class must have an image, as in train.   Raises FileNotFoundError for a missing file.
        """
        found, of_codes = self.raw.resolve(stated, train, source)
        labels = of_codes[np.array(self._codes, np.int32)]
        if all_classes:
            check_every_class_has_images(self.path, labels, found.classes)
        prefix = self._common_prefix(labels, found.classes)
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(len(found.classes) + 1)).tolist()
        for label in range(len(found.classes)):
            part = slice(bounds[label], bounds[label + 1])
            rows = [(*os.path.split(self._names[i]), i) for i in order[part].tolist()]
            rows.sort()
            order[part] = [row[2] for row in rows]
        self._check_doubles()
        images = ListedImages(
            location=self.path.parent / prefix if prefix else self.path.parent,
            classes=found.classes,
            names=Names.of(self._names[i][len(prefix) :] for i in order.tolist()),
            labels=labels[order],
            flat=False,
            left_out=dict(sorted(self._left_out.items(), key=lambda item: (-item[1], item[0]))),
            label_names=found.label_names,
        )
        for index in range(len(images)):
            folder, file = os.path.split(images.path(index))
            if file not in _files_in(folder):
                raise FileNotFoundError(
                    f"{self.path}: {folder}/{file} does not exist; paths are relative to the folder of the list"
                )
        _files_in.cache_clear()
        return images, found

    def _common_prefix(self, labels: NDArray[np.int32], classes: Sequence[str]) -> str:
        prefix: str | None = None
        for name, label in zip(self._names, labels.tolist(), strict=True):
            folder = f"{classes[label]}/"
            if prefix is None:
                at = 0 if name.startswith(folder) else name.find(f"/{folder}") + 1
                prefix = name[:at]
            if not name.startswith(prefix + folder):
                return ""
        return prefix or ""

    def _check_doubles(self) -> None:
        for one, other in pairwise(sorted(self._names)):
            if one == other:
                raise ValueError(f"{self.path} lists {one} twice; remove one line")


@lru_cache(64)
def _files_in(folder: str) -> frozenset[str]:
    """Return the names in a folder: on a network disk, much faster than asking for each file."""
    try:
        return frozenset(os.listdir(folder))
    except OSError:
        return frozenset()


class _Packed:
    """Names while they are found."""

    def __init__(self) -> None:
        self._packed, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._ends)

    def add(self, name: str) -> None:
        self._packed += os.fsencode(name)
        self._ends.append(len(self._packed))

    def finish(self) -> Names:
        return Names(bytes(self._packed), np.array(self._ends, np.int64))
