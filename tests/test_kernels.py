"""The kernels' place in the network, their twins, and, in a process of its own, the kernels themselves."""

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
from conftest import config_from
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ffcv_convnext.config import Config, load_config
from ffcv_convnext.models import ResNet, build_model, kernels, use_triton
from ffcv_convnext.models.kernels import TWINS, fuse_blocks
from ffcv_convnext.models.kernels.block import FusedBlock
from ffcv_convnext.models.resnet import Block
from ffcv_convnext.training import train

ROOT = Path(__file__).parents[1]
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
def test_fused_blocks_compute_what_every_steps_blocks_do(path: Path) -> None:
    torch.manual_seed(0)
    network = small(path)
    fused = copy.deepcopy(network)
    fuse_blocks(fused, TWINS)
    assert list(fused.state_dict()) == list(network.state_dict())
    assert not any(isinstance(module, Block) for module in fused.modules())
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
    blocks = [module for module in average.module.modules() if isinstance(module, FusedBlock)]
    assert len(blocks) == 5
    assert blocks[0].operations == TWINS
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
    ("settings", "message"),
    [
        ({"model": "convnext_tiny"}, "kernels = triton has no meaning with model = convnext_tiny; use --kernels torch"),
        ({"channels_last": False}, "kernels = triton needs --channels_last true"),
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
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/kernel_checks.py"]
    result = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_agree_with_their_twins_under_tritons_interpreter(which: str) -> None:
    run_checks(which, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_the_kernels_agree_with_their_twins_on_a_gpu() -> None:
    run_checks("slow or not slow")
