"""Where the bytes of stored samples come from: a memory-mapped file, or reads into buffers.

All sources get the coming batches in advance and stay `_BYTES_AHEAD` ahead of the decoding threads. For a mapped file
they advise the kernel (posix_fadvise), which reads the pages meanwhile; for a page that is already in memory this
takes a microsecond. System calls are made from compiled code, one call per batch, so that no thread waits for
Python's lock in between.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
import weakref
import zlib
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.codec.jit import Bytes, Ints, call, jit
from ffcv_convnext.data.load.sampler import Samples
from ffcv_convnext.errors import Failure

log = logging.getLogger(__name__)

_BYTES_AHEAD = 64 << 20  # stored bytes of the batches that are on their way, before any is decoded
_NUM_READERS = 8  # concurrent reads; a network disk needs several, because each takes milliseconds
_GAP = 32 << 10  # two samples closer than this, in bytes, are read with one call
_PIECE = 8 << 20  # bytes per read while a whole file is loaded into memory
_CRC_PIECE = 256 << 10  # stays in the processor's cache between reading and checking
_PREAD, _FADVISE = range(2)
_WILL_NEED = os.POSIX_FADV_WILLNEED


class ReadError(Failure):
    """A file of samples can no longer be read; the message names it, the address and the reason."""


class Stored(NamedTuple):
    """Stored images in memory, found by their address in the file (`crops.stored_bytes`)."""

    content: NDArray[np.uint8]  # read-only
    addresses: NDArray[np.uint64]  # (k,) sorted: where in the file images begin
    sizes: NDArray[np.uint64]  # (k,) bytes
    offsets: NDArray[np.uint64]  # (k,) where in `content` they begin


class Fetch(Protocol):
    """A batch's data while it is read."""

    @property
    def num_bytes(self) -> int:
        """Bytes that are read."""

    def wait(self) -> Stored:
        """Return the data when it is complete. Raises ReadError."""

    def release(self) -> None:
        """Give the data back; it must not be used any more."""


def _functions() -> NDArray[np.int64]:
    library = ctypes.CDLL(None)
    names = ("pread", "posix_fadvise")
    return np.array([ctypes.cast(library[name], ctypes.c_void_p).value for name in names], dtype=np.int64)


@jit
def _announce(descriptor: int, starts: Ints, lengths: Ints, functions: Ints) -> None:
    """Advise the kernel to read parts of a file soon."""
    for i in range(len(starts)):
        call(functions[_FADVISE], (np.int64(descriptor), starts[i], lengths[i], np.int64(_WILL_NEED)))


@jit
def _read_parts(descriptor: int, starts: Ints, lengths: Ints, places: Ints, content: Bytes, functions: Ints) -> int:
    """Read parts of a file to places in `content`; return how many were read completely, in their order."""
    for i in range(len(starts)):
        done = np.int64(0)
        while done < lengths[i]:
            target = np.int64(content.ctypes.data) + places[i] + done
            got = call(functions[_PREAD], (np.int64(descriptor), target, lengths[i] - done, starts[i] + done))
            if got <= 0:
                return i
            done += got
    return len(starts)


