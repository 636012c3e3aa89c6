"""Import ffcv without its side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importing_ffcv(*, unchanged: bool = False) -> Iterator[None]:
    """Keep PyTorch's thread count and skip a slow compilation while the body imports ffcv.

    Importing ffcv sets PyTorch's thread count to 1. It also stores two constants in a numba dictionary, which numba
    compiles at every start (3 s); a plain dict replaces it, which ffcv's Python code reads as well.

    unchanged: import ffcv as it is, to measure stock FFCV.   Has no effect if ffcv is already imported.
    """
    import numba.typed
    import torch

    num_threads, numba_dict = torch.get_num_threads(), numba.typed.Dict
    if not unchanged:
        numba.typed.Dict = dict
    try:
        yield
    finally:
        numba.typed.Dict = numba_dict
        torch.set_num_threads(num_threads)
