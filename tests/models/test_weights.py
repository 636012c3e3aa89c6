"""Weights come in every usual naming and wrapping, and the logits stay."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support.weights import (
    CONFIGS,
    IMAGES,
    LAYOUTS,
    SMALL_CONVNEXT,
    State,
    as_they_are,
    assert_same_logits,
    logits,
    our_network,
    randomise,
    released,
    renamed,
    small_timm_convnext,
)
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ffcv_convnext.config import load_config
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.models import build_model, load_pretrained
from ffcv_convnext.models.layouts import recognise

# --- reading: names -------------------------------------------------------------------------------------------------


def test_step_0_is_torchvisions_resnet50(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet50()
    for name, module in theirs.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # lively, but small enough to keep 16 residual sums near 1
            nn.init.uniform_(module.weight, 0.1, 0.5 if name.endswith("bn3") else 1.0)
            nn.init.normal_(module.bias, std=0.1)
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    ours = build_model(load_config(CONFIGS / "00_resnet50.yaml").model, 1000)
    load_pretrained(ours, tmp_path / "resnet50.pth")
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_convnext_tiny_is_every_librarys(tmp_path: Path, library: str) -> None:
    theirs = torchvision.models.convnext_tiny() if library == "torchvision" else timm.create_model("convnext_tiny")
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1 or "layer_scale" in name:
            nn.init.uniform_(parameter, *((0.5, 1.5) if name.endswith("weight") else (-0.5, 0.5)))
    state = theirs.state_dict()
    ours = build_model(load_config(CONFIGS / "convnext_tiny.yaml").model, 1000)
    for content in [state, {"model": released(state)}] if library == "timm" else [state]:
        torch.save(content, tmp_path / "tiny.pth")
        load_pretrained(ours, tmp_path / "tiny.pth")
        assert_same_logits(ours, theirs)
        nn.init.zeros_(ours.get_parameter("stem.conv.weight"))
    load_pretrained(ours.to(memory_format=torch.channels_last), tmp_path / "tiny.pth")
    assert_same_logits(ours, theirs)


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_loaded_from_both_kinds_of_files(
    tmp_path: Path, layout: str, suffix: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, names = LAYOUTS[layout]
    theirs, path = build(), tmp_path / f"weights{suffix}"
    state = {name: tensor.contiguous() for name, tensor in names(theirs.state_dict()).items()}
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path, metadata={"format": "pt"})
    else:
        torch.save(state, path)
    ours = our_network(layout)
    with caplog.at_level(logging.INFO):
        load_pretrained(ours, path)
    assert_same_logits(ours, theirs)
    assert f"weights with the names of {layout}" in caplog.text


@pytest.mark.parametrize("layout", ["the paper's ConvNeXt", "torchvision's ConvNeXt", "transformers' ConvNext", "ours"])
def test_a_timm_network_takes_every_layout_too(tmp_path: Path, layout: str) -> None:
    source = our_network("ConvNeXt") if layout == "ours" else LAYOUTS[layout][0]()
    names = as_they_are if layout == "ours" else LAYOUTS[layout][1]
    torch.save(names(randomise(source).state_dict()), tmp_path / "weights.pth")
    model = ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64))
    load_pretrained(model, tmp_path / "weights.pth")
    assert_same_logits(model, source)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("[01]*.yaml")))
def test_every_step_of_the_ladder_loads_its_own_names(tmp_path: Path, name: str) -> None:
    size = {"resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "drop_path": 0}
    config = load_config(CONFIGS / f"{name}.yaml", overrides=size).model
    source, model = randomise(build_model(config, 7)), build_model(config, 7)
    torch.save({"state_dict": renamed(source.state_dict(), ("^", "module."))}, tmp_path / "weights.pth")
    load_pretrained(model, tmp_path / "weights.pth")
    assert torch.equal(logits(model), logits(source))


# --- reading: wrapping ----------------------------------------------------------------------------------------------


KEYS = ["model", "module", "state_dict", "model_state_dict", "net", "network", "weights", "model_ema", "ema"]


@pytest.mark.parametrize("key", [*KEYS, "state_dict_ema", "model.state_dict", "state_dict.model", "anything"])
def test_weights_are_found_under_every_usual_key_beside_foreign_objects(tmp_path: Path, key: str) -> None:
    source = small_timm_convnext()
    content: Any = released(source.state_dict())
    for part in reversed(key.split(".")):
        content = {part: content}
    optimizer = torch.optim.AdamW(source.parameters())
    source(IMAGES).sum().backward()
    optimizer.step()
    beside = {"optimizer": optimizer.state_dict(), "epoch": 3, "scaler": {}, "arch": "convnext_tiny"}
    # as the paper's code and timm's store them; no code of theirs runs
    beside |= {"args": argparse.Namespace(lr=4e-3, folder=tmp_path), "metric": np.float64(82.1)}
    weights = {name: tensor.detach().clone() for name, tensor in source.state_dict().items()}
    torch.save({**beside, **content}, tmp_path / "weights.pth")
    model = our_network("ConvNeXt")
    load_pretrained(model, tmp_path / "weights.pth")
    source.load_state_dict(weights)
    assert_same_logits(model, source)


def test_the_raw_weights_are_loaded_unless_model_key_says_otherwise(tmp_path: Path) -> None:
    raw, averaged = (small_timm_convnext() for _ in range(2))
    averaged.load_state_dict({name: tensor * 0.9 for name, tensor in raw.state_dict().items()})
    path = tmp_path / "weights.pth"
    for names in (("model", "model_ema"), ("state_dict", "state_dict_ema"), ("module", "ema")):
        torch.save(dict(zip(names, (raw.state_dict(), averaged.state_dict()), strict=True)), path)
        model = our_network("ConvNeXt")
        load_pretrained(model, path)
        assert_same_logits(model, raw)
        load_pretrained(model, path, model_key=f"absent|{names[1]}")
        assert_same_logits(model, averaged)
        with pytest.raises(ValueError, match=rf"model_key = absent: .* has {names[0]}, {names[1]}; leave --model_key"):
            load_pretrained(model, path, model_key="absent")
    torch.save(raw.state_dict(), path)
    with pytest.raises(ValueError, match=r"model_key = ema: .* has no entries, only weights"):
        load_pretrained(model, path, model_key="ema")
    torch.save({"generator": raw.state_dict(), "discriminator": raw.state_dict()}, path)
    with pytest.raises(
        ValueError, match="several sets of weights: generator, discriminator; choose one with --model_k"
    ):
        load_pretrained(model, path)


WRAPPINGS: dict[str, Callable[[nn.Module], State]] = {
    "data parallel": lambda model: nn.DataParallel(model).state_dict(),
    "compiled": lambda model: torch.compile(model).state_dict(),
    "averaged": lambda model: AveragedModel(model).state_dict(),
    "compiled, then parallel": lambda model: nn.DataParallel(torch.compile(model)).state_dict(),
    **{
        prefix: lambda model, prefix=prefix: renamed(model.state_dict(), ("^", prefix))  # type: ignore[misc]
        for prefix in ("backbone.", "model.", "encoder.", "net.", "model.backbone.", "module.model.encoder.")
    },
    "only the backbone": lambda model: renamed(model.state_dict(), (r"^(?!head\.fc|classifier\.2|fc)", "backbone.")),
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
@pytest.mark.parametrize("layout", ["timm's ConvNeXt", "torchvision's ConvNeXt", "torchvision's ResNet"])
def test_prefixes_of_wrappers_are_removed(tmp_path: Path, layout: str, wrapping: str) -> None:
    theirs, ours = LAYOUTS[layout][0](), our_network(layout)
    torch.save({"state_dict": dict(WRAPPINGS[wrapping](theirs))}, tmp_path / "weights.pth")
    load_pretrained(ours, tmp_path / "weights.pth")
    assert_same_logits(ours, theirs)


def test_model_prefix_chooses_one_of_several_networks(tmp_path: Path) -> None:
    student, teacher, path = small_timm_convnext(), small_timm_convnext(), tmp_path / "weights.pth"
    teacher.load_state_dict({name: tensor * 0.9 for name, tensor in student.state_dict().items()})
    both = {
        **renamed(released(student.state_dict()), ("^", "student.backbone.")),
        **renamed(released(teacher.state_dict()), ("^", "teacher.backbone.")),
    }
    torch.save(both, path)
    model = our_network("ConvNeXt")
    for prefix, source in (("student.", student), ("teacher", teacher), ("teacher.backbone.", teacher)):
        load_pretrained(model, path, model_prefix=prefix)
        assert_same_logits(model, source)
    with pytest.raises(ValueError, match=r"model_prefix = encoder\.: no name in .* begins with it; it has student\."):
        load_pretrained(model, path, model_prefix="encoder.")
    with pytest.raises(ValueError, match=r"none of: .*; names below a prefix are loaded with --model_prefix"):
        load_pretrained(model, path)
    torch.save(renamed(both, ("student", "model"), ("teacher", "net")), path)
    with pytest.raises(ValueError, match=r"twice, under 'model\.backbone\.' and 'net\.backbone\.': .*--model_prefix"):
        load_pretrained(model, path)


# --- reading: heads and misfits -------------------------------------------------------------------------------------


HEADS = {"head.fc.", "head.", "classifier.", "classifier.1.", "classifier.2.", "fc."}


@pytest.mark.parametrize("layout", [*LAYOUTS, "ours", "into timm's"])
@pytest.mark.parametrize("num_classes", [21841, 0])
def test_a_head_of_another_size_or_none_is_skipped_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, layout: str, num_classes: int
) -> None:
    if layout == "ours":
        state, model = randomise(our_network(layout)).state_dict(), our_network(layout, 5)
    elif layout == "into timm's":
        state, model = (
            released(timm.create_model("test_convnext").state_dict()),
            timm.create_model("test_convnext", num_classes=5),
        )
    else:
        build, names = LAYOUTS[layout]
        state, model = names(build().state_dict()), our_network(layout, 5)
    weight = list(state)[-2]
    assert weight.removesuffix("weight") in HEADS
    heads = {
        weight: torch.ones(num_classes, state[weight].shape[1]),
        weight.replace("weight", "bias"): torch.ones(num_classes),
    }
    state = {name: tensor for name, tensor in state.items() if name not in heads} | (heads if num_classes else {})
    torch.save({"model": state}, tmp_path / "weights.pth")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    has = f"its head has {num_classes} classes, the model's 5" if num_classes else "it has no classifier head"
    with pytest.raises(ValueError, match=f"cannot be evaluated on this data: {has}; train one with --finetune"):
        load_pretrained(model, tmp_path / "weights.pth", needs_head=True)
    load_pretrained(model, tmp_path / "weights.pth")
    assert f"{has}; the model's head keeps its initialisation" in caplog.text
    after = model.state_dict()
    assert [name for name in list(before)[-2:] if torch.equal(after[name], before[name])] == list(before)[-2:]
    assert not torch.equal(
        after["stem.0.weight" if layout == "into timm's" else "stem.conv.weight"], next(iter(before.values()))
    )


def light(model: nn.Module) -> dict[str, Tensor]:
    """Weights of the model's names and shapes whose file holds one number each."""
    return {name: torch.zeros(()).expand(tensor.shape) for name, tensor in model.state_dict().items()}


