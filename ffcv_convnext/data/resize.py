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

BILINEAR, BICUBIC = 0, 1
_PRECISION_BITS = 22
_HALF = 1 << (_PRECISION_BITS - 1)

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
            w *= 1 << _PRECISION_BITS
            weights[i, k] = int(w - 0.5) if w < 0 else int(w + 0.5)
        starts[i] = low
        lengths[i] = high - low
    return starts, lengths, weights


@jit
def _clip(total):  # type: ignore[no-untyped-def]
    value = total >> _PRECISION_BITS
    return np.uint8(0 if value < 0 else (255 if value > 255 else value))


@jit
def resize_window(source, out_height, out_width, top, left, kind, flip, scratch, destination):  # type: ignore[no-untyped-def]
    """Resize an image and keep one window of the result.

    source: (h, w, 3) uint8, any strides. The whole of it becomes (out_height, out_width); of that, the window at
    (top, left) of destination's size is computed, and only that.
    kind: BILINEAR or BICUBIC.   flip: mirror the window left to right.
    scratch: (>= h * window width * 3,) uint8, overwritten.   destination: (window height, window width, 3) uint8.
    """
    height, width = destination.shape[0], destination.shape[1]
    x_starts, x_lengths, x_weights = filter_weights(source.shape[1], out_width, left, width, kind)
    y_starts, y_lengths, y_weights = filter_weights(source.shape[0], out_height, top, height, kind)
    first_row = y_starts[0]
    num_rows = y_starts[height - 1] + y_lengths[height - 1] - first_row
    rows = scratch[: num_rows * width * 3].reshape(num_rows, width * 3)
    for y in range(num_rows):
        line = source[first_row + y]
        for x in range(width):
            red, green, blue = np.int32(_HALF), np.int32(_HALF), np.int32(_HALF)
            start = x_starts[x]
            for k in range(x_lengths[x]):
                weight = x_weights[x, k]
                red += np.int32(weight * np.int32(line[start + k, 0]))
                green += np.int32(weight * np.int32(line[start + k, 1]))
                blue += np.int32(weight * np.int32(line[start + k, 2]))
            to = 3 * (width - 1 - x if flip else x)
            rows[y, to] = _clip(red)
            rows[y, to + 1] = _clip(green)
            rows[y, to + 2] = _clip(blue)
    totals = np.empty(width * 3, np.int32)
    for y in range(height):
        totals[:] = _HALF
        for k in range(y_lengths[y]):
            weight = y_weights[y, k]
            row = rows[y_starts[y] - first_row + k]
            for i in range(width * 3):
                totals[i] += np.int32(weight * np.int32(row[i]))
        line = destination[y].reshape(-1)
        for i in range(width * 3):
            line[i] = _clip(totals[i])


def resize(image: NDArray[np.uint8], height: int, width: int, kind: int = BICUBIC) -> NDArray[np.uint8]:
    """The whole of an (h, w, 3) uint8 image as (height, width, 3) uint8."""
    destination = np.empty((height, width, 3), np.uint8)
    scratch = np.empty(image.shape[0] * width * 3, np.uint8)
    resize_window(image, height, width, 0, 0, kind, False, scratch, destination)
    return destination
