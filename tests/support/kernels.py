"""What the checks of the Triton kernels share; they run in a process with TRITON_INTERPRET=1, or on a GPU."""

from __future__ import annotations

import copy
import os
from typing import Any

import torch
from torch import Tensor
from triton.runtime.autotuner import Autotuner

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.models.kernels import depthwise, fuse_blocks, norm, triton_operations
from ffcv_convnext.models.resnet import Block

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
TRITON = triton_operations()
OPS = torch.ops.ffcv_convnext
CONVNEXT: dict[str, Any] = {
    "resnet_depthwise": True,
    "resnet_block": "inverted",
    "resnet_conv_first": True,
    "resnet_kernel_size": 7,
    "resnet_act_layer": "gelu",
    "resnet_del_act": True,
    "resnet_reorg_norm": True,
    "resnet_norm_layer": "ln",
    "resnet_ls_init_values": 0.5,
}


CONFIGS = list(depthwise.CONFIGS)
if DEVICE == "cpu":  # nothing to time under the interpreter; triton 3.6 would ask a GPU's driver
    for module in (depthwise, norm):
        for kernel in vars(module).values():
            if isinstance(kernel, Autotuner):
                del kernel.configs[1:]


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers; images in channels_last memory."""
    x = torch.randn(shape, device=DEVICE).to(dtype)
    return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x


def gradients(block: torch.nn.Module, x: Tensor, g: Tensor) -> dict[str, Tensor]:
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # stochastic depth's draws
    y = block(x)
    y.backward(g)
    assert x.grad is not None
    parameters = {name.removeprefix("_orig_mod."): p.grad for name, p in block.named_parameters()}
    return {"result": y.detach(), "x": x.grad, **parameters}  # type: ignore[dict-item]


def build_block(config: ModelConfig, width_in: int, width: int, stride: int, drop_path: float) -> Block:
    """A block whose parameters are all random: fresh norms and scales would hide mistakes."""
    block = Block(config, width_in, width, stride, drop_path)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return block.to(DEVICE, memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]


def check_block(block: Block, x: Tensor, g: Tensor) -> Tensor:
    """The fused block agrees with the block in float64 in its result, which it returns, and in all gradients."""
    fused = copy.deepcopy(block)
    fuse_blocks(fused, TRITON)
    expected = gradients(block.double(), x.double(), g.double())
    found = gradients(fused, x, g)
    assert list(found) == list(expected)
    for name, exact in expected.items():
        error = ((found[name].double() - exact).abs().max() / exact.abs().max()).item()
        assert error < 1e-5, f"{name}: {error:.1e}"
        assert found[name].stride() == exact.stride(), name
    return found["result"]
