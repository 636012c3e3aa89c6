"""Checks, device and options for the launch of a kernel."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# Products and sums fused where ptxas can; explicit, because Triton is going to change its default.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which kernels start on x's device, not on the process's current one."""
    return torch.cuda.device_of(x)


def channels_last(x: Tensor) -> Tensor:
    """Return x (N, C, H, W) in channels_last memory; itself if it is already.

    Raises ValueError for a data type or a size that the kernels do not support.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels compute on float32, bfloat16 and float16, not on {x.dtype}")
    n, c, h, w = x.shape
    if max(n, c) * h * w >= 2**31:
        raise ValueError(f"shape {tuple(x.shape)}: the kernels count pixels, and the values of an image, to 2^31 - 1")
    return x.contiguous(memory_format=torch.channels_last)


def autocast_type(x: Tensor) -> torch.dtype:
    """Return autocast's data type for the result of a convolution, or x's own without autocast."""
    kind = x.device.type
    autocasts = kind != "meta" and torch.is_autocast_enabled(kind)  # is_autocast_available breaks a graph of torch 2.11
    return torch.get_autocast_dtype(kind) if autocasts else x.dtype


def empty(shape: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an uninitialised channels_last tensor on `like`'s device."""
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def output_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    """Return the shape of a depthwise convolution's result, padded "same"."""
    n, c, h, w = x.shape
    return n, c, -(-h // stride), -(-w // stride)
