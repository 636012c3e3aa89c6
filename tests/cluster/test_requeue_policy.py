"""One policy decides on both executors whether a run that ended is started again: docs/cluster.md's table of events.

The events are real on this machine: processes that exit, are killed, fill a disk. On Slurm the batch script's last line
is run as Slurm runs it. Whole jobs on a real Slurm are in tests/slurm/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY
from support.slurm_commands import answer, words

from ffcv_convnext.cluster.local_executor import LocalRun, run_all
from ffcv_convnext.cluster.requeue_policy import MAX_FAILURES, MAX_INTERRUPTIONS, decide, next_start
from ffcv_convnext.cluster.slurm import TrainingJob
from ffcv_convnext.config import Config
from ffcv_convnext.errors import EXIT_INTERRUPTED, Interrupted
from ffcv_convnext.files import read_lines
from ffcv_convnext.training.checkpoint import BEST, LAST

# What a process of the run does in its n-th start: `n` and the run folder `out` are set.
NEW = "open(out / 'checkpoint-last.pth', 'w').close(); os.utime(out / 'checkpoint-last.pth', (n, n));"
BEST_ONLY = "open(out / 'checkpoint-best.pth', 'w').close(); os.utime(out / 'checkpoint-best.pth', (n, n));"
EVENTS: dict[str, tuple[str, int, int, int]] = {  # what it does, its exit status, expected starts, runner's exit status
    "finished": ("sys.exit(0)", 0, 1, 0),
    "pre-emption, time limit": ("sys.exit(75 if n < 4 else 0)", EXIT_INTERRUPTED, 4, 0),
    "interrupted, never a newer checkpoint": ("sys.exit(75)", EXIT_INTERRUPTED, MAX_INTERRUPTIONS, 75),
    "NaN loss": ("sys.exit(1)", 1, MAX_FAILURES, 1),
    "NaN loss, each time with a new best checkpoint": (f"{BEST_ONLY} sys.exit(1)", 1, MAX_FAILURES, 1),
    "crash after a newer checkpoint": (f"{NEW} sys.exit(1 if n < 6 else 0)", 1, 6, 0),
    "kill -9, out of memory": ("os.kill(os.getpid(), 9)", 137, MAX_FAILURES, 1),
    "segmentation fault": ("os.kill(os.getpid(), 11)", 139, MAX_FAILURES, 1),
    "usage error": ("sys.exit(2)", 2, 1, 2),
    "full disk": ("(out / 'attempts.jsonl').unlink(missing_ok=True); "
                  "(out / 'attempts.jsonl').symlink_to('/dev/full'); sys.exit(1)", 1, 1, 1),
}  # fmt: skip
PROGRAM = """import os, re, signal, sys, time
from pathlib import Path
out = Path(re.search("^output_dir: (.*)$", open(sys.argv[-1]).read(), re.MULTILINE)[1])
with open(out / f"starts{{os.environ['RANK']}}", "a") as file: file.write("x")
n = len((out / f"starts{{os.environ['RANK']}}").read_text())
{}
"""


@pytest.fixture
def local_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LocalRun]:
    """Make a run whose processes run a few lines instead of training."""

    def make(lines: str, **settings: Any) -> LocalRun:
        package = tmp_path / "code" / "ffcv_convnext"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "cli.py").write_text(PROGRAM.format(lines))
        monkeypatch.setenv("PYTHONSAFEPATH", "")
        config = Config.from_flat({"output_dir": tmp_path / "run", **settings})
        return LocalRun("a", config, tmp_path / "code", tmp_path)

    return make


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_of_a_run_on_this_machine(event: str, local_run: Callable[..., LocalRun], tmp_path: Path) -> None:
    lines, status, starts, result = EVENTS[event]
    said: list[str] = []
    run = local_run(lines)
    assert run_all([run], devices=[""], world=1, max_parallel=None, say=said.append) == result
    assert len((tmp_path / "run" / "starts0").read_text()) == starts
    if event == "full disk":
        assert "attempts.jsonl cannot be written: No space left on device" in said[-1]
        return
    attempts = read_lines(tmp_path / "run" / "attempts.jsonl")
    assert [attempt["status"] for attempt in attempts] == [status] * (starts if result else starts - 1)
    assert said[-1].startswith("finished" if result == 0 else "error: ")


@pytest.fixture
def last_line(commands: Path, tmp_path: Path) -> Callable[..., tuple[bool, str]]:
    """Run the last line of a batch script after its tasks ended; return whether it requeued, and its message."""
    submitit = pytest.importorskip("submitit")
    folder = tmp_path / "slurm"
    folder.mkdir()
    job = TrainingJob({"output_dir": str(tmp_path / "run")}, [])
    submitit.core.utils.DelayedSubmission(job).dump(folder / "5_1_submitted.pkl")
    array = {"SLURM_JOB_ID": "5", "SLURM_ARRAY_JOB_ID": "5", "SLURM_ARRAY_TASK_ID": "1"}  # as for the last task

    def run(status: int, *, state: str = "RUNNING") -> tuple[bool, str]:
        answer(commands, "squeue", f"4 RUNNING\n5_0 RUNNING\n5_1 {state}")
        (commands / "scontrol.calls").unlink(missing_ok=True)
        script = subprocess.run(
            [sys.executable, "-m", "ffcv_convnext.cluster", str(status), str(folder)],
            env={**os.environ, **array, "SUBMITIT_EXECUTOR": "slurm", "PYTHONPATH": str(REPOSITORY)},
            capture_output=True,
            text=True,
            check=False,
        )
        calls = commands / "scontrol.calls"
        requeued = calls.exists()
        assert not requeued or calls.read_text() == "requeue 5_1\n"
        assert len(script.stderr.splitlines()) == 1, script.stderr
        assert (script.returncode == 0) == (requeued or state != "RUNNING")
        return requeued, script.stderr

    return run


@pytest.mark.parametrize("event", [event for event in EVENTS if event != "finished"])
def test_an_event_of_a_slurm_job(event: str, last_line: Callable[..., tuple[bool, str]], tmp_path: Path) -> None:
    """The attempts before the last one are made by the policy itself; the last one by the batch script's last line."""
    _, status, starts, result = EVENTS[event]
    run = tmp_path / "run"
    run.mkdir()
    if event == "full disk":
        (run / "attempts.jsonl").symlink_to("/dev/full")
    for n in range(1, starts):
        checkpoint = LAST if "newer checkpoint" in event and "never" not in event else BEST
        (run / checkpoint).touch()
        os.utime(run / checkpoint, (n, n))
        assert decide(run, "5_1", status).again
    requeued, message = last_line(status)
    assert requeued == (result == 0)
    if result:
        assert message.startswith("error: job 5_1 ended with exit status")
        assert "not requeued. Fix the cause and submit again" in message
    else:
        assert message == f"job 5_1 ended with exit status {status} before it was finished; requeued\n"


