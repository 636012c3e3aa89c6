"""The whole ladder as jobs: which runs, their cost, their state. A real array is in tests/slurm/."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import REPOSITORY
from support.slurm_commands import answer, words

from ffcv_convnext.cli import run_command
from ffcv_convnext.cluster import ClusterConfig, Submission, read_submissions
from ffcv_convnext.cluster.submissions import write_submissions
from ffcv_convnext.ladder import (
    budget,
    cancel_runs,
    format_status,
    parse_seeds,
    plan_ladder,
    read_log,
    read_status,
    select_steps,
)

CONFIGS = REPOSITORY / "rn_configs"


@pytest.fixture
def mini(tmp_path: Path) -> Path:
    """A ladder of three steps and the released network; 80 images, global batch 16."""
    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "00_start.yaml").write_text("recipe_batch: 16\nresnet_layers: 1-1-1-1\nresnet_embed_dim: 8\n")
    (folder / "01_stem.yaml").write_text("base: 00_start.yaml\nresnet_stem: patch_embed\n")
    (folder / "02_gelu.yaml").write_text("base: 01_stem.yaml\nresnet_act_layer: gelu\n")
    (folder / "convnext_end.yaml").write_text("base: 02_gelu.yaml\nresnet_norm_layer: ln\n")
    return folder


@pytest.fixture
def flags(small_settings: dict[str, Any], mini: Path, tmp_path: Path) -> list[str]:
    """`ladder submit`'s flags for two processes a run."""
    ours = ("recipe_batch", "resnet_layers", "resnet_embed_dim", "resnet_stem")
    settings = {name: value for name, value in small_settings.items() if name not in ours}
    return ["submit", *words({**settings, "configs": mini, "job_dir": tmp_path / "L", "ngpus": 2})]


def names(only: str | None, **how: bool) -> list[str]:
    return [step.name for step in select_steps(CONFIGS, only, **how)]


def test_steps_are_selected_by_name_number_and_range() -> None:
    assert len(names(None)) == 15
    assert names("05..07") == ["05_inverted", "06_depthwise_first", "07_kernel7"]
    assert names("convnext_tiny, 0..1,13") == [
        "00_resnet50", "01_stage_ratio", "13_separate_downsampling", "convnext_tiny",
    ]  # fmt: skip
    assert names("07", kernel_sizes=True) == ["07_kernel7", "07_kernel5", "07_kernel9", "07_kernel11"]
    with pytest.raises(ValueError, match=r"only = 14: .* has 00_resnet50, .*; e\.g\. --only 05\.\.08"):
        names("07,14")


@pytest.mark.parametrize("text", ["", "0,1,1", "a", "-1"])
def test_seeds_are_different_numbers(text: str) -> None:
    assert parse_seeds("3,0") == [3, 0]
    with pytest.raises(ValueError, match=f"seeds = {text}: expected"):
        parse_seeds(text)


