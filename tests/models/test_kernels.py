"""The kernels' place in the network, their twins, and, in a separate process, the kernels themselves."""

from __future__ import annotations

import copy
import dataclasses
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from support import REPOSITORY
from support.ptx import compile_kernel
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


class Compiled(NamedTuple):
    """A kernel with all its constants, as a network launches it."""

    kernel: Any
    warps: int
    max_registers: int | None
    args: dict[str, Any]  # the types of its tensors and numbers, and its constants


def depthwise_kernels(side: int, c: int, k: int, stride: int, *, x: str = "*bf16") -> Iterator[Compiled]:
    """Yield each kernel that a depthwise convolution of x (N, c, side, side) may launch, in every configuration.

    x: the type of the block's input and its gradient; the results have 16 bits.
    """
    from ffcv_convnext.models.kernels import depthwise, norm
    from ffcv_convnext.models.kernels.strips import MAX_REGISTERS

    out = -(-side // stride)
    shape: dict[str, Any] = {"H": side, "W": side, "OUT_H": out, "OUT_W": out, "C": c, "K": k, "STRIDE": stride}
    turned = {**shape, "H": out, "W": out, "OUT_H": side, "OUT_W": side, "STRIDE": 1}
    conv: dict[str, Any] = {"x": x, "weight": "*fp32", "bias": "*fp32", "out": "*bf16", "num_images": "i32"}
    forward = {**conv, **shape, "addend": None, "SPREAD": 1, "FLIP": False}
    backward = {**conv, **turned, "x": "*bf16", "bias": None, "addend": x, "out": x, "SPREAD": stride, "FLIP": True}
    on_a_gpu = SimpleNamespace(is_cuda=True)
    for args in (forward, backward):
        for config in depthwise.candidates(depthwise.CONFIGS, {**args, "x": on_a_gpu}):
            yield Compiled(depthwise._convolve, config.num_warps, config.maxnreg, {**args, **config.kwargs})
    strips = {"x": x, "g": "*bf16", "partial": "*fp32", "num_strips": "i32", "strips_each": "i32"}
    for kernel, args, tile in [
        (depthwise._weight_gradient, {**strips, **shape}, depthwise.weight_tile(c, out, k, stride)),
        (
            norm._convolve_and_normalise,
            {**conv, **shape, "rstd_out": "*fp32", "eps": "fp32"},
            norm.tile(c, k),
        ),
        (
            norm._normalised_gradient,
            {"g": "*bf16", "normal": "*bf16", "rstd": "*fp32", "out": "*bf16", "partial": "*fp32", "C": c}
            | {"num_pixels": "i32", "pixels_each": "i32"},
            norm.gradient_tile(c),
        ),
    ]:
        yield Compiled(kernel, tile["num_warps"], MAX_REGISTERS, {**args, **tile})


def check_usage(kernels: Iterable[Compiled], architecture: int) -> None:
    """Nothing is spilled to memory, and a quarter of a multiprocessor's warps fit."""
    checked = 0
    for compiled in kernels:
        args = {**compiled.args, "num_warps": compiled.warps, "maxnreg": compiled.max_registers}
        usage = compile_kernel(compiled.kernel, architecture, **args)
        constants = {name: value for name, value in compiled.args.items() if isinstance(value, int)}
        text = f"{compiled.kernel.fn} {constants}, {compiled.args.get('x')}: {usage}"
        assert usage.spilled == 0, text
        assert usage.warps >= 16, text
        checked += 1
    assert checked > 1


CONVNEXT = [(56, 96), (28, 192), (14, 384), (7, 768)]  # the stages: side and width


@pytest.mark.parametrize(("side", "c", "stride", "x"), [(56, 96, 1, "*fp32"), (14, 384, 1, "*bf16")])
def test_a_convnexts_kernels_keep_their_numbers_in_registers(side: int, c: int, stride: int, x: str) -> None:
    pytest.importorskip("triton")
    check_usage(depthwise_kernels(side, c, 7, stride, x=x), 90)


def depthwise_shapes() -> set[tuple[int, int, int, int]]:
    """Side, width, kernel and stride of each depthwise convolution of the ladder."""
    shapes = set()

    def add(module: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        shapes.add((inputs[0].shape[2], module.in_channels, module.kernel_size[0], module.stride[0]))

    for path in STEPS:
        with torch.device("meta"):
            network = build_model(load_config(path).model, 5)
        for module in network.modules():
            if isinstance(module, nn.Conv2d) and module.groups > 1:
                module.register_forward_hook(add)
        network(torch.empty(1, 3, 224, 224, device="meta"))
    return shapes


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [80, 90])
def test_every_shape_of_the_ladder_keeps_its_numbers_in_registers(architecture: int) -> None:
    pytest.importorskip("triton")
    shapes = depthwise_shapes()
    assert {(56, 96, 7, 1), (56, 64, 3, 1), (14, 3072, 3, 2)} < shapes
    if architecture == 80:
        shapes = {(side, c, 7, stride) for side, c in CONVNEXT for stride in (1, 2)}
    kernels = [kernel for shape in sorted(shapes) for kernel in depthwise_kernels(*shape)]
    check_usage(kernels, architecture)


@pytest.mark.slow
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5, 7, 9, 11])
def test_every_kernel_size_keeps_its_numbers_in_registers(k: int, stride: int) -> None:
    pytest.importorskip("triton")
    for side, c in [(56 * stride, 96), (7, 1024)]:
        check_usage(depthwise_kernels(side, c, k, stride, x="*fp32"), 90)


@pytest.mark.gpu
def test_the_kernels_agree_with_their_twins_on_a_gpu() -> None:
    run_checks("slow or not slow")
