"""`report --sort` and `--csv`: one table of all runs, ordered by any setting or score."""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import REPOSITORY
from support.ladder_runs import steps_of, write_run

from ffcv_convnext.cli import run_command

STEPS = {step.name: step for step in steps_of()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, seed, top1, settings in (
        ("a", 0, 80.0, {"lr": 2e-3}),
        ("b", 10, 81.0, {"lr": 1e-2, "color_jitter": "none"}),
        ("c", 2, 79.0, {"lr": 4e-3}),
    ):
        write_run(tmp_path / name, STEPS["07_kernel7"], top1=top1, seed=seed, **settings)
    write_run(tmp_path / "d", STEPS["08_gelu"], epochs=0)
    return tmp_path


def rows(capsys: pytest.CaptureFixture[str], folder: Path, *flags: str) -> list[dict[str, str]]:
    assert run_command("report", [str(folder), "--csv", *flags]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def test_the_columns_are_the_settings_that_differ_and_the_scores(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = rows(capsys, folder)
    settings = ["color_jitter", "lr", "resnet_act_layer"]
    assert sorted(list(found[0])[2:-8]) == settings
    assert list(found[0])[-8:] == [
        "state", "epochs_done", "top1", "top1_ema", "best_top1", "best_top1_ema", "images_per_s", "minutes",
    ]  # fmt: skip
    assert [row["run"] for row in found] == list("abcd")
    assert [row["lr"] for row in found] == ["0.002", "0.01", "0.004", "0.004"]
    assert found[0]["top1"] == "80"
    assert found[3]["top1"] == ""
    assert not list(folder.glob("ladder.*")), "no file is written"


@pytest.mark.parametrize(
    ("flags", "order"),
    [
        (["--sort", "lr"], "acdb"),
        (["--sort", "lr", "--descending"], "bcda"),
        (["--sort", "top1"], "cabd"),  # missing values come last
        (["--sort", "top1", "--descending"], "bacd"),
        (["--sort", "seed"], "adcb"),  # as numbers
        (["--sort", "epochs"], "abcd"),  # the same for all: it is shown all the same
        (["--sort", "run", "--descending"], "dcba"),
    ],
)
def test_runs_are_sorted(flags: list[str], order: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, folder, *flags)
    assert "".join(row["run"] for row in found) == order
    assert flags[1] in found[0]


def test_a_table_for_people(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("report", [str(folder), "--sort", "top1", "--descending"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[2].split("|")[1].strip() == "b"
    assert " 81.00 " in lines[2]
    assert lines[-1].count(" - ") >= 4


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sort", "learning"], "--sort learning: unknown"),
        (["--sort", "top"], "did you mean"),
        (["--descending"], "--descending needs --sort NAME"),
        (["--csv", "--html"], "print one table and write no file"),
    ],
)
def test_wrong_flags_are_one_line(
    flags: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("report", [str(folder), *flags]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_reader_that_leaves_early_is_no_error(folder: Path) -> None:
    command = f"{sys.executable} -m ffcv_convnext.cli report {folder} --csv"
    for number in range(40):
        write_run(folder / f"more{number}", STEPS["08_gelu"], seed=number)
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command} | head -n 0; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.stdout.strip() in ("141", "0"), "0: everything was written before head ended"
    assert result.stderr == ""


@pytest.mark.parametrize("command", [["--help"], ["train", "--help"], ["report", "RUNS", "--csv"]])
def test_a_reader_that_has_left_already_is_no_error(command: list[str], folder: Path) -> None:
    argv = [str(folder) if word == "RUNS" else word for word in command]
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "ffcv_convnext.cli", *argv]
    result = subprocess.run(program, stdout=write, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    os.close(write)
    assert result.stderr == ""
    assert result.returncode == 141 or command[0] == "train", "argparse hides the error of its help"
