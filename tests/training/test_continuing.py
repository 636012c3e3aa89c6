"""--resume with other settings, --finetune, and --eval of weights from other libraries."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support.runs import config_from

from ffcv_convnext.cli import run_command
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.signals import stop_signals, stopping_at_once
from ffcv_convnext.training.checkpoint import Checkpoints, read_checkpoint
from ffcv_convnext.training.evaluation import evaluate_only
from ffcv_convnext.training.run import train


@pytest.fixture(scope="module")
def first(small_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of one epoch."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    train(config_from(small_settings, output_dir=folder, epochs=1))
    return folder


def test_new_optimiser_settings_apply_after_resume(small_settings: dict[str, Any], first: Path, tmp_path: Path) -> None:
    changes = {"opt_betas": "0.5,0.6", "opt_eps": "1e-3", "weight_decay": 0.2, "resume": first / "checkpoint-last.pth"}
    train(config_from(small_settings, output_dir=tmp_path / "on", **changes))
    for group in read_checkpoint(tmp_path / "on" / "checkpoint-last.pth")["optimizer"]["param_groups"]:
        assert tuple(group["betas"]) == (0.5, 0.6)
        assert group["eps"] == 1e-3
        assert group["weight_decay"] == (0.2 if group["decays"] else 0.0)


def test_a_finetuned_run_starts_from_averaged_weights_and_resumes_without_their_file(
    small_settings: dict[str, Any], first: Path, tmp_path: Path
) -> None:
    start = tmp_path / "start.pth"
    start.write_bytes((first / "checkpoint-best-ema.pth").read_bytes())
    config = config_from(small_settings, output_dir=tmp_path / "tuned", finetune=start, lr=1e-8, min_lr=0, epochs=1)
    train(config)
    tuned = read_checkpoint(tmp_path / "tuned" / "checkpoint-last.pth")
    wanted = read_checkpoint(start)["ema"]
    for part in ("model", "ema"):
        assert torch.allclose(tuned[part]["head.weight"], wanted["head.weight"], atol=1e-5), part
    start.unlink()
    (tmp_path / "tuned" / "done").unlink()
    train(config)


def test_weights_of_timm_are_evaluated(
    small_settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    network = timm.create_model("test_convnext", num_classes=4)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    changes = {name: None for name in small_settings if name.startswith("resnet_")}
    settings = {k: v for k, v in small_settings.items() if k not in changes} | {"model": "test_convnext"}
    settings = {name: value for name, value in settings.items() if name not in ("input_size", "crop_pct")}
    with caplog.at_level("INFO", "ffcv_convnext"):
        (scores,) = evaluate_only(
            config_from(settings, eval=True, finetune=tmp_path / "weights.pth", std="1,1,1", eval_resize="warp")
        ).values()
    (line,) = [record.getMessage() for record in caplog.records if "timm's configuration" in record.getMessage()]
    assert line == (
        "test_convnext: images as in timm's configuration of the model: input_size 160, mean 0.5,0.5,0.5, "
        "crop_pct 0.95, eval_interpolation bicubic; "
        "set otherwise: std 1.0,1.0,1.0 (timm: 0.5,0.5,0.5), eval_resize warp (timm: crop)"
    )
    assert scores["images"] == 20
    assert 0 <= scores["test_acc1"] <= 100
    with pytest.raises(ValueError, match="give one of them"):
        evaluate_only(config_from(settings, eval=True, finetune="a.pth", resume="b.pth"))


@pytest.mark.parametrize("by_name", [False, True], ids=["auto_resume", "eval"])
def test_a_timm_run_from_before_mean_and_std_were_settings_keeps_imagenets(
    small_settings: dict[str, Any], tmp_path: Path, by_name: bool
) -> None:
    plain = {name: value for name, value in small_settings.items() if not name.startswith("resnet_")}
    imagenet = {"mean": "0.485,0.456,0.406", "std": "0.229,0.224,0.225"}
    settings = plain | {"model": "test_convnext", "epochs": 1, "output_dir": tmp_path}
    train(config_from(settings, **imagenet))
    path = tmp_path / "checkpoint-last.pth"
    content = read_checkpoint(path)
    content["config"] = {name: value for name, value in content["config"].items() if name not in imagenet}
    torch.save(content, path)
    recorded = (tmp_path / "config.yaml").read_text().splitlines()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in recorded if line.split(":")[0] not in imagenet))
    (tmp_path / "done").unlink()
    start = evaluate_only if by_name else train
    changes: dict[str, Any] = {"eval": True, "resume": path, "output_dir": None} if by_name else {}
    message = (
        "with ImageNet's mean and std; evaluate it with --mean 0.485," if by_name else "(mean: 0.5,0.5,0.5 != 0.485"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        start(config_from(settings, **changes))
    (tmp_path / "config.yaml").write_text("\n".join(recorded))
    start(config_from(settings, **changes, **imagenet))


def test_auto_resume_false_removes_old_checkpoints(small_settings: dict[str, Any], tmp_path: Path) -> None:
    config = config_from(small_settings, output_dir=tmp_path / "run", epochs=1)
    train(config)
    checkpoints = Checkpoints(tmp_path / "run")
    before = checkpoints.newest()
    train(config.replace(auto_resume=False))
    after = checkpoints.newest()
    assert before is not None
    assert after is not None
    assert after[1]["step"] == before[1]["step"]
    assert not (tmp_path / "run" / "checkpoint-previous.pth").exists()


def test_channels_last_false_gives_the_network_contiguous_images(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ffcv_convnext.models import ResNet

    seen: set[tuple[bool, bool]] = set()
    forward = ResNet.forward

    def watched(self: ResNet, images: torch.Tensor) -> torch.Tensor:
        last = images.is_contiguous(memory_format=torch.channels_last)
        seen.add((images.is_contiguous(), last))
        return forward(self, images)

    monkeypatch.setattr(ResNet, "forward", watched)
    train(config_from(small_settings, output_dir=tmp_path / "nchw", epochs=1, channels_last=False))
    assert seen == {(True, False)}
    seen.clear()
    train(config_from(small_settings, output_dir=tmp_path / "nhwc", epochs=1))
    assert seen == {(False, True)}


def test_a_network_of_fixed_size_refuses_another_input_size(
    small_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {k: v for k, v in small_settings.items() if not k.startswith("resnet_")}
    settings |= {"model": "vit_tiny_patch16_224", "output_dir": tmp_path / "vit"}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]
    assert run_command("train", flags) == 2
    assert "use --input_size 224" in capsys.readouterr().err


def test_a_signal_before_the_first_step_stops_at_once_and_one_in_the_loop_waits() -> None:
    with stopping_at_once():
        with pytest.raises(Interrupted, match="SIGUSR2 outside"):
            signal.raise_signal(signal.SIGUSR2)
        with stop_signals() as stop:
            signal.raise_signal(signal.SIGUSR2)
            assert stop.requested
        with pytest.raises(Interrupted, match="SIGTERM outside"):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
