"""Augmentation of batches on the device."""

from ffcv_convnext.augment.color import normalise
from ffcv_convnext.augment.pipeline import TrainAugment, soft_targets

__all__ = ["TrainAugment", "normalise", "soft_targets"]
