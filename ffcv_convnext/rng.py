"""Counter-based random numbers: a random decision is a function without state.

Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") turns (seed, epoch, sample,
stream, block) into four 32-bit words. The same arithmetic runs on numpy arrays, torch tensors of any device
and, compiled by numba, on scalars (data/load/crops.py); all give the same words. So nothing depends on the number
of workers or processes, and a run resumes anywhere without replay.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

MASK = 0xFFFFFFFF
_BLOCK = 1 << 17  # keys of a permutation that are computed at once


class Stream(IntEnum):
    """Purpose of a draw. Values are part of a run's identity: never reuse or renumber one."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    INTERPOLATION = 4
    SUBSET = 5
    MIX = 6
    ERASING = 7
    COLOR_JITTER = 8
    NETWORK = 9  # stochastic depth and other draws inside the forward pass
    INITIALISATION = 10
    STORED_ORDER = 11  # of a .beton's samples
    COMPRESSION = 12  # which of them are stored as JPEG
    PAGES = 13  # order of a .beton's pages in an epoch, for order quasi_random
    POLICY = 14  # operations and magnitudes of RandAugment and its relatives


def philox_rounds(c0: Any, c1: Any, c2: Any, c3: Any, k0: Any, k1: Any, constants: Any) -> tuple[Any, Any, Any, Any]:
    """Ten Philox rounds on 32-bit words held in 64-bit integers.

    c0..c3, k0, k1: numpy uint64 arrays, torch int64 tensors or 64-bit scalars that hold values below 2^32.
    constants: (multiplier 0, multiplier 1, key step 0, key step 1, 32-bit mask, 32) in a type that mixes with
    them. A product may wrap around a signed 64-bit integer: its bits are the same, and the mask removes the sign.
    """
    m0, m1, w0, w1, mask, shift = constants
    for _ in range(10):
        p0 = c0 * m0
        p1 = c2 * m1
        c0 = ((p1 >> shift) & mask) ^ c1 ^ k0
        c2 = ((p0 >> shift) & mask) ^ c3 ^ k1
        c1 = p1 & mask
        c3 = p0 & mask
        k0 = (k0 + w0) & mask
        k1 = (k1 + w1) & mask
    return c0, c1, c2, c3


PHILOX = (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85, MASK, 32)


def sample_words(seed: int, epoch: int, samples: Any, stream: int, block: int = 0) -> tuple[Any, Any, Any, Any]:
    """Return four random 32-bit words for each sample.

    samples: numpy uint64 array or torch int64 tensor of sample indices (any shape). Returns four of the same
    kind and shape. A further `block` gives four more words of the same stream.
    """
    zero = samples & 0
    return philox_rounds(
        samples & MASK,
        zero + (epoch & MASK),
        zero + (stream << 16 | block),
        (samples >> 32) & MASK,
        zero + (seed & MASK),
        zero + (seed >> 32 & MASK),
        PHILOX,
    )


def short_words(key: Any, samples: Any) -> tuple[Any, Any]:
    """Return two random 32-bit words for each sample, at half the cost of four: Philox 2x32-10.

    key: below 2^63: an int, or an int64 scalar tensor.   samples: torch int64 tensor of values below 2^32, any shape.
    The samples are the second word of the counter, which the first round does not multiply: a compiler would treat the
    product of a running number as an address, and compute it in 32 bits.
    """
    c0, c1, k = (key >> 32) & MASK, samples, key & MASK
    for _ in range(10):
        product = c0 * 0xD256D193
        c0, c1 = ((product >> 32) ^ c1 ^ k) & MASK, product  # only the lower half of c1 is used
        k = (k + 0x9E3779B9) & MASK
    return c0, c1 & MASK


def uniform(words: Any) -> Any:
    """Convert 32-bit words to numbers in [0, 1): multiples of 2^-24, exact in float32 and float64."""
    return (words >> 8) * 2.0**-24


def permutation(num: int, seed: int, epoch: int, stream: int = Stream.ORDER) -> NDArray[np.int64]:
    """Return a random order of range(num): the samples sorted by random 64-bit keys."""
    keys = np.empty(num, np.uint64)
    for start in range(0, num, _BLOCK):  # bounds the memory
        samples = np.arange(start, min(start + _BLOCK, num), dtype=np.uint64)
        w0, w1, _, _ = sample_words(seed, epoch, samples, stream)
        keys[start : start + _BLOCK] = w0 << np.uint64(32) | w1
    return np.argsort(keys, kind="stable")


def step_seed(seed: int, step: int, micro_batch: int, stream: int) -> int:
    """Return a 63-bit seed for the draws of one micro-batch of an optimiser step."""
    w0, w1, _, _ = sample_words(seed, micro_batch, np.array([step], dtype=np.uint64), stream, block=1 << 14)
    return int(w0[0] & np.uint64(MASK >> 1)) << 32 | int(w1[0])
