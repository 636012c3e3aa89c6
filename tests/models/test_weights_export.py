"""A run's weights leave under the names of other libraries, come back, and are evaluated by train.py."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from support import REPOSITORY
from support.weights import (
    CONFIGS,
    SMALL_CONVNEXT,
    SMALL_RESNET,
    assert_same_logits,
    logits,
    randomise,
    released,
    small_torchvision_convnext,
)
from timm.models.convnext import ConvNeXt, checkpoint_filter_fn
from torch import nn

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config, ModelConfig, load_config
from ffcv_convnext.models import build_model, export_weights, load_pretrained
from ffcv_convnext.training.preflight import check_config


def checkpoint(path: Path, model: nn.Module, config: Config, **more: Any) -> Path:
    torch.save({"model": model.state_dict(), "config": config.flat(), **more}, path)
    return path


# --- export ---------------------------------------------------------------------------------------------------------


def test_export_writes_what_timm_loads_strictly(tmp_path: Path) -> None:
    model = randomise(build_model(SMALL_CONVNEXT.model, 7)).to(memory_format=torch.channels_last)
    export_weights(checkpoint(tmp_path / "last.pth", model, SMALL_CONVNEXT), tmp_path / "timm.pth", "timm")
    theirs = ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64))
    theirs.load_state_dict(torch.load(tmp_path / "timm.pth", weights_only=True), strict=True)
    assert_same_logits(model, theirs)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pth", "timm.pth"]


def read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else torch.load(path)
    return content


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_export_writes_the_papers_names_nested_as_its_code_saves_them(tmp_path: Path, suffix: str) -> None:
    model = randomise(build_model(SMALL_CONVNEXT.model, 7)).to(memory_format=torch.channels_last)
    out = tmp_path / f"released{suffix}"
    export_weights(checkpoint(tmp_path / "last.pth", model, SMALL_CONVNEXT), out, "released")
    content = read(out)
    if suffix == ".pth":
        assert list(content) == ["model"]
        content = content["model"]
    theirs = ConvNeXt(num_classes=7, depths=(1, 2, 1, 1), dims=(8, 16, 32, 64))
    paper = released(theirs.state_dict())
    assert {name: tensor.shape for name, tensor in content.items()} == {name: t.shape for name, t in paper.items()}
    theirs.load_state_dict(checkpoint_filter_fn(content, theirs), strict=True)  # timm's reader of the paper's files
    assert_same_logits(model, theirs)


def test_export_writes_what_torchvisions_convnext_loads_strictly(tmp_path: Path) -> None:
    model, theirs = randomise(build_model(SMALL_CONVNEXT.model, 7)), small_torchvision_convnext()
    export_weights(checkpoint(tmp_path / "last.pth", model, SMALL_CONVNEXT), tmp_path / "out.pth", "torchvision")
    theirs.load_state_dict(read(tmp_path / "out.pth"), strict=True)
    assert_same_logits(model, theirs)


EXPORTS = [("convnext", each) for each in ("ours", "timm", "torchvision", "released")]
EXPORTS += [("resnet", each) for each in ("ours", "timm", "torchvision")]


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize(("network", "layout"), EXPORTS)
def test_an_exported_file_comes_back_bit_for_bit(tmp_path: Path, network: str, layout: Any, suffix: str) -> None:
    config = SMALL_CONVNEXT if network == "convnext" else SMALL_RESNET
    source, model = randomise(build_model(config.model, 7)), build_model(config.model, 7)
    out = tmp_path / f"out{suffix}"
    export_weights(checkpoint(tmp_path / "last.pth", source, config), out, layout)
    load_pretrained(model, out)
    for name, tensor in source.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("changes", "layout", "message"),
    [
        ({"resnet_kernel_size": 9}, "released", r"resnet_kernel_size = 9 \(needs 7\)"),
        ({"resnet_kernel_size": 9}, "torchvision", r"resnet_kernel_size = 9 \(needs 7\)"),
        ({"resnet_kernel_size": 9}, "timm", None),
        ({"resnet_norm_layer": "fp32ln", "resnet_ls_init_values": 0.1}, "released", None),
        ({"resnet_ls_init_values": 0}, "released", r"resnet_ls_init_values = 0\.0 \(needs 1e-06\)"),
        ({"resnet_stem_norm": False}, "released", r"resnet_stem_norm = false \(needs true\)"),
    ],
)
def test_export_names_the_settings_that_a_layout_does_not_have(
    tmp_path: Path, changes: dict[str, Any], layout: Any, message: str | None
) -> None:
    config = SMALL_CONVNEXT.replace(**changes)
    path, out = checkpoint(tmp_path / "last.pth", build_model(config.model, 7), config), tmp_path / "out.pth"
    if message is None:
        export_weights(path, out, layout)
        assert out.exists()
        return
    with pytest.raises(ValueError, match=rf"last\.pth: {layout} has no such network: {message}; --layout ours"):
        export_weights(path, out, layout)
    assert not out.exists()


def test_the_papers_code_has_no_resnet(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "last.pth", build_model(SMALL_RESNET.model, 7), SMALL_RESNET)
    with pytest.raises(ValueError, match=r"released has no such network: .*resnet_depthwise = false \(needs true\)"):
        export_weights(path, tmp_path / "out.pth", "released")


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
    with pytest.raises(ValueError, match=r"torchvision has no such network: .*resnet_norm_layer = bn"):
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


# --- commands -------------------------------------------------------------------------------------------------------


def test_the_command_exports_and_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = checkpoint(tmp_path / "last.pth", build_model(SMALL_CONVNEXT.model, 7), SMALL_CONVNEXT)
    out = tmp_path / "tiny.safetensors"
    assert run_command("export", [str(path), "--layout", "released", "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"wrote {out}\n"
    assert "downsample_layers.0.0.weight" in read(out)
    assert run_command("export", [str(path), "--layout", "paper", "--out", str(out)]) == 2
    assert "choose from" in capsys.readouterr().err
    assert run_command("export", [str(tmp_path / "none.pth"), "--out", str(out)]) == 2
    assert "none.pth does not exist" in capsys.readouterr().err


def train_command(*argv: str) -> tuple[int, str]:
    """Exit status and stderr of `train.py`, in this process."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        status = run_command("train", argv)
    return status, stderr.getvalue()


