"""Twenty optimiser steps of ours beside the paper's loop, written down here step by step on timm's network."""

from __future__ import annotations

import copy
import math

import timm
import torch
from support import REPOSITORY
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor

from ffcv_convnext.config import load_config
from ffcv_convnext.models.layouts import OURS, TIMM, rename
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner

NUM_CLASSES, STEPS_PER_EPOCH, NUM_EPOCHS, WARMUP_EPOCHS, UPDATE_FREQ = 5, 5, 4, 1, 2
PEAK_LR, MIN_LR, WEIGHT_DECAY, DECAY = 4e-3, 1e-6, 0.05, 0.99
SMALL = {
    **{"resnet_layers": "1,1,2,1", "resnet_embed_dim": 8, "drop_path": 0, "amp": "off", "input_size": 32},
    **{"batch_size": 4, "update_freq": UPDATE_FREQ, "epochs": NUM_EPOCHS, "warmup_epochs": WARMUP_EPOCHS},
    **{"lr": PEAK_LR, "min_lr": MIN_LR, "weight_decay": WEIGHT_DECAY, "model_ema": True, "model_ema_decay": DECAY},
    "device": "cpu",
}
Batch = list[tuple[Tensor, Tensor]]


def learning_rates() -> list[float]:
    """One rate an optimiser step: a line from 0 to the peak, then half a cosine (cosine_scheduler in its utils.py)."""
    warmup, total = WARMUP_EPOCHS * STEPS_PER_EPOCH, NUM_EPOCHS * STEPS_PER_EPOCH
    line = [PEAK_LR * i / (warmup - 1) for i in range(warmup)]
    left = total - warmup
    return line + [MIN_LR + 0.5 * (PEAK_LR - MIN_LR) * (1 + math.cos(math.pi * i / left)) for i in range(left)]


def paper_steps(network: torch.nn.Module, steps: list[Batch]) -> dict[str, Tensor]:
    """Train `network`, in place, as train_one_epoch in the paper's engine.py does; return the averaged weights."""
    decays = [p for p in network.parameters() if p.ndim > 1]
    plain = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": plain, "weight_decay": 0.0}, {"params": decays, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LR)
    criterion = SoftTargetCrossEntropy()
    average = copy.deepcopy(network.state_dict())
    for rate, micro_batches in zip(learning_rates(), steps, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for images, targets in micro_batches:
            (criterion(network(images), targets) / UPDATE_FREQ).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, value in network.state_dict().items():
            average[name] = average[name] * DECAY + (1 - DECAY) * value
    return average


def inputs_of(learner: Learner) -> list[Batch]:
    """What our augmentation makes of the images of every step: float32 images and mixed targets."""
    generator = torch.Generator().manual_seed(3)
    steps = []
    for step in range(NUM_EPOCHS * STEPS_PER_EPOCH):
        micro_batches = []
        for i in range(UPDATE_FREQ):
            images = torch.randint(0, 256, (4, 3, 32, 32), generator=generator).to(torch.uint8)
            labels = torch.randint(0, NUM_CLASSES, (4,), generator=generator)
            micro_batches.append(learner.augment(images, labels, step=step, micro_batch=i))
        steps.append(micro_batches)
    return steps


def test_twenty_steps_of_convnext_equal_the_papers_with_their_average() -> None:
    config = load_config(REPOSITORY / "rn_configs" / "convnext_tiny.yaml").replace(**SMALL)
    ours = build_learner(
        config, Processes.from_environment("cpu"), num_classes=NUM_CLASSES, steps_per_epoch=STEPS_PER_EPOCH
    )
    theirs = timm.create_model("convnext_tiny", depths=(1, 1, 2, 1), dims=(8, 16, 32, 64), num_classes=NUM_CLASSES)
    start = rename(ours.network.state_dict(), OURS, TIMM)
    theirs.load_state_dict({name: start[name].reshape(value.shape) for name, value in theirs.state_dict().items()})
    steps = inputs_of(ours)
    average = paper_steps(theirs.train(), steps)

    ready = iter([micro_batch for step in steps for micro_batch in step])
    ours.augment = lambda *_, **__: next(ready)  # type: ignore[assignment]
    ours.model.train()
    started = copy.deepcopy(ours.network.state_dict())
    for step in steps:
        train_step(ours, iter(step))
        ours.state.step += 1

    assert ours.ema is not None
    for network, expected in ((ours.network, theirs.state_dict()), (ours.ema.module, average)):
        found = network.state_dict()
        for name, value in rename(expected, TIMM, OURS).items():
            torch.testing.assert_close(found[name], value.reshape(found[name].shape), atol=2e-6, rtol=1e-5, msg=name)
    change = (ours.network.state_dict()["head.weight"] - started["head.weight"]).abs().max()
    assert change > 1000 * 2e-6, "the steps moved the weights by far more than the tolerance"
