"""Images on their way to the device: conversion, manifests, traversal order, loading.

`ffcv` and `numba` are needed for writing and loading only, so those names are imported when first used. Importing
ffcv sets PyTorch's number of CPU threads to 1; that is undone here.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "Manifest": "manifest",
    "ConversionOptions": "writer",
    "convert": "writer",
    "TrainLoader": "loader",
    "EvalLoader": "loader",
    "SampleError": "loader",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import torch  # here: the workers of a conversion import this package, and torch would cost each of them seconds

    num_threads = torch.get_num_threads()
    try:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    finally:
        torch.set_num_threads(num_threads)
