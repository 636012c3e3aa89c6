"""`bench augment`: the recipe's augmentation of batches, ours beside timm's for single PIL images and torchvision's.

It covers everything after the crop and flip, which the loader does: policy, colour jitter, normalising, erasing,
mixing, soft targets. On a CPU each contestant has one core.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from ffcv_convnext.bench.compare import Comparison, compare
from ffcv_convnext.bench.options import StepOptions
from ffcv_convnext.bench.synthetic_data import find_photographs
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.run import compiles

REFERENCE = "timm (PIL)"
COMPILE_TIMEOUT_S = 900.0


def bench_augment(options: StepOptions) -> Comparison:
    """Measure the config's augmentation of batch_size crops of photographs."""
    config = options.config
    device = Processes.from_environment(config.run.device).device
    ours = {"ours" if device.type == "cpu" else "ours (GPU)": False}
    if compiles(config, device):
        ours |= {f"{name}, compiled": True for name in ours}
    functions: dict[str, tuple[str, dict[str, Any]]] = {REFERENCE: ("timm_pil", {})}
    if config.augment.aa.startswith("rand"):
        functions["torchvision v2 (tensors, bilinear)"] = ("torchvision_v2", {})
    functions |= {name: ("ours", {"compile": compiled}) for name, compiled in ours.items()}
    chosen = options.choose(list(functions), REFERENCE)
    with tempfile.TemporaryDirectory(prefix="bench-augment-") as temporary:
        crops = Path(temporary) / "crops.npy"
        photographs = find_photographs(options.photographs)
        np.save(crops, _square_crops(photographs, config.data.batch_size, config.data.input_size))
        given = {"config": config.flat(), "crops": str(crops), "seconds": options.seconds}
        contestants = [
            (name, f"{__package__}.contestants.augment:{function}", {**given, **more})
            for name, (function, more) in functions.items()
            if name in chosen
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
            "augmentation", contestants, options, reference=REFERENCE, facts=facts, timeout_s=COMPILE_TIMEOUT_S
        )
    comparison.columns["ms per batch"] = {
        row.name: 1000 * config.data.batch_size / row.median for row in comparison.rows if not row.error
    }
    return comparison


def _square_crops(photographs: Sequence[Image.Image], num: int, size: int) -> NDArray[np.uint8]:
    """Return (num, size, size, 3): random squares of the photographs, resized as training crops are."""
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