TINY, RESNET50 = "convnext_tiny.yaml", "00_resnet50.yaml"
MISFITS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "torchvision S": (
        torchvision.models.convnext_small,
        TINY,
        r"torchvision's ConvNeXt-S \(layers 3,3,27,3; the model has 3,3,9,3\); use --resnet_layers 3,3,27,3$",
    ),
    "torchvision B": (
        torchvision.models.convnext_base,
        TINY,
        r"torchvision's ConvNeXt-B \(layers 3,3,27,3, width 128; the model has layers 3,3,9,3, width 96\); "
        r"use --resnet_layers 3,3,27,3 --resnet_embed_dim 128$",
    ),
    "timm L": (lambda: timm.create_model("convnext_large"), TINY, r"timm's ConvNeXt-L \(.*width 192; the model has"),
    "timm nano": (lambda: timm.create_model("convnext_nano"), TINY, r"timm's ConvNeXt \(layers 2,2,8,2, width 80;"),
    "ResNet-101": (
        torchvision.models.resnet101,
        RESNET50,
        r"torchvision's ResNet-101 \(layers 3,4,23,3; the model has",
    ),
    "ResNet-50 into ConvNeXt": (
        torchvision.models.resnet50,
        TINY,
        r"torchvision's ResNet-50, the model is another network; start from --config rn_configs/00_resnet50\.yaml$",
    ),
    "ConvNeXt-T into ResNet-50": (
        torchvision.models.convnext_tiny,
        RESNET50,
        r"torchvision's ConvNeXt-T, the model is another network; start from --config rn_configs/convnext_tiny\.yaml$",
    ),
    "ConvNeXt-T into step 13": (
        torchvision.models.convnext_tiny,
        "13_separate_downsampling.yaml",
        r"torchvision's ConvNeXt-T, the model is another network",
    ),
    "ResNet-18": (torchvision.models.resnet18, RESNET50, r"torchvision's ResNet; \d+ missing: .*conv3\.weight"),
    "ConvNeXt V2": (
        lambda: timm.create_model("convnextv2_tiny"),
        TINY,
        r"timm's ConvNeXt-T; 18 missing: .*gamma.*; 36 unexpected: .*grn",
    ),
    "step 11 into ConvNeXt-T": (
        lambda: build_model(load_config(CONFIGS / "11_layernorm.yaml").model, 10),
        TINY,
        r"this project's network; \d+ missing: stem\.norm\.weight, .*unexpected: .*shortcut",
    ),
    "Swin": (torchvision.models.swin_t, TINY, r"is none of: this project's network, the paper's ConvNeXt, timm's"),
    "ViT": (torchvision.models.vit_b_16, RESNET50, r"is none of: .*OpenMMLab's ResNet; .*missing: stem\.conv\.weight"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_weights_that_do_not_fit_are_described_by_layout_and_size(tmp_path: Path, case: str) -> None:
    build, config, message = MISFITS[case]
    with torch.device("meta"):
        theirs, model = build(), build_model(load_config(CONFIGS / config).model, 1000)
    torch.save(light(theirs), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=rf"weights\.pth does not fit the model: it (looks like )?{message}"):
        load_pretrained(model, tmp_path / "weights.pth")


def test_a_timm_network_that_does_not_fit_is_described_too(tmp_path: Path) -> None:
    with torch.device("meta"):
        small, tiny, vit = (
            timm.create_model(f"{name}") for name in ("convnext_small", "convnext_tiny", "vit_tiny_patch16_224")
        )
    torch.save({"model": released(light(small))}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"the paper's ConvNeXt-S \(layers .*3,3,9,3\); use another --model$"):
        load_pretrained(tiny, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"looks like the paper's ConvNeXt-S; \d+ missing: cls_token"):
        load_pretrained(vit, tmp_path / "weights.pth")
    wrong = {name: tensor for name, tensor in light(vit).items() if name != "cls_token"}
    torch.save(wrong, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not fit the model: 1 missing: cls_token$"):
        load_pretrained(vit, tmp_path / "weights.pth")


@pytest.mark.parametrize(
    ("name", "letter"), [("tiny", "T"), ("small", "S"), ("base", "B"), ("large", "L"), ("xlarge", "XL")]
)
def test_every_size_of_the_paper_has_its_name(name: str, letter: str) -> None:
    with torch.device("meta"):
        state = released(timm.create_model(f"convnext_{name}").state_dict())
    layout = recognise(state)
    assert layout is not None
    assert layout.describe(state) == f"the paper's ConvNeXt-{letter}"


def test_a_misfit_changes_nothing(tmp_path: Path) -> None:
    torch.save(build_model(SMALL_CONVNEXT.model, 7).state_dict(), tmp_path / "weights.pth")
    model = build_model(SMALL_CONVNEXT.replace(resnet_embed_dim=16).model, 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"this project's network \(width 8; the model has 16\); use --resnet_embed_dim 8$"
    ):
        load_pretrained(model, tmp_path / "weights.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_content_of_a_file_counts_not_its_suffix(tmp_path: Path) -> None:
    source = small_timm_convnext()
    files: dict[str, Callable[[Path], object]] = {
        "new.safetensors": lambda path: torch.save(source.state_dict(), path),
        "old.pth": lambda path: torch.save(source.state_dict(), path, _use_new_zipfile_serialization=False),
        "pytorch_model.bin": lambda path: safetensors.torch.save_file(source.state_dict(), path),
        "half.pth": lambda path: torch.save(source.half().state_dict(), path),
    }
    for name, save in files.items():
        expected = logits(source)
        save(tmp_path / name)
        model = our_network("ConvNeXt")
        load_pretrained(model, tmp_path / name)
        assert all(tensor.dtype == torch.float32 for tensor in model.parameters())
        assert (logits(model) - expected).abs().max() < (0.02 if name == "half.pth" else 1e-5), name


def test_files_without_weights_are_refused(tmp_path: Path) -> None:
    model = build_model(SMALL_CONVNEXT.model, 7)
    path = tmp_path / "weights.pth"
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_pretrained(model, path)
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    tensors = safetensors.torch.save(model.state_dict())
    header = b"{".join(tensors.split(b"{")[:3]) + b"\0" + tensors[100:]
    for content in (
        b"",
        b"no checkpoint",
        whole[: len(whole) // 2],
        bytes(flipped),
        tensors[: len(tensors) // 2],
        header,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="is not a readable PyTorch or safetensors file: "):
            load_pretrained(model, path)
    things: list[tuple[Any, str]] = [
        ([1, 2], "holds a list"),
        (model, r"holds a Python object; .*torch\.save\(model\.state_dict\(\)\)"),
        ({"epoch": 3}, "has no weights: .*; found epoch$"),
        ({"model": "convnext_tiny"}, "has no weights: .*; found model$"),
        ({}, "has no weights: .*; found nothing$"),
    ]
    for thing, message in things:
        torch.save(thing, path)
        with pytest.raises(ValueError, match=message):
            load_pretrained(model, path)


def test_a_signal_while_a_file_is_read_is_not_taken_for_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": small_timm_convnext().state_dict()}, tmp_path / "weights.pth")

    def interrupted(*_: Any, **__: Any) -> None:
        raise Interrupted("SIGTERM")

    monkeypatch.setattr(torch, "load", interrupted)
    with pytest.raises(Interrupted):
        load_pretrained(our_network("ConvNeXt"), tmp_path / "weights.pth")
