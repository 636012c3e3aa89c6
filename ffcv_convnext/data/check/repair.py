"""Damaged pages of a .beton made anew from the original files.

A conversion is deterministic, so a page that is encoded again has the bytes it had. Its checksum in the manifest
proves it before anything is written; a page that comes out different, since a library or a file has changed, is left.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_convnext.data.beton import JPG, Manifest
from ffcv_convnext.data.beton.tables import Tables, damaged_pages, find_betons, read_tables
from ffcv_convnext.data.convert.encode import Encoding, ImageError, encode_content


@dataclass(frozen=True, slots=True)
class RepairedPage:
    """What became of a damaged page."""

    beton: str
    page: int
    reason: str | None  # why it could not be repaired; none: it is whole again

    def format(self) -> str:
        outcome = f"left as it is: {self.reason}" if self.reason else "repaired from the original files"
        return f"{self.beton}: page {self.page} {outcome}"


def repair_data(path: Path, num_workers: int) -> list[RepairedPage]:
    """Repair the damaged pages of a .beton file, or of train.beton and val.beton of a folder, in place.

    num_workers: threads that compare pages with their checksums.
    Raises ValueError or FileNotFoundError for a file without a usable manifest, or whose tables are damaged too: then
    nobody knows what its pages held.
    """
    return [each for beton in find_betons(path) for each in _repair_file(beton, num_workers)]


def _repair_file(beton: Path, num_workers: int) -> list[RepairedPage]:
    manifest = Manifest.check(beton)
    tables = read_tables(beton)
    damaged = damaged_pages(tables, manifest.page_crc32, num_workers)
    if not damaged:
        return []
    files = manifest.original_files(beton)
    repaired = []
    num_pages = len(manifest.page_crc32)
    with open(beton, "r+b", buffering=0) as file:
        for page in damaged:
            content = _make_page(page, manifest, tables, files)
            if isinstance(content, bytes):
                os.pwrite(file.fileno(), content, tables.page_start(page, num_pages))
                os.fsync(file.fileno())
            repaired.append(RepairedPage(str(beton), page, content if isinstance(content, str) else None))
    return repaired


def _make_page(page: int, manifest: Manifest, tables: Tables, files: list[str] | None) -> bytes | str:
    """The page's bytes, or the reason why they cannot be had."""
    if files is None:
        return "the list of original files is missing or damaged"
    encoding = Encoding(
        max_resolution=manifest.max_resolution,
        jpeg_quality=manifest.jpeg_quality,
        subsampling=manifest.subsampling,
        max_bytes=tables.page_size,
    )
    content = np.zeros(tables.page_size, np.uint8)
    num_pages = len(manifest.page_crc32)
    begin, inside = tables.page_start(page, num_pages), tables.samples_in_page(page, num_pages)
    for sample in inside.tolist():
        original = Path(manifest.source) / files[sample]
        try:
            image = encode_content(original.read_bytes(), encoding, compress=int(tables.modes[sample]) == JPG)
        except (OSError, ImageError) as error:
            return f"{original}: {getattr(error, 'strerror', None) or error}"
        at, length = int(tables.addresses[sample]) - begin, int(tables.lengths[sample])
        if len(image.data) != length:
            return f"{original} is not what sample {sample} was made from, or was encoded by another version"
        content[at : at + length] = np.frombuffer(image.data, np.uint8)
    if zlib.crc32(content.tobytes()) != manifest.page_crc32[page]:
        return f"made from its {len(inside)} files it comes out different: one has changed, or a library that encodes"
    return content.tobytes()
