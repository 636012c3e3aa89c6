"""A batch's draws in the form that the kernels read: integers and float32 only, in one transfer."""

from __future__ import annotations

from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.color import JitterDraws
from ffcv_convnext.augment.erasing import ErasingDraws
from ffcv_convnext.augment.mix import MixDraws
from ffcv_convnext.augment.randaugment import PolicyDraws, kind_numbers, kind_tables
from ffcv_convnext.augment.to_device import all_to_device

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


class DrawArguments(NamedTuple):
    """All draws of a batch of N images on the device; None: disabled. Boxes: top, bottom, left, right."""

    policy: PolicyArguments | None
    jitter: tuple[Tensor, ...] | None  # steps (N, 3) int32, factors (N, 3) float32
    erasing: tuple[Tensor, ...] | None  # boxes (N, R, 4) int32, colours (N, R, 3) float32; with noise also a key, int64
    mix: tuple[Tensor, ...] | None  # lam (N,) float32, boxes (N, 4) int32


def draw_arguments(
    policy: PolicyDraws | None,
    jitter: JitterDraws | None,
    erasing: ErasingDraws | None,
    mix: MixDraws | None,
    *,
    height: int,
    width: int,
    device: torch.device,
) -> DrawArguments:
    """Copy the draws for images of this height and width to the device, in one transfer without waiting.

    Raises ValueError for a side above 2^14 pixels.
    """
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"images are {height} x {width}: the augmentation's kernels support sides up to {MAX_SIDE}")
    groups: list[list[NDArray[Any]]] = [
        [] if policy is None else policy_arrays(policy, height, width),
        [] if jitter is None else [jitter.steps.astype(np.int32), jitter.factors],
        [] if erasing is None else [erasing.boxes.astype(np.int32), erasing.colours],
        [] if mix is None else [mix.lam, mix.boxes.astype(np.int32)],
    ]
    if erasing is not None and erasing.key is not None:
        groups[2].append(np.array([erasing.key], np.int64))
    tensors = iter(all_to_device([array for group in groups for array in group], device))
    first, *rest = (tuple(islice(tensors, len(group))) for group in groups)
    return DrawArguments(PolicyArguments(*first) if first else None, *(group or None for group in rest))


def policy_arrays(draws: PolicyDraws, height: int, width: int) -> list[NDArray[Any]]:
    """Return the fields of PolicyArguments on the host, for images of this height and width."""
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
    (x + y + 1) 2^-47 pixels, below 4e-12 at 256 x 256, which float32 cannot tell in a weight. Numbers with at most
    46 bits after the point (a move by whole or half pixels, a quarter turn) are exact. A pixel whose position is that
    near to the image's border can take the colour outside in one kind of arithmetic and the border's in the other;
    of positions drawn from a continuous distribution fewer than one in 10^11 is.
    """
    a, b, c, d, e, f = np.moveaxis(matrices, -1, 0)
    scale = float(1 << FRACTION_BITS)
    found = np.stack([a, b, c + (a + b) / 2, d, e, f + (d + e) / 2], -1)
    return np.rint(found * scale).astype(np.int64)
