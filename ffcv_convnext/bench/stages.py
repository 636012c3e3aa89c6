"""The stages of training, each measured alone: decode, transfer, augmentation, step; then all of them together.

They are training's own parts (its loader, its augmentation, its train_step), with the config's sizes. Each runs for
about the seconds it is given, after a warm-up that does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ffcv_convnext.bench.compare import Timed
from ffcv_convnext.config import Config, DataConfig
from ffcv_convnext.errors import Failure
from ffcv_convnext.rng import permutation
from ffcv_convnext.training import Learner, Processes, build_learner, train_step

if TYPE_CHECKING:
    from ffcv_convnext.data.load import Samples

Batch = tuple[Tensor, Tensor]
MOST_SAMPLES = 2048  # decoded again and again, so that they come from memory


class Decoding:
    """A .beton's training batches, from samples that are in memory. Close it after use."""

    def __init__(self, beton: Path, config: DataConfig, device: torch.device, *, num_workers: int) -> None:
        self.batch_size = config.batch_size
        from ffcv_convnext.data.load import BatchDecoder, random_crop_kernel

        self.loader = BatchDecoder(
            beton,
            random_crop_kernel(config),
            num_workers=num_workers,
            batches_ahead=config.batches_ahead,
            device=device,
            replace_bad=config.bad_samples == "skip",
        )
        self.samples = permutation(len(self.loader), 0, 0)[:MOST_SAMPLES]

    def warm(self, seconds: float) -> None:
        """Decode samples until they are all in memory; what is not reached in that time is left out from then on."""
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

    def batches(self, size: int | None = None) -> Generator[Batch, None, None]:
        """Without end, (size, 3, side, side) uint8 and labels on the device; size: the config's batch_size."""
        batches: Generator[Batch, None, None] = self.loader.batches(self._lists(size or self.batch_size), 0, 0)
        return batches

    def _lists(self, size: int) -> Iterator[Samples]:
        from ffcv_convnext.data.load import Samples

        at, num = 0, len(self.samples)
        while True:
            yield Samples.of(self.samples[(at + np.arange(size)) % num])
            at += size

    def images_per_s(self, seconds: float) -> float:
        with closing(self.batches()) as batches:
            next(batches)
            return rate(lambda: len(next(batches)[0]), seconds)

    def close(self) -> None:
        self.loader.close()


def rate(work: Callable[[], int], seconds: float, *, wait: Callable[[], None] = lambda: None) -> float:
    """Images/s of `work`, which returns how many it did, called again and again, once at least.

    wait: until the device has done what was asked of it.
    """
    timed = timed_work(work, seconds, wait)
    return timed.images / timed.seconds


def timed_work(work: Callable[[], int], seconds: float, wait: Callable[[], None]) -> Timed:
    """What `rate` measures."""
    wait()
    started, num, calls = time.perf_counter(), 0, 0
    while not calls or time.perf_counter() - started < seconds:
        num += work()
        calls += 1
        if calls % 16 == 0:
            wait()  # or the host would run far ahead of the device
    wait()
    return Timed(num, time.perf_counter() - started)


def repeating(work: Callable[[], int], seconds: float, device: torch.device) -> Callable[[], Timed]:
    """A round of about so many seconds for `rounds.compare`: `work`, which returns how many images it did, repeated.

    It gives a GPU's memory back when it is done, since the other contestants' turns come; so it begins with work
    that does not count.
    """
    wait = waiting_for(device)

    def round_of_work() -> Timed:
        work()
        done = timed_work(work, seconds, wait)
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return done

    return round_of_work


def waiting_for(device: torch.device) -> Callable[[], None]:
    """What waits until the device has finished."""
    return (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)


def some_images(config: Config, num: int, device: torch.device, *, num_classes: int) -> Batch:
    """Random pixels as the loader hands them out: (num, 3, side, side) uint8 channels_last, labels (num,) int64."""
    side = config.data.input_size
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (num, side, side, 3), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, num_classes, (num,), generator=generator)
    return images.to(device).permute(0, 3, 1, 2), labels.to(device)


@dataclass(frozen=True, slots=True)
class TransferRate:
    images_per_s: float
    gigabytes_per_s: float  # 1e9 bytes


def transfer(config: Config, device: torch.device, seconds: float) -> TransferRate:
    """Batches from pinned memory to the CUDA device."""
    side, num = config.data.input_size, config.data.batch_size
    images = torch.zeros((num, side, side, 3), dtype=torch.uint8, pin_memory=True)

    def copy() -> int:
        images.to(device, non_blocking=True)
        return num

    copy()
    images_per_s = rate(copy, seconds, wait=waiting_for(device))
    return TransferRate(images_per_s, images_per_s * 3 * side * side / 1e9)


@dataclass(frozen=True, slots=True)
class StepTimes:
    """An optimiser step on micro-batches of `num_images`: images/s follow for any number of them."""

    num_images: int
    micro_batch_s: float  # forward and backward of one micro-batch
    update_s: float  # optimiser, clipping, averaged weights: once a step
    peak_memory_gb: float | None  # the device's, 1e9 bytes; none: a CPU

    def images_per_s(self, *, batch_size: int, update_freq: int) -> float:
        """Of steps with micro-batches of batch_size, as fast an image as the measured ones."""
        image_s = self.micro_batch_s / self.num_images
        return 1 / (image_s + self.update_s / (batch_size * update_freq))


