"""Antialiased resize of uint8 RGB images, with Pillow's own arithmetic.

The recipe's pixels come from `PIL.Image.resize`; accuracy drops are reported wherever another filter takes its
place. So this is Pillow's algorithm (libImaging/Resample.c): separable, the filter stretched by the scale so that
it antialiases, 22-bit fixed-point weights, rounding to uint8 between the two passes. Each pass equals Pillow's bit
for bit, and both together equal Pillow up to version 12. From version 13 on Pillow takes the vertical pass first
where the height shrinks much more than the width (python-pillow#9549), which moves some values by a level.
"""

from __future__ import annotations

import numpy as np
from numba import njit
from numpy.typing import NDArray

from ffcv_convnext.data.simd import (
    LANES,
    PRECISION_BITS,
    transpose_16x16,
    weighted_sum_1,
    weighted_sum_3,
    weighted_sum_4,
)

BILINEAR, BICUBIC = 0, 1
_LEAST_WIDTH = 6  # 16 bytes of RGB

jit = njit(nogil=True, error_model="numpy", cache=True)


@jit
def _filter(x, kind):  # type: ignore[no-untyped-def]
    """The filter's weight at distance x, in source pixels when enlarging; Pillow's bicubic has a = -0.5."""
    x = abs(x)
    if kind == BILINEAR:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@jit
def filter_weights(in_size, out_size, first, count, kind):  # type: ignore[no-untyped-def]
    """Weights of output positions first .. first + count - 1 when in_size pixels become out_size.

    Returns starts (count,) int32: the first source pixel of each output pixel; lengths (count,) int32: how many
    it uses; weights (count, most) int32: fixed point with 22 fractional bits.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = (1.0 if kind == BILINEAR else 2.0) * stretch
    most = int(np.ceil(support)) * 2 + 1
    starts = np.empty(count, np.int32)
    lengths = np.empty(count, np.int32)
    weights = np.zeros((count, most), np.int32)
    real = np.empty(most, np.float64)
    for i in range(count):
        center = (first + i + 0.5) * scale
        low = max(int(center - support + 0.5), 0)
        high = min(int(center + support + 0.5), in_size)
        total = 0.0
        for k in range(high - low):
            real[k] = _filter((k + low - center + 0.5) * (1.0 / stretch), kind)
            total += real[k]
        for k in range(high - low):
            w = real[k] / total if total != 0.0 else real[k]
            w *= 1 << PRECISION_BITS
            weights[i, k] = int(w - 0.5) if w < 0 else int(w + 0.5)
        starts[i] = low
        lengths[i] = high - low
    return starts, lengths, weights


@jit
def scratch_size(height, width, window_width):  # type: ignore[no-untyped-def]
    """Bytes of scratch that resize_window needs for a (height, width, 3) source and a window of that width."""
    line = _padded(3 * window_width)
    return LANES * (_padded(3 * width) + line) + (height + LANES) * line + 64


@jit
def _padded(num_bytes):  # type: ignore[no-untyped-def]
    return (num_bytes + LANES - 1) // LANES * LANES


@jit
def resize_window(source, out_height, out_width, top, left, kind, flip, scratch, destination):  # type: ignore[no-untyped-def]
    """Resize an image and keep one window of the result.

    source: (h, w, 3) uint8, the pixels of a row contiguous; 16 bytes behind its last pixel must be readable memory.
    The whole of it becomes (out_height, out_width); of that, the window at (top, left) of destination's size is
    computed, and only that.
    kind: BILINEAR or BICUBIC.   flip: mirror the window left to right.
    scratch: (>= scratch_size(h, w, window width),) uint8, overwritten.
    destination: (window height, window width, 3) uint8, contiguous, at least 6 pixels wide.
    """
    height, width = destination.shape[0], destination.shape[1]
    x_starts, x_lengths, x_weights = filter_weights(source.shape[1], out_width, left, width, kind)
    y_starts, y_lengths, y_weights = filter_weights(source.shape[0], out_height, top, height, kind)
    first_row, first_column = y_starts[0], x_starts[0]
    num_rows = y_starts[height - 1] + y_lengths[height - 1] - first_row
    num_columns = x_starts[width - 1] + x_lengths[width - 1] - first_column
    used = source[first_row : first_row + num_rows, first_column : first_column + num_columns]
    line = _padded(3 * width)  # bytes of a row between the two passes
    columns = scratch.ctypes.data  # 16 source rows as columns: 16 bytes of red, of green, of blue, for each x
    narrow = columns + LANES * _padded(3 * num_columns)  # the same after the horizontal pass
    rows = narrow + LANES * line  # all of it, as rows again

    pixels, stride, last_block = used.ctypes.data, used.strides[0], num_rows - LANES
    if num_rows < LANES:  # too few for a block: copy them into one
        block = np.zeros((LANES, 3 * num_columns + LANES), np.uint8)
        for y in range(num_rows):
            block[y, : 3 * num_columns] = used[y].copy().reshape(-1)
        pixels, stride, last_block = block.ctypes.data, block.strides[0], 0
    row = 0
    while row < num_rows:
        block_row = min(row, last_block)
        for at in range(0, 3 * num_columns, LANES):
            transpose_16x16(pixels + block_row * stride + at, stride, columns + LANES * at, LANES)
        for x in range(width):
            to = width - 1 - x if flip else x
            weighted_sum_3(
                narrow + 3 * LANES * to,
                columns + 3 * LANES * (x_starts[x] - first_column),
                3 * LANES,
                x_weights[x].ctypes.data,
                x_lengths[x],
            )
        for at in range(0, line, LANES):
            transpose_16x16(narrow + LANES * at, LANES, rows + block_row * line + at, line)
        row += LANES

    end = 3 * width
    for y in range(height):
        above = rows + (y_starts[y] - first_row) * line
        out, weights, num_taps = destination[y].ctypes.data, y_weights[y].ctypes.data, y_lengths[y]
        at = 0
        while at + 4 * LANES <= end:
            weighted_sum_4(out + at, above + at, line, weights, num_taps)
            at += 4 * LANES
        while at < end:
            inside = min(at, end - LANES)  # the last vector overlaps the one before rather than the next row
            weighted_sum_1(out + inside, above + inside, line, weights, num_taps)
            at += LANES


def resize(image: NDArray[np.uint8], height: int, width: int, kind: int = BICUBIC) -> NDArray[np.uint8]:
    """The whole of an (h, w, 3) uint8 image as (height, width, 3) uint8. Raises ValueError for a width below 6."""
    if width < _LEAST_WIDTH:
        raise ValueError(f"width = {width}: expected at least {_LEAST_WIDTH} pixels")
    readable = np.zeros(image.size + LANES, np.uint8)
    source = readable[: image.size].reshape(image.shape)
    source[:] = image
    destination = np.empty((height, width, 3), np.uint8)
    scratch = np.empty(scratch_size(image.shape[0], image.shape[1], width), np.uint8)
    resize_window(source, height, width, 0, 0, kind, False, scratch, destination)
    return destination
