"""`bench progressive`: the training time that progressive resizing saves, beside the pixels that it saves."""

from __future__ import annotations

import json
import platform
import statistics
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ffcv_convnext.bench.compare import format_facts
from ffcv_convnext.bench.options import StepOptions
from ffcv_convnext.bench.timing import RepeatedDecoding, repeat, synchronizer
from ffcv_convnext.bench.train_step import device_facts, training_beton
from ffcv_convnext.config import Config
from ffcv_convnext.formatting import markdown_table
from ffcv_convnext.host import available_cores, processor_name
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner

NUM_CLASSES = 1000
WARM_S = 10.0  # at most, to bring the samples into memory


@dataclass(frozen=True, slots=True)
class SizeTimes:
    """Training at one image size."""

    size: int  # side of the images, pixels
    num_epochs: int  # of the schedule, at this size
    micro_batch: int  # images of a forward and backward pass
    image_s: tuple[float, ...]  # seconds an image, one for each round

    def relative_to(self, largest: SizeTimes) -> list[float]:
        """Return the time of an image as a share of that at the largest size, round by round."""
        return [ours / theirs for ours, theirs in zip(self.image_s, largest.image_s, strict=True)]


@dataclass(frozen=True, slots=True)
class ProgressiveTimes:
    """Times of all sizes of a schedule, in ascending order, and the machine they were measured on."""

    facts: Mapping[str, Any]
    sizes: Sequence[SizeTimes]
    relative_pixels: float  # of the schedule, as a share of those at the largest size throughout

    @property
    def relative_times(self) -> list[float]:
        """Training time of the schedule as a share of that at the largest size throughout, round by round."""
        num_epochs = sum(each.num_epochs for each in self.sizes)
        by_size = [[each.num_epochs * share for share in each.relative_to(self.sizes[-1])] for each in self.sizes]
        return [sum(shares) / num_epochs for shares in zip(*by_size, strict=True)]

    def to_json(self) -> str:
        """Return all figures as JSON."""
        return json.dumps({**asdict(self), "relative_times": self.relative_times}, indent=2)

    def format(self) -> str:
        """Return Markdown: the sizes, then the whole schedule."""
        largest, rows = self.sizes[-1], []
        for each in self.sizes:
            rates = [1 / seconds for seconds in each.image_s]
            share = each.relative_to(largest)
            rows.append(
                [
                    *(str(each.size), str(each.num_epochs), str(each.micro_batch)),
                    *(f"{statistics.median(rates):.4g}", f"{min(rates):.4g}-{max(rates):.4g}"),
                    *(f"{statistics.median(share):.3f}", f"{min(share):.3f}-{max(share):.3f}"),
                    f"{(each.size / largest.size) ** 2:.3f}",
                ]
            )
        header = ["pixels", "epochs", "micro-batch", "images/s", "min-max", "time of an image", "min-max", "its pixels"]
        whole = self.relative_times
        return "\n".join(
            [
                format_facts("progressive resizing", self.facts),
                "",
                markdown_table(header, rows, ">" * len(header)),
                "",
                f"Times and pixels are relative to {largest.size} pixels. The whole schedule, training only: time "
                f"{statistics.median(whole):.3f} ({min(whole):.3f}-{max(whole):.3f}) of that at {largest.size} pixels "
                f"throughout, with {self.relative_pixels:.3f} of the pixels.",
            ]
        )


def bench_progressive(options: StepOptions) -> ProgressiveTimes:
    """Measure training (loader, augmentation, optimiser steps) at each size of the config's schedule.

    All in this process, the sizes in turn, round after round; every second round begins with the largest. Reads the
    config's data_path, or synthetic images.   Raises ValueError without progressive resizing.
    """
    config = options.config
    if config.data.min_res is None:
        raise ValueError(
            "bench progressive needs progressive resizing: --min_res --max_res --start_ramp --end_ramp, or a recipe: "
            "--config rn_configs/recipes/fast_16.yaml"
        )
    if options.peers is not None:
        raise ValueError("peers: bench progressive has one row for each size; remove it")
    num_workers = min(config.data.num_workers, available_cores())
    processes = Processes.from_environment(config.run.device)
    learner = build_learner(
        config, processes, num_classes=config.model.nb_classes or NUM_CLASSES, steps_per_epoch=10**6
    )
    learner.model.train()
    num_epochs = Counter(map(config.data.train_size, range(config.schedule.epochs)))
    sizes = sorted(num_epochs)
    found: dict[int, list[float]] = {size: [] for size in sizes}
    with tempfile.TemporaryDirectory(prefix="bench-progressive-") as temporary:
        beton = training_beton(options, Path(temporary))
        with closing(RepeatedDecoding(beton, config.data, processes.device, num_workers=num_workers)) as decoding:
            decoding.warm(WARM_S)
            for size in sizes:  # compiles, chooses algorithms
                train_at(learner, decoding, size, 0.0)
            for number in range(options.rounds):
                for size in sizes if number % 2 else reversed(sizes):
                    found[size].append(train_at(learner, decoding, size, options.seconds))
                rates = ", ".join(f"{size} pixels {1 / times[-1]:.4g}" for size, times in found.items())
                options.progress(f"round {number + 1}/{options.rounds}: {rates} images/s")
    facts = {
        "cores": available_cores(),
        "processor": processor_name(),
        "python": platform.python_version(),
        "batch": config.data.batch_size,
        "update_freq": config.data.update_freq,
        "res_batch": str(config.data.res_batch).lower(),
        "amp": config.run.amp,
        "rounds": options.rounds,
        **device_facts(processes.device),
    }
    times = [
        SizeTimes(size, num_epochs[size], config.data.batch_size * config.data.num_joined(size), tuple(found[size]))
        for size in sizes
    ]
    return ProgressiveTimes(facts, times, config.relative_pixels())


def train_at(learner: Learner, decoding: RepeatedDecoding, size: int, seconds: float) -> float:
    """Take an optimiser step, then steps for about `seconds`, at least one; return the seconds an image of these.

    The first step waits for the loader's threads, which work ahead as in training and end before this returns.
    """
    config = learner.config
    learner.state.epoch = first_epoch(config, size)  # joins micro-batches as the schedule does
    with closing(decoding.batches(side=size)) as batches:

        def step() -> int:
            train_step(learner, islice(batches, config.data.update_freq))
            learner.state.step += 1
            return config.data.batch_size * config.data.update_freq

        step()
        timed = repeat(step, seconds, synchronizer(learner.processes.device))
        learner.tracker.flush()
    return timed.seconds / timed.images


def first_epoch(config: Config, size: int) -> int:
    """Return the first epoch, from 0, of the config's schedule at a size of its images, pixels."""
    return next(epoch for epoch in range(config.schedule.epochs) if config.data.train_size(epoch) == size)
