"""Contestants take turns, and `bench loader` and `bench convert` report them; no test is about speed."""

from __future__ import annotations

import importlib.util
import json
import mmap
import os
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ffcv_convnext.bench import loader
from ffcv_convnext.bench.compare import Comparison, Timed, compare, first_result, imports_done, note
from ffcv_convnext.bench.options import Options
from ffcv_convnext.bench.synthetic_data import image_folder
from ffcv_convnext.cli import run_command

OPTIONS = Options(photographs=None, rounds=2, peers=None, progress=lambda _: None)


def slow_to_end() -> Any:
    """Give the first result a second before the end."""

    def work() -> int:
        first_result()
        time.sleep(1)
        return 1

    return work, None


def counting(images: int) -> Any:
    return (lambda: images), (lambda: None)


def failing(images: int) -> Any:
    raise OSError(f"no {images} images here")


def dying(images: int) -> Any:
    sys.stderr.write("out of luck\n")
    os._exit(images)


def hanging() -> Any:
    return (lambda: time.sleep(600)), None


def timing_itself(images: int) -> Any:
    def work() -> Timed:
        note(peak_gb=images / 4)
        return Timed(images, 2.0)

    return work, None


def holding(own_mb: int, file: str) -> Any:
    """Allocate memory before and after the imports, in a child, and map a file."""
    before = np.ones(64 << 20, np.uint8)
    imports_done()
    mapped = mmap.mmap(os.open(file, os.O_RDONLY), 0, prot=mmap.PROT_READ)
    kept = [before, mapped]

    def work() -> int:
        sum(mapped[:: mmap.PAGESIZE])
        kept.append(np.ones(own_mb << 20, np.uint8))
        if (child := os.fork()) == 0:  # shares all of it, and allocates as much again
            kept.append(np.ones(own_mb << 20, np.uint8))
            time.sleep(0.5)
            os._exit(0)
        os.waitpid(child, 0)
        kept.pop()
        return 1

    return work, None


def compared(contestants: dict[str, tuple[str, dict[str, Any]]], **options: Any) -> Comparison:
    """Compare functions of this file."""
    listed = [(name, f"{__name__}:{function}", arguments) for name, (function, arguments) in contestants.items()]
    return compare("test", listed, OPTIONS, facts={}, **{"reference": "steady", **options})


@pytest.fixture(autouse=True)
def contestants_find_this_file(monkeypatch: pytest.MonkeyPatch) -> None:
    root = Path(__file__).parent
    monkeypatch.setenv("PYTHONPATH", f"{root.parent}{os.pathsep}{root}")


def test_a_contestant_that_fails_is_a_row_and_the_others_continue() -> None:
    result = compared(
        {
            "steady": ("counting", {"images": 10}),
            "broken": ("failing", {"images": 10}),
            "dead": ("dying", {"images": 3}),
        }
    )
    steady, broken, dead = result.rows
    assert steady.ratio == 1
    assert broken.error == "OSError: no 10 images here"
    assert dead.error == "its process ended with status 3: out of luck"
    assert "broken failed: OSError" in result.format()


def test_a_contestant_that_hangs_times_out() -> None:
    (stuck,) = compared({"stuck": ("hanging", {})}, timeout_s=3).rows
    assert stuck.error == "timeout: no answer for 3 s"


def test_memory_counts_children_and_leaves_out_imports_and_files(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(32 << 20))
    (row,) = compared({"holder": ("holding", {"own_mb": 48, "file": str(file)})}).rows
    assert row.error is None
    assert row.work_mb == pytest.approx(96, abs=8)
    assert row.peak_mb > 64 + 96 + 32


def test_a_contestant_without_images_is_an_error() -> None:
    (empty,) = compared({"empty": ("counting", {"images": 0})}).rows
    assert empty.error == "ValueError: no images in a round: there are fewer than one batch"


def test_the_first_result_counts_in_work_that_must_run_to_its_end() -> None:
    started = time.monotonic()
    (row,) = compared({"slow": ("slow_to_end", {})}).rows
    assert row.error is None
    works = 4  # warm-up, two rounds, one for the memory
    assert time.monotonic() - started - row.first_s >= works


def test_a_contestant_may_time_itself_and_note_figures() -> None:
    result = compared({"steady": ("timing_itself", {"images": 10})})
    assert result.rows[0].median == 5
    assert result.notes == {"steady": {"peak_gb": 2.5}}


def test_a_comparison_without_its_reference_has_no_ratios() -> None:
    result = compared({"steady": ("counting", {"images": 10})}, reference="absent")
    assert result.rows[0].ratio is None
    assert result.rows[0].work_mb is None, "it did not call imports_done()"
    assert row_cells(result.format())["steady"][3:5] == ["-", "-"]


