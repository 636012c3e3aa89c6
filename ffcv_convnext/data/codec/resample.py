"""Resize planes and RGB images with Pillow's arithmetic, in the conversion's workers.

The algorithm is that of resize.py, which serves the loader: a separable filter scaled so that it antialiases, 22-bit
fixed-point weights, the horizontal pass first, rounding to uint8 between the passes. The results equal those of
`PIL.Image.resize` with a box up to Pillow 12 bit for bit. Pillow 13 computes the vertical pass first where the height
shrinks much more than the width (python-pillow#9549), which changes some values; an image that keeps its aspect ratio
is not such a case.

Importing numba and loading its cached code costs each worker more than a second; this file needs llvmlite only. The
weights are computed by numpy, without fused multiply-add,
and everything else by integers: the results are the same on every processor and do not depend on Pillow's version.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int64
from functools import cache, lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from ffcv_convnext.data.codec.machine_code import Code, load_code, optimise
from ffcv_convnext.data.codec.vector_code import (
    I64,
    LANES,
    PRECISION_BITS,
    load,
    loop,
    offset,
    transpose_16x16,
    weighted_sum,
    word,
)

Filter = Literal["bilinear", "bicubic"]
_STRIP = 64  # rows that the horizontal pass computes together
_NUM_HORIZONTAL, _NUM_VERTICAL = 13, 8  # arguments of the compiled functions


class Weights(NamedTuple):
    """A filter along one axis."""

    starts: NDArray[np.int64]  # (n,): first source position of each output position
    lengths: NDArray[np.int64]  # (n,): number of source positions
    values: NDArray[np.int32]  # (n, max length): weights with 22 fractional bits


@lru_cache(maxsize=16)  # both chroma planes have the same
def filter_weights(size: int, extent: float, out_size: int, kind: Filter) -> Weights:
    """Compute the weights with which the first `extent` of `size` source pixels become out_size pixels.

    extent: in pixels, 0 < extent <= size; pixels beyond it, up to `size`, contribute to the last outputs.
    """
    scale = extent / out_size
    stretch = max(scale, 1.0)
    support = (1.0 if kind == "bilinear" else 2.0) * stretch
    centers = (np.arange(out_size) + 0.5) * scale
    starts = np.maximum((centers - support + 0.5).astype(np.int64), 0)
    lengths = np.minimum((centers + support + 0.5).astype(np.int64), size) - starts
    position = np.arange(lengths.max())
    real = _filter((position + starts[:, None] - centers[:, None] + 0.5) * (1.0 / stretch), kind)
    real[position >= lengths[:, None]] = 0
    total = np.cumsum(real, axis=1)[:, -1:]  # one after the other, as Pillow adds them
    real = real / np.where(total == 0, 1, total) * (1 << PRECISION_BITS)
    values = (real + np.copysign(0.5, real)).astype(np.int32)
    return Weights(starts, lengths, values)


def _filter(x: NDArray[np.float64], kind: Filter) -> NDArray[np.float64]:
    """Return the filter's weights at distances x, in source pixels when enlarging; Pillow's bicubic has a = -0.5."""
    x = np.abs(x)
    if kind == "bilinear":
        return np.where(x < 1, 1 - x, 0)
    a = -0.5
    inner = ((a + 2) * x - (a + 3)) * x * x + 1
    outer = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, inner, np.where(x < 2, outer, 0))


def resample(
    image: NDArray[np.uint8], size: tuple[int, int], kind: Filter = "bicubic", extent: tuple[float, float] | None = None
) -> NDArray[np.uint8]:
    """Resize an image, or the part of it at its upper left corner, with antialiasing.

    image: (height, width) or (height, width, 3) uint8; left untouched.   size: width, height of the result.
    extent: width, height of the part, pixels, maybe with a fraction, at most the image's; None: the whole image.
    Returns a new contiguous array. Raises ValueError for another type, shape, size or extent.
    """
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or image.shape[2:] not in ((), (3,)):
        raise ValueError(f"an array {image.shape} of {image.dtype}: expected (height, width[, 3]) of uint8")
    height, width = image.shape[:2]
    across, down = (float(np.float32(side)) for side in extent or (width, height))  # Pillow's precision of a box
    if min(size) < 1 or not (0 < across <= width and 0 < down <= height):
        raise ValueError(f"{across} x {down} of {width} x {height} pixels to {size[0]} x {size[1]}: impossible")
    columns = filter_weights(width, across, size[0], kind)
    rows = filter_weights(height, down, size[1], kind)
    narrow = _horizontal(image, columns) if (across, size[0]) != (width, width) else _padded(image)
    result = _vertical(narrow, rows)
    num_bytes = size[0] * (image.size // (height * width))
    return np.ascontiguousarray(result[:, :num_bytes]).reshape(size[1], size[0], *image.shape[2:])


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def _padded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the rows' bytes, shape (height, width * channels), in an array whose sides are multiples of 64.

    What is added is not set, and no weight refers to it.
    """
    height, num_bytes = image.shape[0], image.size // image.shape[0]
    padded = np.empty((_round_up(height, _STRIP), _round_up(num_bytes, _STRIP)), np.uint8)
    padded[:height, :num_bytes] = image.reshape(height, num_bytes)
    return padded


