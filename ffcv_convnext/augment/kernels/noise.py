"""Normal noise inside a kernel: the words of rng.short_words, and erasing.noise of them without a slow path."""

from __future__ import annotations

import math

import triton
import triton.language as tl

_TURN = tl.constexpr(2 * math.pi / 65536)
_LN2 = tl.constexpr(math.log(2))


@triton.jit
def short_words(key, sample):
    """Return two random words, uint32: Philox 2x32-10 as in rng.short_words. key: int64.   sample: uint32."""
    c0 = tl.zeros_like(sample) + (key >> 32).to(tl.uint32)
    c1 = sample
    k = key.to(tl.uint32)
    for i in tl.static_range(10):
        factor = tl.full(sample.shape, 0xD256D193, tl.uint32)
        high, low = tl.umulhi(c0, factor), c0 * factor
        c0 = high ^ c1 ^ k
        c1 = low
        if i < 9:
            k = _next_key(k)
    return c0, c1


@triton.jit
def _next_key(k):
    """Add Philox's constant, in 32 bits that wrap around."""
    return (k.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)


@triton.jit
def normal(words, sine):
    """Return radius times cosine, or sine where that is asked for, of the point that a word stands for: float32.

    words: uint32, radius in the upper half, angle in the lower one. Both are found from integers: the logarithm as
    twice the inverse hyperbolic tangent, five terms of its series in |t| < 0.172; the cosine from at most an eighth of
    a turn, five terms. Radius and cosine are within 3e-7 of the exact ones, relative to the larger of them and 1.
    """
    odd = (words >> 16).to(tl.int32) * 2 + 1  # in 2^-17; exact in float32
    bits = odd.to(tl.float32).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23  # so that the rest is between 1 / sqrt(2) and sqrt(2)
    rest = (bits - (exponent << 23)).to(tl.float32, bitcast=True)
    t = (rest - 1.0) / (rest + 1.0)
    square = t * t
    series = (((square * (1.0 / 9) + 1.0 / 7) * square + 1.0 / 5) * square + 1.0 / 3) * square * t + t
    radius = tl.sqrt(-2.0 * ((exponent - 17).to(tl.float32) * _LN2 + 2.0 * series))
    steps = (words & 65535).to(tl.int32) - tl.where(sine, 16384, 0)  # sin x = cos(x - a quarter)
    quarter = (steps + 8192) >> 14
    angle = (steps - (quarter << 14)).to(tl.float32) * _TURN
    square = angle * angle
    sin = (((square * (1.0 / 362880) - 1.0 / 5040) * square + 1.0 / 120) * square - 1.0 / 6) * square * angle + angle
    cos = (((square * (1.0 / 40320) - 1.0 / 720) * square + 1.0 / 24) * square - 0.5) * square + 1.0
    value = tl.where((quarter & 1) == 0, cos, sin)
    negative = ((quarter + 1) & 2) != 0  # cos, -sin, -cos, sin
    return radius * tl.where(negative, -value, value)
