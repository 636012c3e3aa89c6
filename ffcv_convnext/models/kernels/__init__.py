"""Triton kernels for the network's memory-bound parts, each with a plain PyTorch twin. docs/kernels.md lists them.

Only `triton_operations` imports Triton, and with it the kernels.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from ffcv_convnext.models.kernels.fused_branch import fuse_blocks
from ffcv_convnext.models.kernels.twins import TWINS, Operations

__all__ = ["TWINS", "Operations", "fuse_blocks", "triton_operations", "use_triton"]


def triton_operations() -> Operations:
    """Return the kernels. Raises ValueError if Triton is not installed."""
    if find_spec("triton") is None:
        raise ValueError("kernels = triton: the package triton is not installed; install it, or use --kernels torch")
    from ffcv_convnext.models.kernels import block, depthwise, mlp, norm

    return Operations(
        depthwise.depthwise_conv2d,
        norm.depthwise_layer_norm,
        norm.depthwise_normalise,
        mlp.mlp,
        block.block,
    )


def use_triton(network: nn.Module) -> None:
    """Let the kernels compute the blocks of a `ResNet`, in place; parameters and state dict stay the same.

    Raises ValueError if Triton is not installed.
    """
    fuse_blocks(network, triton_operations())
