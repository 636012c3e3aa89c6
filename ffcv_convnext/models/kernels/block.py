"""A ConvNeXt block of stride 1 as one operation: what the block keeps for its backward pass is decided here.

Kept are, beside the input, the normalised pixels and the hidden values before and after the activation, in autocast's
type. The gradient of the shortcut is added where the depthwise convolution's input gradient is written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ffcv_convnext.models.kernels import mlp
from ffcv_convnext.models.kernels.depthwise import input_gradient, weight_gradient
from ffcv_convnext.models.kernels.launch import empty
from ffcv_convnext.models.kernels.norm import normalised, normalised_gradient


@torch.library.custom_op("ffcv_convnext::block", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the result, and what the backward pass needs: the results of `normalised` and of `mlp.hidden`."""
    normal, rstd = normalised(x, weight, bias, 1, eps, weight1.dtype)
    linear, activated = mlp.hidden(normal, weight1, bias1, keep, gelu)
    return mlp.output(activated, weight2, bias2, keep, x, dtype), normal, rstd, linear, activated


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    normal, rstd = normalised(x, weight, bias, 1, eps, weight1.dtype)
    linear, activated = mlp.hidden(normal, weight1, bias1, keep, gelu)
    return empty(x.shape, x, dtype), normal, rstd, linear, activated


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, weight1, bias1, weight2, bias2, keep, ctx.gelu, _ = inputs
    ctx.bias_types = [None if each is None else each.dtype for each in (bias, bias1, bias2)]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, weight1, weight2, keep, *output[1:])


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 11
    x, weight, weight1, weight2, keep, normal, rstd, linear, activated = ctx.saved_tensors
    d = mlp.gradients(g, normal, weight1, weight2, linear, activated, keep, ctx.gelu)
    d_sums, d_bias = normalised_gradient(d.x, normal, rstd)
    d_bias, d_bias1, d_bias2 = (
        None if dtype is None else each.to(dtype)
        for each, dtype in zip((d_bias, d.bias1, d.bias2), ctx.bias_types, strict=True)
    )
    return (
        input_gradient(d_sums, weight, 1, *x.shape[2:], x.dtype, g),
        weight_gradient(x, d_sums, 1, weight.shape[-1], weight.dtype),
        d_bias,
        None,
        d.weight1,
        d_bias1,
        d.weight2,
        d_bias2,
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_save)


def block(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    keep: Tensor | None,
    gelu: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Compute `twins.block` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(x, weight, bias, eps, weight1, bias1, weight2, bias2, keep, gelu, dtype)[0]
    return result
