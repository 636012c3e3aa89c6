"""A whole run from the command line, and the parts of the loop that compute figures."""

from __future__ import annotations

import contextlib
import io
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import TIMINGS, assert_equal, log_without_timings, train_here
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from ffcv_convnext.augment import Normalisation
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config, OptimConfig, load_config
from ffcv_convnext.data.beton.manifest import Manifest
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import read_lines
from ffcv_convnext.training import metrics
from ffcv_convnext.training.checkpoint import BEST, BEST_EMA, LAST, read_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.evaluation import evaluate_only
from ffcv_convnext.training.metrics import Evaluation, LossTracker, Throughput, evaluate
from ffcv_convnext.training.optim import build_optimizer, set_hyperparameters
from ffcv_convnext.training.schedule import Schedule, build_schedules

ALONE = Processes(0, 1, 0, torch.device("cpu"))


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def command(argv: list[str]) -> tuple[int, str]:
    """Exit status and stderr of `train.py`, in this process and with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with contextlib.redirect_stderr(io.StringIO()) as stderr:
            status = run_command("train", argv)
    finally:
        torch.set_num_threads(threads)
    return status, stderr.getvalue()


@dataclass(frozen=True)
class Finished:
    folder: Path
    settings: dict[str, Any]
    output: str


@pytest.fixture(scope="module")
def learned(small_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that learns its classes: no mixing, 6 epochs of 10 steps."""
    folder = tmp_path_factory.mktemp("runs") / "learned"
    settings = {
        **small_settings,
        **{"mixup": 0, "cutmix": 0, "reprob": 0, "drop_path": 0, "color_jitter": 0, "scale": "0.5,1.0"},
        **{"smoothing": 0, "lr": 4e-3, "epochs": 6, "recipe_batch": 4096, "output_dir": folder},
    }
    status, output = command(words(settings))
    assert status == 0, output
    return Finished(folder, settings, output)


def test_a_run_learns(learned: Finished) -> None:
    epochs = read_lines(learned.folder / "log.jsonl")
    assert epochs[-1]["train_loss"] < 0.8 * epochs[0]["train_loss"]
    assert epochs[-1]["test_loss"] < epochs[0]["test_loss"]
    assert epochs[-1]["test_acc1"] >= 80
    assert epochs[-1]["test_acc1_ema"] >= 80


def test_the_log_has_an_object_for_each_epoch_with_all_keys(learned: Finished) -> None:
    epochs = read_lines(learned.folder / "log.jsonl")
    assert [entry["epoch"] for entry in epochs] == list(range(6))
    assert [entry["step"] for entry in epochs] == [10, 20, 30, 40, 50, 60]
    for entry in epochs:
        assert set(entry) == {
            *("epoch", "step", "train_loss", "test_acc1", "test_acc5", "test_loss"),
            *("test_acc1_ema", "test_acc5_ema", "test_loss_ema", "lr", "n_parameters", "bad_samples", *TIMINGS),
            *("train_size", "micro_batch"),
        }
        assert entry["test_acc5"] == 100, "four classes"
        assert entry["images_per_s"] > 0
        assert 0 <= entry["data_wait_s"] < entry["train_s"] < entry["epoch_s"]
    steps = read_lines(learned.folder / "steps.jsonl")
    assert [entry["step"] for entry in steps][:6] == [4, 8, 10, 12, 16, 20], "every 4 steps and at an epoch's end"
    assert steps[0]["images_per_s"] is None, "warm-up"
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "weight_decay", "images_per_s"}


def test_the_epochs_loss_is_the_mean_over_its_steps(learned: Finished) -> None:
    first = [entry for entry in read_lines(learned.folder / "steps.jsonl") if entry["epoch"] == 0]
    mean = (4 * first[0]["loss"] + 4 * first[1]["loss"] + 2 * first[2]["loss"]) / 10
    assert read_lines(learned.folder / "log.jsonl")[0]["train_loss"] == pytest.approx(mean)


