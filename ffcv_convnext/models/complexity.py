"""Number of parameters and multiply-accumulates of a network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ffcv_convnext.models.kernels.fused_branch import FusedBranch


def count_parameters(model: nn.Module) -> int:
    """Count trainable and frozen parameters; a shared one counts once."""
    return sum(parameter.numel() for parameter in model.parameters())


def count_gmacs(model: nn.Module, input_size: int = 224) -> float:
    """Count multiply-accumulates of convolutions and linear layers for one image, in 10^9 (the paper's "GFLOPs").

    input_size: side of the square image, pixels. Runs on the meta device, in evaluation mode: nothing is computed,
    and the model is unchanged afterwards. Matrix products outside of layers (attention) do not count.
    """
    macs = 0

    def count(module: nn.Module, _: Any, output: Tensor) -> None:
        nonlocal macs
        if isinstance(module, FusedBranch):
            macs += module.count_fused(output)
        else:
            assert isinstance(module, nn.Conv2d | nn.Linear)
            macs += output.numel() * module.weight[0].numel()  # each output is a dot product with one filter

    counted = (nn.Conv2d, nn.Linear, FusedBranch)
    hooks = [module.register_forward_hook(count) for module in model.modules() if isinstance(module, counted)]
    training = [module for module in model.modules() if module.training]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    try:
        model.eval()
        with torch.no_grad(), torch.device("meta"):
            image = torch.empty(1, 3, input_size, input_size)
            functional_call(model, {name: tensor.to("meta") for name, tensor in tensors}, (image,))
    finally:
        for hook in hooks:
            hook.remove()
        for module in training:
            module.training = True
    return macs / 1e9
