"""FFCV's DatasetWriter, fed with finished JPEGs from one process.

Stock `DatasetWriter` lets its workers share a file, a sample table in shared memory and a page counter, and waits
for ever once one of them raises or dies. Here workers only compute (workers.py); this process alone writes. So
a full disk is an exception where it happens, an image can be left out, nothing lies in shared memory, and the
file has the same bytes for any number of workers. The format stays FFCV's own: its Loader and decoders read it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
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


class _Pages(MemoryAllocator):  # type: ignore[misc]
    """FFCV's allocator for a single writer: every byte of a page is written, or an OSError says why not.

    The stock one ignores short writes, so a disk that fills up inside a page leaves a damaged file in silence.
    """

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

    @property
    def num_bytes(self) -> int:
        """Size of the file up to the end of the page in work."""
        return int(self.offset + (self.my_page + 1) * self.page_size)


class BetonWriter(DatasetWriter):  # type: ignore[misc]
    """A .beton with the fields `image` (JPEG) and `label`, in this order."""

    def __init__(self, path: Path, encoding: Encoding) -> None:
        fields = {
            "image": RGBImageField(
                write_mode="jpg", max_resolution=encoding.max_resolution, jpeg_quality=encoding.jpeg_quality
            ),
            "label": IntField(),
        }
        super().__init__(str(path), fields, page_size=encoding.max_bytes, num_workers=1)
        self.num_bytes = 0  # written so far
        self.metadata_sm: Any = None  # the name `prepare` and `finalize` share

    def write(self, capacity: int, samples: Iterable[tuple[EncodedImage, int]]) -> int:
        """Write (picture, label) pairs in their order, sync the file to the disk, and return how many there were.

        capacity: at least their number; room for the sample table is made before the first one arrives. What is
        left of it lies unused before the first page, which the absolute addresses in the file allow.
        Raises OSError when the file cannot be written.
        """
        self.num_samples = capacity
        self.prepare()
        self.metadata_sm.close()
        self.metadata_sm.unlink()  # /dev/shm is 64 MB in a default container, too small for 3 million samples
        table = np.zeros(capacity, dtype=self.metadata_type)
        images, labels = (table[name] for name in self.metadata_type.names)
        number = 0
        with _Pages(self.fname, self.data_region_start, self.page_size) as pages:
            for number, (image, label) in enumerate(samples, start=1):
                row = number - 1
                pages.set_current_sample(row)
                address, memory = pages.malloc(len(image.jpeg))
                memory[:] = np.frombuffer(image.jpeg, dtype=np.uint8)
                images[row] = (IMAGE_MODES["jpg"], image.width, image.height, address)
                labels[row] = label
                self.num_bytes = pages.num_bytes
        self.header["num_samples"] = number
        self.metadata_sm = SimpleNamespace(buf=table[:number].tobytes())  # where the stock finalize looks for it
        self.finalize(pages.allocations)
        table_bytes = os.path.getsize(self.fname) - int(self.header["alloc_table_ptr"])
        if table_bytes != number * ALLOC_TABLE_TYPE.itemsize:  # stock finalize swallows whatever is raised in it
            raise InterruptedError(EINTR, "interrupted while writing the allocation table")
        with open(self.fname, "rb") as file:
            os.fsync(file.fileno())
        self.num_bytes = os.path.getsize(self.fname)
        return number
