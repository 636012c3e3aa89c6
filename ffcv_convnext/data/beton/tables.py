"""A .beton's tables as arrays, read without trusting them; for looking at a file, not for loading from it.

FFCV's own Reader takes whatever the header says. Here every place is compared with the file's size first, and image
and label are found by their kind, so that a file of stock FFCV with other field names can be looked at too.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.beton.manifest import AGAIN

with importing_ffcv():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.types import ALLOC_TABLE_TYPE, CURRENT_VERSION, FieldDescType, HeaderType, get_handlers, get_metadata_type

JPG, RAW = int(IMAGE_MODES["jpg"]), int(IMAGE_MODES["raw"])
UNKNOWN = -1  # as a length or an owner: the allocation table has no entry for the sample's address
SPLITS = ("train", "val")


class UnreadableTables(ValueError):
    """A file whose header leads nowhere: nothing can be said about its samples."""


@dataclass(frozen=True, slots=True)
class Tables:
    """What a .beton says about its n samples. Nothing here is checked but that the tables lie in the file."""

    path: Path
    num_bytes: int
    fields: tuple[str, ...]
    page_size: int  # bytes; FFCV writes no image that is larger than a page
    pages_start: int  # where the sample table ends; pages begin here or behind it
    pages_end: int  # where the allocation table begins
    num_allocations: int  # whole entries of that table
    modes: NDArray[np.int64]  # (n,) JPG, RAW or something unknown
    widths: NDArray[np.int64]  # (n,) pixels
    heights: NDArray[np.int64]
    labels: NDArray[np.int64] | None  # (n,); none: no field of integers
    addresses: NDArray[np.int64]  # (n,) first byte of the stored image
    lengths: NDArray[np.int64]  # (n,) bytes of the stored image, or UNKNOWN
    owners: NDArray[np.int64]  # (n,) the sample to which the allocation table gives that data, or UNKNOWN

    def __len__(self) -> int:
        return len(self.modes)

    @property
    def in_pages(self) -> NDArray[np.bool_]:
        """(n,) whether a sample's data is known to lie where the pages are."""
        inside = (self.addresses >= self.pages_start) & (self.addresses <= self.pages_end)
        inside &= (self.lengths > 0) & (self.lengths <= self.pages_end - self.addresses)
        return inside & (self.lengths <= self.page_size)


def read_tables(beton: Path) -> Tables:
    """Raises UnreadableTables, a ValueError of one line, when the file has no usable header or no images.

    A cut-off allocation table is read as far as it goes; the samples that it lacks have the length UNKNOWN.
    """
    num_bytes = beton.stat().st_size
    if num_bytes < HeaderType.itemsize:
        raise UnreadableTables(f"{beton} has {num_bytes} bytes, less than a header: no FFCV file; {AGAIN}")
    header = np.fromfile(beton, HeaderType, 1)[0]
    if header["version"] != CURRENT_VERSION:
        raise UnreadableTables(
            f"{beton} does not begin with FFCV's version number {CURRENT_VERSION} (found {header['version']}): "
            f"no FFCV file, or a damaged one; {AGAIN}"
        )
    names, row_type, start = _fields(beton, int(header["num_fields"]), num_bytes)
    num_samples, pages_end = int(header["num_samples"]), int(header["alloc_table_ptr"])
    pages_start = start + num_samples * row_type.itemsize
    if not pages_start <= min(pages_end, num_bytes):
        raise UnreadableTables(
            f"{beton}: a table of {num_samples} samples does not fit into it ({num_bytes} bytes): cut off, or a "
            f"damaged header; copy it again, or {AGAIN}"
        )
    rows = np.fromfile(beton, row_type, num_samples, offset=start)
    image, label = (
        next((f"f{i}" for i in range(len(names)) if row_type[i] == kind().metadata_type), None)
        for kind in (RGBImageField, IntField)
    )
    if image is None:
        raise UnreadableTables(
            f"{beton} has no images, only {', '.join(names)}; write image, label with write_ffcv_dataset.py"
        )
    room = max(0, num_bytes - pages_end) // ALLOC_TABLE_TYPE.itemsize
    table = np.fromfile(beton, ALLOC_TABLE_TYPE, room, offset=pages_end if room else 0)
    table = table[np.argsort(table["ptr"], kind="stable")]
    wanted = rows[image]["data_ptr"]
    entries = np.searchsorted(table["ptr"], wanted)
    lengths, owners = np.full((2, num_samples), UNKNOWN)
    known = entries < len(table)
    known[known] = table["ptr"][entries[known]] == wanted[known]
    entries = entries[known]
    lengths[known], owners[known] = (np.minimum(table[name][entries], 1 << 62) for name in ("size", "sample_id"))
    return Tables(
        path=beton,
        num_bytes=num_bytes,
        fields=names,
        page_size=int(header["page_size"]),
        pages_start=pages_start,
        pages_end=min(pages_end, num_bytes),
        num_allocations=len(table),
        modes=rows[image]["mode"].astype(np.int64),
        widths=rows[image]["width"].astype(np.int64),
        heights=rows[image]["height"].astype(np.int64),
        labels=None if label is None else rows[label].astype(np.int64),
        addresses=wanted.astype(np.int64),  # from 2**63 on they become negative: outside either way
        lengths=lengths,
        owners=owners,
    )


def _fields(beton: Path, num_fields: int, num_bytes: int) -> tuple[tuple[str, ...], np.dtype[Any], int]:
    """The fields' names, the type of a row of the sample table, and where that table begins."""
    start = HeaderType.itemsize + num_fields * FieldDescType.itemsize
    if not num_fields or start > num_bytes:
        raise UnreadableTables(f"{beton}: {num_fields} field descriptors do not fit into it: damaged; {AGAIN}")
    descriptors = np.fromfile(beton, FieldDescType, num_fields, offset=HeaderType.itemsize)
    names = tuple(bytes(name).split(b"\0")[0].decode("ascii", "backslashreplace") for name in descriptors["name"])
    try:
        row_type = get_metadata_type(get_handlers(descriptors))
    except Exception as error:  # whatever a broken or custom descriptor makes FFCV stumble over
        raise UnreadableTables(
            f"{beton}: the fields {', '.join(names)} cannot be read ({type(error).__name__}): damaged, or of a kind "
            "of its own; write image, label with write_ffcv_dataset.py"
        ) from None
    return names, row_type, start


def damaged_pages(tables: Tables, page_crc32: Sequence[int], num_workers: int = 1) -> list[int]:
    """The numbers of the pages, from 0, whose bytes differ from what the manifest has of them; all are read."""
    start = tables.pages_end - len(page_crc32) * tables.page_size

    def crc32(page: int) -> int:
        return zlib.crc32(os.pread(file.fileno(), tables.page_size, start + page * tables.page_size))

    with open(tables.path, "rb") as file, ThreadPoolExecutor(num_workers, thread_name_prefix="verify") as pool:
        found = list(pool.map(crc32, range(len(page_crc32))))
    return [page for page, (here, stated) in enumerate(zip(found, page_crc32, strict=True)) if here != stated]


def find_betons(path: Path) -> list[Path]:
    """The .beton at `path`, or train.beton and val.beton of the folder; at least one of them exists.

    One that is missing while its manifest is there is named too. Raises FileNotFoundError when there is none.
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
    """Text that any terminal in UTF-8 can print: bytes of a file name that are not UTF-8 are written \\udc.."""
    return text.encode("utf-8", "backslashreplace").decode()
