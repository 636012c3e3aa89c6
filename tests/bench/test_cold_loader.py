"""The benchmark on a cold file runs and reports; no claim about speed is made here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from support import REPOSITORY

pytest.importorskip("ffcv.reader")

from ffcv_convnext.bench.cold_loader import evict
from ffcv_convnext.cli import run_command
from ffcv_convnext.data.load.sources import num_bytes_in_memory


def test_an_evicted_file_is_not_in_memory_even_if_it_was_mapped_and_touched(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 << 20))
    mapping = np.memmap(path, dtype=np.uint8, mode="r")
    total = int(mapping[::4096].sum())
    assert num_bytes_in_memory(path) == 3 << 20
    try:
        evict(path)
    except OSError as error:
        pytest.skip(str(error))
    assert num_bytes_in_memory(path) == 0
    assert int(mapping[::4096].sum()) == total
    assert num_bytes_in_memory(path) > 0


def test_a_file_that_stays_in_memory_is_refused() -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no file system in memory")
    path = folder / f"test-cold-{os.getpid()}"
    try:
        path.write_bytes(bytes(1 << 20))
        with pytest.raises(OSError, match="stays in memory: cannot measure cold reads"):
            evict(path)
    finally:
        path.unlink()


def test_an_unknown_peer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["cold", "--peers", "timm"]) == 2
    assert "expected how some of these begin" in capsys.readouterr().err


@pytest.mark.slow
def test_bench_cold_prints_a_row_for_each_way_of_reading(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(REPOSITORY)
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.chdir(tmp_path)
    assert run_command("bench", ["cold", "--num_images", "128", "--rounds", "1", "--json", "figures.json"]) == 0
    assert "| ours, process |" in capsys.readouterr().out
    found = json.loads((tmp_path / "figures.json").read_text())
    assert "MB/s" in found["facts"]["disk, sequential"]
    rows = {row["name"]: row for row in found["rows"]}
    assert list(rows) == ["stock FFCV (area)", "ours", "ours, process", "ours, quasi_random", "ours, warm"]
    for row in rows.values():
        assert row["error"] is None, row["error"]
        assert row["median"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]
