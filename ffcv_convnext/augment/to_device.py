"""Transfer of small host arrays to the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_ALIGNMENT = 16  # bytes; compiled kernels copy tensors that are not aligned


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """Copy a small host array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def all_to_device(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """Copy small host arrays to the device in one transfer; shapes and types are kept."""
    arrays = [np.asarray(array, order="C") for array in arrays]
    flat = [array.reshape(-1).view(np.uint8) for array in arrays]
    packed = np.concatenate([np.pad(each, (0, -len(each) % _ALIGNMENT)) for each in flat] or [np.zeros(0, np.uint8)])
    places = torch.split(to_device(packed, device), [len(each) + -len(each) % _ALIGNMENT for each in flat])
    return [
        place[: array.nbytes].view(torch.from_numpy(array).dtype).view(array.shape)
        for array, place in zip(arrays, places, strict=True)
    ]
