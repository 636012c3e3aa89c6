"""A submission is one job, whenever the submitting process is killed and whether or not Slurm answers."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.nursery import Moment, strike_at
from support.slurm_commands import answer, words

from ffcv_convnext.cli import run_command
from ffcv_convnext.cluster import read_submissions
from ffcv_convnext.cluster.intent import INTENT
from ffcv_convnext.cluster.local_executor import LocalRun, launcher_of
from ffcv_convnext.config import Config

RECORD = ("ffcv_convnext.cluster.intent.write_submissions", 1)
MOMENTS: dict[str, list[Moment]] = {
    "before the intent": [("ffcv_convnext.cluster.submission.submit_once", 1)],
    "before sbatch": [("ffcv_convnext.cluster.slurm.sbatch", 1)],
    "after sbatch": [("ffcv_convnext.cluster.intent._record", 1)],
    "in the record": [RECORD, ("os.replace", 1)],
    "after the record": [RECORD, ("pathlib.Path.unlink", 2)],  # the first one is of a temporary file
}
SBATCH = """#!/bin/sh
cd '{folder}'
echo "$@" >> sbatch.calls
[ -e kill ] && kill -9 $PPID && rm kill && sleep 1
echo "$(wc -l < sbatch.calls)|${{1#--job-name=}}" >> jobs
if [ -e silent ]; then
  echo 'sbatch: error: Batch job submission failed: Socket timed out on send/recv operation' >&2
  exit 1
fi
echo "Submitted batch job $(wc -l < sbatch.calls)"
"""
SQUEUE = r"""#!/bin/sh
cd '{folder}'
touch jobs
case "$*" in
  *%F*) cat jobs ;;
  *) for n in $(cut -d'|' -f1 jobs); do printf '%s PENDING\n' $n ${{n}}_0 ${{n}}_1 ${{n}}_2 ${{n}}_3; done ;;
