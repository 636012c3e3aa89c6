"""Images inside tar archives, read in place: an index of offsets is made from the headers, nothing is unpacked."""

from __future__ import annotations

import errno
import io
import os
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.source import Stamp

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_OPEN_ARCHIVES = 16  # in a worker


class Member(NamedTuple):
    """A file inside an archive."""

    name: str
    start: int  # of its content, bytes from the beginning of the outermost archive
    size: int  # bytes


class _Part(io.RawIOBase):
    """A part of a file as a file: an archive inside an archive."""

    def __init__(self, file: io.BufferedReader, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(self._size - self._at, 0)
        content = os.pread(self._file.fileno(), left if size < 0 else min(size, left), self._start + self._at)
        self._at += len(content)
        return content


def list_members(archive: Path, *, inside: Member | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar archive in its order, without hidden ones (macOS's `._name`).

    inside: a member of `archive` that is an archive itself, whose files are listed instead.
    Raises FileNotFoundError, and ValueError for an archive that is compressed, cut off or damaged, a sparse member and
    two members of one name; the message names archive and member.
    """
    label = f"{archive}/{inside.name}" if inside else str(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} does not exist or is no file")
    with open(archive, "rb") as file:
        part = _Part(file, inside.start, inside.size) if inside else _Part(file, 0, os.fstat(file.fileno()).st_size)
        start = inside.start if inside else 0
        first = part.read(8)
        for magic, program in _COMPRESSED.items():
            if first.startswith(magic):
                raise ValueError(f"{label} is compressed and cannot be read in place; decompress it first: {program}")
        part.seek(0)
        last = None
        seen: set[str] = set()
        try:
            with tarfile.open(fileobj=part, mode="r:", errorlevel=0) as tar:
                while (info := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                    last = info.name
                    if not info.isreg() or PurePosixPath(info.name).name.startswith("."):
                        continue
                    if info.issparse():
                        raise ValueError(f"{label}: {info.name} is a sparse member; pack the archive without --sparse")
                    if "\n" in info.name or "\r" in info.name:
                        raise ValueError(f"{label}: the name {info.name!r} contains a line break")
                    if info.name in seen:
                        raise ValueError(f"{label}: two members are named {info.name}; remove one")
                    seen.add(info.name)
                    yield Member(info.name, start + info.offset_data, info.size)
                part.seek(tar.offset)
                end = part.read(512)
        except tarfile.TarError as error:
            raise ValueError(f"{label} is cut off or damaged ({error}) {_after(last)}; copy it again") from None
        if end != bytes(512):  # tarfile takes a damaged header for the end
            raise ValueError(f"{label} is cut off or damaged {_after(last)}; copy it again")


def _after(name: str | None) -> str:
    return "at its start" if name is None else f"at or after its member {name}"


class _Descriptor:
    """A file that stays open until nothing refers to it."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(_OPEN_ARCHIVES)
def _open(path: str, stamp: Stamp) -> _Descriptor:  # noqa: ARG001
    """Return an open archive. stamp: as indexed, so that a new archive of that name is opened again."""
    return _Descriptor(path)


@dataclass(frozen=True, slots=True, eq=False)
class TarImages:
    """Images of one tar archive, in a fixed order. A worker gets offsets and opens the archive itself."""

    location: Path  # the archive
    classes: tuple[str, ...]
    starts: NDArray[np.int64]  # (N,) first byte of each image
    sizes: NDArray[np.int64]  # (N,) bytes of each image
    labels: NDArray[np.int32]  # (N,)
    names: Names
    archive: Stamp  # when the index was made
    left_out: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def build(
        cls,
        archive: Path,
        classes: Sequence[str],
        images: Sequence[tuple[str, int, int, int]],
        left_out: Mapping[str, int],
        stamp: Stamp,
    ) -> TarImages:
        """Make a source. images: name, start, size, label of each image."""
        return cls(
            location=archive,
            classes=tuple(classes),
            starts=np.array([start for _, start, _, _ in images], np.int64),
            sizes=np.array([size for _, _, size, _ in images], np.int64),
            labels=np.array([label for *_, label in images], np.int32),
            names=Names.of(name for name, *_ in images),
            archive=stamp,
            left_out=dict(left_out),
        )

    def __len__(self) -> int:
        return len(self.starts)

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        size = int(self.sizes[index])
        descriptor = _open(str(self.location), self.archive)
        content = os.pread(descriptor.number, size, int(self.starts[index]))
        if len(content) != size:
            raise OSError(errno.EIO, f"{self.location} ends in the middle of it")
        return content

    def label(self, index: int) -> int:  # noqa: D102  see Source
        return int(self.labels[index])

    def name(self, index: int) -> str:  # noqa: D102  see Source
        return self.names[index]

    def stamp(self, index: int) -> Stamp:  # noqa: ARG002, D102  see Source
        return Stamp.of(self.location)

    def is_regular(self, index: int) -> bool:  # noqa: ARG002, D102  see Source
        return self.location.is_file()

    def select(self, indices: Sequence[int] | NDArray[np.int64]) -> TarImages:  # noqa: D102  see Source
        chosen = np.asarray(indices, np.int64)
        return TarImages(
            location=self.location,
            classes=(),
            starts=self.starts[chosen],
            sizes=self.sizes[chosen],
            labels=self.labels[chosen],
            names=self.names.select(chosen),
            archive=self.archive,
        )
