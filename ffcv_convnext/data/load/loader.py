"""Batches for training and evaluation: the one place where an FFCV Loader is built.

FFCV supplies the file format, its reader, and the compilation of a pipeline of operations. What it does while an
epoch runs is replaced, since its own iterator hangs when an operation raises, hands out views into a ring that it
overwrites later, leaks a thread when an epoch is left early, and sets PyTorch's thread count. Here a batch is cut
into small chunks that a thread pool decodes (the compiled code releases the GIL), into memory of the batch's own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.beton.manifest import Manifest, check_header
from ffcv_convnext.data.codec.decode import OK, REASONS, addresses
from ffcv_convnext.data.codec.jit import announced_compilation
from ffcv_convnext.data.load.crops import (
    CenterCropDecoder,
    CropDecoder,
    LabelDecoder,
    RandomCropDecoder,
    WorkerScratch,
    stored_bytes,
)
from ffcv_convnext.data.load.sampler import COPY, QuasiRandom, Shares, eval_batches, is_shuffled
from ffcv_convnext.data.load.sources import Fetch, LoadedFile, MappedFile, ReadError, ReadFile
from ffcv_convnext.errors import Failure
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.host import available_memory, describe_need, num_bytes_in_memory

with importing_ffcv():
    import ffcv.loader
    from ffcv.pipeline import Compiler, PipelineSpec
    from ffcv.pipeline.graph import Graph
    from ffcv.reader import Reader

log = logging.getLogger(__name__)

Batch = tuple[Tensor, Tensor]
_CHUNK = 8  # images a thread decodes before it looks for more work: some 10 ms
_PATIENCE_S = 600.0  # no chunk takes so long, but a network disk may not answer at all


class SampleError(Failure):
    """A stored sample that cannot be decoded; the message names its index, its original file and the reason."""


@dataclass(slots=True)
class _Pending:
    """A batch whose chunks are being decoded."""

    listed: NDArray[np.int64]  # sample + copy * COPY
    samples: NDArray[np.int64]
    data: Fetch
    draws: NDArray[np.uint64]  # (seed, epoch)
    images: Tensor
    labels: Tensor
    status: NDArray[np.int32]
    chunks: list[Future[None]]


class SampleLoader(ffcv.loader.Loader):  # type: ignore[misc]
    """FFCV's Loader for an image and a label, iterated by lists of sample indices.

    It is constructed without FFCV's constructor, whose managers and thread settings are not wanted; pipelines,
    graph and code generation are FFCV's.
    """

    def __init__(
        self,
        beton: Path,
        decoder: CropDecoder,
        *,
        num_workers: int,
        batches_ahead: int,
        device: torch.device,
        replace_bad: bool = False,
        data_cache: Literal["os", "process", "ram"] = "os",
        local_rank: int = 0,
        num_local: int = 1,
    ) -> None:
        """local_rank, num_local: of the processes on this node, which share the work of data_cache ram."""
        self.fname = str(beton)
        self.num_workers = num_workers
        self.batches_ahead = batches_ahead
        self.device = device
        self.replace_bad = replace_bad
        self.is_stuck = False  # a thread waits for the disk, and may do so for ever
        self.num_replaced = 0  # bad samples so far that another one stood in for
        self.wait_s = 0.0  # time the consumer has waited for batches, in total
        check_header(beton)
        self.reader = Reader(self.fname)
        if list(self.reader.handlers) != ["image", "label"]:
            raise ValueError(
                f"{beton} has the fields {', '.join(self.reader.handlers)}: expected image, label; "
                "write it anew with write_ffcv_dataset.py"
            )
        tables = beton, self.reader.metadata["f0"]["data_ptr"], self.reader.alloc_table
        self.file: MappedFile | ReadFile
        if data_cache == "ram":
            self.file = LoadedFile(*tables, local_rank, num_local)
        else:
            self.file = (MappedFile if data_cache == "os" else ReadFile)(*tables)
        decoder.most_bytes = self.file.most_bytes
        self.functions = addresses()
        specs = {
            "image": PipelineSpec("image", decoder=decoder),
            "label": PipelineSpec("label", decoder=LabelDecoder()),
        }
        self.graph = Graph(specs, self.reader.handlers, {"image": 0, "label": 1}, self.reader.metadata, stored_bytes)
        queries, _ = self.graph.collect_requirements()
        self.image_memory, self.label_memory = queries["operation"].values()
        Compiler.set_enabled(False)  # our operations are compiled already, and kept between processes
        try:
            self.generate_code()
        finally:
            Compiler.set_enabled(True)
        self.pool = ThreadPoolExecutor(num_workers, thread_name_prefix="decode")
        self.scratch = threading.local()
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._compile(f"the decoder of {beton.name}")

    def _compile(self, what: str) -> None:
        """Compile, or load, what the first batch would wait for, by decoding no samples at all."""
        none = np.empty(0, np.int64)
        images, labels = torch.empty((0, *self.image_memory[0].shape), dtype=torch.uint8), torch.empty((0, 1)).long()
        draws, status = np.zeros(2, np.uint64), np.zeros(0, np.int32)
        batch = _Pending(none, none, self.file.begin(none), draws, images, labels, status, [])
        with announced_compilation(what):
            self.pool.submit(self._decode, batch, (images.numpy(), labels.numpy()), slice(0, 0)).result()
        batch.data.release()

    def __len__(self) -> int:
        return len(self.reader.metadata)

    def __iter__(self) -> Iterator[Batch]:
        raise TypeError("iterate over batches(...) instead, which says which samples")

    def batches(self, samples: Iterable[NDArray[np.int64]], seed: int, epoch: int) -> Generator[Batch, None, None]:
        """Decode the given lists of samples, `batches_ahead` of them in advance, and yield them in order.

        samples: arrays (n,) of index + copy * COPY, see order.py; each copy of a sample has a crop and flip of its own.
        Yields images (n, 3, size, size) uint8 in channels_last memory and labels (n,) int64 on the device, both
        the caller's own. Leaving the iteration early ends the work.
        A sample that cannot be decoded raises SampleError, or, with replace_bad, gives way to the next good one of
        its list (from the end on, the first): image and label of that one come twice. A warning names it.
        """
        self.file.prepare()
        draws = np.array([seed, epoch], dtype=np.uint64)
        pending: deque[_Pending] = deque()
        lists, wanted = tee(samples)
        fetched = self.file.fetch(map(self._indices, wanted))
        try:
            for listed, (indices, data) in zip(lists, fetched, strict=True):
                pending.append(self._submit(listed, indices, data, draws))
                if len(pending) > self.batches_ahead:
                    yield self._finish(pending.popleft())
            while pending:
                yield self._finish(pending.popleft())
        finally:
            unfinished = [chunk for batch in pending for chunk in batch.chunks if not chunk.cancel()]
            self.is_stuck |= bool(wait(unfinished, 0 if self.is_stuck else _PATIENCE_S).not_done)
            for batch in pending:
                batch.data.release()
            fetched.close()

    def _indices(self, listed: NDArray[np.int64]) -> NDArray[np.int64]:
        """The samples without the numbers of their copies, checked: compiled code looks at no bounds."""
        samples = listed % COPY
        if len(samples) and not (listed.min() >= 0 and samples.max() < len(self)):
            raise ValueError(f"samples {listed.min()} to {listed.max()}: expected 0 to {len(self) - 1}")
        return samples

    def _submit(
        self, listed: NDArray[np.int64], samples: NDArray[np.int64], data: Fetch, draws: NDArray[np.uint64]
    ) -> _Pending:
        pinned = self.device.type == "cuda"
        images_query = self.image_memory[0]
        num = len(samples)
        images = torch.empty((num, *images_query.shape), dtype=torch.uint8, pin_memory=pinned)
        labels = torch.empty((num, 1), dtype=torch.int64, pin_memory=pinned)
        batch = _Pending(listed, samples, data, draws, images, labels, np.zeros(num, np.int32), [])
        arrays = images.numpy(), labels.numpy()
        for start in range(0, num, _CHUNK):
            batch.chunks.append(self.pool.submit(self._decode, batch, arrays, slice(start, min(start + _CHUNK, num))))
        return batch

    def _decode(self, batch: _Pending, arrays: tuple[NDArray[Any], NDArray[Any]], part: slice) -> None:
        """Run FFCV's compiled stages on a part of a batch, in a thread of the pool."""
        if not hasattr(self.scratch, "memory"):
            self.scratch.memory = tuple(
                np.empty(query.shape, query.dtype) for query in self.image_memory if isinstance(query, WorkerScratch)
            )
        content, places, sizes, offsets = batch.data.wait()
        images, labels = arrays
        stages, _ = self.code
        image_node, label_node = (node.id for node in self.graph.nodes)
        arguments: dict[str, Any] = {
            "batch_indices": batch.samples[part],
            "metadata": self.reader.metadata,
            "storage_state": (content, places, sizes, batch.draws, self.functions, offsets, batch.listed[part]),
            f"memory_{image_node}": (images[part], batch.status[part], self.scratch.memory),
            f"memory_{label_node}": labels[part],
            f"shared_memory_{image_node}": None,
            f"shared_memory_{label_node}": None,
        }
        for stage, _ in stages:
            stage(**arguments)

    def _finish(self, batch: _Pending) -> Batch:
        started = time.perf_counter()
        for number, chunk in enumerate(batch.chunks):
            try:
                chunk.result(_PATIENCE_S)
            except ReadError:
                raise
            except Exception as error:  # whatever it is, say where
                part = batch.samples[number * _CHUNK : (number + 1) * _CHUNK].tolist()
                self.is_stuck |= not chunk.done()
                reason = f"nothing came for {_PATIENCE_S:g} s; look after its disk" if self.is_stuck else repr(error)
                raise SampleError(f"{self.fname}: decoding samples {part} failed: {reason}") from error
        self.wait_s += time.perf_counter() - started
        batch.data.release()
        self._treat_bad(batch)
        images, labels = batch.images.permute(0, 3, 1, 2), batch.labels[:, 0]
        if self.copy_stream is None:
            return images, labels
        with torch.cuda.stream(self.copy_stream):
            images = images.to(self.device, non_blocking=True)
            labels = labels.to(self.device, non_blocking=True)
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.copy_stream)
        for tensor in (images, labels):
            tensor.record_stream(current)
        return images, labels

    def _treat_bad(self, batch: _Pending) -> None:
        """Raise for a batch's bad samples, or put good ones in their places."""
        good = np.flatnonzero(batch.status == OK)
        for i in np.flatnonzero(batch.status != OK):
            trouble = self._describe_bad(int(batch.samples[i]), REASONS[int(batch.status[i])])
            if not self.replace_bad or not len(good):
                raise SampleError(f"{trouble}; write the file anew with write_ffcv_dataset.py --overwrite")
            stand_in = int(good[np.searchsorted(good, i) % len(good)])
            batch.images[i], batch.labels[i] = batch.images[stand_in], batch.labels[stand_in]
            self.num_replaced += 1
            log.warning("%s; sample %d takes its place", trouble, batch.samples[stand_in])

    def _describe_bad(self, sample: int, reason: str) -> str:
        beton = Path(self.fname)
        original = None
        if Manifest.path_for(beton).exists():
            original = Manifest.for_beton(beton).original_file(beton, sample)
        return f"{beton}: sample {sample} (made from {original or 'an unknown file'}) cannot be used: {reason}"

    def close(self) -> None:
        """End the worker threads; iterations still open must not be used any more."""
        self.pool.shutdown(wait=not self.is_stuck, cancel_futures=True)
        self.file.close(wait=not self.is_stuck)


