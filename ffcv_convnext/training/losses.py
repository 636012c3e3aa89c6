"""The training criterion."""

from __future__ import annotations

from timm.loss import SoftTargetCrossEntropy
from torch import nn


def build_criterion() -> nn.Module:
    """Return the mean cross-entropy of logits (N, K) with soft targets (N, K) whose rows sum to 1.

    Labels reach it smoothed and mixed (augment/mix.py).
    """
    criterion: nn.Module = SoftTargetCrossEntropy()
    return criterion
