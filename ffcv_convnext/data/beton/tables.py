"""A .beton's tables as arrays, read without trusting them: for checking a file, not for loading from it.

FFCV's Reader trusts the header. Here every address is compared with the file's size first, and image and label are
found by their field type, so that a file of stock FFCV with other field names can be checked too.
"""

from __future__ import annotations

import mmap
import os
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton.layout import (
    ALLOCATION,
    CONVERT_AGAIN,
    FIELD,
    FIELD_TYPES,
    HEADER,
    IMAGE,
    LABEL,
    VERSION,
    read_header,
)

UNKNOWN = -1  # as a length or an owner: the allocation table has no entry for the sample's address
SPLITS = ("train", "val")
ROWS = 1 << 16  # of a table that are handled at once, which bounds the memory
_PAGES = 16  # pages for a thread


class UnreadableTables(ValueError):
    """A file without a usable header: nothing is known about its samples."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a .beton states about its n samples. Only the position of the tables has been checked."""

    path: Path
    num_bytes: int
    fields: tuple[str, ...]
    page_size: int  # bytes; FFCV writes no image that is larger than a page
    pages_start: int  # where the sample table ends; pages begin here or later
    pages_end: int  # where the allocation table begins
    num_allocations: int  # whole entries of that table
    modes: NDArray[np.uint8]  # (n,) JPG, RAW or an unknown number
    widths: NDArray[np.int32]  # (n,) pixels
    heights: NDArray[np.int32]
    labels: NDArray[np.int64] | None  # (n,); None: the file has no integer field
    addresses: NDArray[np.int64]  # (n,) first byte of the stored image
    lengths: NDArray[np.int64]  # (n,) bytes of the stored image, or UNKNOWN
    owners: NDArray[np.int64]  # (n,) the sample that the allocation table gives for that address, or UNKNOWN

    def __len__(self) -> int:
        return len(self.modes)

    @property
    def in_pages(self) -> NDArray[np.bool_]:
        """(n,) whether a sample's data lies between the first page and the allocation table."""
        inside = (self.addresses >= self.pages_start) & (self.addresses <= self.pages_end)
        inside &= (self.lengths > 0) & (self.lengths <= self.pages_end - self.addresses)
        return inside & (self.lengths <= self.page_size)

    def in_order_of_file(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return ascending `samples` by their addresses."""
        addresses = self.addresses if len(samples) == len(self) else self.addresses[samples]
        if _ascend(addresses):  # as our own writer leaves them
            return samples
        return samples[np.argsort(addresses, kind="stable")]

    def page_start(self, page: int, num_pages: int) -> int:
        """Return the address of a page (from 0) in a file of `num_pages` pages.

        Pages end where the allocation table begins; before the first one there may be unused bytes.
        """
        return self.pages_end - (num_pages - page) * self.page_size

    def samples_in_page(self, page: int, num_pages: int) -> NDArray[np.int64]:
        """Return the samples whose data begins in a page."""
        start = self.page_start(page, num_pages)
        offsets = self.addresses - start
        inside: NDArray[np.int64] = np.flatnonzero((offsets >= 0) & (offsets < self.page_size))
        return inside


@dataclass(frozen=True, slots=True)
class RawTables:
    """A .beton's tables as they are stored; their sizes have been checked, their values have not.

    Mapped ones are shared by all processes of a machine; if their disk fails, it kills the process (SIGBUS).
    """

    num_bytes: int  # of the file
    fields: tuple[str, ...]
    page_size: int
    pages_start: int  # where the sample table ends
    pages_end: int  # where the allocation table begins, if the file is long enough
    rows: NDArray[Any]  # (n,) a row of each sample, read-only
    image: str  # names in `rows`
    label: str | None
    allocations: NDArray[Any]  # (m,) ALLOCATION, whole entries, read-only


class _Places(NamedTuple):
    """Where the tables of a .beton are."""

    num_bytes: int  # of the file
    fields: tuple[str, ...]
    page_size: int
    row_type: np.dtype[Any]
    start: int  # of the sample table
    num_samples: int
    pages_start: int
    pages_end: int
    num_allocations: int
    image: str
    label: str | None


def read_raw_tables(beton: Path, *, mapped: bool = False) -> RawTables:
    """Read or map the tables of a .beton. Raises UnreadableTables if the file has no usable header or no images."""
    places, take = _find_tables(beton), _map if mapped else _read
    return RawTables(
        num_bytes=places.num_bytes,
        fields=places.fields,
        page_size=places.page_size,
        pages_start=places.pages_start,
        pages_end=places.pages_end,
        rows=take(beton, places.row_type, places.num_samples, places.start),
        image=places.image,
        label=places.label,
        allocations=take(beton, ALLOCATION, places.num_allocations, places.pages_end),
    )


def _find_tables(beton: Path) -> _Places:
    num_bytes = beton.stat().st_size
    if num_bytes < HEADER.itemsize:
        raise UnreadableTables(f"{beton} has {num_bytes} bytes, less than a header: not an FFCV file; {CONVERT_AGAIN}")
    header = read_header(beton)
    if header["version"] != VERSION:
        raise UnreadableTables(
            f"{beton} does not begin with FFCV's version number {VERSION} (found {header['version']}): "
            f"not an FFCV file, or damaged; {CONVERT_AGAIN}"
        )
    names, row_type, start = _fields(beton, int(header["num_fields"]), num_bytes)
    num_samples, pages_end = int(header["num_samples"]), int(header["alloc_table_ptr"])
    pages_start = start + num_samples * row_type.itemsize
    if not pages_start <= min(pages_end, num_bytes) or not header["page_size"]:
        raise UnreadableTables(
            f"{beton}: a table of {num_samples} samples and pages of {header['page_size']} bytes do not fit into the "
            f"file ({num_bytes} bytes): truncated or a damaged header; copy it again, or {CONVERT_AGAIN}"
        )
    image, label = (next((f"f{i}" for i in range(len(names)) if row_type[i] == kind), None) for kind in (IMAGE, LABEL))
    if image is None:
        raise UnreadableTables(
            f"{beton} has no images, only {', '.join(names)}; write image, label with write_ffcv_dataset.py"
        )
    return _Places(
        num_bytes=num_bytes,
        fields=names,
        page_size=int(header["page_size"]),
        row_type=row_type,
        start=start,
        num_samples=num_samples,
        pages_start=pages_start,
        pages_end=pages_end,
        num_allocations=max(0, num_bytes - pages_end) // ALLOCATION.itemsize,
        image=image,
        label=label,
    )


def _ascend(values: NDArray[np.int64], steps: int = 0) -> bool:
    """Return whether each value is the one before it plus `steps`, or larger."""
    parts = (values[start : start + ROWS + 1] for start in range(0, len(values), ROWS))
    return not any((part[1:] < part[:-1] + steps).any() for part in parts)


def _blocks(beton: Path, row_type: np.dtype[Any], num_rows: int, start: int) -> Iterator[tuple[slice, NDArray[Any]]]:
    """Yield the rows of a table in parts, each with its place in the table."""
    with open(beton, "rb") as file:
        file.seek(start)
        for first in range(0, num_rows, ROWS):
            number = min(ROWS, num_rows - first)
            yield slice(first, first + number), np.fromfile(file, row_type, number)


def _read(beton: Path, row_type: np.dtype[Any], num_rows: int, start: int) -> NDArray[Any]:
    rows = np.fromfile(beton, row_type, num_rows, offset=start if num_rows else 0)
    rows.setflags(write=False)
    return rows


def _map(beton: Path, row_type: np.dtype[Any], num_rows: int, start: int) -> NDArray[Any]:
    """Map rows. They are read at once; if they are evicted, only what is used is read again, not what is around it."""
    if not num_rows:
        return _read(beton, row_type, 0, 0)
    before = start % mmap.ALLOCATIONGRANULARITY
    with open(beton, "rb") as file:
        num_bytes = num_rows * row_type.itemsize
        os.posix_fadvise(file.fileno(), start, num_bytes, os.POSIX_FADV_WILLNEED)
        mapping = mmap.mmap(file.fileno(), before + num_bytes, access=mmap.ACCESS_READ, offset=start - before)
    mapping.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(mapping, row_type, num_rows, offset=before)


def read_tables(beton: Path) -> Tables:
    """Read the tables of a .beton; takes 41 bytes a sample.

    Samples that are missing in a truncated allocation table have the length UNKNOWN.   Raises UnreadableTables, a
    ValueError of one line, if the file has no usable header or no images.
    """
    places = _find_tables(beton)
    number = places.num_samples
    modes, widths, heights = np.empty(number, np.uint8), np.empty(number, np.int32), np.empty(number, np.int32)
    addresses = np.empty(number, np.int64)
    labels = None if places.label is None else np.empty(number, np.int64)
    for part, rows in _blocks(beton, places.row_type, number, places.start):
        images = rows[places.image]
        modes[part], widths[part], heights[part] = images["mode"], images["width"], images["height"]
        addresses[part] = images["data_ptr"].view(np.int64)  # from 2**63 on negative: outside the file in either case
        if labels is not None:
            labels[part] = rows[places.label]
    lengths, owners = _read_allocations(beton, places, addresses)
    return Tables(
        path=beton,
        num_bytes=places.num_bytes,
        fields=places.fields,
        page_size=places.page_size,
        pages_start=places.pages_start,
        pages_end=min(places.pages_end, places.num_bytes),
        num_allocations=places.num_allocations,
        modes=modes,
        widths=widths,
        heights=heights,
        labels=labels,
        addresses=addresses,
        lengths=lengths,
        owners=owners,
    )


def _read_allocations(
    beton: Path, places: _Places, addresses: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return length and owner of the data at each address."""
    number = places.num_samples
    lengths, owners = np.full(number, UNKNOWN), np.full(number, UNKNOWN)

    def store(part: Any, rows: NDArray[Any]) -> None:
        lengths[part], owners[part] = (np.minimum(rows[name], 1 << 62) for name in ("size", "sample_id"))

    if places.num_allocations == number:
        for part, rows in _blocks(beton, ALLOCATION, number, places.pages_end):
            if not np.array_equal(rows["ptr"].view(np.int64), addresses[part]):
                break
            store(part, rows)
        else:  # sample i is allocation i, as our own writer leaves them
            if _ascend(addresses, steps=1):
                return lengths, owners
    table = _read(beton, ALLOCATION, places.num_allocations, places.pages_end)
    table = table[np.argsort(table["ptr"], kind="stable")]
    lengths[:], owners[:] = UNKNOWN, UNKNOWN
    for start in range(0, number, ROWS):
        wanted = addresses[start : start + ROWS].view(np.uint64)
        entries = np.searchsorted(table["ptr"], wanted)
        known = entries < len(table)
        known[known] = table["ptr"][entries[known]] == wanted[known]
        store(start + np.flatnonzero(known), table[entries[known]])
    return lengths, owners


def _fields(beton: Path, num_fields: int, num_bytes: int) -> tuple[tuple[str, ...], np.dtype[Any], int]:
    """Return the fields' names, the dtype of a row of the sample table, and the table's address."""
    start = HEADER.itemsize + num_fields * FIELD.itemsize
    if not num_fields or start > num_bytes:
        raise UnreadableTables(
            f"{beton}: {num_fields} field descriptors do not fit into the file: damaged; {CONVERT_AGAIN}"
        )
    descriptors = np.fromfile(beton, FIELD, num_fields, offset=HEADER.itemsize)
    words = (bytes(name).split(b"\0")[0].decode("latin-1") for name in descriptors["name"])
    names = tuple(word.encode("unicode_escape").decode() for word in words)  # without line breaks
    try:
        row_type = _row_type(descriptors)
    except Exception as error:  # FFCV raises anything on broken or custom descriptors
        raise UnreadableTables(
            f"{beton}: the fields {', '.join(names)} cannot be read ({type(error).__name__}): damaged, or of a custom "
            "type; write image, label with write_ffcv_dataset.py"
        ) from None
    return names, row_type, start


def _row_type(descriptors: NDArray[Any]) -> np.dtype[Any]:
    """Return the dtype of a row of the sample table. Imports ffcv, which takes seconds, for its rarer fields only."""
    type_ids = descriptors["type_id"].tolist()
    if set(type_ids) <= FIELD_TYPES.keys():
        return np.dtype([("", FIELD_TYPES[type_id]) for type_id in type_ids], align=True)
    from ffcv_convnext.data.beton.ffcv_import import importing_ffcv

    with importing_ffcv():
        from ffcv.types import get_handlers, get_metadata_type
    row_type: np.dtype[Any] = get_metadata_type(get_handlers(descriptors))
    return row_type


def damaged_pages(tables: Tables, page_crc32: Sequence[int], num_workers: int = 1) -> list[int]:
    """Return the numbers of the pages, from 0, whose bytes differ from the manifest's checksums. Reads all pages."""
    num_pages = len(page_crc32)

    def crc32(page: int) -> int:
        return zlib.crc32(os.pread(file.fileno(), tables.page_size, tables.page_start(page, num_pages)))

    def damaged(first: int) -> list[int]:
        return [page for page in range(first, min(first + _PAGES, num_pages)) if crc32(page) != page_crc32[page]]

    with open(tables.path, "rb") as file, ThreadPoolExecutor(num_workers, thread_name_prefix="verify") as pool:
        return [page for pages in pool.map(damaged, range(0, num_pages, _PAGES)) for page in pages]


def find_betons(path: Path) -> list[Path]:
    """Return the .beton at `path`, or train.beton and val.beton of the folder; at least one of them exists.

    A .beton that is missing although its manifest exists is included.   Raises FileNotFoundError if there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise FileNotFoundError(f"{path} does not exist; give a folder with train.beton or val.beton, or a .beton file")
    betons = [path / f"{split}.beton" for split in SPLITS]
    found = [beton for beton in betons if beton.is_file() or beton.with_suffix(".json").is_file()]
    if not any(beton.is_file() for beton in found):
        raise FileNotFoundError(
            f"{path} holds neither train.beton nor val.beton; create them with: "
            f"python write_ffcv_dataset.py --data_path IMAGENET --out_dir {path}"
        )
    return found


def shown(text: str) -> str:
    """Return text that any UTF-8 terminal can print: other bytes of a file name become escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
