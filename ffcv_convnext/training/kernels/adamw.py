"""One launch for a step of AdamW on all parameters, and for their averages (Triton).

A launch gets two tables. Its row for a tensor has the addresses of the parameter, the gradient, both moments, the
average and the step count; its row for a group has what depends on the learning rate. A program computes a chunk of one
tensor: it reads 20 bytes a parameter and writes 16 (without averages 16 and 12).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # parameters that a program computes: enough programs for a GPU from 1 million parameters on
BLOCK = 1024  # parameters in registers: 8 of 5 tensors in a thread
OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": True}  # explicit: Triton is going to change its default
# Columns of the two tables, 8 each; the kernel has their numbers in its code.
PARAMETER, GRADIENT, AVERAGE_OF_GRADIENTS, AVERAGE_OF_SQUARES, AVERAGE, STEP, NUMEL, GROUP = range(8)
LR, DECAY, ONE_MINUS_BETA1, ONE_MINUS_BETA2, LOG_BETA1, LOG_BETA2, EPS, UNUSED = range(8)


@triton.jit
def _one_minus_exp(x):
    """Return 1 - exp(x) for x <= 0, in float32 without cancellation near 0."""
    series = 1.0 + x / 9.0
    series = 1.0 + x / 8.0 * series
    series = 1.0 + x / 7.0 * series
    series = 1.0 + x / 6.0 * series
    series = 1.0 + x / 5.0 * series
    series = 1.0 + x / 4.0 * series
    series = 1.0 + x / 3.0 * series
    series = 1.0 + x / 2.0 * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit
def _address(row, column: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a column of a row as a pointer to float32."""
    address = tl.load(row + column).to(tl.pointer_type(tl.float32))
    if ALIGNED:
        address = tl.multiple_of(address, 16)
    return address


@triton.jit
def _update(
    offset, mask, parameter, gradient, exp_avg, exp_avg_sq, average,
    learns, unscale, step_size, decay, weight1, weight2, sqrt_correction2, eps, average_weight,
    AVERAGES: tl.constexpr,
):  # fmt: skip
    """Compute one block. mask: None for a whole one, so that loads and stores have 16 bytes a thread."""
    p = tl.load(parameter + offset, mask=mask)
    if learns:
        g = tl.load(gradient + offset, mask=mask) * unscale
        m = tl.load(exp_avg + offset, mask=mask)
        v = tl.load(exp_avg_sq + offset, mask=mask)
        m += weight1 * (g - m)
        v += weight2 * (g * g - v)
        p -= decay * p
        p -= step_size * (m / (tl.sqrt_rn(v) / sqrt_correction2 + eps))
        tl.store(parameter + offset, p, mask=mask)
        tl.store(exp_avg + offset, m, mask=mask)
        tl.store(exp_avg_sq + offset, v, mask=mask)
    if AVERAGES:
        mean = tl.load(average + offset, mask=mask)
        tl.store(average + offset, mean + average_weight * (p - mean), mask=mask)


@triton.jit
def _adamw(
    chunks,  # (programs, 2) int32: row of `tensors`, number of the chunk in its tensor
    tensors,  # (tensors, 8) int64
    groups,  # (groups, 8) float32
    scale,  # () float32: of the gradients, or None
    found_inf,  # () float32: not 0 if a gradient is not finite, or None
    average_weight,  # 1 - the decay of the averages
    AVERAGES: tl.constexpr,
    ALIGNED: tl.constexpr,  # all addresses to 16 bytes
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    row = tensors + tl.load(chunks + 2 * program) * 8
    start = tl.load(chunks + 2 * program + 1) * CHUNK
    group = groups + tl.load(row + 7) * 8
    parameter = _address(row, 0, ALIGNED)
    gradient = _address(row, 1, ALIGNED)
    exp_avg = _address(row, 2, ALIGNED)
    exp_avg_sq = _address(row, 3, ALIGNED)
    average = _address(row, 4, ALIGNED)
    step = tl.load(_address(row, 5, False))
    end = tl.minimum(start + CHUNK, tl.load(row + 6).to(tl.int32))
    lr = tl.load(group)
    decay = tl.load(group + 1)
    weight1 = tl.load(group + 2)
    weight2 = tl.load(group + 3)
    step_size = lr / _one_minus_exp(step * tl.load(group + 4))
    sqrt_correction2 = tl.sqrt_rn(_one_minus_exp(step * tl.load(group + 5)))
    eps = tl.load(group + 6)
    learns = True
    if found_inf is not None:
        learns = tl.load(found_inf) == 0.0
    unscale = 1.0
    if scale is not None:
        unscale = 1.0 / tl.load(scale)
    whole = (end - start) // BLOCK
    for i in range(whole):
        offset = start + i * BLOCK + tl.arange(0, BLOCK)
        _update(
            offset, None, parameter, gradient, exp_avg, exp_avg_sq, average,
            learns, unscale, step_size, decay, weight1, weight2, sqrt_correction2, eps, average_weight, AVERAGES,
        )  # fmt: skip
    offset = start + whole * BLOCK + tl.arange(0, BLOCK)
    if start + whole * BLOCK < end:
        _update(
            offset, offset < end, parameter, gradient, exp_avg, exp_avg_sq, average,
            learns, unscale, step_size, decay, weight1, weight2, sqrt_correction2, eps, average_weight, AVERAGES,
        )  # fmt: skip


def adamw(
    chunks: Tensor,
    tensors: Tensor,
    groups: Tensor,
    *,
    scale: Tensor | None,
    found_inf: Tensor | None,
    average_weight: float | None,
    aligned: bool,
) -> None:
    """Take a step on all tensors of the tables; the host does not wait for the device.

    chunks: (programs, 2) int32, the row of `tensors` and the number of a chunk in its tensor.
    tensors: (tensors, 8) int64, the columns PARAMETER to GROUP; addresses of float32 numbers in one memory order,
    the step counted already, GROUP a row of `groups`.   groups: (groups, 8) float32, the columns LR to EPS;
    DECAY is lr times weight decay.   scale: () float32, the gradients are divided by it.   found_inf: () float32;
    unless it is 0, parameters and moments stay as they are.   average_weight: of the new parameters in their averages,
    or None without averages.   aligned: all addresses are multiples of 16 bytes.
    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2, bias correction as in torch.optim.AdamW.
    """
    launch: Any = _adamw[(len(chunks),)]
    with torch.cuda.device_of(tensors):
        launch(
            chunks, tensors, groups, scale, found_inf, 0.0 if average_weight is None else average_weight,
            AVERAGES=average_weight is not None, ALIGNED=aligned, CHUNK=CHUNK, BLOCK=BLOCK, **OPTIONS,
        )  # fmt: skip
