"""A residual block in few operations, each of them a kernel or its twin."""

from __future__ import annotations

from typing import TypeGuard

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ffcv_convnext.models.kernels.twins import Operations
from ffcv_convnext.models.layers import LayerNorm2d, LayerScale
from ffcv_convnext.models.resnet import Block


class FusedBlock(nn.Module):
    """A `Block` whose depthwise convolution, with the LayerNorm after it, and residual sum are one operation each.

    It takes over the block's parts, so that parameters and state dict stay; parts of other kinds run as they are.
    x and the result as in `Block`, computed alike but for rounding: with autocast the norm's result has autocast's
    data type, not float32.
    """

    def __init__(self, block: Block, operations: Operations) -> None:
        super().__init__()
        self.branch, self.shortcut, self.act = block.branch, block.shortcut, block.act
        self.operations = operations
        self.train(block.training)

    def forward(self, x: Tensor) -> Tensor:
        shortcut, y = self.shortcut(x), x
        gamma = keep = None
        parts = list(self.branch)
        while parts:
            part = parts.pop(0)
            if _is_depthwise(part):
                weight, bias, stride = part.weight, part.bias, part.stride[0]
                if parts and isinstance(norm := parts[0], LayerNorm2d):
                    y = self.operations.depthwise_layer_norm(y, weight, bias, stride, norm.weight, norm.bias, norm.eps)
                    parts.pop(0)
                else:
                    y = self.operations.depthwise_conv2d(y, weight, bias, stride)
            elif isinstance(part, LayerScale):
                gamma = part.gamma
            elif isinstance(part, DropPath):
                keep = _draw(part, y)
            else:
                y = part(y)
        result: Tensor = self.act(self.operations.add_branch(shortcut, y, gamma, keep))
        return result

    def count_depthwise(self, result: Tensor) -> int:
        """Multiply-accumulates of the depthwise convolution behind a result of this block; no hook sees its call."""
        pixels = len(result) * result.shape[2] * result.shape[3]
        return pixels * sum(part.weight.numel() for part in self.branch if _is_depthwise(part))


def _is_depthwise(part: nn.Module) -> TypeGuard[nn.Conv2d]:
    return isinstance(part, nn.Conv2d) and part.groups == part.in_channels == part.out_channels > 1


def _draw(part: DropPath, x: Tensor) -> Tensor | None:
    """The factors by which DropPath would multiply x's samples, drawn alike: (N,), float32 at least; None for none."""
    if not part.training or part.drop_prob == 0:
        return None
    kept = 1 - part.drop_prob
    factors = x.new_empty(len(x), dtype=torch.promote_types(x.dtype, torch.float32))
    return factors.bernoulli_(kept).div_(kept)


def fuse_blocks(network: nn.Module, operations: Operations) -> None:
    """Replace each `Block` in the network, in place, by a `FusedBlock` of the same parts."""
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Block):
                setattr(parent, name, FusedBlock(child, operations))
