"""Runs on a real Slurm: the result equals that of one process, also after interruptions."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from slurm.jobs import ONE_HOUR, ROOT, TWO_BY_ONE, TWO_BY_TWO, Job, command_line, submit
from slurm.two_nodes import TwoNodes
from support.runs import assert_same_training, train_here

from ffcv_convnext.files import read_lines

pytestmark = pytest.mark.slurm

# Between numbers of processes: the gradients are added in another order (test_worlds), and fifty steps amplify the
# rounding. With the same number the result is the same to the last bit.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def one_process(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    train_here(settings, update_freq=4, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(
    slurm: TwoNodes,
    settings: dict[str, Any],
    one_process: Path,  # noqa: ARG001  fills the compiler's cache for the jobs
    tmp_path_factory: pytest.TempPathFactory,
) -> Job:
    """A finished job of four processes on two nodes."""
    job = submit(slurm, tmp_path_factory.mktemp("job") / "undisturbed", settings, *TWO_BY_TWO)
    job.finish()
    return job


def starts(folder: Path) -> list[dict[str, Any]]:
    """Starts of a run, from run.json."""
    found: list[dict[str, Any]] = json.loads((folder / "run.json").read_text())["starts"]
    return found


def test_four_processes_on_two_nodes_train_like_one(undisturbed: Job, one_process: Path) -> None:
    record = undisturbed.cluster.job(undisturbed.id)
    assert {key: record[key] for key in ("NumNodes", "NumTasks", "Restarts", "ExitCode")} == {
        "NumNodes": "2", "NumTasks": "4", "Restarts": "0", "ExitCode": "0:0",
    }  # fmt: skip
    [start] = starts(undisturbed.folder)
    assert (start["processes"], start["from_step"]) == (4, 0)
    assert {path.name for path in undisturbed.folder.glob("rank*.log")} == {f"rank{rank}.log" for rank in range(4)}
    assert_same_training(undisturbed.folder, one_process, tolerance=TOLERANCE)


# --- Slurm ends the job and requeues it -------------------------------------------------------------------


def requeue(job: Job) -> None:
    job.cluster.command("scontrol", "requeue", job.id)


def lose_a_node(job: Job) -> None:
    job.cluster.command("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")
    try:
        job.wait_for_restart(30)
    finally:
        job.cluster.command("scontrol", "update", "NodeName=n2", "State=RESUME")


def preempt(job: Job) -> None:
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 3")
    job.cluster.wait_for_end(job.cluster.command("sbatch", "--parsable", *urgent), 60)


@pytest.mark.parametrize(
    ("disturb", "tasks", "tolerance"),
    [(requeue, TWO_BY_TWO, 0.0), (lose_a_node, TWO_BY_ONE, TOLERANCE), (preempt, TWO_BY_ONE, TOLERANCE)],
    ids=["requeue", "lost node", "pre-emption"],
)
def test_a_job_that_slurm_requeues_continues_where_it_stopped(
    disturb: Callable[[Job], None],
    tasks: tuple[str, ...],
    tolerance: float,
    cluster: TwoNodes,
    undisturbed: Job,
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    job = submit(cluster, tmp_path / "job", settings, *tasks)
    job.wait_for_step(5)
    disturb(job)
    assert job.finish()["Restarts"] == "1"
    first, second = starts(job.folder)
    assert first["from_step"] == 0
    assert 5 <= second["from_step"] < 50, "saved at the step where it was stopped"
    assert_same_training(job.folder, undisturbed.folder, tolerance=tolerance)


# --- The job ends without Slurm----------------------------------------------------------------------------


def test_a_killed_process_ends_the_job_and_it_continues_from_its_last_checkpoint(
    cluster: TwoNodes, undisturbed: Job, settings: dict[str, Any], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path / "job", settings, *TWO_BY_ONE, "--save_ckpt_steps", "4")
    job.wait_for_step(6)
    os.kill(job.process(rank=1), signal.SIGKILL)
    job.wait_for_restart(60)
    reached = job.steps()
    job.finish()
    assert [entry["status"] for entry in read_lines(job.folder / "attempts.jsonl")] == [137]
    assert "error: rank 1 was lost first, without an error" in job.output(0)
    assert "gloo" not in job.output(0)
    _, second = starts(job.folder)
    assert second["from_step"] % 4 == 0
    assert 0 <= reached - second["from_step"] <= 4
    assert_same_training(job.folder, undisturbed.folder, tolerance=TOLERANCE)


def test_a_job_that_runs_out_of_time_saves_and_continues(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    """The shortest time limit is one minute; Slurm checks it every 30 s, and sends the signal that much earlier."""
    time_limit = ("--partition", "short", "--timeout", "0.016", "--slurm_signal", "USR2@10")
    tasks = ("--ngpus", "1", "--cpus_per_task", "2")
    job = submit(cluster, tmp_path / "job", {**settings, "epochs": 100_000}, *tasks, *time_limit)
    job.wait_for_restart(100)
    job.wait_for_step(job.steps() + 1)
    cluster.cancel_all()
    _, second = starts(job.folder)
    stopped = re.findall(r"stopped by SIGUSR2 after optimiser step (\d+), state saved", job.output(0))
    assert stopped == [str(second["from_step"])]


def test_a_run_whose_loss_is_not_finite_is_given_up_after_three_failures(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    diverging = {**settings, "lr": 1e30, "warmup_epochs": 0}
    job = submit(cluster, tmp_path / "job", diverging, *ONE_HOUR, "--ngpus", "1", "--cpus_per_task", "2")
    record = cluster.wait_for_end(job.id, 150)
    assert (record["JobState"], record["Restarts"]) == ("FAILED", "2")
    assert [entry["status"] for entry in read_lines(job.folder / "attempts.jsonl")] == [1, 1, 1]
    assert f"error: job {job.id} ended with exit status 1 and failed 3 times without a newer checkpoint" in job.output(
        0
    )


def test_wrong_settings_are_not_tried_again(cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path) -> None:
    """Rank 0 finds that the data is gone; the others, which wait for it, are ended by Slurm."""
    data = tmp_path / "data"
    shutil.copytree(settings["data_path"], data)
    hold = (*TWO_BY_ONE, "--slurm_hold", "true")
    job = submit(cluster, tmp_path / "job", {**settings, "data_path": data}, *hold)
    shutil.rmtree(data)
    cluster.command("scontrol", "release", job.id)
    record = cluster.wait_for_end(job.id, 150)
    assert (record["JobState"], record["Restarts"], record["ExitCode"]) == ("FAILED", "0", "2:0")
    assert [entry["status"] for entry in read_lines(job.folder / "attempts.jsonl")] == [2]


def test_a_submission_that_is_killed_after_sbatch_is_one_job_that_runs(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    killed = "from support.nursery import strike_at; strike_at([('ffcv_convnext.cluster.intent._record', 1)], [9]); "
    killed = f"import sys; sys.path.append({str(ROOT / 'tests')!r}); {killed}"
    killed += "from ffcv_convnext.cli import run_command; sys.exit(run_command('train'))"
    words = ["--job_dir", str(tmp_path / "job"), *ONE_HOUR, "--ngpus", "1", "--cpus_per_task", "2"]
    short = {**settings, "epochs": 1}
    assert command_line(["-c", killed, *words], settings=short).returncode == -signal.SIGKILL
    ((job, _),) = (line.split() for line in cluster.queue())
    again = command_line(["train.py", *words], settings=short)
    assert f"job {job} of an interrupted submission found in Slurm and recorded" in again.stdout
    assert f"job {job} is " in again.stdout
    assert len(cluster.queue()) <= 1
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    assert (tmp_path / "job" / "done").exists()


# --- Another number of processes --------------------------------------------------------------------------


def test_a_cancelled_run_continues_on_other_processes_with_the_same_micro_batches(
    cluster: TwoNodes, undisturbed: Job, settings: dict[str, Any], tmp_path: Path
) -> None:
    job = submit(cluster, tmp_path / "job", settings, *TWO_BY_TWO)
    job.wait_for_step(5)
    cluster.cancel_all()
    refused = command_line(["train.py", "--job_dir", str(job.folder), *ONE_HOUR, "--ngpus", "3"], settings=settings)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr.splitlines()[-1].endswith("which 3 processes cannot share equally; 1, 2, 4 processes can")
    assert cluster.queue() == []

    job = submit(cluster, job.folder, settings, *ONE_HOUR, "--nodes", "1", "--ngpus", "2", "--cpus_per_task", "2")
    record = job.finish()
    assert (record["NumNodes"], record["NumTasks"]) == ("1", "2")
    first, second = starts(job.folder)
    assert (first["processes"], second["processes"]) == (4, 2)
    assert 5 <= second["from_step"] < 25
    assert_same_training(job.folder, undisturbed.folder, tolerance=TOLERANCE)


# --- Bad input --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ("--partition", "mian"),
            "partition = mian: not found on this cluster",
        ),
        (
            ("--timeout", "72"),
            "timeout = 72: partition main runs jobs of at most 1 hours; use --timeout 1",
        ),
    ],
    ids=["partition", "time"],
)
def test_jobs_that_slurm_would_never_run_are_not_submitted(
    flags: tuple[str, str], message: str, cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    words = ["train.py", "--job_dir", str(tmp_path / "job"), *TWO_BY_TWO, *flags]
    refused = command_line(words, settings=settings)
    assert refused.returncode == 2
    (line,) = refused.stderr.splitlines()
    assert line.startswith(f"error: {message}")
    assert cluster.queue() == []
    assert not (tmp_path / "job").exists()


def test_code_that_is_edited_after_the_submission_does_not_change_the_job(
    cluster: TwoNodes, settings: dict[str, Any], tmp_path: Path
) -> None:
    code = tmp_path / "code"
    shutil.copytree(ROOT / "ffcv_convnext", code / "ffcv_convnext")
    shutil.copy2(ROOT / "train.py", code)
    alone = ("--ngpus", "1", "--cpus_per_task", "1", "--slurm_hold", "true", *ONE_HOUR)
    job = submit(cluster, tmp_path / "job", {**settings, "epochs": 1}, *alone, code=code)
    for module in (code / "ffcv_convnext").rglob("*.py"):
        module.write_text("raise SystemExit('edited')\n")
    cluster.command("scontrol", "release", job.id)
    job.finish()
