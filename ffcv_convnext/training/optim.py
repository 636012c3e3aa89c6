"""The optimiser and its parameter groups, both from timm, and their state in a checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ffcv_convnext.config import OptimConfig, nearest
from ffcv_convnext.training.fused_adamw import fuse_adamw

FUSED = (torch.optim.Adam, torch.optim.SGD)  # and AdamW, an Adam; a step is one kernel for many parameters
KEPT = {"betas", "eps", "momentum", "weight_decay", "decays", "fused"}  # taken from the settings, not from a checkpoint


def build_optimizer(
    network: nn.Module,
    config: OptimConfig,
    *,
    peak_lr: float = 4e-3,
    triton: bool = False,
    ema: ModelEmaV3 | None = None,
) -> torch.optim.Optimizer:
    """Return an optimiser over two groups: parameters of one dimension and biases have no weight decay.

    With layer_decay there are two for each group of layers of the network's `group_matcher`, timm's interface: the last
    group, with the head, has the schedule's learning rate, and each one before it layer_decay times the next one's.
    Adam, AdamW and SGD are torch's fused versions: with fp16 they apply the loss scale on the device.
    peak_lr: of the schedule; some of timm's optimisers scale their weight decay by it.
    triton: AdamW as a `FusedAdamW`, whose steps also update `ema`, the averages of `network`.
    Learning rate and weight decay are set before each step. Raises ValueError for a name that timm does not have, for
    options that the optimiser does not have, for layer_decay with a network without groups of layers, and for triton
    with another optimiser than AdamW.
    """
    if config.opt.lower() not in list_optimizers():
        raise ValueError(f"opt = {config.opt}: timm has no such optimiser{nearest(config.opt, list_optimizers())}")
    info = get_optimizer_info(config.opt.lower())
    if config.opt_betas is not None and not (info.has_betas and info.num_betas == 2):
        raise ValueError(f"opt_betas has no effect with opt = {config.opt}, which does not have two betas; remove it")
    for name, value, taken in (
        ("opt_eps", config.opt_eps, info.has_eps),
        ("momentum", config.momentum, info.has_momentum),
    ):
        if value is not None and not taken:
            raise ValueError(f"{name} has no effect with opt = {config.opt}, which does not have it; remove it")
    options = {"betas": config.opt_betas, "eps": config.opt_eps, "momentum": config.momentum}
    extra: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    if isinstance(info.opt_class, type) and issubclass(
        info.opt_class, FUSED
    ):  # a string if its package is not installed
        extra["fused"] = True
    if config.layer_decay < 1:
        if not hasattr(network, "group_matcher"):
            raise ValueError(
                f"layer_decay = {config.layer_decay:g}: timm has no groups of layers for {type(network).__name__}; "
                "remove it, or choose another --model"
            )
        extra["layer_decay"] = config.layer_decay
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        network,
        opt=config.opt,
        lr=peak_lr,
        weight_decay=max(config.weight_decay, config.weight_decay_end or 0.0),  # above 0 makes the two groups
        **extra,
    )
    for group in optimizer.param_groups:
        group["decays"] = group["weight_decay"] > 0
    if not triton:
        return optimizer
    return fuse_adamw(optimizer, *(() if ema is None else (network, ema)))


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Set every group's learning rate for this step, and the weight decay of the groups that have one."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["decays"]:
            group["weight_decay"] = weight_decay


def restore_optimizer(optimizer: torch.optim.Optimizer, content: dict[str, Any]) -> None:
    """Load the moments from a state dict, made with fused steps or not, on a CPU or a GPU.

    They get their parameters' memory format, as fused steps pair both in memory order and channels_last may have
    changed since. Hyperparameters are kept.
    """
    groups = [
        {**theirs, **{key: own[key] for key in KEPT & own.keys()}}
        for theirs, own in zip(content["param_groups"], optimizer.param_groups, strict=True)
    ]
    optimizer.load_state_dict({**content, "param_groups": groups})
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