class Stepping:
    """The optimiser step that train.py takes, on one device, with random pixels or the loader's."""

    def __init__(self, config: Config, device: torch.device, *, num_classes: int) -> None:
        self.config = config
        self.device = device
        self.num_classes = num_classes
        self.wait = waiting_for(device)
        self.learner: Learner = build_learner(
            config, Processes(0, 1, 0, device), num_classes=num_classes, steps_per_epoch=1000
        )
        self.learner.model.train()
        self.augment = self.learner.augment
        self.num_images = config.data.batch_size

    @property
    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.learner.network.parameters())

    def augmentation_images_per_s(self, seconds: float) -> float:
        images, labels = some_images(
            self.config, self.config.data.batch_size, self.device, num_classes=self.num_classes
        )

        def augment() -> int:
            self.augment(images, labels, step=0, micro_batch=0)
            return len(images)

        augment()
        return rate(augment, seconds, wait=self.wait)

    def times(self, seconds: float) -> StepTimes:
        """Measure steps on ready inputs: no loader, no augmentation.

        On a CPU a step of batch_size may take too long: then fewer images, whose number is in the result and stays
        for `whole_images_per_s`. Raises Failure when the device's memory is too small.
        """
        return self._times_on_gpu(seconds) if self.device.type == "cuda" else self._times_on_cpu(seconds)

    def _times_on_gpu(self, seconds: float) -> StepTimes:
        torch.cuda.reset_peak_memory_stats(self.device)
        ready = self._ready(self.num_images)
        for _ in range(3):  # choices of algorithms, torch.compile
            micro_batch_s, _ = self._step(ready, 1)
        num = int(min(max(seconds / 4 / micro_batch_s, 1), 32))  # the host runs ahead, as it does in training
        micro_batch_s, update_s = self._median(ready, num, seconds)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        return StepTimes(self.num_images, micro_batch_s, update_s, memory)

    def _times_on_cpu(self, seconds: float) -> StepTimes:
        least = min(2 if self.config.augment.mixes else 1, self.num_images)
        ready = self._ready(least)
        self._step(ready, 1)  # oneDNN and torch.compile prepare
        times = self._step(ready, 1)
        image_s = times[0] / least
        while self.num_images * image_s > seconds / 4 and self.num_images // 2 >= least:
            self.num_images //= 2
        if self.config.augment.mixup_mode == "pair":
            self.num_images -= self.num_images % 2
        if self.num_images > least:
            ready = self._ready(self.num_images)
            self._step(ready, 1)
        if sum(times) < seconds:  # else that one step has to do
            times = self._median(ready, 1, seconds)
        return StepTimes(self.num_images, *times, peak_memory_gb=None)

    def _median(self, ready: Batch, num: int, seconds: float) -> tuple[float, float]:
        """Of steps taken for that long, one at least: seconds of a micro-batch, and of an update."""
        found: list[tuple[float, float]] = []
        started = time.perf_counter()
        while not found or time.perf_counter() - started < seconds:
            found.append(self._step(ready, num))
        micro_batch_s, update_s = zip(*found, strict=True)
        return statistics.median(micro_batch_s), statistics.median(update_s)

    def whole_images_per_s(self, decoding: Decoding, seconds: float) -> float:
        """Steps of one micro-batch each, decoded and augmented as in training, in micro-batches as `times` took."""
        with closing(decoding.batches(self.num_images)) as batches:

            def step() -> int:
                train_step(self.learner, iter([next(batches)]))
                self.learner.state.step += 1
                return self.num_images

            first = rate(step, 0, wait=self.wait)
            slow = self.num_images / first > seconds
            return first if slow else rate(step, seconds, wait=self.wait)

    def _ready(self, num: int) -> Batch:
        """Inputs and targets as the augmentation makes them."""
        images, labels = some_images(self.config, num, self.device, num_classes=self.num_classes)
        return self.augment(images, labels, step=0, micro_batch=0)

    @contextmanager
    def _augmentation_gives(self, ready: Batch) -> Iterator[None]:
        """So that a step's time holds none of it."""
        self.learner.augment = lambda *_, **__: ready  # type: ignore[assignment]
        try:
            yield
        finally:
            self.learner.augment = self.augment

    def _step(self, ready: Batch, num: int) -> tuple[float, float]:
        """Seconds of one of `num` micro-batches, and of the update after them."""
        done: list[float] = []

        def micro_batches() -> Iterator[Batch]:
            for _ in range(num):
                yield ready
            self.wait()
            done.append(time.perf_counter())

        self.wait()
        started = time.perf_counter()
        try:
            with self._augmentation_gives(ready):
                train_step(self.learner, micro_batches())
            self.wait()
        except torch.cuda.OutOfMemoryError:
            raise Failure(
                f"batch_size = {self.config.data.batch_size}: a step does not fit into the memory of {self.device}; "
                "halve batch_size and double update_freq for the same global batch"
            ) from None
        self.learner.state.step += 1
        return (done[0] - started) / num, time.perf_counter() - done[0]
