"""Repair of damaged pages of a .beton from the original image files.

A conversion is deterministic, so encoding the images of a page again gives the same bytes. A page is written only if
it matches the checksum in the manifest; if a library or a file has changed since, it does not match.
"""

from __future__ import annotations

import os
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ffcv_convnext.data.beton import CONVERT_AGAIN, JPG, Manifest
from ffcv_convnext.data.beton.tables import Tables, damaged_pages, find_betons, read_tables
from ffcv_convnext.data.check.manifests import read_original_files
from ffcv_convnext.data.convert.encode import Encoding, ImageError, encode_content
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.open_sources import reopen
from ffcv_convnext.data.convert.source import ImageFolder, Source


@dataclass(frozen=True, slots=True)
class RepairedPage:
    """The outcome for one damaged page."""

    beton: str
    page: int
    reason: str | None  # why it could not be repaired; None: it is repaired

    def format(self) -> str:
        """Return one line of text."""
        outcome = f"not repaired: {self.reason}" if self.reason else "repaired from the original files"
        return f"{self.beton}: page {self.page} {outcome}"


def repair_data(path: Path, num_workers: int) -> list[RepairedPage]:
    """Repair the damaged pages of a .beton file, or of train.beton and val.beton of a folder, in place.

    num_workers: threads that compare pages with their checksums.
    Raises ValueError or FileNotFoundError for a file without a usable manifest or with damaged tables: the content of
    its pages is then not known.
    """
    return [each for beton in find_betons(path) for each in _repair_file(beton, num_workers)]


def _repair_file(beton: Path, num_workers: int) -> list[RepairedPage]:
    manifest = Manifest.check(beton)
    tables = read_tables(beton)
    damaged = damaged_pages(tables, manifest.page_crc32, num_workers)
    if not damaged:
        return []
    num_pages = len(manifest.page_crc32)
    if not tables.in_pages.all():
        raise ValueError(f"{beton}: its tables are damaged, so its pages cannot be repaired; {CONVERT_AGAIN}")
    files, _ = read_original_files(beton, manifest)
    originals = _open_originals(Path(manifest.source), manifest, files) if files else None
    repaired = []
    with open(beton, "r+b", buffering=0) as file:
        for page in damaged:
            start, samples = tables.page_start(page, num_pages), tables.samples_in_page(page, num_pages)
            content = _encode_page(start, samples.tolist(), manifest.page_crc32[page], manifest, tables, originals)
            if isinstance(content, bytes):
                os.pwrite(file.fileno(), content, start)
                os.fsync(file.fileno())
            repaired.append(RepairedPage(str(beton), page, content if isinstance(content, str) else None))
    return repaired


def _open_originals(source: Path, manifest: Manifest, files: Names) -> Source:
    """Return the images of `files` in the folder or the archives that the .beton was made from."""
    again = reopen(manifest, files)
    if again is not None:
        return again
    return ImageFolder(source, manifest.classes, files, labels=np.zeros(len(files), np.int32))


def _encode_page(
    start: int, samples: list[int], crc32: int, manifest: Manifest, tables: Tables, originals: Source | None
) -> bytes | str:
    """Return the bytes of the page at `start` with these samples, or why the original files do not give them."""
    if originals is None:
        return "the list of original files is missing or damaged"
    encoding = Encoding(
        max_resolution=manifest.max_resolution,
        jpeg_quality=manifest.jpeg_quality,
        subsampling=manifest.subsampling,
        max_bytes=tables.page_size,
    )
    content = np.zeros(tables.page_size, np.uint8)
    for sample in samples:
        original = originals.location / originals.name(sample)
        try:
            image = encode_content(originals.read(sample), encoding, compress=int(tables.modes[sample]) == JPG)
        except (OSError, ImageError) as error:
            return f"{original}: {getattr(error, 'strerror', None) or error}"
        at, length = int(tables.addresses[sample]) - start, int(tables.lengths[sample])
        if len(image.data) != length:
            return f"{original} has changed since sample {sample} was made from it, or a library that encodes has"
        content[at : at + length] = np.frombuffer(image.data, np.uint8)
    if zlib.crc32(content.tobytes()) != crc32:
        return f"its {len(samples)} original files now give other bytes: one has changed, or a library that encodes"
    return content.tobytes()
