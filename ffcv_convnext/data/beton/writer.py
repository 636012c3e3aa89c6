"""Write a .beton file from encoded images, in one process.

FFCV's DatasetWriter lets its workers share the file, a sample table in shared memory and a page counter; it waits
forever if one of them fails, and ignores short writes. Here workers only encode (data/convert) and this process alone
writes: a full disk is an exception where it happens, an image can be left out, nothing lies in shared memory, and the
file has the same bytes for any number of workers. Stock FFCV reads the result.

A written page is never touched again, so a conversion can stop after any page and continue from there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.beton.layout import ALLOCATION, FIELD, HEADER, MODES, ROW, VERSION, EncodedImage, Page, Row

with importing_ffcv():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.types import TYPE_ID_HANDLER, get_metadata_type


class ImageSettings(Protocol):
    """What a file's field descriptor and page size depend on."""

    @property
    def max_resolution(self) -> int | None:
        """Longest side in pixels."""

    @property
    def quality(self) -> int:
        """JPEG quality, 1 to 100."""

    @property
    def max_bytes(self) -> int:
        """Page size; no image is larger."""


class BetonWriter:
    """A .beton with the fields `image` (JPEG or raw pixels) and `label`, in this order.

    capacity: at least the number of samples to come. The sample table lies before the first page, so room for it is
    made first; what the samples don't use stays empty, which the absolute addresses in the file allow.
    """

    def __init__(self, path: Path, settings: ImageSettings, capacity: int) -> None:
        image = RGBImageField(write_mode="jpg", max_resolution=settings.max_resolution, jpeg_quality=settings.quality)
        fields = {"image": image, "label": IntField()}
        self.path = path
        self.page_size = settings.max_bytes
        self.row_type: np.dtype[Any] = get_metadata_type(list(fields.values()))
        self.descriptors = np.zeros(len(fields), FIELD)
        type_ids = {handler: number for number, handler in TYPE_ID_HANDLER.items()}
        for descriptor, (name, field) in zip(self.descriptors, fields.items(), strict=True):
            descriptor["type_id"] = type_ids[type(field)]
            descriptor["name"][: len(name)] = np.frombuffer(name.encode(), np.uint8)
            descriptor["arguments"][:] = field.to_binary()[0]
        self.table_start = HEADER.itemsize + self.descriptors.nbytes
        tables_end: int = self.table_start + capacity * self.row_type.itemsize
        self.pages_start = -(-tables_end // self.page_size) * self.page_size
        self.pages: list[Page] = []  # on the disk
        self.num_bytes = self.pages_start  # up to the end of the last image

    def keep_pages(self, pages: Sequence[Page]) -> int:
        """Continue after pages that an earlier writer of this capacity left in the file; return how many are whole."""
        if not self.path.exists():  # e.g. lost in a power failure
            return 0
        with open(self.path, "rb") as file:
            file.seek(self.pages_start)
            for page in pages:
                if zlib.crc32(file.read(self.page_size)) != page.crc32:  # power failed before it reached the disk
                    break
                self.pages.append(page)
        self.num_bytes = self._page_start(len(self.pages))
        return len(self.pages)

    def write(self, samples: Iterable[tuple[EncodedImage, int]], on_page: Callable[[Page], None]) -> int:
        """Write (image, label) pairs in their order, sync the file to the disk, and return the number of samples in it.

        on_page: called after each written page. At that moment all samples of the page have been taken from `samples`,
        and at most one more.   Raises OSError if the file cannot be written.
        """
        with open(self.path, "r+b" if self.path.exists() else "w+b", buffering=0) as file:
            page, used, rows = bytearray(self.page_size), 0, list[Row]()

            def finish_page() -> None:
                nonlocal page, used, rows
                _write_at(file.fileno(), page, self._page_start(len(self.pages)))
                self.pages.append(Page(zlib.crc32(page), np.array(rows, ROW)))
                page, used, rows = bytearray(self.page_size), 0, []
                on_page(self.pages[-1])

            for image, label in samples:
                if used + len(image.data) > self.page_size:
                    finish_page()
                page[used : used + len(image.data)] = image.data
                used += len(image.data)
                rows.append((MODES[image.mode], image.width, image.height, label, len(image.data)))
                self.num_bytes = self._page_start(len(self.pages)) + used
            if used:
                finish_page()
            number = self._write_tables(file.fileno())
            os.fsync(file.fileno())
        self.num_bytes = self.path.stat().st_size
        return number

    def _page_start(self, number: int) -> int:
        return self.pages_start + number * self.page_size

    def _write_tables(self, descriptor: int) -> int:
        """Write everything but the pages, the header last; return the number of samples."""
        end = self._page_start(len(self.pages))
        os.truncate(descriptor, end)  # an earlier, longer attempt may have written more
        _write_at(descriptor, self.descriptors.tobytes(), HEADER.itemsize)
        sample = 0
        for index, page in enumerate(self.pages):
            number = len(page.rows)
            table, allocations = np.zeros(number, self.row_type), np.zeros(number, ALLOCATION)
            images, labels = (table[name] for name in self.row_type.names or ())
            for name in ("mode", "width", "height"):
                images[name] = page.rows[name]
            labels[:] = page.rows["label"]
            allocations["sample_id"] = np.arange(sample, sample + number)
            allocations["size"] = page.rows["size"]
            ends = np.cumsum(allocations["size"], dtype=np.uint64)
            images["data_ptr"] = allocations["ptr"] = ends - allocations["size"] + np.uint64(self._page_start(index))
            _write_at(descriptor, allocations.tobytes(), end + sample * ALLOCATION.itemsize)
            _write_at(descriptor, table.tobytes(), self.table_start + sample * self.row_type.itemsize)
            sample += number
        header = np.array([(VERSION, len(self.descriptors), self.page_size, sample, end)], HEADER)
        _write_at(descriptor, header.tobytes(), 0)
        return sample


def _write_at(descriptor: int, content: bytes | bytearray, address: int) -> None:
    """Write all of `content`; a single write may be short. Raises OSError."""
    rest = memoryview(content)
    while rest:
        written = os.pwrite(descriptor, rest, address)
        rest, address = rest[written:], address + written
