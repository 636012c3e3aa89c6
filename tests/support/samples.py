"""Lists of samples, and samples with copies as one number each, which tests compare and sort."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.load.sampler import Samples

COPY = 1 << 32  # copy c of sample s is packed as s + c * COPY


def lists(*indices: Iterable[int]) -> list[Samples]:
    """Copy 0 of some samples, a batch for each argument."""
    return [Samples.of(np.array(list(each), np.int64)) for each in indices]


def pack(samples: Samples) -> NDArray[np.int64]:
    return samples.indices + samples.copies * COPY


def pack_all(batches: Iterable[Samples]) -> NDArray[np.int64]:
    return np.concatenate([pack(samples) for samples in batches])
