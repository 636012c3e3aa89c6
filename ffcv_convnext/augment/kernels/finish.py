"""What follows a policy, in one pass over the batch: jitter, normalise, erase, mix, round to the inputs' data type.

A program computes the same values of an image and of its mixing partner, the one at the mirror position in the batch,
so each image is read once and its noise computed once. A lane holds one value, not one pixel: the inputs, the largest
tensor here, are then written in whole vectors. Branches on boxes that a program's rows do not meet cost a few loads.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ffcv_convnext.augment.color import LUMA, Normalisation
from ffcv_convnext.augment.kernels.arguments import DrawArguments
from ffcv_convnext.augment.kernels.launch import launch
from ffcv_convnext.augment.kernels.noise import normal, short_words
from ffcv_convnext.augment.kernels.pixels import load_pixels

_BLOCK = 1024  # values at a time, or pixels where a mean is computed, or classes
_PART = 4096  # pixels of a program that computes a part of a mean

_RED, _GREEN, _BLUE = (tl.constexpr(weight) for weight in LUMA)


def finish(images: Tensor, out: Tensor, arguments: DrawArguments, by: Normalisation) -> None:
    """Jitter, normalise, erase and mix, each if its draws are given; one launch, or two with jitter.

    images: (N, H, W, 3) uint8, or (N, H, W) int32 with a byte each of red, green and blue; not modified.
    out: (N, H, W, 3) float32, bfloat16 or float16, overwritten: the values are computed in float32 and rounded once.
    """
    num, height, width, _ = out.shape
    packed = images.ndim == 3
    steps = factors = means = boxes = colours = key = lam = cuts = None
    parts = triton.cdiv(height * width, _PART)
    if arguments.jitter is not None:
        steps, factors = arguments.jitter
        means = factors.new_empty((num, parts))
        launch(
            _jitter_means, num * parts, out, images, steps, factors, means,
            PIXELS=height * width, PACKED=packed, BLOCK=_BLOCK, PART=_PART,
        )  # fmt: skip
    if arguments.erasing is not None:
        boxes, colours, *rest = arguments.erasing
        key = rest[0] if rest else None
    if arguments.mix is not None:
        lam, cuts = arguments.mix
    rows = num if lam is None else (num + 1) // 2
    launch(
        _finish, rows * triton.cdiv(3 * height * width, _BLOCK), out,
        images, steps, factors, means, boxes, colours, key, lam, cuts, out, num, *by.constants.flatten().tolist(),
        HEIGHT=height, WIDTH=width, PARTS=parts, BOXES=0 if boxes is None else boxes.shape[1],
        PACKED=packed, BLOCK=_BLOCK,
    )  # fmt: skip


def write_targets(labels: Tensor, out: Tensor, mix: tuple[Tensor, ...] | None, smoothing: float) -> None:
    """Compute pipeline.soft_targets and mix.mix_targets of them; one launch.

    labels: (N,) int64, below the number of classes K.   out: (N, K) float32, overwritten.
    """
    num, classes = out.shape
    off = smoothing / classes
    launch(
        _targets, num, out, labels, None if mix is None else mix[0], out, num, 1 - smoothing + off, off,
        CLASSES=classes, BLOCK=min(_BLOCK, triton.next_power_of_2(classes)),
    )  # fmt: skip


@triton.jit
def _lerp(start, end, weight):
    """Interpolate as torch.lerp does."""
    return tl.where(weight < 0.5, start + weight * (end - start), end - (end - start) * (1.0 - weight))


@triton.jit
def _gray(red, green, blue):
    return red * _RED + green * _GREEN + blue * _BLUE


@triton.jit
def _jitter(red, green, blue, step, factor, mean):
    """Apply one step of color.color_jitter: 0 brightness, 1 contrast, 2 saturation. Values: float32."""
    base = tl.where(step == 2, _gray(red, green, blue), tl.where(step == 1, mean, 0.0))
    red = tl.minimum(tl.maximum(_lerp(base, red, factor), 0.0), 255.0)
    green = tl.minimum(tl.maximum(_lerp(base, green, factor), 0.0), 255.0)
    blue = tl.minimum(tl.maximum(_lerp(base, blue, factor), 0.0), 255.0)
    return red, green, blue


@triton.jit
def _jitter_means(
    images,
    steps,  # (N, 3) int32, in the image's own order
    factors,  # (N, 3) float32
    means,  # (N, parts) float32: sums of gray, after the steps before contrast
    PIXELS: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    PART: tl.constexpr,
):
    parts: tl.constexpr = (PIXELS + PART - 1) // PART
    image = tl.program_id(0) // parts
    part = tl.program_id(0) % parts
    first_step, second_step = tl.load(steps + 3 * image), tl.load(steps + 3 * image + 1)
    # contrast and the steps after it are left out: factor 1 changes nothing
    first_factor = tl.where(first_step == 1, 1.0, tl.load(factors + 3 * image))
    second_factor = tl.where((first_step == 1) | (second_step == 1), 1.0, tl.load(factors + 3 * image + 1))
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(part * PART, tl.minimum(part * PART + PART, PIXELS), BLOCK):
        at = first + tl.arange(0, BLOCK)
        red, green, blue = load_pixels(images, image, tl.minimum(at, PIXELS - 1), PIXELS, PACKED)
        red, green, blue = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
        red, green, blue = _jitter(red, green, blue, first_step, first_factor, 0.0)
        red, green, blue = _jitter(red, green, blue, second_step, second_factor, 0.0)
        total += tl.where(at < PIXELS, _gray(red, green, blue), 0.0)
    tl.store(means + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def _inside(box, row, column):
    """Return the lanes in a box, four int32: top, bottom, left, right."""
    return (row >= tl.load(box)) & (row < tl.load(box + 1)) & (column >= tl.load(box + 2)) & (column < tl.load(box + 3))


@triton.jit
def _values(
    images, steps, factors, means, boxes, colours, key, image, first_row, last_row, at, pixel, channel, row, column,
    scale, shift, PIXELS: tl.constexpr, PARTS: tl.constexpr, BOXES: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Return an image's values at `at`, jittered, normalised and erased: float32."""
    if steps is not None:
        red, green, blue = load_pixels(images, image, pixel, PIXELS, PACKED)
        red, green, blue = red.to(tl.float32), green.to(tl.float32), blue.to(tl.float32)
        mean = tl.sum(_parts_of_mean(means + image * PARTS, PARTS), 0) / PIXELS
        for i in tl.static_range(3):
            step, factor = tl.load(steps + 3 * image + i), tl.load(factors + 3 * image + i)
            red, green, blue = _jitter(red, green, blue, step, factor, mean)
        value = tl.where(channel == 0, red, tl.where(channel == 1, green, blue))
    elif PACKED:
        word = tl.load(images + image.to(tl.int64) * PIXELS + pixel)
        value = ((word >> (8 * channel)) & 255).to(tl.float32)
    else:
        value = tl.load(images + image.to(tl.int64) * (3 * PIXELS) + at).to(tl.float32)
    value = value * scale + shift
    if key is not None:
        met = first_row < 0
        erased = row < 0
        for i in range(BOXES):
            box = boxes + (image * BOXES + i) * 4
            met |= (tl.load(box) <= last_row) & (tl.load(box + 1) > first_row)
            erased |= _inside(box, row, column)
        if met:
            sample = (image.to(tl.int64) * PIXELS + pixel).to(tl.uint32)
            both, last = short_words(tl.load(key), sample)
            value = tl.where(erased, normal(tl.where(channel == 2, last, both), channel == 1), value)
    elif boxes is not None:
        for i in range(BOXES):
            box = boxes + (image * BOXES + i) * 4
            if (tl.load(box) <= last_row) & (tl.load(box + 1) > first_row):
                colour = tl.load(colours + (image * BOXES + i) * 3 + channel)
                value = tl.where(_inside(box, row, column), colour, value)
    return value


