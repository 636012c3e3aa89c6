"""FFCV's DatasetWriter, fed with finished pictures from one process.

Stock `DatasetWriter` lets its workers share a file, a sample table in shared memory and a page counter, and waits
for ever once one of them raises or dies. Here workers only compute (workers.py); this process alone writes. So
a full disk is an exception where it happens, an image can be left out, nothing lies in shared memory, and the
file has the same bytes for any number of workers. The format stays FFCV's own: its Loader and decoders read it.

A page that is written is never touched again, so a conversion can stop after any page and go on from there.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from errno import EINTR
from pathlib import Path
from types import SimpleNamespace, TracebackType
from typing import Any

import numpy as np

from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.convert.encode import EncodedImage, Encoding
from ffcv_convnext.data.convert.journal import Page, Row

with importing_ffcv():
    from ffcv.fields import IntField, RGBImageField
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.types import ALLOC_TABLE_TYPE
    from ffcv.writer import DatasetWriter

_MODES = {mode: int(IMAGE_MODES[mode]) for mode in ("jpg", "raw")}


class _Pages:
    """The part of the file where pictures lie: in pages of one size, a picture never across two of them.

    Laid out as by FFCV's MemoryAllocator. That one ignores short writes, so a disk that fills up inside a page leaves a
    damaged file in silence; here every byte is written, or an OSError says why not.
    """

    def __init__(self, path: str, start: int, page_size: int, first: int, written: Callable[[int], None]) -> None:
        """start: where the tables before the pages end.   first: number of the first page to write.
        written: gets the CRC of each page once it is on the disk."""
        self.path = path
        self.page_size = page_size
        self.start = -(-start // page_size) * page_size
        self.number = first
        self.page = bytearray(page_size)
        self.used = 0  # bytes of the page in work
        self.written = written

    def __enter__(self) -> _Pages:
        self.file = open(self.path, "r+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None and self.used:
                self._flush()
        finally:
            self.file.close()

    def append(self, data: bytes) -> int:
        """The address at which the data will lie; it is at most a page long."""
        if self.used + len(data) > self.page_size:
            self._flush()
        address = self.num_bytes
        self.page[self.used : self.used + len(data)] = data
        self.used += len(data)
        return address

    def _flush(self) -> None:
        self.file.seek(self.start + self.number * self.page_size)
        rest = memoryview(self.page)
        while rest:
            rest = rest[self.file.write(rest) :]
        self.number += 1
        self.used = 0
        self.written(zlib.crc32(self.page))
        self.page = bytearray(self.page_size)

    @property
    def num_bytes(self) -> int:
        """Size of the file up to the end of the last picture."""
        return self.start + self.number * self.page_size + self.used


class BetonWriter(DatasetWriter):  # type: ignore[misc]
    """A .beton with the fields `image` (JPEG or raw) and `label`, in this order.

    capacity: at least the number of samples to come; room for the sample table is made before the first one
    arrives. What is left of it lies unused before the first page, which the absolute addresses in the file allow.
    """

    def __init__(self, path: Path, encoding: Encoding, capacity: int) -> None:
        fields = {
            "image": RGBImageField(
                write_mode="jpg", max_resolution=encoding.max_resolution, jpeg_quality=encoding.quality
            ),
            "label": IntField(),
        }
        super().__init__(str(path), fields, page_size=encoding.max_bytes, num_workers=1)
        self.num_bytes = 0  # written so far
        self.num_samples = capacity
        self.pages: list[Page] = []  # on the disk
        self.metadata_sm: Any  # the name `prepare` and `finalize` share
        head = path.with_name("head")
        self.fname = str(head)  # `prepare` empties the file it writes to, which may hold pages already
        self.prepare()
        self.fname = str(path)
        self.metadata_sm.close()
        self.metadata_sm.unlink()  # /dev/shm is 64 MB in a default container, too small for 3 million samples
        with open(path, "r+b" if path.exists() else "w+b") as file:
            file.write(head.read_bytes())
        head.unlink()

    def keep_pages(self, pages: Sequence[Page]) -> int:
        """Go on after these pages, which an earlier writer of the same capacity left in the file, as far as they are
        whole. Returns how many are."""
        with open(self.fname, "rb") as file:
            file.seek(self._pages(lambda _crc32: None).start)
            for page in pages:
                if zlib.crc32(file.read(self.page_size)) != page.crc32:  # power failed before it reached the disk
                    break
                self.pages.append(page)
        return len(self.pages)

    def _pages(self, written: Callable[[int], None]) -> _Pages:
        return _Pages(self.fname, self.data_region_start, self.page_size, len(self.pages), written)

    def write(self, samples: Iterable[tuple[EncodedImage, int]], on_page: Callable[[Page], None]) -> int:
        """Write (picture, label) pairs in their order, sync the file to the disk, and return how many samples it has.

        on_page: called after each page that was written; a sample that it lacks has not been asked for, or is the last
        one that was.   Raises OSError when the file cannot be written.
        """
        rows: list[Row] = []  # of the page in work

        def written(crc32: int) -> None:
            nonlocal rows
            self.pages.append(Page(crc32, rows))
            rows = []
            on_page(self.pages[-1])

        with self._pages(written) as pages:
            for image, label in samples:
                pages.append(image.data)
                rows.append((_MODES[image.mode], image.width, image.height, label, len(image.data)))
                self.num_bytes = pages.num_bytes
        allocations = []
        table = np.zeros(self.num_samples, dtype=self.metadata_type)
        images, labels = (table[name] for name in self.metadata_type.names)
        number = 0
        for index, page in enumerate(self.pages):
            address = pages.start + index * self.page_size
            for mode, width, height, label, size in page.rows:
                images[number], labels[number] = (mode, width, height, address), label
                allocations.append((number, address, size))
                address += size
                number += 1
        self.header["num_samples"] = number
        self.metadata_sm = SimpleNamespace(buf=table[:number].tobytes())  # where the stock finalize looks for it
        os.truncate(self.fname, pages.start + len(self.pages) * self.page_size)  # of an earlier, longer attempt
        self.finalize(allocations)
        table_bytes = os.path.getsize(self.fname) - int(self.header["alloc_table_ptr"])
        if table_bytes != number * ALLOC_TABLE_TYPE.itemsize:  # stock finalize swallows whatever is raised in it
            raise InterruptedError(EINTR, "interrupted while writing the allocation table")
        with open(self.fname, "rb") as file:
            os.fsync(file.fileno())
        self.num_bytes = os.path.getsize(self.fname)
        return number
