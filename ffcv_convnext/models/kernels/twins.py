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
    depthwise_normalise: Callable[[Tensor, Tensor, Tensor | None, int, float], Tensor]
    mlp: Callable[..., Tensor]
    block: Callable[..., Tensor]


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


def depthwise_normalise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, eps: float) -> Tensor:
    """Compute `depthwise_conv2d`, then (value - mean) / sqrt(variance + eps) over the channels, in at least float32.

    Returns the data type of `depthwise_conv2d`.
    """
    sums = depthwise_conv2d(x, weight, bias, stride)
    wide = torch.promote_types(sums.dtype, torch.float32)
    pixels = sums.to(wide).permute(0, 2, 3, 1)
    return F.layer_norm(pixels, pixels.shape[3:], eps=eps).permute(0, 3, 1, 2).to(sums.dtype)


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    shortcut: Tensor,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Return shortcut + keep x (second convolution of the activation of the first convolution of x).

    x: (N, C, H, W).   weight1: (hidden, C), weight2: (C', hidden), in x's data type: two convolutions with 1x1 kernels.
    bias1: (hidden,).   bias2: (C',).   keep: (N,), as in `add_branch`.   shortcut: (N, C', H, W).
    gelu: the activation: GELU, else ReLU.   Returns (N, C', H, W) of data type dtype.
    """
    of_each = 1 if keep is None else keep.view(-1, 1, 1, 1)
    hidden = F.linear(x.permute(0, 2, 3, 1), weight1, None if bias1 is None else bias1.to(weight1.dtype))
    hidden = (F.gelu(hidden) if gelu else F.relu(hidden)) * of_each
    branch = F.linear(hidden.to(weight2.dtype), weight2)
    if bias2 is not None:
        branch = branch + bias2 * of_each
    return (shortcut + branch.permute(0, 3, 1, 2)).to(dtype)


def fold(
    weight1: Tensor,
    bias1: Tensor | None,
    gain: Tensor | None,
    offset: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
    """Multiply the neighbours of two pointwise convolutions into their weights.

    weight1: (hidden, C).   bias1: (hidden,).   gain, offset: (C,), applied to the first one's input; None: 1 and 0.
    weight2: (C', hidden).   bias2: (C',).   gamma: (C',), a factor of the second one's output; None: 1.
    Returns both weights in dtype and both biases: weight1, bias1, weight2, bias2.
    """
    if offset is not None:
        moved = (weight1 * offset).sum(1)
        bias1 = moved if bias1 is None else bias1 + moved
    if gain is not None:
        weight1 = weight1 * gain
    if gamma is not None:
        weight2 = gamma[:, None] * weight2
        bias2 = None if bias2 is None else gamma * bias2
    return weight1.to(dtype), bias1, weight2.to(dtype), bias2


def block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    gelu: bool,
    compute: torch.dtype,
    dtype: torch.dtype,
) -> Tensor:
    """Compute a block of stride 1 whose shortcut is x: `mlp` of `depthwise_normalise` of x, with the weights of `fold`.

    weight, bias, eps: of the depthwise convolution and the norm.   gain, offset: of the norm.   compute: data type of
    the matrix products.   dtype: of the result, (N, C, H, W).   The others: as in those functions.
    """
    normal = depthwise_normalise(x, weight, bias, 1, eps).to(compute)
    return mlp(normal, *fold(weight1, bias1, gain, offset, weight2, bias2, gamma, compute), keep, x, gelu, dtype)


def add_branch(shortcut: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """Return shortcut + branch x gamma x keep. No kernel: a compiler fuses it with the norm before and what follows.

    shortcut, branch: (N, C, H, W).   gamma: (C,), layer scale.   keep: (N,), each sample's factor of stochastic depth:
    0 or 1 / the probability to be kept.   The data type follows PyTorch's promotion.
    """
    if gamma is not None:
        branch = branch * gamma.view(-1, 1, 1)
    if keep is not None:
        branch = branch * keep.view(-1, 1, 1, 1).to(branch.dtype)
    return shortcut + branch


TWINS = Operations(depthwise_conv2d, depthwise_layer_norm, depthwise_normalise, mlp, block)
