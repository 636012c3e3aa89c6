"""PIL's image operations on batches of 8-bit pixels, to the last bit where integers allow it.

pixels: (n, H, W, 3) uint8, contiguous. Everything stays on its device; nothing waits for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

_LUMA_16 = (19595, 38470, 7471)  # ITU-R 601 in 16-bit fixed point: how PIL makes an image gray


def lookup(pixels: Tensor, tables: Tensor) -> Tensor:
    """Each value replaced by its entry. tables: (n, 1 or 3, 256) uint8, for an image or each of its channels."""
    num, channels, _ = tables.shape
    entries = _entries(num, channels, pixels)
    return tables.reshape(-1).index_select(0, entries.view(-1)).view(pixels.shape)


def _entries(num: int, channels: int, pixels: Tensor) -> Tensor:
    """(n, H, 3 W) int32: where each value's entry stands in tables (n, channels, 256)."""
    first = torch.arange(num * channels, dtype=torch.int32, device=pixels.device).mul_(256).view(num, 1, channels)
    values = pixels.flatten(2).int()
    return values.add_(first.repeat(1, 1, values.shape[2] // channels))  # three at the end would be a slow broadcast


def histogram(pixels: Tensor) -> Tensor:
    """(n, 3, 256) int64: how often each value occurs in a channel."""
    num = len(pixels)
    entries = _entries(num, 3, pixels).view(-1).long()
    counts = torch.zeros(num * 3 * 256, dtype=torch.int64, device=pixels.device)
    return counts.scatter_add_(0, entries, torch.ones_like(entries)).view(num, 3, 256)


def autocontrast_tables(counts: Tensor) -> Tensor:
    """(n, 3, 256) uint8: the least value that occurs in a channel becomes 0, the largest 255."""
    values = torch.arange(256, device=counts.device)
    low = torch.where(counts > 0, values, 255).amin(-1, keepdim=True).double()
    high = torch.where(counts > 0, values, 0).amax(-1, keepdim=True).double()
    scale = torch.full_like(low, 255.0) / (high - low)  # infinite where a channel has one value, which then keeps it
    stretched = torch.where(high > low, values * scale + -low * scale, values.double())
    return stretched.clamp(0, 255).to(torch.uint8)


def equalize_tables(counts: Tensor) -> Tensor:
    """(n, 3, 256) uint8: tables that give each channel a flat histogram."""
    values = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, values, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    below = counts.cumsum(-1) - counts
    flat = (step // 2 + below) // step.clamp(min=1)
    return torch.where(step > 0, flat, values).clamp(0, 255).to(torch.uint8)


def gray(pixels: Tensor) -> Tensor:
    """(n, H, W) int32 brightness, rounded to 0..255."""
    return luma(*pixels.unbind(-1))


def luma(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Brightness, int32, rounded to 0..255."""
    weighted = [channel.int() * weight for weight, channel in zip(_LUMA_16, (red, green, blue), strict=True)]
    return weighted[0].add_(weighted[1]).add_(weighted[2]).add_(1 << 15) >> 16


def rounded_mean(levels: Tensor) -> Tensor:
    """(n,) float32: the mean of each image, (n, H, W) int32, rounded."""
    mean = levels.sum((1, 2)).double() / (levels.shape[1] * levels.shape[2])
    return (mean + 0.5).floor().float()


def smooth(pixels: Tensor) -> Tensor:
    """(n, H, W, 3) uint8: the mean of a pixel, weight 5, and its eight neighbours, weight 1; the border stays."""
    wide = pixels.short()
    columns = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = columns[:, :, :-2] + columns[:, :, 1:-1] + columns[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    result = pixels.clone()
    result[:, 1:-1, 1:-1] = (2 * total + 13) // 26  # total / 13, rounded: it is never halfway
    return result


def blend(base: Tensor, values: Tensor, factors: Tensor) -> Tensor:
    """base + factor (values - base), cut off towards 0 as PIL does: uint8 of the values' shape, n first.

    base: of that shape, or (n,), one level an image.   factors: (n,) float32, 1: the values as they are.
    """
    shape = (-1, *(1,) * (values.ndim - 1))
    base = base.float() if base.ndim > 1 else base.view(shape)
    mixed = values.float().sub_(base).mul_(factors.view(shape)).add_(base)
    return mixed.clamp_(0, 255).int().to(torch.uint8)


def blend_gray(pixels: Tensor, factors: Tensor) -> Tensor:
    """blend with the image's own gray."""
    base = gray(pixels).float()
    return torch.stack([blend(base, channel, factors) for channel in pixels.unbind(-1)], -1)


def gaussian_blur(pixels: Tensor, weights: Tensor) -> Tensor:
    """Three box filters along rows, then three along columns, each rounded to 8 bits: PIL's Gaussian.

    weights: (n, 3) int64, of a pixel, its neighbours and theirs, in 1 / 2^24.
    """
    middle, near, far = weights.int()[:, :, None, None, None].unbind(1)
    for axis in (2, 2, 2, 1, 1, 1):
        size = pixels.shape[axis]
        first, last = pixels.narrow(axis, 0, 1), pixels.narrow(axis, size - 1, 1)
        wide = torch.cat([first, first, pixels, last, last], axis).int()
        at = [wide.narrow(axis, i, size) for i in range(5)]
        total = (at[1] + at[3]).mul_(near).add_((at[0] + at[4]).mul_(far)).add_(at[2] * middle)
        pixels = (total.add_(1 << 23) >> 24).to(torch.uint8)  # wraps around below 2^32; so does the cast
    return pixels


def shift_rows(pixels: Tensor, shifts: Tensor, fill: Tensor, *, bicubic: bool) -> Tensor:
    """Row i moved left by shifts[:, i] pixels. shifts: (n, H) float64.   fill: (3,) uint8, colour of outside."""
    return _unpack(_shift_rows(_pack(pixels), shifts, _pack(fill), bicubic=bicubic))


def shift_columns(pixels: Tensor, shifts: Tensor, fill: Tensor, *, bicubic: bool) -> Tensor:
    """Column j moved up by shifts[:, j] pixels. shifts: (n, W) float64."""
    columns = _pack(pixels).transpose(1, 2).contiguous()
    return _unpack(_shift_rows(columns, shifts, _pack(fill), bicubic=bicubic).transpose(1, 2).contiguous())


class Places(NamedTuple):
    """Where output pixels come from, (n, H, W) each: between columns left and left + 1, rows top and top + 1."""

    left: Tensor  # int32
    top: Tensor
    along_x: Tensor  # float32 in [0, 1), from left towards left + 1
    along_y: Tensor
    inside: Tensor  # bool: in the image


def places(matrices: Tensor, height: int, width: int) -> Places:
    """Output pixel (x, y) comes from (a x + b y + c, d x + e y + f); pixel centres are at halves.

    matrices: (n, 6) float64, a to f.
    """
    ys = torch.arange(height, dtype=torch.float64, device=matrices.device)[:, None] + 0.5
    xs = torch.arange(width, dtype=torch.float64, device=matrices.device) + 0.5
    a, b, c, d, e, f = matrices[:, :, None, None].unbind(1)
    x, y = a * xs + b * ys + c, d * xs + e * ys + f
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    x, y = x - 0.5, y - 0.5
    left, top = x.floor(), y.floor()
    return Places(left.int(), top.int(), (x - left).float(), (y - top).float(), inside)


def affine(pixels: Tensor, matrices: Tensor, fill: Tensor, *, bicubic: bool) -> Tensor:
    """Each pixel taken from where a matrix says (see places). fill: (3,) uint8, where that lies outside the image.

    matrices: (n, 6) float64.
    """
    num, height, width, _ = pixels.shape
    place = places(matrices, height, width)
    taps = range(-1, 3) if bicubic else range(2)
    columns = [(place.left + tap).clamp_(0, width - 1) for tap in taps]
    first = torch.arange(num, dtype=torch.int32, device=pixels.device).mul_(height * width)[:, None, None]
    packed = _pack(pixels).view(-1)
    rows = []
    for tap in taps:
        start = (place.top + tap).clamp_(0, height - 1).mul_(width).add_(first)
        fetched = (packed.index_select(0, (start + column).view(-1)).view(place.inside.shape) for column in columns)
        rows.append(interpolate([_planes(each) for each in fetched], place.along_x))
    return _unpack(torch.where(place.inside, _from_planes(interpolate(rows, place.along_y)), _pack(fill)))


def _shift_rows(packed: Tensor, shifts: Tensor, fill: Tensor, *, bicubic: bool) -> Tensor:
    """packed: (n, H, W) int32.   shifts: (n, H)."""
    width = packed.shape[2]
    columns = torch.arange(width, device=packed.device)
    whole = shifts.floor()
    along = (shifts - whole).float()[..., None]
    source = columns + whole.long()[..., None]
    taps = range(-1, 3) if bicubic else range(2)
    values = [_planes(packed.gather(2, (source + tap).clamp_(0, width - 1))) for tap in taps]
    position = columns + 0.5 + shifts[..., None]
    inside = (position >= 0) & (position < width)
    return torch.where(inside, _from_planes(interpolate(values, along)), fill)


def interpolate(values: Sequence[Tensor], along: Tensor) -> Tensor:
    """Linear between two, cubic (Keys 1981, a = -1) between four, in the form that leaves equal values exact.

    values: (..., n, H, W) float32 each.   along: (n, H, W or 1), in [0, 1).
    """
    if len(values) == 2:
        first, second = values
        return (second - first).mul_(along).add_(first)
    before, first, second, after = values
    step, ahead = first - before, second - after
    cubic = (step - ahead).mul_(along)
    cubic.add_(ahead).sub_(step, alpha=2).mul_(along)
    return cubic.add_(second - before).mul_(along).add_(first)


def _pack(pixels: Tensor) -> Tensor:
    """(..., 3) uint8 -> (...) int32: a pixel is fetched as one word."""
    return F.pad(pixels, (0, 1)).view(torch.int32).squeeze(-1)


def _unpack(packed: Tensor) -> Tensor:
    return packed[..., None].view(torch.uint8)[..., :3]


def _planes(packed: Tensor) -> Tensor:
    """(n, H, W) int32 -> (3, n, H, W) float32."""
    return torch.stack([(packed & 255).float(), (packed >> 8 & 255).float(), (packed >> 16).float()])


def _from_planes(planes: Tensor) -> Tensor:
    red, green, blue = planes.clamp_(0, 255).int().unbind(0)
    return red | green << 8 | blue << 16
