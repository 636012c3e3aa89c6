"""Triton functions shared by the kernels of a depthwise convolution.

A *strip* is ROWS output pixels one above the other, at one column of one image. A program computes a block of strips x
channels: every input value serves up to K outputs once it is in a register, and neighbouring threads read neighbouring
channels. Strips are numbered through all images, so no tile hangs over an image's right edge.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_REGISTERS = 128  # a thread: 16 of a multiprocessor's 64 warps fit into its 65,536 registers
PROGRAMS = 528  # of 4 warps, which write partial sums: 4 for each of an H100's 132 multiprocessors; on other GPUs too,
# so that equal inputs give equal bits


def channel_blocks(channels: int) -> tuple[int, int]:
    """Cut `channels` into equal blocks of a power of two: return their number (1, 2, 3 or 5) and size (at least 16).

    The last block is filled up with channels that do not exist; as few as possible.
    """
    sizes = {blocks: max(16, triton.next_power_of_2(triton.cdiv(channels, blocks))) for blocks in (1, 2, 3, 5)}
    blocks = min(sizes, key=lambda blocks: (blocks * sizes[blocks], blocks))
    return blocks, sizes[blocks]


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
    top,  # row of x under the first tap of each strip's first output pixel; may lie outside
    left,  # the same, column
    channel,
    exists,
    H: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    STRIDE: tl.constexpr,  # input pixels from one output pixel to the next
    SPREAD: tl.constexpr,  # only every SPREAD-th row and column of the kernel is used,
    first_row,  # from this row, below SPREAD
    first_column,
    FLIP: tl.constexpr,  # the kernel turned by 180 degrees
):
    """Compute the outputs of each strip; pixels outside of x are 0.

    An output's products are added column by column of the kernel, each from top to bottom, for any ROWS and block size,
    so that neither changes a bit.
    """
    TAPS: tl.constexpr = (K + SPREAD - 1) // SPREAD
    # One address for each strip, to which the loop adds numbers known when the kernel is compiled.
    first_pixel = image.to(tl.int64) * (H * W) + (top * W + left)
    start = x + (first_pixel * C)[:, None] + channel[None, :]
    known = exists[:, None] & (channel < C)[None, :]
    # Every strip loads the taps itself: loaded once, they would reach the threads through shared memory.
    channel_of_each = tl.zeros_like(top)[:, None] + channel[None, :]
    for j in range(TAPS):
        across = left + j
        tap_column = first_column + j * SPREAD
        visible = known & ((across >= 0) & (across < W))[:, None]
        taps = ()
        for i in tl.static_range(TAPS):
            tap_row = first_row + i * SPREAD
            tap = tap_row * K + tap_column
            if FLIP:
                tap = K * K - 1 - tap
            end = C
            if SPREAD > 1:  # some first rows and columns have one tap fewer
                end = tl.where((tap_row < K) & (tap_column < K), C, 0)
            value = tl.load(weight + tap * C + channel_of_each, mask=channel_of_each < end, other=0.0)
            taps = taps + (value.to(tl.float32),)
        for i in tl.static_range((ROWS - 1) * STRIDE + TAPS):
            down = top + i
            seen = visible & ((down >= 0) & (down < H))[:, None]
            value = tl.load(start + j * C + i * (W * C), mask=seen, other=0.0).to(tl.float32)
            updated = ()
            for r in tl.static_range(ROWS):
                if i >= r * STRIDE and i < r * STRIDE + TAPS:
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
