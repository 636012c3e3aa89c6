"""The loss: hand-worked values, timm's on mixed and smoothed targets, float32 under autocast."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import timm.loss
import torch
from support.runs import train_here

from ffcv_convnext.augment.mix import mix_targets
from ffcv_convnext.augment.pipeline import soft_targets
from ffcv_convnext.config import OptimConfig
from ffcv_convnext.files import read_lines
from ffcv_convnext.training.losses import build_criterion

LOGITS = torch.tensor([[0.0, math.log(3)], [-math.log(3), 0.0]])  # sigmoids 1/2 and 3/4, 1/4 and 1/2


@pytest.mark.parametrize(
    ("threshold", "second", "expected"),
    [
        # -log of the probability of each class's target: 1/2, 3/4; then 3/4, 1/2
        (None, [0.0, 1.0], (math.log(2) + math.log(4 / 3) + math.log(4 / 3) + math.log(2)) / 4),
        # 1/4 of class 0: 1/4 log 4 + 3/4 log 4/3
        (None, [0.25, 0.75], (2 * math.log(2) + math.log(4 / 3) + math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / 4),
        (0.2, [0.25, 0.75], (math.log(2) + math.log(4 / 3) + math.log(4) + math.log(2)) / 4),
        (0.25, [0.25, 0.75], (math.log(2) + math.log(4 / 3) + math.log(4 / 3) + math.log(2)) / 4),  # above, not at
        (0.9, [0.25, 0.75], (math.log(2) + math.log(4 / 3) + math.log(4 / 3) + math.log(2)) / 4),  # no class is left
    ],
)  # fmt: skip
def test_binary_cross_entropy_is_the_mean_over_images_and_classes(
    threshold: float | None, second: list[float], expected: float
) -> None:
    criterion = build_criterion(OptimConfig(loss="bce", bce_target_thresh=threshold))
    loss = criterion(LOGITS, torch.tensor([[0.0, 1.0], second]))
    assert loss.shape == ()
    assert loss.item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
def test_binary_cross_entropy_is_timms_with_its_gradient(
    threshold: float | None, mixed: bool, smoothing: float
) -> None:
    generator = torch.Generator().manual_seed(0)
    targets = soft_targets(torch.randint(0, 10, (16,), generator=generator), 10, smoothing)
    if mixed:
        targets = mix_targets(targets, torch.rand(16, generator=generator))
    values, gradients = [], []
    for criterion in (
        build_criterion(OptimConfig(loss="bce", bce_target_thresh=threshold)),
        timm.loss.BinaryCrossEntropy(smoothing=0.3, target_threshold=threshold),  # smooths dense targets no more
    ):
        logits = (3 * torch.randn(16, 10, generator=torch.Generator().manual_seed(1))).requires_grad_()
        criterion(logits, targets).backward()
        values.append(criterion(logits, targets).item())
        gradients.append(logits.grad)
    assert values[0] == values[1]
    assert torch.equal(gradients[0], gradients[1])


def test_cross_entropy_is_the_default() -> None:
    targets = torch.tensor([[0.0, 1.0], [0.25, 0.75]])  # softmaxes 1/4 and 3/4, 1/4 and 3/4
    expected = (math.log(4 / 3) + math.log(4) / 4 + math.log(4 / 3) * 3 / 4) / 2
    assert build_criterion(OptimConfig())(LOGITS, targets).item() == pytest.approx(expected, rel=1e-6)


def test_binary_cross_entropy_is_float32_under_autocast() -> None:
    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    targets = soft_targets(torch.arange(4), 5, 0.1)
    criterion = build_criterion(OptimConfig(loss="bce"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = criterion(logits, targets)
    assert found.dtype == torch.float32
    assert found.item() == criterion(logits.float(), targets).item()


def test_a_threshold_without_its_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"bce_target_thresh = 0.2 needs --loss bce"):
        OptimConfig(bce_target_thresh=0.2)


@pytest.mark.parametrize(("smoothing", "said"), [(0.1, True), (0.0, False)])
def test_a_run_with_it_trains_and_says_what_smoothing_does(
    smoothing: float, said: bool, small_settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    changes = {"loss": "bce", "smoothing": smoothing, "epochs": 3, "warmup_epochs": 0}
    train_here({**small_settings, **changes}, output_dir=tmp_path)
    assert ("loss = bce with smoothing = 0.1" in caplog.text) == said
    losses = [entry["train_loss"] for entry in read_lines(tmp_path / "log.jsonl")]
    assert losses[-1] < losses[0] < 1
