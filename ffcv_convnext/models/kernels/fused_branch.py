"""A residual branch in few operations, each of them a kernel or its twin."""

from __future__ import annotations

from collections import OrderedDict
from typing import TypeGuard

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ffcv_convnext.models.kernels.twins import Operations
from ffcv_convnext.models.layers import LayerNorm2d, LayerScale
from ffcv_convnext.models.resnet import Block, Branch


class FusedBranch(Branch):
    """A `Branch` that fuses depthwise convolution and LayerNorm, and layer scale, stochastic depth and sum.

    It has the same parts, so parameters and state dict stay the same; other kinds of parts run unchanged. Computes what
    `Branch` does up to rounding: under autocast the norm's result has autocast's data type, not float32.
    """

    def __init__(self, branch: Branch, operations: Operations) -> None:
        super().__init__(OrderedDict(branch.named_children()))
        self.operations = operations
        self.train(branch.training)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:  # type: ignore[override]
        """Return shortcut + branch(x)."""
        gamma = keep = None
        parts = list(self)
        while parts:
            part = parts.pop(0)
            if _is_depthwise(part):
                weight, bias, stride = part.weight, part.bias, part.stride[0]
                if parts and isinstance(norm := parts[0], LayerNorm2d):
                    x = self.operations.depthwise_layer_norm(x, weight, bias, stride, norm.weight, norm.bias, norm.eps)
                    parts.pop(0)
                else:
                    x = self.operations.depthwise_conv2d(x, weight, bias, stride)
            elif isinstance(part, LayerScale):
                gamma = part.gamma
            elif isinstance(part, DropPath):
                keep = _draw(part, x)
            else:
                x = part(x)
        return self.operations.add_branch(shortcut, x, gamma, keep)

    def count_depthwise(self, result: Tensor) -> int:
        """Return the multiply-accumulates of the depthwise convolution, of which hooks see no call."""
        pixels = len(result) * result.shape[2] * result.shape[3]
        return pixels * sum(part.weight.numel() for part in self if _is_depthwise(part))


def _is_depthwise(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(part, nn.Conv2d) and part.groups == part.in_channels == part.out_channels > 1


def _draw(part: DropPath, x: Tensor) -> Tensor | None:
    """Draw the factors by which DropPath multiplies x's samples: (N,), at least float32; None if it does nothing."""
    if not part.training or part.drop_prob == 0:
        return None
    kept = 1 - part.drop_prob
    factors = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return factors.bernoulli_(kept).div_(kept)


def fuse_blocks(network: nn.Module, operations: Operations) -> None:
    """Replace the branch of each `Block`, in place, by a `FusedBranch` of the same parts."""
    for block in network.modules():
        if isinstance(block, Block):
            block.branch = FusedBranch(block.branch, operations)
