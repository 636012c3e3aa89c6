"""Compiled code is kept where restarts and other processes find it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import REPOSITORY
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from ffcv_convnext.training.compile_cache import VARIABLES, keep_compiled, places
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.runlog import describe_machine

ALONE = Processes(0, 1, 0, torch.device("cpu"))


@pytest.fixture(autouse=True)
def _unset(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing is set, and what a test sets is removed again."""
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_compiled_code_is_kept_below_the_users_cache_folder_and_run_json_shows_where(tmp_path: Path) -> None:
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = default_cache_dir()  # as after an import of torch's compiler
    keep_compiled()
    found = places()
    assert describe_machine(ALONE)["compile_cache"] == found
    inductor, triton = (Path(found[name] or "") for name in VARIABLES)
    assert (inductor.name, triton.name) == ("inductor", "triton")
    assert inductor.parent == triton.parent
    assert inductor.parent.parent == tmp_path / "cache/ffcv_convnext"
    keep_compiled()
    assert places() == found, "a restart finds the same place"


@pytest.mark.parametrize("own", [["TORCHINDUCTOR_CACHE_DIR"], ["TRITON_CACHE_DIR"], list(VARIABLES)])
def test_the_users_own_variables_stay(monkeypatch: pytest.MonkeyPatch, own: list[str], tmp_path: Path) -> None:
    for name in own:
        monkeypatch.setenv(name, f"/scratch/{name}")
    keep_compiled()
    for name, place in places().items():
        assert place == f"/scratch/{name}" if name in own else str(place).startswith(f"{tmp_path}/cache")


def test_torchs_own_place_is_used_with_a_warning_if_the_users_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    keep_compiled()
    assert places() == dict.fromkeys(VARIABLES)
    assert "set TORCHINDUCTOR_CACHE_DIR and TRITON_CACHE_DIR to a folder that restarts find again" in caplog.text


START = """
import json, sys
import torch
from torch._dynamo.utils import counters
from ffcv_convnext.bench.timing import random_batch
from ffcv_convnext.config import Config
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.engine import train_step
from ffcv_convnext.training.run import build_learner

torch.set_num_threads(1)
config, cpu = Config.from_flat(json.loads(sys.argv[1])), torch.device("cpu")
learner = build_learner(config, Processes(0, 1, 0, cpu), num_classes=4, steps_per_epoch=10)
train_step(learner, iter([random_batch(config, config.data.batch_size, cpu, num_classes=4)]))
print(json.dumps({name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss")}))
"""


@pytest.mark.slow
def test_a_restart_compiles_nothing_again(small_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = json.dumps({**small_settings, "compile": "true"})
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "TMPDIR": ""}
    found = []
    for number in range(2):  # as on two nodes: each has a temporary folder of its own
        environment["TMPDIR"] = str(tmp_path / f"node{number}")
        (tmp_path / f"node{number}").mkdir()
        command = [sys.executable, "-c", START, settings]
        output = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)
        assert output.returncode == 0, output.stderr
        found.append(json.loads(output.stdout))
    assert found[0]["miss"] >= 3, "augmentation, forward and backward"
    assert found[1] == {"hit": found[0]["miss"], "miss": 0}
