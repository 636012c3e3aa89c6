"""A policy as one graph of fixed shape: every image goes through every operation, most of them with no effect.

This suits a GPU with `torch.compile`: a pass over the pixels is cheap, a launch is not, and the work must not depend on
the draws, or each batch would be compiled again. A round is one resampling, one table per channel and one blend, all
in one kernel, after the statistics they need.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ffcv_convnext.augment import pil_ops as pil
from ffcv_convnext.augment.color import Colour
from ffcv_convnext.augment.randaugment import (
    BLENDS,
    OPERATIONS,
    TABLES,
    WIDE_OPERATIONS,
    Interpolation,
    Kind,
    PolicyDraws,
    check_images,
    kind_numbers,
    kind_tables,
)
from ffcv_convnext.augment.to_device import all_to_device
from ffcv_convnext.policy_grammar import Policy

_GEOMETRIC = {Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y, Kind.ROTATE}


class PolicyTensors(NamedTuple):
    """PolicyDraws on the device. Shapes depend on the number of images and of rounds only.

    kinds: (rounds, N) int32, of Kind.   bicubic: (rounds, N) bool.
    numbers: (rounds, N, 10) float64: six of a matrix from output to input, a blend's factor, three weights of a blur.
    tables: (rounds, N, 256) uint8, the new value of each value.   Each has no effect if its operation is not drawn.
    """

    kinds: Tensor
    bicubic: Tensor
    numbers: Tensor
    tables: Tensor


def policy_tensors(draws: PolicyDraws, height: int, width: int, device: torch.device) -> PolicyTensors:
    """Copy the draws for images of this height and width to the device, in one transfer without waiting."""
    kinds, arguments = draws.kinds.T, draws.arguments.T
    arrays = [
        kinds.astype(np.int32),
        draws.bicubic.T,
        kind_numbers(kinds, arguments, height, width),
        kind_tables(kinds, arguments),
    ]
    return PolicyTensors(*all_to_device(arrays, device))


def policy_kinds(policy: Policy) -> frozenset[Kind]:
    """Return the kinds of operation that a policy can draw."""
    operations = WIDE_OPERATIONS if policy.wide else OPERATIONS
    return frozenset(operations[step.name][0] for steps in policy.sequences for step in steps if step.prob > 0)


def apply_policy_batched(
    images: Tensor, tensors: PolicyTensors, kinds: frozenset[Kind], interpolation: Interpolation, fill: Colour
) -> Tensor:
    """Compute the result of randaugment.apply_policy without branches that depend on the draws.

    images: (N, 3, H, W) uint8, channels_last, not modified.   tensors: of N images, made for their height and width.
    kinds: those that the policy can draw (policy_kinds); others are not in the graph.   interpolation: as in the draws.
    fill: the colour outside of an image.
    Returns a new tensor like images. Raises ValueError for other images. Under `torch.compile` a product may be
    fused with a sum, without its rounding; a value next to a whole number can then differ by 1.
    """
    check_images(images, tensors.kinds.shape[1])
    packed = _from_channels([channel.int() for channel in images.unbind(1)])
    for kind, bicubic, numbers, tables in zip(*(each.unbind(0) for each in tensors), strict=True):
        packed = _round(packed, kind, bicubic, numbers, tables, kinds, interpolation, fill)
    return _pixels(packed).permute(0, 3, 1, 2)


def _round(
    packed: Tensor,
    kind: Tensor,
    bicubic: Tensor,
    numbers: Tensor,
    tables: Tensor,
    kinds: frozenset[Kind],
    interpolation: Interpolation,
    fill: Colour,
) -> Tensor:
    """Apply one round. packed: (N, H, W) int32.   kind, bicubic: (N,).   numbers: (N, 10).   tables: (N, 256)."""
    if Kind.GAUSSIAN_BLUR in kinds:
        blurred = pil.gaussian_blur(_pixels(packed), numbers[:, 7:].long())
        packed = _from_channels([channel.int() for channel in blurred.unbind(-1)])
    values = _channels(packed)
    if kinds & {Kind.AUTO_CONTRAST, Kind.EQUALIZE}:
        tables = _with_histogram_tables(tables, values, kind)
    else:
        tables = tables[:, None].expand(-1, 3, -1)
    base = _base(packed, values, kind, kinds)
    if kinds & _GEOMETRIC:
        values = _resampled(packed, numbers[:, :6], bicubic, interpolation, fill)
    if kinds & (TABLES | {Kind.AUTO_CONTRAST, Kind.EQUALIZE}):
        first = torch.arange(len(packed), device=packed.device)[:, None, None] * 768
        entries = tables.reshape(-1)
        values = [entries[value + (first + 256 * i)].int() for i, value in enumerate(values)]
    if kinds & BLENDS:
        factor = numbers[:, 6].float()[:, None, None]
        values = [
            ((value.float() - start) * factor + start).clamp(0, 255).int()
            for value, start in zip(values, base, strict=True)
        ]
    return _from_channels(values)


def _with_histogram_tables(tables: Tensor, values: list[Tensor], kind: Tensor) -> Tensor:
    """Return the tables (N, 3, 256) uint8, computed from the channel's histogram for the operations that need it."""
    first = torch.arange(len(kind), device=kind.device)[:, None, None] * 256
    none = torch.zeros(len(kind) * 256, dtype=torch.int32, device=kind.device)
    entries = [(value + first).view(-1) for value in values]
    ones = torch.ones_like(entries[0], dtype=torch.int32)
    counts = torch.stack([none.scatter_add(0, each, ones).view(-1, 256) for each in entries], 1)
    kind = kind[:, None, None]
    found = torch.where(kind == int(Kind.EQUALIZE), pil.equalize_tables(counts), tables[:, None])
    every = torch.arange(256, device=kind.device)
    low = torch.where(counts > 0, every, 255).amin(-1, keepdim=True)
    high = torch.where(counts > 0, every, 0).amax(-1, keepdim=True)
    return torch.where(kind == int(Kind.AUTO_CONTRAST), pil.autocontrast_tables(low, high), found)


