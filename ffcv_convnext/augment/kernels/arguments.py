"""A policy's draws in the form that the kernels read: integers and float32 only."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.randaugment import PolicyDraws, kind_numbers, kind_tables

FRACTION_BITS = 46  # of a position in 64-bit fixed point; the other 18 hold whole pixels and a sign
MAX_SIDE = 1 << 14  # of an image, pixels: positions stay below 2^17, an image's pixels below 2^31


class PolicyArguments(NamedTuple):
    """PolicyDraws on the device. Shapes depend on the number of images and of rounds only.

    kinds: (rounds, N) int32, of Kind.   bicubic: (rounds, N) int32, 1 or 0.
    positions: (rounds, N, 6) int64, see `fixed_positions`.   factors: (rounds, N) float32, of a blend.
    blur: (rounds, N, 3) int32, of a pixel, its neighbours at distance 1 and at 2, in 1 / 2^24.
    tables: (rounds, N, 256) uint8, the new value of each value.   Numbers of other kinds have no effect.
    """

    kinds: Tensor
    bicubic: Tensor
    positions: Tensor
    factors: Tensor
    blur: Tensor
    tables: Tensor


def policy_arrays(draws: PolicyDraws, height: int, width: int) -> list[NDArray[Any]]:
    """Return the fields of PolicyArguments on the host, for images of this height and width.

    Raises ValueError for a side above 2^14 pixels.
    """
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"images are {height} x {width}: the augmentation's kernels support sides up to {MAX_SIDE}")
    kinds, arguments = draws.kinds.T, draws.arguments.T
    numbers = kind_numbers(kinds, arguments, height, width)
    return [
        kinds.astype(np.int32),
        draws.bicubic.T.astype(np.int32),
        fixed_positions(numbers[..., :6]),
        numbers[..., 6].astype(np.float32),
        numbers[..., 7:].astype(np.int32),
        kind_tables(kinds, arguments),
    ]


def fixed_positions(matrices: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return (..., 6) int64 a, b, c, d, e, f: pixel (x, y) comes from (a x + b y + c, d x + e y + f) / 2^46.

    matrices: (..., 6) float64, see pil_ops.places, whose pixel centres are at halves; here c and f include that half.
    A sum of these integers is exact, so each number's own rounding is the only one: a position is off by at most
    (x + y + 1) 2^-47 pixels, 4e-12 at 512 x 512, which is less than float32 can tell in a weight. Numbers with at most
    46 bits after the point (a move by whole or half pixels, a quarter turn) are exact. A pixel whose position is that
    near to the image's border can take the colour outside in one kind of arithmetic and the border's in the other;
    of positions drawn from a continuous distribution fewer than one in 10^11 is.
    """
    a, b, c, d, e, f = np.moveaxis(matrices, -1, 0)
    scale = float(1 << FRACTION_BITS)
    found = np.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], -1)
    return np.rint(found * scale).astype(np.int64)
