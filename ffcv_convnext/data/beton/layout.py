"""Layout of a .beton file, FFCV 1.0.2's format. Imports neither ffcv nor torch.

    header | field descriptors | sample table | (unused) | page 0 | page 1 | ... | allocation table

A sample's image lies inside one page; its row in the sample table holds the address. The allocation table lists
(sample, address, size) for every image. The dtypes are FFCV's own (ffcv/types.py; a test compares them), declared
here so that a file can be checked without importing ffcv.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

VERSION = 2  # of the format
HEADER = np.dtype(
    [
        ("version", "<u2"),
        ("num_fields", "<u2"),
        ("page_size", "<u4"),
        ("num_samples", "<u8"),
        ("alloc_table_ptr", "<u8"),
    ],
    align=True,
)
FIELD = np.dtype([("type_id", "<u1"), ("name", ("<u1", 16)), ("arguments", ("<u1", (1024,)))], align=True)
ALLOCATION = np.dtype([("sample_id", "<u8"), ("ptr", "<u8"), ("size", "<u8")])
LABEL = np.dtype("<i8")  # a sample's row in an integer field
IMAGE = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("data_ptr", "<u8")])  # ... in an image field
FIELD_TYPES = {0: np.dtype("<f8"), 1: LABEL, 2: IMAGE}  # by a descriptor's type_id; FFCV has further ones
JPG, RAW = 0, 1  # how an image is stored: a JPEG, or RGB pixels row by row
MODES = {"jpg": JPG, "raw": RAW}
_ROWS = 1 << 16  # of a table that are read at once
CONVERT_AGAIN = "convert it again with write_ffcv_dataset.py --overwrite"

Row = tuple[int, int, int, int, int]  # of a sample: mode, width, height, label, bytes
ROW = np.dtype([("mode", "<u1"), ("width", "<u2"), ("height", "<u2"), ("label", "<i8"), ("size", "<u4")])  # a Row


@dataclass(frozen=True, slots=True, eq=False)
class Page:
    """A page that was written."""

    crc32: int  # of its bytes, including the unused ones at its end
    rows: NDArray[Any]  # (samples,) ROW


class EncodedImage(NamedTuple):
    """An image as it lies in a .beton."""

    width: int
    height: int
    data: bytes  # a JPEG with restart markers, or RGB pixels row by row
    mode: Literal["jpg", "raw"]
    is_original: bool = False  # a JPEG with the coefficients of its file


def read_header(beton: Path) -> np.void:
    """Return the header, a HEADER scalar; missing bytes of a short file are zeros."""
    with open(beton, "rb") as file:
        content = file.read(HEADER.itemsize)
    header: np.void = np.frombuffer(content.ljust(HEADER.itemsize, b"\0"), dtype=HEADER)[0]
    return header


def check_header(beton: Path) -> None:
    """Raise ValueError if the file is not a .beton of FFCV's version, or holds no samples."""
    header = read_header(beton)
    if header["version"] != VERSION:
        raise ValueError(
            f"{beton} does not begin with FFCV's version number {VERSION} (found {header['version']}): not a .beton, "
            f"written by another FFCV, or damaged; {CONVERT_AGAIN}"
        )
    if header["num_samples"] == 0:
        raise ValueError(f"{beton} holds no samples: an unfinished conversion; {CONVERT_AGAIN}")


def first_address(beton: Path, table: int, num_samples: int) -> int:
    """Return the smallest address in the allocation table, which begins at the address `table`."""
    smallest = (1 << 64) - 1
    with open(beton, "rb") as file:
        file.seek(table)
        for start in range(0, num_samples, _ROWS):  # bounds the memory
            rows = np.fromfile(file, ALLOCATION, min(_ROWS, num_samples - start))
            smallest = min(smallest, int(rows["ptr"].min(initial=smallest)))
    return smallest


def tables_digest(beton: Path) -> str:
    """Return the SHA-256 of a .beton without its pages: header, field descriptors, sample table, allocation table.

    Page contents (the images) are not covered; their addresses and sizes are. For a file whose tables cannot be found
    the result is a text that equals no digest.
    """
    digest = hashlib.sha256()
    header = read_header(beton)
    table, num_samples = int(header["alloc_table_ptr"]), int(header["num_samples"])
    with open(beton, "rb") as file:
        if num_samples == 0 or table + num_samples * ALLOCATION.itemsize != beton.stat().st_size:
            return "no whole allocation table"
        first = min(first_address(beton, table, num_samples), table)  # of the images

        def add(num_bytes: int) -> None:
            while num_bytes and (piece := file.read(min(num_bytes, 1 << 20))):
                digest.update(piece)
                num_bytes -= len(piece)

        add(first)
        file.seek(table)
        add(num_samples * ALLOCATION.itemsize)
    return digest.hexdigest()


def table_sizes(beton: Path) -> tuple[int, int, int]:
    """Return the number of samples, the size of a page and the number of pages that a file with whole tables has."""
    header = read_header(beton)
    end, page_size = int(header["alloc_table_ptr"]), int(header["page_size"])
    num_bytes = end - first_address(
        beton, end, int(header["num_samples"])
    )  # the first page begins with the first image
    return int(header["num_samples"]), page_size, num_bytes // max(1, page_size)
