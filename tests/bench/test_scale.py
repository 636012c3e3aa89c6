"""`bench scale`: its generated file is one that every part of the project accepts, and its table is complete."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from ffcv_convnext.bench import many_images, scale_conversion, scale_runs
from ffcv_convnext.bench.many_images import write_many_images
from ffcv_convnext.bench.scale import bench_scale, write_generated
from ffcv_convnext.bench.scale_ranks import measure_ranks
from ffcv_convnext.cli import run_command
from ffcv_convnext.data.check import verify_data
from ffcv_convnext.data.convert.source import list_classes, scan
from ffcv_convnext.errors import Failure
from ffcv_convnext.files import read_lines
from ffcv_convnext.ladder import read_status
from ffcv_convnext.report import read_runs
from ffcv_convnext.run_folder import STEP


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
    with pytest.raises(FileExistsError, match="train exists; name another"):
        write_many_images(tmp_path / "train", 23, num_classes=3, side=16)
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


def test_runs_are_written_as_training_writes_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scale_runs, "STEPS_PER_EPOCH", 30)
    lines = scale_runs.write_runs(tmp_path, 18, 4)
    assert lines == 16 * 4 + 2 * 2
    runs, notes = read_runs([tmp_path])
    assert notes == []
    assert sorted(Counter(run.progress for run in runs).items()) == [("done", 16), ("stopped 2/4", 2)]
    assert len(read_lines(runs[0].folder / "steps.jsonl", STEP)) == 12
    assert len({(run.folder.parent.name, run.seed) for run in runs}) == 18
    rows = read_status(tmp_path)
    assert [(row.state, row.epoch) for row in rows].count(("done", 4)) == 16
    assert all(row.images_per_s and row.top1 for row in rows)


def test_the_commands_on_runs_are_timed(tmp_path: Path) -> None:
    rows = list(scale_runs.measure_runs(lambda _: None, tmp_path, num_runs=(2,), epochs=2))
    assert [row.command for row in rows] == ["report", "report --html", "ladder status"]
    assert all(row.num_epochs == 4 and row.seconds > 0 and row.peak_mb > 10 for row in rows)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_processes_train_and_half_of_them_continue(tmp_path: Path) -> None:
    found = bench_scale([1500], lambda _: None, tmp_path, 4, ["ranks"])
    assert [(row.processes, row.start) for row in found.ranks] == [(4, "new"), (2, "continued")]
    for row in found.ranks:
        assert 0 < row.own <= row.most
        assert row.own < row.share, "libraries are shared"
    assert "continued" in found.format()


@pytest.mark.slow
def test_a_run_that_cannot_start_is_one_line(tmp_path: Path) -> None:
    write_generated(tmp_path, 600)  # no val.beton
    with pytest.raises(Failure, match=r"training ended before step 1: .*val\.beton"):
        list(measure_ranks(tmp_path, 600, 2, lambda _: None))
