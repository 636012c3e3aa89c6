"""Mixup and CutMix on the device, targets included.

Sources: Zhang et al. 2018, "mixup", arXiv:1710.09412; Yun et al. 2019, "CutMix", arXiv:1905.04899. The three modes are
those of timm's Mixup, so a timm recipe has the same meaning here; the draws come from (seed, optimiser step,
micro-batch).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.color import inside
from ffcv_convnext.config import AugmentConfig


@dataclass(frozen=True, slots=True)
class MixDraws:
    """Draws for a micro-batch, one row per image, also if drawn for the whole batch or a pair.

    lam: (N,) float32, the image's own weight in the mixture (CutMix: the share of its own area).
    boxes: (N, 4) int64, top, bottom, left, right of the area that CutMix pastes; empty without CutMix.
    """

    lam: NDArray[np.float32]
    boxes: NDArray[np.int64]


def draw_mix(config: AugmentConfig, num: int, height: int, width: int, generator: np.random.Generator) -> MixDraws:
    """Draw weights and boxes for `num` images. Raises ValueError for an odd number of them in mode pair."""
    mode = config.mixup_mode
    if mode == "pair" and num % 2:
        raise ValueError(
            f"mixup_mode = pair: {num} images cannot form pairs; use an even batch_size, or mode batch or elem"
        )
    rows = {"batch": 1, "pair": num // 2, "elem": num}[mode]
    lam = np.ones(rows)
    boxes = np.zeros((rows, 4), dtype=np.int64)
    cuts_possible = config.cutmix > 0 or config.cutmix_minmax is not None
    for i in range(rows):
        if generator.random() >= config.mixup_prob:
            continue
        cut = cuts_possible and (config.mixup == 0 or generator.random() < config.mixup_switch_prob)
        if not cut:
            lam[i] = generator.beta(config.mixup, config.mixup)
            continue
        if config.cutmix_minmax is not None:
            low, high = config.cutmix_minmax
            box_height = int(generator.integers(int(height * low), int(height * high)))
            box_width = int(generator.integers(int(width * low), int(width * high)))
            top = int(generator.integers(0, height - box_height + 1))
            left = int(generator.integers(0, width - box_width + 1))
            box = top, top + box_height, left, left + box_width
        else:
            share = np.sqrt(1 - generator.beta(config.cutmix, config.cutmix))
            center = int(generator.integers(0, height)), int(generator.integers(0, width))
            box = cutmix_box(share, center, height, width)
        boxes[i] = box
        lam[i] = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)  # after clipping at the border
    if mode == "batch":
        lam, boxes = np.repeat(lam, num), np.repeat(boxes, num, axis=0)
    elif mode == "pair":
        lam, boxes = np.concatenate([lam, lam[::-1]]), np.concatenate([boxes, boxes[::-1]])
    return MixDraws(lam.astype(np.float32), boxes)


def cutmix_box(share: float, center: tuple[int, int], height: int, width: int) -> tuple[int, int, int, int]:
    """Return the box (top, bottom, left, right) that CutMix pastes, clipped at the border of a height x width image.

    share: of the box's side in the image's.   center: row and column of the box's middle.   As in the paper's timm
    (0.3.2, and later ones up to 1.0.28), half the side is rounded down on both sides, so a box inside the image has
    even sides; newer versions add the odd pixel.
    """
    half_height, half_width = int(height * share) // 2, int(width * share) // 2
    row, column = center
    return (
        max(row - half_height, 0),
        min(row + half_height, height),
        max(column - half_width, 0),
        min(column + half_width, width),
    )


def mix_image(image: Tensor, partner: Tensor, lam: float, box: Sequence[int]) -> Tensor:
    """Blend an image with its partner, or paste a box of the partner into it; returns a new tensor.

    image, partner: (H, W, 3) floating, normalised.   lam, box: the image's row of MixDraws.
    """
    top, bottom, left, right = box
    if bottom == top or right == left:
        return torch.lerp(partner, image, lam)
    result = image.clone()
    result[top:bottom, left:right] = partner[top:bottom, left:right]
    return result


def mix_batched(images: Tensor, lam: Tensor, boxes: Tensor) -> Tensor:
    """Mix every image with its mirror-position partner in the batch, in static shapes; returns a new tensor.

    images: (N, 3, H, W) floating, normalised.   lam: (N,) float32.   boxes: (N, 4), as in MixDraws.
    """
    cut = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    weight = torch.where(cut, 1.0, lam)[:, None, None, None]
    partner = images.flip(0)
    pasted = inside(boxes, *images.shape[2:])[:, None]
    return torch.where(pasted, partner, torch.lerp(partner, images, weight))


def mix_targets(targets: Tensor, lam: Tensor) -> Tensor:
    """Mix targets (N, K) float32, whose rows sum to 1, in the same way; returns a new tensor. lam: (N,) float32."""
    return torch.lerp(targets.flip(0), targets, lam[:, None])
