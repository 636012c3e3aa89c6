"""Random erasing (Zhong et al. 2017, arXiv:1708.04896), drawn for a whole micro-batch at once.

Areas, aspect ratios and the ten attempts at a box that fits are those of timm's RandomErasing.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.config import AugmentConfig

AREA = (0.02, 1 / 3)  # of the image, shared among its boxes
LOG_ASPECT = (math.log(0.3), math.log(1 / 0.3))
_NUM_TRIES = 10


def draw_boxes(
    config: AugmentConfig, num: int, height: int, width: int, generator: np.random.Generator
) -> NDArray[np.int64]:
    """Boxes to erase in `num` images: (boxes, 5) int64 rows of image, top, bottom, left, right.

    An erased image gets 1 to `recount` of them, each number as likely, which share the area.
    """
    erased = np.flatnonzero(generator.random(num) < config.reprob)
    counts = generator.integers(1, config.recount, len(erased), endpoint=True)
    shape = (len(erased), config.recount, _NUM_TRIES)
    area = generator.uniform(*AREA, shape) * height * width / counts[:, None, None]
    aspect = np.exp(generator.uniform(*LOG_ASPECT, shape))
    heights = np.rint(np.sqrt(area * aspect)).astype(np.int64)
    widths = np.rint(np.sqrt(area / aspect)).astype(np.int64)
    corner = generator.random((2, *shape[:2]))
    fits = (heights < height) & (widths < width)
    first = fits.argmax(axis=-1, keepdims=True)
    box_heights = np.take_along_axis(heights, first, -1)[..., 0]
    box_widths = np.take_along_axis(widths, first, -1)[..., 0]
    tops = (corner[0] * (height - box_heights + 1)).astype(np.int64)
    lefts = (corner[1] * (width - box_widths + 1)).astype(np.int64)
    image = np.broadcast_to(erased[:, None], tops.shape)
    rows = np.stack([image, tops, tops + box_heights, lefts, lefts + box_widths], axis=-1)
    return rows[fits.any(axis=-1) & (np.arange(config.recount) < counts[:, None])]


def erase(images: Tensor, boxes: NDArray[np.int64], config: AugmentConfig, generator: torch.Generator) -> None:
    """Fill boxes of normalised images in place: noise per pixel, one random colour a box, or the mean colour.

    images: (N, 3, H, W) floating, modified.   boxes: rows of draw_boxes.   generator: on the images' device.
    """
    channels = images.shape[1]
    for image, top, bottom, left, right in boxes.tolist():
        patch = images[image, :, top:bottom, left:right]
        if config.remode == "const":
            patch.zero_()
        elif config.remode == "rand":
            patch.copy_(torch.randn((channels, 1, 1), generator=generator, device=images.device, dtype=images.dtype))
        else:
            patch.normal_(generator=generator)