esac
"""


@pytest.fixture
def queue(commands: Path) -> Path:
    """A Slurm that keeps its jobs in a file: each pending, each possibly an array."""
    for name, script in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (commands / name).write_text(script.format(folder=commands))
    return commands


@pytest.fixture(params=["train", "ladder"])
def command(request: pytest.FixtureRequest, small_settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """The command line of one run, or of an array of four; its job_dir is tmp_path / "job"."""
    common = {"job_dir": tmp_path / "job", "ngpus": 2, "recipe_batch": 16}
    if request.param == "train":
        return ["train", *words({**small_settings, **common})]
    (tmp_path / "configs").mkdir()
    for name in ("00_start", "01_next"):
        (tmp_path / "configs" / f"{name}.yaml").write_text("resnet_layers: 1-1-1-1\nresnet_embed_dim: 8\n")
    settings = {name: small_settings[name] for name in ("data_path", "device", "amp", "batch_size", "input_size")}
    return ["ladder", "submit", "--seeds", "0,1", *words({**settings, **common, "configs": tmp_path / "configs"})]


def run_killed(command: list[str], moments: list[Moment]) -> None:
    """Run a command in a child that is killed at a moment, or by the fake sbatch."""
    pid = os.fork()
    if not pid:
        if moments:
            strike_at(moments, [signal.SIGKILL])
        os._exit(run_command(command[0], command[1:]))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def assert_one_job(queue: Path, job_dir: Path, number: int) -> None:
    """One job is queued, recorded once for each of its runs, and complete on disk; nothing is left open."""
    (job,) = (queue / "jobs").read_text().splitlines()
    assert job.split("|")[0] == str(number)
    submissions = read_submissions(job_dir)
    array = len(submissions) > 1
    assert [s.job for s in submissions] == ([f"{number}_{i}" for i in range(4)] if array else [str(number)])
    assert {s.job_name for s in submissions} == {job.split("|")[1]}
    submission = submissions[0].job_name.rpartition("-")[2]
    for index in range(len(submissions)):
        assert (job_dir / "slurm" / f"{submission}_{index}.pkl").is_file()
    assert f"{submission}_${{SLURM_ARRAY_TASK_ID:-0}}.pkl" in (job_dir / "slurm" / f"{submission}.sh").read_text()
    assert not (job_dir / INTENT).exists()


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_submission_and_its_repetition_are_one_job(
    moment: str, command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_killed(command, MOMENTS[moment])
    submitted = (queue / "jobs").exists()
    assert submitted == (moment not in ("before the intent", "before sbatch"))
    for _ in range(2):
        assert run_command(command[0], command[1:]) == 0
        assert_one_job(queue, tmp_path / "job", 1)
    assert ("of an interrupted submission found" in capsys.readouterr().out) == submitted


def test_a_repetition_waits_for_an_sbatch_that_outlives_its_submission(
    command: list[str], queue: Path, tmp_path: Path
) -> None:
    (queue / "kill").touch()
    run_killed(command, [])
    assert not (queue / "jobs").exists(), "sbatch is still at work"
    assert run_command(command[0], command[1:]) == 0
    assert_one_job(queue, tmp_path / "job", 1)


def test_a_second_submission_at_the_same_time_is_refused(
    command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffcv_convnext.cluster.intent.PATIENCE_S", 0.1)
    from ffcv_convnext.cluster.intent import submitting

    with submitting(tmp_path / "job"):
        assert run_command(command[0], command[1:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"another submission is running (process {os.getpid()} on " in line
    assert "nothing submitted" in line
    assert not (queue / "jobs").exists()


# --- Slurm does not answer -----------------------------------------------------------------------------------


def errors(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]


def test_while_squeue_does_not_answer_nothing_is_submitted_again(
    command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_killed(command, MOMENTS["after sbatch"])
    answer(queue, "squeue", "", status=1)
    assert run_command(command[0], command[1:]) == 1
    (line,) = errors(capsys)
    assert line.startswith("error: an earlier submission was interrupted, and it is unknown whether Slurm has its job")
    assert line.endswith("nothing submitted. Repeat the command when squeue answers")
    (queue / "squeue").write_text(SQUEUE.format(folder=queue))
    assert run_command(command[0], command[1:]) == 0
    assert_one_job(queue, tmp_path / "job", 1)
    answer(queue, "squeue", "", status=1)
    assert run_command(command[0], command[1:]) == 1
    (line,) = errors(capsys)
    assert line.startswith("error: nothing submitted: squeue failed")
    assert line.endswith("repeat the command when squeue answers")


def test_a_squeue_that_hangs_is_given_up(
    command: list[str], queue: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_killed(command, MOMENTS["after sbatch"])
    monkeypatch.setattr("ffcv_convnext.cluster.slurm.TIMEOUT_S", 0.2)
    (queue / "squeue").write_text("#!/bin/sh\nexec sleep 60\n")
    assert run_command(command[0], command[1:]) == 1
    (line,) = errors(capsys)
    assert "squeue did not answer within 0.2 s" in line
    assert "nothing submitted" in line


def test_a_job_that_slurm_took_though_sbatch_failed_is_recorded(
    command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (queue / "silent").touch()
    assert run_command(command[0], command[1:]) == 0
    assert_one_job(queue, tmp_path / "job", 1)
    assert "submitted job 1" in capsys.readouterr().out


def test_a_failed_sbatch_without_an_answer_of_squeue_is_looked_up_later(
    command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (queue / "silent").touch()
    answer(queue, "squeue", "", status=1)
    assert run_command(command[0], command[1:]) == 1
    (line,) = errors(capsys)
    assert "Socket timed out on send/recv operation; it is unknown whether Slurm has the job convnext-" in line
    (queue / "squeue").write_text(SQUEUE.format(folder=queue))
    assert run_command(command[0], command[1:]) == 0
    assert_one_job(queue, tmp_path / "job", 1)


def test_a_job_that_has_ended_is_found_in_the_accounting(
    command: list[str], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_killed(command, MOMENTS["after sbatch"])
    (intent,) = {entry["job_name"] for entry in json.loads((tmp_path / "job" / INTENT).read_text())}
    answer(queue, "sacct", f"16|other\n1_3|{intent}")
    (queue / "jobs").unlink()
    assert run_command(command[0], command[1:]) == 0
    assert "job 1 of an interrupted submission found" in capsys.readouterr().out
    jobs = [s.job for s in read_submissions(tmp_path / "job")]
    assert jobs in (["1", "2"], ["1_0", "1_1", "1_2", "1_3", "2_0", "2_1", "2_2", "2_3"]), "it had ended: a new job"


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", "[1]", '[{"job": "1"}]', "\0\0\0"])
def test_a_damaged_intent_is_a_clean_error(
    content: str, small_settings: dict[str, Any], queue: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / INTENT).write_text(content)
    settings = {**small_settings, "recipe_batch": 8, "job_dir": tmp_path / "job", "ngpus": 1}
    assert run_command("train", words(settings)) == 1
    (line,) = errors(capsys)
    assert f"{tmp_path / 'job' / INTENT}, left by an interrupted submission, is damaged" in line
    assert "nothing submitted" in line
    assert not (queue / "jobs").exists()


# --- The user's own names --------------------------------------------------------------------------------------


def test_comment_and_name_of_the_user_survive(
    small_settings: dict[str, Any], queue: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_JOB_NAME", "other")  # stronger than the script, weaker than a flag
    settings = {**small_settings, "recipe_batch": 8, "job_dir": tmp_path / "job", "ngpus": 1}
    assert run_command("train", words({**settings, "comment": "for the paper", "job_name": "my-run"})) == 0
    (script,) = (tmp_path / "job" / "slurm").glob("*.sh")
    assert "#SBATCH --comment='for the paper'\n" in script.read_text()
    (submission,) = read_submissions(tmp_path / "job")
    assert submission.job_name == f"my-run-{script.stem}"
    assert (queue / "sbatch.calls").read_text() == f"--job-name={submission.job_name} {script}\n"


def test_a_job_name_for_sbatch_alone_is_refused(
    small_settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = words({**small_settings, "job_dir": tmp_path / "job"})
    assert run_command("train", [*flags, "--slurm_job_name", "x"]) == 2
    assert "give its start with --job_name NAME" in capsys.readouterr().err


# --- This machine ------------------------------------------------------------------------------------------------


@pytest.fixture
def sleeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], LocalRun]:
    """Make a run whose process waits for the file `end`."""
    package = tmp_path / "code" / "ffcv_convnext"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    end = tmp_path / "end"
    (package / "cli.py").write_text(
        f"import time\nfrom pathlib import Path\nwhile not Path({str(end)!r}).exists(): time.sleep(0.02)\n"
    )
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    return lambda: LocalRun("a", Config.from_flat({"output_dir": tmp_path / "run"}), tmp_path / "code", tmp_path)


def test_a_run_on_this_machine_is_started_once_though_its_launcher_is_killed(
    sleeper: Callable[[], LocalRun], tmp_path: Path
) -> None:
    pid = os.fork()
    if not pid:
        sleeper().start([""])
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(pid, 0)
    assert (launcher_of(tmp_path / "run") or "").startswith(f"process {pid} on ")
    with pytest.raises(ValueError, match=f"queued or running \\(process {pid} on "):
        sleeper()
    (tmp_path / "end").touch()
    deadline = time.monotonic() + 60
    while launcher_of(tmp_path / "run"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    sleeper().launcher.close()


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_run_that_waits_on_this_machine_is_not_submitted_again(
    executor: str,
    sleeper: Callable[[], LocalRun],
    small_settings: dict[str, Any],
    queue: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    waiting = sleeper()
    settings = {**small_settings, "job_dir": tmp_path / "job", "output_dir": tmp_path / "run", "ngpus": 1}
    assert run_command("train", words({**settings, "executor": executor})) == 0
    assert f"queued or running on this machine (process {os.getpid()} on " in capsys.readouterr().out
    assert not (queue / "jobs").exists()
    waiting.launcher.close()
