"""Batched image operations on the device."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ffcv_convnext.augment.mix import to_device

IMAGENET_MEAN = (0.485, 0.456, 0.406)  # of pixels in [0, 1]; the recipe's normalisation
IMAGENET_STD = (0.229, 0.224, 0.225)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R 601, as PIL's grayscale


def normalise(images: Tensor) -> Tensor:
    """uint8 images (N, 3, H, W) -> float32 with ImageNet's mean 0 and standard deviation 1; keeps memory format."""
    mean = torch.tensor(IMAGENET_MEAN, device="cpu").mul(255)[:, None, None]
    std = torch.tensor(IMAGENET_STD, device="cpu").mul(255)[:, None, None]
    scale, shift = to_device((1 / std).numpy(), images.device), to_device((-mean / std).numpy(), images.device)
    return torch.addcmul(shift, images.float(), scale)


def color_jitter(images: Tensor, strength: float, generator: np.random.Generator) -> Tensor:
    """Brightness, contrast and saturation, each by a factor in 1 +- strength, in an order drawn for each image.

    images: (N, 3, H, W) uint8.   Returns float32 in [0, 255]. As torchvision's ColorJitter, except that values
    are not rounded between the three. Each of them is one blend with a base: black, mean gray, or the gray image.
    """
    num = len(images)
    factors = generator.uniform(max(0.0, 1 - strength), 1 + strength, (num, 3)).astype(np.float32)
    orders = generator.permuted(np.tile(np.arange(3), (num, 1)), axis=1)
    luma = to_device(np.array(_LUMA, np.float32), images.device)[:, None, None]
    result = images.float()
    for which in orders.T:
        factor = to_device(np.take_along_axis(factors, which[:, None], 1), images.device)[:, :, None, None]
        kind = to_device(which.copy(), images.device)[:, None, None, None]
        gray = (result * luma).sum(1, keepdim=True)
        base = torch.where(kind == 2, gray, torch.where(kind == 1, gray.mean((2, 3), keepdim=True), 0.0))
        result = torch.lerp(base, result, factor).clamp_(0, 255)
    return result
