"""Which samples a process reads, and when: pure functions of (seed, epoch).

An optimiser step consumes a fixed list of samples, the global batch. It is cut into micro-batches of `batch_size`;
micro-batch m goes to rank m mod world. So 8 processes x update_freq 4 and 32 x update_freq 1 see the same
micro-batches, and a run can resume on another number of processes.

With repeated augmentation (Hoffer et al. 2020, "Augment your batch", arXiv:1901.09335; Berman et al. 2019,
"MultiGrain", arXiv:1902.05509) a global batch holds several copies of each of its samples, and an epoch sees
proportionally fewer samples. Crop, flip and filter are drawn for each copy separately; copy 0 is the sample itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.config import steps_per_epoch
from ffcv_convnext.rng import Stream, permutation

_BLOCK = 1 << 17  # samples at once: bounds the memory


@dataclass(frozen=True, slots=True)
class Samples:
    """Samples of a batch."""

    indices: NDArray[np.int64]  # (n,) into the file
    copies: NDArray[np.int64]  # (n,) number of the copy, from 0

    @classmethod
    def of(cls, indices: NDArray[np.int64]) -> Samples:
        """Return copy 0 of each sample."""
        return cls(indices, np.zeros(len(indices), np.int64))

    def __len__(self) -> int:
        return len(self.indices)

    def part(self, part: slice) -> Samples:
        """Return some of them."""
        return Samples(self.indices[part], self.copies[part])


@dataclass(frozen=True, slots=True)
class PageShuffle:
    """Order `quasi_random`: a shuffle for files larger than memory that reads page after page.

    An epoch permutes the file's pages and cuts them into windows; inside a window the samples are permuted. So only a
    window has to be in memory at a time, and the next one can be read in whole pages. The order is one list for all
    ranks, so they work in the same window, and GlobalBatchSampler cuts it like a full shuffle.
    """

    pages: NDArray[np.int32]  # (n,) page that holds a sample, numbered without gaps
    offsets: NDArray[np.int64]  # (num_pages,) address of a page in the file
    num_windows: int

    @classmethod
    def of(cls, addresses: NDArray[np.uint64], page_size: int, window_bytes: int) -> PageShuffle:
        """Group the samples by page.

        addresses: (n,) of the samples in the file.   page_size: of that file, bytes.
        Windows hold at most `window_bytes`, but at least one page.
        """
        pages = addresses // np.uint64(page_size)
        numbers = np.unique(pages)
        num_windows = -(-len(numbers) // max(1, window_bytes // page_size))
        found = np.empty(len(pages), np.int32)
        for start in range(0, len(pages), _BLOCK):
            found[start : start + _BLOCK] = np.searchsorted(numbers, pages[start : start + _BLOCK])
        return cls(found, numbers.astype(np.int64) * page_size, num_windows)

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        """Return (n,) samples in the order of an epoch: the full shuffle, sorted by window."""
        shuffled = permutation(len(self.pages), seed, epoch)
        window = np.empty(len(self.offsets), np.int32)
        for number, pages in enumerate(self._windows(seed, epoch)):
            window[pages] = number
        windows = np.empty(len(shuffled), np.int32)  # of the samples in the shuffled order
        for start in range(0, len(shuffled), _BLOCK):
            windows[start : start + _BLOCK] = window[self.pages[shuffled[start : start + _BLOCK]]]
        return shuffled[np.argsort(windows, kind="stable")]

    def _windows(self, seed: int, epoch: int) -> list[NDArray[np.int64]]:
        return np.array_split(permutation(len(self.offsets), seed, epoch, Stream.PAGES), self.num_windows)

    def pages_ahead(self, seed: int, epoch: int, positions: Iterator[int]) -> Iterator[NDArray[np.int64]]:
        """Yield, for increasing positions in the epoch's order, the addresses of the pages to read next.

        The next window is read at the pace at which the current one is used; each page comes once. Pages due before
        the first position are left out: their samples are needed now, and are read one by one.
        """
        windows = self._windows(seed, epoch)
        samples_in = np.bincount(self.pages, minlength=len(self.offsets))
        begins = np.cumsum([0, *(int(samples_in[pages].sum()) for pages in windows)])  # in the order
        ends = np.cumsum([len(pages) for pages in windows])  # in the list of pages
        due_at_begin = np.append(ends, ends[-1])  # when a window begins, its pages have been read
        sequence = self.offsets[np.concatenate(windows)]
        done = None
        for position in positions:
            due = int(np.interp(position, begins, due_at_begin))
            done = due if done is None else done
            yield sequence[done:due]
            done = max(done, due)


def is_shuffled(labels: NDArray[np.int64]) -> bool:
    """Return whether neighbours differ in their labels about as often as in a random order.

    labels: (n,) in the order of the file.   False for a file stored class by class.
    """
    if len(labels) < 2:
        return True
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    changes_of_a_random_order = (len(labels) - 1) * (1 - float(np.sum(shares**2)))
    return int(np.count_nonzero(np.diff(labels))) >= changes_of_a_random_order / 2


@dataclass(frozen=True, slots=True)
class GlobalBatchSampler:
    """Cut an epoch into global batches, and these into the micro-batches of each rank.

    Copies come in rounds, each starting one sample later than the one before: a b c d, b c d a, ... So two copies of a
    sample are in different micro-batches if there are at least as many micro-batches as copies: BatchNorm sees
    different samples, and Mixup and CutMix, which pair mirror positions of a micro-batch, pair no sample with itself
    and each copy with another partner. With fewer micro-batches, at most two samples of each are paired with
    themselves. DeiT lists copies side by side, and its ranks take turns; here that would put all copies of a sample
    into one micro-batch.
    """

    batch_size: int
    update_freq: int
    world: int
    copies: int = 1  # of a sample in a global batch; some samples have one fewer if it does not divide the global batch

    @property
    def global_batch(self) -> int:
        """Number of images of an optimiser step."""
        return self.batch_size * self.update_freq * self.world

    @property
    def num_different(self) -> int:
        """Number of samples in a global batch, not counting further copies."""
        return -(-self.global_batch // self.copies)

    def num_steps(self, num_samples: int) -> int:
        """Return the number of optimiser steps in an epoch, the same with copies as without.

        Samples left over at the end of an epoch (without copies, fewer than one global batch) are skipped.
        Raises ValueError if the samples do not fill one global batch, or the copies of one sample exceed it.
        """
        return steps_per_epoch(num_samples, self.batch_size, self.update_freq, self.world, self.copies)

    def micro_batches(
        self,
        num_samples: int,
        seed: int,
        epoch: int,
        rank: int,
        first_step: int = 0,
        page_shuffle: PageShuffle | None = None,
    ) -> Iterator[Samples]:
        """Yield a rank's micro-batches of an epoch from optimiser step `first_step` (counted in the epoch) on.

        Each has batch_size samples; update_freq of them in a row belong to one step.
        """
        order = page_shuffle.order(seed, epoch) if page_shuffle else permutation(num_samples, seed, epoch)
        for step, start in self._starts(num_samples, rank, first_step):
            copies, place = np.divmod(np.arange(start, start + self.batch_size), self.num_different)
            yield Samples(order[step * self.num_different + (place + copies) % self.num_different], copies)

    def positions(self, num_samples: int, rank: int, first_step: int = 0) -> Iterator[int]:
        """Yield how much of an epoch's order has been used before each of a rank's micro-batches."""
        for step, start in self._starts(num_samples, rank, first_step):
            yield step * self.num_different + min(start, self.num_different)

    def _starts(self, num_samples: int, rank: int, first_step: int) -> Iterator[tuple[int, int]]:
        """Yield a rank's micro-batches: optimiser step in the epoch, and first position in the step's global batch."""
        for step in range(first_step, self.num_steps(num_samples)):
            for m in range(rank, self.update_freq * self.world, self.world):
                yield step, m * self.batch_size


def eval_batches(num_samples: int, batch_size: int, rank: int, world: int) -> list[Samples]:
    """Return a rank's share of range(num_samples) in batches: over all ranks each sample comes exactly once."""
    share = np.array_split(np.arange(num_samples), world)[rank]
    return [Samples.of(share[i : i + batch_size]) for i in range(0, len(share), batch_size)]