def test_a_ladder_is_one_array_and_is_not_submitted_twice(
    flags: list[str], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job_dir = tmp_path / "L"
    answer(commands, "sbatch", "Submitted batch job 20")
    argv = [*flags, "--seeds", "0,1", "--only", "00..01", "--max_parallel", "3", "--images_per_s", "100"]
    assert run_command("ladder", argv) == 0
    out = capsys.readouterr().out
    # 4 runs x 2 epochs x 5 steps x 16 images, 1.6 s each: with 3 lanes, two in a row
    assert out.startswith(
        "budget: 4 runs, 640 training images; at 100 images/s per run (given): 0.0 h one after the other"
    )
    assert "0.0 h with 3 at a time" in out
    submissions = read_submissions(job_dir)
    submission = submissions[0].job_name.removeprefix("convnext-")
    script = (job_dir / "slurm" / f"{submission}.sh").read_text()
    assert "#SBATCH --array=0-3%3\n" in script
    assert sorted(path.name for path in (job_dir / "slurm").glob("*.pkl")) == [
        f"{submission}_{i}.pkl" for i in range(4)
    ]
    assert [(s.job, s.name, s.seed, s.world) for s in submissions] == [
        ("20_0", "00_start", 0, 2),
        ("20_1", "00_start", 1, 2),
        ("20_2", "01_stem", 0, 2),
        ("20_3", "01_stem", 1, 2),
    ]
    assert submissions[3].folder == str(job_dir / "01_stem" / "seed1")

    answer(commands, "squeue", "20_0 RUNNING\n20_1 PENDING\n20_2 PENDING\n20_3 CANCELLED")
    (job_dir / "00_start" / "seed0").mkdir(parents=True)
    (job_dir / "00_start" / "seed0" / "done").write_text('{"epochs": 2}')
    answer(commands, "sbatch", "Submitted batch job 21")
    assert run_command("ladder", argv) == 0
    out = capsys.readouterr().out
    assert f"{job_dir}/00_start/seed0 is finished; nothing to do" in out
    assert f"{job_dir}/00_start/seed1: job 20_1 is PENDING; not submitted again" in out
    assert "budget: 1 run," in out
    assert [s.job for s in read_submissions(job_dir)][4:] == ["21"]
    answer(commands, "squeue", "20_1 PENDING\n20_2 PENDING\n21 PENDING")
    assert run_command("ladder", argv) == 0
    assert "nothing to submit: all 4 runs are finished, queued or running" in capsys.readouterr().out
    assert len((commands / "sbatch.calls").read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--seed", "1"], "--seed is set for each run of a ladder; use --seeds 0,1,2"),
        (["--output_dir", "x"], "--output_dir is set for each run of a ladder; use --job_dir DIR"),
        (["--gpus_per_job", "2"], "gpus_per_job = 2 is for --executor local"),
        (["--batch_size", "5"], "global_batch = 16: expected a multiple of batch_size = 5"),
        (["--ngpus", "3"], "3 processes cannot share equally; 1, 2 processes can"),
        (["--max_paralel", "3"], "unknown option '--max_paralel'; did you mean --max_parallel or --max_res?"),
    ],
)
def test_wrong_ladders_are_not_submitted(
    extra: list[str], message: str, flags: list[str], commands: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("ladder", [*flags, *extra]) == 2
    assert message in capsys.readouterr().err
    assert not (commands / "sbatch.calls").exists()


def test_a_budget_is_given_measured_or_unknown(small_settings: dict[str, Any], mini: Path, tmp_path: Path) -> None:
    cluster = ClusterConfig(job_dir=tmp_path / "L", ngpus=2, nodes=1)
    settings = {name: small_settings[name] for name in ("data_path", "batch_size", "input_size", "device")}
    steps = select_steps(mini, "00..01")
    tasks = plan_ladder(steps, [0, 1], cluster, overrides={**settings, "epochs": 900, "warmup_epochs": 0})
    assert [task.config.data.global_batch for task in tasks] == [16] * 4
    assert "hours unknown: no run in this folder has been measured yet" in budget(tasks, 2, None)
    # 900 epochs x 80 images = 72,000 images: 2 h at 10 images/s
    assert budget(tasks, 2, 10.0, parallel=3) == (
        "budget: 4 runs, 288,000 training images; at 10 images/s per run (given): 8.0 h one after the other, 4.0 h "
        "with 3 at a time, 16 GPU-hours (training only, without queueing and evaluation)"
    )
    for name, rate in (("00_start", 10.0), ("01_stem", 40.0)):
        run = tmp_path / "L" / name / "seed0"
        run.mkdir(parents=True)
        (run / "run.json").write_text(json.dumps({"starts": [{"processes": 4}]}))
        (run / "log.jsonl").write_text(
            f'{{"epoch": 0, "images_per_s": {rate}}}\n{{"epoch": 1, "images_per_s": null}}\n'
        )
    # half as many processes: 5 and 20 images/s, 4 and 1 h
    assert "at 5 to 20 images/s per run (measured here): 10.0 h one after" in budget(tasks, 2, None)


def test_a_budget_counts_the_pixels_of_progressive_resizing(
    small_settings: dict[str, Any], mini: Path, tmp_path: Path
) -> None:
    """450 epochs at 32 pixels, 450 at 64: 5/8 of the pixels of 900 at 64. Rates are those of the largest images."""
    cluster = ClusterConfig(job_dir=tmp_path / "L", ngpus=2, nodes=1)
    ramp = {"min_res": 32, "max_res": 64, "start_ramp": 449, "end_ramp": 450}
    settings = {name: small_settings[name] for name in ("data_path", "batch_size", "input_size", "device")}
    overrides = {**settings, **ramp, "epochs": 900, "warmup_epochs": 0}
    tasks = plan_ladder(select_steps(mini, "00"), [0], cluster, overrides=overrides)
    assert budget(tasks, 2, 10.0) == (
        "budget: 1 run, 72,000 training images with 62 % of the pixels of their largest size; at 10 images/s per run "
        "(given): 1.2 h one after the other, 1.2 h with 1 at a time, 2 GPU-hours (training only, without queueing and "
        "evaluation)"
    )
    run = tmp_path / "L" / "00_start" / "seed0"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps({"starts": [{"processes": 2}]}))
    (run / "log.jsonl").write_text(json.dumps({"epoch": 0, "images_per_s": 40.0, "train_size": 32}) + "\n")
    assert "at 10 images/s per run (measured here): 1.2 h" in budget(tasks, 2, None), "a quarter of the pixels"


