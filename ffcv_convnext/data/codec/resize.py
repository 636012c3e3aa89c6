"""Resize uint8 RGB images with antialiasing, with Pillow's arithmetic.

The paper's recipe resizes with `PIL.Image.resize`, and users of other filters report lower accuracy. So this is
Pillow's algorithm (libImaging/Resample.c): separable, a filter scaled so that it antialiases, 22-bit fixed-point
weights, rounding to uint8 between the two passes. Each pass equals Pillow's bit for bit, and both together equal
Pillow up to version 12. Since version 13 Pillow computes the vertical pass first if that is less work
(python-pillow#9549), which changes some values.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.codec.jit import Bytes, jit
from ffcv_convnext.data.codec.simd import (
    LANES,
    PRECISION_BITS,
    transpose_16x16,
    weighted_sum_1,
    weighted_sum_3,
    weighted_sum_4,
)

BILINEAR, BICUBIC = 0, 1
Weights = NDArray[np.int32]


@jit
def _filter(x: float, kind: int) -> float:
    """Return the filter's weight at distance x, in source pixels when enlarging; Pillow's bicubic has a = -0.5."""
    x = abs(x)
    if kind == BILINEAR:
        return 1.0 - x if x < 1.0 else 0.0
    if x < 1.0:
        return ((-0.5 + 2.0) * x - (-0.5 + 3.0)) * x * x + 1.0
    if x < 2.0:
        return (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    return 0.0


@jit
def filter_weights(in_size: int, out_size: int, first: int, count: int, kind: int) -> tuple[Weights, Weights, Weights]:
    """Compute weights of output positions first .. first + count - 1 when in_size pixels become out_size.

    Returns starts (count,) int32: the first source pixel of each output pixel; lengths (count,) int32: the
    number that it uses; weights (count, max) int32: fixed point with 22 fractional bits.
    """
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    support = (1.0 if kind == BILINEAR else 2.0) * stretch
    max_length = int(np.ceil(support)) * 2 + 1
    starts = np.empty(count, np.int32)
    lengths = np.empty(count, np.int32)
    weights = np.zeros((count, max_length), np.int32)
    real = np.empty(max_length, np.float64)
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
def source_span(in_size: int, out_size: int, first: int, count: int, kind: int) -> tuple[int, int]:
    """Return the source pixels that output positions first .. first + count - 1 depend on: start and number."""
    scale = in_size / out_size
    support = (1.0 if kind == BILINEAR else 2.0) * max(scale, 1.0)
    start = max(int((first + 0.5) * scale - support + 0.5), 0)
    end = min(int((first + count - 0.5) * scale + support + 0.5), in_size)
    return start, end - start


@jit
def _padded(num_bytes: int) -> int:
    return (num_bytes + LANES - 1) // LANES * LANES


@jit
def scratch_size(height: int, width: int, window_width: int) -> int:
    """Return the bytes of scratch that resize_window needs for a (height, width, 3) source."""
    line = _padded(3 * window_width)
    return LANES * (2 * _padded(3 * width) + line) + (height + LANES) * line + 2 * LANES


@jit
def resize_window(
    source: Bytes,
    origin: tuple[int, int],
    in_size: tuple[int, int],
    out_size: tuple[int, int],
    corner: tuple[int, int],
    kind: int,
    flip: bool,
    scratch: Bytes,
    destination: Bytes,
) -> None:
    """Resize an image, given completely or in part, and compute one window of the result.

    source: (h, w, 3) uint8, the pixels of a row contiguous, with at least 16 readable bytes after the last one: the
    part of an image of in_size = (height, width) that begins at origin = (top, left).
    The whole image becomes out_size; only the window at `corner`, of destination's size, is computed.
    The source must contain the pixels that the window depends on (source_span).
    kind: BILINEAR or BICUBIC.   flip: mirror the window left to right.
    scratch: (>= scratch_size(in height, in width, window width),) uint8, overwritten.
    destination: (window height, window width, 3) uint8, contiguous.
    """
    height, width = destination.shape[0], destination.shape[1]
    x_starts, x_lengths, x_weights = filter_weights(in_size[1], out_size[1], corner[1], width, kind)
    y_starts, y_lengths, y_weights = filter_weights(in_size[0], out_size[0], corner[0], height, kind)
    first_row, first_column = y_starts[0], x_starts[0]
    num_rows = y_starts[height - 1] + y_lengths[height - 1] - first_row
    num_columns = x_starts[width - 1] + x_lengths[width - 1] - first_column
    y, x = first_row - origin[0], first_column - origin[1]
    used = source[y : y + num_rows, x : x + num_columns]
    line = _padded(3 * width)  # bytes of a row between the two passes
    columns = scratch.ctypes.data  # 16 source rows as columns: 16 bytes of red, of green, of blue, for each x
    narrow = columns + LANES * _padded(3 * num_columns)  # the same after the horizontal pass
    rows = narrow + LANES * line  # all of it, as rows again

    pixels, stride, last_block = used.ctypes.data, used.strides[0], num_rows - LANES
    if num_rows < LANES:  # too few for a block: copy them into one, in the scratch, because numba frees an
        stride, last_block = _padded(3 * num_columns), 0  # array after its last use by name; an address is not a use
        start = rows + LANES * line - columns
        few = scratch[start : start + LANES * stride].reshape(LANES, stride)
        for y in range(num_rows):
            for x in range(num_columns):
                for channel in range(3):
                    few[y, 3 * x + channel] = used[y, x, channel]
        pixels = columns + start
    row = 0
    while row < num_rows:
        block = min(row, last_block)  # the last block overlaps the one before
        for at in range(0, 3 * num_columns, LANES):
            transpose_16x16(pixels + block * stride + at, stride, columns + LANES * at, LANES)
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
            transpose_16x16(narrow + LANES * at, LANES, rows + block * line + at, line)
        row += LANES

    end = 3 * width
    spare = np.empty(LANES, np.uint8)
    for y in range(height):
        above = rows + (y_starts[y] - first_row) * line
        out, weights, num_taps = destination[y].ctypes.data, y_weights[y].ctypes.data, y_lengths[y]
        at = 0
        while at + 4 * LANES <= end:
            weighted_sum_4(out + at, above + at, line, weights, num_taps)
            at += 4 * LANES
        while at < end and end >= LANES:
            inside = min(at, end - LANES)  # the last vector overlaps the previous one, not the next row
            weighted_sum_1(out + inside, above + inside, line, weights, num_taps)
            at += LANES
        if end < LANES:
            weighted_sum_1(spare.ctypes.data, above, line, weights, num_taps)
            for x in range(width):
                for channel in range(3):
                    destination[y, x, channel] = spare[3 * x + channel]


def resize(
    image: NDArray[np.uint8],
    height: int,
    width: int,
    kind: int = BICUBIC,
    *,
    window: tuple[int, int, int, int] | None = None,
    flip: bool = False,
) -> NDArray[np.uint8]:
    """Resize an (h, w, 3) uint8 image to (height, width, 3), or compute one window (top, left, height, width) of that.

    flip: mirror the result left to right.
    """
    readable = np.zeros(image.size + LANES, np.uint8)
    source = readable[: image.size].reshape(image.shape)
    source[:] = image
    top, left, window_height, window_width = window or (0, 0, height, width)
    destination = np.empty((window_height, window_width, 3), np.uint8)
    in_size = image.shape[0], image.shape[1]
    scratch = np.empty(scratch_size(*in_size, window_width), np.uint8)
    resize_window(source, (0, 0), in_size, (height, width), (top, left), kind, flip, scratch, destination)
    return destination