def _base(packed: Tensor, values: list[Tensor], kind: Tensor, kinds: frozenset[Kind]) -> list[Tensor]:
    """Return each channel's base (N, H, W) float32 of the blend that an image drew, or 0 without one."""
    kind = kind[:, None, None]
    base = [torch.zeros_like(packed, dtype=torch.float32)] * 3
    if kinds & {Kind.COLOR, Kind.CONTRAST}:
        gray = pil.gray(*(value.float() for value in values))
        mean = pil.rounded_mean(gray).float()[:, None, None]
        level = torch.where(kind == int(Kind.COLOR), gray, torch.where(kind == int(Kind.CONTRAST), mean, 0.0))
        base = [level] * 3
    if Kind.SHARPNESS in kinds:
        sharpened = kind == int(Kind.SHARPNESS)
        base = [torch.where(sharpened, _smooth(value), start) for value, start in zip(values, base, strict=True)]
    return base


def _resampled(
    packed: Tensor, matrices: Tensor, bicubic: Tensor, interpolation: Interpolation, fill: Colour
) -> list[Tensor]:
    """Return the channels, (N, H, W) int32 each, of images resampled at the positions that a matrix gives."""
    num, height, width = packed.shape
    place = pil.places(matrices, height, width)
    shares_x = _weights(place.along_x, bicubic, interpolation)
    flat = packed.view(-1)
    first = torch.arange(num, device=packed.device)[:, None, None] * (height * width)
    begin = 0 if interpolation == "bilinear" else -1
    totals = [torch.zeros_like(place.along_x)] * 3
    for i, share_y in enumerate(_weights(place.along_y, bicubic, interpolation), begin):
        start = first + (place.top + i).clamp(0, height - 1) * width
        lines = [torch.zeros_like(place.along_x)] * 3
        for j, share_x in enumerate(shares_x, begin):
            fetched = _channels(flat[start + (place.left + j).clamp(0, width - 1)])
            lines = [line + value.float() * share_x for line, value in zip(lines, fetched, strict=True)]
        totals = [total + line * share_y for total, line in zip(totals, lines, strict=True)]
    return [
        torch.where(place.outside < 0, colour, (total + pil.NUDGE).clamp(0, 255).int())
        for total, colour in zip(totals, fill, strict=True)
    ]


def _weights(along: Tensor, bicubic: Tensor, interpolation: Interpolation) -> list[Tensor]:
    """Return pil_ops.weights of each image's interpolation."""
    found = pil.weights(along, bicubic=interpolation != "bilinear")
    if interpolation != "random":
        return list(found)
    none = torch.zeros_like(along)
    linear = (none, *pil.weights(along, bicubic=False), none)
    return [torch.where(bicubic[:, None, None], *pair) for pair in zip(found, linear, strict=True)]


def _smooth(values: Tensor) -> Tensor:
    """Return the smoothed values that pil_ops.sharpness blends with: (N, H, W) int32 -> float32."""
    height, width = values.shape[1:]
    wide = F.pad(values, (1, 1, 1, 1))
    neighbours = [wide[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    total = sum(neighbours[1:], neighbours[0]) + 4 * values
    ys, xs = torch.arange(height, device=values.device)[:, None], torch.arange(width, device=values.device)
    inner = (ys > 0) & (ys < height - 1) & (xs > 0) & (xs < width - 1)
    return torch.where(inner, pil.thirteenth(total), values.float())


def _channels(packed: Tensor) -> list[Tensor]:
    """Unpack (N, H, W) int32 with a byte each of red, green and blue to int32 each."""
    return [packed & 255, packed >> 8 & 255, packed >> 16]


def _from_channels(channels: list[Tensor]) -> Tensor:
    red, green, blue = channels
    return red | green << 8 | blue << 16


def _pixels(packed: Tensor) -> Tensor:
    """Unpack to (N, H, W, 3) uint8."""
    shifts = torch.arange(0, 24, 8, dtype=torch.int32, device=packed.device)
    return (packed[..., None] >> shifts & 255).to(torch.uint8)
