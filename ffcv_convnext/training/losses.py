"""The training criterion."""

from __future__ import annotations

import torch.nn.functional as F
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from ffcv_convnext.config import OptimConfig


class BinaryCrossEntropy(nn.Module):
    """A sigmoid and a binary cross-entropy for each class, averaged over images and classes, in float32.

    target_threshold: targets above it become 1, all others 0; None: they stay soft.   Source: Wightman et al. 2021,
    "ResNet strikes back", arXiv:2110.00476, Section 3.1; the mean over classes is that of timm's recipes.
    """

    def __init__(self, target_threshold: float | None = None) -> None:
        super().__init__()
        self.target_threshold = target_threshold

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return the scalar loss of logits (N, K) and targets (N, K) in [0, 1]."""
        if self.target_threshold is not None:
            targets = (targets > self.target_threshold).to(targets.dtype)
        return F.binary_cross_entropy_with_logits(logits.to(targets.dtype), targets)


def build_criterion(config: OptimConfig) -> nn.Module:
    """Return the mean loss of logits (N, K) with soft targets (N, K) float32 whose rows sum to 1.

    Labels reach it smoothed and mixed (augment/mix.py).
    """
    criterion: nn.Module = BinaryCrossEntropy(config.bce_target_thresh)
    if config.loss == "ce":
        criterion = SoftTargetCrossEntropy()
    return criterion
