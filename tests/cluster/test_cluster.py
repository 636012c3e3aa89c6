"""A run as a job: settings and profiles, checks before submission, snapshots, the script, processes on this machine.

Tests on a real cluster are in tests/slurm/.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import REPOSITORY
from support.runs import train_here
from support.slurm_commands import answer, words

from ffcv_convnext import snapshot
from ffcv_convnext.cli import run_command
from ffcv_convnext.cluster import ClusterConfig, read_submissions
from ffcv_convnext.cluster.local_executor import LocalRun, choose_devices, run_all
from ffcv_convnext.cluster.settings import CLUSTER_SETTINGS, read_profile, split_slurm_options
from ffcv_convnext.cluster.slurm import TrainingJob
from ffcv_convnext.config import SETTINGS, Config
from ffcv_convnext.files import read_lines
from ffcv_convnext.training.checkpoint import LAST, read_checkpoint


@pytest.fixture
def flags(small_settings: dict[str, Any], tmp_path: Path) -> list[str]:
    """`train.py`'s flags for a job of 2 processes, 5 optimiser steps an epoch."""
    settings = {**small_settings, "recipe_batch": 16, "job_dir": tmp_path / "job", "ngpus": 2}
    return words(settings)


@pytest.fixture
def no_slurm(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A PATH without Slurm's commands."""
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))


def error_of(capsys: pytest.CaptureFixture[str], argv: list[str], *, status: int = 2) -> str:
    """The one line of a command's error."""
    assert run_command("train", argv) == status
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning:")]
    assert len(lines) == 1, lines
    return lines[0]


# --- settings ---------------------------------------------------------------------------------------------


def test_no_setting_of_the_cluster_has_the_name_of_a_runs() -> None:
    assert not CLUSTER_SETTINGS.keys() & SETTINGS.keys()


def test_a_profile_is_overridden_by_flags(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("partition: learn\nnodes: 4\nmem_gb: 480\nslurm_reservation: night\nslurm_exclusive: true\n")
    extra = ["--cluster", str(profile), "--nodes", "2", "--slurm_reservation", "day", "--slurm_gpu_bind=none"]
    assert run_command("train", [*flags, *extra, "--dry_run"]) == 0
    script = capsys.readouterr().out
    for line in (
        "--partition=learn",
        "--nodes=2",
        "--mem=491520M",
        "--reservation=day",
        "--exclusive",
        "--gpu-bind=none",
    ):
        assert f"#SBATCH {line}\n" in script


def test_an_unknown_key_in_a_profile_is_an_error(tmp_path: Path) -> None:
    profile = tmp_path / "profile.yaml"
    profile.write_text("partitoin: learn\n")
    with pytest.raises(ValueError, match=r"profile\.yaml: unknown setting 'partitoin'; .*partition"):
        read_profile(profile)
    profile.write_text("epochs: 3\n")
    with pytest.raises(ValueError, match="'epochs'; it is a setting of a run, set it in --config"):
        read_profile(profile)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_profile(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no settings"),
        (b"{}", "holds no settings"),
        (b"\xff\xfe", "not readable YAML"),
        (b"nodes: 2\nnodes: 3\n", "'nodes' occurs twice"),
        (b"- gpu\n", "expected lines of the form 'name: value'"),
        (b"[" * 5000, "not readable YAML"),
        (b"nodes: many\n", "nodes = many: expected a whole number"),
        (b"nodes: .nan\n", "nodes = nan: expected a whole number"),
        (b"account: {a: b}\n", "account = .*: expected one value"),
        (b"slurm_nice: [1, 2]\n", "slurm_nice = .*: expected one value"),
    ],
)
def test_a_damaged_profile_is_one_error_that_names_it(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "profile.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path}.*{message}"):
        read_profile(path)


@pytest.mark.parametrize("line", ["timeout: 1e308", "mem_gb: 1e308", "nodes: 0"])
def test_a_number_out_of_range_in_a_profile_is_an_error(
    line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "profile.yaml").write_text(f"{line}\n")
    flags = ["--job_dir", str(tmp_path / "job"), "--cluster", str(tmp_path / "profile.yaml"), "--dry_run"]
    assert run_command("train", flags) == 2
    assert f"error: {line.partition(':')[0]} = " in capsys.readouterr().err


