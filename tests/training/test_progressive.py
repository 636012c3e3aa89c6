"""Progressive resizing: the images grow in the course of a run, and nothing else changes."""

from __future__ import annotations

import copy
import json
import signal
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nursery import Nursery
from support.runs import assert_same_run, assert_same_training, config_from, send_at_step, train_here
from torch import Tensor

from ffcv_convnext.config import Config
from ffcv_convnext.data.load import TrainLoader
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.files import read_lines
from ffcv_convnext.run_folder import log_of_rank
from ffcv_convnext.training import engine
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import compile_sizes
from ffcv_convnext.training.run import build_learner

CPU = torch.device("cpu")
RAMP = {"min_res": 32, "max_res": 96, "start_ramp": 0, "end_ramp": 2, "test_input_size": 64}


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """3 epochs of 10 steps at 32, 64 and 96 pixels."""
    return {**small_settings, **RAMP, "epochs": 3, "save_ckpt_steps": 5}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(settings, output_dir=folder)
    return folder


def test_an_epochs_batches_equal_those_of_a_run_at_its_size(beton_dir: Path) -> None:
    common = {"data_path": beton_dir, "batch_size": 8, "num_workers": 2, "warmup_epochs": 0}
    growing = TrainLoader(Config.from_flat({**common, **RAMP, "epochs": 3}).data, CPU, seed=3)
    for epoch, size in enumerate((32, 64, 96)):
        fixed = TrainLoader(Config.from_flat({**common, "input_size": size}).data, CPU, seed=3)
        for ours, theirs in zip(growing.steps(epoch), fixed.steps(epoch), strict=True):
            ((images, labels),), ((expected, expected_labels),) = list(ours), list(theirs)
            assert images.shape == (8, 3, size, size)
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)


def test_the_log_has_each_epochs_size(undisturbed: Path) -> None:
    assert [entry["train_size"] for entry in read_lines(undisturbed / "log.jsonl")] == [32, 64, 96]


@pytest.mark.parametrize("step", [4, 15, 20])
def test_a_run_stopped_in_the_ramp_continues_to_the_same_bits(
    settings: dict[str, Any], undisturbed: Path, step: int, tmp_path: Path
) -> None:
    original = engine.train_step

    def train_step(learner: engine.Learner, micro_batches: Any) -> None:
        original(learner, micro_batches)
        if learner.state.step + 1 == step:
            signal.raise_signal(signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "train_step", train_step)
        with pytest.raises(Interrupted, match=f"after optimiser step {step}, state saved"):
            train_here(settings, output_dir=tmp_path)
    train_here(settings, output_dir=tmp_path)
    assert_same_run(tmp_path, undisturbed)


def test_compiling_all_sizes_in_advance_changes_nothing(
    small_settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """BatchNorm's running statistics, weights, gradients and the optimiser; the sizes come in order, once each."""
    config = config_from(small_settings, **RAMP, epochs=6)
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=4, steps_per_epoch=10)
    before = copy.deepcopy(learner.network.state_dict())
    sizes: list[int] = []
    learner.network.register_forward_pre_hook(lambda _, inputs: sizes.append(inputs[0].shape[-1]))
    with caplog.at_level("INFO", "ffcv_convnext"):
        compile_sizes(learner)
    assert sizes == [32, 64, 96]
    lines = [record.getMessage() for record in caplog.records]
    assert lines.pop().startswith("compiled in ")
    assert lines == [f"compiling for images of {size} pixels ({i} of 3)" for i, size in enumerate(sizes, 1)]
    for name, value in learner.network.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in learner.network.parameters())
    assert not learner.optimizer.state
    learner.state.epoch = 4
    sizes.clear()
    compile_sizes(learner)
    assert sizes == [96], "a run that continues compiles what is still to come"


@pytest.mark.slow
def test_a_compiled_run_has_a_graph_for_each_size(settings: dict[str, Any], tmp_path: Path) -> None:
    graphs: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        original = engine.compile_sizes

        def counted(learner: engine.Learner) -> None:
            original(learner)
            graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])

        patch.setattr("ffcv_convnext.training.run.compile_sizes", counted)
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        train_here({**settings, "compile": "true"}, output_dir=tmp_path)
    assert graphs == [6], "network and augmentation, three sizes each"
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6, "nothing was compiled during the run"
    assert [entry["train_size"] for entry in read_lines(tmp_path / "log.jsonl")] == [32, 64, 96]


# --- res_batch ----------------------------------------------------------------------------------------------------

JOINED = {
    "batch_size": 4,
    "recipe_batch": 16,
    "update_freq": 4,
    "res_batch": True,
}  # 4 at 32 px, 2 at 64 px, 1 at 96 px
LAYER_NORM = {"resnet_norm_layer": "ln", "resnet_final_norm": True}


@pytest.fixture(scope="module")
def joined_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """3 epochs of 5 steps: micro-batches of 16 (4 x 4), 8 and 4 images of 32, 64 and 96 pixels."""
    return {**settings, **JOINED, "save_ckpt_steps": 2, "log_every": 2}


@pytest.fixture(scope="module")
def joined(joined_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("joined")
    train_here({**joined_settings, "max_res": 96}, output_dir=folder)
    return folder


def shapes_of(learner: engine.Learner) -> list[tuple[int, int]]:
    """Images and pixels of each forward pass from now on."""
    shapes: list[tuple[int, int]] = []
    learner.network.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[::3]))
    return shapes


