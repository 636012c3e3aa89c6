"""Training losses without waiting for the device, and exact evaluation counts over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ffcv_convnext.augment import Normalisation, normalise
from ffcv_convnext.errors import Failure
from ffcv_convnext.training.distributed import Processes


@dataclass(slots=True)
class LossMean:
    """A mean over optimiser steps; plain numbers, part of a checkpoint."""

    total: float = 0.0
    num_steps: int = 0

    def add(self, losses: list[float]) -> None:
        """Add losses one by one, so that the sum does not depend on how often they are fetched."""
        for loss in losses:
            self.total += loss
        self.num_steps += len(losses)

    @property
    def value(self) -> float | None:
        """The mean, or None without steps."""
        return self.total / self.num_steps if self.num_steps else None


@dataclass(slots=True)
class LossTracker:
    """Losses, on the device until `flush` fetches them: only there the host waits for the device."""

    processes: Processes
    epoch: LossMean = field(default_factory=LossMean)
    interval: LossMean = field(default_factory=LossMean)  # since the last log point
    _waiting: list[tuple[int, Tensor]] = field(default_factory=list)

    def add(self, loss: Tensor, step: int) -> None:
        """Store a micro-batch's mean loss (scalar, detached) of optimiser step `step`."""
        self._waiting.append((step, loss))

    def flush(self) -> None:
        """Fetch the stored losses and add each step's mean over its micro-batches and all processes.

        Raises Failure, on every process, with the steps whose loss is NaN or infinite.
        """
        if not self._waiting:
            return
        steps = sorted({step for step, _ in self._waiting})
        row = torch.tensor([steps.index(step) for step, _ in self._waiting])
        losses = torch.stack([loss for _, loss in self._waiting]).double().cpu()
        num_per_step = len(self._waiting) // len(steps) * self.processes.world
        self._waiting.clear()
        totals = torch.zeros(len(steps), dtype=torch.float64).index_add_(0, row, losses)
        means = (self.processes.sum(totals) / num_per_step).tolist()
        bad = [step for step, loss in zip(steps, means, strict=True) if not math.isfinite(loss)]
        if bad:
            raise Failure(f"the loss is not finite at optimiser step {', '.join(map(str, bad[:5]))}")
        self.epoch.add(means)
        self.interval.add(means)


@dataclass(slots=True)
class Throughput:
    """Images/s of training, without evaluation and a process's first interval (compilation, cold caches)."""

    images: int = 0
    seconds: float = 0.0
    _started: float | None = None
    _warm: bool = False

    def start(self) -> None:
        """Start an interval."""
        self._started = time.perf_counter()

    def interval(self, images: int) -> float | None:
        """End an interval in which all processes trained `images`; return its images/s, or None for the first one."""
        now = time.perf_counter()
        seconds, self._started = now - (self._started or now), now
        if not self._warm:
            self._warm = True
            return None
        self.images += images
        self.seconds += seconds
        return images / seconds

    def take(self) -> float | None:
        """Return images/s since the last call, or None if nothing was counted."""
        rate = self.images / self.seconds if self.seconds else None
        self.images, self.seconds = 0, 0.0
        return rate


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    autocast: Callable[[], torch.autocast],
    normalisation: Normalisation,
    memory_format: torch.memory_format = torch.channels_last,
) -> dict[str, float]:
    """Return exact top-1 and top-5 accuracy (percent) and mean cross-entropy over all processes' batches.

    batches: images uint8 (n, 3, H, W) and labels (n,) int64 on the network's device, this process's share of them.
    Leaves the network in evaluation mode. Keys: acc1, acc5, loss, images.
    """
    network.eval()
    counts = torch.zeros(4, dtype=torch.float64, device=processes.device)
    with torch.inference_mode():
        for images, labels in batches:
            with autocast():
                logits = network(normalise(images, normalisation).contiguous(memory_format=memory_format))
            logits = logits.float()
            best = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
            num = torch.full((), len(labels), device=counts.device)
            counts += torch.stack([best[:, 0].sum(), best.sum(), loss.double(), num]).double()
    top1, top5, loss_sum, images_seen = processes.sum(counts).tolist()
    return {
        "acc1": 100 * top1 / images_seen,
        "acc5": 100 * top5 / images_seen,
        "loss": loss_sum / images_seen,
        "images": int(images_seen),
    }
