"""A run that was stopped, killed or damaged ends like an undisturbed one."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY
from support.nursery import Moment, Nursery
from support.runs import assert_equal, assert_same_run, log_without_timings, send_at_step, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ffcv_convnext.cli import run_command
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.files import read_lines
from ffcv_convnext.training import engine
from ffcv_convnext.training.checkpoint import BEST, LAST, PREVIOUS, read_checkpoint


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """4 epochs of 10 steps, checkpoints at steps 5, 10, 15, ..."""
    return {**small_settings, "epochs": 4, "save_ckpt_steps": 5}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(settings, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def stopped(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run stopped by SIGTERM in the middle of its third epoch: checkpoint-last at step 25, the previous at 20."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 25, signal.SIGTERM)
        with pytest.raises(Interrupted, match="stopped by SIGTERM after optimiser step 25, state saved"):
            train_here(settings, output_dir=folder)
    return folder


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the stopped run that a test may damage and continue."""
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        del content[len(content) * 2 // 3 :]
    else:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def test_four_epochs_equal_two_and_a_half_plus_one_and_a_half(
    folder: Path, settings: dict[str, Any], undisturbed: Path
) -> None:
    assert [entry["epoch"] for entry in read_lines(folder / "log.jsonl")] == [0, 1]
    train_here(settings, output_dir=folder, num_workers=1, batches_ahead=1)  # neither changes what is computed
    assert_same_run(folder, undisturbed)


@pytest.mark.parametrize(
    "more",
    [
        {"loss": "bce", "bce_target_thresh": 0.2, "layer_decay": 0.7, "head_init_scale": 0.1, "sched": "linear"},
        {"opt": "lamb", "layer_decay": 0.9, "sched": "cyclic", "cooldown_epochs": 1, "grad_checkpointing": True},
    ],
    ids=["fine-tuning", "short"],
)
def test_other_losses_and_schedules_continue_to_the_last_bit(
    more: dict[str, Any], small_settings: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**small_settings, **more}
    train_here(settings, output_dir=tmp_path / "whole")
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 7, signal.SIGTERM)
        with pytest.raises(Interrupted):
            train_here(settings, output_dir=tmp_path / "stopped")
    train_here(settings, output_dir=tmp_path / "stopped")
    assert_same_run(tmp_path / "stopped", tmp_path / "whole")


@pytest.mark.parametrize("how", ["truncated", "bit flipped"])
def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    how: str, folder: Path, settings: dict[str, Any], undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder / LAST, how)
    train_here(settings, output_dir=folder)
    assert f"{LAST} is" in caplog.text
    assert "damaged" in caplog.text
    assert f"continuing from {folder / PREVIOUS}: epoch 2, optimiser step 20" in caplog.text
    assert_same_run(folder, undisturbed)


def test_two_damaged_checkpoints_are_a_failure_that_names_them(folder: Path, settings: dict[str, Any]) -> None:
    damage(folder / LAST, "truncated")
    damage(folder / PREVIOUS, "bit flipped")
    with pytest.raises(Failure, match=rf"no checkpoint in .* can be read; remove {LAST}, {PREVIOUS} to restart"):
        train_here(settings, output_dir=folder)


