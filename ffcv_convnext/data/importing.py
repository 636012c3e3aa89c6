"""Importing FFCV without what that does besides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_ffcv() -> Iterator[None]:
    """What is imported inside may import ffcv; the process stays as it was, and does so some three seconds earlier.

    FFCV sets PyTorch's number of threads to 1. And it keeps the numbers of its two image modes in a dictionary of
    numba's, for which numba compiles at every start, so a plain dictionary takes its place: Python code reads it, in
    FFCV too. Where ffcv was imported before, it is as it is.
    """
    import numba.typed
    import torch

    num_threads, numba_s = torch.get_num_threads(), numba.typed.Dict
    numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = numba_s
        torch.set_num_threads(num_threads)
