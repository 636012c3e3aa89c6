"""Augmentation of batches on the device."""

from ffcv_convnext.augment.color import Normalisation, normalise
from ffcv_convnext.augment.pipeline import TrainAugment, soft_targets

__all__ = ["Normalisation", "TrainAugment", "normalise", "soft_targets"]
