"""The end of a residual block, shortcut + branch x layer scale x stochastic depth, in one pass each way."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.models.kernels.launch import OPTIONS, channels_last, empty, on


@triton.jit
def _add(shortcut, branch, gamma, keep, out, VALUES: tl.constexpr, C: tl.constexpr, BLOCK: tl.constexpr):
    """Compute BLOCK values of one image, which has VALUES."""
    blocks: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    image = tl.program_id(0) // blocks
    offset = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    position = image.to(tl.int64) * VALUES + offset
    value = tl.load(branch + position, mask=offset < VALUES, other=0.0).to(tl.float32)
    if gamma is not None:
        value *= tl.load(gamma + offset % C).to(tl.float32)
    if keep is not None:
        value *= tl.load(keep + image)
    value += tl.load(shortcut + position, mask=offset < VALUES, other=0.0).to(tl.float32)
    tl.store(out + position, value.to(out.dtype.element_ty), mask=offset < VALUES)


@triton.jit(do_not_specialize=["num_pixels", "pixels_each"])
def _branch_gradient(
    g,  # (pixels, C)
    branch,
    gamma,
    keep,
    out,  # d/dbranch
    partial,  # (programs, C) float32, of d/dgamma; None without gamma
    num_pixels,
    pixels_each,  # of a program
    IMAGE: tl.constexpr,  # pixels of an image
    C: tl.constexpr,
    PIXELS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    blocks: tl.constexpr = (C + CHANNELS - 1) // CHANNELS
    channel = tl.program_id(0) % blocks * CHANNELS + tl.arange(0, CHANNELS)
    program = tl.program_id(0) // blocks
    end = tl.minimum((program + 1) * pixels_each, num_pixels)
    total = tl.zeros([PIXELS, CHANNELS], tl.float32)
    for first in range(program * pixels_each, end, PIXELS):
        pixel = first + tl.arange(0, PIXELS)
        known = (pixel < end)[:, None] & (channel < C)[None, :]
        position = (pixel.to(tl.int64) * C)[:, None] + channel[None, :]
        gradient = tl.load(g + position, mask=known, other=0.0).to(tl.float32)
        if keep is not None:
            gradient *= tl.load(keep + pixel // IMAGE, mask=pixel < end, other=0.0)[:, None]
        if gamma is not None:
            total += gradient * tl.load(branch + position, mask=known, other=0.0).to(tl.float32)
            gradient *= tl.load(gamma + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
        tl.store(out + position, gradient.to(out.dtype.element_ty), mask=known)
    if gamma is not None:
        tl.store(partial + program.to(tl.int64) * C + channel, tl.sum(total, 0), mask=channel < C)


def _result_type(shortcut: Tensor, branch: Tensor, gamma: Tensor | None) -> torch.dtype:
    both = torch.promote_types(shortcut.dtype, branch.dtype)
    return both if gamma is None else torch.promote_types(both, gamma.dtype)


@torch.library.custom_op("ffcv_convnext::add_branch", mutates_args=())
def _forward(shortcut: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    shortcut, branch = channels_last(shortcut), channels_last(branch)
    out = empty(branch.shape, branch, _result_type(shortcut, branch, gamma))
    n, c, values = len(branch), branch.shape[1], branch[:1].numel()
    with on(branch):
        _add[(n * triton.cdiv(values, 1024),)](
            shortcut, branch, gamma, keep, out, values, c, BLOCK=1024, num_warps=4, **OPTIONS
        )  # fmt: skip
    return out


@_forward.register_fake
def _(shortcut: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    return empty(branch.shape, branch, _result_type(shortcut, branch, gamma))


@torch.library.custom_op("ffcv_convnext::branch_gradient", mutates_args=())
def _branch_gradients(g: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return d/dbranch in its data type, and d/dgamma (C,) in float32, empty without gamma."""
    g, branch = channels_last(g), channels_last(branch)
    _, c, h, w = g.shape
    pixels = len(g) * h * w
    channels = min(128, triton.next_power_of_2(c))
    block, blocks = 2048 // channels, triton.cdiv(c, channels)
    pixels_each = triton.cdiv(max(triton.cdiv(pixels * blocks, 2048), 32), block) * block
    programs = triton.cdiv(pixels, pixels_each)
    out = empty(branch.shape, branch, branch.dtype)
    partial = None if gamma is None else g.new_empty((programs, c), dtype=torch.float32)
    with on(g):
        _branch_gradient[(programs * blocks,)](
            g, branch, gamma, keep, out, partial, pixels, pixels_each, h * w, c,
            PIXELS=block, CHANNELS=channels, num_warps=4, **OPTIONS,
        )  # fmt: skip
    return out, g.new_empty(0, dtype=torch.float32) if partial is None else partial.sum(0)


@_branch_gradients.register_fake
def _(g: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    c = 0 if gamma is None else branch.shape[1]
    return empty(branch.shape, branch, branch.dtype), g.new_empty((c,), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    shortcut, branch, gamma, keep = inputs
    ctx.shortcut_type = shortcut.dtype
    ctx.save_for_backward(branch, gamma, keep)


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    branch, gamma, keep = ctx.saved_tensors
    d_branch, d_gamma = _branch_gradients(g, branch, gamma, keep)
    return g.to(ctx.shortcut_type), d_branch, None if gamma is None else d_gamma.to(gamma.dtype), None


_forward.register_autograd(_backward, setup_context=_save)


def add_branch(shortcut: Tensor, branch: Tensor, gamma: Tensor | None, keep: Tensor | None) -> Tensor:
    """Compute `twins.add_branch` with the kernels; the result is in channels_last memory.

    Raises ValueError for a data type other than float32, bfloat16 or float16.
    """
    result: Tensor = _forward(shortcut, branch, gamma, keep)
    return result