def scores(output: str) -> str:
    """The scores in the last line of an evaluation."""
    return output.splitlines()[-1].rpartition(": ")[2]


@pytest.fixture(scope="module")
def evaluated(beton_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], str]:
    """A checkpoint, the flags that evaluate its network, and its scores."""
    folder = tmp_path_factory.mktemp("evaluated")
    config = SMALL_CONVNEXT.replace(data_path=str(beton_dir), device="cpu", amp="off", num_workers=1, input_size=64)
    config = config.replace(batch_size=8, nb_classes=4)
    path = checkpoint(folder / "last.pth", randomise(build_model(config.model, 4)), config)
    (folder / "config.yaml").write_text(config.to_yaml())
    flags = ["--config", str(folder / "config.yaml"), "--eval", "true"]
    status, output = train_command(*flags, "--resume", str(path))
    assert status == 0, output
    assert "test_acc1" in scores(output)
    return path, flags, scores(output)


@pytest.mark.parametrize("option", ["--finetune", "--resume"])  # the paper's README has --eval true --resume FILE
@pytest.mark.parametrize(("layout", "suffix"), [("released", ".pth"), ("torchvision", ".safetensors")])
def test_eval_of_other_layouts_gives_the_same_scores(
    evaluated: tuple[Path, list[str], str], tmp_path: Path, layout: Any, suffix: str, option: str
) -> None:
    path, flags, expected = evaluated
    out = tmp_path / f"weights{suffix}"
    export_weights(path, out, layout)
    status, output = train_command(*flags, option, str(out))
    assert status == 0, output
    assert scores(output) == expected


def test_train_py_evaluates_the_papers_file(evaluated: tuple[Path, list[str], str], tmp_path: Path) -> None:
    path, flags, expected = evaluated
    export_weights(path, tmp_path / "released.pth", "released")
    argv = [sys.executable, "train.py", *flags, "--finetune", str(tmp_path / "released.pth"), "--model_key", "model"]
    result = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "weights with the names of the paper's ConvNeXt" in result.stderr
    assert scores(result.stderr) == expected


def test_weights_and_settings_that_do_not_fit_are_one_line(
    evaluated: tuple[Path, list[str], str], tmp_path: Path
) -> None:
    path, flags, _ = evaluated
    out = tmp_path / "weights.pth"
    export_weights(path, out, "released")
    for argv, message in (
        (["--finetune", str(out), "--resnet_layers", "1-1-1-1"], "layers 1,2,1,1; the model has 1,1,1,1"),
        (["--finetune", str(out), "--model_key", "ema"], f"model_key = ema: {out} has model"),
        (["--model_prefix", "backbone."], "model_prefix = backbone. needs --finetune FILE"),
        (["--model_key", "ema"], "model_key = ema needs --finetune FILE"),
    ):
        status, output = train_command(*flags, *argv)
        assert status == 2
        assert message in output
        assert len(output.splitlines()) == 1


def test_a_misfit_is_found_before_a_job_is_submitted(evaluated: tuple[Path, list[str], str], tmp_path: Path) -> None:
    path, flags, _ = evaluated
    out = tmp_path / "weights.pth"
    export_weights(path, out, "torchvision")
    config = load_config(Path(flags[1]), overrides={"finetune": str(out), "output_dir": str(tmp_path / "run")})
    assert check_config(config, world=2).global_batch == 16
    with pytest.raises(ValueError, match=r"torchvision's ConvNeXt \(width 8; the model has 16\)"):
        check_config(config.replace(resnet_embed_dim=16), world=2)
