"""The run folder: lock, settings, facts and logs."""

from __future__ import annotations

import io
import itertools
import json
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.runs import config_from
from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups
from tensorboard.summary.writer import event_file_writer

from ffcv_convnext.config import Config
from ffcv_convnext.files import read_lines
from ffcv_convnext.run_folder import FolderLock, check_same_config, read_scores
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.run import build_learner
from ffcv_convnext.training.runlog import PACKAGES, RunLog, describe_machine, setup_logging

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def config(**settings: Any) -> Config:
    return Config.from_flat({"epochs": 2, "warmup_epochs": 0, **settings})


def step_entry(step: int, *, images_per_s: float | None = None) -> dict[str, Any]:
    rates = {"lr": 0.1, "weight_decay": 0.05, "images_per_s": images_per_s}
    return {"step": step, "epoch": (step - 1) // 10, "loss": 1 / step, **rates}


def epoch_entry(epoch: int, **scores: float) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "step": 10 * (epoch + 1),
        "train_loss": 1.5,
        "test_acc1": 50.0,
        "images_per_s": None,
        **scores,
    }


@pytest.fixture
def open_log(tmp_path: Path) -> Callable[..., RunLog]:
    def opened(
        *, step: int = 0, epoch: int = 0, processes: Processes = ALONE, folder: Path = tmp_path, **settings: Any
    ) -> RunLog:
        folder.mkdir(exist_ok=True)
        log = RunLog(folder, config(**settings), processes, {"global_batch": 8}, {"affinity": None})
        log.resume_at(step, epoch, continued=step > 0)
        return log

    return opened


def test_a_folder_is_locked_until_released(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "new" / "run")
    with pytest.raises(ValueError, match=rf"in use by another run \(process \d+ on {socket.gethostname()}\); wait"):
        FolderLock(tmp_path / "new" / "run")
    lock.release()
    FolderLock(tmp_path / "new" / "run").release()


def test_a_folder_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match=r"output_dir = .*file/run cannot be written: Not a directory; choose"):
        FolderLock(tmp_path / "file" / "run")


def test_settings_that_change_the_result_must_stay_the_same(tmp_path: Path) -> None:
    check_same_config(tmp_path, config())  # an empty folder takes any
    (tmp_path / "config.yaml").write_text(config().to_yaml())
    check_same_config(tmp_path, config(num_workers=3, output_dir="elsewhere", log_every=7, update_freq=2))
    with pytest.raises(
        ValueError, match=r"other settings \(batch_size: 64 != 128; lr: 0\.1 != 0\.004\); choose another"
    ):
        check_same_config(tmp_path, config(lr=0.1, batch_size=64))


def test_the_machine_is_described_in_run_json() -> None:
    facts = describe_machine(ALONE)
    assert set(facts["versions"]) == {"python", *PACKAGES}
    assert facts["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert facts["device"].endswith("CPU")
    assert len(facts["git"].split("+")[0]) == 40 or facts["git"].startswith("unknown")
    assert facts["host"] == socket.gethostname()
    assert facts["processes"] == 1
    json.dumps(facts)


@pytest.mark.parametrize(("precision", "matmul"), [("highest", "ieee"), ("high", "tf32"), ("medium", "tf32")])
def test_the_precision_of_float32_is_what_the_settings_say_and_is_in_run_json(
    small_settings: dict[str, Any], precision: str, matmul: str
) -> None:
    before = torch.get_float32_matmul_precision()
    try:
        build_learner(config_from(small_settings, matmul_precision=precision), ALONE, num_classes=4, steps_per_epoch=10)
        found = describe_machine(ALONE)["float32"]
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found["matmul_precision"], found["matmul"]) == (precision, matmul)
    assert found["convolution"] != "ieee", "a convolution keeps torch's default, which is TF32"


def test_the_time_of_a_processs_first_step_is_in_run_json(open_log: Callable[..., RunLog], tmp_path: Path) -> None:
    for seconds in (40.0, 3.0):
        log = open_log()
        log.advance(seconds)
        log.advance(0.1)
        log.close()
    assert [start["first_step_s"] for start in json.loads((tmp_path / "run.json").read_text())["starts"]] == [40, 3]


def test_a_line_that_a_kill_cut_short_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    assert read_lines(path) == []
    path.write_text('{"epoch": 0}\n{"epoch": 1}\n{"epo')
    assert read_lines(path) == [{"epoch": 0}, {"epoch": 1}]


def test_resuming_drops_what_was_logged_after_the_checkpoint(open_log: Callable[..., RunLog], tmp_path: Path) -> None:
    log = open_log()
    for step in range(1, 16):
        log.train(step_entry(step), 10)
    log.epoch(epoch_entry(0))
    log.close()
    with open(tmp_path / "steps.jsonl", "a") as file:
        file.write('{"step": 16, "los')  # killed here

    log = open_log(step=12, epoch=1)
    log.train(step_entry(13), 10)
    log.epoch(epoch_entry(1, test_acc1_ema=51.0))
    log.close()
    assert [entry["step"] for entry in read_lines(tmp_path / "steps.jsonl")] == list(range(1, 14))
    assert [entry["epoch"] for entry in read_lines(tmp_path / "log.jsonl")] == [0, 1]
    run = json.loads((tmp_path / "run.json").read_text())
    assert [start["from_step"] for start in run["starts"]] == [0, 12]
    assert run["global_batch"] == 8


