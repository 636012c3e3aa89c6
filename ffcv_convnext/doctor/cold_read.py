"""Read rate of a .beton from storage when it is not in memory: in order, and sample by sample as in an epoch.

Only the parts that are read next, and 2 MB around them, are evicted from the page cache (posix_fadvise), and only pages
that are then absent (mincore) count. So a file that another process keeps in memory, or a file on a tmpfs, has no rate
instead of the memory's. The cache of a disk or file server cannot be emptied: such a rate is an upper limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.host import PAGE, resident_pages

FOLIO = 2 << 20  # bytes that Linux may cache, and evict, as one unit
PIECE = 64 << 20  # bytes of a stretch that is read in order
READ = 8 << 20  # bytes of one read in it
MIN_COLD = 0.5  # minimum share of the bytes that came from storage; below it there is no rate


@dataclass(frozen=True, slots=True)
class StorageRate:
    """Amount read from storage, and the time it took."""

    megabytes: float  # 1e6 bytes that were not in memory before
    seconds: float
    cold: float  # their share of all bytes read

    @property
    def megabytes_per_s(self) -> float | None:
        """The rate, or None if too little was cold."""
        return self.megabytes / self.seconds if self.cold >= MIN_COLD and self.seconds > 0 else None

    def to_dict(self) -> dict[str, float | None]:
        """Return the fields and the rate."""
        return {**asdict(self), "megabytes_per_s": self.megabytes_per_s}


class ColdFile:
    """A file whose parts are read from storage. Use in `with`; afterwards its content is in the page cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self.descriptor).st_size
        self.map = mmap.mmap(self.descriptor, self.num_bytes, prot=mmap.PROT_READ)
        self.bytes: NDArray[np.uint8] | None = np.frombuffer(self.map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    def __enter__(self) -> ColdFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bytes = None  # it keeps the map open
        self.map.close()
        os.close(self.descriptor)

    def evict(self, parts: Iterable[tuple[int, int]]) -> int:
        """Evict parts (first byte, end) from memory, and return how many bytes of their pages are absent then."""
        parts = [_whole(part, PAGE) for part in parts]
        self.map.madvise(mmap.MADV_DONTNEED)  # mapped pages would stay
        for start, end in (_whole(part, FOLIO) for part in parts):
            os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
        return sum(self._absent(start, min(end, self.num_bytes)) for start, end in parts)

    def _absent(self, start: int, end: int) -> int:
        """Return the bytes of pages from start, a page's first byte, to end that are not in memory."""
        try:
            resident = resident_pages(self.address + start, end - start)
        except OSError:
            return 0  # unknown, so nothing counts as cold
        return int(np.count_nonzero(~resident)) * PAGE

    def in_order(self, seconds: float) -> StorageRate:
        """Read stretches, spread over the file, each from start to end in one thread; for about `seconds`."""
        starts = list(range(0, self.num_bytes, PIECE))
        buffer = bytearray(min(READ, self.num_bytes))
        cold = total = 0
        spent, began = 0.0, time.perf_counter()
        for start in _spread(starts):
            end = min(start + PIECE, self.num_bytes)
            cold += self.evict([(start, end)])
            total += end - start
            started = time.perf_counter()
            at = start
            while at < end and time.perf_counter() - began < 2 * seconds:
                at += os.preadv(self.descriptor, [memoryview(buffer)[: end - at]], at)
            spent += time.perf_counter() - started
            if at < end:  # the disk is slow: count only the bytes read
                cold -= end - at
                total -= end - at
            if time.perf_counter() - began >= seconds:
                break
        return StorageRate(max(cold, 0) / 1e6, spent, min(max(cold, 0) / max(total, 1), 1.0))

    def at_random(self, parts: Sequence[tuple[int, int]], seconds: float, *, num_readers: int) -> StorageRate:
        """Read samples (first byte, end) in the given order, through a mapping and with read-ahead, as training does.

        num_readers: threads that read at the same time.
        """
        cold = total = 0
        spent, began = 0.0, time.perf_counter()
        with ThreadPoolExecutor(num_readers) as pool:
            for group in _grouped(parts, 4 * num_readers):
                cold += self.evict(group)
                total += sum(end - start for start, end in (_whole(part, PAGE) for part in group))
                started = time.perf_counter()
                for start, end in group:
                    os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
                list(pool.map(self._touch, group))
                spent += time.perf_counter() - started
                if time.perf_counter() - began >= seconds:
                    break
        return StorageRate(cold / 1e6, spent, min(cold / max(total, 1), 1.0))

    def _touch(self, part: tuple[int, int]) -> None:
        start, end = part
        buffer = ctypes.create_string_buffer(end - start)
        ctypes.memmove(buffer, self.address + start, end - start)  # releases the GIL, unlike a slice


def _whole(part: tuple[int, int], unit: int) -> tuple[int, int]:
    """Return a part (first byte, end) extended to whole units."""
    return part[0] // unit * unit, -(-part[1] // unit) * unit


def _spread(starts: list[int]) -> Iterator[int]:
    """Return all of them in golden-section order: each far from those before."""
    num, step = len(starts), max(1, round(len(starts) * 0.618))
    while np.gcd(step, num) != 1:
        step += 1
    return (starts[i * step % num] for i in range(num))


def _grouped(parts: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    iterator = iter(parts)
    while group := list(islice(iterator, size)):
        yield group
