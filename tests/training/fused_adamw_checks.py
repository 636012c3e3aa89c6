"""The kernel of AdamW against torch's, natively on a GPU, else under Triton's interpreter.

test_fused_adamw.py runs this file in a separate process: TRITON_INTERPRET must be set before Triton is imported.
"""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from ffcv_convnext.config import OptimConfig
from ffcv_convnext.training.fused_adamw import FusedAdamW, fuse_adamw
from ffcv_convnext.training.kernels.adamw import BLOCK, CHUNK
from ffcv_convnext.training.optim import build_optimizer, restore_optimizer, set_hyperparameters

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"


class Small(nn.Module):
    """Parameters of more than one chunk, of less than a block, in channels_last, frozen, without gradient; buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.head = nn.Linear(100, (CHUNK + BLOCK + 300) // 100)
        self.unused = nn.Parameter(torch.randn(7))
        self.frozen = nn.Parameter(torch.randn(9), requires_grad=False)
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def pair(**settings: Any) -> tuple[Small, ModelEmaV3, torch.optim.Optimizer]:
    network = Small().to(DEVICE)
    ema = ModelEmaV3(network, decay=0.9)
    return network, ema, build_optimizer(network, OptimConfig(weight_decay=0.05, **settings))


def give_gradients(networks: list[nn.Module], step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    names = [name for name, p in networks[0].named_parameters() if p.requires_grad and name != "unused"]
    for name in names:
        shape = networks[0].get_parameter(name).shape
        gradient = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (step % 3 - 3) * scale
        for network in networks:
            p = network.get_parameter(name)
            p.grad = torch.empty_like(p).copy_(gradient)
    for network in networks:
        network.norm.running_mean += step + 1.0  # type: ignore[operator, union-attr]
        network.norm.num_batches_tracked += 1  # type: ignore[operator, union-attr]


def tensors(network: nn.Module, ema: ModelEmaV3 | None, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """All numbers that a step may change, by name."""
    found = dict(network.state_dict())
    if ema is not None:
        found |= {f"ema.{name}": value for name, value in ema.module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        found |= {f"{number}.{name}": value for name, value in state.items()}
    return found


def assert_same(found: dict[str, Tensor], exact: dict[str, Tensor], *, tolerance: float = 3e-6) -> None:
    assert found.keys() == exact.keys()
    for name, value in exact.items():
        error = (found[name].double() - value.double()).abs().max().item()
        assert error <= tolerance * max(value.double().abs().max().item(), 1e-30), f"{name}: {error:.1e}"


def steps(parts: tuple[Any, ModelEmaV3 | None, torch.optim.Optimizer], numbers: range, scaler: Any = None) -> None:
    network, ema, optimizer = parts
    for step in numbers:
        give_gradients([network], step, 1.0 if scaler is None else scaler.get_scale())
        set_hyperparameters(optimizer, lr=1e-2 / (step + 1), weight_decay=0.05 * (step + 1))
        if scaler is None:
            optimizer.step()
        else:
            scaler.scale(torch.zeros((), device=DEVICE))  # makes the scale's tensor
            scaler.step(optimizer)
            scaler.update()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None and not isinstance(optimizer, FusedAdamW):
            ema.update(network)


@pytest.mark.parametrize("settings", [{}, {"opt_betas": (0.0, 0.99), "opt_eps": 1e-3}], ids=["plain", "betas"])
def test_steps_equal_adamw_in_float64_and_float32(settings: dict[str, Any]) -> None:
    network, ema, _ = pair(**settings)
    fused = build_optimizer(network, OptimConfig(weight_decay=0.05, **settings), triton=True, ema=ema)
    plain = pair(**settings)
    double = Small().double().to(DEVICE)
    exact = double, ModelEmaV3(double, decay=0.9), build_optimizer(double, OptimConfig(weight_decay=0.05, **settings))
    for parts in ((network, ema, fused), plain, exact):
        steps(parts, range(5))
    assert_same(tensors(network, ema, fused), tensors(*exact))
    assert_same(tensors(network, ema, fused), tensors(*plain))
    assert network.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ema.module.frozen, network.frozen)  # type: ignore[arg-type]
    assert ema.module.norm.num_batches_tracked == 5  # type: ignore[union-attr]
    assert network.unused not in fused.state


def test_without_averages_the_weights_are_the_same() -> None:
    network, _, optimizer = pair()
    plain, _, reference = pair()
    fused = fuse_adamw(optimizer)
    for parts in ((network, None, fused), (plain, None, reference)):
        steps(parts, range(3))
    assert_same(tensors(network, None, fused), tensors(plain, None, reference))


@pytest.mark.parametrize("first", ["torch", "fused"])
def test_either_optimiser_continues_the_other_s_checkpoint(first: str) -> None:
    expected = pair()
    steps(expected, range(4))
    network, ema, optimizer = pair()
    before = fuse_adamw(optimizer, network, ema) if first == "fused" else optimizer
    steps((network, ema, before), range(2))
    state = copy.deepcopy(before.state_dict())
    after = build_optimizer(network, OptimConfig(weight_decay=0.05))
    after = fuse_adamw(after, network, ema) if first == "torch" else after
    restore_optimizer(after, state)
    steps((network, ema, after), range(2, 4))
    assert_same(tensors(network, ema, after), tensors(*expected))


def scaler() -> Any:
    return torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=100)


def test_a_loss_scale_is_divided_out_and_infinite_gradients_skip_the_step() -> None:
    network, ema, optimizer = pair()
    fused = fuse_adamw(optimizer, network, ema)
    plain = pair()
    ours, theirs = scaler(), scaler()
    steps((network, ema, fused), range(2), ours)
    steps(plain, range(2), theirs)
    assert_same(tensors(network, ema, fused), tensors(*plain))
    before = copy.deepcopy(tensors(network, None, fused))
    give_gradients([network, plain[0]], 2)
    for one in (network, plain[0]):
        one.head.weight.grad[0, 0] = torch.inf  # type: ignore[index]
    for chosen, scales in ((fused, ours), (plain[2], theirs)):
        scales.step(chosen)
        scales.update()
    plain[1].update(plain[0])
    for name, value in tensors(network, None, fused).items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(value, before[name]), name
    assert ours.get_scale() == theirs.get_scale() == 512.0
    assert_same(tensors(network, ema, fused), tensors(*plain))
    steps((network, ema, fused), range(3, 5), ours)
    steps(plain, range(3, 5), theirs)
    assert_same(tensors(network, ema, fused), tensors(*plain))


def test_gradients_and_averages_in_another_memory_order_or_place_are_taken_by_position() -> None:
    network, ema, optimizer = pair()
    ema.module.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    assert ema.module.conv.weight.stride() != network.conv.weight.stride()  # type: ignore[union-attr]
    fused = fuse_adamw(optimizer, network, ema)
    plain = pair()
    flat = torch.zeros(20_000, device=DEVICE)
    for step in range(2):
        give_gradients([network, plain[0]], step)
        network.conv.weight.grad = network.conv.weight.grad.contiguous()  # type: ignore[union-attr]
        head = network.head.weight
        head.grad = flat[1 + step : 1 + step + head.numel()].view_as(head).copy_(head.grad)  # no multiple of 16 bytes
        for chosen in (fused, plain[2]):
            set_hyperparameters(chosen, lr=1e-2, weight_decay=0.1)
            chosen.step()
        plain[1].update(plain[0])
    assert_same(tensors(network, ema, fused), tensors(*plain))


def test_layer_decay_gives_each_group_its_learning_rate() -> None:
    network, ema, optimizer = pair()
    plain = pair()
    fused = fuse_adamw(optimizer, network, ema)
    for chosen in (fused, plain[2]):
        for number, group in enumerate(chosen.param_groups):
            group["lr_scale"] = 0.5 ** (number + 1)
    steps((network, ema, fused), range(3))
    steps(plain, range(3))
    assert_same(tensors(network, ema, fused), tensors(*plain))


def test_bias_corrections_are_exact_after_the_first_and_after_many_steps() -> None:
    for count in (0.0, 10.0, 600.0, 1e5):
        network, ema, optimizer = pair()
        fused, plain = fuse_adamw(optimizer, network, ema), pair()
        for parts in ((network, ema, fused), plain):
            steps(parts, range(1))
            for state in parts[2].state.values():
                state["step"].fill_(count)
            steps(parts, range(1, 2))
        assert_same(tensors(network, ema, fused), tensors(*plain), tolerance=1e-6)