def test_run_json_identifies_data_code_and_machine(learned: Finished, beton_dir: Path) -> None:
    run = json.loads((learned.folder / "run.json").read_text())
    (start,) = run["starts"]
    assert run["global_batch"] == 8
    assert run["steps_per_epoch"] == 10
    assert run["num_classes"] == 4
    assert run["images"] == {"train": 80, "val": 20}
    assert run["data"] == {split: Manifest.for_beton(beton_dir / f"{split}.beton").sha256 for split in ("train", "val")}
    assert run["n_parameters"] == read_lines(learned.folder / "log.jsonl")[0]["n_parameters"]
    assert start["from_step"] == 0
    assert {"time", "host", "processes", "device", "cpu_cores", "git", "versions", "command"} <= set(start)


def test_the_folder_keeps_the_resolved_settings(learned: Finished) -> None:
    assert load_config(learned.folder / "config.yaml") == Config.from_flat(learned.settings)


def test_the_global_batch_is_printed_and_an_unusual_one_warned_about(learned: Finished) -> None:
    assert "global batch 8 = batch_size 8 x update_freq 1 x 1 processes on cpu; peak lr 0.004" in learned.output
    assert "warning: the global batch is 8, but lr = 0.004 is meant for 4096 (recipe_batch)" in learned.output
    assert "scale lr (linearly: 7.81e-06) and set recipe_batch to 8" in learned.output


def test_tensorboard_reads_the_events(learned: Finished) -> None:
    events = EventAccumulator(str(learned.folder)).Reload()
    ours = [entry["test_acc1"] for entry in read_lines(learned.folder / "log.jsonl")]
    assert [event.value for event in events.Scalars("accuracy/test_acc1")] == pytest.approx(ours)
    assert [event.step for event in events.Scalars("accuracy/test_acc1")] == [10, 20, 30, 40, 50, 60]
    assert len(events.Scalars("loss/train_step")) == len(read_lines(learned.folder / "steps.jsonl"))


def test_the_best_checkpoints_are_of_the_best_epochs(learned: Finished) -> None:
    epochs = read_lines(learned.folder / "log.jsonl")
    for name, key, part in ((BEST, "test_acc1", "model"), (BEST_EMA, "test_acc1_ema", "ema")):
        content = read_checkpoint(learned.folder / name)
        best = max(entry[key] for entry in epochs)
        first = next(entry["epoch"] for entry in epochs if entry[key] == best)
        assert (content[key], content["epoch"]) == (best, first + 1)
        assert part in content
    last = read_checkpoint(learned.folder / LAST)
    assert (last["epoch"], last["step"]) == (6, 60)
    assert json.loads((learned.folder / "done").read_text())["test_acc1"] == epochs[-1]["test_acc1"]


def test_the_same_command_on_a_finished_folder_does_nothing(learned: Finished) -> None:
    def files() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in learned.folder.iterdir() if path.suffix != ".log"}

    before = files()
    status, output = command(words(learned.settings))
    assert status == 0
    assert "is finished: {'epochs': 6" in output
    assert files() | {".lock": 0} == before | {".lock": 0}


def test_other_settings_on_the_same_folder_are_refused(learned: Finished) -> None:
    before = (learned.folder / "config.yaml").read_text()
    status, output = command(words({**learned.settings, "lr": 0.5, "mixup": 0.1}))
    assert status == 2
    assert "holds a run with other settings (mixup: 0.1 != 0.0; lr: 0.5 != 0.004); choose another" in output
    assert (learned.folder / "config.yaml").read_text() == before


def test_the_folders_config_repeats_the_run(learned: Finished, tmp_path: Path) -> None:
    status, output = command(["--config", str(learned.folder / "config.yaml"), "--output_dir", str(tmp_path)])
    assert status == 0, output
    ours, theirs = (read_checkpoint(folder / LAST) for folder in (tmp_path, learned.folder))
    for part in ("model", "ema", "optimizer"):
        assert_equal(ours[part], theirs[part], where=part)
    assert log_without_timings(tmp_path) == log_without_timings(learned.folder)


