"""Pages of a column of byte strings in a parquet file: where they are, and where the values are inside them.

The format is Apache Parquet's: pages with headers in Thrift's compact protocol, encodings PLAIN and RLE_DICTIONARY. A
page may hold a hundred images, so single values are found and read: in a page without compression, and in one of
Snappy, whose blocks of 64 kB are compressed each for itself and show their structure without being decompressed.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Read = Callable[[int, int], bytes]  # position, max bytes -> bytes
Decompress = Callable[[bytes, int], bytes]  # content, its size afterwards

_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3  # PageType
_PLAIN, _PLAIN_DICTIONARY, _RLE_DICTIONARY = 0, 2, 8  # Encoding
_HEADER_BYTES = 1 << 10  # most headers are shorter
_SNAPPY_BLOCK = 1 << 16
_TAGS = 256  # bytes to read for a tag and those behind it
_MAX_HEADER_BYTES = 1 << 24


class PageError(ValueError):
    """A page that cannot be read. The message is the reason."""


class Page(NamedTuple):
    """A page's header."""

    start: int  # of its content
    size: int  # bytes of the content in the file
    full_size: int  # bytes when decompressed
    num_values: int
    kind: int
    encoding: int
    level_bytes: int | None  # uncompressed levels before the values; None: levels are inside the content, with a length
    is_compressed: bool

    @property
    def is_data(self) -> bool:
        """Whether it has values, not a dictionary."""
        return self.kind in (_DATA, _DATA_V2)


def read_header(read: Read, at: int) -> Page:
    """Read the header of the page at `at`. Raises PageError."""
    size = _HEADER_BYTES
    while True:
        content = read(at, size)
        try:
            fields, length = _struct(content, 0)
            break
        except IndexError:
            if len(content) < size or size >= _MAX_HEADER_BYTES:
                raise PageError(f"the page at byte {at} is cut off or damaged") from None
            size *= 16
        except (ValueError, RecursionError):
            raise PageError(f"the page at byte {at} is damaged") from None
    try:
        kind, full_size, size = fields[1], fields[2], fields[3]
        start = at + length
        if kind == _DATA:
            about = fields[5]
            page = Page(start, size, full_size, about[1], kind, about[2], None, True)
        elif kind == _DICTIONARY:
            about = fields[7]
            page = Page(start, size, full_size, about[1], kind, about[2], 0, True)
        elif kind == _DATA_V2:
            about = fields[8]
            page = Page(start, size, full_size, about[1], kind, about[4], about[5] + about[6], about.get(7, True))
        else:
            page = Page(start, size, full_size, 0, kind, 0, 0, True)
    except (KeyError, TypeError, AttributeError):
        raise PageError(f"the page at byte {at} is damaged") from None
    if not all(isinstance(each, int) for each in page[:6]) or min(page[:4]) < 0:
        raise PageError(f"the page at byte {at} is damaged")
    return page


class Span(NamedTuple):
    """Where a value lies."""

    start: int  # position in the file of the blocks that hold it
    stored: int  # bytes of these blocks in the file
    full: int  # bytes of these blocks when decompressed
    skip: int  # bytes of them before the value
    size: int  # bytes of the value


def locate(read: Read, page: Page, codec: str, decompress: Decompress, levels: bool) -> list[Span] | None:
    """Return where the values of a PLAIN page are; None: the whole page has to be decompressed (`values_of`).

    Arguments as of `values_of`. Raises PageError.
    """
    if page.encoding != _PLAIN and page.is_data:
        return None
    if codec not in ("UNCOMPRESSED", "SNAPPY"):
        return None
    try:
        skipped = page.level_bytes or 0
        blocks: _Blocks = _Blocks(read, page.start + skipped, page.full_size - skipped)
        if codec == "SNAPPY" and page.is_compressed:
            blocks = _SnappyBlocks(read, page.start + skipped, page.size - skipped, decompress)
        at = 0
        if page.level_bytes is None and levels:
            at = 4 + int.from_bytes(blocks.bytes_at(0, 4), "little")
        spans = []
        for _ in range(page.num_values):
            size = int.from_bytes(blocks.bytes_at(at, 4), "little")
            spans.append(blocks.span(at + 4, size))
            at += 4 + size
    except (IndexError, ValueError):
        return None
    return spans if at == blocks.size else None


