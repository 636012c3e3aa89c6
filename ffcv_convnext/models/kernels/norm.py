"""Depthwise convolution and the LayerNorm after it in one kernel; the gradients of both.

A program convolves its strips for one block of channels after the other, writes the sums and keeps each pixel's mean
and squared deviations; then it reads back what it wrote, from the cache, and normalises it. The blocks depend on the
number of channels only: equal inputs give equal bits on every device.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.depthwise import by_tap, input_gradient, weight_gradient
from ffcv_convnext.models.kernels.launch import OPTIONS, autocast_type, channels_last, empty, on, output_shape
from ffcv_convnext.models.kernels.strips import correlate, place, start_sums


@triton.jit(do_not_specialize=["num_images"])
def _convolve_and_normalise(
    x,
    weight,
    bias,
    gain,
    offset,
    out,  # normalised
    sums_out,  # the convolution's result
    mean_out,  # of each pixel
    rstd_out,
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
    CHANNELS: tl.constexpr,
):
    strip = tl.program_id(0) * STRIPS + tl.arange(0, STRIPS)
    image, row, column = place(strip, OUT_H, OUT_W, ROWS)
    exists = image < num_images
    first_pixel = image.to(tl.int64) * (OUT_H * OUT_W)

    means = ()
    squares = ()  # sums of squared deviations
    for _ in tl.static_range(ROWS):
        means = means + (tl.zeros([STRIPS], tl.float32),)
        squares = squares + (tl.zeros([STRIPS], tl.float32),)
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        sums = start_sums(bias, channel, C, ROWS, STRIPS, CHANNELS)
        sums = correlate(sums, x, weight, image, row, column, channel, exists, H, W, C, K, ROWS, STRIDE, 1, False)
        count = tl.minimum(CHANNELS, C - first).to(tl.float32)
        share = count / (first + count)
        new_means = ()
        new_squares = ()
        for r in tl.static_range(ROWS):
            known = (exists & (row + r < OUT_H))[:, None] & (channel < C)[None, :]
            pixel = first_pixel + (row + r) * OUT_W + column
            rounded = sums[r].to(sums_out.dtype.element_ty)
            tl.store(sums_out + (pixel * C)[:, None] + channel[None, :], rounded, mask=known)
            value = rounded.to(tl.float32)
            mean = tl.sum(tl.where(channel[None, :] < C, value, 0.0), 1) / count
            deviation = tl.where(channel[None, :] < C, value - mean[:, None], 0.0)
            difference = mean - means[r]  # two groups' moments make those of both: Chan et al. 1979
            new_means = new_means + (means[r] + difference * share,)
            square = tl.sum(deviation * deviation, 1) + difference * difference * (first * share)
            new_squares = new_squares + (squares[r] + square,)
        means = new_means
        squares = new_squares

    rstds = ()
    for r in tl.static_range(ROWS):
        rstd = 1.0 / tl.sqrt_rn(squares[r] / C + eps)
        rstds = rstds + (rstd,)
        pixel = first_pixel + (row + r) * OUT_W + column
        tl.store(mean_out + pixel, means[r], mask=exists & (row + r < OUT_H))
        tl.store(rstd_out + pixel, rstd, mask=exists & (row + r < OUT_H))
    tl.debug_barrier()  # the sums are read by other threads than those that wrote them
    for first in range(0, C, CHANNELS):
        channel = first + tl.arange(0, CHANNELS)
        scale = tl.load(gain + channel, mask=channel < C, other=0.0).to(tl.float32)
        shift = tl.load(offset + channel, mask=channel < C, other=0.0).to(tl.float32)
        for r in tl.static_range(ROWS):
            known = (exists & (row + r < OUT_H))[:, None] & (channel < C)[None, :]
            pixel = first_pixel + (row + r) * OUT_W + column
            position = (pixel * C)[:, None] + channel[None, :]
            value = tl.load(sums_out + position, mask=known, other=0.0).to(tl.float32)
            value = (value - means[r][:, None]) * rstds[r][:, None] * scale[None, :] + shift[None, :]
            tl.store(out + position, value.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num_pixels", "pixels_each"])
def _norm_gradient(
    g,  # (pixels, C)
    sums,
    mean,
    rstd,
    gain,
    out,  # d/dsums
    partial,  # (3, programs, C) float32: of d/dgain, d/doffset and d/dbias
    num_pixels,
    pixels_each,  # of a program
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,  # all of them, and more up to a power of two
):
    channel = tl.arange(0, CHANNELS)
    scale = tl.load(gain + channel, mask=channel < C, other=0.0).to(tl.float32)
    gain_sum = tl.zeros([PIXELS, CHANNELS], tl.float32)
    offset_sum = tl.zeros([PIXELS, CHANNELS], tl.float32)
    bias_sum = tl.zeros([PIXELS, CHANNELS], tl.float32)
    start = tl.program_id(0) * pixels_each
    end = tl.minimum(start + pixels_each, num_pixels)
    for first in range(start, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        known = (pixel < end)[:, None] & (channel < C)[None, :]
        position = (pixel.to(tl.int64) * C)[:, None] + channel[None, :]
        gradient = tl.load(g + position, mask=known, other=0.0).to(tl.float32)
        m = tl.load(mean + pixel, mask=pixel < end, other=0.0)[:, None]
        s = tl.load(rstd + pixel, mask=pixel < end, other=0.0)[:, None]
        normal = tl.where(known, (tl.load(sums + position, mask=known, other=0.0).to(tl.float32) - m) * s, 0.0)
        scaled = gradient * scale[None, :]
        along_mean = tl.sum(scaled, 1)[:, None] / C
        along_rstd = tl.sum(scaled * normal, 1)[:, None] / C
        result = (s * (scaled - along_mean - normal * along_rstd)).to(out.dtype.element_ty)
        tl.store(out + position, result, mask=known)
        gain_sum += gradient * normal
        offset_sum += gradient
        bias_sum += tl.where(known, result.to(tl.float32), 0.0)
    place = partial + tl.program_id(0).to(tl.int64) * C + channel
    step = tl.num_programs(0).to(tl.int64) * C
    tl.store(place, tl.sum(gain_sum, 0), mask=channel < C)
    tl.store(place + step, tl.sum(offset_sum, 0), mask=channel < C)
    tl.store(place + 2 * step, tl.sum(bias_sum, 0), mask=channel < C)


def _shapes(x: Tensor, stride: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Room for the result, the convolution's sums, and each pixel's mean and 1 / standard deviation."""
    shape = output_shape(x, stride)
    n, _, h, w = shape
    out, mean = empty(shape, x, dtype), x.new_empty((n, h, w), dtype=torch.float32)
    return out, torch.empty_like(out), mean, torch.empty_like(mean)


