"""`bench cold` runs and reports; no test is about speed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support import REPOSITORY

pytest.importorskip("ffcv.reader")

from ffcv_convnext.cli import run_command


def test_an_unknown_peer_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["cold", "--peers", "timm"]) == 2
    assert "expected the beginning of a row's name" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_cold_prints_a_row_for_each_way_of_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    assert run_command("bench", ["cold", "--num_images", "128", "--rounds", "1", "--json", "figures.json"]) == 0
    assert "| ours, process " in capsys.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert "MB/s" in found["facts"]["disk, sequential"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["stock FFCV (area)", "ours", "ours, process", "ours, quasi_random", "ours, warm"]
    for row in rows.values():
        assert row["error"] is None, row["error"]
        assert row["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
