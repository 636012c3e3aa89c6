"""Rates of repeated work, and the inputs that training's own parts are timed with."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ffcv_convnext.bench.compare import Timed
from ffcv_convnext.config import Config, DataConfig
from ffcv_convnext.rng import permutation

if TYPE_CHECKING:
    from ffcv_convnext.data.load import Samples

Batch = tuple[Tensor, Tensor]
MAX_SAMPLES = 2048  # decoded again and again, so that they are in memory


def rate(work: Callable[[], int], seconds: float, *, wait: Callable[[], None] = lambda: None) -> float:
    """Return what `repeat` measures in images/s."""
    timed = repeat(work, seconds, wait)
    return timed.images / timed.seconds


def repeat(work: Callable[[], int], seconds: float, wait: Callable[[], None]) -> Timed:
    """Call `work`, which returns its number of images, for about `seconds`, at least once.

    wait: blocks until the device has finished.
    """
    wait()
    started, num, calls = time.perf_counter(), 0, 0
    while not calls or time.perf_counter() - started < seconds:
        num += work()
        calls += 1
        if calls % 16 == 0:
            wait()  # the host must not run far ahead of the device
    wait()
    return Timed(num, time.perf_counter() - started)


def repeated_round(work: Callable[[], int], seconds: float, device: torch.device) -> Callable[[], Timed]:
    """Return a round for bench.compare: `work` once without counting, then for about `seconds`.

    At the end of a round the GPU's memory is free for the other contestants.
    """
    wait = synchronizer(device)

    def one_round() -> Timed:
        work()
        done = repeat(work, seconds, wait)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return done

    return one_round


def synchronizer(device: torch.device) -> Callable[[], None]:
    """Return a function that blocks until the device has finished."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def random_batch(config: Config, num: int, device: torch.device, *, num_classes: int) -> Batch:
    """Return random pixels in the loader's form: (num, 3, side, side) uint8 channels_last, labels (num,) int64."""
    side = config.data.max_train_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    return images.to(device).permute(0, 3, 1, 2), labels.to(device)


class RepeatedDecoding:
    """Training batches of a .beton without end, from a few samples that are in memory. Close it after use."""

    def __init__(self, beton: Path, config: DataConfig, device: torch.device, *, num_workers: int) -> None:
        from ffcv_convnext.data.load import BatchDecoder, random_crop_kernel

        self.batch_size = config.batch_size
        self.loader = BatchDecoder(
            beton,
            random_crop_kernel(config),
            num_workers=num_workers,
            batches_ahead=config.batches_ahead,
            device=device,
            replace_bad=config.bad_samples == "skip",
        )
        self.samples = permutation(len(self.loader), 0, 0)[:MAX_SAMPLES]

    def warm(self, seconds: float) -> None:
        """Decode the samples once so that they are in memory; drop those not reached within `seconds`."""
        from ffcv_convnext.data.load import Samples

        started, num = 0.0, 0
        parts = np.array_split(self.samples, max(1, len(self.samples) // self.batch_size))
        with closing(self.loader.batches(map(Samples.of, parts), 0, 0)) as batches:
            for images, _ in batches:
                num += len(images)
                started = started or time.perf_counter()  # the first batch may have waited for compilation
                if time.perf_counter() - started >= seconds:
                    break
        self.samples = self.samples[:num]

    def batches(self, size: int | None = None, *, side: int | None = None) -> Generator[Batch, None, None]:
        """Yield (size, 3, side, side) uint8 and labels on the device.

        size: default the config's batch_size.   side: default the largest of the training images, pixels.
        """
        lists = self._lists(size or self.batch_size)
        batches: Generator[Batch, None, None] = self.loader.batches(lists, 0, 0, side)
        return batches

    def _lists(self, size: int) -> Iterator[Samples]:
        from ffcv_convnext.data.load import Samples

        at, num = 0, len(self.samples)
        while True:
            yield Samples.of(self.samples[(at + np.arange(size)) % num])
            at += size

    def images_per_s(self, seconds: float) -> float:
        """Measure decoding for about `seconds`."""
        with closing(self.batches()) as batches:
            next(batches)
            return rate(lambda: len(next(batches)[0]), seconds)

    def close(self) -> None:
        """End the loader's threads."""
        self.loader.close()
