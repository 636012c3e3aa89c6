"""The ways in which people start several processes on a machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY
from support.runs import assert_same_training, train_here

from ffcv_convnext.cli import run_command


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """A LayerNorm network with GELU and a global batch of 16: one epoch of 5 steps."""
    return {
        **small_settings,
        **{"recipe_batch": 16, "epochs": 1, "warmup_epochs": 0},
        **{"resnet_norm_layer": "ln", "resnet_act_layer": "gelu"},
    }


def words(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


@pytest.mark.parametrize("flag", ["--local-rank=0", "--local_rank=0"])
def test_a_launcher_may_pass_the_local_rank(
    flag: str, small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    given = {**small_settings, "epochs": 1, "output_dir": tmp_path, "eval": "true"}
    assert run_command("train", [flag, *words(given)]) == 2, "nothing to evaluate yet, but no unknown option"


def test_the_local_rank_of_a_launcher_is_used_if_the_environment_has_none(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")  # restored afterwards
    monkeypatch.delenv("LOCAL_RANK")
    run_command("train", ["--local_rank", "3", *words({**small_settings, "output_dir": tmp_path, "eval": "true"})])
    assert os.environ["LOCAL_RANK"] == "3"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torch.distributed.launch", "torch.distributed.run"])
def test_two_processes_of_a_launcher_train_like_one(launcher: str, settings: dict[str, Any], tmp_path: Path) -> None:
    train_here(settings, update_freq=2, output_dir=tmp_path / "one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        launcher,
        "--nproc_per_node=2",
        f"--master_port={port}",
        "train.py",
    ]
    command += words({**settings, "output_dir": tmp_path / "two"})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stderr
    assert_same_training(tmp_path / "two", tmp_path / "one")
