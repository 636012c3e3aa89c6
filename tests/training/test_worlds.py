"""What depends on the number of processes: only the order in which gradients are added, so only rounding.

The same steps in float32 and in float64: with 2^29 times finer rounding the differences are as much smaller, which
differences of another kind (samples, random draws, scaling, schedules) would not be. A run that continues on as many
processes is equal to the last bit, because DDP's buckets are the same from the first step on.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import REPOSITORY

PROGRAM = Path(__file__).with_name("worlds.py")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The weights after 20 steps, by data type."""
    found = {}
    for dtype in ("float32", "float64"):
        found[dtype] = tmp_path_factory.mktemp(dtype)
        command = [sys.executable, str(PROGRAM), dtype, str(found[dtype])]
        environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
        subprocess.run(command, env=environment, check=True, timeout=200)
    return found


def largest_difference(folder: Path, one: str, other: str) -> float:
    """The largest difference of a weight."""
    ours, theirs = (torch.load(folder / f"{name}.pth") for name in (one, other))
    return max((ours[name].double() - theirs[name].double()).abs().max().item() for name in ours)


@pytest.mark.slow
def test_numbers_of_processes_differ_by_rounding_only(folders: dict[str, Path]) -> None:
    for one, other in (("1", "2"), ("1", "4"), ("2", "4")):
        rough, fine = (largest_difference(folders[dtype], one, other) for dtype in ("float32", "float64"))
        assert 0 < rough < 1e-5
        assert 0 < fine < 1e-13


@pytest.mark.slow
@pytest.mark.parametrize("world", ["1", "2", "4"])
def test_a_run_that_continues_on_as_many_processes_is_equal_to_the_last_bit(
    world: str, folders: dict[str, Path]
) -> None:
    assert largest_difference(folders["float32"], world, f"{world}-again") == 0
