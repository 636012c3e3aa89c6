"""What every launch of a kernel needs: checks, the device, the options."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

# Products and sums fused wherever ptxas can, said aloud: Triton is about to change its default.
OPTIONS: dict[str, Any] = {"enable_fp_fusion": True}


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Kernels start on x's device, not on the process's current one."""
    return torch.cuda.device_of(x)


def channels_last(x: Tensor) -> Tensor:
    """X (N, C, H, W) in channels_last memory, itself where it is so already.

    Raises ValueError for a data type or a size that the kernels do not know.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"the kernels compute on float32, bfloat16 and float16, not on {x.dtype}")
    n, c, h, w = x.shape
    if max(n, c) * h * w >= 2**31:
        raise ValueError(f"shape {tuple(x.shape)}: the kernels count pixels, and the values of an image, to 2^31 - 1")
    return x.contiguous(memory_format=torch.channels_last)


def autocast_type(x: Tensor) -> torch.dtype:
    """The data type that autocast gives a convolution's result, or x's own outside autocast."""
    kind = x.device.type
    autocasts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)  # the meta device cannot
    return torch.get_autocast_dtype(kind) if autocasts else x.dtype


def empty(shape: Any, like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, device=like.device, memory_format=torch.channels_last)


def output_shape(x: Tensor, stride: int) -> tuple[int, int, int, int]:
    n, c, h, w = x.shape
    return n, c, -(-h // stride), -(-w // stride)
