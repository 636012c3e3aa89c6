"""Images on their way to the device: conversion, manifests, checks, traversal order, loading.

`ffcv` and `numba` are needed for writing and reading only, so those names are imported when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ffcv_convnext.data.loader import EvalLoader as EvalLoader
    from ffcv_convnext.data.loader import TrainLoader as TrainLoader

_HOMES = {
    "Manifest": "manifest",
    "ConversionOptions": "writer",
    "convert": "writer",
    "ending_like_ctrl_c": "writer",
    "join_parts": "joining",
    "COPY": "order",
    "Shares": "order",
    "TrainLoader": "loader",
    "EvalLoader": "loader",
    "SampleError": "loader",
    "ReadError": "storage",
    "num_bytes_in_memory": "storage",
    "SampleLoader": "loader",
    "RandomCropDecoder": "decoders",
    "stock_train_loader": "stock",
    "write_stock_beton": "stock",
    "read_tables": "tables",
    "verify_data": "verify",
    "repair_data": "repair",
    "describe_data": "info",
}
_LIGHT = {"manifest", "writer", "joining", "order"}  # import neither ffcv nor torch, which take seconds
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if _HOMES[name] in _LIGHT:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    from ffcv_convnext.data.importing import importing_ffcv

    with importing_ffcv(as_it_comes=_HOMES[name] == "stock"):
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
