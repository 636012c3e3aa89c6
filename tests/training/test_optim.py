"""Which parameters decay, and whether the settings reach the optimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import REPOSITORY
from torch import nn

from ffcv_convnext.config import ModelConfig, OptimConfig, load_config
from ffcv_convnext.models import build_model
from ffcv_convnext.training.optim import build_optimizer, restore_optimizer, set_hyperparameters


@pytest.fixture
def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2))


def optimiser(network: nn.Module, **settings: Any) -> torch.optim.Optimizer:
    return build_optimizer(network, OptimConfig(**settings), peak_lr=1e-3)


def decays(optimizer: torch.optim.Optimizer) -> dict[int, float]:
    return {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}


def test_parameters_of_one_dimension_and_biases_do_not_decay() -> None:
    """ConvNeXt-T in small: layer scale, LayerNorm and every bias are of one dimension."""
    words = {
        "resnet_layers": (1, 1, 1, 1), "resnet_stem": "patch_embed", "resnet_depthwise": True, "resnet_embed_dim": 8,
        "resnet_block": "inverted", "resnet_conv_first": True, "resnet_norm_layer": "ln",
        "resnet_ls_init_values": 1e-6, "resnet_sep_downsample": True,
    }  # fmt: skip
    network = build_model(ModelConfig(nb_classes=5, **words), num_classes=5)
    found = decays(optimiser(network))
    assert len(found) == len(list(network.parameters()))
    for name, parameter in network.named_parameters():
        expected = 0.0 if parameter.ndim <= 1 or name.endswith("bias") else 0.05
        assert found[id(parameter)] == expected, name


def test_adamw_gets_its_epsilon_betas_and_weight_decay(network: nn.Module) -> None:
    chosen = optimiser(network, opt_eps=1e-6, opt_betas=(0.8, 0.95), weight_decay=0.1)
    assert type(chosen) is torch.optim.AdamW
    for group in chosen.param_groups:
        assert group["eps"] == 1e-6
        assert group["betas"] == (0.8, 0.95)
    assert {group["weight_decay"] for group in chosen.param_groups} == {0.0, 0.1}
    assert optimiser(network).param_groups[0]["betas"] == (0.9, 0.999)


def test_an_adamw_step_is_the_formula_of_its_paper(network: nn.Module) -> None:
    """First step from zero moments: the gradient's sign, and lr x weight decay of the weight."""
    chosen = optimiser(network, weight_decay=0.1)
    set_hyperparameters(chosen, lr=0.01, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in network.named_parameters()}
    for p in network.parameters():
        p.grad = torch.where(torch.rand_like(p) < 0.5, -3.0, 3.0)
    chosen.step()
    for name, p in network.named_parameters():
        decay = 0.5 if p.ndim > 1 else 0.0
        assert p.grad is not None
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad.sign()
        assert torch.allclose(p, expected, atol=1e-6), name


@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "lamb", "lion", "rmsprop", "adan", "madgrad", "AdamW"])
def test_an_optimiser_of_timm_s_takes_a_step(network: nn.Module, name: str) -> None:
    chosen = optimiser(network, opt=name)
    assert {group["weight_decay"] for group in chosen.param_groups} == {0.0, 0.05}
    set_hyperparameters(chosen, lr=1e-3, weight_decay=0.05)
    before = network[0].weight.detach().clone()  # type: ignore[union-attr, operator]
    network(torch.randn(2, 3, 4, 4)).sum().backward()
    chosen.step()
    assert not torch.equal(before, network[0].weight)  # type: ignore[arg-type]


def test_momentum_reaches_sgd(network: nn.Module) -> None:
    chosen = optimiser(network, opt="sgd", momentum=0.8)
    assert {group["momentum"] for group in chosen.param_groups} == {0.8}


def test_an_unknown_optimiser_is_refused_with_similar_names(network: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"opt = adamww: timm has no such optimiser; did you mean .*adamw"):
        optimiser(network, opt="adamww")


@pytest.mark.parametrize("name", ["sgd", "adan"])
def test_betas_for_an_optimiser_that_takes_none_are_refused(network: nn.Module, name: str) -> None:
    with pytest.raises(ValueError, match=f"opt_betas has no effect with opt = {name}"):
        optimiser(network, opt=name, opt_betas=(0.9, 0.95))


def test_a_step_s_weight_decay_goes_to_the_decaying_group_only(network: nn.Module) -> None:
    chosen = optimiser(network)
    set_hyperparameters(chosen, lr=0.3, weight_decay=0.2)
    assert {group["lr"] for group in chosen.param_groups} == {0.3}
    assert sorted(group["weight_decay"] for group in chosen.param_groups) == [0.0, 0.2]
    set_hyperparameters(chosen, lr=0.3, weight_decay=0.0)
    set_hyperparameters(chosen, lr=0.3, weight_decay=0.1)  # a schedule that touches 0 comes back
    assert sorted(group["weight_decay"] for group in chosen.param_groups) == [0.0, 0.1]


def test_a_weight_decay_that_starts_at_zero_still_spares_the_biases(network: nn.Module) -> None:
    chosen = optimiser(network, weight_decay=0.0, weight_decay_end=0.2)
    set_hyperparameters(chosen, lr=0.1, weight_decay=0.0)
    set_hyperparameters(chosen, lr=0.1, weight_decay=0.2)
    found = decays(chosen)
    assert all(found[id(p)] == (0.2 if p.ndim > 1 else 0.0) for p in network.parameters())


