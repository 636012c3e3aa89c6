"""PIL's image operations, equal to the last bit where integer arithmetic allows it.

pixels: (H, W, 3) uint8, contiguous, not modified; each operation returns a new tensor of the same kind. On a CPU a pass
over bytes costs a tenth of one that gathers or interleaves, so values are computed, not looked up, where that is exact.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_LUMA = (19595 / 65536, 38470 / 65536, 7471 / 65536)  # ITU-R 601 in 16-bit fixed point: as in PIL
NUDGE = 2.0**-12  # added before truncation, so that rounding errors do not turn a whole number into the one below

Fill = tuple[int, int, int]
Floats = NDArray[np.float64]
_T = TypeVar("_T", Tensor, Floats)


def invert(pixels: Tensor) -> Tensor:
    """Invert all values."""
    return pixels.bitwise_not()


def posterize(pixels: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` of eight."""
    return pixels & 255 - (255 >> bits)


def solarize(pixels: Tensor, threshold: int) -> Tensor:
    """Invert values from the threshold on."""
    if not 0 < threshold < 256:
        return pixels.clone() if threshold > 0 else pixels.bitwise_not()
    reached = pixels.clamp(threshold - 1, threshold).sub_(threshold - 1)
    return reached.neg_().bitwise_xor_(pixels)


def solarize_add(pixels: Tensor, amount: int) -> Tensor:
    """Add `amount`, 0 to 128, to values below 128."""
    below = pixels.clamp(127, 128).neg_().add_(128)
    return below.mul_(amount).add_(pixels)


def brightness(pixels: Tensor, factor: float) -> Tensor:
    """Change the brightness: factor 0 gives black, 1 the same image."""
    return _to_bytes(pixels.float().mul_(factor))


def color(pixels: Tensor, factor: float) -> Tensor:
    """Change the saturation: factor 0 gives gray, 1 the same image."""
    planes = _planes(pixels).float()
    return _interleaved(_to_bytes(_blend(gray(*planes), planes, factor)))


def contrast(pixels: Tensor, factor: float) -> Tensor:
    """Change the contrast: factor 0 gives the mean gray, 1 the same image."""
    mean = float(rounded_mean(gray(*_planes(pixels).float())))
    return _to_bytes(_blend(mean, pixels.float(), factor))


def sharpness(pixels: Tensor, factor: float) -> Tensor:
    """Sharpen: factor 0 averages each pixel (weight 5) with its 8 neighbours, 1 gives the same. The border is kept."""
    wide = pixels.flatten(1).short()
    columns = wide[:-2] + wide[1:-1]
    columns.add_(wide[2:])
    inner = wide[1:-1, 3:-3]
    total = columns[:, :-6] + columns[:, 3:-3]
    total.add_(columns[:, 6:]).add_(inner, alpha=4)
    result = pixels.clone()
    result.flatten(1)[1:-1, 3:-3] = _to_bytes(_blend(thirteenth(total), inner.float(), factor))
    return result


def thirteenth(totals: Tensor) -> Tensor:
    """Return totals / 13 rounded, float32; never halfway. totals: integers from 0 to 13 * 255."""
    return (totals.float() + 6).mul_((1 + 2.0**-20) / 13).floor_()


def autocontrast(pixels: Tensor) -> Tensor:
    """Stretch each channel so that its smallest value becomes 0 and its largest 255."""
    channels = pixels.shape[1:]
    low = pixels.amin(0).view(channels).amin(0)[:, None]
    high = pixels.amax(0).view(channels).amax(0)[:, None]
    if bool(((low == 0) & (high == 255)).all()):
        return pixels.clone()
    return _look_up(autocontrast_tables(low, high), _entries(pixels))


def autocontrast_tables(low: Tensor, high: Tensor) -> Tensor:
    """Return tables (..., 256) uint8 that map low to 0, high to 255. low, high: (..., 1), the range of a channel."""
    low, high = low.double(), high.double()
    values = torch.arange(256, dtype=torch.float64, device=low.device)
    scale = torch.full_like(low, 255.0) / (high - low)  # infinite if a channel has one value, which is kept
    stretched = torch.where(high > low, values * scale + -low * scale, values)
    return stretched.clamp(0, 255).to(torch.uint8)


def equalize(pixels: Tensor) -> Tensor:
    """Flatten the histogram of each channel."""
    entries = _entries(pixels)
    return _look_up(equalize_tables(entries.view(-1).bincount(minlength=768).view(3, 256)), entries)


