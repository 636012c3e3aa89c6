"""`bench scale`: its generated file is one that every part of the project accepts, and its table is complete."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ffcv_convnext.bench import many_images, scale_conversion
from ffcv_convnext.bench.many_images import write_many_images
from ffcv_convnext.bench.scale import write_generated
from ffcv_convnext.cli import run_command
from ffcv_convnext.data.check import verify_data
from ffcv_convnext.data.convert.source import list_classes, scan


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
    assert run_command("bench", ["scale", "--stages", "load,other"]) == 2
    assert "stages = other: expected some of load, convert, join" in capsys.readouterr().err


def test_pictures_of_a_class_are_one_file_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_images, "MAX_LINKS", 4)
    write_many_images(tmp_path / "train", 23, num_classes=3, side=16)
    images = scan(tmp_path / "train", list_classes(tmp_path / "train"), all_classes=True)
    assert np.bincount(images.labels).tolist() == [7, 8, 8]
    stats = [(tmp_path / "train" / name).stat() for name in images.files]
    assert len({each.st_ino for each in stats}) == 8, "each class has as many files as its links need"
    assert max(each.st_nlink for each in stats) <= 4
    with pytest.raises(ValueError, match="num_classes = 3"):
        write_many_images(tmp_path / "few", 2, num_classes=3)


@pytest.mark.slow
def test_conversions_are_measured_from_planning_to_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scale_conversion, "SIDE", 200)  # several pages
    found = tmp_path / "scale.json"
    arguments = ["scale", "--stages", "convert,join", "--counts", "1200,1500", "--work", tmp_path, "--json", found]
    assert run_command("bench", [*map(str, arguments)]) == 0
    content = json.loads(found.read_text())
    steps = ["plan", "resume, to the first image", "convert", "verify", "data info"]
    steps += ["convert in 4 parts", "join of 4 parts"]
    rows = {(row["step"], row["num_images"]): row for row in content["conversion"]}
    assert set(rows) == {(step, number) for step in steps for number in (1200, 1500)}
    assert rows["convert", 1500]["peak"] > 1 << 20
    assert rows["resume, to the first image", 1500]["seconds"] < rows["convert", 1500]["seconds"]
    for files in content["files"]:
        assert files["beton"] > 16 << 20
        assert files["file_list"] == files["source_list"] == 34 * files["num_images"]
        assert 0 < files["manifest"] < files["beton"]
        assert files["journal"] > 20 * files["num_images"]
    assert "| resume, to the first image |" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["scale.json"]