class _SplitLoader:
    """What training and evaluation loaders share: a checked file and its manifest."""

    split: str

    def __init__(
        self, config: DataConfig, device: torch.device, decoder: CropDecoder, local_rank: int, num_local: int
    ) -> None:
        if config.data_path is None:
            raise ValueError("data_path is not set; give the folder with train.beton: --data_path BETON_DIR")
        beton = config.data_path / f"{self.split}.beton"
        if not beton.is_file():
            raise FileNotFoundError(
                f"data_path: {beton} does not exist; create it with: "
                f"python write_ffcv_dataset.py --data_path IMAGENET --out_dir {config.data_path} --split {self.split}"
            )
        self.manifest = Manifest.check(beton)
        files = list(dict.fromkeys(path for path in (beton, beton.with_name("val.beton")) if path.is_file()))
        in_memory = sum(map(num_bytes_in_memory, files)) if config.data_cache == "ram" else 0
        need = describe_need(config.data_cache, files, in_memory, available_memory())
        self.loader = SampleLoader(
            beton,
            decoder,
            num_workers=config.num_workers,
            batches_ahead=config.batches_ahead,
            device=device,
            replace_bad=self.split == "train" and config.bad_samples == "skip",
            data_cache=config.data_cache,
            local_rank=local_rank,
            num_local=num_local,
        )
        labels = self.loader.reader.metadata["f1"]
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(f"{beton}: labels {labels.min()} to {labels.max()} do not fit {self.num_classes} classes")
        if self.split == "train":
            log.info(need)

    @property
    def num_classes(self) -> int:
        return len(self.manifest.classes)

    @property
    def num_samples(self) -> int:
        return len(self.loader)

    @property
    def num_replaced(self) -> int:
        """Bad samples so far that another one stood in for (bad_samples skip)."""
        return self.loader.num_replaced

    @property
    def wait_s(self) -> float:
        """Seconds the consumer has waited for batches so far."""
        return self.loader.wait_s

    def prepare(self) -> None:
        """With data_cache ram, bring the file into memory now; the first batch would do it otherwise."""
        self.loader.file.prepare()

    def close(self) -> None:
        self.loader.close()