class _Blocks:
    """Values that are not compressed."""

    def __init__(self, read: Read, start: int, size: int) -> None:
        self.read, self.start, self.size = read, start, size

    def bytes_at(self, at: int, number: int) -> bytes:
        """Return bytes of the decompressed content. Raises ValueError if they are not there."""
        content = self.read(self.start + at, number) if at + number <= self.size else b""
        if len(content) != number:
            raise ValueError
        return content

    def span(self, at: int, size: int) -> Span:
        """Return where a part of the decompressed content is. Raises ValueError if it is not there."""
        if at + size > self.size:
            raise ValueError
        return Span(self.start + at, size, size, 0, size)


class _SnappyBlocks(_Blocks):
    """A Snappy stream: its length, then literals and copies, whose tags have their lengths.

    Its compressor works on blocks of 64 kB one after the other, and no copy reaches into another block.
    """

    def __init__(self, read: Read, start: int, stored: int, decompress: Decompress) -> None:
        """Read the tags. Raises ValueError or IndexError for another stream."""
        self.decompress = decompress
        size, length = _varint(read(start, 10), 0)
        super().__init__(read, start, size)
        self.positions: list[int] = []  # of the blocks in the file, and their end
        self.literals: list[int] = []  # where each literal begins, decompressed
        self.ends: list[int] = []
        self.contents: list[int] = []  # where it begins in the file
        at, done, end = start + length, 0, start + stored
        window, window_at = b"", at
        while at < end:
            if done % _SNAPPY_BLOCK == 0:
                self.positions.append(at)
            offset = at - window_at
            if offset + 5 > len(window) and window_at + len(window) < end:
                window, window_at, offset = read(at, min(_TAGS, end - at)), at, 0
            tag = window[offset]
            if tag & 3 == 0:
                number, length = tag >> 2, 1
                if number >= 60:
                    length += number - 59
                    number = int.from_bytes(window[offset + 1 : offset + length], "little")
                number += 1
                self.literals.append(done)
                self.ends.append(done + number)
                self.contents.append(at + length)
                at += length + number
            else:
                number = 4 + ((tag >> 2) & 7) if tag & 3 == 1 else (tag >> 2) + 1
                at += (2, 3, 5)[(tag & 3) - 1]
            if done // _SNAPPY_BLOCK != (done + number - 1) // _SNAPPY_BLOCK:
                raise ValueError
            done += number
        if at != end or done != size:
            raise ValueError
        self.positions.append(end)

    def bytes_at(self, at: int, number: int) -> bytes:
        found = bisect_right(self.literals, at) - 1
        if found >= 0 and at + number <= self.ends[found]:
            return self.read(self.contents[found] + at - self.literals[found], number)
        start, stored, full, skip, _ = self.span(at, number)
        return self.decompress(to_snappy(self.read(start, stored), full), full)[skip : skip + number]

    def span(self, at: int, size: int) -> Span:
        if at + size > self.size:
            raise ValueError
        first, last = at // _SNAPPY_BLOCK, max(at + size - 1, at) // _SNAPPY_BLOCK
        last = min(last, len(self.positions) - 2)
        start = self.positions[first]
        full = min((last + 1) * _SNAPPY_BLOCK, self.size) - first * _SNAPPY_BLOCK
        return Span(start, self.positions[last + 1] - start, full, at - first * _SNAPPY_BLOCK, size)


def to_snappy(blocks: bytes, full_size: int) -> bytes:
    """Return blocks of a Snappy stream as a stream: behind their decompressed size."""
    size = bytearray()
    while full_size >= 0x80:
        size.append(full_size & 0x7F | 0x80)
        full_size >>= 7
    size.append(full_size)
    return bytes(size) + blocks


def list_pages(read: Read, start: int, size: int) -> Iterator[tuple[int, Page]]:
    """Yield position and header of each page of a column chunk. Raises PageError."""
    at = start
    while at < start + size:
        page = read_header(read, at)
        yield at, page
        at = page.start + page.size
    if at != start + size:
        raise PageError(f"the pages at bytes {start} to {start + size} do not end there: damaged")


def values_of(read: Read, at: int, dictionary: list[bytes] | None, decompress: Decompress, levels: bool) -> list[bytes]:
    """Return the values of the page at `at`, which has no nulls. Raises PageError.

    dictionary: values of the dictionary page; None: there is none.   levels: values are optional, so that a data page
    has definition levels.
    """
    page, content, skipped = _content(read, at, decompress, levels)
    try:
        if page.encoding == _PLAIN or not page.is_data:
            return _plain(content, skipped, page.num_values)
        if page.encoding in (_PLAIN_DICTIONARY, _RLE_DICTIONARY) and dictionary is not None:
            return [dictionary[i] for i in _indices(content, skipped, page.num_values).tolist()]
    except (struct.error, IndexError, ValueError):
        raise PageError(f"the page at byte {at} is damaged, or has nulls") from None
    raise PageError(f"the page at byte {at} has encoding {page.encoding}; only PLAIN and RLE_DICTIONARY can be read")


