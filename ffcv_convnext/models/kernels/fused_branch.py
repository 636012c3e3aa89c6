"""A residual branch in few operations, each of them a kernel or its twin."""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple, TypeGuard, TypeVar

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from ffcv_convnext.models.kernels.launch import autocast_type
from ffcv_convnext.models.kernels.twins import Operations, add_branch, fold
from ffcv_convnext.models.layers import LayerNorm2d, LayerScale, PointwiseConv2d
from ffcv_convnext.models.resnet import Block, Branch

Part = TypeVar("Part", bound=nn.Module)


class Mlp(NamedTuple):
    """Two pointwise convolutions and the activation between them."""

    first: PointwiseConv2d
    gelu: bool  # else ReLU
    second: PointwiseConv2d


class FusedBranch(Branch):
    """A `Branch` in few operations. It has the same parts, so parameters and state dict stay the same.

    Fused are depthwise convolution and LayerNorm; the two pointwise convolutions at the branch's end with the
    activation between them, stochastic depth and the sum; and all of this where the shortcut is the input. Gain and
    offset of the LayerNorm before, and layer scale behind, are multiplied into the weights of the pointwise
    convolutions. Other parts run unchanged.

    Computes what `Branch` does up to rounding: under autocast the norm's result has autocast's data type, not float32,
    and a weight is rounded after it is multiplied.
    """

    def __init__(self, branch: Branch, operations: Operations) -> None:
        super().__init__(OrderedDict(branch.named_children()))
        self.operations = operations
        self.train(branch.training)

    def forward(self, x: Tensor, shortcut: Tensor) -> Tensor:  # type: ignore[override]
        """Return shortcut + branch(x)."""
        operations, parts = self.operations, list(self)
        scale, drop_path = _take(parts, LayerScale), _take(parts, DropPath)
        gamma = None if scale is None else scale.gamma
        keep = None if drop_path is None else _draw(drop_path, x)
        mlp = _take_mlp(parts)
        if mlp is None:
            x, _ = self._run(parts, x, fold=False)
            return add_branch(shortcut, x, gamma, keep)
        dtype = autocast_type(x)
        result = torch.promote_types(
            shortcut.dtype, dtype if gamma is None else torch.promote_types(dtype, gamma.dtype)
        )
        # permuted first, so that the weights' gradients get the memory layout of channels_last weights
        weight1, weight2 = (part.weight.permute(0, 2, 3, 1).flatten(1) for part in (mlp.first, mlp.second))
        bias1, bias2 = mlp.first.bias, mlp.second.bias
        if shortcut is x and len(parts) == 2:
            conv, norm = parts
            if _is_depthwise(conv) and conv.stride[0] == 1 and isinstance(norm, LayerNorm2d):
                return operations.block(
                    x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps, weight1, bias1, weight2, bias2,
                    gamma, keep, mlp.gelu, dtype, result,
                )  # fmt: skip
        x, left = self._run(parts, x, fold=True)
        gain, offset = (None, None) if left is None else (left.weight, left.bias)
        weights = fold(weight1, bias1, gain, offset, weight2, bias2, gamma, dtype)
        return operations.mlp(x.to(dtype), *weights, keep, shortcut, mlp.gelu, result)

    def _run(self, parts: list[nn.Module], x: Tensor, *, fold: bool) -> tuple[Tensor, LayerNorm2d | None]:
        """Run the parts; return the result, and the norm at their end whose gain and offset are left out, if any."""
        while parts:
            part = parts.pop(0)
            if not _is_depthwise(part):
                x = part(x)
                continue
            weight, bias, stride = part.weight, part.bias, part.stride[0]
            if not (parts and isinstance(norm := parts[0], LayerNorm2d)):
                x = self.operations.depthwise_conv2d(x, weight, bias, stride)
                continue
            parts.pop(0)
            if fold and not parts:
                return self.operations.depthwise_normalise(x, weight, bias, stride, norm.eps), norm
            x = self.operations.depthwise_layer_norm(x, weight, bias, stride, norm.weight, norm.bias, norm.eps)
        return x, None

    def count_fused(self, result: Tensor) -> int:
        """Return the multiply-accumulates of the convolutions that are not called as modules: hooks miss them."""
        parts = list(self)
        _take(parts, LayerScale), _take(parts, DropPath)
        mlp = _take_mlp(parts)
        fused = [part for part in parts if _is_depthwise(part)] + ([] if mlp is None else [mlp.first, mlp.second])
        return len(result) * result.shape[2] * result.shape[3] * sum(part.weight.numel() for part in fused)


def _take(parts: list[nn.Module], kind: type[Part]) -> Part | None:
    """Remove the part of this kind from the list and return it; None if there is none."""
    for i, part in enumerate(parts):
        if isinstance(part, kind):
            del parts[i]
            return part
    return None


def _take_mlp(parts: list[nn.Module]) -> Mlp | None:
    """Remove two pointwise convolutions and the activation between them from the end of the list, and return them."""
    match parts[-3:]:
        case [PointwiseConv2d() as first, (nn.GELU() | nn.ReLU()) as activation, PointwiseConv2d() as second]:
            del parts[-3:]
            return Mlp(first, isinstance(activation, nn.GELU), second)
    return None


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
