"""A conversion as a job array on two nodes, from its submission to a ladder that waits for it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from slurm.jobs import command_line
from slurm.two_nodes import TwoNodes, processes_of, wait_until
from support.imagefolder import make_image_folder

from ffcv_convnext.cluster.conversion_plan import ConversionPlan
from ffcv_convnext.data.convert import ConversionOptions, convert

pytestmark = pytest.mark.slurm

RAW = {"compress_probability": 0, "max_resolution": "none"}  # 13 images a page: a part has several


def write(**settings: Any) -> str:
    """Output of `write_ffcv_dataset.py ...`."""
    result = command_line(["write_ffcv_dataset.py"], settings=settings)
    assert result.returncode == 0, result.stderr
    return result.stdout


def status_of(job_dir: Path) -> str:
    """The table of `--status`."""
    result = command_line(["write_ffcv_dataset.py", "--status"], settings={"job_dir": job_dir})
    assert result.returncode == 0, result.stderr
    return result.stdout


def process_of(cluster: TwoNodes, job: str) -> int | None:
    """The process that converts, of a task of an array."""
    array, _, task = job.partition("_")
    marks = {f"SLURM_ARRAY_JOB_ID={array}".encode(), f"SLURM_ARRAY_TASK_ID={task}".encode(), b"SLURM_PROCID=0"}
    for pid, name in processes_of(cluster.folder).items():
        try:
            environment = set(Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))
        except OSError:
            continue
        if marks <= environment and "submitit.core._submit" in name:
            return pid
    return None


def test_parts_survive_a_kill_and_a_requeue_and_a_ladder_waits_for_them(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    images = make_image_folder(
        tmp_path / "images", num_classes=4, train_per_class=150, val_per_class=6, width=(500, 501), height=(400, 401)
    )
    out, job_dir, ladder = tmp_path / "beton", tmp_path / "conversion", tmp_path / "ladder"
    flags = {
        "data_path": images,
        "out_dir": out,
        "job_dir": job_dir,
        "shards": 3,
        **RAW,
        "cpus_per_task": 1,
        "timeout": 1,
    }
    array = re.findall(r"^submitted job (\d+): 3 of 3 parts", write(**flags), re.MULTILINE)[0]

    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "00_start.yaml").write_text("resnet_layers: 1-1-1-1\nresnet_embed_dim: 8\n")
    run = {name: value for name, value in settings.items() if not name.startswith("resnet_")}
    run |= {"data_path": out, "configs": tmp_path / "configs", "job_dir": ladder, "seeds": 0, "epochs": 1, "ngpus": 1}
    run |= {"cpus_per_task": 1, "timeout": 1, "after": job_dir}
    result = command_line(["-m", "ffcv_convnext.cli", "ladder", "submit"], settings=run)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("budget: 1 run, 576 training images")
    [training] = re.findall(r"^submitted job (\S+): ", result.stdout, re.MULTILINE)
    assert cluster.state(training) == "PENDING"

    plan = ConversionPlan.read(job_dir)
    train = [plan.parts(index)[0] for index in range(3)]
    wait_until(lambda: train[0].num_done() > 0, 90, lambda: cluster.describe(f"{array}_0"))
    pid = process_of(cluster, f"{array}_0")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: train[1].num_done() > 0, 90, lambda: cluster.describe(f"{array}_1"))
    cluster.command("scontrol", "requeue", f"{array}_1")

    cluster.wait_for_end(training, 300)
    assert cluster.job(training)["JobState"] == "COMPLETED", cluster.describe(training)
    assert (ladder / "00_start" / "seed0" / "done").exists()
    whole = tmp_path / "whole"
    convert(
        ConversionOptions(data_path=images, out_dir=whole, num_workers=2, compress_probability=0, max_resolution=None)
    )
    for name in ("train.beton", "val.beton", "train.files.txt"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    again = "".join((job_dir / "slurm" / f"{array}_0_0_log.{end}").read_text() for end in ("out", "err"))
    assert "of them from an earlier attempt" in again, "it continued from its last page"
    assert "is complete" in status_of(job_dir).splitlines()[-1]
