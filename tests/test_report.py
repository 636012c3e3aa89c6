"""The table of run folders, from small folders written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.report import find_runs, format_table, summarise


def make_run(folder: Path, *epochs: dict[str, Any], num_epochs: int = 2, done: bool = False) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(Config.from_flat({"epochs": num_epochs, "warmup_epochs": 0}).to_yaml())
    (folder / "run.json").write_text(json.dumps({"n_parameters": 28_589_128, "starts": []}))
    if epochs:
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in epochs))
    if done:
        (folder / "done").write_text("{}")
    return folder


def epoch(number: int, acc1: float, images_per_s: float | None, **more: float) -> dict[str, Any]:
    return {"epoch": number, "test_acc1": acc1, "images_per_s": images_per_s, "epoch_s": 90.0, **more}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished run, an unfinished one, one without an epoch, and things that are no runs."""
    make_run(
        tmp_path / "b_finished",
        epoch(0, 40.0, None, test_acc1_ema=10.0),
        epoch(1, 80.125, 1234.5, test_acc1_ema=81.0),
        done=True,
    )
    make_run(tmp_path / "a_cut", epoch(0, 7.5, 99.4), num_epochs=300)
    make_run(tmp_path / "c_just_begun")
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


TABLE = """\
| run          |           epochs | parameters | top-1 % | averaged top-1 % | images/s | minutes |
|--------------|-----------------:|-----------:|--------:|-----------------:|---------:|--------:|
| a_cut        | 1/300 unfinished | 28,589,128 |    7.50 |                - |       99 |     1.5 |
| b_finished   |              2/2 | 28,589,128 |   80.12 |            81.00 |     1234 |     3.0 |
| c_just_begun |   0/2 unfinished | 28,589,128 |       - |                - |        - |     0.0 |"""


def test_the_table_is_aligned_and_marks_unfinished_runs(runs: Path) -> None:
    assert format_table([summarise(folder) for folder in find_runs([runs])]) == TABLE


def test_the_command_prints_the_table(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("report", [str(runs)]) == 0
    assert capsys.readouterr().out == TABLE + "\n"


def test_runs_come_in_the_order_asked_for(runs: Path) -> None:
    folders = [runs / "c_just_begun", runs / "a_cut"]
    assert find_runs(folders) == folders


def test_a_log_line_cut_short_is_left_out(runs: Path) -> None:
    with open(runs / "b_finished" / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "test_a')
    assert summarise(runs / "b_finished").epochs == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is no folder"),
        ("not_a_run", "is no run folder and holds none: expected config.yaml and run.json in it"),
        ("notes.txt", "notes.txt is no folder"),
    ],
)
def test_what_is_no_run_folder_is_refused(
    name: str, message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        find_runs([runs / name])
    assert run_command("report", [str(runs / name)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
