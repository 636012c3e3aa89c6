"""The kernels' place in the network, their twins, and, in a separate process, the kernels themselves."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY
from support.runs import config_from
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ffcv_convnext.config import Config, load_config
from ffcv_convnext.models import ResNet, build_model, count_gmacs, kernels, use_triton
from ffcv_convnext.models.kernels import TWINS, fuse_blocks
from ffcv_convnext.models.kernels.fused_branch import FusedBranch
from ffcv_convnext.models.resnet import Block
from ffcv_convnext.training.run import train

ROOT = REPOSITORY
STEPS = sorted((ROOT / "rn_configs").glob("[0-9c]*.yaml"))


def small(path: Path) -> ResNet:
    config = load_config(path).model
    config = dataclasses.replace(config, resnet_layers=(1, 2, 1, 1), resnet_embed_dim=8, drop_path=0.4)
    if config.resnet_ls_init_values > 0:
        config = dataclasses.replace(config, resnet_ls_init_values=0.5)  # 1e-6 would hide the branch
    network = build_model(config, 5).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert isinstance(network, ResNet)
    return network


def learn(network: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    torch.manual_seed(1)  # stochastic depth's draws
    logits = network(images)
    logits.square().sum().backward()
    return logits.detach(), {name: p.grad for name, p in network.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_fused_branches_compute_the_same_in_every_step(path: Path) -> None:
    torch.manual_seed(0)
    network = small(path)
    fused = copy.deepcopy(network)
    fuse_blocks(fused, TWINS)
    assert list(fused.state_dict()) == list(network.state_dict())
    assert count_gmacs(fused, 64) == count_gmacs(network, 64)
    assert all(isinstance(module.branch, FusedBranch) for module in fused.modules() if isinstance(module, Block))
    images = torch.randn(4, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    (expected, gradients), (logits, found) = learn(network.double(), images), learn(fused.double(), images)
    torch.testing.assert_close(logits, expected)
    assert found.keys() == gradients.keys() == dict(network.named_parameters()).keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, msg=lambda text, name=name: f"{name}: {text}")
    torch.testing.assert_close(fused.eval()(images), network.eval()(images))


def test_weights_and_averages_move_between_fused_and_plain_networks() -> None:
    network = small(ROOT / "rn_configs" / "convnext_tiny.yaml")
    fused = copy.deepcopy(network).eval()
    fuse_blocks(fused, TWINS)
    assert not any(module.training for module in fused.modules())
    average = ModelEmaV3(fused, decay=0.5)
    branches = [module for module in average.module.modules() if isinstance(module, FusedBranch)]
    assert len(branches) == 5
    assert branches[0].operations == TWINS
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.add_(1.0)
    average.update(fused)
    network.load_state_dict(average.module.state_dict())
    gamma = network.get_parameter("stages.0.blocks.0.branch.scale.gamma")
    assert (gamma == 0.5 + 0.5 * 1.0).all()


def test_a_fused_network_compiles_into_one_graph() -> None:
    network = small(ROOT / "rn_configs" / "convnext_tiny.yaml")
    fuse_blocks(network, TWINS)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    compiled: nn.Module = torch.compile(network, fullgraph=True, backend="eager")  # type: ignore[assignment]
    (expected, _), (logits, _) = learn(network, images), learn(compiled, images)
    torch.testing.assert_close(logits, expected)


@pytest.mark.parametrize(
    ("device", "enabled", "expected"),
    [("cpu", True, torch.bfloat16), ("cpu", False, torch.float32), ("meta", True, torch.float32)],
)
def test_autocasts_type_is_read_inside_one_graph(device: str, enabled: bool, expected: torch.dtype) -> None:
    pytest.importorskip("triton")
    from ffcv_convnext.models.kernels.launch import autocast_type

    read = torch.compile(lambda x: x.to(autocast_type(x)), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
        assert read(torch.ones(2, device=device)).dtype == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "convnext_tiny"}, "kernels = triton does not support model = convnext_tiny; use --kernels torch"),
        ({"channels_last": False}, "kernels = triton needs --channels_last true"),
        ({"opt": "lamb"}, "kernels = triton does not support opt = lamb; use --kernels auto"),
    ],
)
def test_settings_that_exclude_the_kernels_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.from_flat({"kernels": "triton", **settings})


def test_the_kernels_are_refused_on_a_cpu_and_without_triton(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match="kernels = triton needs a CUDA device; use --kernels torch on a CPU"):
        train(config_from(small_settings, output_dir=str(tmp_path / "run"), kernels="triton"))
    monkeypatch.setattr(kernels, "find_spec", {}.get)
    with pytest.raises(ValueError, match="the package triton is not installed; install it, or use --kernels torch"):
        use_triton(nn.Identity())


def run_checks(which: str, **environment: str) -> None:
    """Run kernel_checks.py in a new process; its output is the error's text."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        which,
        "tests/models/kernel_checks.py",
    ]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_agree_with_their_twins_under_tritons_interpreter(which: str) -> None:
    run_checks(which, TRITON_INTERPRET="1")


