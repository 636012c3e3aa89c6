"""Benchmarks run and report; no claim about speed is made here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ffcv_convnext.bench.photographs import find_photographs, write_photo_folder
from ffcv_convnext.bench.rounds import compare
from ffcv_convnext.cli import run_command


def counting(images: int) -> Any:
    return (lambda: images), (lambda: None)


def failing(images: int) -> Any:
    raise OSError(f"no {images} images here")


@pytest.mark.slow
def test_bench_loader_prints_a_row_for_each_peer_and_writes_them_as_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    arguments = ["loader", "--num_images", "128", "--rounds", "1", "--peers", "stock FFCV,ours", "--json", str(out)]
    assert run_command("bench", arguments) == 0
    table = capsys.readouterr().out
    assert "| ours |" in table
    rows = json.loads(out.read_text())["rows"]
    assert [row["name"] for row in rows] == ["stock FFCV", "ours"]
    assert all(row["error"] is None and row["median"] > 0 and row["peak_mb"] > 50 for row in rows)
    assert rows[0]["ratio"] == 1


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["loader", "--peers", "DALLI"]) == 2
    assert "stock FFCV" in capsys.readouterr().err


def test_a_contestant_that_fails_is_a_row_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    contestants = [
        ("steady", f"{__name__}:counting", {"images": 10}),
        ("broken", f"{__name__}:failing", {"images": 10}),
    ]
    said: list[str] = []
    result = compare("test", contestants, reference="steady", rounds=2, facts={}, say=said.append)
    steady, broken = result.rows
    assert steady.ratio == 1
    assert broken.error == "OSError: no 10 images here"
    assert "failed: OSError" in result.format()


def test_photographs_become_an_imagenet_like_folder(tmp_path: Path) -> None:
    folder = write_photo_folder(tmp_path / "photos", 20)
    assert len(list((folder / "train").rglob("*.jpg"))) == 20
    assert len(list((folder / "train").iterdir())) == 10
    assert write_photo_folder(folder, 99) == folder, "what is complete is kept"
    assert len(find_photographs(folder)) == 30
    with pytest.raises(ValueError, match="no photographs found"):
        find_photographs(tmp_path / "nothing")


@pytest.mark.slow
def test_bench_startup_times_first_and_second_starts_of_ours_and_stock_ffcv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    assert run_command("bench", ["startup", "--num_images", "128", "--rounds", "1", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| ours | first |" in table
    rows = json.loads(out.read_text())["rows"]
    assert [(row["name"], row["start"]) for row in rows] == [
        (name, start)
        for name in ("ours", "ours, as train.py imports it", "stock FFCV")
        for start in ("first", "second")
    ]
    assert all(0 < row["torch_s"] < row["first_batch_s"] and row["cpu_s"] > 0 for row in rows)


def test_bench_startup_refuses_less_than_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["startup", "--num_images", "10"]) == 2
    assert "at least a batch of 128" in capsys.readouterr().err