@pytest.mark.parametrize("state", ["CANCELLED", "COMPLETING", "PENDING", "NODE_FAIL", "PREEMPTED", "REQUEUED"])
def test_a_slurm_job_that_was_cancelled_or_that_slurm_requeues_is_left(
    state: str, last_line: Callable[..., tuple[bool, str]], tmp_path: Path
) -> None:
    requeued, message = last_line(75, state=state)
    assert not requeued
    assert "not requeued: Slurm has ended or requeued it" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("first", "of_srun", "expected"), [("1", 75, 1), ("2", 137, 2), ("1", 137, 137), (None, 75, 75), ("", 75, 75)]
)
def test_the_first_failure_of_a_slurm_job_counts_not_how_srun_ended_the_others(
    first: str | None, of_srun: int, expected: int, last_line: Callable[..., tuple[bool, str]], tmp_path: Path
) -> None:
    if first is not None:
        (tmp_path / "slurm" / "5_1_status").write_text(first)
    assert last_line(of_srun)[0] == (expected != 2)
    assert [entry["status"] for entry in read_lines(tmp_path / "run" / "attempts.jsonl")] == [expected]


def test_the_first_failure_on_this_machine_counts_not_how_the_others_were_ended(
    local_run: Callable[..., LocalRun], tmp_path: Path
) -> None:
    run = local_run(
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "open(out / f'ready{os.environ[\"RANK\"]}', 'w').close()\n"
        "while not (out / 'ready0').exists(): time.sleep(0.01)\n"
        "if os.environ['RANK'] == '1': sys.exit(1)\n"
        "time.sleep(60)"
    )
    said: list[str] = []
    assert run_all([run], devices=["", ""], world=2, max_parallel=None, say=said.append) == 1
    assert [entry["status"] for entry in read_lines(tmp_path / "run" / "attempts.jsonl")] == [1] * MAX_FAILURES
    assert said[-1].endswith(f"see {run.log(1)}"), "the log of the process that failed first"


def test_ctrl_c_stops_a_run_on_this_machine_without_another_start(
    local_run: Callable[..., LocalRun], tmp_path: Path
) -> None:
    run = local_run("signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\nos.kill(os.getppid(), 2); time.sleep(60)")
    said: list[str] = []
    with pytest.raises(Interrupted, match="stopped by SIGINT; the same command continues"):
        run_all([run], devices=[""], world=1, max_parallel=None, say=said.append)
    assert said[-1] == f"stopped {tmp_path / 'run'}"
    assert not (tmp_path / "run" / "attempts.jsonl").exists()


def test_each_job_has_its_own_count(tmp_path: Path) -> None:
    assert [decide(tmp_path, "7", 1).again for _ in range(3)] == [True, True, False]
    assert decide(tmp_path, "8", 1).again


def test_only_the_first_start_of_a_job_ignores_checkpoints(tmp_path: Path) -> None:
    """Else a job with `auto_resume false` would begin from step 0 after each time limit, and never finish."""
    anew = Config.from_flat({"output_dir": tmp_path, "auto_resume": False})
    assert next_start(anew, 0) is anew
    (tmp_path / "run.json").write_text('{"starts": [{}]}')
    assert next_start(anew, 1) is anew, "an earlier run's start"
    assert next_start(anew, 0).run.auto_resume
    again = Config.from_flat({"output_dir": tmp_path})
    assert next_start(again, 0) is again


@pytest.mark.slow
def test_a_run_with_a_loss_that_is_not_finite_ends_after_three_failures(
    small_settings: dict[str, Any], tmp_path: Path
) -> None:
    """It saves its best weights in every start, but nothing to continue from."""
    settings = {**small_settings, "epochs": 4, "warmup_epochs": 2, "lr": 1e30, "save_ckpt_freq": 4, "log_every": 100}
    argv = words({**settings, "job_dir": tmp_path / "job", "executor": "local"})
    result = subprocess.run(
        [sys.executable, str(REPOSITORY / "train.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 1, result.stderr
    assert [entry["status"] for entry in read_lines(tmp_path / "job" / "attempts.jsonl")] == [1] * MAX_FAILURES
    assert "ended with exit status 1 and failed 3 times without a newer checkpoint" in result.stdout
