"""The optimiser and its parameter groups; both are timm's."""

from __future__ import annotations

import torch
from timm.optim import create_optimizer_v2, list_optimizers
from torch import nn

from ffcv_convnext.config import OptimConfig, nearest


def build_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    """An optimiser over two groups: parameters of one dimension and biases have no weight decay.

    The learning rate is set before each step. Raises ValueError for a name timm does not know.
    """
    if config.opt.lower() not in list_optimizers():
        raise ValueError(f"opt = {config.opt}: timm has no such optimiser{nearest(config.opt, list_optimizers())}")
    extra = {} if config.opt_betas is None else {"betas": config.opt_betas}
    optimizer: torch.optim.Optimizer = create_optimizer_v2(
        network,
        opt=config.opt,
        lr=0.0,
        weight_decay=config.weight_decay,
        momentum=config.momentum,
        eps=config.opt_eps,
        **extra,
    )
    for group in optimizer.param_groups:
        group["decays"] = group["weight_decay"] > 0
    return optimizer


def set_hyperparameters(optimizer: torch.optim.Optimizer, *, lr: float, weight_decay: float) -> None:
    """Give every group this step's learning rate, and the decaying one its weight decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
        if group["decays"]:
            group["weight_decay"] = weight_decay
