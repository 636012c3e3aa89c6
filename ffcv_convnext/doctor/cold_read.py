"""How fast a .beton comes from storage when it is not in memory: in order, and sample by sample as an epoch reads it.

Only what is about to be read, and 2 MB around it, is evicted from the page cache (posix_fadvise), and only pages that
were seen to be gone (mincore) count. So a file that somebody else holds in memory, or that lies there (tmpfs), gives
no rate instead of memory's. A disk's or a file server's own cache is out of reach: such a rate is an upper limit.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

PAGE = mmap.PAGESIZE
FOLIO = 2 << 20  # bytes that Linux may hold as one unit, which goes as a whole or stays
PIECE = 64 << 20  # bytes of a stretch that is read in order
READ = 8 << 20  # bytes of one read in it
LEAST_COLD = 0.5  # a rate needs this share of what was read to have come from storage

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class StorageRate:
    """What came from storage, and how long that took."""

    megabytes: float  # 1e6 bytes that were not in memory before
    seconds: float
    cold: float  # share of the bytes read that these are

    @property
    def megabytes_per_s(self) -> float | None:
        """None where too little was cold to tell."""
        return self.megabytes / self.seconds if self.cold >= LEAST_COLD and self.seconds > 0 else None


class ColdFile:
    """A file to be read as if for the first time. Use in `with`; its content is left in the page cache."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.num_bytes = os.fstat(self.descriptor).st_size
        self.map = mmap.mmap(self.descriptor, self.num_bytes, prot=mmap.PROT_READ)
        self.bytes: NDArray[np.uint8] | None = np.frombuffer(self.map, np.uint8)
        self.address = int(self.bytes.ctypes.data)

    def __enter__(self) -> ColdFile:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.bytes = None  # it holds on to the map
        self.map.close()
        os.close(self.descriptor)

    def evict(self, parts: Iterable[tuple[int, int]]) -> int:
        """Drop parts (first byte, end) from memory, and return how many bytes of their pages are gone."""
        parts = [_whole(part, PAGE) for part in parts]
        self.map.madvise(mmap.MADV_DONTNEED)  # what is mapped here would stay
        for start, end in (_whole(part, FOLIO) for part in parts):
            os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
        return sum(self._absent(start, min(end, self.num_bytes)) for start, end in parts)

    def _absent(self, start: int, end: int) -> int:
        """Bytes of pages between start, at a page's begin, and end that are not in memory."""
        pages = np.zeros(-(-(end - start) // PAGE), np.uint8)
        address, length = ctypes.c_void_p(self.address + start), ctypes.c_size_t(end - start)
        if _libc.mincore(address, length, pages.ctypes.data_as(ctypes.c_void_p)):
            return 0  # it does not tell, so nothing is known to be cold
        return int(((pages & 1) == 0).sum()) * PAGE

    def in_order(self, seconds: float) -> StorageRate:
        """Read stretches, spread over the file, each from begin to end in one thread; for about `seconds`."""
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
            if at < end:  # a disk so slow that the stretch was left: count what came
                cold -= end - at
                total -= end - at
            if time.perf_counter() - began >= seconds:
                break
        return StorageRate(max(cold, 0) / 1e6, spent, min(max(cold, 0) / max(total, 1), 1.0))

    def at_random(
        self, parts: Sequence[tuple[int, int]], seconds: float, *, num_readers: int, announced: bool = False
    ) -> StorageRate:
        """Read samples (first byte, end) in the order given, through a mapping as training does.

        num_readers: threads that read at a time.   announced: the kernel is told first what comes next.
        """
        cold = total = 0
        spent, began = 0.0, time.perf_counter()
        with ThreadPoolExecutor(num_readers) as pool:
            for group in _grouped(parts, 4 * num_readers):
                cold += self.evict(group)
                total += sum(end - start for start, end in (_whole(part, PAGE) for part in group))
                started = time.perf_counter()
                for start, end in group if announced else ():
                    os.posix_fadvise(self.descriptor, start, end - start, os.POSIX_FADV_WILLNEED)
                list(pool.map(self._touch, group))
                spent += time.perf_counter() - started
                if time.perf_counter() - began >= seconds:
                    break
        return StorageRate(cold / 1e6, spent, min(cold / max(total, 1), 1.0))

    def _touch(self, part: tuple[int, int]) -> None:
        start, end = part
        buffer = ctypes.create_string_buffer(end - start)
        ctypes.memmove(buffer, self.address + start, end - start)  # lets other threads run, unlike a slice


def _whole(part: tuple[int, int], unit: int) -> tuple[int, int]:
    """A part (first byte, end), extended to whole units."""
    return part[0] // unit * unit, -(-part[1] // unit) * unit


def _spread(starts: list[int]) -> Iterator[int]:
    """All of them, each as far from the ones before as a golden section makes it."""
    num, step = len(starts), max(1, round(len(starts) * 0.618))
    while np.gcd(step, num) != 1:
        step += 1
    return (starts[i * step % num] for i in range(num))


def _grouped(parts: Sequence[tuple[int, int]], size: int) -> Iterator[list[tuple[int, int]]]:
    iterator = iter(parts)
    while group := list(islice(iterator, size)):
        yield group


def room_for_cache() -> int:
    """Bytes of memory that could hold cached files: what is free or already cache, within a container's limit."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    room = int(fields["MemAvailable"].split()[0]) * 1024
    group = _control_group()
    try:
        limit = int((group / "memory.max").read_text())
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(cached["file"])
    except (OSError, ValueError):  # no such group, or "max": no limit
        return room
    return max(0, min(room, limit - used))


def available_cores() -> int:
    """Processor cores this process may use: its affinity, within a container's quota (rounded up)."""
    num = len(os.sched_getaffinity(0))
    try:
        quota, period = (_control_group() / "cpu.max").read_text().split()
        return max(1, min(num, -(-int(quota) // int(period))))
    except (OSError, ValueError):
        return num


def _control_group() -> Path:
    """This process's control group (version 2), or one that does not exist."""
    try:
        line = next(line for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return Path("/sys/fs/cgroup/none")
    return Path("/sys/fs/cgroup") / line.removeprefix("0::/")
