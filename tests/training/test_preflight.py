"""The check before submission: it refuses what training would refuse, within seconds and without a device."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY
from timm.optim import get_optimizer_info

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.data.load import TrainLoader
from ffcv_convnext.training.preflight import ADAM_LIKE, check_config

DRY_RUN = """
import sys
from ffcv_convnext.cli import run_command
status = run_command("train", sys.argv[1:])
heavy = sorted({"torch", "timm", "numba", "ffcv"} & sys.modules.keys())
sys.exit(f"imported {heavy}" if heavy else status)
"""


def flags_of(settings: dict[str, Any]) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value).lower())]


def dry_run(settings: dict[str, Any], tmp_path: Path, *more: str) -> list[str]:
    return [*flags_of(settings), "--job_dir", str(tmp_path / "job"), "--ngpus", "1", "--dry_run", *more]


def test_copies_that_exceed_the_global_batch_are_refused_before_submission(
    small_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = {**small_settings, "batch_size": 16, "repeated_aug": 500}
    assert run_command("train", dry_run(settings, tmp_path)) == 2
    refused = capsys.readouterr().err.splitlines()[-1]
    assert refused.startswith(
        "error: repeated_aug = 500: the copies of a sample do not fit into the global batch of 16"
    )
    import torch

    with pytest.raises(ValueError, match="repeated_aug = 500") as caught:
        TrainLoader(Config.from_flat(settings).data, torch.device("cpu"), seed=0)
    assert refused == f"error: {caught.value}", "training refuses it with the same words"


def test_a_dry_run_imports_neither_torch_nor_timm(small_settings: dict[str, Any], tmp_path: Path) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-c", DRY_RUN, *dry_run(small_settings, tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "#SBATCH" in done.stdout
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4, "processor time, s"


@pytest.mark.parametrize("name", ADAM_LIKE)
def test_optimisers_checked_without_timm_have_two_betas_an_epsilon_and_no_momentum(name: str) -> None:
    info = get_optimizer_info(name)
    assert (info.has_betas, info.num_betas, info.has_eps, info.has_momentum) == (True, 2, True, False)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"opt": "adamw", "momentum": 0.9}, "momentum has no effect with opt = adamw"),
        ({"opt": "sgd", "opt_betas": "0.9,0.99"}, "opt_betas has no effect with opt = sgd"),
        ({"opt": "adamv"}, "opt = adamv"),
        ({"model": "convnext_tinny"}, "model = convnext_tinny"),
        ({"warmup_steps": 1000}, "warmup_steps = 1000"),
        ({"batch_size": 128}, "fewer than the global batch of 128"),
        ({"nb_classes": 3}, "nb_classes = 3"),
        ({"data_path": None}, "data_path is not set"),
    ],
)
def test_wrong_settings_are_refused(small_settings: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    settings = {**small_settings, **changes}
    if "model" in changes:
        settings = {name: value for name, value in settings.items() if not name.startswith("resnet_")}
    with pytest.raises(ValueError, match=message):
        check_config(Config.from_flat(settings), 1)