@torch.library.custom_op("ffcv_convnext::depthwise_layer_norm", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    stride: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = channels_last(x)
    out, sums, mean, rstd = _shapes(x, stride, dtype)
    (n, c, h, w), (out_h, out_w) = x.shape, out.shape[2:]
    rows, channels = 7, max(32, min(256, c & -c))  # the largest power of two that divides c, within limits
    block = 1024 // channels  # of strips: 8 values a thread
    with on(x):
        _convolve_and_normalise[(triton.cdiv(n * triton.cdiv(out_h, rows) * out_w, block),)](
            x, by_tap(weight), bias, gain, offset, out, sums, mean, rstd, n, eps, h, w, out_h, out_w, c,
            weight.shape[-1], stride, ROWS=rows, STRIPS=block, CHANNELS=channels, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out, sums, mean, rstd


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    eps: float,
    stride: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _shapes(x, stride, dtype)


@torch.library.custom_op("ffcv_convnext::layer_norm_gradient", mutates_args=())
def _layer_norm_gradient(
    g: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """d/dsums like `sums`, then d/dgain, d/doffset and the sum of d/dsums over the pixels: (C,) float32 each."""
    g, c, pixels = channels_last(g), sums.shape[1], mean.numel()
    channels = triton.next_power_of_2(c)
    block = max(1, 2048 // channels)
    pixels_each = triton.cdiv(max(triton.cdiv(pixels, 1024), 32), block) * block
    programs = triton.cdiv(pixels, pixels_each)
    out, partial = torch.empty_like(sums), g.new_empty((3, programs, c), dtype=torch.float32)
    with on(g):
        _norm_gradient[(programs,)](
            g, sums, mean, rstd, gain, out, partial, pixels, pixels_each, c,
            PIXELS=block, CHANNELS=channels, num_warps=4, **OPTIONS,
        )  # fmt: skip
    d_gain, d_offset, d_bias = partial.sum(1).unbind()
    return out, d_gain.clone(), d_offset.clone(), d_bias.clone()  # an operator's results share no memory


@_layer_norm_gradient.register_fake
def _(
    g: Tensor, sums: Tensor, mean: Tensor, rstd: Tensor, gain: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    d_gain = g.new_empty((sums.shape[1],), dtype=torch.float32)
    return torch.empty_like(sums), d_gain, torch.empty_like(d_gain), torch.empty_like(d_gain)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, gain, offset, _, ctx.stride, _ = inputs
    _, sums, mean, rstd = output
    ctx.types = [None if t is None else t.dtype for t in (gain, offset, bias)]
    ctx.mark_non_differentiable(sums, mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, gain, sums, mean, rstd)


def _backward(ctx: Any, g: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if g is None:
        return (None,) * 8
    x, weight, gain, sums, mean, rstd = ctx.saved_tensors
    wants_x, wants_weight, *_wants = ctx.needs_input_grad
    g, *vectors = _layer_norm_gradient(g, sums, mean, rstd, gain)
    d_gain, d_offset, d_bias = (None if t is None else v.to(t) for v, t in zip(vectors, ctx.types, strict=True))
    return (
        input_gradient(g, weight, ctx.stride, *x.shape[2:], x.dtype) if wants_x else None,
        weight_gradient(x, g, ctx.stride, weight.shape[-1], weight.dtype) if wants_weight else None,
        d_bias,
        d_gain,
        d_offset,
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_save)


def depthwise_layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, gain: Tensor, offset: Tensor, eps: float
) -> Tensor:
    """Compute `twins.depthwise_layer_norm` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(x, weight, bias, gain, offset, eps, stride, autocast_type(x))[0]
    return result
