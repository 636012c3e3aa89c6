"""The contestants of `bench augment`: each augments the same crops, (N, side, side, 3) uint8 in a .npy file."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.bench.compare import Contestant, imports_done, use_cores
from ffcv_convnext.bench.timing import repeated_round
from ffcv_convnext.config import Config
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import input_dtype

NUM_CLASSES = 1000


def _labels(num: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, NUM_CLASSES, num))


def ours(config: dict[str, Any], crops: str, seconds: float, compile: bool) -> Contestant:
    """Augment batches of tensors, as train.py does."""
    settings = Config.from_flat(config)
    device = Processes.from_environment(settings.run.device).device
    if device.type == "cpu":
        _use_one_core()
    imports_done()
    augment = TrainAugment(
        settings.augment,
        num_classes=NUM_CLASSES,
        seed=settings.run.seed,
        device=device,
        normalisation=Normalisation.of(settings.data),
        interpolation=settings.data.train_interpolation,
        compile=compile,
        dtype=input_dtype(settings),
    )
    images = torch.from_numpy(np.load(crops)).to(device).permute(0, 3, 1, 2)
    labels = _labels(len(images)).to(device)
    step = 0

    def call() -> int:
        nonlocal step
        step += 1
        augment(images, labels, step=step, micro_batch=0)
        return len(images)

    return repeated_round(call, seconds, device), None


def timm_pil(config: dict[str, Any], crops: str, seconds: float) -> Contestant:
    """Augment one image after the other with timm's transform, then its Mixup of the batch, as its script does."""
    from timm.data import Mixup
    from timm.data.transforms_factory import transforms_imagenet_train

    _use_one_core()
    imports_done()
    settings = Config.from_flat(config)
    recipe = settings.augment
    _, policy, to_tensor = transforms_imagenet_train(
        settings.data.input_size,
        color_jitter=recipe.color_jitter,
        auto_augment=None if recipe.aa == "none" else recipe.aa,
        interpolation=settings.data.train_interpolation,
        re_prob=recipe.reprob,
        re_mode=recipe.remode,
        re_count=recipe.recount,
        separate=True,
    )
    mixup = Mixup(
        recipe.mixup,
        recipe.cutmix,
        recipe.cutmix_minmax,
        recipe.mixup_prob,
        recipe.mixup_switch_prob,
        recipe.mixup_mode,
        label_smoothing=recipe.smoothing,
        num_classes=NUM_CLASSES,
    )
    pictures = [Image.fromarray(crop) for crop in np.load(crops)]
    labels = _labels(len(pictures))

    def transformed(picture: Image.Image) -> Tensor:
        while True:
            try:
                return to_tensor(policy(picture))  # type: ignore[no-any-return]
            except ValueError:  # sometimes timm posterizes to 0 bits, an error since Pillow 13
                continue

    def call() -> int:
        batch = torch.stack([transformed(picture) for picture in pictures])
        if recipe.mixes:
            mixup(batch, labels)
        return len(batch)

    return repeated_round(call, seconds, torch.device("cpu")), None


def torchvision_v2(config: dict[str, Any], crops: str, seconds: float) -> Contestant:
    """Augment one image after the other with torchvision's own RandAugment: its ranges, no bicubic for tensors."""
    from torchvision.transforms import InterpolationMode, v2

    _use_one_core()
    imports_done()
    settings = Config.from_flat(config)
    recipe = settings.augment
    transform = v2.Compose(
        [
            v2.RandAugment(2, 9, interpolation=InterpolationMode.BILINEAR, fill=[124, 116, 104]),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            v2.RandomErasing(recipe.reprob, value="random"),
        ]
    )
    mixing = v2.RandomChoice(
        [v2.MixUp(alpha=0.8, num_classes=NUM_CLASSES), v2.CutMix(alpha=1.0, num_classes=NUM_CLASSES)]
    )
    images = torch.from_numpy(np.load(crops)).permute(0, 3, 1, 2).contiguous()
    labels = _labels(len(images))

    def call() -> int:
        batch = torch.stack([transform(image) for image in images])
        if recipe.mixes:
            mixing(batch, labels)
        return len(batch)

    return repeated_round(call, seconds, torch.device("cpu")), None


def _use_one_core() -> None:
    use_cores(1)
    torch.set_num_threads(1)
