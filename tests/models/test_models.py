"""The configurable network: what its switches build, that every combination runs, how it starts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
import timm
import torch
from support import REPOSITORY
from timm.layers import DropPath
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from ffcv_convnext.config import ModelConfig, load_config
from ffcv_convnext.models import ResNet, build_model, count_gmacs, count_parameters, layers, load_pretrained
from ffcv_convnext.models.layers import Float32LayerNorm2d, LayerNorm2d, PointwiseConv2d
from ffcv_convnext.models.resnet import Block, drop_path_rates

CONFIGS = REPOSITORY / "rn_configs"
STEPS = sorted([*CONFIGS.glob("[0-9]*.yaml"), *CONFIGS.glob("convnext*.yaml"), *CONFIGS.glob("kernel_sizes/*.yaml")])
INVERTED: dict[str, Any] = {"resnet_block": "inverted", "resnet_conv_first": True, "resnet_depthwise": True}


def small(**switches: Any) -> ModelConfig:
    return ModelConfig(**{"resnet_layers": (1, 2, 1, 1), "resnet_embed_dim": 8, **switches})


def blocks(model: nn.Module) -> list[Block]:
    return [module for module in model.modules() if isinstance(module, Block)]


def count(module: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(part, kinds) for part in module.modules())


def check_forward_and_backward(model: nn.Module, images: Tensor, num_classes: int) -> None:
    """Logits are finite, and every parameter takes part (a DDP run would otherwise hang or fail)."""
    logits = model.train()(images)
    assert logits.shape == (len(images), num_classes)
    logits.square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad.isfinite().all(), f"{name}'s gradient is not finite"


@pytest.mark.parametrize("path", STEPS, ids=lambda path: path.stem)
def test_every_step_runs_forward_and_backward_and_stays_channels_last(path: Path) -> None:
    model = build_model(load_config(path).model, 10).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)

    def check_layout(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert inputs[0].is_contiguous(memory_format=torch.channels_last), f"{module} gets another memory format"

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.BatchNorm2d | LayerNorm2d):
            module.register_forward_pre_hook(check_layout)
    check_forward_and_backward(model, images, 10)


def random_switches(draw: random.Random) -> ModelConfig:
    """A random legal combination of all switches, with few blocks and any small width."""
    free: dict[str, list[Any]] = {
        "drop_path": [0.0, 0.3],
        "resnet_embed_dim": [1, 3, 4, 7, 8],
        "resnet_ls_init_values": [0.0, 1e-6, 0.5],
    }
    for name, kind in get_type_hints(ModelConfig).items():
        if name.startswith("resnet_") and name not in ("resnet_layers", *free):
            free[name] = [False, True] if kind is bool else list(get_args(kind))
    while True:
        switches = {name: draw.choice(words) for name, words in free.items()}
        layers = tuple(draw.choice([1, 1, 2]) for _ in range(4))
        try:
            return ModelConfig(resnet_layers=layers, **switches)  # type: ignore[arg-type]
        except ValueError:
            continue


@pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")  # said when oneDNN is switched off
@pytest.mark.parametrize("seed", range(4))
def test_every_legal_combination_of_switches_runs(seed: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(25):
        config = random_switches(draw)
        try:
            model = build_model(config, 5)
            size = draw.choice([32, 33, 47])
            # oneDNN (torch 2.15, AVX-512) writes past its buffers in the backward of some convolutions of odd widths
            with torch.backends.mkldnn.flags(enabled=False):
                check_forward_and_backward(model, torch.randn(3, 3, size, size), 5)
        except Exception as error:
            raise AssertionError(f"{config} fails") from error


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resnet_conv_first": True}, "resnet_conv_first = true needs --resnet_block inverted"),
        ({"resnet_reorg_norm": True}, "resnet_reorg_norm = true needs --resnet_block inverted"),
        (
            {"resnet_reorg_norm": True, "resnet_block": "inverted"},
            "resnet_reorg_norm = true needs --resnet_conv_first true",
        ),
        ({**INVERTED, "resnet_pre_norm": True}, "resnet_pre_norm = true needs --resnet_reorg_norm"),
        ({"resnet_stem_norm": True}, "resnet_stem_norm = true needs --resnet_stem patch_embed"),
        ({"resnet_ds_norm": "pre"}, "resnet_ds_norm = pre needs --resnet_sep_downsample true"),
        ({"model": "resnet18", "resnet_embed_dim": 96}, "resnet_embed_dim = 96 has no effect with model = resnet18"),
        ({"resnet_layers": (3, 0, 9, 3)}, "resnet_layers = 3-0-9-3: expected 4 whole numbers >= 1"),
        ({"resnet_embed_dim": 0}, "resnet_embed_dim = 0: expected a whole number >= 1"),
        ({"resnet_ls_init_values": -1.0}, "resnet_ls_init_values = -1.0: expected a number >= 0"),
        ({"drop_path": 1.0}, r"drop_path = 1.0: expected a number in \[0, 1\)"),
        ({"nb_classes": 0}, "nb_classes = 0: expected a whole number >= 1"),
    ],
)
def test_contradicting_switches_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig(**settings)


@pytest.mark.parametrize("switches", [{}, {"resnet_block": "inverted"}, INVERTED], ids=["normal", "inverted", "first"])
def test_one_activation_is_left_before_the_last_convolution(switches: dict[str, Any]) -> None:
    with torch.device("meta"):
        usual = build_model(small(resnet_act_layer="gelu", **switches), 5)
        spare = build_model(small(resnet_act_layer="gelu", resnet_del_act=True, **switches), 5)
    assert [count(block, nn.GELU) for block in blocks(usual)] == [3] * 5
    assert [count(block, nn.GELU) for block in blocks(spare)] == [1] * 5
    for block in blocks(spare):
        names = [name for name, _ in block.branch.named_children()]
        assert names[names.index("conv3") - 1] == "act2"


def test_one_norm_is_left_after_the_depthwise_convolution_and_pre_norm_adds_one() -> None:
    spare = build_model(small(resnet_reorg_norm=True, **INVERTED), 5)
    extra = build_model(small(resnet_reorg_norm=True, resnet_pre_norm=True, **INVERTED), 5)
    for block in blocks(spare):
        assert count(block.branch, nn.BatchNorm2d) == 1
        assert [name for name, _ in block.branch.named_children()][:2] == ["conv1", "norm1"]
    for block in blocks(extra):
        assert count(block.branch, nn.BatchNorm2d) == 2
        assert [name for name, _ in block.branch.named_children()][:3] == ["norm0", "conv1", "norm1"]


def test_the_first_convolution_of_a_stage_works_at_the_width_before_it() -> None:
    model = build_model(small(**INVERTED), 5)
    first = [block.branch.get_submodule("conv1") for block in blocks(model)]
    assert [(conv.in_channels, conv.groups, conv.stride[0]) for conv in first] == [
        (8, 8, 1),
        (8, 8, 2),
        (16, 16, 1),
        (16, 16, 2),
        (32, 32, 2),
    ]


@pytest.mark.parametrize(
    ("switches", "biased"),
    [
        ({}, False),
        ({"resnet_norm_layer": "ln"}, False),
        (INVERTED, False),
        ({**INVERTED, "resnet_norm_layer": "ln"}, True),
    ],
    ids=["normal-bn", "normal-ln", "inverted-bn", "inverted-ln"],
)
def test_only_inverted_blocks_without_batchnorm_have_biases(switches: dict[str, Any], biased: bool) -> None:
    for block in blocks(build_model(small(**switches), 5)):
        convolutions = [part for part in block.branch if isinstance(part, nn.Conv2d)]
        assert [conv.bias is not None for conv in convolutions] == [biased] * 3
        assert not any("shortcut.conv.bias" in name for name, _ in block.named_parameters())


def test_separate_downsampling_leaves_identity_shortcuts() -> None:
    for place, names in {"none": ["conv"], "pre": ["norm", "conv"], "post": ["conv", "norm"]}.items():
        model = build_model(small(resnet_sep_downsample=True, resnet_ds_norm=place, **INVERTED), 5)
        assert isinstance(model, ResNet)
        assert all(isinstance(block.shortcut, nn.Identity) for block in blocks(model))
        parts = [[name for name, _ in stage.downsample.named_children()] for stage in list(model.stages)[1:]]
        assert parts == [names] * 3


def test_the_stem_keeps_relu() -> None:
    model = build_model(small(resnet_act_layer="gelu"), 5)
    assert isinstance(model, ResNet)
    assert count(model.stem, nn.ReLU) == 1
    assert count(model.stages, nn.ReLU) == 0


def test_layer_scale_starts_at_its_value() -> None:
    config = small(resnet_ls_init_values=0.25)
    scales = [p for name, p in build_model(config, 5).named_parameters() if name.endswith("gamma")]
    assert len(scales) == 5
    assert all(p.ndim == 1 and (p == 0.25).all() for p in scales)


def test_stochastic_depth_rises_linearly_over_all_blocks() -> None:
    config = small(drop_path=0.4)
    assert drop_path_rates(config) == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    rates = [
        part.drop_prob for block in blocks(build_model(config, 5)) for part in block.branch if count(part, DropPath)
    ]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])  # a rate of 0 needs no part
    with torch.device("meta"):
        theirs = timm.create_model("convnext_tiny", drop_path_rate=0.1)
        ours = build_model(load_config(CONFIGS / "convnext_tiny.yaml").model, 5)
    assert [m.drop_prob for m in ours.modules() if isinstance(m, DropPath)] == pytest.approx(
        [m.drop_prob for m in theirs.modules() if isinstance(m, DropPath)]
    )


def test_stochastic_depth_drops_a_samples_branch_in_training_only() -> None:
    torch.manual_seed(0)
    block = Block(small(resnet_del_act=True), 32, 8, stride=1, drop_path=0.5)
    x = torch.randn(64, 32, 4, 4)
    dropped = (block.train()(x) == x).flatten(1).all(1)
    assert 16 < dropped.sum() < 48
    assert not (block.eval()(x) == x).flatten(1).all(1).any()


def test_initial_weights_follow_resnet_init() -> None:
    torch.manual_seed(0)
    switches: dict[str, Any] = {"resnet_stem": "patch_embed", "resnet_norm_layer": "ln", **INVERTED}
    default = build_model(small(resnet_embed_dim=64, **switches), 200)
    trunc = build_model(small(resnet_embed_dim=64, resnet_init="trunc", **switches), 200)
    for model in (default, trunc):
        assert isinstance(model, ResNet)
        assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.03)
        assert (model.head.bias == 0).all()
        norms = [m for m in model.modules() if isinstance(m, LayerNorm2d)]
        assert norms
        assert all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)
    for ours, other in zip(default.modules(), trunc.modules(), strict=True):
        if isinstance(ours, nn.Conv2d) and isinstance(other, nn.Conv2d):
            fan_in = ours.weight[0].numel()
            assert ours.weight.std().item() == pytest.approx(
                (3 * fan_in) ** -0.5, rel=0.1
            )  # uniform within fan_in^-0.5
            assert other.weight.std().item() == pytest.approx(0.02, rel=0.1)
            assert ours.bias is None or (ours.bias != 0).any()
            assert other.bias is None or (other.bias == 0).all()


@pytest.mark.parametrize("name", ["resnet", "test_convnext"])
def test_head_init_scale_multiplies_the_head_alone_unless_its_weights_are_loaded(name: str, tmp_path: Path) -> None:
    def build(num_classes: int = 5, **settings: Any) -> nn.Module:
        torch.manual_seed(0)
        config = small(**settings) if name == "resnet" else ModelConfig(model=name, **settings)
        return build_model(config, num_classes)

    plain, scaled = build(), build(head_init_scale=0.5)
    head = "head." if name == "resnet" else "head.fc."
    for (key, ours), theirs in zip(plain.state_dict().items(), scaled.state_dict().values(), strict=True):
        assert torch.equal(theirs, 0.5 * ours if key.startswith(head) else ours), key
    for num_classes, loaded in ((5, True), (7, False)):
        state = {key: torch.ones_like(value) for key, value in build(num_classes).state_dict().items()}
        torch.save(state, tmp_path / "weights.pth")
        model = build(head_init_scale=0.5)
        load_pretrained(model, tmp_path / "weights.pth")
        expected = torch.ones(5) if loaded else scaled.state_dict()[f"{head}weight"][:, 0]
        assert torch.equal(model.state_dict()[f"{head}weight"][:, 0], expected)


def test_head_init_scale_is_refused_for_a_head_of_several_layers() -> None:
    with pytest.raises(ValueError, match=r"head_init_scale = 0.5 does not support model = deit_tiny_distilled"):
        build_model(ModelConfig(model="deit_tiny_distilled_patch16_224", head_init_scale=0.5), 5)


def test_layernorm_normalises_over_the_channels_of_each_position() -> None:
    x = torch.randn(2, 6, 3, 4).to(memory_format=torch.channels_last)
    expected = (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    for norm in (LayerNorm2d(6), Float32LayerNorm2d(6)):
        y = norm(x)
        torch.testing.assert_close(y, expected)
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_fp32ln_computes_in_float32_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(x: Tensor, *rest: Any, original: Any = nn.functional.layer_norm) -> Tensor:
        y: Tensor = original(x, *rest)
        seen.append((x.dtype, y.dtype))
        return y

    monkeypatch.setattr(layers.F, "layer_norm", spy)
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert Float32LayerNorm2d(8)(x).dtype == torch.bfloat16
        assert seen == [(torch.float32, torch.float32)]
        seen.clear()
        LayerNorm2d(8)(x)
        assert seen[0][0] == torch.bfloat16
        for word in ("ln", "fp32ln"):
            model = build_model(small(resnet_norm_layer=word, resnet_final_norm=True, **INVERTED), 5)
            assert model(torch.randn(2, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format], ids=["last", "first"])
def test_a_pointwise_convolution_is_the_usual_one_in_either_memory_format(
    memory_format: torch.memory_format, bias: bool
) -> None:
    torch.manual_seed(0)
    ours = PointwiseConv2d(6, 8, bias=bias).double().to(memory_format=memory_format)  # type: ignore[call-overload]
    usual = nn.Conv2d(6, 8, 1, bias=bias, dtype=torch.float64).to(memory_format=memory_format)  # type: ignore[call-overload]
    usual.load_state_dict(ours.state_dict())
    x = torch.randn(2, 6, 5, 3, dtype=torch.float64).to(memory_format=memory_format)
    results = []
    for layer in (ours, usual):
        own = x.clone().requires_grad_()
        y = layer(own)
        y.square().sum().backward()
        assert own.grad is not None
        assert y.is_contiguous(memory_format=memory_format)
        assert own.grad.is_contiguous(memory_format=memory_format)
        assert layer.weight.grad is not None
        assert layer.weight.grad.stride() == layer.weight.stride()  # DDP copies, and warns, where they differ
        results.append([y, own.grad, *(p.grad for p in layer.parameters())])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected)


def test_pointwise_convolutions_count_as_the_usual_ones() -> None:
    assert count_gmacs(nn.Sequential(PointwiseConv2d(3, 8, bias=True)), 10) == 3 * 8 * 100 / 1e9


def copied_shapes(step: Any) -> list[list[int]]:
    """Shapes of all tensors of more than one dimension that PyTorch copies while `step` runs."""
    step()  # the first one allocates gradients
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, acc_events=True) as found:
        step()
    kinds = ("aten::copy_", "aten::clone", "aten::contiguous")
    return [event.input_shapes[0] for event in found.events() if event.name in kinds and len(event.input_shapes[0]) > 1]


@pytest.mark.parametrize("norm", [LayerNorm2d, Float32LayerNorm2d])
def test_layernorm_copies_nothing_in_channels_last_memory(norm: type[LayerNorm2d]) -> None:
    layer = norm(16)
    x = torch.randn(2, 16, 5, 3).to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(2, 16, 5, 3).to(memory_format=torch.channels_last)
    assert copied_shapes(lambda: layer(x).backward(g)) == []
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    nchw = x.detach().contiguous().requires_grad_()
    assert copied_shapes(lambda: layer(nchw).backward(g))  # the count sees what there is


def test_a_convnext_block_copies_no_activations() -> None:
    config = load_config(CONFIGS / "convnext_tiny.yaml").model
    block = Block(config, 16, 16, stride=1, drop_path=0.3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last).requires_grad_()
    g = torch.randn(2, 16, 9, 9).to(memory_format=torch.channels_last)
    pixels = 2 * 9 * 9
    # on a CPU a matrix product starts from a copy of its bias, spread over the result
    biases = [[pixels, 64], [pixels, 16]]
    copies = [shape for shape in copied_shapes(lambda: block(x).backward(g)) if shape not in biases]
    assert all(shape == [16, 1, 7, 7] for shape in copies), copies  # the depthwise weights
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)


def test_any_timm_model_can_be_named() -> None:
    with torch.device("meta"):
        model = build_model(ModelConfig(model="convnext_tiny", drop_path=0.2), 7)
        plain = build_model(ModelConfig(model="vgg11"), 1000)
    assert model.get_classifier().out_features == 7
    assert max(m.drop_prob for m in model.modules() if isinstance(m, DropPath)) == pytest.approx(0.2)
    assert count_parameters(plain) == 132_863_336


def test_an_unknown_model_is_refused_with_similar_names() -> None:
    with pytest.raises(ValueError, match=r"model = convnext_tinny: neither .*; did you mean .*convnext_tiny"):
        build_model(ModelConfig(model="convnext_tinny"), 5)


def test_drop_path_is_refused_for_a_timm_model_without_it() -> None:
    with torch.device("meta"), pytest.raises(ValueError, match="has no effect with model = vgg11"):
        build_model(ModelConfig(model="vgg11", drop_path=0.1), 5)


def test_gmacs_of_timm_models_are_known_and_counting_changes_nothing() -> None:
    model = timm.create_model("resnet50").train()
    model.layer1.eval()
    assert round(count_gmacs(model), 3) == 4.089
    head = 2048 * 1000 / 1e9
    assert count_gmacs(model, 448) - head == pytest.approx(4 * (count_gmacs(model) - head))
    assert model.training
    assert not model.layer1.training
    assert not any(m._forward_hooks for m in model.modules())
    assert all(p.device.type == "cpu" for p in model.parameters())