def row_cells(table: str) -> dict[str, list[str]]:
    """Return the cells of each line of the tables in a text, by the first one."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:2] == "| "]
    return {first: others for first, *others in lines}


def consistent(capsys: pytest.CaptureFixture[str], arguments: list[str], out: Path) -> dict[str, Any]:
    """Run a benchmark and return its JSON, after a check that the table has the same figures."""
    assert run_command("bench", [*arguments, "--rounds", "1", "--json", str(out)]) == 0
    (_, header), *table = row_cells(capsys.readouterr().out).items()
    result: dict[str, Any] = json.loads(out.read_text())
    assert [name for name, _ in table] == [row["name"] for row in result["rows"]]
    for (_, cells), row in zip(table, result["rows"], strict=True):
        assert row["error"] is None
        assert row["median"] > 0
        assert row["first_s"] > 0
        assert row["peak_mb"] > row["work_mb"] > 0
        assert cells[0] == f"{row['median']:.0f}"
        assert cells[1] == f"{row['min']:.0f}-{row['max']:.0f}"
        assert len(cells) == len(header) == 8 + len(result["columns"])
    assert result["rows"][0]["ratio"] == 1
    return result


@pytest.mark.slow
def test_bench_loader_measures_every_peer_that_is_installed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["stock FFCV (area)", "ours (bicubic)", "torchvision (PIL bicubic)", "timm (PIL bicubic)"]
    peers = {name: loader.PEERS[name] for name in names}
    monkeypatch.setattr(loader, "PEERS", {**peers, "Missing": loader.Peer("missing", "folder", "missing_package.part")})
    result = consistent(capsys, ["loader", "--num_images", "256"], tmp_path / "figures.json")
    assert [row["name"] for row in result["rows"]] == names
    assert result["facts"]["images"] == 256
    assert result["facts"]["not installed"] == "Missing"


@pytest.mark.slow
def test_bench_convert_measures_both_writers_on_a_part_of_a_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = image_folder(tmp_path / "data", 30, data_path=None, photographs=None, originals=True)
    arguments = ["convert", "--num_images", "20", "--data_path", str(folder), "--peers", "ours"]
    result = consistent(capsys, arguments, tmp_path / "figures.json")
    assert [row["name"] for row in result["rows"]][:3] == ["stock FFCV", "ours", "ours (from a tar)"]
    assert result["facts"]["images"] == 20
    assert result["facts"]["our resize ms"] > 0
    assert result["facts"]["Pillow's resize ms"] > 0
    sizes = result["columns"]["file MB"]
    assert sizes["ours"] == pytest.approx(sizes["stock FFCV"], rel=0.5)
    assert sizes["ours (from a tar)"] == sizes["ours"]


def test_rows_are_chosen_by_the_beginning_of_their_names() -> None:
    names = ["stock FFCV", "ours (bicubic)", "ours (bilinear)", "timm"]
    assert replace(OPTIONS, peers=["OURS"]).choose(names, "stock FFCV") == names[:3]
    assert OPTIONS.choose(names, "stock FFCV") == names


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["loader", "--peers", "DALLI"], "stock FFCV"),
        (["convert", "--peers", "DALI"], "stock FFCV"),
        (["loader", "--cores", "0"], "cores = 0"),
        (["loader", "--rounds", "0"], "rounds = 0"),
        (["loader", "--num_images", "64"], "num_images = 64: expected at least 128"),
        (["cold", "--num_images", "64"], "num_images = 64: expected at least 128"),
        (["convert", "--num_images", "0"], "num_images = 0"),
        (["loader", "--data_path", "nowhere"], "nowhere/train not found"),
        (["convert", "--data_path", "here", "--photographs", "there"], "not both"),
        (["convert", "--photographs", str(Path(__file__).parent)], "no photographs found"),
        (["loader", "--json", "nowhere/figures.json"], "expected a file in a folder that exists"),
    ],
)
def test_wrong_arguments_are_usage_errors(
    arguments: list[str], answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("bench", arguments) == 2
    assert answer in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("webdataset") is not None, reason="webdataset is installed")
def test_a_peer_given_by_name_must_be_installed(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["loader", "--peers", "web"]) == 2
    assert "pip install -e '.[bench]'" in capsys.readouterr().err


def test_shards_hold_every_image_once_with_its_class(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", 30, data_path=None, photographs=None, originals=False) / "train"
    shards = loader._write_shards(folder, tmp_path / "shards", num_workers=2)
    members: dict[str, bytes] = {}
    for shard in shards.iterdir():
        with tarfile.open(shard) as tar:
            members |= {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    assert len(list(shards.iterdir())) == 8
    by_content = {file.read_bytes(): file.parent.name for file in folder.rglob("*.jpg")}
    found = {by_content[members[name]]: members[name[:-3] + "cls"] for name in members if name.endswith("jpg")}
    assert len(members) == 60
    assert found == {f"class{n}": str(n).encode() for n in range(10)}
