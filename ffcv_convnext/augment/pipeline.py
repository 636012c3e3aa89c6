"""The recipe's augmentation of a batch on the device: policy, jitter, normalise, erase, mix, soft targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment.batched_ops import PolicyTensors, apply_policy_batched, policy_kinds, policy_tensors
from ffcv_convnext.augment.color import (
    JitterDraws,
    Normalisation,
    color_jitter,
    draw_jitter,
    normalise,
    normalised_planes,
)
from ffcv_convnext.augment.erasing import ErasingDraws, draw_erasing, erase, erase_batched
from ffcv_convnext.augment.kernels import DrawArguments, augmentation_kernels, draw_arguments
from ffcv_convnext.augment.mix import MixDraws, draw_mix, mix_batched, mix_image, mix_targets
from ffcv_convnext.augment.randaugment import Interpolation, PolicyDraws, apply_policy, draw_policy
from ffcv_convnext.augment.to_device import all_to_device
from ffcv_convnext.config import AugmentConfig
from ffcv_convnext.policy_grammar import parse_policy
from ffcv_convnext.rng import Stream, step_seed

_STREAMS = (Stream.POLICY, Stream.COLOR_JITTER, Stream.ERASING, Stream.MIX)


@dataclass(frozen=True, slots=True)
class Draws:
    """Everything random about a micro-batch; None: disabled by the settings."""

    policy: PolicyDraws | None
    jitter: JitterDraws | None
    erasing: ErasingDraws | None
    mix: MixDraws | None


class DrawTensors(NamedTuple):
    """The same on the device, without the policy. Shapes and types depend on the settings and the number of images."""

    jitter: tuple[Tensor, ...] | None  # arguments of color_jitter
    erasing: tuple[Tensor, ...] | None  # arguments of erase_batched
    mix: tuple[Tensor, ...] | None  # arguments of mix_batched


class TrainAugment:
    """Convert uint8 crops and labels to the network's input and soft targets.

    Every draw is a function of (seed, optimiser step, micro-batch), so it does not depend on the process that gets a
    micro-batch. Draws are made on the host, which never waits for the device, and applied in one of three ways with the
    same result: image by image, without computing pixels that are not used, for a CPU; by Triton kernels (kernels/),
    in which each image costs its own operations only, for a GPU; or batched, in static shapes and without branches that
    depend on a draw, from which torch.compile makes kernels.
    """

    def __init__(
        self,
        config: AugmentConfig,
        *,
        num_classes: int,
        seed: int,
        device: torch.device,
        normalisation: Normalisation,
        interpolation: Interpolation = "bicubic",
        compile: bool = False,
        kernels: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Prepare the augmentation of a run.

        normalisation: of the inputs; its mean colour fills the outside of an image in geometric operations.
        interpolation: of the policy's geometric operations; random: drawn for each operation of each image.
        compile: one graph for a whole run, by torch.compile.   kernels: Triton kernels instead, for any policy; they
        have no use for `compile`.   dtype: of the returned inputs.
        Raises ValueError for kernels without Triton or without a CUDA device.
        """
        self.config = config
        self.num_classes = num_classes
        self.seed = seed
        self.device = device
        self.normalisation = normalisation
        self.constants = normalisation.constants.tolist()
        self.interpolation = interpolation
        self.dtype = dtype
        self.policy = None if config.aa == "none" else parse_policy(config.aa)
        self.kinds = policy_kinds(self.policy) if self.policy else frozenset()
        self._compiled: Callable[..., tuple[Tensor, Tensor]] | None = None
        self._kernels = augmentation_kernels(device) if kernels else None
        if compile and not kernels:
            self._compiled = torch.compile(self._batched, fullgraph=True, dynamic=False)

    @torch.no_grad()
    def __call__(self, images: Tensor, labels: Tensor, *, step: int, micro_batch: int) -> tuple[Tensor, Tensor]:
        """Augment one micro-batch.

        images: (N, 3, H, W) uint8, channels_last; not modified.   labels: (N,) int64.
        step: optimiser step in the run; micro_batch: its number in the step's global batch.
        Returns normalised images of self.dtype, channels_last, and targets (N, num_classes) float32. They are computed
        in float32 and rounded once. Raises ValueError for other images, and for an odd number of them if they are mixed
        in pairs.
        """
        if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
            found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
            raise ValueError(f"images are {found}: augmentation needs uint8 (N, 3, H, W), red, green and blue")
        num, _, height, width = images.shape
        draws = self.draw(num, height, width, step=step, micro_batch=micro_batch)
        if self._kernels is not None:
            return self._kernels(
                images, labels, self.arguments(draws, height, width), kinds=self.kinds, dtype=self.dtype,
                normalisation=self.normalisation, num_classes=self.num_classes, smoothing=self.config.smoothing,
            )  # fmt: skip
        if self._compiled is not None:
            policy = None if draws.policy is None else policy_tensors(draws.policy, height, width, self.device)
            return self._compiled(images, labels, policy, _tensors(draws, self.device))
        if draws.policy is not None:
            images = apply_policy(images, draws.policy, self.normalisation.fill)
        if self.device.type == "cpu":
            return self._image_by_image(images, labels, draws)
        return self._batched(images, labels, None, _tensors(draws, self.device))

    def draw(self, num: int, height: int, width: int, *, step: int, micro_batch: int) -> Draws:
        """Draw everything random about a micro-batch of `num` images of this size."""
        config = self.config
        seeds = {stream: step_seed(self.seed, step, micro_batch, stream) for stream in _STREAMS}
        generators = {stream: np.random.Generator(np.random.Philox(key=seed)) for stream, seed in seeds.items()}
        policy = jitter = erasing = mix = None
        if self.policy is not None:
            policy = draw_policy(self.policy, num, height, width, self.interpolation, generators[Stream.POLICY])
        if config.jitters:
            assert config.color_jitter is not None
            jitter = draw_jitter(config.color_jitter, num, generators[Stream.COLOR_JITTER])
        if config.reprob > 0:
            key = seeds[Stream.ERASING]
            erasing = draw_erasing(config, num, height, width, key, generators[Stream.ERASING])
        if config.mixes:
            mix = draw_mix(config, num, height, width, generators[Stream.MIX])
        return Draws(policy, jitter, erasing, mix)

    def arguments(self, draws: Draws, height: int, width: int) -> DrawArguments:
        """Copy the draws for images of this height and width to the device for the kernels, in one transfer."""
        return draw_arguments(
            draws.policy, draws.jitter, draws.erasing, draws.mix, height=height, width=width, device=self.device
        )

    def _image_by_image(self, images: Tensor, labels: Tensor, draws: Draws) -> tuple[Tensor, Tensor]:
        """Apply everything except the policy, on a CPU: an image and its partner stay in the processor's caches."""
        num, _, height, width = images.shape
        # numpy uses huge pages, PyTorch does not: without them, page faults cost more than the computation
        memory = torch.from_numpy(np.empty(images.numel() * self.dtype.itemsize, np.uint8))
        inputs = memory.view(self.dtype).view(num, height, width, 3)
        targets = soft_targets(labels, self.num_classes, self.config.smoothing)
        if draws.mix is None:
            for i in range(num):
                inputs[i] = self._prepared(images, i, draws)
            return inputs.permute(0, 3, 1, 2), targets
        for i in range((num + 1) // 2):
            pair = i, num - 1 - i
            prepared = [self._prepared(images, each, draws) for each in pair]
            for each, own, partner in zip(pair, prepared, reversed(prepared), strict=True):
                inputs[each] = mix_image(own, partner, float(draws.mix.lam[each]), draws.mix.boxes[each].tolist())
        return inputs.permute(0, 3, 1, 2), mix_targets(targets, torch.from_numpy(draws.mix.lam))

    def _prepared(self, images: Tensor, index: int, draws: Draws) -> Tensor:
        """Return an image jittered, normalised and erased: (H, W, 3) float32."""
        image = images[index : index + 1]
        if draws.jitter is not None:
            steps, factors = draws.jitter.steps[index : index + 1], draws.jitter.factors[index : index + 1]
            image = color_jitter(image, torch.from_numpy(steps), torch.from_numpy(factors))
        result = normalise(image, self.normalisation)[0].permute(1, 2, 0)
        if draws.erasing is not None:
            erase(result, index, draws.erasing)
        return result

    def _batched(
        self, images: Tensor, labels: Tensor, policy: PolicyTensors | None, draws: DrawTensors
    ) -> tuple[Tensor, Tensor]:
        """Apply everything, as a function of tensors whose shapes never change in a run."""
        if policy is not None:
            images = apply_policy_batched(images, policy, self.kinds, self.interpolation, self.normalisation.fill)
        if draws.jitter is not None:
            images = color_jitter(images, *draws.jitter)
        planes = normalised_planes(images, self.constants)
        targets = soft_targets(labels, self.num_classes, self.config.smoothing)
        if draws.erasing is not None:
            planes = erase_batched(planes, *draws.erasing)
        inputs = torch.stack(planes, -1).permute(0, 3, 1, 2)
        if draws.mix is not None:
            inputs = mix_batched(inputs, *draws.mix)
            targets = mix_targets(targets, draws.mix[0])
        return inputs.to(self.dtype), targets


def _tensors(draws: Draws, device: torch.device) -> DrawTensors:
    """Copy the draws to the device, in one transfer."""
    jitter, erasing, mix = draws.jitter, draws.erasing, draws.mix
    groups: list[list[NDArray[Any]]] = [
        [] if jitter is None else [jitter.steps, jitter.factors],
        [] if erasing is None else [erasing.boxes, erasing.colours],
        [] if mix is None else [mix.lam, mix.boxes],
    ]
    if erasing is not None and erasing.key is not None:
        groups[1].append(np.array(erasing.key))
    tensors = iter(all_to_device([array for group in groups for array in group], device))
    return DrawTensors(*(tuple(islice(tensors, len(group))) or None for group in groups))


def soft_targets(labels: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Return targets with label smoothing (Szegedy et al. 2015, arXiv:1512.00567).

    labels: (N,) int64.   Returns (N, num_classes) float32 whose rows sum to 1.
    """
    off = smoothing / num_classes
    targets = torch.full((len(labels), num_classes), off, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + off)
