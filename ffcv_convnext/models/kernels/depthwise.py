"""Depthwise convolution in channels_last memory: forward, input gradient and weight gradient.

Numbers are stored in the input's type (float32, bfloat16, float16) and added in float32. Nothing is added atomically:
equal inputs give equal bits, whichever configuration is the fastest on a device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.launch import OPTIONS, autocast_type, channels_last, empty, on, output_shape
from ffcv_convnext.models.kernels.strips import MAX_REGISTERS, PROGRAMS, correlate, place, start_sums

# Each thread holds ROWS x 4 or ROWS x 2 sums. More rows: fewer loads a product, more registers.
CONFIGS = [
    triton.Config({"ROWS": rows, "STRIPS": strips, "CHANNELS": channels}, num_warps=warps, maxnreg=MAX_REGISTERS)
    for rows, strips, channels, warps in [(7, 16, 32, 4), (7, 8, 64, 4), (7, 8, 64, 8), (14, 8, 32, 4), (4, 16, 32, 4)]
]


def candidates(configs: list[Any], args: dict[str, Any], **_: Any) -> list[Any]:
    """Return the configurations to try: 14 rows where they divide the rows of a phase, 4 rows where 7 do not."""
    if not args["x"].is_cuda:
        return configs[:1]  # the interpreter does not measure
    height = triton.cdiv(args["OUT_H"], args["SPREAD"])
    rows = {7} | ({14} if height % 14 == 0 else set()) | ({4} if height % 7 else set())
    return [config for config in configs if config.kwargs["ROWS"] in rows]


@triton.autotune(
    CONFIGS, key=["OUT_H", "OUT_W", "C", "K", "STRIDE", "SPREAD"], prune_configs_by={"early_config_prune": candidates}
)
@triton.jit(do_not_specialize=["num_images"])
def _convolve(
    x,
    weight,
    bias,
    addend,  # like out
    out,
    num_images,
    H: tl.constexpr,
    W: tl.constexpr,
    OUT_H: tl.constexpr,
    OUT_W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    SPREAD: tl.constexpr,  # the input is x with SPREAD - 1 zeros between its pixels
    FLIP: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Compute a block of strips x channels; with SPREAD > 1, of the outputs of one phase.

    The output pixels whose row and column leave the same remainders modulo SPREAD form a phase: all of them use the
    same taps, and none of those meets a zero between two pixels of x.
    """
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    phases: tl.constexpr = SPREAD * SPREAD
    phase_row = tl.program_id(0) % phases // SPREAD
    phase_column = tl.program_id(0) % SPREAD
    block = tl.program_id(0) // phases
    strip = block // blocks * STRIPS + tl.arange(0, STRIPS)
    channel = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
    image, row, column = place(strip, (OUT_H + SPREAD - 1) // SPREAD, (OUT_W + SPREAD - 1) // SPREAD, ROWS)
    exists = image < num_images
    # The output pixel SPREAD * row + phase_row has its first tap at K // 2 rows above, and uses the taps over pixels.
    first_row = (K // 2 + SPREAD - phase_row) % SPREAD
    first_column = (K // 2 + SPREAD - phase_column) % SPREAD
    top = row * STRIDE + 1 - (K // 2 + SPREAD - phase_row) // SPREAD
    left = column * STRIDE + 1 - (K // 2 + SPREAD - phase_column) // SPREAD
    sums = start_sums(bias, channel, C, ROWS, STRIPS, CHANNELS)
    sums = correlate(
        sums, x, weight, image, top, left, channel, exists, H, W, C, K, ROWS, STRIDE, SPREAD, first_row, first_column,
        FLIP,
    )  # fmt: skip
    start = image.to(tl.int64)[:, None] * (OUT_H * OUT_W * C) + channel[None, :]
    across = column * SPREAD + phase_column
    known = (exists & (across < OUT_W))[:, None] & (channel < C)[None, :]
    for r in tl.static_range(ROWS):
        down = (row + r) * SPREAD + phase_row
        position = start + ((down * OUT_W + across) * C)[:, None]
        inside = known & (down < OUT_H)[:, None]
        value = sums[r]
        if addend is not None:
            value += tl.load(addend + position, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + position, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _side_by_side(values, COUNT: tl.constexpr):
    """Join up to 16 tensors (strips, channels) to one (strips, channels, 2^n); the places past the last are 0."""
    WIDTH: tl.constexpr = 2 if COUNT <= 2 else 4 if COUNT <= 4 else 8 if COUNT <= 8 else 16
    for _ in tl.static_range(WIDTH - COUNT):
        values = values + (tl.zeros_like(values[0]),)
    if WIDTH >= 16:
        values = _join_halves(values, 8)
    if WIDTH >= 8:
        values = _join_halves(values, 4)
    if WIDTH >= 4:
        values = _join_halves(values, 2)
    joined = _join_halves(values, 1)[0]
    return joined.reshape(joined.shape[0], joined.shape[1], WIDTH)


@triton.jit
def _join_halves(values, HALF: tl.constexpr):
    joined = ()
    for i in tl.static_range(HALF):
        joined = joined + (tl.join(values[i], values[i + HALF]),)
    return joined


@triton.jit(do_not_specialize=["num_strips", "strips_each"])
def _weight_gradient(
    x,
    g,
    partial,  # (chunks, C, K * K) float32
    num_strips,
    strips_each,  # of a chunk
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
    GROUPS: tl.constexpr,  # of columns of the kernel
    COLUMNS: tl.constexpr,  # of a group; GROUPS * COLUMNS >= K
):
    """Sum a chunk of strips for a block of channels.

    A thread keeps K x COLUMNS sums for each of its channels: those of one group of columns of the kernel. All groups of
    a strip lie in the same program, which walks along the rows: the values of x and g that several of them need come
    from the L1 cache.
    """
    channel = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    chunk = tl.program_id(1)
    place_in_tile = tl.arange(0, STRIPS * GROUPS)
    first_column = place_in_tile % GROUPS * COLUMNS
    end = tl.minimum((chunk + 1) * strips_each, num_strips)

    columns = ()
    for _ in tl.static_range(COLUMNS):
        sums = ()
        for _ in tl.static_range(K):
            sums = sums + (tl.zeros([STRIPS * GROUPS, CHANNELS], tl.float32),)
        columns = columns + (sums,)
    for first in range(chunk * strips_each, end, STRIPS):
        strip = first + place_in_tile // GROUPS
        image, row, column = place(strip, OUT_H, OUT_W, ROWS)
        known = (strip < end)[:, None] & (channel < C)[None, :]
        first_pixel = image.to(tl.int64) * (OUT_H * OUT_W) + (row * OUT_W + column)
        start = g + (first_pixel * C)[:, None] + channel[None, :]
        gradients = ()
        for r in tl.static_range(ROWS):
            value = tl.load(start + r * (OUT_W * C), mask=known & (row + r < OUT_H)[:, None], other=0.0)
            gradients = gradients + (value.to(tl.float32),)
        top = row * STRIDE - K // 2
        left = column * STRIDE - K // 2 + first_column
        first_pixel = image.to(tl.int64) * (H * W) + (top * W + left)
        start = x + (first_pixel * C)[:, None] + channel[None, :]
        updated = ()
        for j in tl.static_range(COLUMNS):
            across = left + j
            # The rows' limit, 0 where nothing is visible: one comparison a load, which ptxas does not keep for later.
            limit = tl.where(known & ((across >= 0) & (across < W))[:, None], H, 0).to(tl.uint32)
            sums = columns[j]
            for i in tl.static_range((ROWS - 1) * STRIDE + K):
                seen = (top + i).to(tl.uint32)[:, None] < limit
                value = tl.load(start + (i * (W * C) + j * C), mask=seen, other=0.0).to(tl.float32)
                more = ()
                for tap in tl.static_range(K):
                    if i >= tap and (i - tap) % STRIDE == 0 and i - tap < ROWS * STRIDE:
                        more = more + (tl.fma(value, gradients[(i - tap) // STRIDE], sums[tap]),)
                    else:
                        more = more + (sums[tap],)
                sums = more
            updated = updated + (sums,)
        columns = updated
    for tap in tl.static_range(K):
        values = ()
        for j in tl.static_range(COLUMNS):
            values = values + (columns[j][tap],)
        tile = _side_by_side(values, COLUMNS)
        total = tl.sum(tile.reshape(STRIPS, GROUPS, CHANNELS, tile.shape[2]), 0)
        place_in_group = tl.arange(0, tile.shape[2])[None, None, :]
        column = (tl.arange(0, GROUPS) * COLUMNS)[:, None, None] + place_in_group
        inside = (channel < C)[None, :, None] & ((place_in_group < COLUMNS) & (column < K))
        start = partial + (chunk.to(tl.int64) * C + channel)[None, :, None] * (K * K)
        tl.store(start + (tap * K + column), total, mask=inside)


def by_tap(weight: Tensor) -> Tensor:
    """Copy (C, 1, K, K) to (K * K, C): neighbouring channels, as in the images."""
    return weight.flatten(1).t().contiguous()


def launch_convolve(
    x: Tensor,
    taps: Tensor,
    bias: Tensor | None,
    out: Tensor,
    *,
    addend: Tensor | None = None,
    stride: int = 1,
    spread: int = 1,
    flip: bool = False,
) -> Tensor:
    """Write a depthwise convolution of x to out (N, C, H', W'), both channels_last; taps: the weight, `by_tap`."""
    (n, c, h, w), (out_h, out_w), k = x.shape, out.shape[2:], math.isqrt(len(taps))

    def grid(config: dict[str, Any]) -> tuple[int]:
        strips = n * triton.cdiv(triton.cdiv(out_h, spread), config["ROWS"]) * triton.cdiv(out_w, spread)
        return (spread**2 * triton.cdiv(strips, config["STRIPS"]) * triton.cdiv(c, config["CHANNELS"]),)

    with on(x):
        _convolve[grid](
            x, taps, bias, addend, out, n, h, w, out_h, out_w, c, k, stride, spread, flip, **OPTIONS
        )  # fmt: skip
    return out


@torch.library.custom_op("ffcv_convnext::depthwise", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dtype: torch.dtype) -> Tensor:
    return launch_convolve(
        channels_last(x), by_tap(weight), bias, empty(output_shape(x, stride), x, dtype), stride=stride
    )


@_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, dtype: torch.dtype) -> Tensor:
    return empty(output_shape(x, stride), x, dtype)


@torch.library.custom_op("ffcv_convnext::depthwise_input_gradient", mutates_args=())
def input_gradient(
    g: Tensor,
    weight: Tensor,
    stride: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:
    """Return d/dx + addend for g = d/dout: the correlation of g, spread by the stride, with the turned kernel.

    g: (N, C, ceil(height / stride), ceil(width / stride)).   weight: (C, 1, K, K).   addend: (N, C, height, width) of
    any supported type, or None for 0; it is added in float32.   Returns (N, C, height, width) of `dtype`, rounded once.
    Raises ValueError if the shape of g or addend does not match.
    """
    shape = (*g.shape[:2], height, width)
    out = empty(shape, g, dtype)
    if output_shape(out, stride) != tuple(g.shape):
        raise ValueError(f"g has shape {tuple(g.shape)}: expected {output_shape(out, stride)} at stride {stride}")
    if addend is not None:
        if addend.shape != out.shape:
            raise ValueError(f"addend has shape {tuple(addend.shape)}: expected {tuple(out.shape)}")
        addend = channels_last(addend)
    return launch_convolve(channels_last(g), by_tap(weight), None, out, addend=addend, spread=stride, flip=True)


@input_gradient.register_fake
def _(
    g: Tensor,
    weight: Tensor,
    stride: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    addend: Tensor | None = None,
) -> Tensor:
    return empty((*g.shape[:2], height, width), g, dtype)


def weight_tile(channels: int, height: int, kernel_size: int, stride: int) -> dict[str, int]:
    """Return the tile and the warps of the weight gradient's kernel, for results of `height` rows.

    A thread keeps at most 33 sums and 28 gradients. With groups of columns, the sums of two channels of a kernel of 5
    or 7 fit into the registers: 7 is computed as 8 columns, but less is loaded for each product.
    """
    values, groups = {3: (2, 1), 5: (2, 2), 7: (2, 4)}.get(kernel_size, (1, 4))  # values: channels of a thread
    rows = 14 if height % 14 == 0 and kernel_size == 7 and stride == 1 else 7
    block, warps = 64 if channels % 64 == 0 and values == 2 else 32, 8
    return {
        "ROWS": rows, "STRIPS": 32 * warps * values // (block * groups), "CHANNELS": block, "GROUPS": groups,
        "COLUMNS": triton.cdiv(kernel_size, groups), "num_warps": warps,
    }  # fmt: skip


def partial_weight_gradient(x: Tensor, g: Tensor, stride: int, kernel_size: int) -> Tensor:
    """Return sums of chunks, (n, C, K * K) float32, whose sum over n is d/dweight for g = d/dout.

    x: (N, C, H, W), g: (N, C, H', W'), both in channels_last memory.
    """
    (n, c, h, w), (out_h, out_w), k = x.shape, g.shape[2:], kernel_size
    sizes = weight_tile(c, out_h, k, stride)
    strips = triton.cdiv(n * triton.cdiv(out_h, sizes["ROWS"]) * out_w, sizes["STRIPS"])  # in units of a program's
    blocks = triton.cdiv(c, sizes["CHANNELS"])
    # Programs of 8 warps: one round on an H100; two, better balanced, if 16 times through the loop are left for each.
    programs = PROGRAMS if strips * blocks >= 16 * PROGRAMS else PROGRAMS // 2
    each = triton.cdiv(strips, max(1, programs // blocks))
    chunks = triton.cdiv(strips, each)
    partial = x.new_empty((chunks, c, k * k), dtype=torch.float32)
    with on(x):
        _weight_gradient[(blocks, chunks)](
            x, g, partial, n * triton.cdiv(out_h, sizes["ROWS"]) * out_w, each * sizes["STRIPS"], h, w, out_h, out_w,
            c, k, stride, **sizes, maxnreg=MAX_REGISTERS, **OPTIONS,
        )  # fmt: skip
    return partial


@torch.library.custom_op("ffcv_convnext::depthwise_weight_gradient", mutates_args=())
def weight_gradient(x: Tensor, g: Tensor, stride: int, kernel_size: int, dtype: torch.dtype) -> Tensor:
    """Return d/dweight (C, 1, K, K) of `dtype`, in channels_last memory, for g = d/dout.

    x: (N, C, H, W).   g: (N, C, ceil(H / stride), ceil(W / stride)).   Programs sum chunks of the pixels in float32,
    and a second kernel adds these in a fixed order.   Memory: x and g are read once, up to what neighbouring strips
    share (from the caches); the partial sums, at most 528 x 64 x K x K x 4 bytes, are written and read.
    """
    partial = partial_weight_gradient(channels_last(x), channels_last(g), stride, kernel_size)
    c = x.shape[1]
    out = empty((c, 1, kernel_size, kernel_size), x, dtype)
    if dtype == torch.float32:
        torch.sum(partial, 0, out=out.view(c, kernel_size**2))
        return out
    return out.copy_(partial.sum(0).view(out.shape))


@weight_gradient.register_fake
def _(x: Tensor, g: Tensor, stride: int, kernel_size: int, dtype: torch.dtype) -> Tensor:
    return empty((x.shape[1], 1, kernel_size, kernel_size), x, dtype)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.stride, _ = inputs
    ctx.bias_type = None if bias is None else bias.dtype
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    return (
        input_gradient(g, weight, ctx.stride, *x.shape[2:], x.dtype) if wants_x else None,
        weight_gradient(x, g, ctx.stride, weight.shape[-1], weight.dtype) if wants_weight else None,
        g.sum((0, 2, 3), dtype=torch.float32).to(ctx.bias_type) if wants_bias else None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_save)


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int) -> Tensor:
    """Compute `twins.depthwise_conv2d` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(x, weight, bias, stride, autocast_type(x))
    return result
