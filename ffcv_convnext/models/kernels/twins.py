"""The kernels' twins: the same functions in plain PyTorch, for any device and floating type."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Operations(NamedTuple):
    """The operations of a `FusedBranch`: the functions below, or the kernels under the same names."""

    depthwise_conv2d: Callable[[Tensor, Tensor, Tensor | None, int], Tensor]
    depthwise_layer_norm: Callable[[Tensor, Tensor, Tensor | None, int, Tensor, Tensor, float], Tensor]
    add_branch: Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute a depthwise convolution with an odd kernel, padded "same".

    x: (N, C, H, W).   weight: (C, 1, K, K).   bias: (C,).   Returns (N, C, ceil(H / stride), ceil(W / stride)), in
    autocast's data type or x's.
    """
    return F.conv2d(x, weight, bias, stride, weight.shape[-1] // 2, groups=len(weight))


def depthwise_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gain: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """Compute `depthwise_conv2d`, then LayerNorm over the channels of each pixel, in at least float32.

    gain, offset: (C,), the norm's weight and bias.   Returns the data type of `depthwise_conv2d`.
    """
    sums = depthwise_conv2d(x, weight, bias, stride)
    wide = torch.promote_types(sums.dtype, torch.float32)
    pixels = sums.to(wide).permute(0, 2, 3, 1)
    normal = F.layer_norm(pixels, gain.shape, gain.to(wide), offset.to(wide), eps)
    return normal.permute(0, 3, 1, 2).to(sums.dtype)


def add_branch(shortcut: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """Return shortcut + branch x gamma x keep.

    shortcut, branch: (N, C, H, W).   gamma: (C,), layer scale.   keep: (N,), each sample's factor of stochastic depth:
    0 or 1 / the probability to be kept.   The data type follows PyTorch's promotion.
    """
    if gamma is not None:
        branch = branch * gamma.view(-1, 1, 1)
    if keep is not None:
        branch = branch * keep.view(-1, 1, 1, 1).to(branch.dtype)
    return shortcut + branch


TWINS = Operations(depthwise_conv2d, depthwise_layer_norm, add_branch)


def depthwise_normalise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, eps: float) -> Tensor:
    """Compute `depthwise_conv2d`, then (value - mean) / sqrt(variance + eps) over the channels, in at least float32.

    Returns the data type of `depthwise_conv2d`.
    """
    sums = depthwise_conv2d(x, weight, bias, stride)
    wide = torch.promote_types(sums.dtype, torch.float32)
    normal = F.layer_norm(sums.to(wide).permute(0, 2, 3, 1), sums.shape[1:2], eps=eps)
    return normal.permute(0, 3, 1, 2).to(sums.dtype)
