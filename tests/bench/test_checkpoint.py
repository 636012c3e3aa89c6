"""`bench checkpoint`: its shares follow from the measured times, and it saves the whole state."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.runs import config_from

from ffcv_convnext.bench.checkpoint import CheckpointTimes, Round, state_of
from ffcv_convnext.cli import run_command
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.run import build_learner

SMALL = {"device": "cpu", "resnet_layers": "1-1-1-1", "resnet_embed_dim": 8, "model_ema": True}


def test_the_shares_follow_from_the_times() -> None:
    first = Round(in_loop_s=4.0, blocked_s=2.0, on_disk_s=5.0, alone_rate=100.0, beside_rate=80.0)
    later = [Round(4.0, 0.25, 5.0, 100.0, 100.0), Round(4.0, 0.5, 4.0, 100.0, 50.0), Round(4.0, 1.0, 4.0, 10.0, 11.0)]
    lines = CheckpointTimes({"cores": 2}, 1_400_000_000, [first, *later]).format().splitlines()
    assert "file 1.4 GB" in lines[0]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[4:8]]
    assert cells == [
        ["first", "4.00", "2.000", "5.00", "40.0%", "20.0%"],
        ["2", "4.00", "0.250", "5.00", "5.0%", "0.0%"],
        ["3", "4.00", "0.500", "4.00", "12.5%", "50.0%"],
        ["4", "4.00", "1.000", "4.00", "25.0%", "-10.0%"],
    ]
    assert "After the first save the loop waits for 12.5% (5.0%-25.0%)" in lines[-1]


def test_the_state_is_that_of_training() -> None:
    config = config_from(SMALL)
    learner = build_learner(config, Processes.from_environment("cpu"), num_classes=10, steps_per_epoch=5)
    content = state_of(learner)
    parameters = list(learner.network.parameters())
    assert set(content["model"]) == set(content["ema"])
    assert {key for each in content["optimizer"]["state"].values() for key in each} >= {"exp_avg", "exp_avg_sq"}
    assert len(content["optimizer"]["state"]) == len(parameters)


def test_it_saves_beside_output_dir_and_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in SMALL.items() for word in (f"--{name}", str(value))]
    flags += ["--output_dir", str(tmp_path / "runs/new"), "--json", str(tmp_path / "figures.json")]
    assert run_command("bench", ["checkpoint", *flags, "--rounds", "2"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["num_bytes"] > 4 * 4 * found["facts"]["parameters"], "weights, averaged weights, two moments"
    assert len(found["rounds"]) == 2
    capsys.readouterr()
    assert run_command("bench", ["checkpoint", *flags, "--rounds", "1"]) == 2
    assert "rounds = 1: bench checkpoint needs at least 2" in capsys.readouterr().err