def test_other_options_of_sbatch_are_taken_out_of_a_command_line() -> None:
    argv = ["--lr", "1", "--slurm_mail_type", "END", "--slurm_reservation=a=b", "--epochs", "2"]
    assert split_slurm_options(argv) == (["--lr", "1", "--epochs", "2"], {"mail_type": "END", "reservation": "a=b"})
    with pytest.raises(ValueError, match="--slurm_exclusive: expected a value"):
        split_slurm_options(["--slurm_exclusive"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"nodes": 0}, "nodes = 0: expected a whole number >= 1"),
        ({"timeout": -1.0}, "timeout = -1.0: expected a number in \\(0, 100000\\]"),
        ({"mem_gb": 0.0}, "mem_gb = 0.0: expected a number in \\(0, 1000000\\]"),
        ({"executor": "local", "nodes": 2}, "nodes = 2: executor local uses only this machine"),
        ({"job_dir": Path("x/%j")}, "job_dir = x/%j: expected a path without %"),
    ],
)
def test_invalid_values_are_errors(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClusterConfig(**values)


def test_time_limits_are_whole_minutes() -> None:
    assert [ClusterConfig(timeout=hours).timeout_minutes for hours in (72, 0.5, 0.01)] == [4320, 30, 1]


# --- another number of processes --------------------------------------------------------------------------


def test_update_freq_follows_from_the_global_batch() -> None:
    config = Config.from_flat({"batch_size": 128, "global_batch": 4096, "update_freq": 7})
    assert {world: config.for_world(world).data.update_freq for world in (1, 8, 16, 32)} == {1: 32, 8: 4, 16: 2, 32: 1}
    with pytest.raises(
        ValueError,
        match="global_batch = 4096 is 32 micro-batches of batch_size 128, which 24 processes cannot share equally; "
        "1, 2, 4, 8, 16, 32 processes can",
    ):
        config.for_world(24)
    with pytest.raises(ValueError, match="global_batch = 100: expected a multiple of batch_size = 8"):
        Config.from_flat({"batch_size": 8, "global_batch": 100})
    alone = Config.from_flat({"update_freq": 3})
    assert alone.for_world(5) == alone


def test_a_run_of_two_processes_continues_on_one(small_settings: dict[str, Any], tmp_path: Path) -> None:
    """The checkpoint contains the number of processes. Two real processes are tested in test_distributed."""
    settings = {**small_settings, "recipe_batch": 16, "global_batch": 16, "epochs": 1, "output_dir": tmp_path}
    train_here(settings)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["update_freq"] == 2
    (tmp_path / "done").unlink()
    content = read_checkpoint(tmp_path / LAST)
    assert content["global_batch"] == 16
    import torch

    content["config"]["update_freq"] = 1
    torch.save(content, tmp_path / LAST)
    train_here(settings)
    assert (
        "the checkpoint was made on 2 processes with update_freq 1; the run continues on 1 with 2: the same global "
        "batch of 16, divided into the same micro-batches"
    ) in (tmp_path / "rank0.log").read_text()


# --- snapshots of the source -----------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small checkout in place of ours."""
    root = tmp_path / "checkout"
    (root / "ffcv_convnext" / "__pycache__").mkdir(parents=True)
    (root / "ffcv_convnext" / "core.py").write_text("x = 1\n")
    (root / "ffcv_convnext" / "__pycache__" / "core.pyc").write_bytes(b"")
    (root / "rn_configs").mkdir()
    (root / "rn_configs" / "00.yaml").write_text("lr: 1\n")
    (root / "train.py").write_text("")
    (root / "runs").mkdir()
    (root / "runs" / "big").write_text("")
    monkeypatch.setattr(snapshot, "PACKAGE", root / "ffcv_convnext")
    return root


@pytest.mark.usefixtures("checkout")
def test_a_snapshot_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    copy = snapshot.take_snapshot(tmp_path / "code")
    files = {str(path.relative_to(copy)) for path in copy.rglob("*") if path.is_file()}
    assert files == {"ffcv_convnext/core.py", "rn_configs/00.yaml", "train.py", "COMMIT"}
    assert list((tmp_path / "code").iterdir()) == [copy]


def test_later_edits_are_another_snapshot(checkout: Path, tmp_path: Path) -> None:
    copy = snapshot.take_snapshot(tmp_path / "code")
    assert snapshot.take_snapshot(tmp_path / "code") == copy
    (checkout / "ffcv_convnext" / "core.py").write_text("x = 2\n")
    other = snapshot.take_snapshot(tmp_path / "code")
    assert other != copy
    assert (copy / "ffcv_convnext" / "core.py").read_text() == "x = 1\n"
    assert (other / "ffcv_convnext" / "core.py").read_text() == "x = 2\n"


def test_a_snapshot_holds_its_commit(checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
        return subprocess.run(
            ["git", *identity, *arguments], cwd=checkout, check=True, capture_output=True, text=True
        ).stdout.strip()

    git("init", "-q")
    git("add", "ffcv_convnext/core.py")
    git("commit", "-qm", "first")
    first = git("rev-parse", "HEAD")
    clean = snapshot.take_snapshot(tmp_path / "code")
    (checkout / "ffcv_convnext" / "core.py").write_text("x = 2\n")
    edited = snapshot.take_snapshot(tmp_path / "code")
    git("commit", "-qam", "second")
    for copy, expected in ((clean, first), (edited, f"{first}+changes")):
        monkeypatch.setattr(snapshot, "PACKAGE", copy / "ffcv_convnext")
        assert snapshot.source_commit() == expected


@pytest.mark.usefixtures("checkout")
def test_a_damaged_snapshot_is_repaired_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    copy = snapshot.take_snapshot(tmp_path / "code")
    whole = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    (copy / "ffcv_convnext" / "core.py").write_bytes(b"x = 3\n")
    (copy / "rn_configs" / "00.yaml").unlink()
    with monkeypatch.context() as patch:  # a job that runs the damaged copy
        patch.setattr(snapshot, "PACKAGE", copy / "ffcv_convnext")
        assert snapshot.source_commit().endswith("+changes")
    assert snapshot.take_snapshot(tmp_path / "code") == copy
    assert "ffcv_convnext/core.py, rn_configs/00.yaml did not match the source" in caplog.text
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == whole
    (copy / "COMMIT").write_bytes(b"\xff")
    with monkeypatch.context() as patch:
        patch.setattr(snapshot, "PACKAGE", copy / "ffcv_convnext")
        assert snapshot.source_commit().endswith("+changes")


# --- before submission ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_slurm")
def test_without_slurm_the_error_names_the_alternatives(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = error_of(capsys, flags)
    assert line == (
        "error: sbatch not found on this machine; submit from a login node of the cluster, or run on this machine "
        "with --executor local"
    )
    assert not (tmp_path / "job").exists()


@pytest.mark.usefixtures("no_slurm")
def test_a_dry_run_prints_script_and_config_and_writes_nothing(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    extra = ["--nodes", "4", "--ngpus", "2", "--timeout", "1.5", "--batch_size", "2", "--device", "auto", "--dry_run"]
    assert run_command("train", [*flags, *extra]) == 0
    script, _, rest = capsys.readouterr().out.partition("# cluster\n")
    for line in ("nodes=4", "ntasks-per-node=2", "gpus-per-node=2", "time=90", "requeue", "signal=USR2@120"):
        assert f"#SBATCH --{line}\n" in script
    assert "--kill-on-bad-exit=1 --cpus-per-task=10" in script
    assert f"cd {tmp_path / 'job' / 'code' / 'SNAPSHOT'}" in script
    assert subprocess.run(["/bin/bash", "-n"], input=script, text=True, check=False).returncode == 0
    cluster, _, config = rest.partition(f"# {tmp_path / 'job'}\n")
    assert yaml.safe_load(cluster)["timeout"] == 1.5
    resolved = yaml.safe_load(config)
    assert (resolved["global_batch"], resolved["update_freq"]) == (16, 1)
    assert resolved["output_dir"] == str(tmp_path / "job")
    assert not (tmp_path / "job").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--data_path", "/nowhere"], "/nowhere/train.beton does not exist; create it with write_ffcv_dataset.py"),
        (["--batch_size", "64"], "the training set has 80 images, fewer than the global batch of 128"),
        (
            ["--global_batch", "24"],
            "24 is 3 micro-batches of batch_size 8, which 2 processes cannot share equally; 1, 3",
        ),
        (["--input_size", "16"], "input_size = 16: expected a whole number >= 32"),
        (["--opt", "adamv"], "opt = adamv: "),
        (["--finetune", "none.pth"], "none.pth does not exist"),
        (["--nb_classes", "2"], "nb_classes = 2: the data has 4 classes"),
        (["--ngpu", "4"], "unknown option '--ngpu'; did you mean --ngpus"),
        (["--job_dir", "/proc/job"], "job_dir = /proc/job: /proc is not a writable folder"),
    ],
)
def test_errors_of_a_run_are_found_before_submission(
    extra: list[str],
    message: str,
    flags: list[str],
    commands: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        os, "access", lambda path, _mode: not str(path).startswith("/proc")
    )  # root may write everywhere
    assert message in error_of(capsys, [*flags, *extra])
    assert not (commands / "sbatch.calls").exists()


def test_an_unknown_network_is_found_before_submission(
    beton_dir: Path, tmp_path: Path, commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = words({"data_path": beton_dir, "job_dir": tmp_path / "job", "ngpus": 1, "batch_size": 8})
    assert "convnext_tiny" in error_of(capsys, [*flags, "--model", "convnext_tine"])
    assert not (commands / "sbatch.calls").exists()


def test_an_unknown_partition_is_an_error_that_lists_the_partitions(
    flags: list[str], commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(commands, "sinfo", "learn* 3-00:00:00\nurgent 30:00")
    line = error_of(capsys, [*flags, "--partition", "lern"])
    assert line.startswith("error: partition = lern: not found on this cluster; ")
    assert line.endswith("; partitions: learn, urgent")


@pytest.mark.parametrize(
    ("extra", "limit"),
    [
        (["--timeout", "72.1"], "timeout = 72.1: partition learn runs jobs of at most 72 hours; use --timeout 72:"),
        (["--timeout", "1", "--partition", "urgent"], "partition urgent runs jobs of at most 0.5 hours"),
        (["--timeout", "100", "--partition", "urgent,long"], None),
        (["--timeout", "100", "--qos", "endless"], None),
        ([], None),
    ],
)
def test_a_time_limit_above_the_partitions_is_an_error(
    extra: list[str], limit: str | None, flags: list[str], commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer(commands, "sinfo", "learn* 3-00:00:00\nurgent 30:00\nlong infinite")
    answer(commands, "sbatch", "Submitted batch job 1")
    if limit is None:
        assert run_command("train", [*flags, *extra]) == 0
    else:
        assert limit in error_of(capsys, [*flags, *extra])


def test_flags_about_submission_need_a_job_dir(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--nodes has no effect without --job_dir" in error_of(capsys, ["--nodes", "2"])


def test_a_run_is_submitted_once(
    flags: list[str], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_dir = tmp_path / "job"
    answer(commands, "sbatch", "Submitted batch job 17")
    assert run_command("train", flags) == 0
    assert f"submitted job 17: {job_dir}, 2 processes" in capsys.readouterr().out
    (submission,) = read_submissions(job_dir)
    assert (submission.job, submission.world, submission.epochs) == ("17", 2, 2)
    assert (Path(submission.code) / "ffcv_convnext" / "cluster" / "slurm.py").is_file()
    answer(commands, "squeue", "16 RUNNING\n17 PENDING")
    assert run_command("train", flags) == 0
    assert f"{job_dir}: job 17 is PENDING; not submitted again" in capsys.readouterr().out
    assert len((commands / "sbatch.calls").read_text().splitlines()) == 1
    answer(commands, "squeue", "17 FAILED")
    answer(commands, "sbatch", "Submitted batch job 18")
    assert run_command("train", flags) == 0
    assert [s.job for s in read_submissions(job_dir)] == ["17", "18"]


def test_a_run_that_has_started_keeps_its_global_batch(
    flags: list[str], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "job").mkdir()
    (tmp_path / "job" / "run.json").write_text('{"global_batch": 16, "starts": []}')
    answer(commands, "sbatch", "Submitted batch job 4")
    assert run_command("train", [*flags, "--ngpus", "1", "--dry_run"]) == 0
    assert "global_batch: 16\n" in capsys.readouterr().out
    assert error_of(capsys, [*flags, "--global_batch", "32"]) == (
        f"error: global_batch = 32: the run in {tmp_path / 'job'} started with 16, which must stay the same; "
        "choose another output_dir for a new run"
    )


def test_an_error_of_sbatch_is_one_line(
    flags: list[str], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (commands / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: Invalid account' >&2\nexit 1\n")
    assert error_of(capsys, flags, status=1) == (
        "error: nothing submitted: sbatch: error: Invalid account. Change that option; --dry_run prints the script"
    )
    assert read_submissions(tmp_path / "job") == []


# --- real training ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("one_thread")
def test_the_debug_executor_trains_in_this_process(small_settings: dict[str, Any], tmp_path: Path) -> None:
    flags = words({**small_settings, "epochs": 1, "job_dir": tmp_path / "job", "executor": "debug"})
    assert run_command("train", flags) == 0
    assert (tmp_path / "job" / "done").exists()
    assert run_command("train", flags) == 0


@pytest.mark.slow
def test_submitits_local_executor_runs_the_callable(
    small_settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pickle, the snapshot's package and the ranks' environment, as on a cluster except for srun."""
    submitit = pytest.importorskip("submitit")
    code = snapshot.take_snapshot(tmp_path / "code")
    monkeypatch.setenv("PYTHONPATH", str(code))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29517")
    monkeypatch.chdir(code)
    run = tmp_path / "run"
    config = Config.from_flat({**small_settings, "global_batch": 16, "recipe_batch": 16, "output_dir": run})
    executor = submitit.LocalExecutor(tmp_path / "submitit")
    executor.update_parameters(tasks_per_node=2, timeout_min=5)
    job = executor.submit(TrainingJob(config.flat(), ["train.py", "--job_dir", "x"]))
    job.wait()
    (start,) = json.loads((run / "run.json").read_text())["starts"]
    assert (start["processes"], start["command"]) == (2, ["train.py", "--job_dir", "x"])
    assert start["git"] == (code / "COMMIT").read_text().splitlines()[0]
    assert read_checkpoint(run / LAST)["step"] == 10
    assert (run / "done").exists()


@pytest.mark.slow
def test_a_killed_rank_ends_the_run_and_it_is_started_again(small_settings: dict[str, Any], tmp_path: Path) -> None:
    settings = {**small_settings, "epochs": 30, "global_batch": 16, "recipe_batch": 16, "save_ckpt_steps": 5}
    argv = [*words({**settings, "job_dir": tmp_path / "job", "executor": "local", "ngpus": 2})]
    run = tmp_path / "job"
    with subprocess.Popen(
        [sys.executable, str(REPOSITORY / "train.py"), *argv],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            deadline = time.monotonic() + 240
            while not (run / LAST).exists():
                assert process.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            holder = (run / ".lock").read_text().split()[1]
            os.kill(int(holder), signal.SIGKILL)
            output, _ = process.communicate(timeout=240)
        finally:
            process.kill()
    assert process.returncode == 0, output
    assert f"{run} ended with exit status 137 before it was finished; started again" in output
    other = (run / "local" / "job_seed0_1.log").read_text()
    assert (
        f"error: rank 0 was lost first, without an error: killed, out of memory or crashed ({run}/rank0.log)" in other
    )
    assert "Traceback" not in other
    assert "gloo" not in other
    assert output.splitlines()[-1] == f"finished {run}"
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [start["from_step"] > 0 for start in starts] == [False, True]
    assert [entry["epoch"] for entry in read_lines(run / "log.jsonl")] == list(range(30))


def test_runs_get_disjoint_devices_and_those_that_failed_are_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small processes instead of training: the test checks which GPUs each run gets."""
    program = "import os, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['RANK'], os.environ['WORLD_SIZE'])"
    stand_in = tmp_path / "code" / "ffcv_convnext"
    stand_in.mkdir(parents=True)
    (stand_in / "__init__.py").write_text("")
    (stand_in / "cli.py").write_text(f"{program}\nsys.exit('seed: 2' in open(sys.argv[-1]).read())\n")
    monkeypatch.setenv("PYTHONSAFEPATH", "")
    runs = [
        LocalRun("a", Config.from_flat({"seed": n, "output_dir": tmp_path / f"run{n}"}), tmp_path / "code", tmp_path)
        for n in range(3)
    ]
    lines: list[str] = []
    status = run_all(runs, devices=["0", "1", "4", "5"], world=2, max_parallel=None, say=lines.append)
    assert status == 1
    assert sorted(run.log(0).read_text() for run in runs[:2]) == ["0,1 0 2\n", "4,5 0 2\n"]
    assert runs[0].log(1).read_text().split()[1:] == ["1", "2"]
    assert sum(line.startswith("started") for line in lines) == 2 + 3
    assert lines[-1] == (
        f"error: {tmp_path / 'run2'} ended with exit status 1 and failed 3 times without a newer checkpoint; "
        f"not started again; see {runs[2].log(0)}"
    )


def test_devices_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    assert choose_devices(3, "cpu") == ["", "", ""]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert choose_devices(None, "auto") == ["0", "1", "2", "3"]
    assert choose_devices(2, "cuda") == ["0", "1"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    assert choose_devices(2, "auto") == ["4", "5"]
    with pytest.raises(ValueError, match="ngpus = 8: this machine has 4 GPUs"):
        choose_devices(8, "auto")