def indices_of(read: Read, at: int, decompress: Decompress, levels: bool) -> list[int]:
    """Return the indices into the dictionary that the page at `at` holds. Arguments and errors as of `values_of`."""
    page, content, skipped = _content(read, at, decompress, levels)
    if page.encoding not in (_PLAIN_DICTIONARY, _RLE_DICTIONARY):
        raise PageError(
            f"the page at byte {at} has encoding {page.encoding}; only PLAIN and RLE_DICTIONARY can be read"
        )
    try:
        return [int(index) for index in _indices(content, skipped, page.num_values)]
    except (IndexError, ValueError):
        raise PageError(f"the page at byte {at} is damaged, or has nulls") from None


def _content(read: Read, at: int, decompress: Decompress, levels: bool) -> tuple[Page, bytes, int]:
    """Return header and decompressed content of a page, and the bytes of its levels. Raises PageError."""
    page = read_header(read, at)
    content = read(page.start, page.size)
    if len(content) != page.size:
        raise PageError(f"the page at byte {at} is cut off")
    skipped = page.level_bytes or 0
    if page.is_compressed:
        try:
            content = content[:skipped] + decompress(content[skipped:], page.full_size - skipped)
        except (ValueError, OSError) as error:
            raise PageError(f"the page at byte {at} is damaged ({' '.join(str(error).split())})") from None
    if page.level_bytes is None and levels:
        skipped = 4 + int.from_bytes(content[:4], "little")
    return page, content, skipped


def _plain(content: bytes, at: int, number: int) -> list[bytes]:
    """Return byte strings, each after its length in 4 bytes."""
    values = []
    for _ in range(number):
        (length,) = struct.unpack_from("<I", content, at)
        at += 4 + length
        if at > len(content):
            raise ValueError
        values.append(content[at - length : at])
    if at != len(content):
        raise ValueError
    return values


def _indices(content: bytes, at: int, number: int) -> NDArray[np.int64]:
    """Return the indices into a dictionary: their width in bits, then runs, either repeated or packed."""
    width = content[at]
    at += 1
    parts: list[NDArray[np.int64]] = []
    left = number
    while left > 0:
        header, at = _varint(content, at)
        if header & 1:
            count = 8 * (header >> 1)
            packed = np.frombuffer(content, np.uint8, (header >> 1) * width, at)
            at += len(packed)
            bits = np.unpackbits(packed, bitorder="little").reshape(count, width)
            part = bits.astype(np.int64) @ (1 << np.arange(width, dtype=np.int64))
        else:
            count = header >> 1
            value = int.from_bytes(content[at : at + (width + 7) // 8], "little")
            at += (width + 7) // 8
            part = np.full(min(count, left), value, np.int64)
        if count == 0:
            raise ValueError
        parts.append(part[:left])
        left -= len(parts[-1])
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


# --- Thrift's compact protocol: a value for each field, by its number ------------------------------------------------


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError


def _struct(content: bytes, at: int) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while (head := content[at]) != 0:
        at += 1
        if head >> 4:
            number += head >> 4
        else:
            zigzag, at = _varint(content, at)
            number = (zigzag >> 1) ^ -(zigzag & 1)
        kind = head & 15
        if kind in (1, 2):
            fields[number] = kind == 1
        else:
            fields[number], at = _value(content, at, kind)
    return fields, at + 1


def _value(content: bytes, at: int, kind: int) -> tuple[Any, int]:
    if kind in (4, 5, 6):
        zigzag, at = _varint(content, at)
        return (zigzag >> 1) ^ -(zigzag & 1), at
    if kind in (1, 2, 3):  # a boolean inside a list takes a byte
        return content[at], at + 1
    if kind == 7:
        return None, at + 8
    if kind == 8:
        length, at = _varint(content, at)
        if at + length > len(content):
            raise IndexError
        return None, at + length  # no text of a header is needed
    if kind in (9, 10):
        head, at = content[at], at + 1
        count = head >> 4
        if count == 15:
            count, at = _varint(content, at)
        for _ in range(count):
            _, at = _value(content, at, head & 15)
        return None, at
    if kind == 12:
        return _struct(content, at)
    raise ValueError  # a map: no header has one
