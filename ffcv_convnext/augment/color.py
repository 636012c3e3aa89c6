"""Normalisation and colour jitter of batches on the device."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.to_device import to_device
from ffcv_convnext.config import DataConfig

LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's grayscale

Colour = tuple[int, int, int]  # red, green, blue from 0 to 255
Planes = list[Tensor]  # the three channels of a batch, (N, H, W) each, dense or not


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Mean and standard deviation of the pixels, red, green and blue from 0 to 1."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @classmethod
    def of(cls, config: DataConfig) -> Normalisation:
        """Return a run's."""
        return cls(config.mean, config.std)

    @property
    def constants(self) -> NDArray[np.float64]:
        """Scale and shift, (2, 3): a value from 0 to 255 becomes value * scale + shift."""
        mean, std = np.array(self.mean), np.array(self.std)
        return np.stack([1 / (255 * std), -mean / std])

    @property
    def fill(self) -> Colour:
        """The mean colour, which fills the outside of an image in geometric operations."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue


def normalise(images: Tensor, by: Normalisation) -> Tensor:
    """Scale images (N, 3, H, W) of values 0 to 255 to float32 with mean 0 and standard deviation 1 over the data.

    Returns a new tensor of the same memory format.
    """
    constants = by.constants.astype(np.float32)
    if not images.is_contiguous(memory_format=torch.channels_last):
        scale, shift = to_device(constants, images.device)[:, :, None, None]
        return torch.addcmul(shift, images.float(), scale)
    pixels = images.permute(0, 2, 3, 1)
    scale, shift = to_device(np.tile(constants, pixels.shape[2]), images.device)  # three values would broadcast slowly
    rows = torch.addcmul(shift, pixels.flatten(2).float(), scale)
    return rows.view(pixels.shape).permute(0, 3, 1, 2)


def normalised_planes(images: Tensor, constants: list[list[float]]) -> Planes:
    """Normalise as above, with constants that a compiler folds: Normalisation.constants as lists."""
    planes = zip(images.unbind(1), *constants, strict=True)
    return [plane.float() * scale + shift for plane, scale, shift in planes]


@dataclass(frozen=True, slots=True)
class JitterDraws:
    """Draws for a micro-batch: one row per image, one column per step.

    steps: (N, 3) int64, 0 brightness, 1 contrast, 2 saturation, in the image's own order.
    factors: (N, 3) float32, of these steps.
    """

    steps: NDArray[np.int64]
    factors: NDArray[np.float32]


def draw_jitter(strength: float, num: int, generator: np.random.Generator) -> JitterDraws:
    """Draw factors in 1 +- strength, and the order in which they apply."""
    factors = generator.uniform(max(0.0, 1 - strength), 1 + strength, (num, 3)).astype(np.float32)
    steps = generator.permuted(np.tile(np.arange(3), (num, 1)), axis=1)
    return JitterDraws(steps, np.take_along_axis(factors, steps, 1))


def color_jitter(images: Tensor, steps: Tensor, factors: Tensor) -> Tensor:
    """Change brightness, contrast and saturation, by each image's own factors and in its own order.

    images: (N, 3, H, W) uint8.   steps, factors: as in JitterDraws.   Returns float32 in [0, 255], channels_last. As
    torchvision's ColorJitter, except that values are not rounded between the three. Each of them is one blend with
    a base: black, mean gray, or the gray image.
    """
    planes = [plane.float() for plane in images.unbind(1)]
    for step, factor in zip(steps[:, :, None, None].unbind(1), factors[:, :, None, None].unbind(1), strict=True):
        red, green, blue = (weight * plane for weight, plane in zip(LUMA, planes, strict=True))
        gray = red + green + blue
        base = torch.where(step == 2, gray, torch.where(step == 1, gray.mean((1, 2), keepdim=True), 0.0))
        planes = [torch.lerp(base, plane, factor).clamp_(0, 255) for plane in planes]
    return torch.stack(planes, -1).permute(0, 3, 1, 2)


def inside(boxes: Tensor, height: int, width: int) -> Tensor:
    """Return the pixels in each image's box: (N, H, W) bool. boxes: (N, 4), top, bottom, left, right."""
    tops, bottoms, lefts, rights = boxes[:, :, None, None].unbind(1)
    ys = torch.arange(height, device=boxes.device)[:, None]
    xs = torch.arange(width, device=boxes.device)
    return (ys >= tops) & (ys < bottoms) & (xs >= lefts) & (xs < rights)