class SampleSource(ABC):
    """An open .beton with the addresses and sizes of its samples' data.

    samples: (n,) address of each sample's data.   table: FFCV's allocation table, with `ptr` and `size`.
    """

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        self.beton = beton
        self.samples = samples
        self.addresses, self.sizes = (np.ascontiguousarray(table[name]) for name in ("ptr", "size"))
        if (self.addresses[1:] < self.addresses[:-1]).any():  # our own files are in order
            order = np.argsort(self.addresses, kind="stable")
            self.addresses, self.sizes = self.addresses[order], self.sizes[order]
        for array in (self.addresses, self.sizes):
            array.setflags(write=False)
        self.descriptor = os.open(beton, os.O_RDONLY)
        self.num_bytes = os.fstat(self.descriptor).st_size
        self.functions = _functions()
        self._close = weakref.finalize(self, os.close, self.descriptor)

    @property
    def max_bytes(self) -> int:
        """Size of the largest sample's data, at most the size of the file."""
        return min(int(self.sizes.max(initial=0)), self.num_bytes)

    def entries(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the table's entries of some samples, by address and without repeats or data outside the file."""
        if not len(self.addresses):
            return np.zeros(0, np.int64)
        wanted = np.unique(self.samples[samples])
        found = np.minimum(np.searchsorted(self.addresses, wanted), len(self.addresses) - 1)
        at, size, end = self.addresses[found], self.sizes[found], np.uint64(self.num_bytes)
        known: NDArray[np.int64] = found[(at == wanted) & (at <= end) & (size <= end - np.minimum(at, end))]
        return known

    def fetch(self, batches: Iterable[Samples]) -> Generator[tuple[Samples, Fetch], None, None]:
        """Yield each batch's samples with the fetch of their data, started `_BYTES_AHEAD` in advance."""
        ahead: deque[tuple[Samples, Fetch]] = deque()
        num_bytes = 0
        try:
            for samples in batches:
                ahead.append((samples, self.begin(samples.indices)))
                num_bytes += ahead[-1][1].num_bytes
                while num_bytes > _BYTES_AHEAD:
                    num_bytes -= ahead[0][1].num_bytes
                    yield ahead.popleft()
            while ahead:
                yield ahead.popleft()
        finally:
            for _, unused in ahead:
                unused.release()

    @abstractmethod
    def begin(self, samples: NDArray[np.int64]) -> Fetch:
        """Start to read the samples' data."""

    def crc32(self, start: int, num_bytes: int) -> int:
        """Return the CRC-32 of a part of the file. Raises ReadError.

        It is read into a buffer for a mapped file too: there, a bad sector would kill the process (SIGBUS).
        """
        os.posix_fadvise(self.descriptor, start, num_bytes, os.POSIX_FADV_WILLNEED)  # in large pieces from the disk
        buffer, crc = np.empty(min(_CRC_PIECE, num_bytes), np.uint8), 0
        for at in range(start, start + num_bytes, _CRC_PIECE):
            piece = buffer[: start + num_bytes - at]
            read_or_explain(self, [at], [len(piece)], [0], piece)
            crc = zlib.crc32(piece.data, crc)
        return crc

    def prepare(self) -> None:  # noqa: B027  only Preloaded overrides it
        """Do what is needed once, before the first batch."""

    def close(self, *, wait: bool = True) -> None:  # noqa: ARG002
        """Close the file. wait: for reading threads; False if a disk does not answer."""
        self._close()


class _Mapped(NamedTuple):
    """Data in a mapped file, announced to the kernel before it is used.

    A page fault without an announcement would also read up to some MB around the page.
    """

    num_bytes: int
    stored: Stored
    announcement: Future[None] | None

    def wait(self) -> Stored:
        if self.announcement is not None:
            self.announcement.result()
        return self.stored

    def release(self) -> None:
        pass


class Mmap(SampleSource):
    """The .beton mapped read-only (data_cache os): the page cache is shared between processes.

    FFCV's managers build Python dictionaries of every sample's pages (seconds and about 600 MB for ImageNet), and mark
    numba's uint8 array type as read-only for the whole process. This class does neither.
    """

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        super().__init__(beton, samples, table)
        self.mapping = np.asarray(np.memmap(beton, dtype=np.uint8, mode="r"))
        self.stored = Stored(self.mapping, self.addresses, self.sizes, self.addresses)
        self.announcer = ThreadPoolExecutor(1, thread_name_prefix="read ahead")

    def begin(self, samples: NDArray[np.int64]) -> Fetch:
        """Announce the samples' pages to the kernel."""
        entries = self.entries(samples)
        starts, lengths, _ = merge(self.addresses[entries], self.sizes[entries], _GAP)
        return _Mapped(int(lengths.sum()), self.stored, self.announce(starts, lengths))

    def announce(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Future[None] | None:
        """Advise the kernel to read parts of the file, in a thread. starts, lengths: bytes."""
        if not len(starts):
            return None
        return self.announcer.submit(_announce, self.descriptor, starts, lengths, self.functions)

    def close(self, *, wait: bool = True) -> None:
        """Close the file and end the threads."""
        self.announcer.shutdown(wait=wait, cancel_futures=True)
        super().close()


class Preloaded(Mmap):
    """The .beton mapped and read into memory completely (data_cache ram), locked there if the limit allows.

    The processes of a node share the memory and the reading: each reads every `num_local`-th piece.
    """

    def __init__(
        self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any], local_rank: int, num_local: int
    ) -> None:
        super().__init__(beton, samples, table)
        self.local_rank = local_rank
        self.num_local = num_local
        self.is_loaded = False

    def announce(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:  # noqa: ARG002
        """Do nothing: the file is in memory."""
        return

    def prepare(self) -> None:
        """Read this process's share of the file, once."""
        if self.is_loaded:
            return
        started = time.perf_counter()
        share = range(self.local_rank * _PIECE, self.num_bytes, self.num_local * _PIECE)
        with ThreadPoolExecutor(_NUM_READERS) as readers:
            list(readers.map(self._touch, share))
        locked = "" if self.local_rank else self._lock()
        self.is_loaded = True
        log.info("%s is in memory after %.0f s%s", self.beton, time.perf_counter() - started, locked)

    def _touch(self, start: int) -> None:
        """Read a piece into the page cache."""
        buffer = np.empty(min(_PIECE, self.num_bytes - start), np.uint8)
        read_or_explain(self, [start], [len(buffer)], [0], buffer)

    def _lock(self) -> str:
        """Lock the mapping, in one process for the whole node; return a remark for the log."""
        library = ctypes.CDLL(None, use_errno=True)
        if not library.mlock(ctypes.c_void_p(self.mapping.ctypes.data), ctypes.c_size_t(self.num_bytes)):
            return ", locked"
        reason = os.strerror(ctypes.get_errno())
        return f", but cannot be locked there ({reason}; see ulimit -l): other programs may evict it"


class _Reads:
    """A batch's data while it is read into a buffer."""

    def __init__(self, file: Buffered, stored: Stored, buffer: NDArray[np.uint8], reads: list[Future[None]]) -> None:
        self.file = file
        self.stored = stored
        self.buffer = buffer
        self.reads = reads
        self.num_bytes = len(stored.content)

    def wait(self) -> Stored:
        for read in self.reads:
            read.result()
        return self.stored

    def release(self) -> None:
        ended = [read.cancel() or read.done() for read in self.reads]
        if all(ended):
            self.file.spare_buffers.append(self.buffer)
        # else a reader still writes into it, and the buffer is freed when that ends


class Buffered(SampleSource):
    """The .beton read batch by batch into buffers of this process (data_cache process), which are reused.

    Does not depend on the page cache. A disk that fails during a run is an error with a reason; with a mapped file it
    would kill the process (SIGBUS). Memory: `_BYTES_AHEAD` plus the batches that are being decoded.
    """

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        super().__init__(beton, samples, table)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for, not more
        self.readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="read")
        self.spare_buffers: deque[NDArray[np.uint8]] = deque()  # append and pop are thread-safe

    def begin(self, samples: NDArray[np.int64]) -> Fetch:
        """Start reads into a buffer."""
        entries = self.entries(samples)
        addresses, sizes = self.addresses[entries], self.sizes[entries]
        starts, lengths, part = merge(addresses, sizes, _GAP)
        places = np.cumsum(lengths) - lengths
        num_bytes = int(lengths.sum())
        buffer = self._take(num_bytes)
        content = buffer[:num_bytes].view()
        content.setflags(write=False)
        offsets = addresses - starts[part].astype(np.uint64) + places[part].astype(np.uint64)
        for array in (addresses, sizes, offsets):  # the same types as in Mmap: compiled once for both
            array.setflags(write=False)
        reads = [
            self.readers.submit(read_or_explain, self, starts[i], lengths[i], places[i], buffer)
            for i in np.array_split(np.arange(len(starts)), min(len(starts), _NUM_READERS) or 1)
        ]
        return _Reads(self, Stored(content, addresses, sizes, offsets), buffer, reads)

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        """Return a free buffer; one that is too small is replaced by a larger one."""
        try:
            buffer = self.spare_buffers.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        return buffer if len(buffer) >= num_bytes else np.empty(num_bytes + num_bytes // 4, np.uint8)

    def close(self, *, wait: bool = True) -> None:
        """Close the file and end the threads."""
        self.readers.shutdown(wait=wait, cancel_futures=True)
        super().close()


def merge(
    addresses: NDArray[np.uint64], sizes: NDArray[np.uint64], gap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Merge parts of a file, sorted by address, that have at most `gap` bytes between them.

    Returns starts and lengths of the merged parts, and for each address the part that contains it.
    """
    if not len(addresses):
        return (np.zeros(0, np.int64),) * 3
    starts = addresses.astype(np.int64)
    ends = np.maximum.accumulate(starts + sizes.astype(np.int64))
    is_first = np.append(True, starts[1:] > ends[:-1] + gap)
    is_last = np.append(is_first[1:], True)
    return starts[is_first], ends[is_last] - starts[is_first], np.cumsum(is_first) - 1


def read_or_explain(file: SampleSource, starts: Any, lengths: Any, places: Any, content: NDArray[np.uint8]) -> None:
    """Read parts of a file to places in `content`. Raises ReadError with the reason if one cannot be read."""
    starts, lengths, places = (np.asarray(numbers, dtype=np.int64) for numbers in (starts, lengths, places))
    done = 0
    while (done := done + _read_parts(file.descriptor, starts[done:], lengths[done:], places[done:], content,
                                      file.functions)) < len(starts):  # fmt: skip
        start, length = int(starts[done]), int(lengths[done])
        try:
            again = os.pread(file.descriptor, length, start)
        except OSError as error:
            raise ReadError(f"{file.beton}: {length} bytes at {start} cannot be read: {error.strerror}") from error
        if len(again) < length:
            raise ReadError(
                f"{file.beton} ends at {start + len(again)}, before the end of a sample: the file was truncated "
                "while in use"
            )
        content[places[done] : places[done] + length] = np.frombuffer(again, np.uint8)
        done += 1
