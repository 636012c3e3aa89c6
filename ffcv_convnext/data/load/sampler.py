"""Which samples a process reads, and when: pure functions of (seed, epoch).

An optimiser step consumes a fixed list of samples, the global batch. It is cut into micro-batches of `batch_size`;
micro-batch m goes to rank m mod world. So 8 processes x update_freq 4 and 32 x update_freq 1 see the same
micro-batches, and a run may come back on another number of processes.

With repeated augmentation (Hoffer et al. 2020, "Augment your batch", arXiv:1901.09335; Berman et al. 2019,
"MultiGrain", arXiv:1902.05509) a global batch holds several copies of each of its samples, and an epoch sees so many
samples fewer. Copy c of sample s is listed as s + c * COPY: a number of its own, for which crop, flip and filter are
drawn anew. Copy 0 is the sample itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.config import steps_per_epoch
from ffcv_convnext.rng import Stream, permutation

COPY = 1 << 32  # more than any file has samples


@dataclass(frozen=True, slots=True)
class QuasiRandom:
    """The order for files larger than memory: FFCV's word for a shuffle that reads page after page.

    An epoch permutes the file's pages and cuts them into windows; inside a window the samples are permuted. So only a
    window has to be in memory at a time, and the next one can be read in whole pages. As the order is one list for all
    ranks, they work in the same window, and `Shares` cuts it as it cuts a full shuffle.
    """

    pages: NDArray[np.int64]  # (n,) the page that holds a sample, numbered without gaps
    offsets: NDArray[np.int64]  # (num_pages,) where a page begins in the file
    num_windows: int

    @classmethod
    def of(cls, addresses: NDArray[np.uint64], page_size: int, window_bytes: int) -> QuasiRandom:
        """addresses: (n,) of the samples in the file.   page_size: of that file, bytes.

        Windows hold `window_bytes` at most, but one page at least.
        """
        numbers, pages = np.unique(addresses // np.uint64(page_size), return_inverse=True)
        num_windows = -(-len(numbers) // max(1, window_bytes // page_size))
        return cls(pages, numbers.astype(np.int64) * page_size, num_windows)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """(n,) the samples as an epoch takes them: the full shuffle, sorted by window."""
        shuffled = permutation(len(self.pages), seed, epoch)
        window = np.empty(len(self.offsets), np.int32)
        for number, pages in enumerate(self._windows(seed, epoch)):
            window[pages] = number
        return shuffled[np.argsort(window[self.pages[shuffled]], kind="stable")]

    def _windows(self, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        return np.array_split(permutation(len(self.offsets), seed, epoch, Stream.PAGES), self.num_windows)

    def pages_ahead(self, seed: int, epoch: int, positions: Iterator[int]) -> Iterator[NDArray[np.int64]]:
        """For each of some rising positions in the epoch's order, where the pages begin that should be read by now.

        The next window is read in step with the use of the present one; each page comes once. What would be due
        before the first position is left out: it is wanted sample by sample, or at once.
        """
        windows = self._windows(seed, epoch)
        samples_in = np.bincount(self.pages, minlength=len(self.offsets))
        begins = np.cumsum([0, *(int(samples_in[pages].sum()) for pages in windows)])  # in the order
        ends = np.cumsum([len(pages) for pages in windows])  # in the list of pages
        due_at_begin = np.append(ends, ends[-1])  # when a window begins, its own pages have been read
        sequence = self.offsets[np.concatenate(windows)]
        done = None
        for position in positions:
            due = int(np.interp(position, begins, due_at_begin))
            done = due if done is None else done
            yield sequence[done:due]
            done = max(done, due)


def is_shuffled(labels: NDArray[np.int64]) -> bool:
    """Whether neighbours differ in their labels about as often as in a random order, or in class after class.

    labels: (n,) in the order of the file.
    """
    if len(labels) < 2:
        return True
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    changes_of_a_random_order = (len(labels) - 1) * (1 - float(np.sum(shares**2)))
    return int(np.count_nonzero(np.diff(labels))) >= changes_of_a_random_order / 2


@dataclass(frozen=True, slots=True)
class Shares:
    """How a global batch is cut: images in a micro-batch, micro-batches a rank accumulates, number of ranks.

    Copies come in rounds, each begun one sample later than the one before: a b c d, b c d a, ... So two copies of a
    sample are in different micro-batches wherever there are as many of those as copies: BatchNorm sees different
    samples, and Mixup and CutMix, which pair mirror positions of a micro-batch, pair no sample with itself and each
    copy with another partner. In fewer micro-batches, at most two samples of one are paired with themselves. Side by
    side, as DeiT lists them for its ranks to deal out, copies would crowd into one micro-batch here.
    """

    batch_size: int
    update_freq: int
    world: int
    copies: int = 1  # of a sample in a global batch; some have one fewer where this does not divide the global batch

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.update_freq * self.world

    @property
    def num_different(self) -> int:
        """Samples in a global batch, copies of one counted once."""
        return -(-self.global_batch // self.copies)

    def num_steps(self, num_samples: int) -> int:
        """Return the number of optimiser steps in an epoch, the same with copies as without."""
        return steps_per_epoch(num_samples, self.batch_size, self.update_freq, self.world, self.copies)

    def micro_batches(
        self,
        num_samples: int,
        seed: int,
        epoch: int,
        rank: int,
        first_step: int = 0,
        quasi_random: QuasiRandom | None = None,
    ) -> Iterator[NDArray[np.int64]]:
        """A rank's micro-batches of an epoch from optimiser step `first_step` (counted in the epoch) on.

        Each is (batch_size,) int64, sample + copy * COPY; update_freq of them in a row belong to one step.
        """
        order = quasi_random.order(seed, epoch) if quasi_random else permutation(num_samples, seed, epoch)
        for step, start in self._starts(num_samples, rank, first_step):
            copy, place = np.divmod(np.arange(start, start + self.batch_size), self.num_different)
            yield order[step * self.num_different + (place + copy) % self.num_different] + copy * COPY

    def positions(self, num_samples: int, rank: int, first_step: int = 0) -> Iterator[int]:
        """How far the order of an epoch has been used before each of a rank's micro-batches."""
        for step, start in self._starts(num_samples, rank, first_step):
            yield step * self.num_different + min(start, self.num_different)

    def _starts(self, num_samples: int, rank: int, first_step: int) -> Iterator[tuple[int, int]]:
        """A rank's micro-batches: optimiser step in the epoch, and where each begins in the step's global batch."""
        for step in range(first_step, self.num_steps(num_samples)):
            for m in range(rank, self.update_freq * self.world, self.world):
                yield step, m * self.batch_size


def eval_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[NDArray[np.int64]]:
    """A rank's share of range(num_samples), cut into batches: over all ranks each index comes exactly once."""
    share = np.array_split(np.arange(num_samples), world)[rank]
    return [share[i : i + batch_size] for i in range(0, len(share), batch_size)]
