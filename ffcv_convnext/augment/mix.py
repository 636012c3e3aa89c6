"""Mixup and CutMix on the device, targets included.

Sources: Zhang et al. 2018, "mixup", arXiv:1710.09412; Yun et al. 2019, "CutMix", arXiv:1905.04899. The three modes
and the way a draw becomes a box are those of timm's Mixup, so a recipe written for timm means the same here; the
draws come from (seed, optimiser step, micro-batch).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.config import AugmentConfig


@dataclass(frozen=True, slots=True)
class MixDraws:
    """What was drawn for a micro-batch; arrays have one row for the batch, a pair or an image, as the mode says.

    lam: (n,) float64, the image's own weight in the mixture (CutMix: the share of its area that stays).
    boxes: (n, 4) int64, top, bottom, left, right of what CutMix pastes; empty boxes where it does not.
    """

    lam: NDArray[np.float64]
    boxes: NDArray[np.int64]


def draw_mix(config: AugmentConfig, height: int, width: int, num: int, generator: np.random.Generator) -> MixDraws:
    """Draw weights and boxes, `num` of each."""
    lam = np.ones(num)
    boxes = np.zeros((num, 4), dtype=np.int64)
    cuts_possible = config.cutmix > 0 or config.cutmix_minmax is not None
    for i in range(num):
        if generator.random() >= config.mixup_prob:
            continue
        cut = cuts_possible and (config.mixup == 0 or generator.random() < config.mixup_switch_prob)
        if not cut:
            lam[i] = generator.beta(config.mixup, config.mixup)
            continue
        if config.cutmix_minmax is not None:
            least, most = config.cutmix_minmax
            box_height = int(generator.integers(int(height * least), int(height * most)))
            box_width = int(generator.integers(int(width * least), int(width * most)))
            top = int(generator.integers(0, height - box_height + 1))
            left = int(generator.integers(0, width - box_width + 1))
            box = top, top + box_height, left, left + box_width
        else:
            share = np.sqrt(1 - generator.beta(config.cutmix, config.cutmix))
            center = int(generator.integers(0, height)), int(generator.integers(0, width))
            size = int(height * share), int(width * share)
            box = (
                max(center[0] - size[0] // 2, 0),
                min(center[0] + (size[0] + 1) // 2, height),
                max(center[1] - size[1] // 2, 0),
                min(center[1] + (size[1] + 1) // 2, width),
            )
        boxes[i] = box
        lam[i] = 1 - (box[1] - box[0]) * (box[3] - box[2]) / (height * width)  # after clipping at the border
    return MixDraws(lam, boxes)


def apply_mix(images: Tensor, targets: Tensor, draws: MixDraws) -> tuple[Tensor, Tensor]:
    """Blend every image with its mirror-position partner in the batch, or paste a box of the partner into it.

    images: (N, 3, H, W) floating, normalised, channels_last; left untouched.   targets: (N, K) float32, rows sum
    to 1.   draws: of length 1 (one for the batch), N / 2 (one for image i and its partner N - 1 - i) or N.
    Returns new tensors of the same shapes, dtypes and memory format. Raises ValueError for another length.
    """
    num, _, height, width = images.shape
    lam, boxes = draws.lam, draws.boxes
    if len(lam) not in (1, num) and 2 * len(lam) != num:
        raise ValueError(f"{len(lam)} draws for {num} images: expected 1, {num} or half as many")
    partner = images.flip(0)
    if len(lam) == 1:  # one decision, known on the host: no masks are needed
        weight, (top, bottom, left, right) = float(lam[0]), (int(x) for x in boxes[0])
        mixed_targets = torch.lerp(targets.flip(0), targets, weight)
        if bottom == top or right == left:
            return torch.lerp(partner, images, weight), mixed_targets
        partner[:, :, :top], partner[:, :, bottom:] = images[:, :, :top], images[:, :, bottom:]
        partner[:, :, top:bottom, :left] = images[:, :, top:bottom, :left]
        partner[:, :, top:bottom, right:] = images[:, :, top:bottom, right:]
        return partner, mixed_targets
    if len(lam) < num:
        lam, boxes = np.concatenate([lam, lam[::-1]]), np.concatenate([boxes, boxes[::-1]])
    cut = (boxes[:, 1] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 2])
    own = to_device(lam.astype(np.float32), images.device)[:, None]
    blend = to_device(np.where(cut, 1, lam).astype(np.float32), images.device)[:, None, None, None]
    tops, bottoms, lefts, rights = to_device(boxes, images.device)[:, :, None, None, None].unbind(1)
    ys = torch.arange(height, device=images.device)[:, None]
    xs = torch.arange(width, device=images.device)
    inside = (ys >= tops) & (ys < bottoms) & (xs >= lefts) & (xs < rights)
    mixed = torch.where(inside, partner, torch.lerp(partner, images, blend.to(images.dtype)))
    return mixed, torch.lerp(targets.flip(0), targets, own)


def to_device(array: NDArray[Any], device: torch.device) -> Tensor:
    """A small host array on the device, without waiting for the device."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
