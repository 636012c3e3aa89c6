"""The stages of training on a device, each measured alone: transfer, augmentation, step; then all of them together.

They use training's own parts (its loader, its augmentation, its train_step) with the config's sizes. Each runs for
about the given seconds, after a warm-up that does not count.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass

import torch

from ffcv_convnext.bench.timing import Batch, RepeatedDecoding, random_batch, rate, synchronizer
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner


def transfer_images_per_s(config: Config, device: torch.device, seconds: float) -> float:
    """Copy uint8 batches from pinned memory to the CUDA device for about `seconds`."""
    side, num = config.data.max_train_size, config.data.batch_size
    images = torch.zeros((num, side, side, 3), dtype=torch.uint8, pin_memory=True)

    def copy() -> int:
        images.to(device, non_blocking=True)
        return num

    copy()
    return rate(copy, seconds, wait=synchronizer(device))


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Times of an optimiser step with micro-batches of `num_images`; rates for other sizes follow from them."""

    num_images: int
    micro_batch_s: float  # forward and backward of one micro-batch
    update_s: float  # optimiser, clipping, averaged weights: once per step
    peak_memory_gb: float | None  # of the device, 1e9 bytes; None: a CPU

    def images_per_s(self, *, batch_size: int, update_freq: int) -> float:
        """Return the rate of steps with micro-batches of batch_size, if an image takes as long as measured."""
        image_s = self.micro_batch_s / self.num_images
        return 1 / (image_s + self.update_s / (batch_size * update_freq))


class StepTimer:
    """Times train.py's optimiser step on one device, with random pixels or the loader's."""

    def __init__(self, config: Config, device: torch.device, *, num_classes: int) -> None:
        config = config.replace(res_batch=False)  # steps are timed at max_res, where nothing is joined
        self.config = config
        self.device = device
        self.num_classes = num_classes
        self.wait = synchronizer(device)
        self.learner: Learner = build_learner(
            config, Processes(0, 1, 0, device), num_classes=num_classes, steps_per_epoch=1000
        )
        self.learner.model.train()
        self.augment = self.learner.augment
        self.num_images = config.data.batch_size

    @property
    def num_parameters(self) -> int:
        """Number of the network's parameters."""
        return sum(p.numel() for p in self.learner.network.parameters())

    def augmentation_images_per_s(self, seconds: float) -> float:
        """Measure the augmentation alone for about `seconds`."""
        images, labels = random_batch(
            self.config, self.config.data.batch_size, self.device, num_classes=self.num_classes
        )

        def augment() -> int:
            self.augment(images, labels, step=0, micro_batch=0)
            return len(images)

        augment()
        return rate(augment, seconds, wait=self.wait)

    def times(self, seconds: float) -> StepTimes:
        """Measure steps on ready inputs: no loader, no augmentation.

        If a step of batch_size takes too long on a CPU, it has fewer images; their number is in the result, and
        `whole_images_per_s` uses it too. Raises Failure if the device's memory is too small.
        """
        return self._times_on_gpu(seconds) if self.device.type == "cuda" else self._times_on_cpu(seconds)

    def _times_on_gpu(self, seconds: float) -> StepTimes:
        torch.cuda.reset_peak_memory_stats(self.device)
        ready = self._ready(self.num_images)
        for _ in range(3):  # cuDNN selects algorithms, torch.compile compiles
            micro_batch_s, _ = self._step(ready, 1)
        num = int(min(max(seconds / 4 / micro_batch_s, 1), 32))  # the host runs ahead, as it does in training
        micro_batch_s, update_s = self._median(ready, num, seconds)
        memory = torch.cuda.max_memory_allocated(self.device) / 1e9
        return StepTimes(self.num_images, micro_batch_s, update_s, memory)

    def _times_on_cpu(self, seconds: float) -> StepTimes:
        min_images = min(2 if self.config.augment.mixes else 1, self.num_images)
        ready = self._ready(min_images)
        self._step(ready, 1)  # oneDNN and torch.compile need a first step
        times = self._step(ready, 1)
        image_s = times[0] / min_images
        while self.num_images * image_s > seconds / 4 and self.num_images // 2 >= min_images:
            self.num_images //= 2
        if self.config.augment.mixup_mode == "pair":
            self.num_images -= self.num_images % 2
        if self.num_images > min_images:
            ready = self._ready(self.num_images)
            self._step(ready, 1)
        if sum(times) < seconds:  # otherwise the single step counts
            times = self._median(ready, 1, seconds)
        return StepTimes(self.num_images, *times, peak_memory_gb=None)

    def _median(self, ready: Batch, num: int, seconds: float) -> tuple[float, float]:
        """Take steps for `seconds`, one or more; return the median seconds of a micro-batch and of an update."""
        found: list[tuple[float, float]] = []
        started = time.perf_counter()
        while not found or time.perf_counter() - started < seconds:
            found.append(self._step(ready, num))
        micro_batch_s, update_s = zip(*found, strict=True)
        return statistics.median(micro_batch_s), statistics.median(update_s)

    def whole_images_per_s(self, decoding: RepeatedDecoding, seconds: float) -> float:
        """Measure steps of one micro-batch, decoded and augmented as in training, as large as in `times`."""
        with closing(decoding.batches(self.num_images)) as batches:

            def step() -> int:
                train_step(self.learner, iter([next(batches)]))
                self.learner.state.step += 1
                return self.num_images

            first = rate(step, 0, wait=self.wait)
            slow = self.num_images / first > seconds
            return first if slow else rate(step, seconds, wait=self.wait)

    def _ready(self, num: int) -> Batch:
        """Return augmented inputs and targets."""
        images, labels = random_batch(self.config, num, self.device, num_classes=self.num_classes)
        return self.augment(images, labels, step=0, micro_batch=0)

    @contextmanager
    def _fixed_inputs(self, ready: Batch) -> Iterator[None]:
        """Let the augmentation return `ready`, so that it takes no time in a step."""
        self.learner.augment = lambda *_, **__: ready  # type: ignore[assignment]
        try:
            yield
        finally:
            self.learner.augment = self.augment

    def _step(self, ready: Batch, num: int) -> tuple[float, float]:
        """Take a step; return the seconds of one of its `num` micro-batches, and of the update after them."""
        done: list[float] = []

        def micro_batches() -> Iterator[Batch]:
            for _ in range(num):
                yield ready
            self.wait()
            done.append(time.perf_counter())

        self.wait()
        started = time.perf_counter()
        try:
            with self._fixed_inputs(ready):
                train_step(self.learner, micro_batches())
            self.wait()
        except torch.cuda.OutOfMemoryError:
            raise Failure(
                f"batch_size = {self.config.data.batch_size}: a step does not fit in the memory of {self.device}; "
                "halve batch_size and double update_freq for the same global batch"
            ) from None
        self.learner.state.step += 1
        return (done[0] - started) / num, time.perf_counter() - done[0]
