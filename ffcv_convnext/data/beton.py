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
from ffcv.fields import IntField, RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.memory_allocator import MemoryAllocator
from ffcv.types import ALLOC_TABLE_TYPE
from ffcv.writer import DatasetWriter

from ffcv_convnext.data.images import EncodedImage, Encoding
from ffcv_convnext.data.workplace import Page, Row


class _Pages(MemoryAllocator):  # type: ignore[misc]
    """FFCV's allocator for a single writer: every byte of a page is written, or an OSError says why not.

    The stock one ignores short writes, so a disk that fills up inside a page leaves a damaged file in silence.
    """

    def __init__(self, path: str, start: int, page_size: int, first: int, written: Callable[[int], None]) -> None:
        """first: number of the first page to write.   written: gets the CRC of each page once it is on the disk."""
        super().__init__(path, start, page_size)
        self.next_page_allocated.value = first
        self.written = written

    def __enter__(self) -> _Pages:
        self.fp = open(self.fname, "r+b", buffering=0)
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        try:
            if kind is None:
                self.flush_page()
        finally:
            self.fp.close()

    def flush_page(self) -> None:
        if self.my_page < 0:
            return
        self.fp.seek(self.offset + self.my_page * self.page_size)
        rest = memoryview(self.page_data)
        while rest:
            rest = rest[self.fp.write(rest) :]
        self.written(zlib.crc32(self.page_data))

    @property
    def num_bytes(self) -> int:
        """Size of the file up to the end of the page in work."""
        return int(self.offset + (self.my_page + 1) * self.page_size)


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
        start = _Pages(self.fname, self.data_region_start, self.page_size, 0, self._no_page).offset
        with open(self.fname, "rb") as file:
            file.seek(start)
            for page in pages:
                if zlib.crc32(file.read(self.page_size)) != page.crc32:  # power failed before it reached the disk
                    break
                self.pages.append(page)
        return len(self.pages)

    @staticmethod
    def _no_page(_crc32: int) -> None:
        raise AssertionError

    def write(self, samples: Iterable[tuple[EncodedImage, int]], on_page: Callable[[Page], None]) -> int:
        """Write (picture, label) pairs in their order, sync the file to the disk, and return how many samples it has.

        on_page: called after each page that was written; a sample that it lacks has not been asked for, or is the last
        one that was.   Raises OSError when the file cannot be written.
        """
        table = np.zeros(self.num_samples, dtype=self.metadata_type)
        images, labels = (table[name] for name in self.metadata_type.names)
        rows: list[Row] = []  # of the page in work

        def written(crc32: int) -> None:
            nonlocal rows
            self.pages.append(Page(crc32, rows))
            rows = []
            on_page(self.pages[-1])

        allocations, number = [], 0
        pages = _Pages(self.fname, self.data_region_start, self.page_size, len(self.pages), written)
        for index, page in enumerate(self.pages):
            address = int(pages.offset) + index * self.page_size
            for mode, width, height, label, size in page.rows:
                images[number], labels[number] = (mode, width, height, address), label
                allocations.append((number, address, size))
                address += size
                number += 1
        with pages:
            for image, label in samples:
                pages.set_current_sample(number)
                address, memory = pages.malloc(len(image.data))
                memory[:] = np.frombuffer(image.data, dtype=np.uint8)
                mode = int(IMAGE_MODES[image.mode])
                images[number], labels[number] = (mode, image.width, image.height, address), label
                rows.append((mode, image.width, image.height, label, len(image.data)))
                number += 1
                self.num_bytes = pages.num_bytes
        self.header["num_samples"] = number
        self.metadata_sm = SimpleNamespace(buf=table[:number].tobytes())  # where the stock finalize looks for it
        os.truncate(self.fname, pages.offset + len(self.pages) * self.page_size)  # of an earlier, longer attempt
        self.finalize(allocations + pages.allocations)
        table_bytes = os.path.getsize(self.fname) - int(self.header["alloc_table_ptr"])
        if table_bytes != number * ALLOC_TABLE_TYPE.itemsize:  # stock finalize swallows whatever is raised in it
            raise InterruptedError(EINTR, "interrupted while writing the allocation table")
        with open(self.fname, "rb") as file:
            os.fsync(file.fileno())
        self.num_bytes = os.path.getsize(self.fname)
        return number
