"""The recipe's augmentation of a batch on the device: policy, jitter, normalise, erase, mix, soft targets."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ffcv_convnext.augment.erasing import draw_boxes, erase
from ffcv_convnext.augment.mix import apply_mix, draw_mix
from ffcv_convnext.augment.ops import color_jitter, normalise
from ffcv_convnext.augment.randaugment import Interpolation, apply_policy, draw_policy
from ffcv_convnext.config import AugmentConfig
from ffcv_convnext.policies import parse_policy
from ffcv_convnext.rng import Stream, step_seed


class TrainAugment:
    """Turns uint8 crops and labels into the network's input and soft targets.

    Every draw is a function of (seed, optimiser step, micro-batch), so it does not depend on which process a
    micro-batch falls to. Decisions are drawn on the host and noise on the device; the host never waits.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        num_classes: int,
        seed: int,
        device: torch.device,
        interpolation: Interpolation = "bicubic",
    ) -> None:
        """interpolation: of the policy's geometric operations; random: either, for each operation of each image."""
        self.config = config
        self.num_classes = num_classes
        self.seed = seed
        self.generator = torch.Generator(device)
        self.interpolation = interpolation
        self.policy = None if config.aa == "none" else parse_policy(config.aa)
        self.jitter = config.color_jitter if config.jitters else None

    def __call__(self, images: Tensor, labels: Tensor, *, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Augment one micro-batch.

        images: (N, 3, H, W) uint8, channels_last; left untouched.   labels: (N,) int64.
        step: optimiser step in the run; micro_batch: its number in the step's global batch.
        Returns float32 images, normalised, in the same memory format, and targets (N, num_classes) float32.
        """
        config = self.config
        if self.policy is not None:
            height, width = images.shape[2:]
            policy_draws = self._draws(step, micro_batch, Stream.POLICY)
            drawn = draw_policy(self.policy, len(images), height, width, self.interpolation, policy_draws)
            images = apply_policy(images, drawn)
        if self.jitter is not None:
            jitter_draws = self._draws(step, micro_batch, Stream.COLOR_JITTER)
            inputs = normalise(color_jitter(images, self.jitter, jitter_draws))
        else:
            inputs = normalise(images)
        num, _, height, width = inputs.shape
        if config.reprob > 0:
            boxes = draw_boxes(config, num, height, width, self._draws(step, micro_batch, Stream.ERASING))
            self.generator.manual_seed(step_seed(self.seed, step, micro_batch, Stream.ERASING))
            erase(inputs, boxes, config, self.generator)
        targets = soft_targets(labels, self.num_classes, config.smoothing)
        if config.mixes:
            rows = {"batch": 1, "pair": num // 2, "elem": num}[config.mixup_mode]
            draws = draw_mix(config, height, width, rows, self._draws(step, micro_batch, Stream.MIX))
            inputs, targets = apply_mix(inputs, targets, draws)
        return inputs, targets

    def _draws(self, step: int, micro_batch: int, stream: Stream) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=step_seed(self.seed, step, micro_batch, stream)))


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Label smoothing (Szegedy et al. 2015, arXiv:1512.00567).

    labels: (N,) int64.   Returns (N, num_classes) float32 whose rows sum to 1.
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)
