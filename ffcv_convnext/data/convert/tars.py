"""Images inside tar archives, read in place: an index of offsets is made from the headers, nothing is unpacked."""

from __future__ import annotations

import io
import os
import sys
import tarfile
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ffcv_convnext.data.convert.archives import ArchivedImages

_COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}
_BLOCK = 512  # bytes: a header, and the unit of sizes
_WINDOW = 8 * _BLOCK  # read at once: headers, and the small members of a WebDataset sample
_REGULAR, _WITHOUT_CONTENT, _LONG_NAME, _PAX = b"0\0", b"123456", ord("L"), ord("x")  # links, devices, folders
_FILE_NAMES = sys.getfilesystemencoding(), sys.getfilesystemencodeerrors()
_NO_FILE = bytes(_BLOCK)
_MAX_NAME = 1 << 20  # bytes of a long name or a pax header


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


class _Unusual(Exception):
    """A header that tarfile has to judge: another kind of member, a damaged one, or the end of the file."""

    def __init__(self, at: int) -> None:
        super().__init__(at)
        self.at = at  # where tarfile has to begin


def list_members(archive: Path, *, inside: Member | None = None) -> Iterator[Member]:
    """Yield the regular files of a tar archive in its order, without hidden ones (macOS's `._name`).

    inside: a member of `archive` that is an archive itself, whose files are listed instead.
    Raises FileNotFoundError, and ValueError for an archive that is compressed, cut off or damaged, a sparse member and
    two members of one name (after the last member); the message names archive and member.
    """
    label = f"{archive}/{inside.name}" if inside else str(archive)
    if not archive.is_file():
        raise FileNotFoundError(f"{archive} does not exist or is no file")
    with open(archive, "rb") as file:
        start, end = (inside.start, inside.start + inside.size) if inside else (0, os.fstat(file.fileno()).st_size)
        first = os.pread(file.fileno(), 8, start)
        for magic, program in _COMPRESSED.items():
            if first.startswith(magic):
                raise ValueError(f"{label} is compressed and cannot be read in place; decompress it first: {program}")
        hashes = array("q")
        for member in _list_files(file, start, end, label):
            hashes.append(hash(member.name))
            yield member
        in_order = np.sort(np.frombuffer(hashes, np.int64))
        if (in_order[1:] == in_order[:-1]).any():
            seen: set[str] = set()
            for name, *_ in _list_files(file, start, end, label):
                if name in seen:
                    raise ValueError(f"{label}: two members are named {name}; remove one")
                seen.add(name)


def _list_files(file: io.BufferedReader, start: int, end: int, label: str) -> Iterator[Member]:
    last = None
    try:
        for member in _walk(file, start, end):
            last = member.name
            if not last.rpartition("/")[2].startswith("."):
                if "\n" in last or "\r" in last:
                    raise ValueError(f"{label}: the name {last!r} contains a line break")
                yield member
    except tarfile.TarError as error:
        raise ValueError(f"{label} is cut off or damaged ({error}) {_after(last)}; copy it again") from None
    except _Sparse as error:
        raise ValueError(f"{label}: {error} is a sparse member; pack the archive without --sparse") from None


def _after(name: str | None) -> str:
    return "at its start" if name is None else f"at or after its member {name}"


class _Sparse(Exception):
    """A member that does not lie in one piece. The message is its name."""


def _walk(file: io.BufferedReader, start: int, end: int) -> Iterator[Member]:
    """Yield the regular files of the archive between two positions. Raises TarError and _Sparse."""
    try:
        yield from _walk_headers(file.fileno(), start, end)
    except _Unusual as unusual:
        part = _Part(file, unusual.at, end - unusual.at)
        with tarfile.open(fileobj=part, mode="r:", errorlevel=0) as tar:
            while (info := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # else every header stays in memory
                if info.issparse():
                    raise _Sparse(info.name) from None
                if info.isreg():
                    yield Member(info.name, unusual.at + info.offset_data, info.size)
            part.seek(tar.offset)
            if part.read(_BLOCK) != _NO_FILE:  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("no end of the archive") from None


def _walk_headers(descriptor: int, at: int, end: int) -> Iterator[Member]:
    """Yield the regular files of an archive of ustar's, GNU's or pax's form, ten times as fast as tarfile.

    Raises _Unusual for all that is not simple.
    """
    window, window_at = b"", at
    begin = at  # of the headers of one member
    long_name: bytes | None = None
    long_size: int | None = None
    while True:
        offset = at - window_at
        if offset + _BLOCK > len(window):
            window, window_at, offset = os.pread(descriptor, max(min(_WINDOW, end - at), 0), at), at, 0
        header = window[offset : offset + _BLOCK]
        if header == _NO_FILE:
            if long_name is None and long_size is None:
                return
            raise _Unusual(begin)
        try:
            size = int(header[124:136].rstrip(b"\0 ") or b"0", 8)
            stated = int(header[148:156].strip(b"\0 "), 8)
        except ValueError:
            raise _Unusual(begin) from None
        # The sum of all bytes, those of the field itself as spaces. Adler-32 has 1 + the sum in its low half.
        total = zlib.adler32(header[156:], zlib.adler32(header[:148])) & 0xFFFF
        if len(header) < _BLOCK or total != (stated - 8 * 32 + 1) % 65521 or size < 0:
            raise _Unusual(begin)
        kind = header[156]
        at += _BLOCK
        if kind in _REGULAR:
            name = long_name or header[:100].partition(b"\0")[0]
            if long_name is None and header[345]:
                if header[257:263] != b"ustar\0":
                    raise _Unusual(begin)
                name = header[345:500].partition(b"\0")[0] + b"/" + name
            size = size if long_size is None else long_size
            if size < 0 or at + size > end or name.endswith(b"/"):
                raise _Unusual(begin)
            yield Member(name.decode(*_FILE_NAMES), at, size)
            at += -(-size // _BLOCK) * _BLOCK
        elif size > _MAX_NAME:
            raise _Unusual(begin)
        elif kind == _LONG_NAME:
            long_name = os.pread(descriptor, size, at).partition(b"\0")[0]
        elif kind == _PAX:
            content = window[at - window_at :][:size] if at + size <= window_at + len(window) else b""
            name, long_size = _read_pax(content or os.pread(descriptor, size, at), begin)
            long_name = name or long_name
        elif kind not in _WITHOUT_CONTENT:
            raise _Unusual(begin)
        if kind in (_LONG_NAME, _PAX):
            at += -(-size // _BLOCK) * _BLOCK
        else:
            begin, long_name, long_size = at, None, None


def _read_pax(content: bytes, begin: int) -> tuple[bytes, int | None]:
    """Return the path (empty if it is not given) and the size in a pax header: `LENGTH KEY=VALUE` lines."""
    path, size, at = b"", None, 0
    try:
        while at < len(content) and content[at]:
            space = content.index(b" ", at)
            stop = at + int(content[at:space])
            key, found, value = content[space + 1 : stop - 1].partition(b"=")
            if not found or stop <= space or key.startswith(b"GNU.sparse") or key == b"hdrcharset":
                raise _Unusual(begin)
            if key == b"path":
                path = value
            elif key == b"size":
                size = int(value)
            at = stop
    except ValueError:
        raise _Unusual(begin) from None
    return path, size


class TarImages(ArchivedImages):
    """Images of tar archives."""

    __slots__ = ()

    def read(self, index: int) -> bytes:  # noqa: D102  see Source
        return self.read_at(index, int(self.starts[index]), int(self.sizes[index]))
