"""The whole augmentation of a batch: at most three launches a round of the policy, and two, or three with jitter."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ffcv_convnext.augment.color import Normalisation
from ffcv_convnext.augment.kernels.arguments import DrawArguments
from ffcv_convnext.augment.kernels.finish import finish, write_targets
from ffcv_convnext.augment.kernels.policy import apply_policy_kernels
from ffcv_convnext.augment.randaugment import Kind


def can_run_on(device: torch.device) -> bool:
    """Return whether the kernels can run there: on a CUDA device, or anywhere under Triton's interpreter."""
    return device.type == "cuda" or bool(triton.knobs.runtime.interpret)


def augment_batch(
    images: Tensor,
    labels: Tensor,
    arguments: DrawArguments,
    *,
    kinds: frozenset[Kind],
    normalisation: Normalisation,
    num_classes: int,
    smoothing: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute TrainAugment's result with kernels only: nothing else runs on the device, and the host never waits.

    images: (N, 3, H, W) uint8, copied if not channels_last, not modified.   labels: (N,) int64, below num_classes.
    arguments: of N images of this size.   kinds: those that the policy can draw.   dtype: of the inputs.
    Shapes and launches depend on the settings and the size of the batch only, so a CUDA graph can hold them; the
    draws are read from `arguments`. Returns inputs (N, 3, H, W), channels_last, and targets (N, num_classes) float32.
    Raises ValueError for other numbers of labels or draws.
    """
    num, _, height, width = images.shape
    policy, *rest = arguments
    rows = {
        len(labels),
        *(len(group[0]) for group in rest if group),
        *([] if policy is None else policy.kinds.shape[1:]),
    }
    if rows != {num}:
        raise ValueError(f"labels and draws of {sorted(rows)} images for {num} images")
    pixels = images.permute(0, 2, 3, 1).contiguous()
    inputs = pixels.new_empty((num, height, width, 3), dtype=dtype)
    targets = pixels.new_empty((num, num_classes), dtype=torch.float32)
    if policy is not None:
        pixels = apply_policy_kernels(pixels, policy, kinds, normalisation.fill)
    finish(pixels, inputs, arguments, normalisation)
    write_targets(labels.contiguous(), targets, arguments.mix, smoothing)
    return inputs.permute(0, 3, 1, 2), targets
