"""Reading and writing pixels inside a kernel."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_pixels(images, image, at, PIXELS: tl.constexpr, PACKED: tl.constexpr):
    """Return red, green and blue, int32, of pixels `at` of an image with PIXELS of them.

    images: int32 with a byte each of red, green and blue if PACKED, else uint8, three a pixel.
    """
    first = images + image.to(tl.int64) * (PIXELS if PACKED else 3 * PIXELS)
    if PACKED:
        word = tl.load(first + at)
        red, green, blue = word & 255, (word >> 8) & 255, word >> 16
    else:
        red = tl.load(first + 3 * at).to(tl.int32)
        green = tl.load(first + 3 * at + 1).to(tl.int32)
        blue = tl.load(first + 3 * at + 2).to(tl.int32)
    return red, green, blue


@triton.jit
def store_pixels(words, image, at, red, green, blue, PIXELS: tl.constexpr):
    """Store red, green and blue, int32 from 0 to 255, as words; pixels after the last one are left out."""
    tl.store(words + image.to(tl.int64) * PIXELS + at, red | (green << 8) | (blue << 16), mask=at < PIXELS)


@triton.jit
def gray(red, green, blue):
    """Return the brightness as pil_ops.gray, in the same fixed point: int32."""
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) >> 16


@triton.jit
def to_byte(value):
    """Truncate float32 to int32 from 0 to 255."""
    return tl.minimum(tl.maximum(value, 0.0), 255.0).to(tl.int32)
