"""BatchNorm statistics of the averaged weights, recomputed from training images."""

from __future__ import annotations

import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_equal, assert_same_run, config_from, log_without_timings, send_at_step, train_here
from torch import Tensor, nn

from ffcv_convnext.config import Config
from ffcv_convnext.data.load import TrainLoader
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.models import batch_norms
from ffcv_convnext.training import engine
from ffcv_convnext.training.checkpoint import LAST, read_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.preflight import check_config
from ffcv_convnext.training.run import build_learner

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    return {**small_settings, "update_freq": 2, "model_ema_bn": "recompute"}


@pytest.fixture(scope="module")
def recomputed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recomputed")
    train_here(settings, output_dir=folder)
    return folder


def moments(config: Config, weights: dict[str, Tensor], num_steps: int) -> list[tuple[Tensor, Tensor]]:
    """Mean over micro-batches of the mean and variance of each BatchNorm's input, in the first steps of epoch 1."""
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=4, steps_per_epoch=5)
    network = learner.network
    network.load_state_dict(weights)
    found: dict[nn.Module, list[Tensor]] = {norm: [] for norm in batch_norms(network.eval())}
    for norm in found:
        norm.train().register_forward_pre_hook(lambda norm, inputs: found[norm].append(inputs[0]))
    with closing(TrainLoader(config.data, CPU, seed=config.run.seed)) as loader, torch.no_grad():
        for step, micro_batches in enumerate(loader.steps(1)):
            for i, (images, labels) in enumerate(micro_batches):
                if step < num_steps:
                    network(learner.augment(images, labels, step=5 + step, micro_batch=i)[0])
    return [
        (
            torch.stack([x.mean((0, 2, 3)) for x in inputs]).mean(0),
            torch.stack([x.var((0, 2, 3)) for x in inputs]).mean(0),
        )
        for inputs in found.values()
    ]


@pytest.mark.parametrize(("max_images", "num_steps"), [(10_000, 5), (17, 2)])
def test_they_are_the_mean_over_the_first_micro_batches_of_the_epoch(
    max_images: int, num_steps: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "RECOMPUTE_IMAGES", max_images)
    train_here(settings, output_dir=tmp_path)
    weights = read_checkpoint(tmp_path / LAST)["ema"]
    names = [name.removesuffix("running_mean") for name in weights if name.endswith("running_mean")]
    expected = moments(config_from(settings), weights, num_steps)
    assert len(names) == len(expected) > 10
    for name, (mean, var) in zip(names, expected, strict=True):
        torch.testing.assert_close(weights[f"{name}running_mean"], mean, rtol=1e-4, atol=1e-5, msg=name)
        torch.testing.assert_close(weights[f"{name}running_var"], var, rtol=1e-4, atol=1e-5, msg=name)


def test_training_keeps_its_bits_and_the_averaged_weights_other_scores(
    settings: dict[str, Any], recomputed: Path, tmp_path: Path
) -> None:
    train_here({**settings, "model_ema_bn": "average"}, output_dir=tmp_path)
    ours, theirs = (read_checkpoint(folder / LAST) for folder in (recomputed, tmp_path))
    for part in ("model", "optimizer", "epoch_loss"):
        assert_equal(ours[part], theirs[part], where=part)
    for name, value in theirs["ema"].items():
        assert torch.equal(ours["ema"][name], value) == (not ("running" in name or "num_batches" in name)), name
    logs = [log_without_timings(folder) for folder in (recomputed, tmp_path)]
    assert logs[0] != logs[1]
    for ours, theirs in zip(*logs, strict=True):
        assert {key for key in theirs if ours[key] != theirs[key]} <= {
            "test_acc1_ema",
            "test_acc5_ema",
            "test_loss_ema",
        }


@pytest.mark.parametrize("step", [5, 7])  # the end of an epoch, and inside of one
def test_a_stopped_run_continues_to_the_last_bit(
    step: int, settings: dict[str, Any], recomputed: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_here(settings, output_dir=tmp_path)
    train_here(settings, output_dir=tmp_path)
    assert_same_run(tmp_path, recomputed)


def test_settings_without_an_effect_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="model_ema_bn = recompute needs --model_ema true --model_ema_eval true"):
        config_from(settings, model_ema=False)
    config = config_from(settings, resnet_norm_layer="ln")
    with pytest.raises(ValueError, match="model_ema_bn = recompute has no effect: model = resnet has no BatchNorm"):
        check_config(config, 1)
    with pytest.raises(ValueError, match="model_ema_bn = recompute has no effect: model = resnet has no BatchNorm"):
        build_learner(config, Processes.from_environment("cpu"), num_classes=4, steps_per_epoch=5)
