"""Weights move between our names and those of timm and torchvision, and the logits stay."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from support import REPOSITORY
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn

from ffcv_convnext.config import Config, ModelConfig, load_config
from ffcv_convnext.models import (
    build_model,
    export_weights,
    from_timm_convnext,
    from_torchvision_resnet,
    load_pretrained,
    to_timm_convnext,
    to_torchvision_resnet,
)

CONFIGS = REPOSITORY / "rn_configs"
SMALL_CONVNEXT = load_config(
    CONFIGS / "convnext_tiny.yaml", overrides={"resnet_layers": "1-2-1-1", "resnet_embed_dim": 8, "drop_path": 0}
)
SMALL_RESNET = load_config(CONFIGS / "00_resnet50.yaml", overrides={"resnet_layers": "1-2-1-1", "drop_path": 0})
IMAGES = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def randomise(model: nn.Module) -> nn.Module:
    """Random norms, biases, layer scales and running statistics: fresh ones would hide a wrong name."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.ndim == 1:
            tensor.data.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return model.eval()


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        result: Tensor = model.eval()(IMAGES)
    return result


def assert_same_logits(ours: nn.Module, theirs: nn.Module) -> None:
    assert (logits(theirs).std(0) > 1e-4).any(), "logits do not depend on the image"
    assert (logits(ours) - logits(theirs)).abs().max() < 1e-5


def checkpoint(path: Path, model: nn.Module, config: Config, **more: Any) -> Path:
    torch.save({"model": model.state_dict(), "config": config.flat(), **more}, path)
    return path


def test_step_0_is_torchvisions_resnet50() -> None:
    theirs = torchvision.models.resnet50()
    for name, module in theirs.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # lively, but small enough to keep 16 residual sums near 1
            nn.init.uniform_(module.weight, 0.1, 0.5 if name.endswith("bn3") else 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    ours = build_model(load_config(CONFIGS / "00_resnet50.yaml").model, 1000)
    ours.load_state_dict(from_torchvision_resnet(theirs.state_dict()))
    assert_same_logits(ours, theirs)
    back = torchvision.models.resnet50()
    back.load_state_dict(to_torchvision_resnet(ours.state_dict()), strict=True)
    assert torch.equal(logits(back), logits(theirs))


def test_convnext_tiny_is_timms_and_the_reverse() -> None:
    theirs = timm.create_model("convnext_tiny")
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, *((0.5, 1.5) if name.endswith("weight") else (-0.5, 0.5)))
    ours = build_model(load_config(CONFIGS / "convnext_tiny.yaml").model, 1000)
    ours.load_state_dict(from_timm_convnext(theirs.state_dict()))
    assert_same_logits(ours, theirs)
    assert_same_logits(ours.to(memory_format=torch.channels_last), theirs)
    back = timm.create_model("convnext_tiny")
    back.load_state_dict(to_timm_convnext(ours.state_dict()), strict=True)
    assert torch.equal(logits(back), logits(theirs))


def test_convnext_base_has_timms_names_and_shapes() -> None:
    with torch.device("meta"):
        theirs = timm.create_model("convnext_base").state_dict()
        ours = build_model(load_config(CONFIGS / "resnet200/convnext_base.yaml").model, 1000).state_dict()
    assert {k: v.shape for k, v in from_timm_convnext(theirs).items()} == {k: v.shape for k, v in ours.items()}


def test_weights_of_another_layout_are_refused() -> None:
    with torch.device("meta"):
        step13 = build_model(load_config(CONFIGS / "13_separate_downsampling.yaml").model, 10).state_dict()
        step7 = build_model(load_config(CONFIGS / "07_kernel7.yaml").model, 10).state_dict()
    with pytest.raises(ValueError, match=r"not have the layout of our ConvNeXt: .*missing: stem\.norm"):
        to_timm_convnext(step13)
    with pytest.raises(
        ValueError, match=r"not have the layout of our ResNet-50: .*unexpected: stem\.conv\.bias|missing"
    ):
        to_torchvision_resnet(step7)
    with pytest.raises(ValueError, match=r"not have the layout of timm's ConvNeXt"):
        from_timm_convnext(step7)


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_what_timm_loads_strictly(tmp_path: Path) -> None:
    model = randomise(build_model(SMALL_CONVNEXT.model, 7)).to(memory_format=torch.channels_last)
    export_weights(checkpoint(tmp_path / "last.pth", model, SMALL_CONVNEXT), tmp_path / "timm.pth", "timm")
    theirs = ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64))
    theirs.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    assert_same_logits(model, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "timm.pth"]


@pytest.mark.parametrize("layout", ["torchvision", "timm"])
def test_export_of_step_0_fits_torchvision_and_timm(tmp_path: Path, layout: Any) -> None:
    model = randomise(build_model(SMALL_RESNET.model, 7))
    export_weights(checkpoint(tmp_path / "last.pth", model, SMALL_RESNET), tmp_path / "out.pth", layout)
    theirs: nn.Module = torchvision.models.ResNet(torchvision.models.resnet.Bottleneck, [1, 2, 1, 1], num_classes=7)
    if layout == "timm":
        theirs = timm.models.ResNet(timm.models.resnet.Bottleneck, (1, 2, 1, 1), num_classes=7)
    theirs.load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True), strict=True)
    torch.testing.assert_close(logits(model), logits(theirs))


