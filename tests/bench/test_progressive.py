"""`bench progressive`: its figures follow from the measured times, and it trains as the schedule says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffcv_convnext.bench import progressive
from ffcv_convnext.bench.progressive import ProgressiveTimes, SizeTimes, first_epoch
from ffcv_convnext.bench.timing import RepeatedDecoding
from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.training.engine import Learner

RAMP = {"min_res": 32, "max_res": 64, "start_ramp": 1, "end_ramp": 2}
SMALL = ["--device", "cpu", "--amp", "off", "--batch_size", "4", "--update_freq", "2", "--epochs", "4"]
SMALL += ["--warmup_epochs", "0", "--resnet_layers", "1-1-1-1", "--resnet_embed_dim", "8"]
SMALL += [word for name, value in RAMP.items() for word in (f"--{name}", str(value))]


def test_the_schedules_time_is_the_mean_over_its_epochs_round_by_round() -> None:
    small = SizeTimes(64, num_epochs=3, micro_batch=16, image_s=(0.1, 0.3, 0.2))
    large = SizeTimes(128, num_epochs=1, micro_batch=4, image_s=(0.2, 0.4, 0.8))
    found = ProgressiveTimes({"cores": 2}, [small, large], relative_pixels=0.4375)
    assert small.relative_to(large) == pytest.approx([0.5, 0.75, 0.25])
    assert found.relative_times == pytest.approx([(3 * 0.5 + 1) / 4, (3 * 0.75 + 1) / 4, (3 * 0.25 + 1) / 4])
    lines = found.format().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:6]]
    assert cells == [
        ["64", "3", "16", "5", "3.333-10", "0.500", "0.250-0.750", "0.250"],
        ["128", "1", "4", "2.5", "1.25-5", "1.000", "1.000-1.000", "1.000"],
    ]
    assert "time 0.625 (0.438-0.812) of that at 128 pixels throughout, with 0.438 of the pixels" in lines[-1]
    assert json.loads(found.to_json())["relative_times"] == found.relative_times


def test_the_sizes_take_turns_with_the_micro_batches_of_the_schedule(
    beton_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns: list[int] = []
    shapes: list[tuple[int, int]] = []
    original = progressive.train_at

    def watched(learner: Learner, decoding: RepeatedDecoding, size: int, seconds: float) -> float:
        turns.append(size)
        handle = learner.network.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[::3]))
        found = original(learner, decoding, size, seconds)
        handle.remove()
        return found

    monkeypatch.setattr(progressive, "train_at", watched)
    flags = ["--data_path", str(beton_dir), "--res_batch", "true", "--rounds", "2", "--seconds", "0"]
    assert run_command("bench", ["progressive", *SMALL, *flags, "--json", str(tmp_path / "figures.json")]) == 0
    assert turns == [32, 64, 64, 32, 32, 64], "to warm up, then two rounds"
    # of two steps in each turn, the first one is not timed
    assert shapes == [*[(8, 32)] * 2, *[(4, 64)] * 8, *[(8, 32)] * 4, *[(4, 64)] * 4]
    found: dict[str, Any] = json.loads((tmp_path / "figures.json").read_text())
    assert [(each["size"], each["num_epochs"], each["micro_batch"]) for each in found["sizes"]] == [
        (32, 2, 8),
        (64, 2, 4),
    ]
    assert all(len(each["image_s"]) == 2 and min(each["image_s"]) > 0 for each in found["sizes"])
    assert found["relative_pixels"] == pytest.approx((2 * 0.25 + 2) / 4)
    assert capsys.readouterr().out.startswith("progressive resizing: cores ")


def test_the_first_epoch_of_a_size() -> None:
    config = Config.from_flat({**RAMP, "start_ramp": 0, "end_ramp": 8, "max_res": 96})
    assert {size: first_epoch(config, size) for size in config.train_sizes()} == {32: 0, 64: 2, 96: 7}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--batch_size", "4"], "bench progressive needs progressive resizing: --min_res"),
        ([*SMALL, "--peers", "a"], "peers: bench progressive has one row for each size; remove it"),
        ([*SMALL, "--rounds", "0"], "rounds = 0: expected at least 1"),
        ([*SMALL, "--data_path", "/nowhere"], "/nowhere/train.beton not found"),
    ],
)
def test_what_it_cannot_measure_is_refused(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["progressive", *flags]) != 0
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