def _horizontal(image: NDArray[np.uint8], weights: Weights) -> NDArray[np.uint8]:
    """Return the image with its width changed, in the form of `_padded`."""
    num_channels = image.size // (image.shape[0] * image.shape[1])
    source = _padded(image)
    line = _round_up(len(weights.starts) * num_channels, _STRIP)
    result = np.empty((source.shape[0], line), np.uint8)
    columns = np.empty((source.shape[1], _STRIP), np.uint8)
    narrow = np.empty((line, _STRIP), np.uint8)
    arrays = (source, columns, narrow, result)
    numbers = (source.shape[0] // _STRIP, source.shape[1], line, num_channels)
    _functions().horizontal(*[_address(array) for array in arrays], *numbers, *_as_arguments(weights))
    return result


def _vertical(source: NDArray[np.uint8], weights: Weights) -> NDArray[np.uint8]:
    """Return an image in the form of `_padded` with its height changed; its height is not padded."""
    result = np.empty((len(weights.starts), source.shape[1]), np.uint8)
    _functions().vertical(_address(source), _address(result), source.shape[1], *_as_arguments(weights))
    return result


def _address(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)


def _as_arguments(weights: Weights) -> tuple[int, ...]:
    return (*[_address(array) for array in weights], weights.values.shape[1], len(weights.starts))


class _Functions(NamedTuple):
    """Functions of int64 addresses and numbers. They end with the weights: three addresses, max length, outputs."""

    horizontal: Callable[..., None]  # source, columns, narrow, result, strips, bytes a row: source, result; channels
    vertical: Callable[..., None]  # source, result, bytes a row


@cache
def _functions() -> _Functions:
    horizontal, vertical = (
        CFUNCTYPE(None, *[c_int64] * num_arguments)(address)
        for num_arguments, address in zip(
            (_NUM_HORIZONTAL, _NUM_VERTICAL), load_code("resample", _compile), strict=True
        )
    )
    return _Functions(horizontal, vertical)


def _compile() -> list[Code]:
    """Compile both functions for this processor."""
    codes = []
    for name, num_arguments, generate in (
        ("resample_horizontal", _NUM_HORIZONTAL, _generate_horizontal),
        ("resample_vertical", _NUM_VERTICAL, _generate_vertical),
    ):
        module = ir.Module()
        function = ir.Function(module, ir.FunctionType(ir.VoidType(), [I64] * num_arguments), name)
        builder = ir.IRBuilder(function.append_basic_block())
        generate(builder, *function.args)
        builder.ret_void()
        codes.append(Code(name, optimise(str(module))))
    return codes


def _generate_horizontal(
    builder: Any,
    source: Any,
    columns: Any,
    narrow: Any,
    result: Any,
    num_strips: Any,
    source_line: Any,
    line: Any,
    num_channels: Any,
    *weights: Any,
) -> None:
    """Strip by strip of 64 rows: to columns, the weighted sums of columns, back to rows."""
    strip_step, block_step = word(_STRIP), word(LANES * _STRIP)  # bytes: of a column, of 16 columns

    def transpose(of: Any, of_step: Any, of_across: Any, of_block: Any, to: Any, to_step: Any, to_across: Any,
                  to_block: Any, num_bytes: Any) -> None:  # fmt: skip
        """Transpose a strip, tile by tile: steps in bytes inside a tile, to the next tile, to the next 16 rows."""

        def block(number: Any, _: Any) -> tuple[()]:
            start, target = offset(builder, of, number, of_block), offset(builder, to, number, to_block)

            def tile(index: Any, _: Any) -> tuple[()]:
                at, to_at = offset(builder, start, index, of_across), offset(builder, target, index, to_across)
                transpose_16x16(builder, at, of_step, to_at, to_step)
                return ()

            loop(builder, builder.sdiv(num_bytes, word(LANES)), tile)
            return ()

        loop(builder, word(_STRIP // LANES), block)

    def strip(index: Any, _: Any) -> tuple[()]:
        first_row = builder.mul(index, strip_step)
        rows, out = offset(builder, source, first_row, source_line), offset(builder, result, first_row, line)
        across, blocks_of_source = word(LANES), builder.mul(source_line, word(LANES))
        transpose(rows, source_line, across, blocks_of_source, columns, strip_step, block_step, across, source_line)
        _sum_lines(builder, columns, narrow, builder.mul(num_channels, strip_step), *weights)
        blocks_of_result = builder.mul(line, word(LANES))
        transpose(narrow, strip_step, block_step, across, out, line, across, blocks_of_result, line)
        return ()

    loop(builder, num_strips, strip)


def _generate_vertical(builder: Any, source: Any, result: Any, line: Any, *weights: Any) -> None:
    _sum_lines(builder, source, result, line, *weights)


def _sum_lines(
    builder: Any,
    source: Any,
    result: Any,
    line: Any,
    starts: Any,
    lengths: Any,
    values: Any,
    max_length: Any,
    count: Any,
) -> None:
    """Compute `count` lines of `line` bytes, a multiple of 64, each the weighted sum of lines of the source."""

    def one(index: Any, _: Any) -> tuple[()]:
        start = load(builder, offset(builder, starts, index, word(8)), I64)
        length = load(builder, offset(builder, lengths, index, word(8)), I64)
        line_weights = offset(builder, values, builder.mul(index, max_length), word(4))
        above, to = offset(builder, source, start, line), offset(builder, result, index, line)

        def part(number: Any, _: Any) -> tuple[()]:
            at = builder.mul(number, word(4 * LANES))
            weighted_sum(builder, builder.add(to, at), builder.add(above, at), line, line_weights, length, 4)
            return ()

        loop(builder, builder.sdiv(line, word(4 * LANES)), part)
        return ()

    loop(builder, count, one)
