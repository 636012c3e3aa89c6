"""Triton functions shared by the kernels of a depthwise convolution.

A *strip* is ROWS output pixels one above the other, at one column of one image. A program computes a block of strips x
channels: every input value serves up to K outputs once it is in a register, and neighbouring threads read neighbouring
channels. Strips are numbered through all images, so no tile hangs over an image's right edge.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(strip, H: tl.constexpr, W: tl.constexpr, ROWS: tl.constexpr):
    """Return image, first row and column of each strip of outputs of H x W pixels."""
    strips_above: tl.constexpr = (H + ROWS - 1) // ROWS
    return strip // (W * strips_above), strip // W % strips_above * ROWS, strip % W


@triton.jit
def correlate(
    sums,  # ROWS tensors (strips, channels) of float32, to which the products are added
    x,  # (N, H, W, C)
    weight,  # (K * K, C)
    image,  # of each strip; where `exists` is false, anything
    row,  # of each strip's first output pixel
    column,
    channel,
    exists,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,  # input pixels from one output pixel to the next
    SPREAD: tl.constexpr,  # the input is x with SPREAD - 1 zeros between its pixels
    FLIP: tl.constexpr,  # the kernel turned by 180 degrees
):
    """Compute the outputs of each strip, padded "same".

    An output's products are added column by column of the kernel, each from top to bottom, for any ROWS and block size,
    so that neither changes a bit.
    """
    top = row * STRIDE - K // 2
    left = column * STRIDE - K // 2
    start = x + image.to(tl.int64)[:, None] * (H * W * C) + channel[None, :]
    known = exists[:, None] & (channel < C)[None, :]
    # Every strip loads the taps itself: loaded once, they would reach the threads through shared memory.
    channel_of_each = tl.zeros_like(row)[:, None] + channel[None, :]
    for j in range(K):
        across = left + j
        visible = known & ((across >= 0) & (across < W * SPREAD) & (across % SPREAD == 0))[:, None]
        taps = ()
        for i in tl.static_range(K):
            tap = i * K + j
            if FLIP:
                tap = K * K - 1 - tap
            value = tl.load(weight + tap * C + channel_of_each, mask=channel_of_each < C, other=0.0)
            taps = taps + (value.to(tl.float32),)
        for i in tl.static_range((ROWS - 1) * STRIDE + K):
            down = top + i
            seen = visible & ((down >= 0) & (down < H * SPREAD) & (down % SPREAD == 0))[:, None]
            pixel = down // SPREAD * W + across // SPREAD
            value = tl.load(start + (pixel * C)[:, None], mask=seen, other=0.0).to(tl.float32)
            updated = ()
            for r in tl.static_range(ROWS):
                if i >= r * STRIDE and i < r * STRIDE + K:
                    updated = updated + (tl.fma(value, taps[i - r * STRIDE], sums[r]),)
                else:
                    updated = updated + (sums[r],)
            sums = updated
    return sums


@triton.jit
def start_sums(bias, channel, C: tl.constexpr, ROWS: tl.constexpr, STRIPS: tl.constexpr, CHANNELS: tl.constexpr):
    """Return ROWS tensors (STRIPS, CHANNELS) of float32: the bias, or 0 without one."""
    first = tl.zeros([STRIPS, CHANNELS], tl.float32)
    if bias is not None:
        first += tl.load(bias + channel, mask=channel < C, other=0.0).to(tl.float32)[None, :]
    sums = ()
    for _ in tl.static_range(ROWS):
        sums = sums + (first,)
    return sums
