"""Importing FFCV without what that does besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_ffcv(*, as_it_comes: bool = False) -> Iterator[None]:
    """What is imported inside may import ffcv: PyTorch's number of threads stays, and it takes three seconds less.

    FFCV sets that number to 1. And it keeps the numbers of its two image modes in a dictionary of numba's, for which
    numba compiles at every start; a plain dictionary takes its place: Python code reads it, in FFCV too.
    as_it_comes: without that, to measure stock FFCV.   An ffcv that was imported before stays as it is.
    """
    import numba.typed
    import torch

    num_threads, numba_s = torch.get_num_threads(), numba.typed.Dict
    if not as_it_comes:
        numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = numba_s
        torch.set_num_threads(num_threads)
