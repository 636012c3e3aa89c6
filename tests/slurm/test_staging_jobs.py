"""Two nodes copy the data to their own disks; one of them is killed in mid-copy."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from slurm.jobs import ROOT, TWO_BY_ONE, submit
from slurm.two_nodes import TwoNodes, wait_until
from support.runs import assert_same_training, train_here
from support.samples import write_again

from ffcv_convnext.data.beton import EncodedImage, Manifest
from ffcv_convnext.files import read_lines

pytestmark = pytest.mark.slurm

PAGE_BYTES = 2 << 20
HELD_AT = 4  # the range of train.beton that node n2 does not copy while the file HOLD exists
TOLERANCE = 1e-5  # between one process and two

SLOW = """

import os as _os, time as _time
from ffcv_convnext.data.load import staging as _module

_module.RANGE_BYTES, _module._NUM_THREADS = {page_bytes}, 1
_copy_range = _module._FileCopy.copy_range


def _hold(self, number, *rest):
    held = _os.environ.get("SLURMD_NODENAME") == "n2" and self.beton.name == "train.beton" and number == {held_at}
    while held and _os.path.exists({hold!r}):
        _time.sleep(0.05)
    return _copy_range(self, number, *rest)


_module._FileCopy.copy_range = _hold
"""  # not in data/, whose compiled code is kept under a hash of its sources


@pytest.fixture
def data(settings: dict[str, Any], tmp_path: Path) -> Path:
    """320 pictures of noise in pages of 2 MiB for training."""
    folder, random, samples = tmp_path / "data", np.random.default_rng(0), []
    shutil.copytree(settings["data_path"], folder)
    for number in range(320):
        image = Image.fromarray(random.integers(0, 256, (100, 150, 3), dtype=np.uint8))
        image.save(tmp_path / "one.jpg", quality=95, subsampling=0)
        samples.append((EncodedImage(150, 100, (tmp_path / "one.jpg").read_bytes(), "jpg"), number % 4))
    write_again(folder / "train.beton", Manifest.read(folder / "train.json"), samples, PAGE_BYTES)
    return folder


def test_a_node_that_is_killed_in_mid_copy_goes_on_and_the_other_finds_its_copy(
    cluster: TwoNodes, settings: dict[str, Any], data: Path, tmp_path: Path
) -> None:
    code, hold, scratch = tmp_path / "code", tmp_path / "HOLD", tmp_path / "scratch"
    shutil.copytree(ROOT / "ffcv_convnext", code / "ffcv_convnext")
    shutil.copy2(ROOT / "train.py", code)
    with open(code / "ffcv_convnext/training/run.py", "a") as file:
        file.write(SLOW.format(page_bytes=PAGE_BYTES, held_at=HELD_AT, hold=str(hold)))
    hold.touch()
    for node in ("n1", "n2"):
        (scratch / node).mkdir(parents=True)
    own = {**settings, "data_path": data, "epochs": 1}
    staged = {**own, "stage_to": f"{scratch}/$SLURMD_NODENAME"}

    train_here(own, update_freq=4, output_dir=tmp_path / "one")  # fills the compiler's cache for the job, too
    job = submit(cluster, tmp_path / "job", staged, *TWO_BY_ONE, code=code)

    def flags() -> list[bytes]:
        return [path.read_bytes() for path in scratch.glob("n2/*/*.partial/train.ranges")]

    def n1_is_ready() -> bool:
        log = job.folder / "rank0.log"
        waits = log.is_file() and "waiting for rank 1, which may still copy data" in log.read_text()
        return waits and bool(list(scratch.glob("n1/*/*[!l]/copy.json")))

    wait_until(
        lambda: n1_is_ready() and [each.rstrip(b"\0") for each in flags()] == [b"\1" * HELD_AT],
        120, lambda: f"n1 {n1_is_ready()}, n2 {flags()}: {cluster.describe(job.id)}",
    )  # fmt: skip
    assert job.steps() == 0, "no node trains before all have their data"
    os.kill(job.process(rank=1), signal.SIGKILL)
    hold.unlink()
    job.wait_for_restart(60)
    job.finish()

    assert [entry["status"] for entry in read_lines(job.folder / "attempts.jsonl")] == [137]
    first, second = ((job.folder / f"rank{rank}.log").read_text() for rank in (0, 1))
    assert [first.count("copied train.beton and val.beton"), first.count("found the copy of")] == [1, 1]
    assert "were there from an interrupted copy" in second
    for node in ("n1", "n2"):
        (folder,) = (path.parent for path in scratch.glob(f"{node}/*/*/copy.json"))
        for name in ("train.beton", "train.json", "val.beton", "val.json"):
            assert (folder / name).read_bytes() == (data / name).read_bytes()
    (start,) = json.loads((job.folder / "run.json").read_text())["starts"]  # the first one was ended before its first
    assert start["staged"]["how"] == "found"
    assert_same_training(job.folder, tmp_path / "one", tolerance=TOLERANCE)
