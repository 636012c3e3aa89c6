"""What a fused block does with its weights: three launches instead of a dozen, of little work each.

`fold` multiplies gain, offset and layer scale into the weights and rounds these. Backward, `add_partial` adds the
partial sums that the kernels of the block have left, in a fixed order, and `fold_gradient` applies the chain rule to
`fold`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.launch import OPTIONS, on

# The tiles of the kernels below and the warps of their programs.
TILES: dict[str, dict[str, int]] = {
    "_fold": {"ROWS": 16, "COLUMNS": 64, "num_warps": 4},
    "_add_partial": {"ROWS": 256, "COLUMNS": 16, "num_warps": 8},
    "_fold_gradient": {"ROWS": 64, "COLUMNS": 16, "num_warps": 4},
}


class Folded(NamedTuple):
    """Weights as the kernels of a block read them: `twins.fold`, and the depthwise weight as (K * K, C)."""

    weight1: Tensor
    bias1: Tensor
    weight2: Tensor
    bias2: Tensor
    taps: Tensor


@triton.jit
def _fold(
    weight1,  # (H, C)
    bias1,
    gain,
    offset,
    weight2,  # (C, H)
    bias2,
    gamma,
    depthwise,  # (C, TAPS)
    weight1_out,
    bias1_out,
    weight2_out,
    bias2_out,
    taps_out,  # (TAPS, C)
    H: tl.constexpr,
    C: tl.constexpr,
    TAPS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program: rows of the first weight, or rows of the second, or channels of the depthwise weight."""
    of_first: tl.constexpr = (H + ROWS - 1) // ROWS
    of_second: tl.constexpr = (C + ROWS - 1) // ROWS
    program = tl.program_id(0)
    if program < of_first:
        row = program * ROWS + tl.arange(0, ROWS)
        total = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, C, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            known = (row < H)[:, None] & (column < C)[None, :]
            position = row[:, None] * C + column[None, :]
            value = tl.load(weight1 + position, mask=known, other=0.0).to(tl.float32)
            total += value * tl.load(offset + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
            value *= tl.load(gain + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
            tl.store(weight1_out + position, value.to(weight1_out.dtype.element_ty), mask=known)
        moved = tl.sum(total, 1)
        if bias1 is not None:
            moved += tl.load(bias1 + row, mask=row < H, other=0.0).to(tl.float32)
        tl.store(bias1_out + row, moved, mask=row < H)
    elif program < of_first + of_second:
        row = (program - of_first) * ROWS + tl.arange(0, ROWS)
        scale = tl.full([ROWS], 1.0, tl.float32)
        if gamma is not None:
            scale = tl.load(gamma + row, mask=row < C, other=0.0).to(tl.float32)
        for first in range(0, H, COLUMNS):
            column = first + tl.arange(0, COLUMNS)
            known = (row < C)[:, None] & (column < H)[None, :]
            position = row[:, None] * H + column[None, :]
            value = tl.load(weight2 + position, mask=known, other=0.0).to(tl.float32) * scale[:, None]
            tl.store(weight2_out + position, value.to(weight2_out.dtype.element_ty), mask=known)
        value = tl.zeros([ROWS], tl.float32)
        if bias2 is not None:
            value = tl.load(bias2 + row, mask=row < C, other=0.0).to(tl.float32)
        tl.store(bias2_out + row, value * scale, mask=row < C)
    else:
        channel = (program - of_first - of_second) * COLUMNS + tl.arange(0, COLUMNS)
        for tap in range(TAPS):
            value = tl.load(depthwise + channel * TAPS + tap, mask=channel < C, other=0.0)
            tl.store(taps_out + tap * C + channel, value, mask=channel < C)


def fold(
    weight1: Tensor,
    bias1: Tensor | None,
    gain: Tensor,
    offset: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
    depthwise: Tensor,
    dtype: torch.dtype,
) -> Folded:
    """Fold the weights of a block; those of the matrix products are in dtype, the biases float32."""
    (hidden, c), taps = weight1.shape, depthwise[0].numel()
    result = Folded(
        torch.empty_like(weight1, dtype=dtype, memory_format=torch.contiguous_format),
        weight1.new_empty(hidden, dtype=torch.float32),
        torch.empty_like(weight2, dtype=dtype, memory_format=torch.contiguous_format),
        weight1.new_empty(c, dtype=torch.float32),
        depthwise.new_empty((taps, c)),
    )
    tile = TILES["_fold"]
    programs = triton.cdiv(hidden, tile["ROWS"]) + triton.cdiv(c, tile["ROWS"]) + triton.cdiv(c, tile["COLUMNS"])
    args = [weight1.contiguous(), bias1, gain, offset, weight2.contiguous(), bias2, gamma, by_channel(depthwise)]
    with on(weight1):
        _fold[(programs,)](*args, *result, hidden, c, taps, **tile, **OPTIONS)
    return result


def by_channel(depthwise: Tensor) -> Tensor:
    """View (C, 1, K, K), contiguous or in channels_last memory, as (C, K * K)."""
    return depthwise.flatten(1).contiguous()


@triton.jit
def _sum_columns(partial, block, rows, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the sums over the rows of a block of columns of partial (rows, WIDTH), and the columns' numbers."""
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        row = first + tl.arange(0, ROWS)
        known = (row < rows)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(partial + row.to(tl.int64)[:, None] * WIDTH + column[None, :], mask=known, other=0.0)
    return tl.sum(total, 0), column


@triton.jit(do_not_specialize=["rows_biases", "rows_bias", "rows_weight"])
def _add_partial(
    biases,  # (rows_biases, H + C)
    bias,  # (rows_bias, C)
    weight,  # (rows_weight, VALUES)
    bias1_out,
    bias2_out,
    bias_out,
    weight_out,
    rows_biases,
    rows_bias,
    rows_weight,
    H: tl.constexpr,
    C: tl.constexpr,
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    of_biases: tl.constexpr = (H + C + COLUMNS - 1) // COLUMNS
    of_bias: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    if program < of_biases:
        total, column = _sum_columns(biases, program, rows_biases, H + C, ROWS, COLUMNS)
        tl.store(bias1_out + column, total, mask=column < H)
        tl.store(bias2_out + column - H, total, mask=(column >= H) & (column < H + C))
    elif program < of_biases + of_bias:
        total, column = _sum_columns(bias, program - of_biases, rows_bias, C, ROWS, COLUMNS)
        tl.store(bias_out + column, total, mask=column < C)
    else:
        total, column = _sum_columns(weight, program - of_biases - of_bias, rows_weight, VALUES, ROWS, COLUMNS)
        tl.store(weight_out + column, total, mask=column < VALUES)


class Sums(NamedTuple):
    """Gradients of the folded biases (H,) and (C,), of the depthwise bias (C,) and weight (C, K * K); float32."""

    bias1: Tensor
    bias2: Tensor
    bias: Tensor
    weight: Tensor


def add_partial(biases: Tensor, bias: Tensor, weight: Tensor) -> Sums:
    """Add partial sums over their first dimension: biases (n, H + C), bias (m, C), weight (k, C, K * K); float32."""
    (rows, width), c, values = biases.shape, bias.shape[1], weight[0].numel()
    result = Sums(
        biases.new_empty(width - c), biases.new_empty(c), biases.new_empty(c), biases.new_empty(weight.shape[1:])
    )
    tile = TILES["_add_partial"]
    programs = sum(triton.cdiv(each, tile["COLUMNS"]) for each in (width, c, values))
    lengths = rows, len(bias), len(weight)
    with on(biases):
        _add_partial[(programs,)](biases, bias, weight, *result, *lengths, width - c, c, values, **tile, **OPTIONS)
    return result


@triton.jit
def _fold_gradient(
    d_weight1,  # (H, C), of the folded weights and biases
    d_bias1,
    d_weight2,  # (C, H)
    d_bias2,
    weight1,
    gain,
    offset,
    weight2,
    bias2,
    gamma,
    weight1_out,
    gain_out,
    offset_out,
    weight2_out,
    bias2_out,
    gamma_out,
    H: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Each program: COLUMNS columns of the first weight, or COLUMNS rows of the second."""
    of_first: tl.constexpr = (C + COLUMNS - 1) // COLUMNS
    program = tl.program_id(0)
    if program < of_first:
        column = program * COLUMNS + tl.arange(0, COLUMNS)
        scale = tl.load(gain + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        shift = tl.load(offset + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
        of_gain = tl.zeros([ROWS, COLUMNS], tl.float32)
        of_offset = tl.zeros([ROWS, COLUMNS], tl.float32)
        for first in range(0, H, ROWS):
            row = first + tl.arange(0, ROWS)
            known = (row < H)[:, None] & (column < C)[None, :]
            position = row[:, None] * C + column[None, :]
            gradient = tl.load(d_weight1 + position, mask=known, other=0.0).to(tl.float32)
            of_bias = tl.load(d_bias1 + row, mask=row < H, other=0.0)[:, None]
            value = tl.load(weight1 + position, mask=known, other=0.0).to(tl.float32)
            of_gain += gradient * value
            of_offset += of_bias * value
            tl.store(
                weight1_out + position,
                (gradient * scale + of_bias * shift).to(weight1_out.dtype.element_ty),
                mask=known,
            )
        tl.store(gain_out + column, tl.sum(of_gain, 0).to(gain_out.dtype.element_ty), mask=column < C)
        tl.store(offset_out + column, tl.sum(of_offset, 0).to(offset_out.dtype.element_ty), mask=column < C)
    else:
        row = (program - of_first) * COLUMNS + tl.arange(0, COLUMNS)
        factor = tl.full([COLUMNS], 1.0, tl.float32)
        if gamma is not None:
            factor = tl.load(gamma + row, mask=row < C, other=0.0).to(tl.float32)
        of_gamma = tl.zeros([COLUMNS, ROWS], tl.float32)
        for first in range(0, H, ROWS):
            column = first + tl.arange(0, ROWS)
            known = (row < C)[:, None] & (column < H)[None, :]
            position = row[:, None] * H + column[None, :]
            gradient = tl.load(d_weight2 + position, mask=known, other=0.0).to(tl.float32)
            if gamma is not None:
                of_gamma += gradient * tl.load(weight2 + position, mask=known, other=0.0).to(tl.float32)
            tl.store(weight2_out + position, (gradient * factor[:, None]).to(weight2_out.dtype.element_ty), mask=known)
        of_bias = tl.load(d_bias2 + row, mask=row < C, other=0.0)
        tl.store(bias2_out + row, of_bias * factor, mask=row < C)
        if gamma is not None:
            total = tl.sum(of_gamma, 1)
            if bias2 is not None:
                total += of_bias * tl.load(bias2 + row, mask=row < C, other=0.0).to(tl.float32)
            tl.store(gamma_out + row, total.to(gamma_out.dtype.element_ty), mask=row < C)


class Gradients(NamedTuple):
    """Gradients of `fold`'s arguments but the first bias, in their types; bias2: float32. gamma: empty without it."""

    weight1: Tensor
    gain: Tensor
    offset: Tensor
    weight2: Tensor
    bias2: Tensor
    gamma: Tensor


def fold_gradient(
    d_weight1: Tensor,
    d_bias1: Tensor,
    d_weight2: Tensor,
    d_bias2: Tensor,
    weight1: Tensor,
    gain: Tensor,
    offset: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    gamma: Tensor | None,
) -> Gradients:
    """Return the gradients of what `fold` was given, for those of its results (the biases' float32)."""
    hidden, c = weight1.shape
    result = Gradients(
        torch.empty_like(weight1, memory_format=torch.contiguous_format),
        torch.empty_like(gain),
        torch.empty_like(offset),
        torch.empty_like(weight2, memory_format=torch.contiguous_format),
        torch.empty_like(d_bias2),
        weight2.new_empty(0) if gamma is None else torch.empty_like(gamma),
    )
    args = [
        d_weight1,
        d_bias1,
        d_weight2,
        d_bias2,
        weight1.contiguous(),
        gain,
        offset,
        weight2.contiguous(),
        bias2,
        gamma,
    ]
    tile = TILES["_fold_gradient"]
    with on(weight1):
        _fold_gradient[(2 * triton.cdiv(c, tile["COLUMNS"]),)](*args, *result, hidden, c, **tile, **OPTIONS)
    return result
