"""`bench scale`: its generated file is one that every part of the project accepts, and its table is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffcv_convnext.bench.scale import write_generated
from ffcv_convnext.cli import run_command
from ffcv_convnext.data.check import verify_data


def test_a_generated_file_is_a_whole_beton_without_pixels(tmp_path: Path) -> None:
    beton = write_generated(tmp_path, 600)
    [found] = verify_data(beton, 1).files
    assert found.problems == ["the list of original files train.files.txt is missing; copy it again"]
    assert not found.bad_samples
    assert beton.stat().st_size > 600 * 3 * 192**2
    assert beton.stat().st_blocks * 512 < 200_000, "its pages take no room"


def test_the_table_has_a_row_for_each_count_and_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = tmp_path / "scale.json"
    assert run_command("bench", ["scale", "--counts", "600,1200", "--processes", "2", "--work", str(tmp_path), "--json",
                                 str(found)]) == 0  # fmt: skip
    rows = json.loads(found.read_text())["rows"]
    assert [(row["num_images"], row["order"], row["processes"]) for row in rows] == [
        (600, "random", 1), (600, "quasi_random", 1), (1200, "random", 1), (1200, "quasi_random", 1),
        (1200, "random", 2),
    ]  # fmt: skip
    assert all(0 < row["held"] <= row["peak"] for row in rows)
    assert "| 1,200 | quasi_random | 1 |" in " ".join(capsys.readouterr().out.split())
    for wrong in ("x", "3"):
        assert run_command("bench", ["scale", "--counts", wrong]) == 2
    assert "expected at least 512" in capsys.readouterr().err
