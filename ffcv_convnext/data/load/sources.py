"""Where the bytes of stored samples come from: the file mapped into memory, or reads into buffers of our own.

Both are told which batches come next and are `_BYTES_AHEAD` ahead of the decoding threads. The mapped file's part is
to announce them to the kernel, which reads them meanwhile; a page that is in memory already costs a microsecond.
System calls are made from compiled code, one call a batch, so that no thread waits for Python's lock in between.
"""

from __future__ import annotations

import ctypes
import logging
import os
import time
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.codec.jit import call, jit
from ffcv_convnext.errors import Failure

log = logging.getLogger(__name__)

_BYTES_AHEAD = 64 << 20  # stored bytes of the batches that are on their way, before any is decoded
_NUM_READERS = 8  # reads under way at a time: a network disk needs several, each takes milliseconds
_GAP = 32 << 10  # bytes between two samples that are read along rather than read separately
_PIECE = 8 << 20  # bytes of a read that brings a whole file into memory
_PREAD, _FADVISE = range(2)
_WILL_NEED = os.POSIX_FADV_WILLNEED


class ReadError(Failure):
    """A file of samples that cannot be read any more; the message names it, the place and the reason."""


class Stored(NamedTuple):
    """Samples' data in memory: what `decoders.stored_bytes` looks an address up in."""

    content: NDArray[np.uint8]  # read-only
    addresses: NDArray[np.uint64]  # (k,) sorted: where in the file samples' data begins
    sizes: NDArray[np.uint64]  # (k,)
    offsets: NDArray[np.uint64]  # (k,) where in `content` it begins


class Fetch(Protocol):
    """A batch's data on its way."""

    @property
    def num_bytes(self) -> int: ...

    def wait(self) -> Stored:
        """The data, once it is there. Raises ReadError."""

    def release(self) -> None:
        """Say that the data is not looked at any more."""


def _functions() -> NDArray[np.int64]:
    library = ctypes.CDLL(None)
    names = ("pread", "posix_fadvise")
    return np.array([ctypes.cast(library[name], ctypes.c_void_p).value for name in names], dtype=np.int64)


@jit
def _announce(descriptor, starts, lengths, functions):  # type: ignore[no-untyped-def]
    """Ask the kernel to read parts of a file; returns when it has taken note."""
    for i in range(len(starts)):
        call(functions[_FADVISE], (np.int64(descriptor), starts[i], lengths[i], np.int64(_WILL_NEED)))


@jit
def _read_parts(descriptor, starts, lengths, places, content, functions):  # type: ignore[no-untyped-def]
    """Read parts of a file to places in `content`; returns how many came completely, in their order."""
    for i in range(len(starts)):
        done = np.int64(0)
        while done < lengths[i]:
            target = np.int64(content.ctypes.data) + places[i] + done
            got = call(functions[_PREAD], (np.int64(descriptor), target, lengths[i] - done, starts[i] + done))
            if got <= 0:
                return i
            done += got
    return len(starts)


