"""Two processes compute what one does; they stop together, and either number may continue the other's run."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support import REPOSITORY
from support.nursery import Nursery
from support.runs import assert_equal, assert_same_training, train_here

from ffcv_convnext.config import Config, DataConfig
from ffcv_convnext.data.convert.conversion import ConversionOptions, convert
from ffcv_convnext.data.load.loader import TrainLoader
from ffcv_convnext.data.load.sampler import GlobalBatchSampler, eval_batches
from ffcv_convnext.files import read_lines
from ffcv_convnext.training.checkpoint import LAST, read_checkpoint
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.evaluation import evaluate_only

TRAIN_STEP = "ffcv_convnext.training.engine.train_step"


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """A LayerNorm network, global batch 16 on two processes: 5 steps an epoch, 15 in all. All that is random is on."""
    return {**small_settings, "recipe_batch": 16, "epochs": 3, "log_every": 2, "resnet_norm_layer": "ln"}


@pytest.fixture(scope="module")
def one_process(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_here(settings, update_freq=2, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def two_processes(settings: dict[str, Any], nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    for status, output in nursery.run_ranks({**settings, "output_dir": folder}, strikes={}):
        assert status == 0, output
    return folder


def test_two_processes_read_the_samples_of_one(beton_dir: Path) -> None:
    cpu = torch.device("cpu")
    data = DataConfig(data_path=beton_dir, batch_size=8, input_size=32, num_workers=1, update_freq=2)
    one = TrainLoader(data, cpu, seed=3)
    half = DataConfig(data_path=beton_dir, batch_size=8, input_size=32, num_workers=1)
    two = [TrainLoader(half, cpu, seed=3, rank=rank, world=2) for rank in range(2)]
    for ours, theirs in zip(one.steps(1), zip(*(loader.steps(1) for loader in two), strict=True), strict=True):
        micro_batches = list(ours)
        assert len(micro_batches) == 2
        for (images, labels), (their_images, their_labels) in zip(
            micro_batches, (next(s) for s in theirs), strict=True
        ):
            assert torch.equal(images, their_images)
            assert torch.equal(labels, their_labels)
    for loader in (one, *two):
        loader.close()

    def lists(update_freq: int, world: int) -> list[list[int]]:
        shares = GlobalBatchSampler(8, update_freq, world)
        ranks = [list(shares.micro_batches(80, seed=3, epoch=1, rank=rank)) for rank in range(world)]
        return [
            ranks[m % world][m // world].indices.tolist()
            for m in range(10 // (update_freq * world) * update_freq * world)
        ]

    assert lists(2, 1) == lists(1, 2)
    assert lists(4, 1) == lists(2, 2) == lists(1, 4)


@pytest.mark.slow
def test_two_processes_train_like_one_that_accumulates(one_process: Path, two_processes: Path) -> None:
    assert read_checkpoint(two_processes / LAST)["step"] == 15
    assert_same_training(two_processes, one_process)


@pytest.mark.slow
def test_two_processes_train_a_batchnorm_network_like_one_that_accumulates(
    settings: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    settings = {**settings, "resnet_norm_layer": "bn", "epochs": 2, "model_ema_bn": "recompute"}
    train_here(settings, update_freq=2, output_dir=tmp_path / "one")
    two = {**settings, "output_dir": tmp_path / "two", "dist_eval": False}
    for status, output in nursery.run_ranks(two, strikes={}):
        assert status == 0, output
    # Running statistics see one update a micro-batch, in a row or averaged: they differ, the weights do not.
    assert_same_training(tmp_path / "two", tmp_path / "one", buffers=False)
    # Those of the averaged weights are recomputed from the same micro-batches.
    ours, theirs = (read_checkpoint(tmp_path / name / LAST)["ema"] for name in ("two", "one"))
    for name in theirs:
        if "running" in name:
            assert_equal(ours[name], theirs[name], where=name, tolerance=1e-5)


@pytest.mark.slow
def test_a_signal_to_one_process_stops_both_and_one_can_continue(
    settings: dict[str, Any],
    one_process: Path,
    nursery: Nursery,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    strikes = {1: {"at": [(TRAIN_STEP, 8)], "signals": [signal.SIGTERM]}}
    first, second = nursery.run_ranks({**settings, "output_dir": folder}, strikes=strikes)
    assert (first[0], second[0]) == (75, 75)
    assert "stopped by a signal to another process after optimiser step 8, state saved" in first[1]
    assert "stopped by SIGTERM after optimiser step 8, state saved" in second[1]
    assert read_checkpoint(folder / LAST)["step"] == 8
    assert (folder / "rank1.log").exists()
    facts = (folder / "run.json").read_text()

    with pytest.raises(
        ValueError,
        match=r"made with a global batch of 16, this run has 8 \(batch_size 8 x update_freq 1 x 1 processes\); "
        r"choose update_freq and processes whose product is 2$",
    ):
        train_here(settings, output_dir=folder)
    assert (folder / "run.json").read_text() == facts, "a refused start leaves the folder as it was"

    shutil.copytree(folder, tmp_path / "again")
    train_here(settings, output_dir=folder, update_freq=2)
    assert_same_training(folder, one_process)
    for status, output in nursery.run_ranks({**settings, "output_dir": tmp_path / "again"}, strikes={}):
        assert status == 0, output
    assert_same_training(tmp_path / "again", one_process)


@pytest.mark.parametrize("num_samples", [1, 2, 7, 20, 50])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_evaluation_takes_each_sample_once(num_samples: int, world: int) -> None:
    shares = [eval_batches(num_samples, 4, rank, world) for rank in range(world)]
    assert np.concatenate([batch.indices for share in shares for batch in share]).tolist() == list(range(num_samples))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_two_processes_count_an_uneven_set_exactly(
    settings: dict[str, Any],
    one_process: Path,
    image_folder: Path,
    nursery: Nursery,
    tmp_path: Path,
) -> None:
    convert(ConversionOptions(data_path=image_folder, out_dir=tmp_path, split="val", subset=7, num_workers=1))
    changes = {"data_path": tmp_path, "eval": "true", "resume": one_process / LAST, "batch_size": 3}
    settings = {**settings, **changes}
    (alone,) = evaluate_only(Config.from_flat(settings)).values()
    assert alone["images"] == 7
    expected = ", ".join(f"{key} {value:.4f}" for key, value in alone.items())
    first, second = nursery.run_ranks(settings, strikes={})
    assert (first[0], second[0]) == (0, 0)
    assert first[1].splitlines()[-1] == f"{one_process / LAST}: {expected}"
    assert "acc1" not in second[1], "one process speaks"


@pytest.mark.slow
def test_torchrun_stops_with_a_saved_state(settings: dict[str, Any], tmp_path: Path) -> None:
    words = [w for name, value in {**settings, "output_dir": tmp_path}.items() for w in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, str(REPOSITORY / "train.py"), *words, "--epochs", "10000"]
    with (
        open(tmp_path / "output", "w+") as output,
        subprocess.Popen(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=output, stderr=output, start_new_session=True
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 180
            while len(read_lines(tmp_path / "steps.jsonl")) < 2:
                assert process.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            process.terminate()
            process.wait(60)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    text = (tmp_path / "output").read_text()
    steps = re.findall(r"after optimiser step (\d+), state saved", text)
    assert len(steps) == 2, text
    assert steps[0] == steps[1] == str(read_checkpoint(tmp_path / LAST)["step"])


@pytest.mark.parametrize(
    ("device", "backend", "device_id"), [("cpu", "gloo", None), ("cuda:1", "cpu:gloo,cuda:nccl", "cuda:1")]
)
def test_a_process_joins_the_group_with_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, backend: str, device_id: str | None
) -> None:
    calls: list[tuple[str, Any]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda chosen: calls.append(("device", str(chosen))))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda name, **kwargs: calls.append((name, kwargs)))
    Processes(1, 2, 1, torch.device(device)).join()
    name, found = calls.pop()
    assert (name, found["device_id"]) == (backend, None if device_id is None else torch.device(device_id))
    assert calls == ([("device", "cuda:1")] if device_id else []), "set before NCCL connects"


def test_one_process_is_alone_without_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    processes = Processes.from_environment("cpu")
    assert (processes.rank, processes.world, processes.is_main) == (0, 1, True)
    assert processes.any(True)
    assert not processes.any(False)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert not Processes.from_environment("cpu").is_main