class TrainLoader(_SplitLoader):
    """Training batches of one rank; which samples come, and their crops, are functions of (seed, epoch)."""

    split = "train"

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        num_local: int = 1,
    ) -> None:
        super().__init__(config, device, RandomCropDecoder(config), local_rank, num_local)
        self.shares = Shares(config.batch_size, config.update_freq, world, config.repeated_aug)
        self.seed = seed
        self.rank = rank
        self.steps_per_epoch = self.shares.num_steps(self.num_samples)
        self.quasi_random = self._quasi_random(config) if config.order == "quasi_random" else None

    def _quasi_random(self, config: DataConfig) -> QuasiRandom:
        """Raises ValueError when the file lies in class order, which windows of it would not undo."""
        rows, page_size = self.loader.reader.metadata, int(self.loader.reader.page_size)
        addresses = rows["f0"]["data_ptr"]
        quasi_random = QuasiRandom.of(addresses, page_size, config.shuffle_window_mb * 10**6)
        windows, pages = quasi_random.num_windows, len(quasi_random.offsets)
        if windows > 1 and not is_shuffled(rows["f1"][np.argsort(addresses)]):
            raise ValueError(
                f"order = quasi_random: {self.loader.fname} is in class order, so a window would hold few classes; "
                "write it shuffled, which is the default of write_ffcv_dataset.py --overwrite, or use --order random"
            )
        log.info("order quasi_random: %d windows of about %s", windows, format_bytes(page_size * pages / windows))
        return quasi_random

    def samples(self, epoch: int, first_step: int = 0) -> Iterator[NDArray[np.int64]]:
        """What `steps` takes, micro-batch by micro-batch: (batch_size,) index + copy * COPY, see order.py."""
        return self.shares.micro_batches(self.num_samples, self.seed, epoch, self.rank, first_step, self.quasi_random)

    def steps(self, epoch: int, first_step: int = 0) -> Generator[Iterator[Batch], None, None]:
        """Yield, for each optimiser step of the epoch from `first_step` on, its micro-batches of this rank.

        Each is images (batch_size, 3, input_size, input_size) uint8 channels_last and labels (batch_size,) int64 on
        the device. A step's micro-batches must be used up before the next step is asked for.
        """
        samples = self.samples(epoch, first_step)
        if self.quasi_random is not None and isinstance(self.loader.file, MappedFile):
            positions = self.shares.positions(self.num_samples, self.rank, first_step)
            samples = self._reading_pages(samples, self.quasi_random.pages_ahead(self.seed, epoch, positions))
        batches = self.loader.batches(samples, self.seed, epoch)
        try:
            for _ in range(first_step, self.steps_per_epoch):
                yield islice(batches, self.shares.update_freq)
        finally:
            batches.close()

    def _reading_pages(
        self, samples: Iterator[NDArray[np.int64]], pages: Iterator[NDArray[np.int64]]
    ) -> Iterator[NDArray[np.int64]]:
        """Pass micro-batches on and have the next window's pages read meanwhile."""
        file = self.loader.file
        assert isinstance(file, MappedFile)
        for indices, offsets in zip(samples, pages, strict=True):
            file.announce(offsets, np.full(len(offsets), int(self.loader.reader.page_size)))
            yield indices


class EvalLoader(_SplitLoader):
    """Evaluation batches of one rank; over all ranks each image comes exactly once."""

    split = "val"

    def __init__(
        self,
        config: DataConfig,
        device: torch.device,
        *,
        rank: int = 0,
        world: int = 1,
        local_rank: int = 0,
        num_local: int = 1,
    ) -> None:
        super().__init__(config, device, CenterCropDecoder(config), local_rank, num_local)
        self.samples = eval_batches(self.num_samples, config.batch_size, rank, world)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (n, 3, input_size, input_size) uint8 channels_last and labels (n,) int64 on the device.

        The last batch may be smaller.
        """
        return self.loader.batches(self.samples, seed=0, epoch=0)