@pytest.mark.parametrize("resumed_at", [0, 3])
def test_tensorboard_shows_each_step_once_after_a_resume(
    resumed_at: int, open_log: Callable[..., RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(time.time())  # TensorBoard orders event files by the second in their names
    monkeypatch.setattr(event_file_writer.time, "time", lambda: next(seconds))
    for start, end in ((0, 6), (resumed_at, 8)):
        log = open_log(step=start)
        for step in range(start + 1, end):
            log.train(step_entry(step), 10)
        log.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    losses = events.Scalars("loss/train_step")
    assert [loss.step for loss in losses] == list(range(1, 8))
    assert [loss.value for loss in losses] == pytest.approx([1 / step for step in range(1, 8)])
    assert "throughput/images_per_s_step" not in events.Tags()["scalars"], "None is not plotted"


def test_done_holds_the_scores(open_log: Callable[..., RunLog], tmp_path: Path) -> None:
    log = open_log()
    assert read_scores(tmp_path) is None
    log.done({"epochs": 2, "test_acc1": 50.0})
    log.close()
    assert read_scores(tmp_path) == {"epochs": 2, "test_acc1": 50.0}
    open_log().close()
    assert read_scores(tmp_path) is None, "a repeated run is not finished"


def test_other_processes_write_only_their_own_log(open_log: Callable[..., RunLog], tmp_path: Path) -> None:
    second = Processes(1, 2, 1, torch.device("cpu"))
    setup_logging(tmp_path / "not yet created by rank 0", second)
    log = open_log(processes=second)
    log.train(step_entry(1), 10)
    log.epoch(epoch_entry(0))
    log.done({})
    log.close()
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == ["rank1.log"]


def test_plain_lines_go_to_a_file_and_a_bar_to_a_terminal(
    open_log: Callable[..., RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = {}
    for terminal in (False, True):
        stream = io.StringIO()
        monkeypatch.setattr(stream, "isatty", lambda terminal=terminal: terminal)
        monkeypatch.setattr(sys, "stderr", stream)
        setup_logging(tmp_path, ALONE)
        log = open_log()
        log.start_epoch(0, 0, 10)
        log.advance(0.5)
        log.train(step_entry(1, images_per_s=123.4), 10)
        log.epoch(epoch_entry(0, test_acc1_ema=55.0))
        log.close()
        written[terminal] = stream.getvalue()
    assert "epoch 1/2 step 1/10: loss 1.0000, lr 1.00e-01, 123 images/s\n" in written[False]
    assert "\r" not in written[False]
    assert "loss 1.000, 123 images/s" in written[True]
    assert "epoch 1/2:  10%" in written[True]
    for text in written.values():
        assert "epoch 1/2: train loss 1.5000, val top-1 50.00 %, averaged weights 55.00 %\n" in text


class FakeWandb(SimpleNamespace):
    """Records the calls."""

    def __init__(self) -> None:
        super().__init__(starts=[], logged=[], finished=0, summary={})

    def init(self, **settings: Any) -> SimpleNamespace:
        self.starts.append(settings)
        return SimpleNamespace(id=settings["id"] or "run7", log=self.log, finish=self.finish, summary=self.summary)

    def log(self, numbers: dict[str, float], step: int) -> None:
        self.logged.append((step, numbers))

    def finish(self) -> None:
        self.finished += 1


def test_wandb_continues_the_same_run_after_a_resume(
    open_log: Callable[..., RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for start in (0, 2):
        log = open_log(step=start, log_wandb=True, project="mine")
        log.train(step_entry(start + 1), 10)
        log.epoch(epoch_entry(0))
        log.close()
    assert [start["id"] for start in wandb.starts] == [None, "run7"]
    assert {start["resume"] for start in wandb.starts} == {"allow"}
    assert {start["project"] for start in wandb.starts} == {"mine"}
    assert all(start["allow_val_change"] for start in wandb.starts), "workers may differ after a restart"
    assert wandb.starts[0]["name"] == tmp_path.name
    assert wandb.starts[0]["config"]["epochs"] == 2
    assert [step for step, _ in wandb.logged] == [1, 10, 3, 10]
    assert wandb.logged[0][1] == {"loss/train_step": 1.0, "schedule/lr": 0.1, "schedule/weight_decay": 0.05}
    assert wandb.finished == 2


def test_wandb_has_the_final_and_the_best_scores(
    open_log: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = open_log(log_wandb=True)
    log.epoch(epoch_entry(0, test_acc1=60.0, test_acc1_ema=20.0))
    log.close()
    log = open_log(step=10, epoch=1, log_wandb=True)  # the best epoch is from before the resume
    log.epoch(epoch_entry(1, test_acc1=55.0, test_acc1_ema=30.0))
    log.done({"epochs": 2, "test_acc1": 55.0, "test_acc1_ema": 30.0})
    log.close()
    assert wandb.summary == {
        "final_epochs": 2, "final_test_acc1": 55.0, "final_test_acc1_ema": 30.0,
        "best_test_acc1": 60.0, "best_test_acc1_ema": 30.0,
    }  # fmt: skip


def hparams_of(folder: Path) -> tuple[list[Any], list[str], list[str]]:
    """What TensorBoard's HParams tab lists for the runs below a folder.

    Session groups, ordered by name; settings and scores in the order of their columns.
    """
    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = data_provider.MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(SimpleNamespace(multiplexer=multiplexer, data_provider=provider))
    request = RequestContext()
    experiment = context.experiment_from_metadata(
        request, "", include_metrics=True, hparams_run_to_tag_to_content=context.hparams_metadata(request, ""),
        data_provider_hparams=[],
    )  # fmt: skip
    asked = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, include_metrics=True,
        allowed_statuses=[api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS, api_pb2.STATUS_RUNNING],
        col_params=[api_pb2.ColParams(metric=info.name) for info in experiment.metric_infos],
    )  # fmt: skip
    handler = list_session_groups.Handler(request, context, "", asked)
    groups = sorted(handler.run().session_groups, key=lambda group: group.sessions[0].name)
    return groups, [info.name for info in experiment.hparam_infos], [m.name.tag for m in experiment.metric_infos]


def test_the_hparams_tab_compares_runs_by_their_settings_and_scores(
    open_log: Callable[..., RunLog], tmp_path: Path
) -> None:
    for seed, top1 in ((0, 61.0), (1, 63.0)):
        log = open_log(folder=tmp_path / f"seed{seed}", seed=seed)
        log.epoch(epoch_entry(0, test_acc1=top1 + 5))
        log.epoch(epoch_entry(1, test_acc1=top1))
        if seed:
            log.done({"epochs": 2, "test_acc1": top1})
        log.close()
    groups, columns, tags = hparams_of(tmp_path)
    assert columns[0] == "seed", "what differs comes first"
    assert tags[:2] == ["accuracy/test_acc1", "accuracy/test_acc1_best"]
    assert [group.sessions[0].name for group in groups] == ["seed0", "seed1"], "each is one run, not a further one"
    settings = [dict(group.hparams.items()) for group in groups]
    differing = [name for name in settings[0] if settings[0][name] != settings[1][name]]
    assert differing == ["seed"]
    assert settings[0]["resnet_layers"].string_value
    assert not {"output_dir", "data_path"} & settings[0].keys()
    scores = [{v.name.tag: v.value for v in group.metric_values} for group in groups]
    assert [score["accuracy/test_acc1"] for score in scores] == [61.0, 63.0], "the last epoch's"
    assert [score["accuracy/test_acc1_best"] for score in scores] == [66.0, 68.0]
    assert [group.sessions[0].status for group in groups] == [api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_SUCCESS]


def test_a_repeated_run_has_its_new_settings_in_the_hparams_tab(
    open_log: Callable[..., RunLog], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = itertools.count(time.time())
    monkeypatch.setattr(event_file_writer.time, "time", lambda: next(seconds))
    found = []
    for lr, epoch in ((0.1, 0), (0.1, 1), (0.5, 0)):  # a start, a resume, a run that begins again
        log = open_log(folder=tmp_path / "run", lr=lr, step=10 * epoch, epoch=epoch)
        log.epoch(epoch_entry(epoch))
        log.close()
        (row,), _, _ = hparams_of(tmp_path)
        assert row.name == "run"
        assert row.hparams["auto_resume"].bool_value is True, "true and false are not numbers"
        best = next(each.value for each in row.metric_values if each.name.tag == "accuracy/test_acc1_best")
        found.append((row.hparams["lr"].number_value, best, len(list((tmp_path / "run").glob("events*")))))
    assert found == [(0.1, 50, 1), (0.1, 50, 2), (0.5, 50, 1)]


def test_tags_are_in_an_order_that_shows_accuracy_first(open_log: Callable[..., RunLog], tmp_path: Path) -> None:
    log = open_log()
    log.train(step_entry(1, images_per_s=9.0), 10)
    log.epoch(epoch_entry(0, test_acc1_ema=51.0, bad_samples=3, train_size=160, micro_batch=8))
    log.close()
    tags = sorted(EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"])
    assert tags[0] == "accuracy/test_acc1"
    assert list(dict.fromkeys(tag.partition("/")[0] for tag in tags)) == ["accuracy", "loss", "schedule", "throughput"]
    assert "throughput/bad_samples" in tags
    assert {"loss/train_step", "loss/train_loss", "schedule/lr", "schedule/train_size"} <= set(tags)


def test_missing_wandb_is_an_error(open_log: Callable[..., RunLog], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="log_wandb = true: wandb is not installed; pip install wandb"):
        open_log(log_wandb=True)
