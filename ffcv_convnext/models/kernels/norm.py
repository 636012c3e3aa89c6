"""Depthwise convolution and the normalisation over the channels after it in one kernel; the gradients of both.

A program convolves its strips for all channels and keeps the sums in registers: it computes each pixel's mean and
variance from them, and writes normalised values only. The tiles depend on the number of channels only: equal inputs
give equal bits, whatever the batch size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.depthwise import by_tap, input_gradient, weight_gradient
from ffcv_convnext.models.kernels.launch import OPTIONS, autocast_type, channels_last, empty, on, output_shape
from ffcv_convnext.models.kernels.strips import MAX_REGISTERS, PROGRAMS, channel_blocks, correlate, place, start_sums

MAX_CHANNELS = 3072  # a program of 512 threads holds the sums of 7 x 3072 values in its registers


@triton.jit(do_not_specialize=["num_images"])
def _convolve_and_normalise(
    x,
    weight,
    bias,
    out,
    rstd_out,  # of each pixel
    num_images,
    eps,
    H: tl.constexpr,
    W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of CHANNELS channels; BLOCKS * CHANNELS >= C
    CHANNELS: tl.constexpr,
):
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)
    image, row, column = place(strip, OUT_H, OUT_W, ROWS)
    exists = image < num_images
    top = row * STRIDE - K // 2
    left = column * STRIDE - K // 2

    all_sums = ()
    for block in tl.static_range(BLOCKS):
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        sums = start_sums(bias, channel, C, ROWS, STRIPS, CHANNELS)
        sums = correlate(sums, x, weight, image, top, left, channel, exists, H, W, C, K, ROWS, STRIDE, 1, 0, 0, False)
        all_sums = all_sums + (sums,)

    first_pixel = image.to(tl.int64) * (OUT_H * OUT_W)
    for r in tl.static_range(ROWS):
        total = tl.zeros([STRIPS, CHANNELS], tl.float32)
        for block in tl.static_range(BLOCKS):
            total += all_sums[block][r]  # channels past the last one hold 0
        mean = tl.sum(total, 1) / C
        squares = tl.zeros([STRIPS, CHANNELS], tl.float32)
        for block in tl.static_range(BLOCKS):
            channel = block * CHANNELS + tl.arange(0, CHANNELS)
            deviation = tl.where((channel < C)[None, :], all_sums[block][r] - mean[:, None], 0.0)
            squares = tl.fma(deviation, deviation, squares)
        rstd = 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / C + eps)
        pixel = first_pixel + (row + r) * OUT_W + column
        inside = exists & (row + r < OUT_H)
        tl.store(rstd_out + pixel, rstd, mask=inside)
        for block in tl.static_range(BLOCKS):
            channel = block * CHANNELS + tl.arange(0, CHANNELS)
            value = (all_sums[block][r] - mean[:, None]) * rstd[:, None]
            known = inside[:, None] & (channel < C)[None, :]
            tl.store(out + (pixel * C)[:, None] + channel[None, :], value.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_pixels", "pixels_each"])
def _normalised_gradient(
    g,  # (pixels, C)
    normal,
    rstd,
    out,  # d/dsums
    partial,  # (programs, C) float32: of d/dbias
    num_pixels,
    pixels_each,  # of a program
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    BLOCKS: tl.constexpr,  # of CHANNELS channels; BLOCKS * CHANNELS >= C
    CHANNELS: tl.constexpr,
):
    bias_sums = ()
    for _ in tl.static_range(BLOCKS):
        bias_sums = bias_sums + (tl.zeros([PIXELS, CHANNELS], tl.float32),)
    start = tl.program_id(0) * pixels_each
    end = tl.minimum(start + pixels_each, num_pixels)
    for first in range(start, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        scale = tl.load(rstd + pixel, mask=pixel < end, other=0.0)[:, None]  # 0 past the end: adds nothing to d/dbias
        gradients = ()
        normals = ()
        total = tl.zeros([PIXELS, CHANNELS], tl.float32)
        product = tl.zeros([PIXELS, CHANNELS], tl.float32)
        for block in tl.static_range(BLOCKS):
            channel = block * CHANNELS + tl.arange(0, CHANNELS)
            known = (pixel < end)[:, None] & (channel < C)[None, :]
            position = (pixel.to(tl.int64) * C)[:, None] + channel[None, :]
            gradient = tl.load(g + position, mask=known, other=0.0)
            value = tl.load(normal + position, mask=known, other=0.0)
            total += gradient.to(tl.float32)
            product = tl.fma(gradient.to(tl.float32), value.to(tl.float32), product)
            gradients = gradients + (gradient,)
            normals = normals + (value,)
        along_mean = tl.sum(total, 1)[:, None] / C
        along_rstd = tl.sum(product, 1)[:, None] / C
        updated = ()
        for block in tl.static_range(BLOCKS):
            channel = block * CHANNELS + tl.arange(0, CHANNELS)
            known = (pixel < end)[:, None] & (channel < C)[None, :]
            position = (pixel.to(tl.int64) * C)[:, None] + channel[None, :]
            result = gradients[block].to(tl.float32) - along_mean - normals[block].to(tl.float32) * along_rstd
            result *= scale
            tl.store(out + position, result.to(out.dtype.element_ty), mask=known)
            updated = updated + (bias_sums[block] + result,)
        bias_sums = updated
    for block in tl.static_range(BLOCKS):
        channel = block * CHANNELS + tl.arange(0, CHANNELS)
        place_out = partial + tl.program_id(0).to(tl.int64) * C + channel
        tl.store(place_out, tl.sum(bias_sums[block], 0), mask=channel < C)


def _room(x: Tensor, stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the normalised values and each pixel's 1 / standard deviation."""
    shape = output_shape(x, stride)
    n, c, h, w = shape
    if c > MAX_CHANNELS:
        raise ValueError(
            f"{c} channels: the kernels normalise depthwise convolutions of at most {MAX_CHANNELS}; use --kernels torch"
        )
    return empty(shape, x, dtype), x.new_empty((n, h, w), dtype=torch.float32)