def test_weight_decay_0_holds_for_all_groups(network: nn.Module) -> None:
    chosen = optimiser(network, weight_decay=0.0)
    set_hyperparameters(chosen, lr=0.1, weight_decay=0.0)
    assert set(decays(chosen).values()) == {0.0}


def steps(optimizer: torch.optim.Optimizer, network: nn.Module, num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(num):
        for parameter in network.parameters():
            values = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(values)
        optimizer.step()


@pytest.mark.parametrize("fused", [False, True])
def test_a_checkpoint_continues_in_another_memory_format(fused: bool) -> None:
    """Fused steps pair numbers in the order of memory: moments in the old order would be others'."""
    before, after, whole = (nn.Conv2d(3, 8, 3) for _ in range(3))
    before.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    whole.load_state_dict(before.state_dict())
    saved = build_optimizer(before, OptimConfig())
    for group in saved.param_groups:
        group["fused"] = fused
    steps(saved, before, 2)
    after.load_state_dict(before.state_dict())
    ours = build_optimizer(after, OptimConfig())
    restore_optimizer(ours, saved.state_dict())
    assert all(group["fused"] for group in ours.param_groups), "how steps are computed is not the checkpoint's affair"
    moment = ours.state[after.weight]["exp_avg"]
    assert moment.stride() == after.weight.stride() != before.weight.stride()
    steps(ours, after, 3)
    undisturbed = build_optimizer(whole, OptimConfig())
    steps(undisturbed, whole, 2)
    for group in undisturbed.param_groups:
        assert group["fused"]
    steps(undisturbed, whole, 3)
    assert torch.allclose(after.weight, whole.weight, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("opt", "fused"), [("adamw", True), ("sgd", True), ("lamb", False), ("nadam", False)])
def test_torchs_common_optimisers_are_fused(opt: str, fused: bool) -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(opt=opt))
    assert optimizer.param_groups[0].get("fused", False) in ((True,) if fused else (False, None))


def convnext(blocks_of_third_stage: int) -> ModelConfig:
    config = load_config(REPOSITORY / "rn_configs" / "convnext_tiny.yaml")
    return config.replace(resnet_layers=(3, 3, blocks_of_third_stage, 3)).model


# Exponents of layer_decay by the beginning of a name. ConvNeXt-S: 13 - layer in the paper's optim_factory.py.
CONVNEXT_S = {
    "stem.": 13, "stages.0.": 12, "stages.1.": 11, "stages.2.downsample.": 10, "stages.3.": 1, "norm.": 0, "head.": 0,
    **{f"stages.2.blocks.{block}.": 10 - block // 3 for block in range(27)},
}  # fmt: skip
CONVNEXT_T = {
    "stem.": 7, "stages.0.": 6, "stages.1.": 5, "stages.2.downsample.": 4, "stages.3.": 1, "norm.": 0, "head.": 0,
    **{f"stages.2.blocks.{block}.": exponent for block, exponent in enumerate((4, 4, 4, 3, 3, 3, 2, 2, 2))},
}  # fmt: skip
RESNET_50 = {
    "stem.": 6, "stages.0.": 5, "stages.1.": 4, "stages.3.": 1, "head.": 0,
    **{f"stages.2.blocks.{block}.": exponent for block, exponent in enumerate((3, 3, 3, 2, 2, 2))},
}  # fmt: skip
VIT_TINY = {  # timm's own groups: 12 blocks, the last with the norm
    "cls_token": 13, "pos_embed": 13, "patch_embed.": 13, "norm.": 1, "head.": 0,
    **{f"blocks.{block}.": 12 - block for block in range(12)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "exponents"),
    [
        pytest.param(convnext(27), CONVNEXT_S, id="ConvNeXt-S"),
        pytest.param(convnext(9), CONVNEXT_T, id="ConvNeXt-T"),
        pytest.param(ModelConfig(), RESNET_50, id="ResNet-50"),
        pytest.param(ModelConfig(model="vit_tiny_patch16_224"), VIT_TINY, id="a timm model"),
    ],
)
def test_layer_decay_is_the_papers_for_our_network_and_timms_for_its_models(
    config: ModelConfig, exponents: dict[str, int]
) -> None:
    with torch.device("meta"):
        network = build_model(config, 10)
    chosen = optimiser(network, layer_decay=0.7)
    set_hyperparameters(chosen, lr=0.01, weight_decay=0.2)
    rates = {id(p): group["lr"] for group in chosen.param_groups for p in group["params"]}
    decay = decays(chosen)
    for name, parameter in network.named_parameters():
        (exponent,) = {value for start, value in exponents.items() if name.startswith(start)}
        assert rates[id(parameter)] == pytest.approx(0.01 * 0.7**exponent), name
        if config.model == "resnet":
            assert decay[id(parameter)] == (0.2 if parameter.ndim > 1 else 0.0), name
    assert {round(rate, 12) for rate in rates.values()} == {round(0.01 * 0.7**e, 12) for e in exponents.values()}


def test_layer_decay_1_makes_no_groups_and_a_network_without_groups_refuses_another(network: nn.Module) -> None:
    assert len(optimiser(network, layer_decay=1.0).param_groups) == 2
    with pytest.raises(ValueError, match=r"layer_decay = 0.7: timm has no groups of layers for Sequential; remove it"):
        optimiser(network, layer_decay=0.7)