def compile_kernel(kernel: Any, architecture: int, warps: int, **args: Any) -> bytes:
    """Machine code for a GPU that need not be there. args: a type ("*bf16", "i32") or a constant for each argument."""
    from triton import JITFunction, compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    while not isinstance(kernel, JITFunction):
        kernel = kernel.fn
    types = {name: args[name] if isinstance(args[name], str) else "constexpr" for name in kernel.arg_names}
    constants = {name: value for name, value in args.items() if not isinstance(value, str)}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(types) if types[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=aligned)
    options = {"num_warps": warps, "enable_fp_fusion": True}
    code: bytes = compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]
    return code


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_gpus_and_keep_their_numbers_in_registers(architecture: int, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    from ffcv_convnext.models.kernels import depthwise, norm, residual

    side: dict[str, Any] = {"H": 14, "W": 14, "OUT_H": 14, "OUT_W": 14, "C": 384, "K": 7, "STRIDE": 1}
    conv: dict[str, Any] = {"x": "*bf16", "weight": "*fp32", "bias": "*fp32", "out": "*bf16", "num_images": "i32"}
    kernels: list[tuple[Any, int, dict[str, Any]]] = [
        (depthwise._convolve, config.num_warps, {**conv, **side, **config.kwargs, "SPREAD": 1, "FLIP": False})
        for config in depthwise.CONFIGS
    ]
    strips = {"num_strips": "i32", "strips_each": "i32", "ROWS": 7, "STRIPS": 1, "CHANNELS": 64, "COLUMNS": 7}
    kernels += [
        (depthwise._weight_gradient, 1, {"x": "*bf16", "g": "*bf16", "partial": "*fp32", **side, **strips}),
        (
            norm._convolve_and_normalise,
            4,
            {**conv, **side, "x": "*fp32", "gain": "*fp32", "offset": "*fp32", "sums_out": "*bf16", "eps": "fp32"}
            | {"mean_out": "*fp32", "rstd_out": "*fp32", "ROWS": 7, "STRIPS": 8, "CHANNELS": 128},
        ),
        (
            norm._norm_gradient,
            4,
            {"g": "*bf16", "sums": "*bf16", "mean": "*fp32", "rstd": "*fp32", "gain": "*fp32", "out": "*bf16"}
            | {"partial": "*fp32", "num_pixels": "i32", "pixels_each": "i32", "C": 384, "PIXELS": 4, "CHANNELS": 512},
        ),
        (
            residual._add,
            4,
            {"shortcut": "*fp32", "branch": "*bf16", "gamma": "*fp32", "keep": "*fp32", "out": "*fp32"}
            | {"VALUES": 14 * 14 * 384, "C": 384, "BLOCK": 1024},
        ),
        (
            residual._branch_gradient,
            4,
            {"g": "*fp32", "branch": "*bf16", "gamma": "*fp32", "keep": "*fp32", "out": "*bf16", "partial": "*fp32"}
            | {"num_pixels": "i32", "pixels_each": "i32", "IMAGE": 196, "C": 384, "PIXELS": 16, "CHANNELS": 128},
        ),
    ]
    for kernel, warps, args in kernels:
        code = tmp_path / "kernel.cubin"
        code.write_bytes(compile_kernel(kernel, architecture, warps, **args))
        usage = subprocess.check_output([triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(code)], text=True)
        assert "STACK:0 " in usage, f"{args}: {usage}"  # what does not fit into registers lies on the stack


@pytest.mark.gpu
def test_the_kernels_agree_with_their_twins_on_a_gpu() -> None:
    run_checks("slow or not slow")