# --- status -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes a submitted run and its folder."""

    def make(name: str, job: str, *, epochs: int = 0, starts: int = 0, failed: int | None = None) -> Path:
        folder = tmp_path / "L" / name / "seed0"
        folder.mkdir(parents=True)
        submission = Submission(
            time="", job=job, name=name, seed=0, folder=str(folder), world=2, epochs=10, code="", commit="", command=[]
        )
        write_submissions(tmp_path / "L", [submission])
        rows = [
            {
                "epoch": e,
                "test_acc1": 50.0 + e % 3,
                "test_acc1_ema": 40.0 + e,
                "epoch_s": 600.0,
                "images_per_s": 1000.0 + e,
            }
            for e in range(epochs)
        ]
        (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        if starts:
            (folder / "run.json").write_text(json.dumps({"starts": [{"processes": 2}] * starts}))
        if failed is not None:
            (folder / "attempts.jsonl").write_text(json.dumps({"time": "", "job": job, "status": failed}) + "\n")
        return folder

    return make


def test_a_damaged_submission_is_left_out_and_named(
    run_folder: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("00_start", "01_stem", "02_gelu"):
        run_folder(name, "1_0")
    path = tmp_path / "L" / "submissions.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[1].replace(b"01_stem", b"01_stun") + lines[2][:-30])
    assert [submission.name for submission in read_submissions(tmp_path / "L")] == ["00_start"]
    assert f"{path}: lines 2, 3 cannot be read (its checksum does not match); left out" in caplog.text
    run_folder("03_last", "1_0")
    assert [submission.name for submission in read_submissions(tmp_path / "L")] == ["00_start", "03_last"]


def test_the_status_shows_the_state_of_every_run(
    run_folder: Callable[..., Path], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder("00_done", "1_0", epochs=10, starts=1) / "done").write_text('{"epochs": 10}')
    run_folder("01_running", "1_1", epochs=4, starts=3)
    run_folder("02_pending", "1_2")
    run_folder("03_requeued", "1_3", epochs=1, starts=1)
    run_folder("04_failed", "1_4", epochs=2, starts=1, failed=1)
    run_folder("05_stopped", "1_5", epochs=2, starts=1, failed=75)
    run_folder("06_missing", "1_6")
    answer(commands, "squeue", "1_1 RUNNING\n1_2 PENDING\n1_3 PENDING\n1_0 COMPLETED\n9 RUNNING")
    (tmp_path / "L" / "slurm").mkdir()
    log = (
        "loading\nerror: the loss is not finite at optimiser step 7\nsrun: error: n1: task 0: Exited with exit code 1\n"
    )
    (tmp_path / "L" / "slurm" / "1_4_0_log.err").write_text(log)

    rows = {row.name[3:]: row for row in read_status(tmp_path / "L")}
    assert {name: row.state for name, row in rows.items()} == {name: name for name in rows}
    running = rows["running"]
    assert (running.epoch, running.epochs, running.restarts) == (4, 10, 2)
    assert (running.left_s, running.top1, running.top1_ema, running.images_per_s) == (3600.0, 52.0, 43.0, 1003.0)
    assert rows["failed"].error == "error: the loss is not finite at optimiser step 7"
    assert rows["stopped"].left_s is None

    assert run_command("ladder", ["status", str(tmp_path / "L")]) == 0
    out = capsys.readouterr().out
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines()]
    assert ", ".join(table[0]) == "run, seed, job, state, epoch, left, top-1, ema, images/s, restarts, last error"
    assert "; ".join(table[3]) == "01_running; 0; 1_1; running; 4/10; 1 h 00 min; 52.00; 43.00; 1,003; 2; "
    assert out.splitlines()[-1] == "7 runs: 1 done, 1 running, 1 pending, 1 requeued, 1 failed, 1 stopped, 1 missing"
    long = format_status([replace(rows["failed"], error="x" * 100)]).splitlines()[2]
    assert long.endswith(" " + "x" * 57 + "... |")


def test_a_run_on_this_machine_is_running_while_its_folder_is_locked(
    run_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = run_folder("00_here", f"local-{os.getpid()}")
    (row,) = read_status(tmp_path / "L")
    assert row.state == "missing"
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (row,) = read_status(tmp_path / "L")
        assert row.state == "running"


def test_without_slurm_the_state_of_a_job_is_unknown(
    run_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_folder("00_away", "5", epochs=3, starts=1)
    monkeypatch.setattr(shutil, "which", lambda _name: None)
    (row,) = read_status(tmp_path / "L")
    assert (row.state, row.epoch) == ("unknown", 3)


def test_runs_are_cancelled_by_step_and_seed(
    run_folder: Callable[..., Path], commands: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index, name in enumerate(("00_a", "01_b", "02_c")):
        run_folder(name, f"3_{index}")
    answer(commands, "squeue", "3_0 RUNNING\n3_1 PENDING")
    assert run_command("ladder", ["cancel", str(tmp_path / "L"), "01_b/seed0", "02_c"]) == 0
    assert (commands / "scancel.calls").read_text() == "3_1\n"
    assert capsys.readouterr().out == f"cancelled job 3_1, which was PENDING: {tmp_path / 'L'}/01_b/seed0\n"
    with pytest.raises(ValueError, match=r"03_d was not submitted from .*; submitted: 00_a, 01_b, 02_c"):
        cancel_runs(tmp_path / "L", ["03_d"], print)


def test_logs_shows_the_last_lines_of_the_latest_job(
    run_folder: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_folder("00_a", "3_0")
    path = tmp_path / "L" / "slurm" / "3_0_0_log.err"
    assert read_log(tmp_path / "L", "00_a", 2) == f"==> {path} <==\n(no output yet)"
    path.parent.mkdir()
    path.write_text("one\ntwo\nthree\n")
    assert run_command("ladder", ["logs", "00_a", "--job_dir", str(tmp_path / "L"), "--lines", "2"]) == 0
    assert capsys.readouterr().out == f"==> {path} <==\ntwo\nthree\n"


@pytest.mark.slow
def test_a_ladder_runs_on_this_machine(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    job_dir = tmp_path / "L"
    argv = [*flags, "--executor", "local", "--gpus_per_job", "1", "--seeds", "0,1", "--only", "01,convnext_end"]
    assert run_command("ladder", [*argv, "--epochs", "1", "--max_parallel", "2"]) == 0
    out = capsys.readouterr().out
    assert out.count("\nstarted ") == 4
    rows = read_status(job_dir)
    assert [(row.name, row.seed, row.state, row.epoch) for row in rows] == [
        ("01_stem", 0, "done", 1),
        ("01_stem", 1, "done", 1),
        ("convnext_end", 0, "done", 1),
        ("convnext_end", 1, "done", 1),
    ]
    assert (
        "nothing to submit: all 4 runs" in (run_command("ladder", [*argv, "--epochs", "1"]), capsys.readouterr().out)[1]
    )