def test_export_with_ema_writes_the_averaged_weights(tmp_path: Path) -> None:
    raw, averaged = (build_model(SMALL_CONVNEXT.model, 7) for _ in range(2))
    path = checkpoint(tmp_path / "last.pth", raw, SMALL_CONVNEXT, ema=averaged.state_dict())
    for ema, model in ((False, raw), (True, averaged)):
        export_weights(path, tmp_path / "out.pth", "ours", ema=ema)
        exported = torch.load(tmp_path / "out.pth", weights_only=True)
        assert torch.equal(exported["head.weight"], model.state_dict()["head.weight"])
    with pytest.raises(ValueError, match="has no averaged weights; remove --ema"):
        export_weights(checkpoint(path, raw, SMALL_CONVNEXT), tmp_path / "out.pth", "ours", ema=True)


def test_export_of_an_intermediate_step_is_refused(tmp_path: Path) -> None:
    config = load_config(CONFIGS / "07_kernel7.yaml", overrides={"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8})
    path = checkpoint(tmp_path / "last.pth", build_model(config.model, 7), config)
    with pytest.raises(ValueError, match=r"torchvision has no such network: .*resnet_depthwise = true"):
        export_weights(path, tmp_path / "out.pth", "torchvision")
    with pytest.raises(ValueError, match=r"timm has no such network: .*resnet_act_layer = relu \(needs gelu\)"):
        export_weights(path, tmp_path / "out.pth", "timm")
    assert not (tmp_path / "out.pth").exists()
    export_weights(path, tmp_path / "out.pth", "ours")
    build_model(config.model, 7).load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))


def test_export_of_a_timm_model_is_timms_own(tmp_path: Path) -> None:
    config = Config(model=ModelConfig(model="resnet18"))
    model = build_model(config.model, 7)
    path = checkpoint(tmp_path / "last.pth", model, config)
    export_weights(path, tmp_path / "out.pth", "timm")
    build_model(config.model, 7).load_state_dict(torch.load(tmp_path / "out.pth", weights_only=True))
    with pytest.raises(ValueError, match="model = resnet18 is a timm model; export it with --layout timm"):
        export_weights(path, tmp_path / "out.pth", "torchvision")


def test_a_failed_export_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = checkpoint(tmp_path / "last.pth", build_model(SMALL_CONVNEXT.model, 7), SMALL_CONVNEXT)
    out = tmp_path / "out.pth"
    out.write_text("old")

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_weights(path, out, "ours")
    assert out.read_text() == "old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "out.pth"]


def test_export_refuses_other_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"checkpoint .* does not exist"):
        export_weights(tmp_path / "none.pth", tmp_path / "out.pth", "ours")
    torch.save(build_model(SMALL_CONVNEXT.model, 7).state_dict(), tmp_path / "plain.pth")
    with pytest.raises(ValueError, match="has no 'config'"):
        export_weights(tmp_path / "plain.pth", tmp_path / "out.pth", "ours")
    path = checkpoint(tmp_path / "last.pth", build_model(SMALL_CONVNEXT.model, 7), SMALL_CONVNEXT)
    with pytest.raises(FileNotFoundError, match=r"folder .*nowhere does not exist"):
        export_weights(path, tmp_path / "nowhere/out.pth", "ours")


# --- fine-tuning ----------------------------------------------------------------------------------------------------


def test_finetuning_reads_every_layout(tmp_path: Path) -> None:
    convnext, resnet = (randomise(build_model(config.model, 7)) for config in (SMALL_CONVNEXT, SMALL_RESNET))
    files = {
        "ours": (convnext, {"model": convnext.state_dict(), "config": {}}),
        "wrapped": (convnext, {"state_dict": convnext.state_dict()}),
        "plain": (convnext, convnext.state_dict()),
        "timm": (convnext, to_timm_convnext(convnext.state_dict())),
        "torchvision": (resnet, to_torchvision_resnet(resnet.state_dict())),
    }
    for name, (source, content) in files.items():
        torch.save(content, tmp_path / name)
        model = build_model((SMALL_CONVNEXT if source is convnext else SMALL_RESNET).model, 7)
        load_pretrained(model, tmp_path / name)
        assert torch.equal(logits(model), logits(source)), name


@pytest.mark.parametrize("model_name", ["resnet", "resnet18"])
def test_a_head_of_another_size_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, model_name: str
) -> None:
    config = SMALL_CONVNEXT.model if model_name == "resnet" else ModelConfig(model=model_name)
    torch.save(build_model(config, 7).state_dict(), tmp_path / "weights.pth")
    model = build_model(config, 5)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with caplog.at_level(logging.WARNING):
        load_pretrained(model, tmp_path / "weights.pth")
    assert "its head has 7 classes, the model's 5; it is not loaded" in caplog.text
    head = "head.weight" if model_name == "resnet" else "fc.weight"
    stem = "stem.conv.weight" if model_name == "resnet" else "conv1.weight"
    assert torch.equal(model.state_dict()[head], before[head])
    assert not torch.equal(model.state_dict()[stem], before[stem])


def test_other_mismatches_are_named_and_change_nothing(tmp_path: Path) -> None:
    torch.save(build_model(SMALL_CONVNEXT.model, 7).state_dict(), tmp_path / "weights.pth")
    model = build_model(SMALL_CONVNEXT.replace(resnet_embed_dim=16).model, 7)
    before = model.state_dict()["norm.weight"].clone()
    with pytest.raises(ValueError, match=r"does not fit the model: \d+ of another shape: stem.conv.weight, .*, \.\.\."):
        load_pretrained(model, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"\d+ missing: .*; \d+ unexpected: "):
        load_pretrained(build_model(SMALL_RESNET.model, 7), tmp_path / "weights.pth")
    assert torch.equal(model.state_dict()["norm.weight"], before)


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    model = build_model(SMALL_CONVNEXT.model, 7)
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(model, path)
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable PyTorch checkpoint"):
            load_pretrained(model, path)
    for thing, message in (([1, 2], "holds a list"), ({"epoch": 3}, "has no weights"), ({}, "has no weights")):
        torch.save(thing, path)
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, path)