@pytest.mark.usefixtures("one_thread")
def test_eval_gives_the_scores_of_the_log(learned: Finished, tmp_path: Path) -> None:
    config = Config.from_flat({**learned.settings, "eval": True})
    last = read_lines(learned.folder / "log.jsonl")[-1]
    keys = [f"test_{name}{ending}" for ending in ("", "_ema") for name in ("acc1", "acc5", "loss")]

    (scores,) = evaluate_only(config).values()
    assert scores["images"] == 20
    assert [scores[key] for key in keys] == pytest.approx([last[key] for key in keys], rel=1e-6)

    elsewhere = config.replace(output_dir=tmp_path / "unused", dist_eval=False)
    (again,) = evaluate_only(elsewhere.replace(resume=learned.folder / LAST)).values()
    assert again == pytest.approx(scores)
    for name, ending in ((BEST, ""), (BEST_EMA, "_ema")):
        content = read_checkpoint(learned.folder / name)
        (best,) = evaluate_only(elsewhere.replace(resume=learned.folder / name)).values()
        assert set(best) == {"images", *(key for key in keys if key.endswith("_ema") == bool(ending))}
        assert best[f"test_acc1{ending}"] == content[f"test_acc1{ending}"]
    assert not (tmp_path / "unused").exists(), "evaluating writes nothing"


def test_eval_prints_the_scores_and_does_not_change_the_folder(learned: Finished) -> None:
    before = sorted(path.name for path in learned.folder.iterdir())
    status, output = command(words({**learned.settings, "eval": "true"}))
    assert status == 0
    last = read_lines(learned.folder / "log.jsonl")[-1]
    assert f"{learned.folder / LAST}: test_acc1 {last['test_acc1']:.4f}, " in output
    assert sorted(path.name for path in learned.folder.iterdir()) == before


def test_eval_refuses_a_missing_or_unsuitable_checkpoint(learned: Finished, tmp_path: Path) -> None:
    config = Config.from_flat({**learned.settings, "eval": True, "output_dir": tmp_path})
    with pytest.raises(ValueError, match=r"there is no checkpoint; give one with --resume"):
        evaluate_only(config)
    with pytest.raises(ValueError, match=r"another network than these settings; use its own: --config .*config\.yaml"):
        evaluate_only(config.replace(resume=learned.folder / LAST, resnet_embed_dim=16))
    torch.save({"model": {"stem.weight": torch.ones(1)}}, tmp_path / "published.pth")
    with pytest.raises(ValueError, match=r"published\.pth does not fit the model: .* unexpected: stem\.weight$"):
        evaluate_only(config.replace(resume=tmp_path / "published.pth"))


def test_finetuning_starts_from_the_given_weights(learned: Finished, tmp_path: Path) -> None:
    changes = {"epochs": 1, "lr": 1e-12, "min_lr": 0.0, "warmup_epochs": 0, "output_dir": tmp_path}
    scores = train_here({**learned.settings, **changes}, finetune=learned.folder / BEST)
    start, end = read_checkpoint(learned.folder / BEST), read_checkpoint(tmp_path / LAST)
    weights = [name for name in start["model"] if not re.search("running|num_batches", name)]
    assert_equal(*({name: part["model"][name] for name in weights} for part in (end, start)), tolerance=1e-6)
    assert abs(scores["test_acc1"] - start["test_acc1"]) <= 15, "only the running statistics moved"
    assert end["step"] == 10, "the run itself starts at its beginning"


@pytest.mark.slow
def test_a_timm_model_trains_through_the_same_pipeline(small_settings: dict[str, Any], tmp_path: Path) -> None:
    ours = {name: value for name, value in small_settings.items() if not name.startswith("resnet_")}
    status, output = command(words({**ours, "model": "test_convnext", "epochs": 1, "output_dir": tmp_path}))
    assert status == 0, output
    (entry,) = read_lines(tmp_path / "log.jsonl")
    assert entry["n_parameters"] == sum(tensor.numel() for tensor in read_checkpoint(tmp_path / LAST)["model"].values())


