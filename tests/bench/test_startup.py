"""`bench startup`, and commands that must be quick: they do not import packages they do not need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ffcv_convnext.bench.startup import quick_commands
from ffcv_convnext.cli import run_command

HEAVY = ("torch", "torchvision", "timm", "ffcv", "numba", "matplotlib", "submitit")
NEEDED = {
    "train.py --dry_run": {"submitit"},  # it writes the batch script
    "ffcv-convnext data info": {"numba"},  # it reads JPEG headers with the loader's code
}
COMMANDS = [
    "ffcv-convnext --help",
    "ffcv-convnext ladder describe",
    "ffcv-convnext ladder status",
    "ffcv-convnext report",
    "ffcv-convnext data info",
    "train.py --dry_run",
    "write_ffcv_dataset.py --help",
]
PROGRAM = f"""
import sys
from ffcv_convnext.cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print("imported:", *(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)
sys.exit(status)
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_a_quick_command_imports_no_heavy_package(name: str, beton_dir: Path, tmp_path: Path) -> None:
    commands = quick_commands(tmp_path, beton_dir)
    assert list(commands) == COMMANDS
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, *commands[name]], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    imported = result.stderr.splitlines()[-1].removeprefix("imported:").split()
    assert set(imported) <= NEEDED.get(name, set())


@pytest.mark.slow
def test_bench_startup_times_first_and_second_starts_of_ours_and_stock_ffcv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "figures.json"
    assert run_command("bench", ["startup", "--num_images", "128", "--rounds", "1", "--json", str(out)]) == 0
    table = capsys.readouterr().out
    assert "| ours " in table
    assert "| ffcv-convnext --help " in table
    found = json.loads(out.read_text())
    rows = found["rows"]
    assert [(row["name"], row["start"]) for row in rows] == [
        (name, start)
        for name in ("ours", "ours, as train.py imports it", "stock FFCV")
        for start in ("first", "second")
    ]
    assert all(0 < row["torch_s"] < row["first_batch_s"] and row["cpu_s"] > 0 for row in rows)
    assert [row["name"] for row in found["commands"]] == COMMANDS
    assert all(0 < row["min"] <= row["cpu_s"] <= row["max"] and row["wall_s"] > 0 for row in found["commands"])


def test_bench_startup_needs_a_batch_of_images(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command("bench", ["startup", "--num_images", "10"]) == 2
    assert "num_images = 10: expected at least 128" in capsys.readouterr().err
