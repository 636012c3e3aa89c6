"""The augmentation's kernels: arithmetic on the host here; the kernels themselves in a separate process."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest
from support import REPOSITORY


def run_checks(which: str, **environment: str) -> None:
    """Run kernel_checks.py in a new process; its output is the error's text."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which]
    result = subprocess.run(
        [*command, "tests/augment/kernel_checks.py"],
        cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert re.search(r"\d+ passed", result.stdout)


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_the_kernels_agree_with_the_cpu_path_under_tritons_interpreter(which: str) -> None:
    pytest.importorskip("triton")
    run_checks(which, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_the_kernels_agree_with_the_cpu_path_on_a_gpu() -> None:
    run_checks("slow or not slow")
