"""Progressive resizing: the images grow in the course of a run, and nothing else changes."""

from __future__ import annotations

import copy
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import assert_same_run, config_from, train_here

from ffcv_convnext.config import Config
from ffcv_convnext.data.load import TrainLoader
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.files import read_lines
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