def test_resume_continues_another_folders_checkpoint_in_a_new_one(
    stopped: Path, settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    before = (stopped / LAST).read_bytes()
    train_here(settings, output_dir=tmp_path, resume=stopped / LAST)
    ours, theirs = read_checkpoint(tmp_path / LAST), read_checkpoint(undisturbed / LAST)
    for part in ("model", "ema", "optimizer"):
        assert_equal(ours[part], theirs[part], where=part)
    assert log_without_timings(tmp_path) == log_without_timings(undisturbed)[2:]
    assert (tmp_path / BEST).exists(), "a folder keeps the best of the epochs computed in it"
    assert (stopped / LAST).read_bytes() == before


def test_resume_refuses_weights_without_a_state(stopped: Path, settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has weights only.*--finetune"):
        train_here(settings, output_dir=tmp_path, resume=stopped / BEST)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resnet_embed_dim": 16}, "another network"),
        ({"model_ema": False}, "model_ema = false, but .* was made with true"),
        ({"opt": "sgd"}, "opt = sgd, but .* was made with adamw"),
        ({"layer_decay": 0.7}, "layer_decay = 0.7, but .* was made with 1.0"),
        ({"update_freq": 2}, r"global batch of 8, this run has 16 .* product is 1$"),
        ({"resume": "nowhere.pth"}, "checkpoint nowhere.pth does not exist"),
    ],
)
def test_resume_refuses_other_runs(
    change: dict[str, Any], message: str, stopped: Path, settings: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train_here({**settings, "output_dir": tmp_path, "resume": stopped / LAST, **change})
    assert not (tmp_path / "config.yaml").exists(), "a refused run leaves no settings behind"


def test_resume_logs_changed_settings(
    stopped: Path, settings: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train_here(settings, output_dir=tmp_path, resume=stopped / LAST, epochs=3, lr=1e-3)
    assert "epochs: 3 != 4; lr: 0.001 != 0.002" in caplog.text
    assert [entry["epoch"] for entry in read_lines(tmp_path / "log.jsonl")] == [2]


def test_other_training_data_is_refused(folder: Path, settings: dict[str, Any]) -> None:
    content = read_checkpoint(folder / LAST)
    torch.save({**content, "data": "another hash"}, folder / LAST)
    with pytest.raises(ValueError, match=r"other training data than .*/train.beton; continue on the same file"):
        train_here(settings, output_dir=folder)


def test_without_auto_resume_a_folder_restarts(folder: Path, settings: dict[str, Any]) -> None:
    (folder / "done").write_text("{}")
    with pytest.MonkeyPatch.context() as patch:
        send_at_step(patch, 3, signal.SIGUSR2)
        with pytest.raises(Interrupted, match="SIGUSR2 after optimiser step 3"):
            train_here(settings, output_dir=folder, auto_resume=False)
    assert read_lines(folder / "log.jsonl") == []
    assert not (folder / "done").exists()


# Killed at exact moments: each child continues where the one before it was killed.
TRAIN_STEP, SAVE_BEST = "ffcv_convnext.training.engine.train_step", "ffcv_convnext.training.engine.save_best"
EVALUATE, SAVE = "ffcv_convnext.training.engine.evaluate", "ffcv_convnext.training.checkpoint.Checkpoints.save"
LOG_DONE = "ffcv_convnext.training.runlog.RunLog.done"
KILLS: dict[str, list[Moment]] = {
    "before anything is saved": [(TRAIN_STEP, 2)],
    "while the first checkpoint is written": [("torch.save", 1)],
    "two steps later than the second save, whose thread has written nothing": [("torch.save", 2, 30), (TRAIN_STEP, 2)],
    "after checkpoint-last became the previous one": [("torch.save", 2), ("os.replace", 3)],
    "when a checkpoint is written but not renamed": [("torch.save", 2), ("os.fsync", 1)],
    "while evaluating": [(EVALUATE, 1)],
    "between the best raw and the best averaged weights": [(SAVE_BEST, 1), ("torch.save", 2)],
    "after logging an epoch, before saving it": [(SAVE_BEST, 2), (SAVE, 1)],
    "between the last checkpoint and done": [(LOG_DONE, 1)],
}


@pytest.mark.slow
def test_sigkill_at_any_moment_changes_nothing(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path, nursery: Nursery
) -> None:
    for i, (moment, at) in enumerate(KILLS.items()):
        changes = {"output_dir": tmp_path, "save_ckpt_steps": 3, "num_workers": 1 + i % 3}
        status, output = nursery.run({**settings, **changes}, at=at)
        assert status == -signal.SIGKILL, f"{moment}: {output}"
        epochs = [entry["epoch"] for entry in read_lines(tmp_path / "log.jsonl")]
        assert epochs == list(range(len(epochs))), moment
    assert not (tmp_path / "done").exists()
    status, output = nursery.run({**settings, **changes})
    assert status == 0, output
    assert_same_run(tmp_path, undisturbed)
    losses = EventAccumulator(str(tmp_path)).Reload().Scalars("loss/train_step")
    assert [loss.step for loss in losses] == [entry["step"] for entry in read_lines(tmp_path / "steps.jsonl")]
    assert not list(tmp_path.glob(".*.tmp")), "what killed writers left behind is removed"


@pytest.mark.slow
def test_signals_save_and_exit_with_75(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path, nursery: Nursery
) -> None:
    settings = {**settings, "output_dir": tmp_path, "save_ckpt_steps": 0}
    for number, at, step, epochs in (
        (signal.SIGUSR2, [(TRAIN_STEP, 7)], 7, 0),
        (signal.SIGTERM, [(TRAIN_STEP, 13)], 20, 1),  # an epoch's last step: saved before the evaluation
        (signal.SIGINT, [(EVALUATE, 1)], 20, 2),  # during it: saved when it is through
    ):
        status, output = nursery.run(settings, at=at, signals=[number])
        assert status == 75
        assert output.splitlines()[-1] == (
            f"stopped by {number.name} after optimiser step {step}, state saved; the same command continues"
        )
        assert read_checkpoint(tmp_path / LAST)["step"] == step
        assert len(read_lines(tmp_path / "log.jsonl")) == epochs

    status, output = nursery.run(settings, at=[(TRAIN_STEP, 3)], signals=[signal.SIGINT, signal.SIGINT])
    assert (status, output.splitlines()[-1]) == (130, "interrupted"), "a second Ctrl-C does not wait"
    assert read_checkpoint(tmp_path / LAST)["step"] == 20
    assert nursery.run(settings)[0] == 0
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_train_py_killed_and_restarted_gives_the_same_result(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path
) -> None:
    words = [w for name, value in {**settings, "output_dir": tmp_path}.items() for w in (f"--{name}", str(value))]
    command = [sys.executable, str(REPOSITORY / "train.py"), *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 180
            while len(read_lines(tmp_path / "steps.jsonl")) < 3:
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            process.kill()
        assert process.wait(10) == -signal.SIGKILL
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.slow
def test_a_second_run_on_one_folder_is_refused_and_names_the_holder(
    settings: dict[str, Any], tmp_path: Path, nursery: Nursery, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**settings, "output_dir": tmp_path, "epochs": 10_000}
    child = nursery.start(settings)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "config.yaml").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
        assert run_command("train", words) == 2
        message = capsys.readouterr().err
        assert "in use by another run" in message
        assert f"process {child.pid} on " in message
    finally:
        os.kill(child.pid, signal.SIGKILL)
        assert nursery.wait(child) == -signal.SIGKILL


class NotANumberAt(nn.Module):
    """The recipe's loss, but NaN at one call."""

    def __init__(self, call: int) -> None:
        super().__init__()
        self.calls_left = call

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        self.calls_left -= 1
        loss = torch.sum(-targets * logits.log_softmax(-1), dim=-1).mean()
        return loss * float("nan") if self.calls_left == 0 else loss


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("step", "last_good"), [(14, 10), (15, 10), (16, 15)])
def test_a_nan_loss_stops_the_run_and_keeps_the_last_good_checkpoint(
    step: int,
    last_good: int,
    settings: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("ffcv_convnext.training.run.build_criterion", lambda _: NotANumberAt(step))
    words = [w for name, value in {**settings, "output_dir": tmp_path}.items() for w in (f"--{name}", str(value))]
    assert run_command("train", words) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"error: the loss is not finite at optimiser step {step}")
    assert "keeps its last good checkpoint" in message
    content = read_checkpoint(tmp_path / LAST)
    assert content["step"] == last_good
    assert all(torch.isfinite(tensor).all() for tensor in [*content["model"].values(), *content["ema"].values()])


def test_an_absurd_learning_rate_is_a_failure_not_a_result(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"not finite .*optimiser step \d"):
        train_here(settings, output_dir=tmp_path, lr=1e36, warmup_epochs=0)
    assert not (tmp_path / "done").exists()


def test_weights_that_are_not_finite_are_neither_evaluated_nor_saved(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(run: engine.Learner, micro_batches: Any) -> None:
        original(run, micro_batches)
        if run.state.step + 1 == 10:
            next(run.network.parameters()).data[0] = float("inf")

    original: Callable[..., None] = engine.train_step
    monkeypatch.setattr(engine, "train_step", spoil)
    with pytest.raises(Failure, match="the weights are not finite after optimiser step 10"):
        train_here(settings, output_dir=tmp_path)
    assert read_checkpoint(tmp_path / LAST)["step"] == 5
    assert not (tmp_path / BEST).exists()


def test_a_full_disk_is_a_failure_and_the_run_can_go_on(
    settings: dict[str, Any], undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def full_at_the_third(content: Any, file: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            file.write(b"some of it")
            raise OSError(28, "No space left on device")
        save(content, file)

    save = torch.save
    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_at_the_third)
        with pytest.raises(Failure, match=r"could not write .*No space left on device; make room"):
            train_here(settings, output_dir=tmp_path)
    train_here(settings, output_dir=tmp_path)
    assert_same_run(tmp_path, undisturbed)
