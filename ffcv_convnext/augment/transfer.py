"""Small host arrays on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes; what compiled kernels read at once


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small host array on the device, without waiting for the device."""
    return all_to_device([array], device)[0]


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Small host arrays on the device, in one copy that nobody waits for."""
    tensors = [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
    if device.type != "cuda":
        return tensors
    starts = np.cumsum([0, *(-(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT for tensor in tensors)]).tolist()
    host = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=True)
    for start, tensor in zip(starts, tensors, strict=False):
        host[start : start + tensor.nbytes].copy_(tensor.reshape(-1).view(torch.uint8))
    there = host.to(device, non_blocking=True)
    return [
        there[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, tensors, strict=False)
    ]