@triton.jit
def _parts_of_mean(means, PARTS: tl.constexpr):
    size: tl.constexpr = triton.next_power_of_2(PARTS)
    return tl.load(means + tl.arange(0, size), mask=tl.arange(0, size) < PARTS, other=0.0)


@triton.jit
def _mixed(own, partner, lam, box, row, column):
    """Blend with the partner, or paste the partner's box: mix.mix_batched."""
    cut = (tl.load(box + 1) > tl.load(box)) & (tl.load(box + 3) > tl.load(box + 2))
    weight = tl.where(cut, 1.0, tl.load(lam))
    return tl.where(_inside(box, row, column), partner, _lerp(partner, own, weight))


@triton.jit(do_not_specialize=["num"])
def _finish(
    images,  # packed or not
    steps,  # (N, 3) int32, or None without jitter
    factors,
    means,
    boxes,  # (N, BOXES, 4) int32, or None
    colours,  # (N, BOXES, 3) float32
    key,  # one int64; None: boxes have colours
    lam,  # (N,) float32; None: no mixing
    cuts,  # (N, 4) int32
    out,  # (N, H, W, 3)
    num,
    red_scale,
    green_scale,
    blue_scale,
    red_shift,
    green_shift,
    blue_shift,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    BOXES: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pixels: tl.constexpr = HEIGHT * WIDTH
    blocks: tl.constexpr = (3 * pixels + BLOCK - 1) // BLOCK
    image = tl.program_id(0) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    lane = first + tl.arange(0, BLOCK)
    known = lane < 3 * pixels
    at = tl.minimum(lane, 3 * pixels - 1)
    pixel = at // 3
    channel = at % 3
    row, column = pixel // WIDTH, pixel % WIDTH
    first_row, last_row = first // (3 * WIDTH), (first + BLOCK - 1) // (3 * WIDTH)
    scale = tl.where(channel == 0, red_scale, tl.where(channel == 1, green_scale, blue_scale))
    shift = tl.where(channel == 0, red_shift, tl.where(channel == 1, green_shift, blue_shift))
    value = _values(
        images, steps, factors, means, boxes, colours, key, image, first_row, last_row, at, pixel, channel, row, column,
        scale, shift, pixels, PARTS, BOXES, PACKED,
    )  # fmt: skip
    if lam is not None:
        partner = num - 1 - image
        other = _values(
            images, steps, factors, means, boxes, colours, key, partner, first_row, last_row, at, pixel, channel, row,
            column, scale, shift, pixels, PARTS, BOXES, PACKED,
        )  # fmt: skip
        mixed = _mixed(other, value, lam + partner, cuts + 4 * partner, row, column)
        tl.store(out + partner.to(tl.int64) * (3 * pixels) + lane, mixed.to(out.dtype.element_ty), mask=known)
        value = _mixed(value, other, lam + image, cuts + 4 * image, row, column)
    tl.store(out + image.to(tl.int64) * (3 * pixels) + lane, value.to(out.dtype.element_ty), mask=known)


@triton.jit(do_not_specialize=["num"])
def _targets(
    labels,  # (N,) int64
    lam,  # (N,) float32, or None
    out,  # (N, CLASSES) float32
    num,
    on,
    off,
    CLASSES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(0)
    label = tl.load(labels + image)
    for first in range(0, CLASSES, BLOCK):
        number = first + tl.arange(0, BLOCK)
        value = tl.where(number == label, on, off)
        if lam is not None:
            partner = tl.where(number == tl.load(labels + num - 1 - image), on, off)
            value = _lerp(partner, value, tl.load(lam + image))
        tl.store(out + image.to(tl.int64) * CLASSES + number, value, mask=number < CLASSES)
