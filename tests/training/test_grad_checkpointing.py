"""Gradient checkpointing changes memory only: losses, gradients and running statistics keep their bits."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_equal, assert_same_run, config_from, send_at_step, train_here
from torch import nn

from ffcv_convnext.config import ModelConfig
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.models import build_model
from ffcv_convnext.models.kernels import TWINS, fuse_blocks
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import Learner, train_step
from ffcv_convnext.training.run import build_learner

OURS = {"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "resnet_stem": "patch_embed", "drop_path": 0.5}
CONVNEXT = {
    **OURS,
    **{"resnet_block": "inverted", "resnet_conv_first": True, "resnet_depthwise": True, "resnet_norm_layer": "ln"},
    **{"resnet_ls_init_values": 1e-6, "resnet_sep_downsample": True, "resnet_reorg_norm": True},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "BatchNorm": OURS,
    "LayerNorm": CONVNEXT,
    "timm, BatchNorm": {"model": "test_resnet", "drop_path": 0.5},
    "timm, LayerNorm": {"model": "test_convnext", "drop_path": 0.5},
}


@pytest.fixture(autouse=True)
def _forget_graphs() -> Iterator[None]:
    yield
    torch.compiler.reset()


def build(**settings: Any) -> Learner:
    words = {"device": "cpu", "amp": "off", "batch_size": 4, "recipe_batch": 8, "update_freq": 2, "aa": "none"}
    config = config_from({**words, "input_size": 32, "lr": 1e-3, "warmup_epochs": 0, **settings})
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=5, steps_per_epoch=5)
    learner.model.train()
    return learner


def steps(learner: Learner) -> dict[str, Any]:
    """Loss, weights, buffers and moments after two optimiser steps of two micro-batches."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        images = torch.randint(0, 256, (2, 4, 32, 32, 3), generator=generator, dtype=torch.uint8).movedim(-1, 2)
        labels = torch.randint(0, 5, (2, 4), generator=generator)
        train_step(learner, zip(images, labels, strict=True))
        learner.state.step += 1
    learner.tracker.flush()
    return {
        "loss": learner.tracker.epoch.total,
        "network": learner.network.state_dict(),
        "optimizer": learner.optimizer.state_dict()["state"],
    }


def count_calls(network: nn.Module) -> list[int]:
    """A list of one number, which counts the convolutions inside of blocks from now on."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d) and "stem" not in name and "downsample" not in name:
            module.register_forward_hook(count)
    return calls


@pytest.mark.parametrize("name", NETWORKS)
def test_steps_have_the_same_bits_and_blocks_are_computed_twice(name: str) -> None:
    results, calls = [], []
    for enabled in (False, True):
        learner = build(**NETWORKS[name], grad_checkpointing=enabled)
        calls.append(count_calls(learner.network))
        results.append(steps(learner))
    assert_equal(results[1], results[0])
    assert calls[1][0] > 1.6 * calls[0][0] > 0  # timm's ResNet has a convolution outside of its stages
    counters = [value for key, value in results[1]["network"].items() if "num_batches" in key]
    assert all(value == 4 for value in counters)
    assert bool(counters) == ("BatchNorm" in name)


def test_the_kernels_branch_is_checkpointed_too() -> None:
    results = []
    for enabled in (False, True):
        learner = build(**CONVNEXT, grad_checkpointing=enabled)
        fuse_blocks(learner.network, TWINS)
        results.append(steps(learner))
    assert_equal(results[1], results[0])


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["bn", "ln"])
def test_one_compiled_graph_computes_the_same(norm: str) -> None:
    """Backend aot_eager: the graphs of torch.compile, computed by the same operations."""
    results = []
    for enabled in (False, True):
        learner = build(**OURS, resnet_norm_layer=norm, grad_checkpointing=enabled)
        if enabled:
            learner.model = torch.compile(  # type: ignore[assignment]
                learner.network, backend="aot_eager", fullgraph=True, dynamic=False
            ).train()
        results.append(steps(learner))
    assert_equal(results[1], results[0])


def test_an_evaluation_computes_blocks_once() -> None:
    model = build_model(ModelConfig(resnet_layers=(1, 1, 1, 1), resnet_embed_dim=8, grad_checkpointing=True), 5).eval()
    calls = count_calls(model)
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert calls == [4 * 4]  # four blocks with three convolutions and one in the shortcut


def test_a_network_without_it_is_refused() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match=r"grad_checkpointing = true does not support .* vgg11;"):
        build_model(ModelConfig(model="vgg11", grad_checkpointing=True), 5)


def test_a_run_may_continue_with_it(small_settings: dict[str, Any], tmp_path: Path) -> None:
    train_here(small_settings, output_dir=tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 7, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_here(small_settings, output_dir=tmp_path / "other")
    train_here(small_settings, output_dir=tmp_path / "other", grad_checkpointing=True)
    assert_same_run(tmp_path / "other", tmp_path / "one")
