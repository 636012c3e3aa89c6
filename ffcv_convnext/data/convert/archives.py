"""Images inside archives: an index without a Python object for each image, from which workers read by themselves."""

from __future__ import annotations

import dataclasses
import errno
import os
import sys
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.source import Stamp

_OPEN_ARCHIVES = 128  # in a worker
_FILE_NAMES = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()  # as os.fsencode, without its overhead
_NUM_THREADS = 16  # that read headers
Item = TypeVar("Item")
Result = TypeVar("Result")


class Descriptor:
    """A file that stays open until nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(_OPEN_ARCHIVES)
def open_archive(path: str, stamp: Stamp) -> Descriptor:  # noqa: ARG001
    """Return an open archive. stamp: as indexed, so that a new archive of that name is opened again."""
    return Descriptor(path)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ArchivedImages:
    """Images of one or more archives, in a fixed order. A worker gets positions and opens the archives itself.

    A subclass has `read`.
    """

    location: Path  # the archive, its folder, or a pattern of archives
    classes: tuple[str, ...]
    archives: tuple[str, ...]
    stamps: tuple[Stamp, ...]  # of each archive, when the index was made
    which: NDArray[np.int32]  # (N,) the archive of each image
    starts: NDArray[np.int64]  # (N,) first byte of each image, or of the page that holds it
    sizes: NDArray[np.int64]  # (N,) bytes of each image, or its position in the page
    labels: NDArray[np.int32]  # (N,)
    names: Names
    left_out: Mapping[str, int] = field(default_factory=dict)
    label_names: tuple[str, ...] = ()  # class of each integer label in the archives, if they have integers

    def __len__(self) -> int:
        return len(self.starts)

    def read_at(self, index: int, start: int, size: int) -> bytes:
        """Return bytes of the archive of an image. Raises OSError that names the archive."""
        archive = self.archives[self.which[index]]
        try:
            content = os.pread(open_archive(archive, self.stamps[self.which[index]]).number, size, start)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror} ({archive})") from None
        if len(content) != size:
            raise OSError(errno.EIO, f"{archive} ends in the middle of it")
        return content

    def archive_of(self, index: int) -> str:
        """Return the path of the archive that holds an image."""
        archive: str = self.archives[int(self.which[index])]
        return archive

    def label(self, index: int) -> int:  # noqa: D102  see Source
        return int(self.labels[index])

    def name(self, index: int) -> str:  # noqa: D102  see Source
        return self.names[index]

    def stamp(self, index: int) -> Stamp:  # noqa: D102  see Source
        return Stamp.of(self.archive_of(index))

    def is_regular(self, index: int) -> bool:  # noqa: D102  see Source
        return os.path.isfile(self.archive_of(index))

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> Self:  # noqa: D102  see Source
        chosen = np.asarray(indices, np.int64)
        used, which = np.unique(self.which[chosen], return_inverse=True)  # a task needs a few of a thousand archives
        return dataclasses.replace(
            self,
            classes=(),
            left_out={},
            label_names=(),
            archives=tuple(self.archives[each] for each in used),
            stamps=tuple(self.stamps[each] for each in used),
            which=which.astype(np.int32),
            starts=self.starts[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            names=self.names.select(chosen),
        )


def in_threads(work: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """Yield the results in the order of the items: on a network disk each header that is read takes a millisecond."""
    with ThreadPoolExecutor(_NUM_THREADS) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(work, item))
                if len(waiting) > _NUM_THREADS:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


class Index:
    """The images of archives while they are found, 40 bytes and the name for each."""

    def __init__(self, archives: Sequence[Path]) -> None:
        self.archives = tuple(map(str, archives))
        self.stamps = tuple(map(Stamp.of, archives))
        self.left_out: Counter[str] = Counter()
        self.labels = array("i")  # or codes of labels, until all of them are known
        self._which, self._starts, self._sizes = array("i"), array("q"), array("q")
        self._files, self._ends = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self.labels)

    def add(self, file: str, which: int, start: int, size: int, label: int) -> None:
        """Add an image. file: its path below its class, or with its class before it."""
        self._files += file.encode(*_FILE_NAMES)
        self._ends.append(len(self._files))
        self._which.append(which)
        self._starts.append(start)
        self._sizes.append(size)
        self.labels.append(label)

    def finish(
        self, classes: Sequence[str], labels: NDArray[np.int32] | None = None
    ) -> tuple[dict[str, Any], NDArray[np.int64]]:
        """Return the arrays of `ArchivedImages` and the order of the images: by class, then by path, as in folders.

        labels: of each image, in the order of `add`; None: `self.labels`.
        Raises ValueError for two images of one name.
        """
        labels = np.array(self.labels, np.int32) if labels is None else labels
        files = Names(bytes(self._files), np.array(self._ends, np.int64))
        self._files, self._ends = bytearray(), array("q")
        order = np.argsort(labels, kind="stable")
        bounds = np.searchsorted(labels[order], np.arange(len(classes) + 1)).tolist()

        def names() -> Iterator[str]:
            for label, name in enumerate(classes):
                part = slice(bounds[label], bounds[label + 1])
                found = [(*_place(files[i], f"{name}/"), i) for i in order[part].tolist()]
                found.sort()
                order[part] = [i for *_, i in found]
                for one, other in pairwise(found):
                    if one[:2] == other[:2]:
                        raise ValueError(self._describe_doubles(files, one[2], other[2]))
                for folder, file, _ in found:
                    yield f"{name}/{folder}/{file}" if folder else f"{name}/{file}"

        fields = {
            "classes": tuple(classes),
            "names": Names.of(names()),
            "archives": self.archives,
            "stamps": self.stamps,
            "which": np.array(self._which, np.int32)[order],
            "starts": np.array(self._starts, np.int64)[order],
            "sizes": np.array(self._sizes, np.int64)[order],
            "labels": labels[order],
            "left_out": dict(sorted(self.left_out.items(), key=lambda item: (-item[1], item[0]))),
        }
        return fields, order

    def _describe_doubles(self, files: Names, one: int, other: int) -> str:
        first, second = self.archives[self._which[one]], self.archives[self._which[other]]
        if first == second:
            return f"{first}: two members are named {files[one]}; remove one"
        return f"{first} and {second} both hold {files[one]}; remove one"


def _place(file: str, prefix: str) -> tuple[str, str]:
    """Return folder and file below the class folder, by which ImageFolder sorts."""
    folder, _, name = file.removeprefix(prefix).rpartition("/")
    return folder, name
