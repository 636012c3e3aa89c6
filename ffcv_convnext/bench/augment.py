"""`bench augment`: the recipe's augmentation of batches, ours beside timm's for single PIL images and torchvision's.

All of it after the crop and flip, which the loader does: policy, colour jitter, normalising, erasing, mixing, soft
targets. On a CPU each contestant has one core. Each function that makes one is for `rounds.compare`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ffcv_convnext.augment import TrainAugment
from ffcv_convnext.bench.compare import Comparison, Contestant, compare, imports_done, use_cores
from ffcv_convnext.bench.loader import choose
from ffcv_convnext.bench.stages import repeating
from ffcv_convnext.bench.synthetic_data import find_photographs
from ffcv_convnext.config import Config
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import input_dtype
from ffcv_convnext.training.run import compiles

REFERENCE = "timm (PIL)"
NUM_CLASSES = 1000
COMPILE_PATIENCE_S = 900.0


def bench_augment(
    config: Config,
    *,
    photographs: Path | None,
    rounds: int,
    seconds: float,
    peers: Sequence[str] | None,
    say: Callable[[str], None],
) -> Comparison:
    """Measure the config's augmentation of batch_size crops of photographs (a folder's, or those at hand).

    peers: how names of rows begin that are wanted beside timm's (None: all).   seconds: of a round, each contestant.
    """
    device = Processes.from_environment(config.run.device).device
    ours = {"ours" if device.type == "cpu" else "ours (GPU)": False}
    if compiles(config, device):
        ours |= {f"{name}, compiled": True for name in ours}
    functions: dict[str, tuple[str, dict[str, Any]]] = {REFERENCE: ("timm_pil", {})}
    if config.augment.aa.startswith("rand"):
        functions["torchvision v2 (tensors, bilinear)"] = ("torchvision_v2", {})
    functions |= {name: ("ours", {"compile": compiled}) for name, compiled in ours.items()}
    with tempfile.TemporaryDirectory(prefix="bench-augment-") as temporary:
        crops = Path(temporary) / "crops.npy"
        np.save(crops, some_crops(find_photographs(photographs), config.data.batch_size, config.data.input_size))
        given = {"config": config.flat(), "crops": str(crops), "seconds": seconds}
        contestants = [
            (name, f"{__name__}:{function}", {**given, **more})
            for name, (function, more) in functions.items()
            if name in choose(list(functions), peers, REFERENCE)
        ]
        facts = {
            "cores": 1,
            "policy": config.augment.aa,
            "batch": config.data.batch_size,
            "pixels": config.data.input_size,
            **{name: version(name) for name in ("torch", "torchvision", "timm", "pillow")},
            **({"device": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}),
        }
        comparison = compare(
            "augmentation",
            contestants,
            reference=REFERENCE,
            rounds=rounds,
            facts=facts,
            say=say,
            patience_s=COMPILE_PATIENCE_S,
        )
    comparison.columns["ms a batch"] = {
        row.name: 1000 * config.data.batch_size / row.median for row in comparison.rows if not row.error
    }
    return comparison


def some_crops(photographs: Sequence[Image.Image], num: int, size: int) -> NDArray[np.uint8]:
    """(num, size, size, 3): square parts of the photographs, resized as training crops are."""
    random = np.random.default_rng(0)
    crops = np.empty((num, size, size, 3), np.uint8)
    for crop in crops:
        source = photographs[int(random.integers(len(photographs)))]
        side = int(min(source.size) * random.uniform(0.4, 1.0))
        left, top = (int(random.integers(0, length - side + 1)) for length in source.size)
        crop[:] = np.asarray(
            source.resize((size, size), Image.Resampling.BICUBIC, (left, top, left + side, top + side))
        )
    return crops


def _labels(num: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(1).integers(0, NUM_CLASSES, num))


def ours(config: dict[str, Any], crops: str, seconds: float, compile: bool) -> Contestant:
    settings = Config.from_flat(config)
    device = Processes.from_environment(settings.run.device).device
    if device.type == "cpu":
        _keep_to_one_core()
    imports_done()
    augment = TrainAugment(
        settings.augment,
        num_classes=NUM_CLASSES,
        seed=settings.run.seed,
        device=device,
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

    return repeating(call, seconds, device), None


def timm_pil(config: dict[str, Any], crops: str, seconds: float) -> Contestant:
    """timm's transform of one image after the other and its Mixup of the batch, as its training script has them."""
    from timm.data import Mixup
    from timm.data.transforms_factory import transforms_imagenet_train

    _keep_to_one_core()
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
            except ValueError:  # timm asks for 0 bits (Posterize) now and then, which Pillow refuses from 13 on
                continue

    def call() -> int:
        batch = torch.stack([transformed(picture) for picture in pictures])
        if recipe.mixes:
            mixup(batch, labels)
        return len(batch)

    return repeating(call, seconds, torch.device("cpu")), None


def torchvision_v2(config: dict[str, Any], crops: str, seconds: float) -> Contestant:
    """torchvision's RandAugment (its own operations and ranges; no bicubic for tensors), one image after the other."""
    from torchvision.transforms import InterpolationMode, v2

    _keep_to_one_core()
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

    return repeating(call, seconds, torch.device("cpu")), None


def _keep_to_one_core() -> None:
    use_cores(1)
    torch.set_num_threads(1)