@pytest.mark.slow
def test_mixed_precision_accumulation_clipping_and_another_optimiser_work_together(
    small_settings: dict[str, Any], tmp_path: Path
) -> None:
    changes = {"amp": "bf16", "update_freq": 2, "clip_grad": 1.0, "opt": "lamb", "weight_decay_end": 0.2}
    train_here({**small_settings, **changes}, epochs=1, model_ema=False, channels_last=False, output_dir=tmp_path)
    (entry,) = read_lines(tmp_path / "log.jsonl")
    assert entry["step"] == 5
    assert "test_acc1_ema" not in entry
    assert not (tmp_path / BEST_EMA).exists()
    assert read_checkpoint(tmp_path / LAST)["ema"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_dir": "none"}, "output_dir is not set; give a run folder"),
        ({"amp": "fp16"}, "amp = fp16 needs a CUDA device; use --amp bf16 or --amp off on a CPU"),
        ({"nb_classes": 3}, "nb_classes = 3: the data has 4 classes; remove it, or raise it"),
        (
            {"data_path": "/nowhere"},
            "/nowhere/train.beton does not exist; create it with: python write_ffcv_dataset.py",
        ),
        ({"data_path": "none"}, "data_path is not set"),
        ({"batch_size": 128}, "the training set has 80 images, fewer than the global batch of 128"),
        ({"opt": "adamv"}, "opt = adamv: timm has no such optimiser; did you mean "),
        ({"warmup_steps": 21}, "warmup_steps = 21: longer than the run of 20 optimiser steps"),
        ({"finetune": "/nowhere.pth"}, "/nowhere.pth"),
    ],
)
def test_wrong_settings_are_one_line_and_status_2(
    changes: dict[str, Any], message: str, small_settings: dict[str, Any], tmp_path: Path
) -> None:
    status, output = command(words({**small_settings, "output_dir": tmp_path, **changes}))
    assert status == 2
    line = output.splitlines()[-1]
    assert line.startswith("error: ")
    assert message in line
    assert "Traceback" not in output
    assert not (tmp_path / "config.yaml").exists(), "nothing was started"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_refused(small_settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"this machine has 0 CUDA devices.*use --device cpu"):
        train_here(small_settings, device="cuda", output_dir=tmp_path)


# Figures.


