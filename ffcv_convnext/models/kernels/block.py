"""A ConvNeXt block whose shortcut is its input as one operation; here is decided what it keeps and launches.

Beside the input it keeps the normalised pixels and the hidden values before and after the activation, in autocast's
type, and the folded weights. Forward has four launches: the weights, the depthwise convolution with the normalisation,
and two products with what surrounds them. Backward has nine, or eight with up to 256 channels, where the
normalisation's gradient is part of a product: four products, the gradients of the depthwise convolution's input and
weight, and two for the sums of what these leave. The gradient of the shortcut is added where the convolution's input
gradient is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffcv_convnext.models.kernels import depthwise, mlp, norm, weights
from ffcv_convnext.models.kernels.launch import channels_last, empty


@torch.library.custom_op("ffcv_convnext::block", mutates_args=())
def _forward(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward pass needs."""
    x = channels_last(x)
    folded = weights.fold(weight1, bias1, gain, offset, weight2, bias2, gamma, weight, compute)
    normal, rstd = norm.launch_normalised(x, folded.taps, bias, 1, eps, compute)
    linear, activated = mlp.hidden(normal, folded.weight1, folded.bias1, keep, gelu=gelu)
    out = mlp.output(activated, folded.weight2, folded.bias2, keep, x, dtype)
    return out, normal, rstd, linear, activated, folded.weight1, folded.weight2, folded.taps


@_forward.register_fake
def _(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    (n, c, h, w), hidden = x.shape, len(weight1)
    linear = empty((n, hidden, h, w), x, compute)
    return (
        empty(x.shape, x, dtype),
        empty(x.shape, x, compute),
        x.new_empty((n, h, w), dtype=torch.float32),
        linear,
        torch.empty_like(linear),
        weight1.new_empty((hidden, c), dtype=compute),
        weight2.new_empty((c, hidden), dtype=compute),
        weight.new_empty((weight[0].numel(), c)),
    )


@torch.library.custom_op("ffcv_convnext::block_gradient", mutates_args=())
def _gradient(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    offset: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    normal: Tensor,
    rstd: Tensor,
    linear: Tensor,
    activated: Tensor,
    folded1: Tensor,
    folded2: Tensor,
    taps: Tensor,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the gradients in the order of the operator's arguments, gamma's last and empty without it."""
    g, x, size = channels_last(g), channels_last(x), weight.shape[-1]
    d = mlp.hidden_gradient(g, folded2, linear, keep, gelu=gelu)
    if x.shape[1] <= mlp.MAX_NORMALISED:
        d_sums, partial_bias = mlp.normal_gradient(d.linear, folded1, normal, rstd)
    else:
        d_sums, partial_bias = norm.launch_gradient(mlp.input_gradient(d.linear, folded1), normal, rstd)
    d_x = empty(x.shape, x, x.dtype)
    depthwise.launch_convolve(d_sums, taps, None, d_x, addend=g, flip=True)
    partial_weight = depthwise.partial_weight_gradient(x, d_sums, 1, size)
    sums = weights.add_partial(d.partial, partial_bias, partial_weight)
    d_weight1, d_weight2 = mlp.weight_gradient(d.linear, normal), mlp.weight_gradient(d.g, activated)
    folds = weights.fold_gradient(
        d_weight1, sums.bias1, d_weight2, sums.bias2, weight1, gain, offset, weight2, bias2, gamma
    )
    d_weight = empty(weight.shape, weight, weight.dtype).copy_(sums.weight.view(weight.shape))
    return (
        d_x, d_weight, sums.bias, folds.gain, folds.offset, folds.weight1, sums.bias1, folds.weight2, folds.bias2,
        folds.gamma,
    )  # fmt: skip


@_gradient.register_fake
def _(
    g: Tensor,
    x: Tensor,
    weight: Tensor,
    gain: Tensor,
    offset: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
    keep: Tensor | None,
    normal: Tensor,
    rstd: Tensor,
    linear: Tensor,
    activated: Tensor,
    folded1: Tensor,
    folded2: Tensor,
    taps: Tensor,
    gelu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, c = weight1.shape
    biases = [x.new_empty(length, dtype=torch.float32) for length in (c, hidden, c)]
    return (
        empty(x.shape, x, x.dtype),
        empty(weight.shape, weight, weight.dtype),
        biases[0],
        torch.empty_like(gain),
        torch.empty_like(offset),
        weight1.new_empty((hidden, c)),
        biases[1],
        weight2.new_empty((c, hidden)),
        biases[2],
        weight2.new_empty(0) if gamma is None else torch.empty_like(gamma),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gain, offset, _, weight1, bias1, weight2, bias2, gamma, keep, ctx.gelu, *_ = inputs
    ctx.bias_types = [None if each is None else each.dtype for each in (bias, bias1, bias2)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gain, offset, weight1, weight2, bias2, gamma, keep, *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 15
    x, weight, d_bias, gain, offset, weight1, d_bias1, weight2, d_bias2, gamma = _gradient(
        g, *ctx.saved_tensors, ctx.gelu
    )
    bias, bias1, bias2 = (
        None if dtype is None else each.to(dtype)
        for each, dtype in zip((d_bias, d_bias1, d_bias2), ctx.bias_types, strict=True)
    )
    return (
        x, weight, bias, gain, offset, None, weight1, bias1, weight2, bias2, gamma if gamma.numel() else None,
        None, None, None, None,
    )  # fmt: skip


_forward.register_autograd(_backward, setup_context=_save)


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
    """Compute `twins.block` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(
        x, weight, bias, gain, offset, eps, weight1, bias1, weight2, bias2, gamma, keep, gelu, compute, dtype
    )[0]
    return result
