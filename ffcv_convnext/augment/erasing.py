"""Random erasing (Zhong et al. 2017, arXiv:1708.04896), drawn for a whole micro-batch at once.

Areas, aspect ratios and the ten attempts to draw a box that fits are those of timm's RandomErasing. Noise is a function
of a key and the pixel, so it is the same on any device.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.color import Planes, inside
from ffcv_convnext.config import AugmentConfig
from ffcv_convnext.rng import short_words

AREA = (0.02, 1 / 3)  # of the image, shared among its boxes
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_NUM_TRIES = 10


@dataclass(frozen=True, slots=True)
class ErasingDraws:
    """Draws for a micro-batch of N images with at most R boxes each.

    boxes: (N, R, 4) int64, top, bottom, left, right; a box that was not drawn is empty (all 0).
    colours: (N, R, 3) float32, the fill of a box: normally distributed, or 0, which is the mean colour.
    key: of the noise per pixel, below 2^63; None if boxes are filled with colours.
    """

    boxes: NDArray[np.int64]
    colours: NDArray[np.float32]
    key: int | None


def draw_erasing(
    config: AugmentConfig, num: int, height: int, width: int, key: int, generator: np.random.Generator
) -> ErasingDraws:
    """Draw the erased boxes of `num` images.

    An erased image gets 1 to `recount` boxes, each number with the same probability, which share the area.
    """
    erased = generator.random(num) < config.reprob
    counts = generator.integers(1, config.recount, num, endpoint=True)
    shape = (num, config.recount, _NUM_TRIES)
    area = generator.uniform(*AREA, shape) * height * width / counts[:, None, None]
    aspect = np.exp(generator.uniform(*LOG_ASPECT, shape))
    heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    corner = generator.random((2, *shape[:2]))
    colours = np.zeros((*shape[:2], 3), np.float32)
    if config.remode == "rand":
        colours = generator.standard_normal(colours.shape, dtype=np.float32)
    fits = (heights < height) & (widths < width)
    first = fits.argmax(axis=-1, keepdims=True)
    box_heights = np.take_along_axis(heights, first, -1)[..., 0]
    box_widths = np.take_along_axis(widths, first, -1)[..., 0]
    tops = (corner[0] * (height - box_heights + 1)).astype(np.int64)
    lefts = (corner[1] * (width - box_widths + 1)).astype(np.int64)
    boxes = np.stack([tops, tops + box_heights, lefts, lefts + box_widths], axis=-1)
    drawn = erased[:, None] & (np.arange(config.recount) < counts[:, None]) & fits.any(axis=-1)
    return ErasingDraws(np.where(drawn[..., None], boxes, 0), colours, key if config.remode == "pixel" else None)


def noise(key: int | Tensor, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return three independent standard normal numbers per pixel, float32: a function of (key, pixel) only.

    pixels: int64, numbers (image H + y) W + x, below 2^32, any shape.   key: below 2^63, an int or an int64 scalar
    tensor. A pair of numbers uses 32 bits, so none exceeds 4.9.   Source: Box and Muller 1958.
    """
    (radius, angle), (third_radius, third_angle) = (_polar(word) for word in short_words(key, pixels))
    return radius * angle.cos(), radius * angle.sin(), third_radius * third_angle.cos()


def _polar(words: Tensor) -> tuple[Tensor, Tensor]:
    """Return radius and angle of points normally distributed in the plane."""
    radius = ((words >> 16).float() + 0.5).mul(2.0**-16).log().mul(-2).sqrt()
    return radius, (words & 0xFFFF).float() * (2 * math.pi / 2**16)


def erase(image: Tensor, index: int, draws: ErasingDraws) -> None:
    """Fill an image's boxes in place with noise, or each with its colour.

    image: (H, W, 3) floating, normalised, modified; number `index` of the micro-batch; on the CPU.
    """
    height, width, _ = image.shape
    for (top, bottom, left, right), colour in zip(draws.boxes[index].tolist(), draws.colours[index], strict=True):
        patch = image[top:bottom, left:right]
        if draws.key is None:
            patch.copy_(torch.from_numpy(colour))
        elif patch.numel():
            rows = torch.arange(index * height + top, index * height + bottom)[:, None] * width
            patch.copy_(torch.stack(noise(draws.key, rows + torch.arange(left, right)), -1))


def erase_batched(planes: Planes, boxes: Tensor, colours: Tensor, key: Tensor | None = None) -> Planes:
    """Do the same as `erase` for all images at once, in static shapes.

    planes: the channels, not modified.   boxes, colours, key: as in ErasingDraws, on the planes' device.
    """
    num, height, width = planes[0].shape
    if key is not None:
        noises = noise(key, torch.arange(num * height * width, device=boxes.device).view(num, height, width))
        erased = torch.stack([inside(box, height, width) for box in boxes.unbind(1)]).any(0)
        return [torch.where(erased, new, plane) for new, plane in zip(noises, planes, strict=True)]
    for box, colour in zip(boxes.unbind(1), colours[..., None, None].unbind(1), strict=True):
        erased = inside(box, height, width)
        planes = [torch.where(erased, new, plane) for new, plane in zip(colour.unbind(1), planes, strict=True)]
    return planes
