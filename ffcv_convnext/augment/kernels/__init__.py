"""Triton kernels for the whole augmentation of a batch. docs/kernels.md describes them.

Only `augmentation_kernels` imports Triton, and with it the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor

from ffcv_convnext.augment.kernels.arguments import DrawArguments, draw_arguments

__all__ = ["DrawArguments", "augmentation_kernels", "draw_arguments"]


def augmentation_kernels(device: torch.device) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return batch.augment_batch. Raises ValueError if Triton is not installed, or cannot run on this device."""
    if find_spec("triton") is None:
        raise ValueError("kernels = triton: the package triton is not installed; install it, or use --kernels torch")
    from ffcv_convnext.augment.kernels.batch import augment_batch, can_run_on

    if not can_run_on(device):
        raise ValueError("kernels = triton needs a CUDA device; use --kernels torch on a CPU")
    return augment_batch