def gradients(config: Config, epoch: int) -> tuple[dict[str, Tensor], float, list[tuple[int, int]]]:
    """Gradients of a train step on the epoch's first micro-batches, its loss, its forward passes' shapes."""
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=4, steps_per_epoch=5)
    learner.state.epoch, learner.state.step = epoch, 5 * epoch
    learner.network.double(), learner.model.train()
    if learner.ema is not None:
        learner.ema.module.double()
    learner.augment.dtype = torch.float64
    shapes, found = shapes_of(learner), {}

    def step_pre_hook(*_: Any) -> None:
        found.update({name: parameter.grad.clone() for name, parameter in learner.network.named_parameters()})

    learner.optimizer.register_step_pre_hook(step_pre_hook)
    with closing(TrainLoader(config.data, CPU, seed=3)) as loader, closing(loader.steps(epoch)) as steps:
        engine.train_step(learner, next(steps))
    learner.tracker.flush()
    assert learner.tracker.epoch.value is not None
    return found, learner.tracker.epoch.value, shapes


@pytest.mark.parametrize(("epoch", "passes"), [(0, [(16, 32)]), (1, [(8, 64)] * 2), (2, [(4, 96)] * 4)])
def test_joined_micro_batches_have_the_gradients_of_separate_ones(
    joined_settings: dict[str, Any], epoch: int, passes: list[tuple[int, int]]
) -> None:
    """Mixed, erased, smoothed; without stochastic depth, whose draws are those of the larger micro-batch."""
    config = config_from({**joined_settings, **LAYER_NORM, "drop_path": 0.0})
    ours, loss, shapes = gradients(config, epoch)
    theirs, expected, separate = gradients(config.replace(res_batch=False), epoch)
    assert shapes == passes
    assert separate == [(4, passes[0][1])] * 4
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-9, atol=1e-12, msg=name)
        assert gradient.any(), name
    assert loss == pytest.approx(expected, rel=1e-9)


@pytest.mark.slow
def test_two_processes_train_like_one_with_joined_micro_batches(
    joined_settings: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    """One joins 4, 2 and 1, each of two joins 2, 2 and 1."""
    settings = {**joined_settings, **LAYER_NORM, "drop_path": 0.0}
    train_here(settings, output_dir=tmp_path / "one")
    for status, output in nursery.run_ranks({**settings, "update_freq": 2, "output_dir": tmp_path / "two"}, strikes={}):
        assert status == 0, output
    assert [entry["micro_batch"] for entry in read_lines(tmp_path / "two" / "log.jsonl")] == [8, 8, 4]
    assert_same_training(tmp_path / "two", tmp_path / "one", tolerance=1e-5)


def test_the_log_has_each_epochs_micro_batch(joined: Path) -> None:
    assert [entry["micro_batch"] for entry in read_lines(joined / "log.jsonl")] == [16, 8, 4]
    (start,) = json.loads((joined / "run.json").read_text())["starts"]
    assert start["micro_batches"] == {"32": 16, "64": 8, "96": 4}, "images by pixels"
    assert (
        "res_batch: micro-batches of 16 images of 32 pixels, 8 images of 64 pixels, 4 images of 96 pixels"
        in log_of_rank(joined, 0).read_text()
    )


@pytest.mark.parametrize("step", [3, 5, 7])
def test_a_run_with_joined_micro_batches_continues_to_the_same_bits(
    joined_settings: dict[str, Any], joined: Path, step: int, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, step, signal.SIGTERM)
        with pytest.raises(Interrupted, match=f"after optimiser step {step}, state saved"):
            train_here(joined_settings, output_dir=tmp_path)
    train_here(joined_settings, output_dir=tmp_path)
    assert_same_run(tmp_path, joined)


def test_each_size_is_compiled_with_its_micro_batch(
    joined_settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    config = config_from(joined_settings)
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=4, steps_per_epoch=5)
    shapes = shapes_of(learner)
    with caplog.at_level("INFO", "ffcv_convnext"):
        compile_sizes(learner)
    assert shapes == [(16, 32), (8, 64), (4, 96)]
    assert caplog.messages[0] == "compiling for images of 32 pixels, 16 at a time (1 of 3)"


def test_recomputed_statistics_are_those_of_joined_micro_batches(
    joined_settings: dict[str, Any], tmp_path: Path
) -> None:
    shapes: set[tuple[int, int]] = set()
    original = engine.recompute_statistics

    def watched(run: engine.Run, network: torch.nn.Module) -> None:
        handle = network.register_forward_pre_hook(lambda _, inputs: shapes.add(inputs[0].shape[::3]))
        original(run, network)
        handle.remove()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "recompute_statistics", watched)
        train_here(joined_settings, output_dir=tmp_path, model_ema_bn="recompute")
    assert shapes == {(16, 32), (8, 64), (4, 96)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"update_freq": 1, "batch_size": 16},
            "res_batch has no effect: update_freq = 1 has no divisor from 2 to 9, so no micro-batches can be joined; "
            "for the same global batch, use a smaller batch_size and a larger update_freq (half and double)",
        ),
        (
            {"min_res": 96},
            "res_batch has no effect: 2 micro-batches of 96 pixels have more pixels than one of max_res = 96; lower "
            "min_res to at most 67, or raise max_res",
        ),
    ],
)
def test_a_run_says_if_nothing_can_be_joined(
    joined_settings: dict[str, Any], changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    train_here({**joined_settings, **changes}, output_dir=tmp_path, epochs=3, warmup_epochs=0)
    assert message in log_of_rank(tmp_path, 0).read_text()
    assert {entry["micro_batch"] for entry in read_lines(tmp_path / "log.jsonl")} == {changes.get("batch_size", 4)}


@pytest.mark.slow
def test_a_compiled_run_with_joined_micro_batches_has_a_graph_for_each_size(
    joined_settings: dict[str, Any], tmp_path: Path
) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    train_here({**joined_settings, "compile": "true"}, output_dir=tmp_path)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 6, "network and augmentation, three sizes each"
