"""Training losses without waiting for the device, and exact evaluation counts over all processes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
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


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Exact results over all images of an evaluation set, the same on every process."""

    acc1: float  # percent
    acc5: float  # percent
    loss: float  # mean cross-entropy
    images: int
    labels: Tensor  # (images,) int64 on the host; empty unless predictions were asked for
    predictions: Tensor  # (images,) int64 on the host, the best class of each image; empty as well

    def scores(self, suffix: str = "") -> dict[str, float]:
        """Return test_acc1, test_acc5 and test_loss, each with `suffix`."""
        return {f"test_{key}{suffix}": getattr(self, key) for key in ("acc1", "acc5", "loss")}


class _Tally:
    """Counts over this process's images, on its device."""

    def __init__(self, device: torch.device, *, predictions: bool) -> None:
        self.counts = torch.zeros(4, dtype=torch.float64, device=device)
        self.pairs: list[Tensor] | None = [] if predictions else None  # (n, 2): label and best class

    def add(self, logits: Tensor, labels: Tensor) -> None:
        """Count a batch. logits: (n, K) float32.   labels: (n,) int64."""
        best = logits.topk(min(5, logits.shape[1])).indices
        hits = best == labels[:, None]
        loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
        num = torch.full((), len(labels), device=labels.device)
        self.counts += torch.stack([hits[:, 0].sum(), hits.sum(), loss.double(), num]).double()
        if self.pairs is not None:
            self.pairs.append(torch.stack([labels, best[:, 0]], dim=1))

    def total(self, processes: Processes) -> Evaluation:
        """Return the results over all processes."""
        top1, top5, loss, images = processes.sum(self.counts).tolist()
        pairs = torch.empty(0, 2, dtype=torch.int64)
        if self.pairs is not None:
            pairs = _gather(torch.cat([pairs, *(each.cpu() for each in self.pairs)]), processes)
        accuracies = 100 * top1 / images, 100 * top5 / images
        return Evaluation(*accuracies, loss / images, int(images), labels=pairs[:, 0], predictions=pairs[:, 1])


def _gather(rows: Tensor, processes: Processes) -> Tensor:
    """Return the rows (n, ...) of all processes in the order of their ranks; each has its own n. On the host."""
    counts = torch.zeros(processes.world, dtype=torch.int64)
    counts[processes.rank] = len(rows)
    start = processes.sum(counts)[: processes.rank].sum()
    everything = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
    everything[start : start + len(rows)] = rows
    return processes.sum(everything)


def evaluate(
    network: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    processes: Processes,
    autocast: Callable[[], torch.autocast],
    normalisation: Normalisation,
    memory_format: torch.memory_format = torch.channels_last,
    *,
    columns: Sequence[int] | None = None,
    flip: bool = False,
    predictions: bool = False,
) -> dict[str, Evaluation]:
    """Evaluate a network exactly over all processes' batches; return the results under the key ''.

    batches: images uint8 (n, 3, H, W) and labels (n,) int64 on the network's device, this process's share of them.
    columns: output of the network for each label; other outputs are left out.   None: all, in their order.
    flip: also evaluate the mean of the logits of image and mirror image, under the key '_flip' (ffcv-imagenet adds
    them, which has the same accuracy).   predictions: return labels and predictions of all images too.
    Leaves the network in evaluation mode.
    """

    def logits_of(images: Tensor) -> Tensor:
        with autocast():
            logits: Tensor = network(images.contiguous(memory_format=memory_format))
        return logits.float() if index is None else logits.float()[:, index]

    network.eval()
    index = None if columns is None else torch.tensor(columns, device=processes.device)
    tallies = {key: _Tally(processes.device, predictions=predictions) for key in (["", "_flip"] if flip else [""])}
    with torch.inference_mode():
        for images, labels in batches:
            normalised = normalise(images, normalisation)
            logits = logits_of(normalised)
            tallies[""].add(logits, labels)
            if flip:
                tallies["_flip"].add((logits + logits_of(normalised.flip(-1))) / 2, labels)
    return {key: tally.total(processes) for key, tally in tallies.items()}
