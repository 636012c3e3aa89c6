"""Parts that several test files share: a small converted dataset, and the settings to train on it quickly."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before torch is imported: the workers of pytest-xdist share the cores, and so do the processes that their tests start.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch
from support.imagefolder import make_image_folder
from support.nursery import Nursery
from support.slurm_commands import answer
from xdist.scheduler import LoadScopeScheduling

from ffcv_convnext.data.convert.conversion import ConversionOptions, convert

NURSERY_FILES = {
    f"tests/training/{name}.py"
    for name in ("test_compile", "test_distributed", "test_identity", "test_lost_ranks", "test_resume")
}

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as in a background job; processes of the tests inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)


class ByFile(LoadScopeScheduling):
    """Run a file's tests in one worker of pytest-xdist, and all files that need the nursery in the same one.

    So a file's fixtures are built once, and one nursery serves all.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return "nursery" if file in NURSERY_FILES else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> ByFile | None:
    return ByFile(config, log) if config.getoption("dist") == "loadfile" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the nursery's tests first: they take longest. Skip those for a GPU on a machine without one."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.nodeid.partition("::")[0] not in NURSERY_FILES)


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 classes, 20 training and 5 validation pictures each, 40 to 90 pixels a side."""
    return make_image_folder(tmp_path_factory.mktemp("images"), train_per_class=20, val_per_class=5)


@pytest.fixture(scope="session")
def beton_dir(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`image_folder` converted: 80 training and 20 validation samples. Do not write into it."""
    out = tmp_path_factory.mktemp("beton")
    convert(ConversionOptions(data_path=image_folder, out_dir=out, split="all", num_workers=1))
    return out


@pytest.fixture(scope="session")
def nursery(beton_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nursery]:
    """Starts training processes without their import and compilation time."""
    with Nursery(beton_dir, tmp_path_factory.mktemp("children")) as it:
        yield it


@pytest.fixture(scope="session")
def small_settings(beton_dir: Path) -> dict[str, Any]:
    """Flat settings of a network and a recipe that train in about a second an epoch on a CPU.

    80 images in batches of 8: 10 optimiser steps an epoch. Everything random is on: crops, flips, mixing, erasing,
    stochastic depth.
    """
    return {
        "data_path": str(beton_dir),
        "device": "cpu",
        "amp": "off",
        "batch_size": 8,
        "recipe_batch": 8,
        "input_size": 32,
        "num_workers": 2,
        "resnet_layers": "1-1-1-1",
        "resnet_embed_dim": 8,
        "resnet_stem": "patch_embed",
        "drop_path": 0.2,
        "aa": "none",
        "epochs": 2,
        "warmup_epochs": 1,
        "lr": 2e-3,
        "model_ema": True,
        "model_ema_decay": 0.9,
        "log_every": 4,
    }


@pytest.fixture(autouse=True)
def _same_number_of_threads() -> Any:
    """A test that changes PyTorch's thread count must not change another test's arithmetic."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def one_thread(_same_number_of_threads: None) -> None:
    """PyTorch computes with one thread: fast where other processes want the cores too."""
    torch.set_num_threads(1)


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder at the head of PATH; `answer` puts commands into it."""
    folder = tmp_path / "commands"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    for name in ("sbatch", "srun", "squeue", "scontrol", "scancel"):
        answer(folder, name, "")
    answer(folder, "sinfo", "main* infinite")
    return folder