class Lookup(nn.Module):
    """Returns prepared logits, one row for each image in the order they come."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits, self.position = logits, 0

    def forward(self, images: Tensor) -> Tensor:
        rows = self.logits[self.position : self.position + len(images)]
        self.position += len(images)
        return rows


def no_autocast() -> torch.autocast:
    return torch.autocast("cpu", enabled=False)


def batches(labels: list[int], size: int) -> list[tuple[Tensor, Tensor]]:
    images = torch.zeros(len(labels), 3, 4, 4, dtype=torch.uint8)
    return list(zip(images.split(size), torch.tensor(labels).split(size), strict=True))


def evaluated(network: nn.Module, labels: list[int], size: int) -> Evaluation:
    found = evaluate(network, batches(labels, size), ALONE, no_autocast, Normalisation.of(Config().data))
    assert list(found) == [""]
    return found[""]


def test_evaluation_counts_top1_and_top5_by_hand() -> None:
    row = torch.arange(7.0, 0.0, -1.0)  # class 0 is first, class 4 fifth, class 5 sixth
    labels = [0, 0, 1, 4, 5]
    scores = evaluated(Lookup(row.repeat(5, 1)), labels, 2)
    losses = [row.exp().sum().log().item() - row[label].item() for label in labels]
    assert scores.scores() == pytest.approx({"test_acc1": 40.0, "test_acc5": 80.0, "test_loss": sum(losses) / 5})
    assert scores.images == 5


def test_evaluation_with_fewer_than_five_classes_counts_them_all() -> None:
    logits = torch.eye(3)[[0, 1, 2, 0]]
    scores = evaluated(Lookup(logits), [0, 1, 2, 2], 3)
    assert (scores.acc1, scores.acc5, scores.images) == (75.0, 100.0, 4)


def test_evaluation_leaves_the_network_in_evaluation_mode() -> None:
    network = Lookup(torch.eye(3)).train()
    evaluated(network, [0, 1, 2], 3)
    assert not network.training


def test_the_loss_tracker_averages_micro_batches_then_steps() -> None:
    tracker = LossTracker(ALONE)
    for step, loss in ((1, 1.0), (1, 3.0), (2, 5.0), (2, 7.0)):
        tracker.add(torch.tensor(loss), step)
    assert tracker.epoch.value is None, "nothing is fetched before flush"
    tracker.flush()
    assert tracker.interval.value == 4.0
    tracker.flush()  # nothing new
    tracker.add(torch.tensor(10.0), 3)
    tracker.add(torch.tensor(12.0), 3)
    tracker.flush()
    assert (tracker.epoch.num_steps, tracker.epoch.value) == (3, pytest.approx(19 / 3))


def test_the_epochs_mean_does_not_depend_on_when_losses_are_fetched() -> None:
    losses = torch.rand(50, generator=torch.Generator().manual_seed(0))
    means = set()
    for every in (1, 3, 7, 50):
        tracker = LossTracker(ALONE)
        for step in range(50):
            for loss in losses[step : step + 3]:  # a third is no binary fraction
                if len(losses[step : step + 3]) == 3:
                    tracker.add(loss, step)
            if step % every == every - 1:
                tracker.flush()
        tracker.flush()
        means.add(tracker.epoch.value)
    assert len(means) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_steps(bad: float) -> None:
    tracker = LossTracker(ALONE)
    for step, loss in ((7, 1.0), (8, bad), (9, 1.0), (10, bad)):
        tracker.add(torch.tensor(loss), step)
    with pytest.raises(Failure, match=r"the loss is not finite at optimiser step 8, 10$"):
        tracker.flush()


def test_throughput_leaves_out_the_first_interval_and_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 50.0, 52.0, 54.0, 1000.0, 1001.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    throughput = Throughput()
    throughput.start()
    assert throughput.interval(80) is None, "50 s of compilation"
    assert throughput.interval(80) == 40.0
    assert throughput.interval(120) == 60.0
    assert throughput.take() == 50.0
    throughput.start()  # after an evaluation of 946 s
    assert throughput.interval(30) == 30.0
    assert throughput.take() == 30.0
    assert throughput.take() is None


def test_the_schedule_warms_up_linearly_then_follows_a_cosine() -> None:
    schedule = Schedule(start=4.0, end=1.0, warmup_steps=5, decay_end=25)
    assert [schedule(step) for step in range(5)] == [0.0, 1.0, 2.0, 3.0, 4.0]
    assert [schedule(step) for step in (5, 15, 25)] == pytest.approx([4.0, 2.5, 1.0])
    assert schedule(10) == pytest.approx(1 + 1.5 * (1 + 2**-0.5))


def test_epochs_become_steps_and_weight_decay_has_its_own_cosine() -> None:
    settings = {"epochs": 4, "warmup_epochs": 2, "lr": 1.0, "min_lr": 0.0, "weight_decay": 0.1}
    schedules = build_schedules(Config.from_flat({**settings, "weight_decay_end": 0.3}), 10)
    assert schedules.lr(19) == schedules.lr(20) == 1.0
    assert schedules.lr(30) == pytest.approx(0.5)
    assert schedules.weight_decay(20) == pytest.approx(0.2)
    constant = build_schedules(Config.from_flat({**settings, "warmup_steps": 3}), 10)
    assert constant.weight_decay(0) == constant.weight_decay(39) == 0.1
    assert constant.lr(2) == 1.0


def test_biases_and_norms_have_no_weight_decay() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    optimizer = build_optimizer(network, OptimConfig(weight_decay=0.05))
    set_hyperparameters(optimizer, lr=0.5, weight_decay=0.2)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for parameter in network.parameters():
        assert decay[id(parameter)] == (0.2 if parameter.ndim > 1 else 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}


@pytest.mark.parametrize("opt", ["sgd", "adamw", "lamb", "lion", "rmsproptf"])
def test_any_of_timms_optimisers_can_be_named(opt: str) -> None:
    assert len(build_optimizer(nn.Linear(2, 2), OptimConfig(opt=opt)).param_groups) == 2


def test_betas_for_an_optimiser_without_them_are_refused() -> None:
    with pytest.raises(ValueError, match="opt_betas has no effect with opt = sgd"):
        build_optimizer(nn.Linear(2, 2), OptimConfig(opt="sgd", opt_betas=(0.9, 0.99)))


def test_weight_decay_may_rise_from_zero() -> None:
    optimizer = build_optimizer(nn.Linear(2, 2), OptimConfig(weight_decay=0.0, weight_decay_end=0.3))
    set_hyperparameters(optimizer, lr=0.1, weight_decay=0.15)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.15]
