"""A process that is lost ends the others with one line that names it; errors with another cause stay as they are."""

from __future__ import annotations

import fcntl
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from support import REPOSITORY
from support.nursery import Nursery

from ffcv_convnext.errors import LostRank
from ffcv_convnext.files import read_lines
from ffcv_convnext.run_folder import log_of_rank, run_state
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.lost_ranks import ending
from ffcv_convnext.training.runlog import setup_logging

STEP = ("ffcv_convnext.training.engine.train_step", 8)
ALL_REDUCE = ("torch.distributed.all_reduce", 9)
SAVE = ("ffcv_convnext.training.checkpoint.write_checkpoint", 1)
PREPARE = ("ffcv_convnext.data.load.loader.TrainLoader.prepare", 1)
NEXT = "fix the cause there; started again, the run continues from its newest checkpoint"


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """A global batch of 24 on three processes: 3 steps an epoch."""
    return {**small_settings, "recipe_batch": 24, "epochs": 10, "resnet_norm_layer": "ln"}


def lines_of(output: str) -> list[str]:
    """The output without the log on the console: errors, tracebacks, warnings of libraries."""
    return [line for line in output.splitlines() if re.match(r"error: |Traceback|  File |\[|\w*Error", line)]


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("moment", [PREPARE, STEP, ALL_REDUCE, SAVE], ids=["start", "step", "all_reduce", "save"])
def test_a_killed_process_ends_the_others_with_one_line(
    lost: int, moment: tuple[str, int], settings: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    if moment is SAVE and lost != 0:
        pytest.skip("only rank 0 saves")
    results = nursery.run_ranks({**settings, "output_dir": tmp_path}, strikes={lost: {"at": [moment]}}, world=3)
    log = tmp_path / f"rank{lost}.log"
    for rank, (status, output) in enumerate(results):
        if rank == lost:
            assert status == -signal.SIGKILL
            continue
        assert status == 1, output
        assert lines_of(output) == [
            f"error: rank {lost} was lost first, without an error: killed, out of memory or crashed ({log}); {NEXT}"
        ]
        own = log_of_rank(tmp_path, rank).read_text()
        assert own.count("Traceback") == 1
        assert "gloo" in own
    assert run_state(tmp_path) == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_process_is_repeated_by_the_others(
    failing: int, settings: dict[str, Any], nursery: Nursery, tmp_path: Path
) -> None:
    strikes = {failing: {"at": [STEP], "signals": []}}
    results = nursery.run_ranks({**settings, "output_dir": tmp_path}, strikes=strikes, world=3)
    for rank, (status, output) in enumerate(results):
        assert status == 1, output
        log = tmp_path / f"rank{rank}.log"
        assert log.read_text().count("Traceback") == 1
        if rank == failing:
            assert output.splitlines()[-1].endswith("RuntimeError: struck")
            assert "RuntimeError: struck\nTraceback" in log.read_text()
        else:
            path = tmp_path / f"rank{failing}.log"
            assert lines_of(output) == [f"error: rank {failing} was lost first: RuntimeError: struck ({path}); {NEXT}"]


@pytest.mark.slow
def test_under_torchrun_each_process_prints_one_line(settings: dict[str, Any], tmp_path: Path) -> None:
    """torchrun ends the others with SIGTERM at once: the error is reported nevertheless."""
    words = [w for name, value in {**settings, "output_dir": tmp_path}.items() for w in (f"--{name}", str(value))]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "3"]
    command = [sys.executable, "-W", "ignore", *torchrun, str(REPOSITORY / "train.py"), *words, "--epochs", "10000"]
    with open(tmp_path / "output", "w+") as output, subprocess.Popen(command, stdout=output, stderr=output) as process:
        try:
            deadline = time.monotonic() + 180
            while len(read_lines(tmp_path / "steps.jsonl")) < 2:
                assert process.poll() is None, (tmp_path / "output").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.05)
            pid = re.search(r"process 1 of 3: (\d+) on ", (tmp_path / "rank1.log").read_text())
            assert pid is not None
            subprocess.run(["kill", "-9", pid[1]], check=True)
            assert process.wait(90) == 1
        finally:
            process.terminate()
    text = (tmp_path / "output").read_text()
    assert (
        re.findall(r"^error: (rank \d was lost first, without an error)", text, flags=re.MULTILINE)
        == ["rank 1 was lost first, without an error"] * 2
    )
    assert "gloo" not in text


# --- which errors are explained -----------------------------------------------------------------------------


def end_with(error: Exception, folder: Path | None, world: int = 2) -> Exception:
    """The error that a process of `world` ends with after `error`; rank 0 is this process."""
    processes = Processes(0, world, 0, torch.device("cpu"))
    setup_logging(folder, processes)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Exception) as caught, ending(processes, folder):  # noqa: PT011
            raise error
    finally:
        signal.signal(signal.SIGTERM, before)
    return caught.value


CLOSED = RuntimeError("[third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer [10.0.0.2]:1234")


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        ValueError("opt = adamv"),
        ConnectionResetError("Connection reset by peer"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_that_does_not_come_from_a_collective_stays(error: Exception, tmp_path: Path) -> None:
    (tmp_path / "rank1.log").write_text("2026-01-01 00:00:00,000 ERROR x: RuntimeError: boom\n")
    assert end_with(error, tmp_path) is error
    assert str(error) in (tmp_path / "rank0.log").read_text()


def test_an_error_of_a_collective_stays_while_all_processes_live(tmp_path: Path) -> None:
    error = dist.DistBackendError("NCCL error: invalid usage. Duplicate GPU detected : rank 0 and rank 1")
    with open(tmp_path / "rank1.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert end_with(error, tmp_path) is error


def test_without_other_processes_nothing_is_lost(tmp_path: Path) -> None:
    assert end_with(CLOSED, tmp_path, world=1) is CLOSED


@pytest.mark.parametrize("kind", ["no folder", "no log", "log locked, as on a node that is gone"])
def test_a_lost_process_that_leaves_no_trace_is_reported_without_its_number(kind: str, tmp_path: Path) -> None:
    with open(tmp_path / "rank1.log", "w") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        if kind == "no log":
            (tmp_path / "rank1.log").unlink()
        error = end_with(CLOSED, None if kind == "no folder" else tmp_path)
    assert isinstance(error, LostRank)
    where = "the output of the other processes" if kind == "no folder" else f"{tmp_path}/rank*.log"
    assert str(error) == f"another process was lost first (connection closed); see {where}; {NEXT}"


def test_the_first_loss_is_named_not_a_process_that_ended_because_of_it(tmp_path: Path) -> None:
    record = "2026-01-01 00:00:00,000 {} ffcv_convnext.training.runlog: {}\n"
    (tmp_path / "rank1.log").write_text(record.format("ERROR", f"rank 2 was lost first, without an error; {NEXT}"))
    (tmp_path / "rank2.log").write_text(record.format("INFO", "process 2 of 4: 17 on n1"))
    (tmp_path / "rank3.log").write_text(record.format("ERROR", f"another process was lost first; {NEXT}"))
    assert str(end_with(CLOSED, tmp_path, world=4)).startswith("rank 2 was lost first, without an error")
