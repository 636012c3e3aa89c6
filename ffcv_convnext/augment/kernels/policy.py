"""A policy's round in three launches: statistics of the images that need them, their tables, and the operations.

A program works on one image, and an image draws one operation in a round: a branch on its kind is one on a single
number, so a program does the work of its own operation only. Between rounds a pixel is one int32, so that reading a
neighbour is one load. Positions are integers in 64-bit fixed point (arguments.fixed_positions); weights and blends are
float32 with every product rounded, as on a CPU. So the results are those of randaugment.apply_policy: to the last bit
for colours and blur, within 1 for geometric operations, whose weights both sides round in their own way.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.augment.color import Colour
from ffcv_convnext.augment.kernels.arguments import FRACTION_BITS, PolicyArguments
from ffcv_convnext.augment.kernels.launch import launch
from ffcv_convnext.augment.kernels.pixels import gray, load_pixels, store_pixels, to_byte
from ffcv_convnext.augment.pil_ops import NUDGE
from ffcv_convnext.augment.randaugment import TABLES, Kind

_BLOCK = 512  # pixels at a time
_PART = 4096  # pixels of a program that counts

_IDENTITY = tl.constexpr(int(Kind.IDENTITY))
_AUTO_CONTRAST = tl.constexpr(int(Kind.AUTO_CONTRAST))
_EQUALIZE = tl.constexpr(int(Kind.EQUALIZE))
_COLOR = tl.constexpr(int(Kind.COLOR))
_CONTRAST = tl.constexpr(int(Kind.CONTRAST))
_SHARPNESS = tl.constexpr(int(Kind.SHARPNESS))
_BLUR = tl.constexpr(int(Kind.GAUSSIAN_BLUR))
_SHEAR_X = tl.constexpr(int(Kind.SHEAR_X))
_SHEAR_Y = tl.constexpr(int(Kind.SHEAR_Y))
_TRANSLATE_X = tl.constexpr(int(Kind.TRANSLATE_X))
_TRANSLATE_Y = tl.constexpr(int(Kind.TRANSLATE_Y))
_ROTATE = tl.constexpr(int(Kind.ROTATE))
_FIRST_TABLE = tl.constexpr(int(min(TABLES)))
_LAST_TABLE = tl.constexpr(int(max(TABLES)))
assert set(range(min(TABLES), max(TABLES) + 1)) == TABLES
_FRACTION = tl.constexpr(FRACTION_BITS)
_HALF = tl.constexpr(1 << FRACTION_BITS - 1)
_REST = tl.constexpr(FRACTION_BITS - 31)  # bits of a fraction that float32 cannot hold anyway
_NUDGE = tl.constexpr(NUDGE)

_COUNTED = (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.CONTRAST)  # operations that need statistics of the image
_GEOMETRIC = (Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y, Kind.ROTATE)


def _mask(kinds: tuple[Kind, ...] | frozenset[Kind]) -> int:
    """Return one bit for each kind."""
    return sum(1 << int(kind) for kind in set(kinds))


# one bit for each kind; on the left of `&`, which the interpreter needs
_COUNTED_MASK = tl.constexpr(_mask((Kind.AUTO_CONTRAST, Kind.EQUALIZE)))
_COLOR_MASK = tl.constexpr(_mask((Kind.COLOR,)))
_CONTRAST_MASK = tl.constexpr(_mask((Kind.CONTRAST,)))
_SHARPNESS_MASK = tl.constexpr(_mask((Kind.SHARPNESS,)))
_BLUR_MASK = tl.constexpr(_mask((Kind.GAUSSIAN_BLUR,)))
_TABLES_MASK = tl.constexpr(_mask(TABLES))
_GEOMETRIC_MASK = tl.constexpr(_mask(_GEOMETRIC))


def apply_policy_kernels(images: Tensor, arguments: PolicyArguments, kinds: frozenset[Kind], fill: Colour) -> Tensor:
    """Compute the result of randaugment.apply_policy, in at most three launches a round.

    images: (N, H, W, 3) uint8, contiguous, not modified.   arguments: of N images, made for their height and width.
    kinds: those that the policy can draw; the others are not in the kernels.   fill: the colour outside of an image.
    Returns (N, H, W) int32 with a byte each of red, green and blue.
    """
    num, height, width, _ = images.shape
    mask = _mask(kinds | {Kind.IDENTITY})
    counts = mask & _mask(_COUNTED)
    parts = triton.cdiv(height * width, _PART)

    def ints(*shape: int) -> Tensor:
        return images.new_empty(shape, dtype=torch.int32)

    partial = ints(num, parts, 3, 256) if counts else None
    tables = images.new_empty((num, 3, 256)) if counts else None
    means = ints(num) if counts else None
    blurred = ints(num, height, width) if Kind.GAUSSIAN_BLUR in kinds else None
    size = {"HEIGHT": height, "WIDTH": width, "KINDS": mask}
    source, packed = images, False
    for kind, bicubic, positions, factors, blur, given in zip(*arguments, strict=True):
        read = {"PACKED": packed, "BLOCK": _BLOCK}
        if partial is not None or blurred is not None:
            launch(_statistics, num * parts, images, source, kind, blur, partial, blurred, PART=_PART, **size, **read)
        if partial is not None:
            launch(_tables, num, images, kind, partial, tables, means, PIXELS=height * width, PARTS=parts, KINDS=mask)
        result = ints(num, height, width)
        launch(
            _apply, num * triton.cdiv(height * width, _BLOCK), images,
            source, kind, bicubic, positions, factors, blur, given, tables, means, blurred, result,
            FILL=fill[0] | fill[1] << 8 | fill[2] << 16, **size, **read,
        )  # fmt: skip
        source, packed = result, True
    return source


@triton.jit
def _histogram(values, known, BLOCK: tl.constexpr):
    """Count the values from 0 to 255 of the lanes that are known: (256,) int32."""
    unknown = BLOCK - tl.sum(known.to(tl.int32), 0)
    found = tl.histogram(tl.where(known, values, 0), 256)
    return found - tl.where(tl.arange(0, 256) == 0, unknown, 0)


@triton.jit
def _statistics(
    images,  # packed or not
    kinds,  # (N,)
    blur,  # (N, 3)
    partial,  # (N, parts, 3, 256) int32: histograms; or, first of a part's 768, its sum of gray
    blurred,  # (N, H, W) int32, blurred along rows
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    """Count one part of an image, if its kind needs that; the others cost a load."""
    pixels: tl.constexpr = HEIGHT * WIDTH
    parts: tl.constexpr = (pixels + PART - 1) // PART
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    kind = tl.load(kinds + image)
    if _COUNTED_MASK & KINDS:
        if (kind == _AUTO_CONTRAST) | (kind == _EQUALIZE):
            reds = tl.zeros([256], tl.int32)
            greens = tl.zeros([256], tl.int32)
            blues = tl.zeros([256], tl.int32)
            for first in range(part * PART, tl.minimum(part * PART + PART, pixels), BLOCK):
                at = first + tl.arange(0, BLOCK)
                red, green, blue = load_pixels(images, image, tl.minimum(at, pixels - 1), pixels, PACKED)
                reds += _histogram(red, at < pixels, BLOCK)
                greens += _histogram(green, at < pixels, BLOCK)
                blues += _histogram(blue, at < pixels, BLOCK)
            to = partial + tl.program_id(0).to(tl.int64) * 768 + tl.arange(0, 256)
            tl.store(to, reds)
            tl.store(to + 256, greens)
            tl.store(to + 512, blues)
    if _CONTRAST_MASK & KINDS:
        if kind == _CONTRAST:
            total = tl.zeros([BLOCK], tl.int32)
            for first in range(part * PART, tl.minimum(part * PART + PART, pixels), BLOCK):
                at = first + tl.arange(0, BLOCK)
                red, green, blue = load_pixels(images, image, tl.minimum(at, pixels - 1), pixels, PACKED)
                total += tl.where(at < pixels, gray(red, green, blue), 0)
            tl.store(partial + tl.program_id(0).to(tl.int64) * 768, tl.sum(total, 0))
    if _BLUR_MASK & KINDS:
        if kind == _BLUR:
            for first in range(part * PART, tl.minimum(part * PART + PART, pixels), BLOCK):
                at = first + tl.arange(0, BLOCK)
                pixel = tl.minimum(at, pixels - 1)
                column = pixel % WIDTH
                red, green, blue = _three_boxes(
                    images, image, pixel - column, column, blur + 3 * image, pixels, WIDTH, 1, PACKED
                )  # fmt: skip
                store_pixels(blurred, image, at, red, green, blue, pixels)


@triton.jit
def _three_boxes(
    images, image, start, place, weights, PIXELS: tl.constexpr, SIZE: tl.constexpr, STEP: tl.constexpr,
    PACKED: tl.constexpr,
):  # fmt: skip
    """Apply three box filters, each rounded to 8 bits, along one axis, as pil_ops.gaussian_blur: red, green, blue.

    start: pixel 0 of the line.   place: along it, from 0 to SIZE - 1.   STEP: pixels from one to the next.
    Nine first results, five second ones, one third one. What lies outside of the line equals its end in each of the
    three, so a result from outside is replaced by its neighbour towards the middle.
    """
    middle = tl.load(weights).to(tl.uint32)
    near = tl.load(weights + 1).to(tl.uint32)
    far = tl.load(weights + 2).to(tl.uint32)
    words = ()
    for i in tl.static_range(13):
        at = tl.minimum(tl.maximum(place + (i - 6), 0), SIZE - 1)
        red, green, blue = load_pixels(images, image, start + at * STEP, PIXELS, PACKED)
        words = words + (red | (green << 8) | (blue << 16),)
    results = ()
    for channel in tl.static_range(3):
        values = ()
        for i in tl.static_range(13):
            values = values + (((words[i] >> (8 * channel)) & 255).to(tl.uint32),)
        once = _box(values, place, middle, near, far, SIZE)
        twice = _box(once, place, middle, near, far, SIZE)
        results = results + (_box(twice, place, middle, near, far, SIZE)[0].to(tl.int32),)
    return results


@triton.jit
def _box(values, place, middle, near, far, SIZE: tl.constexpr):
    """Filter an odd number of neighbouring values, four fewer results."""
    num: tl.constexpr = len(values) - 4
    found = ()
    for i in tl.static_range(num):
        total = (values[i + 1] + values[i + 3]) * near + (values[i] + values[i + 4]) * far + values[i + 2] * middle
        found = found + ((total + 8388608) >> 24,)
    half: tl.constexpr = num // 2
    left = (found[half],)
    right = (found[half],)
    for i in tl.static_range(1, half + 1):
        left = (tl.where(place - i < 0, left[0], found[half - i]),) + left
        right = right + (tl.where(place + i > SIZE - 1, right[i - 1], found[half + i]),)
    return left + right[1:]


@triton.jit
def _tables(
    kinds,  # (N,)
    partial,  # as _statistics leaves it
    tables,  # (N, 3, 256) uint8
    means,  # (N,) int32, the rounded mean of gray
    PIXELS: tl.constexpr,
    PARTS: tl.constexpr,
    KINDS: tl.constexpr,
):
    """Make the tables of an image, or its mean, if its kind needs that. Only here, 256 at a time, is float64 used."""
    image = tl.program_id(0)
    kind = tl.load(kinds + image)
    value = tl.arange(0, 256)
    first = partial + image.to(tl.int64) * (PARTS * 768)
    if _COUNTED_MASK & KINDS:
        if (kind == _AUTO_CONTRAST) | (kind == _EQUALIZE):
            for channel in range(3):
                counts = tl.zeros([256], tl.int32)
                for part in range(PARTS):
                    counts += tl.load(first + part * 768 + channel * 256 + value)
                low = tl.min(tl.where(counts > 0, value, 255), 0)
                high = tl.max(tl.where(counts > 0, value, 0), 0)
                found = value
                if kind == _EQUALIZE:
                    step = (PIXELS - tl.sum(tl.where(value == high, counts, 0), 0)) // 255
                    flat = (step // 2 + tl.cumsum(counts, 0) - counts) // tl.maximum(step, 1)
                    found = tl.where(step > 0, tl.minimum(flat, 255), value)
                else:
                    if high > low:
                        scale = tl.full([256], 255.0, tl.float64) / (high - low).to(tl.float64)
                        stretched = value.to(tl.float64) * scale + (-low).to(tl.float64) * scale
                        found = tl.minimum(tl.maximum(stretched, 0.0), 255.0).to(tl.int32)
                tl.store(tables + (image * 3 + channel) * 256 + value, found.to(tl.uint8))
    if _CONTRAST_MASK & KINDS:
        if kind == _CONTRAST:
            total = tl.zeros([1], tl.int64)
            for part in range(PARTS):
                total += tl.load(first + part * 768 + tl.arange(0, 1)).to(tl.int64)
            mean = (2 * total + PIXELS) // (2 * PIXELS)
            tl.store(means + image + tl.arange(0, 1), mean.to(tl.int32))


@triton.jit
def _blend(value, base, factor):
    """Compute base + factor (value - base), truncated. value: int32.   base: float32."""
    return to_byte((value.to(tl.float32) - base) * factor + base)


@triton.jit
def _apply(
    images,  # packed or not
    kinds,  # (N,)
    bicubic,  # (N,)
    positions,  # (N, 6)
    factors,  # (N,)
    blur,  # (N, 3)
    given,  # (N, 256) uint8: tables that need no statistics
    tables,  # (N, 3, 256) uint8
    means,  # (N,)
    blurred,  # (N, H, W) int32: blurred along rows
    result,  # (N, H, W) int32
    FILL: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    KINDS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Apply an image's operation to BLOCK of its pixels."""
    pixels: tl.constexpr = HEIGHT * WIDTH
    blocks: tl.constexpr = (pixels + BLOCK - 1) // BLOCK
    image = tl.program_id(0) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    pixel = tl.minimum(at, pixels - 1)
    kind = tl.load(kinds + image)
    if kind == _IDENTITY:
        red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
        store_pixels(result, image, at, red, green, blue, pixels)
    if _TABLES_MASK & KINDS:
        if (kind >= _FIRST_TABLE) & (kind <= _LAST_TABLE):
            red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
            table = given + image * 256
            red = tl.load(table + red).to(tl.int32)
            green = tl.load(table + green).to(tl.int32)
            blue = tl.load(table + blue).to(tl.int32)
            store_pixels(result, image, at, red, green, blue, pixels)
    if _COUNTED_MASK & KINDS:
        if (kind == _AUTO_CONTRAST) | (kind == _EQUALIZE):
            red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
            table = tables + image * 768
            red = tl.load(table + red).to(tl.int32)
            green = tl.load(table + 256 + green).to(tl.int32)
            blue = tl.load(table + 512 + blue).to(tl.int32)
            store_pixels(result, image, at, red, green, blue, pixels)
    if _COLOR_MASK & KINDS:
        if kind == _COLOR:
            factor = tl.load(factors + image)
            red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
            base = gray(red, green, blue).to(tl.float32)
            red, green, blue = _blend(red, base, factor), _blend(green, base, factor), _blend(blue, base, factor)
            store_pixels(result, image, at, red, green, blue, pixels)
    if _CONTRAST_MASK & KINDS:
        if kind == _CONTRAST:
            factor = tl.load(factors + image)
            red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
            base = tl.load(means + image).to(tl.float32)
            red, green, blue = _blend(red, base, factor), _blend(green, base, factor), _blend(blue, base, factor)
            store_pixels(result, image, at, red, green, blue, pixels)
    if _SHARPNESS_MASK & KINDS:
        if kind == _SHARPNESS:
            _sharpen(images, result, image, at, pixel, tl.load(factors + image), HEIGHT, WIDTH, PACKED)
    if _BLUR_MASK & KINDS:
        if kind == _BLUR:
            row = pixel // WIDTH
            red, green, blue = _three_boxes(
                blurred, image, pixel - row * WIDTH, row, blur + 3 * image, pixels, HEIGHT, WIDTH, True
            )  # fmt: skip
            store_pixels(result, image, at, red, green, blue, pixels)
    if _GEOMETRIC_MASK & KINDS:
        if kind >= _SHEAR_X:
            matrix = positions + 6 * image
            cubic = tl.load(bicubic + image) != 0
            if (kind == _SHEAR_X) | (kind == _TRANSLATE_X):
                if cubic:
                    _resample(images, result, image, at, pixel, matrix, 4, 1, FILL, HEIGHT, WIDTH, PACKED)
                else:
                    _resample(images, result, image, at, pixel, matrix, 2, 1, FILL, HEIGHT, WIDTH, PACKED)
            elif (kind == _SHEAR_Y) | (kind == _TRANSLATE_Y):
                if cubic:
                    _resample(images, result, image, at, pixel, matrix, 1, 4, FILL, HEIGHT, WIDTH, PACKED)
                else:
                    _resample(images, result, image, at, pixel, matrix, 1, 2, FILL, HEIGHT, WIDTH, PACKED)
            else:
                if cubic:
                    _resample(images, result, image, at, pixel, matrix, 4, 4, FILL, HEIGHT, WIDTH, PACKED)
                else:
                    _resample(images, result, image, at, pixel, matrix, 2, 2, FILL, HEIGHT, WIDTH, PACKED)