def tile(channels: int, kernel_size: int) -> dict[str, int]:
    """Return the tile and the warps of the forward kernel: 7 x BLOCKS x 1, 2 or 4 sums a thread."""
    blocks, size = channel_blocks(channels)
    values = {1: 4, 2: 2, 3: 2, 5: 1}[blocks]  # of a block of channels and a row, a thread
    if kernel_size == 3 and size <= 512:  # the compiler unrolls the loop over 3 columns: more registers for loads
        values = max(1, values // 2)
    warps = max(8, size // (32 * values))
    return {"ROWS": 7, "STRIPS": 32 * values * warps // size, "BLOCKS": blocks, "CHANNELS": size, "num_warps": warps}


def gradient_tile(channels: int) -> dict[str, int]:
    """Return the tile and the warps of the gradient's kernel: 8 values of a block a thread, 4 with 5 blocks."""
    blocks, size = channel_blocks(channels)
    values = 4 if blocks == 5 else 8
    warps = max(4, size // (32 * values))
    return {"PIXELS": 32 * values * warps // size, "BLOCKS": blocks, "CHANNELS": size, "num_warps": warps}


@torch.library.custom_op("ffcv_convnext::depthwise_normalised", mutates_args=())
def normalised(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute a depthwise convolution, then (value - mean) / sqrt(variance + eps) over the channels of each pixel.

    x: (N, C, H, W) float32, bfloat16 or float16, C at most 3072.   weight: (C, 1, K, K), K odd, padded "same".
    bias: (C,).   dtype: of the first result.   Returns (N, C, H', W') in channels_last memory, and 1 / sqrt(variance +
    eps), (N, H', W') float32, with H' = ceil(H / stride). Mean and variance (divided by C) are those of the sums in
    float32; the normalised values are rounded once. Memory: x is read once (halos come from the cache), the results are
    written once, nothing else.   Raises ValueError for other types and more channels.
    """
    return launch_normalised(channels_last(x), by_tap(weight), bias, stride, eps, dtype)


def launch_normalised(
    x: Tensor, taps: Tensor, bias: Tensor | None, stride: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute `normalised` for x in channels_last memory and taps, the weight as `by_tap` returns it."""
    out, rstd = _room(x, stride, dtype)
    (n, c, h, w), (out_h, out_w) = x.shape, out.shape[2:]
    k = math.isqrt(len(taps))
    sizes = tile(c, k)
    strips = n * triton.cdiv(out_h, sizes["ROWS"]) * out_w
    with on(x):
        _convolve_and_normalise[(triton.cdiv(strips, sizes["STRIPS"]),)](
            x, taps, bias, out, rstd, n, eps, h, w, out_h, out_w, c, k, stride,
            **sizes, maxnreg=MAX_REGISTERS, **OPTIONS,
        )  # fmt: skip
    return out, rstd


@normalised.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    return _room(x, stride, dtype)


@torch.library.custom_op("ffcv_convnext::normalised_gradient", mutates_args=())
def normalised_gradient(g: Tensor, normal: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `normalised`'s sums and bias for g, the gradient of its first result.

    g: (N, C, H, W).   normal, rstd: the results of `normalised`.   Returns d_sums = rstd x (g - mean(g) - normal x
    mean(g x normal)), the means over the channels, like `normal`; and its sum over the pixels before rounding, (C,)
    float32: partial sums of programs, added in a fixed order.   Memory: g and normal are read once, d_sums is written
    once; the partial sums are at most 528 x C x 4 bytes, written and read.
    """
    out, partial = launch_gradient(channels_last(g), channels_last(normal), rstd)
    return out, partial.sum(0)


def launch_gradient(g: Tensor, normal: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    """Compute `normalised_gradient` in channels_last memory, but partial sums for the bias: (n, C) float32."""
    c, pixels = normal.shape[1], rstd.numel()
    sizes = gradient_tile(c)
    pixels_each = triton.cdiv(triton.cdiv(pixels, PROGRAMS), sizes["PIXELS"]) * sizes["PIXELS"]
    programs = triton.cdiv(pixels, pixels_each)
    out, partial = torch.empty_like(normal), g.new_empty((programs, c), dtype=torch.float32)
    with on(g):
        _normalised_gradient[(programs,)](
            g, normal, rstd, out, partial, pixels, pixels_each, c, **sizes, maxnreg=MAX_REGISTERS, **OPTIONS
        )  # fmt: skip
    return out, partial


@normalised_gradient.register_fake
def _(g: Tensor, normal: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    out = empty(normal.shape, normal, normal.dtype)
    return out, g.new_empty((normal.shape[1],), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, bias, ctx.stride, _, _ = inputs
    normal, rstd = output
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, normal, rstd)


def _backward(ctx: Any, g: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 6
    x, weight, normal, rstd = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, *_wants = ctx.needs_input_grad
    g, d_bias = normalised_gradient(g, normal, rstd)
    return (
        input_gradient(g, weight, ctx.stride, *x.shape[2:], x.dtype) if wants_x else None,
        weight_gradient(x, g, ctx.stride, weight.shape[-1], weight.dtype) if wants_weight else None,
        d_bias.to(ctx.bias_type) if wants_bias else None,
        None,
        None,
        None,
    )


normalised.register_autograd(_backward, setup_context=_save)


def depthwise_normalise(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, eps: float) -> Tensor:
    """Compute `twins.depthwise_normalise` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16, and for more than 3072 channels.
    """
    result: Tensor = normalised(x, weight, bias, stride, eps, autocast_type(x))[0]
    return result


def depthwise_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gain: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """Compute `twins.depthwise_layer_norm`: `depthwise_normalise`, then gain and offset in float32 in plain PyTorch.

    The result is in channels_last memory.   Raises ValueError as `depthwise_normalise`.
    """
    normal = depthwise_normalise(x, weight, bias, stride, eps)
    return (normal.float() * gain.float().view(-1, 1, 1) + offset.float().view(-1, 1, 1)).to(normal.dtype)
