"""The contestants of `bench step`: our optimiser steps, and those of timm's and torchvision's networks in timm's way.

All steps have one micro-batch of the same size: forward, loss with soft targets, backward, AdamW, averaged weights if
the config has them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import repeat
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ffcv_convnext.augment import Normalisation, normalise, soft_targets
from ffcv_convnext.bench.compare import Contestant, Timed, imports_done, note
from ffcv_convnext.bench.profile import AUGMENTATION, UPDATE, ceilings, marked, profile_step, step_bytes
from ffcv_convnext.bench.timing import Batch, RepeatedDecoding, random_batch, repeated_round
from ffcv_convnext.config import Config
from ffcv_convnext.models import build_model, count_gmacs
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import autocast, input_dtype, train_step
from ffcv_convnext.training.run import build_learner

NUM_CLASSES = 1000
Images = Literal["ready", "augmented", "loaded"]


def ours(
    config: dict[str, Any], seconds: float, images: Images, beton: str = "", num_workers: int = 1, profile: bool = False
) -> Contestant:
    """Take train.py's own steps.

    images: ready: the same inputs in every step; augmented: the same uint8 crops, augmented; loaded: crops decoded from
    `beton` and augmented.   profile: before the first round, note the shares of the parts and the device's limits.
    """
    imports_done()
    settings = Config.from_flat(config)
    processes = Processes.from_environment(settings.run.device)
    device = processes.device
    learner = build_learner(settings, processes, num_classes=NUM_CLASSES, steps_per_epoch=1000)
    learner.model.train()
    crops = random_batch(settings, settings.data.batch_size, device, num_classes=NUM_CLASSES)
    batches: Iterator[Batch] = repeat(crops)
    if images == "ready":
        ready = learner.augment(*crops, step=0, micro_batch=0)
        learner.augment = lambda *_, **__: ready  # type: ignore[assignment]
    elif images == "loaded":
        decoding = RepeatedDecoding(Path(beton), settings.data, device, num_workers=num_workers)
        decoding.warm(10.0)
        batches = decoding.batches()

    def step() -> int:
        train_step(learner, iter([next(batches)]))
        learner.state.step += 1
        return settings.data.batch_size

    def first() -> None:
        step()
        learner.tracker.flush()

    def profiled() -> None:
        first()
        augment, update = learner.augment, learner.optimizer.step
        learner.augment = marked(AUGMENTATION, augment)  # type: ignore[assignment]
        learner.optimizer.step = marked(UPDATE, update)  # type: ignore[method-assign]
        if learner.ema is not None:
            learner.ema.update = marked(UPDATE, learner.ema.update)
        note(shares=profile_step(step, device), ceilings=ceilings(device, input_dtype(settings)))
        learner.augment, learner.optimizer.step = augment, update  # type: ignore[method-assign]
        if learner.ema is not None:
            del learner.ema.update

    with torch.device("meta"):
        plain = build_model(settings.model, NUM_CLASSES)  # fused blocks have no layers to count
    note(gmacs=count_gmacs(plain, settings.data.input_size))
    eager = learner.model is learner.network
    work = _rounds(step, seconds, device, flush=learner.tracker.flush, count_traffic=eager and images == "ready")
    return work, profiled if profile else first


def peer(config: dict[str, Any], seconds: float, library: Literal["timm", "torchvision"], name: str) -> Contestant:
    """Train timm's or torchvision's network as timm's train.py does with --channels-last --amp."""
    import timm
    from timm.loss import SoftTargetCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.utils import ModelEmaV3
    from torchvision import models

    imports_done()
    settings = Config.from_flat(config)
    device, size = Processes.from_environment(settings.run.device).device, settings.data.batch_size
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = True
    network: nn.Module
    if library == "timm":
        network = timm.create_model(name, num_classes=NUM_CLASSES, drop_path_rate=settings.model.drop_path)
    else:
        network = getattr(models, name)(num_classes=NUM_CLASSES, stochastic_depth_prob=settings.model.drop_path)
    network = network.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    optimizer = create_optimizer_v2(network, opt="adamw", lr=1e-4, weight_decay=0.05)
    scaler = torch.amp.GradScaler(device.type, enabled=settings.run.amp == "fp16")
    ema = ModelEmaV3(network, decay=0.9999) if settings.run.model_ema else None
    model: nn.Module = torch.compile(network) if settings.run.compile == "true" else network  # type: ignore[assignment]
    criterion = SoftTargetCrossEntropy()
    pixels, labels = random_batch(settings, size, device, num_classes=NUM_CLASSES)
    inputs, targets = normalise(pixels, Normalisation.of(settings.data)), soft_targets(labels, NUM_CLASSES, 0.1)
    num_steps = 0

    def step() -> int:
        nonlocal num_steps
        with autocast(settings, device):
            loss = criterion(model(inputs.contiguous(memory_format=torch.channels_last)), targets)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        if ema is not None:
            ema.update(network, step=num_steps)
        num_steps += 1
        return size

    note(gmacs=count_gmacs(network, settings.data.input_size))
    return _rounds(step, seconds, device, count_traffic=model is network), step


def _rounds(
    step: Callable[[], int],
    seconds: float,
    device: torch.device,
    *,
    count_traffic: bool,
    flush: Callable[[], None] = lambda: None,
) -> Callable[[], Timed]:
    """Return rounds of that step, which note the peak of a GPU's memory.

    count_traffic: note once the bytes that a step moves.   flush: is called after each round, or results accumulate.
    """
    repeated, counted = repeated_round(step, seconds, device), not count_traffic

    def work() -> Timed:
        nonlocal counted
        if not counted:
            note(step_bytes=step_bytes(step))
            counted = True
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        timed = repeated()
        if device.type == "cuda":
            note(peak_gb=torch.cuda.max_memory_allocated(device) / 1e9)
        flush()
        return timed

    return work