@triton.jit
def _sharpen(images, result, image, at, pixel, factor, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr):
    """Blend with the mean of a pixel (weight 5) and its 8 neighbours, as pil_ops.sharpness; the border is kept."""
    pixels: tl.constexpr = HEIGHT * WIDTH
    row, column = pixel // WIDTH, pixel % WIDTH
    red, green, blue = load_pixels(images, image, pixel, pixels, PACKED)
    # red and blue share a word: a sum is below 2^12, so none reaches the other
    both = 4 * (red | (blue << 16))
    greens = 4 * green
    for i in tl.static_range(3):
        line = tl.minimum(tl.maximum(row + (i - 1), 0), HEIGHT - 1) * WIDTH
        for j in tl.static_range(3):
            beside = tl.minimum(tl.maximum(column + (j - 1), 0), WIDTH - 1)
            near_red, near_green, near_blue = load_pixels(images, image, line + beside, pixels, PACKED)
            both += near_red | (near_blue << 16)
            greens += near_green
    inner = (row > 0) & (row < HEIGHT - 1) & (column > 0) & (column < WIDTH - 1)
    red = _blend(red, tl.where(inner, ((both & 65535) + 6) // 13, red).to(tl.float32), factor)
    green = _blend(green, tl.where(inner, (greens + 6) // 13, green).to(tl.float32), factor)
    blue = _blend(blue, tl.where(inner, ((both >> 16) + 6) // 13, blue).to(tl.float32), factor)
    store_pixels(result, image, at, red, green, blue, pixels)


@triton.jit
def _weight(along, TAP: tl.constexpr, TAPS: tl.constexpr):
    """Return the weight of one of 2 (linear) or 4 (cubic) neighbours, as pil_ops.weights; 1 of a single one."""
    back = 1.0 - along
    if TAPS == 1:
        weight = tl.full(along.shape, 1.0, tl.float32)
    elif TAPS == 2:
        weight = back if TAP == 0 else along
    else:
        outer = 0.0 - along * back
        inner = 1.0 - outer
        if TAP == 0:
            weight = outer * back
        elif TAP == 1:
            weight = inner * back
        elif TAP == 2:
            weight = inner * along
        else:
            weight = outer * along
    return weight


@triton.jit
def _place(position, SIZE: tl.constexpr):
    """Return the pixel before a position in fixed point, the part of the way to the next one, and if it is outside."""
    whole = (position >> _FRACTION).to(tl.int32)
    outside = (whole < 0) | (whole >= SIZE)
    before = position - _HALF
    part = ((before >> _REST) & 0x7FFFFFFF).to(tl.int32)
    return (before >> _FRACTION).to(tl.int32), part.to(tl.float32) * 4.656612873077393e-10, outside


@triton.jit
def _resample(
    images, result, image, at, pixel, matrix, ACROSS: tl.constexpr, DOWN: tl.constexpr, FILL: tl.constexpr,
    HEIGHT: tl.constexpr, WIDTH: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Take each pixel from the position that a matrix gives, with ACROSS x DOWN neighbours; 1: no move along that axis.

    An axis along which an operation does not move has whole positions, whose other neighbours have weight 0.
    """
    pixels: tl.constexpr = HEIGHT * WIDTH
    row, column = pixel // WIDTH, pixel % WIDTH
    x, y = column.to(tl.int64), row.to(tl.int64)
    left, along_x, outside_x = _place(tl.load(matrix) * x + tl.load(matrix + 1) * y + tl.load(matrix + 2), WIDTH)
    top, along_y, outside_y = _place(tl.load(matrix + 3) * x + tl.load(matrix + 4) * y + tl.load(matrix + 5), HEIGHT)
    reds = tl.zeros_like(along_x)
    greens = tl.zeros_like(along_x)
    blues = tl.zeros_like(along_x)
    for i in tl.static_range(DOWN):
        line = tl.minimum(tl.maximum(top + (i - (DOWN - 1) // 2), 0), HEIGHT - 1) * WIDTH
        red_line = tl.zeros_like(along_x)
        green_line = tl.zeros_like(along_x)
        blue_line = tl.zeros_like(along_x)
        for j in tl.static_range(ACROSS):
            beside = tl.minimum(tl.maximum(left + (j - (ACROSS - 1) // 2), 0), WIDTH - 1)
            red, green, blue = load_pixels(images, image, line + beside, pixels, PACKED)
            weight = _weight(along_x, j, ACROSS)
            red_line += red.to(tl.float32) * weight
            green_line += green.to(tl.float32) * weight
            blue_line += blue.to(tl.float32) * weight
        weight = _weight(along_y, i, DOWN)
        reds += red_line * weight
        greens += green_line * weight
        blues += blue_line * weight
    outside = outside_x | outside_y
    red = tl.where(outside, FILL & 255, to_byte(reds + _NUDGE))
    green = tl.where(outside, (FILL >> 8) & 255, to_byte(greens + _NUDGE))
    blue = tl.where(outside, FILL >> 16, to_byte(blues + _NUDGE))
    store_pixels(result, image, at, red, green, blue, pixels)
