"""The cluster that the tests of this folder share, and the data they train on."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from typing import Any

import pytest
from slurm.two_nodes import TwoNodes
from support.imagefolder import make_image_folder

from ffcv_convnext.data.convert.conversion import ConversionOptions, convert

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")


@pytest.fixture(scope="session")
def slurm() -> Iterator[TwoNodes]:
    """Two nodes of Slurm, idle. SIGTERM ends the session like Ctrl-C, so that nothing is left behind."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=path) is None]:
        pytest.fail(f"{', '.join(missing)} not found; install Slurm: bash scripts/setup.sh slurm", pytrace=False)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with TwoNodes() as cluster, pytest.MonkeyPatch.context() as patch:
            for name, value in cluster.environment.items():
                patch.setenv(name, value)
            yield cluster
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.fixture
def cluster(slurm: TwoNodes) -> Iterator[TwoNodes]:
    """The same, for one test: its jobs end with the test."""
    yield slurm
    slurm.cancel_all()


@pytest.fixture(scope="session")
def settings(small_settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A LayerNorm network and 800 images; on four processes 25 steps an epoch, 50 in all. Each step is logged.

    64 pixels make steps long enough for Slurm to act between them. GELU, because gradients are compared: with ReLU,
    rounding near zero changes them much more.
    """
    images = make_image_folder(tmp_path_factory.mktemp("images"), train_per_class=200, val_per_class=5)
    data = tmp_path_factory.mktemp("beton")
    convert(ConversionOptions(data_path=images, out_dir=data, split="all", num_workers=1))
    smooth = {"resnet_norm_layer": "ln", "resnet_act_layer": "gelu"}
    return {
        **small_settings,
        **smooth,
        "data_path": data,
        "recipe_batch": 32,
        "num_workers": 1,
        "log_every": 1,
        "input_size": 64,
    }