class _SampleFile(ABC):
    """An open .beton with the table that tells how long each sample's data is."""

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        """samples: (n,) address of each sample's data.   table: FFCV's allocation table, `ptr` and `size` of data."""
        self.beton = beton
        self.samples = samples
        order = np.argsort(table["ptr"], kind="stable")
        self.addresses = np.ascontiguousarray(table["ptr"][order])
        self.sizes = np.ascontiguousarray(table["size"][order])
        for array in (self.addresses, self.sizes):
            array.setflags(write=False)
        self.descriptor = os.open(beton, os.O_RDONLY)
        self.num_bytes = os.fstat(self.descriptor).st_size
        self.functions = _functions()
        self._close = weakref.finalize(self, os.close, self.descriptor)

    @property
    def most_bytes(self) -> int:
        """Size of the largest sample's data; a damaged table may say more than the file has."""
        return min(int(self.sizes.max(initial=0)), self.num_bytes)

    def entries(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """The table's entries of some samples, by address, each once; without those that lie outside the file."""
        if not len(self.addresses):
            return np.zeros(0, np.int64)
        wanted = np.unique(self.samples[samples])
        found = np.minimum(np.searchsorted(self.addresses, wanted), len(self.addresses) - 1)
        at, size, end = self.addresses[found], self.sizes[found], np.uint64(self.num_bytes)
        known: NDArray[np.int64] = found[(at == wanted) & (at <= end) & (size <= end - np.minimum(at, end))]
        return known

    def fetch(self, samples: Iterable[NDArray[np.int64]]) -> Generator[tuple[NDArray[np.int64], Fetch], None, None]:
        """Pass lists of samples on, with their data on its way; begin with `_BYTES_AHEAD` of them in advance."""
        ahead: deque[tuple[NDArray[np.int64], Fetch]] = deque()
        num_bytes = 0
        try:
            for indices in samples:
                ahead.append((indices, self.begin(indices)))
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
        """Set the samples' data on its way."""

    def prepare(self) -> None:  # noqa: B027  only one kind has something to do
        """What has to be done once, before the first batch."""

    def close(self, *, wait: bool = True) -> None:  # noqa: ARG002
        """wait: for threads that may still read; not for those that a disk keeps waiting."""
        self._close()


class _Mapped(NamedTuple):
    """Data in a mapped file. The kernel has at least been asked for it before somebody touches it.

    A page that it has not been asked for would be read when touched, with up to some MB around it that nobody wants.
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


class MappedFile(_SampleFile):
    """The .beton mapped read-only: its pages are shared with other processes and kept as long as there is room.

    FFCV's own managers build Python dictionaries of every sample's pages (seconds and some 600 MB for ImageNet), and
    mark numba's uint8 array type read-only for the whole process. This one does neither.
    """

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        super().__init__(beton, samples, table)
        self.mapping = np.asarray(np.memmap(beton, dtype=np.uint8, mode="r"))
        self.stored = Stored(self.mapping, self.addresses, self.sizes, self.addresses)
        self.announcer = ThreadPoolExecutor(1, thread_name_prefix="read ahead")

    def begin(self, samples: NDArray[np.int64]) -> Fetch:
        entries = self.entries(samples)
        starts, lengths, _ = merge(self.addresses[entries], self.sizes[entries], _GAP)
        return _Mapped(int(lengths.sum()), self.stored, self.announce(starts, lengths))

    def announce(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> Future[None] | None:
        """Have parts of the file read while other work goes on; bytes."""
        if not len(starts):
            return None
        return self.announcer.submit(_announce, self.descriptor, starts, lengths, self.functions)

    def close(self, *, wait: bool = True) -> None:
        self.announcer.shutdown(wait=wait, cancel_futures=True)
        super().close()


class LoadedFile(MappedFile):
    """The .beton mapped, and brought into memory as a whole. It stays there where the limit on locked memory allows.

    The processes of a node share the memory, and the work of reading: each reads every `num_local`-th piece.
    """

    def __init__(
        self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any], local_rank: int, num_local: int
    ) -> None:
        super().__init__(beton, samples, table)
        self.local_rank = local_rank
        self.num_local = num_local
        self.is_loaded = False

    def announce(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:  # noqa: ARG002
        """Nothing to do: all of it is in memory."""
        return

    def prepare(self) -> None:
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
        """Bring a piece into the page cache."""
        buffer = np.empty(min(_PIECE, self.num_bytes - start), np.uint8)
        read_or_explain(self, [start], [len(buffer)], [0], buffer)

    def _lock(self) -> str:
        """Lock the mapping, one process for all of the node; a remark for the log when that is not allowed."""
        library = ctypes.CDLL(None, use_errno=True)
        if not library.mlock(ctypes.c_void_p(self.mapping.ctypes.data), ctypes.c_size_t(self.num_bytes)):
            return ", locked"
        reason = os.strerror(ctypes.get_errno())
        return f", but it cannot be locked there ({reason}; see ulimit -l): other programs may displace it"


class _Reads:
    """A batch's data on its way into a buffer."""

    def __init__(self, file: ReadFile, stored: Stored, buffer: NDArray[np.uint8], reads: list[Future[None]]) -> None:
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
        # else a reader still writes into it: it goes when that one ends


class ReadFile(_SampleFile):
    """The .beton read batch by batch into buffers of this process, each used again when its batch is finished.

    Nothing depends on the page cache, and a disk that fails in the middle of a run is an error with a reason where
    touching a mapped file would kill the process (SIGBUS). Memory: `_BYTES_AHEAD` and the batches being decoded.
    """

    def __init__(self, beton: Path, samples: NDArray[np.uint64], table: NDArray[Any]) -> None:
        super().__init__(beton, samples, table)
        os.posix_fadvise(self.descriptor, 0, 0, os.POSIX_FADV_RANDOM)  # read what is asked for, not more
        self.readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="read")
        self.spare_buffers: deque[NDArray[np.uint8]] = deque()  # its own methods are safe between threads

    def begin(self, samples: NDArray[np.int64]) -> Fetch:
        entries = self.entries(samples)
        addresses, sizes = self.addresses[entries], self.sizes[entries]
        starts, lengths, part = merge(addresses, sizes, _GAP)
        places = np.cumsum(lengths) - lengths
        num_bytes = int(lengths.sum())
        buffer = self._take(num_bytes)
        content = buffer[:num_bytes].view()
        content.setflags(write=False)
        offsets = addresses - starts[part].astype(np.uint64) + places[part].astype(np.uint64)
        for array in (addresses, sizes, offsets):  # of the same type as those of a mapped file: compiled once for both
            array.setflags(write=False)
        reads = [
            self.readers.submit(read_or_explain, self, starts[i], lengths[i], places[i], buffer)
            for i in np.array_split(np.arange(len(starts)), min(len(starts), _NUM_READERS) or 1)
        ]
        return _Reads(self, Stored(content, addresses, sizes, offsets), buffer, reads)

    def _take(self, num_bytes: int) -> NDArray[np.uint8]:
        """A buffer that nobody uses; one that is too small is given up for a larger one."""
        try:
            buffer = self.spare_buffers.pop()
        except IndexError:
            buffer = np.empty(0, np.uint8)
        return buffer if len(buffer) >= num_bytes else np.empty(num_bytes + num_bytes // 4, np.uint8)

    def close(self, *, wait: bool = True) -> None:
        self.readers.shutdown(wait=wait, cancel_futures=True)
        super().close()


def merge(
    addresses: NDArray[np.uint64], sizes: NDArray[np.uint64], gap: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Parts of a file, sorted by address, as fewer parts: two become one when at most `gap` bytes lie between them.

    Returns starts and lengths of the parts, and for each address the part that it fell into.
    """
    if not len(addresses):
        return (np.zeros(0, np.int64),) * 3
    starts = addresses.astype(np.int64)
    ends = np.maximum.accumulate(starts + sizes.astype(np.int64))
    is_first = np.append(True, starts[1:] > ends[:-1] + gap)
    is_last = np.append(is_first[1:], True)
    return starts[is_first], ends[is_last] - starts[is_first], np.cumsum(is_first) - 1


def read_or_explain(file: _SampleFile, starts: Any, lengths: Any, places: Any, content: NDArray[np.uint8]) -> None:
    """Read parts of a file to places in `content`. Raises ReadError with the reason when one does not come."""
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
                f"{file.beton} ends at {start + len(again)}, before the sample that was to be read: it was cut off "
                "while in use"
            )
        content[places[done] : places[done] + length] = np.frombuffer(again, np.uint8)
        done += 1