def _sums_before(counts: Tensor) -> Tensor:
    """Return for each entry the sum of those before it: (..., 256), as counts.

    Without cumsum: torch 2.11 cannot compile a scan of so many rows for a GPU.
    """
    rows = counts.reshape(*counts.shape[:-1], 16, 16)
    index = torch.arange(16, device=counts.device)
    is_before = index < index[:, None]
    in_row = torch.where(is_before, rows[..., None, :], 0).sum(-1)
    of_rows = torch.where(is_before, rows.sum(-1)[..., None, :], 0).sum(-1)
    return (in_row + of_rows[..., None]).flatten(-2)


def equalize_tables(counts: Tensor) -> Tensor:
    """Return tables (..., 256) uint8 that flatten each channel's histogram. counts: (..., 256), integers."""
    values = torch.arange(256, device=counts.device)
    last = torch.where(counts > 0, values, 0).amax(-1, keepdim=True)
    step = (counts.sum(-1, keepdim=True) - counts.gather(-1, last)) // 255
    flat = (step // 2 + _sums_before(counts)) // step.clamp(min=1)
    return torch.where(step > 0, flat, values).clamp(0, 255).to(torch.uint8)


def _entries(pixels: Tensor) -> Tensor:
    """Return (H, 3 W) int32: the index of each value's entry in tables (3, 256)."""
    first = torch.arange(0, 768, 256, dtype=torch.int32, device=pixels.device)
    return pixels.flatten(1).int().add_(first.repeat(pixels.shape[1]))


def _look_up(tables: Tensor, entries: Tensor) -> Tensor:
    height, width = entries.shape
    return tables.view(-1).index_select(0, entries.view(-1)).view(height, width // 3, 3)


def gray(red: Tensor, green: Tensor, blue: Tensor) -> Tensor:
    """Return the brightness, rounded, 0 to 255. All are float32 whole numbers: every step is exact."""
    return (red * _LUMA[0]).add_(green, alpha=_LUMA[1]).add_(blue, alpha=_LUMA[2]).add_(0.5).floor_()


def rounded_mean(levels: Tensor) -> Tensor:
    """Return (...) float64: the rounded mean of (..., H, W) float32, whole numbers up to 255."""
    total = levels.sum(-1).double().sum(-1)
    return (total / (levels.shape[-2] * levels.shape[-1]) + 0.5).floor()


def _blend(base: Tensor | float, values: Tensor, factor: float) -> Tensor:
    """Compute base + factor (values - base). values: float32, overwritten."""
    return values.sub_(base).mul_(factor).add_(base)


def _to_bytes(values: Tensor) -> Tensor:
    """Truncate float32 to uint8, as in PIL; through int16, which is faster."""
    return values.to(torch.int16).clamp_(0, 255).to(torch.uint8)


def _planes(pixels: Tensor) -> Tensor:
    """Return (3, H, W)."""
    return pixels.permute(2, 0, 1).contiguous()


def _interleaved(planes: Tensor) -> Tensor:
    return torch.stack(planes.unbind(0), -1)


def gaussian_blur(pixels: Tensor, weights: Tensor) -> Tensor:
    """Apply three box filters along rows, then three along columns, each rounded to 8 bits: PIL's Gaussian.

    pixels: (..., H, W, 3).   weights: (..., 3) int64, of a pixel, its neighbours at distance 1 and at 2, in 1 / 2^24.
    """
    middle, near, far = weights.int()[..., None, None, None].unbind(-4)
    for axis in (-2, -2, -2, -3, -3, -3):
        size = pixels.shape[axis]
        first, last = pixels.narrow(axis, 0, 1), pixels.narrow(axis, size - 1, 1)
        wide = torch.cat([first, first, pixels, last, last], axis).int()
        at = [wide.narrow(axis, i, size) for i in range(5)]
        total = (at[1] + at[3]).mul_(near).add_((at[0] + at[4]).mul_(far)).add_(at[2] * middle)
        pixels = (total.add_(1 << 23) >> 24).to(torch.uint8)  # wraps around below 2^32; so does the cast
    return pixels


def translate(pixels: Tensor, shift: float, axis: int, fill: Fill, *, bicubic: bool) -> Tensor:
    """Move up (axis 0) or left (axis 1) by `shift` pixels. fill: colour outside of the image."""
    size = pixels.shape[axis]
    result = torch.empty_like(pixels)
    result.flatten(1).copy_(_row_of(fill, pixels))
    first = math.ceil(-0.5 - shift)  # of the lines from inside
    begin, end = max(0, first), min(size, first + size)
    if begin >= end:
        return result
    whole = math.floor(shift)
    shares = weights(np.array(shift - whole), bicubic=bicubic)
    start, stop = begin + whole + 1 - len(shares) // 2, end + whole + len(shares) // 2  # the lines that are read
    inner = pixels.narrow(axis, max(0, start), min(size, stop) - max(0, start))
    edges = pixels.narrow(axis, 0, 1), pixels.narrow(axis, size - 1, 1)
    taken = torch.cat([*[edges[0]] * -start, inner, *[edges[1]] * (stop - size)], axis).float()
    moved = taken.narrow(axis, 0, end - begin) * float(shares[0])
    for i, share in enumerate(shares[1:], 1):
        moved.add_(taken.narrow(axis, i, end - begin), alpha=float(share))
    result.narrow(axis, begin, end - begin).copy_(_to_bytes(moved.add_(NUDGE)))
    return result


def shear_rows(pixels: Tensor, slope: float, fill: Fill, *, bicubic: bool) -> Tensor:
    """Move each row left by `slope` pixels per pixel down to its centre. fill: colour outside of the image."""
    height, width, _ = pixels.shape
    shifts = (np.arange(height) + 0.5) * slope
    whole = np.floor(shifts)
    margin, padded = width + 2, width + 4  # pixels before the first row and after the last; a row and two on each side
    store = pixels.new_zeros((2 * margin + height * padded) * 3)
    rows = store[3 * margin : -3 * margin].view(height, padded, 3)
    rows[:, 2:-2] = pixels
    rows[:, :2], rows[:, -2:] = pixels[:, :1], pixels[:, -1:]
    starts = margin + 1 + np.arange(height) * padded + np.clip(whole, -margin, margin - 3)
    taken = _windows(store, 3 * starts, 3 * (width + 3)).float()
    moved = _sum_of_taps(taken, 1, 3, (shifts - whole)[:, None], bicubic=bicubic)
    inside = torch.full((3 * width,), 255, dtype=torch.uint8, device=pixels.device)
    outside, none = _row_of(fill, pixels), torch.zeros_like(inside)
    begins = 3 * (width - np.clip(np.ceil(-0.5 - shifts), -width, width))
    moved &= _windows(torch.cat([none, inside, none]), begins, 3 * width)
    moved |= _windows(torch.cat([outside, none, outside]), begins, 3 * width)
    return moved.view(pixels.shape)


def shear_columns(pixels: Tensor, slope: float, fill: Fill, *, bicubic: bool) -> Tensor:
    """Move each column up by `slope` pixels per pixel right to its centre. fill: colour outside of the image."""
    height, width, _ = pixels.shape
    shifts = ((np.arange(width) + 0.5) * slope).repeat(3)  # of each channel of a column
    whole = np.floor(shifts)
    far = min(math.ceil(abs(slope) * width), height) + 2
    store = torch.cat([pixels[:1].expand(far, -1, -1), pixels, pixels[-1:].expand(far + 1, -1, -1)]).flatten(1)
    first = np.arange(3 * width) + 3 * width * (far - 1 + np.clip(whole, -far + 1, far - 1))
    height_read = height + 3
    lines = store.as_strided((height_read, store.numel() - 3 * width * (height_read - 1)), (3 * width, 1))
    taken = lines.gather(1, _index(first, pixels).expand(height_read, -1)).float()
    moved = _sum_of_taps(taken, 0, 1, shifts - whole, bicubic=bicubic)
    begins = np.clip(np.ceil(-0.5 - shifts), -height, height).astype(np.int16)
    depth = torch.arange(height, dtype=torch.int16, device=pixels.device)[:, None] - _tensor(begins, pixels)
    outside = ((height - 1 - depth).bitwise_or_(depth) >> 15).to(torch.uint8)  # 255 where either is negative, or 0
    moved &= outside.bitwise_not()
    moved |= outside.bitwise_and_(_row_of(fill, pixels))
    return moved.view(pixels.shape)


def _sum_of_taps(taken: Tensor, axis: int, step: int, along: Floats, *, bicubic: bool) -> Tensor:
    """Weight float32 values one step before, at, one and two after; returns uint8, 3 steps shorter along the axis."""
    size = taken.shape[axis] - 3 * step
    shares = [_tensor(share.astype(np.float32), taken) for share in weights(along, bicubic=bicubic)]
    first = 0 if bicubic else step
    total = taken.narrow(axis, first, size) * shares[0]
    for i, share in enumerate(shares[1:], 1):
        total.addcmul_(taken.narrow(axis, first + i * step, size), share)
    return _to_bytes(total.add_(NUDGE))


def _windows(store: Tensor, starts: Floats, length: int) -> Tensor:
    """Return pieces of a store (size,): (n, length)."""
    return store.as_strided((len(store) - length + 1, length), (1, 1)).index_select(0, _index(starts, store))


def _row_of(fill: Fill, pixels: Tensor) -> Tensor:
    """Return (3 W,) uint8."""
    return _tensor(np.tile(np.array(fill, np.uint8), pixels.shape[1]), pixels)


def _index(places: Floats, like: Tensor) -> Tensor:
    return _tensor(places.astype(np.int64), like)


def _tensor(values: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device)


class Places(NamedTuple):
    """Source positions of output pixels, (..., H, W) each: between columns left and left + 1, rows top and top + 1."""

    left: Tensor  # int32
    top: Tensor
    along_x: Tensor  # float32 in [0, 1), from left towards left + 1
    along_y: Tensor
    outside: Tensor  # int32: -1 outside the image, 0 in it


def places(matrices: Tensor, height: int, width: int) -> Places:
    """Return source positions: pixel (x, y) comes from (a x + b y + c, d x + e y + f); pixel centres are at halves.

    matrices: (..., 6) float64, a to f.
    """
    ys = torch.arange(height, dtype=torch.float64, device=matrices.device)[:, None] + 0.5
    xs = torch.arange(width, dtype=torch.float64, device=matrices.device) + 0.5
    a, b, c, d, e, f = matrices[..., None, None].unbind(-3)
    x, y = a * xs + (b * ys + c), d * xs + (e * ys + f)
    column, row = x.floor().int(), y.floor().int()
    outside = (column | (width - 1 - column) | row | (height - 1 - row)) >> 31
    x, y = x.sub_(0.5), y.sub_(0.5)
    left, top = x.floor(), y.floor()
    return Places(left.int(), top.int(), x.sub_(left).float(), y.sub_(top).float(), outside)


def affine(pixels: Tensor, matrix: Tensor, fill: Fill, *, bicubic: bool) -> Tensor:
    """Resample at the positions of a matrix, (6,) float64 (see places). fill: colour outside of the image."""
    height, width, _ = pixels.shape
    place = places(matrix, height, width)
    padded = _padded_words(pixels)
    start = place.top.clamp_(-1, height - 1).add_(1).mul_(width + 4).add_(place.left.clamp_(-1, width - 1)).add_(1)
    shares_x = weights(place.along_x, bicubic=bicubic)
    total, line, planes = torch.empty((3, 3, height, width), device=pixels.device).unbind(0)
    parts = torch.empty((3, height, width), dtype=torch.int32, device=pixels.device)
    masks = torch.tensor([0xFF, 0xFFFF, 0xFFFFFF], dtype=torch.int32, device=pixels.device)[:, None, None]
    first = 0 if bicubic else 1
    for i, share_y in enumerate(weights(place.along_y, bicubic=bicubic), first):
        for j, share_x in enumerate(shares_x, first):
            words = padded[i * (width + 4) + j :].index_select(0, start.view(-1)).view(start.shape)
            planes.copy_(torch.bitwise_and(words, masks, out=parts))  # red; red + 256 green; and + 65536 blue
            _add_product(line, planes, share_x, first=j == first)
        _add_product(total, line, share_y, first=i == first)
    red, green, blue = total
    blue.sub_(green).mul_(1 / 65536)
    green.sub_(red).mul_(1 / 256)
    found = _to_bytes(total.add_(NUDGE))
    outside = place.outside.to(torch.uint8)
    inside = outside.bitwise_not()
    for plane_found, value in zip(found, fill, strict=True):
        plane_found.bitwise_and_(inside).bitwise_or_(outside & value)
    return _interleaved(found)


def _add_product(total: Tensor, values: Tensor, share: Tensor, *, first: bool) -> None:
    """Add values * share to the total; overwrite it if this is the first."""
    if first:
        torch.mul(values, share, out=total)
    else:
        total.addcmul_(values, share)


def _padded_words(pixels: Tensor) -> Tensor:
    """Pack red, green and blue into ((H + 4) (W + 4),) int32, a byte each, with the edges repeated twice."""
    height, width, _ = pixels.shape
    red, green, blue = _planes(pixels).int()
    padded = torch.empty((height + 4, width + 4), dtype=torch.int32, device=pixels.device)
    inner = padded[2:-2, 2:-2]
    inner.copy_(red.bitwise_or_(green << 8).bitwise_or_(blue << 16))
    padded[2:-2, :2], padded[2:-2, -2:] = inner[:, :1], inner[:, -1:]
    padded[:2], padded[-2:] = padded[2], padded[-3]
    return padded.view(-1)


def weights(along: _T, *, bicubic: bool) -> list[_T]:
    """Return the weights of 2 (linear) or 4 neighbours (cubic, Keys 1981, a = -1). along: in [0, 1)."""
    back = 1 - along
    if not bicubic:
        return [back, along]
    outer = -(along * back)
    inner = 1 - outer
    return [outer * back, inner * back, inner * along, outer * along]
