"""Decode batches of a .beton in threads: tables, source of bytes, crop kernel, scratch memory.

FFCV supplies the file format. Its Reader is not used, because it trusts the header, and its Loader is not, because it
hangs if an operation raises, hands
out views into a ring of buffers that it overwrites later, leaks a thread if an epoch is left early, and sets PyTorch's
thread count. Here a batch is cut into small chunks for a thread pool (compiled code releases the GIL), and batches do
not share memory.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.data.beton import CONVERT_AGAIN, Manifest, check_header
from ffcv_convnext.data.beton.tables import read_raw_tables
from ffcv_convnext.data.codec.decode import DAMAGED_PAGE, OK, REASONS, addresses
from ffcv_convnext.data.codec.jit import announced_compilation
from ffcv_convnext.data.load.crops import Chunk, CropKernel, Key, Scratch
from ffcv_convnext.data.load.device import Batch, DeviceTransfer
from ffcv_convnext.data.load.pages import PageCheck
from ffcv_convnext.data.load.sampler import Samples
from ffcv_convnext.data.load.sources import Buffered, Fetch, Mmap, Preloaded, ReadError
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.host import available_memory

log = logging.getLogger(__name__)

_CHUNK = 8  # images that a thread decodes at a time: about 10 ms
_TIMEOUT_S = 600.0  # no chunk takes so long, but a network disk may not answer at all


class SampleError(Failure):
    """A stored sample cannot be decoded; the message names its index, its original file and the reason."""


@dataclass(slots=True)
class _Pending:
    """A batch whose chunks are being decoded."""

    samples: Samples
    data: Fetch
    images: Tensor  # (n, size, size, 3) uint8
    labels: Tensor  # (n,) int64
    status: NDArray[np.int32]
    chunks: list[Future[None]]


class BatchDecoder:
    """Decodes lists of samples of a .beton with the fields image and label.

    local_rank, num_local: of the processes on this node, which share the reading with data_cache ram.
    """

    def __init__(
        self,
        beton: Path,
        kernel: CropKernel,
        *,
        num_workers: int,
        batches_ahead: int,
        device: torch.device,
        replace_bad: bool = False,
        data_cache: Literal["os", "process", "ram"] = "os",
        local_rank: int = 0,
        num_local: int = 1,
    ) -> None:
        check_header(beton)
        tables = read_raw_tables(beton, mapped=data_cache != "process")
        if tables.fields != ("image", "label") or (tables.image, tables.label) != ("f0", "f1"):
            raise ValueError(
                f"{beton} has the fields {', '.join(tables.fields)}: expected image, label; {CONVERT_AGAIN}"
            )
        self.beton = beton
        self.kernel = kernel
        self.batches_ahead = batches_ahead
        self.replace_bad = replace_bad
        self.is_stuck = False  # a thread waits for a disk that does not answer
        self.num_replaced = 0  # bad samples replaced by another one so far
        self.wait_s = 0.0  # time that the consumer has waited for batches, in total
        self.page_size = tables.page_size
        self.pages_end = tables.pages_end
        self.rows = tables.rows["f0"]  # (n,) mode, width, height and data_ptr of each image
        self.labels: NDArray[np.int64] = np.ascontiguousarray(tables.rows["f1"], np.int64)  # (n,)
        opened = beton, self.rows["data_ptr"], tables.allocations
        self.source: Mmap | Buffered
        if data_cache == "ram":
            self.source = Preloaded(*opened, local_rank, num_local)
        else:
            self.source = (Mmap if data_cache == "os" else Buffered)(*opened)
        self.page_check: PageCheck | None = None
        self.transfer = DeviceTransfer(device)
        self._functions = addresses()
        self._pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self._scratch_sizes = kernel.scratch_sizes(self.rows, self.source.max_bytes)
        self._check_memory(num_workers)
        self._own = threading.local()  # a thread's scratch
        self._compile()

    def __len__(self) -> int:
        return len(self.rows)

    def _check_memory(self, num_workers: int) -> None:
        """Raise ValueError if the largest image of the table needs more memory than there is."""
        need = num_workers * sum(length * np.dtype(dtype).itemsize for length, dtype in self._scratch_sizes.values())
        if need > (free := available_memory().num_bytes):
            width, height = int(self.rows["width"].max()), int(self.rows["height"].max())
            self.close()
            raise ValueError(
                f"{self.beton}: the sample table states images of up to {width} x {height} pixels, for which "
                f"{num_workers} threads need {format_bytes(need)}, but {format_bytes(free)} are available; lower "
                f"--num_workers, or check the file with: ffcv-convnext verify {self.beton}"
            )

    def _compile(self) -> None:
        """Compile the kernel, or load it from the cache, by decoding an empty batch."""
        batch = self._allocate(
            Samples.of(np.empty(0, np.int64)), self.source.begin(np.empty(0, np.int64)), self.kernel.size
        )
        with announced_compilation(f"the decoder of {self.beton.name}"):
            self._pool.submit(self._decode, batch, slice(0, 0), Key(np.uint64(0), np.uint64(0))).result()
        batch.data.release()

    def check_pages(self, page_crc32: Sequence[int]) -> None:
        """From now on compare each page with its checksum when one of its samples is first used; none: stop to."""
        start = self.pages_end - len(page_crc32) * self.page_size
        check = PageCheck(page_crc32, start, self.page_size, self.rows["data_ptr"], self.source.crc32)
        self.page_check = check if page_crc32 else None

    def batches(
        self, samples: Iterable[Samples], seed: int, epoch: int, size: int | None = None
    ) -> Generator[Batch, None, None]:
        """Decode the given lists of samples, `batches_ahead` of them in advance, and yield them in order.

        size: side of the images, at most the kernel's, which is the default.
        Yields images (n, 3, size, size) uint8 in channels_last memory and labels (n,) int64 on the device; the caller
        owns both. Closing the generator ends the work.
        A sample that cannot be decoded or lies in a damaged page raises SampleError. With replace_bad, the next good
        sample of its list (after the end, the first) replaces it, image and label, and a warning names both.
        """
        size = self.kernel.size if size is None else size
        if size > self.kernel.size:
            raise ValueError(f"size = {size}: expected at most {self.kernel.size}, for which there is memory")
        self.source.prepare()
        key = Key(np.uint64(seed), np.uint64(epoch))
        pending: deque[_Pending] = deque()
        fetched = self.source.fetch(self._checked(samples))
        try:
            for listed, data in fetched:
                pending.append(self._submit(self._allocate(listed, data, size), key))
                if len(pending) > self.batches_ahead:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            unfinished = [chunk for batch in pending for chunk in batch.chunks if not chunk.cancel()]
            self.is_stuck |= bool(wait(unfinished, 0 if self.is_stuck else _TIMEOUT_S).not_done)
            for batch in pending:
                batch.data.release()
            fetched.close()

    def _checked(self, samples: Iterable[Samples]) -> Iterator[Samples]:
        """Pass lists of samples on after checking their range: compiled code checks no bounds."""
        for listed in samples:
            if len(listed):
                first, last = int(listed.indices.min()), int(listed.indices.max())
                if not 0 <= first <= last < len(self):
                    raise ValueError(f"samples {first} to {last}: expected 0 to {len(self) - 1}")
            yield listed

    def _allocate(self, samples: Samples, data: Fetch, size: int) -> _Pending:
        num = len(samples)
        images = self.transfer.empty(num, size, size, 3, dtype=torch.uint8)
        labels = self.transfer.empty(num, dtype=torch.int64)
        return _Pending(samples, data, images, labels, np.zeros(num, np.int32), [])

    def _submit(self, batch: _Pending, key: Key) -> _Pending:
        samples = batch.samples
        batch.labels.numpy()[:] = self.labels[samples.indices]
        parts = (slice(start, start + _CHUNK) for start in range(0, len(samples), _CHUNK))
        batch.chunks = [self._pool.submit(self._decode, batch, part, key) for part in parts]
        return batch

    def _decode(self, batch: _Pending, part: slice, key: Key) -> None:
        """Decode a part of a batch, in a thread of the pool."""
        if not hasattr(self._own, "scratch"):
            self._own.scratch = Scratch(**{name: np.empty(*size) for name, size in self._scratch_sizes.items()})
        scratch: Scratch = self._own.scratch
        stored, samples = batch.data.wait(), batch.samples.part(part)
        chunk = Chunk(samples.indices, samples.copies, batch.images.numpy()[part], batch.status[part])
        damaged = None if self.page_check is None else self.page_check.damaged(samples.indices)
        self.kernel.decode(chunk, self.rows, stored, key, self.kernel.parameters, scratch, self._functions)
        if damaged is not None:
            chunk.status[damaged] = DAMAGED_PAGE

    def _finish(self, batch: _Pending) -> Batch:
        started = time.perf_counter()
        for number, chunk in enumerate(batch.chunks):
            try:
                chunk.result(_TIMEOUT_S)
            except ReadError:
                raise
            except Exception as error:  # any failure is reported with its samples
                part = batch.samples.indices[number * _CHUNK : (number + 1) * _CHUNK].tolist()
                self.is_stuck |= not chunk.done()
                reason = f"timeout after {_TIMEOUT_S:g} s; check its disk" if self.is_stuck else repr(error)
                raise SampleError(f"{self.beton}: decoding samples {part} failed: {reason}") from error
        self.wait_s += time.perf_counter() - started
        batch.data.release()
        self._replace_bad(batch)
        return self.transfer(batch.images, batch.labels)

    def _replace_bad(self, batch: _Pending) -> None:
        """Replace a batch's bad samples by good ones. Raises SampleError without replace_bad or without good ones."""
        indices = batch.samples.indices
        good = np.flatnonzero(batch.status == OK)
        for i in np.flatnonzero(batch.status != OK):
            problem, action = self._describe_bad(int(indices[i]), int(batch.status[i]))
            if not self.replace_bad or not len(good):
                raise SampleError(f"{problem}; {action}")
            other = int(good[np.searchsorted(good, i) % len(good)])
            batch.images[i], batch.labels[i] = batch.images[other], batch.labels[other]
            self.num_replaced += 1
            log.warning("%s; replaced by sample %d", problem, indices[other])

    def _describe_bad(self, sample: int, status: int) -> tuple[str, str]:
        """Return what is wrong with a sample, and the next action."""
        if status == DAMAGED_PAGE:
            assert self.page_check is not None
            return (
                f"{self.beton}: sample {sample} lies in {self.page_check.describe(sample)}, which differs from its "
                "checksum in the manifest: damaged",
                f"repair it with: ffcv-convnext verify {self.beton} --repair",
            )
        original = None
        if Manifest.path_for(self.beton).exists():
            original = Manifest.for_beton(self.beton).original_file(self.beton, sample)
        reason = f"(original file: {original or 'unknown'}) cannot be decoded: {REASONS[status]}"
        return f"{self.beton}: sample {sample} {reason}", CONVERT_AGAIN

    def close(self) -> None:
        """End the threads; open iterations must not be used any more."""
        self._pool.shutdown(wait=not self.is_stuck, cancel_futures=True)
        self.source.close(wait=not self.is_stuck)
