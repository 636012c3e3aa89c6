"""Which samples a process reads, and when: pure functions of (seed, epoch).

An optimiser step consumes a fixed list of samples, the global batch. It is cut into micro-batches of `batch_size`;
micro-batch m goes to rank m mod world. So 8 processes x update_freq 4 and 32 x update_freq 1 see the same
micro-batches, and a run may come back on another number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.rng import permutation


@dataclass(frozen=True, slots=True)
class Shares:
    """How a global batch is cut: images in a micro-batch, micro-batches a rank accumulates, number of ranks."""

    batch_size: int
    update_freq: int
    world: int

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.update_freq * self.world

    def num_steps(self, num_samples: int) -> int:
        """Optimiser steps in an epoch; the rest of the order, less than a global batch, sits this epoch out.

        Raises ValueError when not even one global batch can be filled.
        """
        if num_samples < self.global_batch:
            raise ValueError(
                f"the training set has {num_samples} images, fewer than the global batch of {self.global_batch} "
                f"(batch_size {self.batch_size} x update_freq {self.update_freq} x {self.world} processes); "
                "lower batch_size or update_freq"
            )
        return num_samples // self.global_batch

    def micro_batches(
        self, num_samples: int, seed: int, epoch: int, rank: int, first_step: int = 0
    ) -> Iterator[NDArray[np.int64]]:
        """A rank's micro-batches of an epoch from optimiser step `first_step` (counted in the epoch) on.

        Each is (batch_size,) int64 sample indices; update_freq of them in a row belong to one step.
        """
        order = permutation(num_samples, seed, epoch)
        for step in range(first_step, self.num_steps(num_samples)):
            for m in range(rank, self.update_freq * self.world, self.world):
                start = step * self.global_batch + m * self.batch_size
                yield order[start : start + self.batch_size]


def eval_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[NDArray[np.int64]]:
    """A rank's share of range(num_samples), cut into batches: over all ranks each index comes exactly once."""
    share = np.array_split(np.arange(num_samples), world)[rank]
    return [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
