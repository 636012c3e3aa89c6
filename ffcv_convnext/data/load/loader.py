"""Batches for training and evaluation: sampler, decoder and transfer, built from a config."""

from __future__ import annotations

import logging
from collections.abc import Generator, Iterator
from itertools import islice
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.data.load.crops import CropKernel, center_crop_kernel, random_crop_kernel
from ffcv_convnext.data.load.decoder import BatchDecoder
from ffcv_convnext.data.load.device import Batch
from ffcv_convnext.data.load.sampler import GlobalBatchSampler, PageShuffle, Samples, eval_batches, is_shuffled
from ffcv_convnext.data.load.sources import Mmap
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.host import (
    available_memory,
    describe_need,
    file_system,
    fit_in_memory,
    is_in_memory,
    num_bytes_in_memory,
)

log = logging.getLogger(__name__)


class _SplitLoader:
    """A checked .beton with its manifest and its decoder."""

    split: ClassVar[str]

    def __init__(
        self, config: DataConfig, device: torch.device, kernel: CropKernel, local_rank: int, num_local: int
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
        available = available_memory()
        lies_in_memory = is_in_memory(beton)  # as with stage_to /dev/shm: it needs no more memory
        need = (
            f"data_cache = {config.data_cache}: {beton.parent} is in memory ({file_system(beton)})"
            if lies_in_memory
            else describe_need(config.data_cache, files, in_memory, available)
        )
        self.decoder = BatchDecoder(
            beton,
            kernel,
            num_workers=config.num_workers,
            batches_ahead=config.batches_ahead,
            device=device,
            replace_bad=self.split == "train" and config.bad_samples == "skip",
            data_cache=config.data_cache,
            local_rank=local_rank,
            num_local=num_local,
        )
        labels = self.decoder.labels
        if len(labels) and not 0 <= labels.min() <= labels.max() < self.num_classes:
            raise ValueError(f"{beton}: labels {labels.min()} to {labels.max()} do not fit {self.num_classes} classes")
        if self.split == "train":
            log.info(need)
        if config.check_data == "first_read":
            by_pages = self.split == "val" or config.order == "quasi_random"
            self._check_pages(is_read_once=by_pages or lies_in_memory or fit_in_memory(files, in_memory, available))

    def _check_pages(self, *, is_read_once: bool) -> None:
        """Check pages while they are read, unless the checks would read the file from the disk once more."""
        beton, page_crc32 = self.decoder.beton, self.manifest.page_crc32
        if page_crc32 and is_read_once:
            self.decoder.check_pages(page_crc32)
            return
        reason = "larger than memory and read in random order" if page_crc32 else "without checksums in its manifest"
        log.info(
            "check_data = first_read: %s is %s, so its pages are not checked; check it once with: "
            "ffcv-convnext verify %s", beton.name, reason, beton,
        )  # fmt: skip

    @property
    def num_classes(self) -> int:
        """Number of classes in the manifest."""
        return len(self.manifest.classes)

    @property
    def num_samples(self) -> int:
        """Number of samples in the file."""
        return len(self.decoder)

    @property
    def num_replaced(self) -> int:
        """Bad samples replaced by another one so far (bad_samples skip)."""
        return self.decoder.num_replaced

    @property
    def wait_s(self) -> float:
        """Seconds that the consumer has waited for batches so far."""
        return self.decoder.wait_s

    def prepare(self) -> None:
        """With data_cache ram, read the file into memory now instead of before the first batch."""
        self.decoder.source.prepare()

    def close(self) -> None:
        """End the threads."""
        self.decoder.close()


class TrainLoader(_SplitLoader):
    """Training batches of one rank; samples and their crops are functions of (seed, epoch)."""

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
        super().__init__(config, device, random_crop_kernel(config), local_rank, num_local)
        self.sampler = GlobalBatchSampler(config.batch_size, config.update_freq, world, config.repeated_aug)
        self.config = config
        self.seed = seed
        self.rank = rank
        self.steps_per_epoch = self.sampler.num_steps(self.num_samples)
        self.page_shuffle = self._page_shuffle(config) if config.order == "quasi_random" else None

    def _page_shuffle(self, config: DataConfig) -> PageShuffle:
        """Group samples by page. Raises ValueError if the file is in class order: a window would hold few classes."""
        addresses, page_size = self.decoder.rows["data_ptr"], self.decoder.page_size
        shuffle = PageShuffle.of(addresses, page_size, config.shuffle_window_mb * 10**6)
        windows, pages = shuffle.num_windows, len(shuffle.offsets)
        if windows > 1 and not is_shuffled(self.decoder.labels[np.argsort(addresses)]):
            raise ValueError(
                f"order = quasi_random: {self.decoder.beton} is in class order, so a window would hold few classes; "
                "convert it shuffled, which is the default of write_ffcv_dataset.py --overwrite, or use --order random"
            )
        log.info("order quasi_random: %d windows of about %s", windows, format_bytes(page_size * pages / windows))
        return shuffle

    def samples(self, epoch: int, first_step: int = 0) -> Iterator[Samples]:
        """Yield the samples of each micro-batch that `steps` decodes."""
        return self.sampler.micro_batches(self.num_samples, self.seed, epoch, self.rank, first_step, self.page_shuffle)

    def steps(self, epoch: int, first_step: int = 0) -> Generator[Iterator[Batch], None, None]:
        """Yield, for each optimiser step of the epoch from `first_step` on, its micro-batches of this rank.

        Each is images (batch_size, 3, size, size) uint8 channels_last and labels (batch_size,) int64 on the device,
        with size = config.train_size(epoch). Use all micro-batches of a step before you take the next step.
        """
        samples = self.samples(epoch, first_step)
        source = self.decoder.source
        if self.page_shuffle is not None and isinstance(source, Mmap):
            positions = self.sampler.positions(self.num_samples, self.rank, first_step)
            samples = self._reading_pages(samples, self.page_shuffle.pages_ahead(self.seed, epoch, positions), source)
        batches = self.decoder.batches(samples, self.seed, epoch, self.config.train_size(epoch))
        try:
            for _ in range(first_step, self.steps_per_epoch):
                yield islice(batches, self.sampler.update_freq)
        finally:
            batches.close()

    def _reading_pages(
        self, samples: Iterator[Samples], pages: Iterator[NDArray[np.int64]], source: Mmap
    ) -> Iterator[Samples]:
        """Pass micro-batches on and read the next window's pages meanwhile."""
        for micro_batch, offsets in zip(samples, pages, strict=True):
            source.announce(offsets, np.full(len(offsets), self.decoder.page_size))
            yield micro_batch


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
        super().__init__(config, device, center_crop_kernel(config), local_rank, num_local)
        self.samples = eval_batches(self.num_samples, config.batch_size, rank, world)

    def __iter__(self) -> Iterator[Batch]:
        """Yield images (n, 3, test_size, test_size) uint8 channels_last and labels (n,) int64 on the device.

        The last batch may be smaller.
        """
        return self.decoder.batches(self.samples, seed=0, epoch=0)
