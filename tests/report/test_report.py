"""The report, from small run folders written by hand: averages, comparison with the paper, notes, files."""

from __future__ import annotations

import csv
import errno
import fcntl
import io
import json
import logging
import os
import re
import statistics
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support import REPOSITORY
from support.ladder_runs import CONFIGS, steps_of, write_run

from ffcv_convnext.cli import run_command
from ffcv_convnext.cluster import Submission
from ffcv_convnext.cluster.requeue_policy import decide
from ffcv_convnext.cluster.submissions import write_submissions
from ffcv_convnext.config import Config
from ffcv_convnext.errors import Failure, Interrupted
from ffcv_convnext.ladder import Step, read_status
from ffcv_convnext.report import (
    Report,
    Row,
    draw_paper,
    read_ladders,
    read_runs,
    summarise,
    summary,
    to_csv,
    to_html,
    to_json,
    to_markdown,
)
from ffcv_convnext.run_folder import LOCK, FolderLock, run_state
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.runlog import log_end, setup_logging

STEPS = {step.name: step for step in steps_of()}
READ_LADDERS = cache(summary.read_ladders)
KERNEL7 = STEPS["07_kernel7"]
DIGITS = {"num_classes": 10, "images": {"train": 1501, "val": 296}}


@pytest.fixture(autouse=True)
def _configs_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading them takes half a second, and every report here uses the same ones."""
    monkeypatch.setattr(summary, "read_ladders", READ_LADDERS)


def report_on(*folders: Path) -> Report:
    return summarise(folders, CONFIGS)


def rows_of(report: Report, section: int = 0) -> dict[str, Row]:
    return {row.name: row for row in report.sections[section].rows}


def recipe(step: Step, **settings: Any) -> Step:
    return replace(step, config=step.config.replace(**settings))


@pytest.fixture(scope="module")
def ladder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished ladder of three seeds with the kernel sizes; the numbers are invented."""
    folder = tmp_path_factory.mktemp("ladder")
    short = {"epochs": 3, "warmup_epochs": 0}
    for step in steps_of() + steps_of("kernel_sizes")[:3]:
        for seed in range(3):
            write_run(folder / step.name / f"seed{seed}", recipe(step, **short), seed=seed, top1=80 + 0.1 * seed)
    return folder


# --- Other runs, such as the demo's ----------------------------------------------------------------------------


def make_run(folder: Path, *epochs: dict[str, Any], num_epochs: int = 2, done: bool = False) -> Path:
    """A run of a network that is not a step: three blocks in the first stage."""
    folder.mkdir(parents=True)
    settings = {"epochs": num_epochs, "warmup_epochs": 0, "resnet_layers": "3-1-1-1"}
    (folder / "config.yaml").write_text(Config.from_flat(settings).to_yaml())
    (folder / "run.json").write_text(json.dumps({"n_parameters": 28_589_128, "num_classes": 10, "starts": []}))
    if epochs:
        (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in epochs))
        os.utime(folder / "log.jsonl", (0, 0))
    if done:
        (folder / "done").write_text(json.dumps({"epochs": num_epochs}))
    return folder


def epoch(number: int, acc1: float, images_per_s: float | None, **more: float) -> dict[str, Any]:
    return {"epoch": number, "test_acc1": acc1, "images_per_s": images_per_s, "epoch_s": 90.0, **more}


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder with a finished run, an unfinished one, one without an epoch, and other files."""
    make_run(
        tmp_path / "b_finished",
        epoch(0, 40.0, None, test_acc1_ema=10.0),
        epoch(1, 80.125, 1234.5, test_acc1_ema=81.0),
        done=True,
    )
    make_run(tmp_path / "a_cut", epoch(0, 7.5, 99.4), num_epochs=300)
    make_run(tmp_path / "c_just_begun")
    (tmp_path / "not_a_run").mkdir()
    (tmp_path / "notes.txt").touch()
    return tmp_path


TABLE = """\
| run          |        epochs | parameters | top-1 % | averaged top-1 % | images/s | minutes |
|--------------|--------------:|-----------:|--------:|-----------------:|---------:|--------:|
| a_cut        | 1/300 stopped | 28,589,128 |    7.50 |                - |       99 |     1.5 |
| b_finished   |           2/2 | 28,589,128 |   80.12 |            81.00 |     1234 |     3.0 |
| c_just_begun |   0/2 stopped | 28,589,128 |       - |                - |        - |     0.0 |

- Networks that are not a step of the ladder (10 classes): not compared with the paper"""


def test_runs_that_are_not_a_step_have_their_own_table(runs: Path) -> None:
    assert to_markdown(report_on(runs)) == TABLE


def test_the_command_prints_the_table_and_writes_the_files_into_the_folder(
    runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("report", [str(runs), "--configs", str(CONFIGS)]) == 0
    out, err = capsys.readouterr()
    assert out == TABLE + "\n"
    assert err == f"wrote ladder.md, ladder.csv, ladder.json, ladder.png, ladder.svg to {runs}\n"
    assert (runs / "ladder.md").read_text() == TABLE + "\n"
    assert not list(runs.glob(".*")), "temporary files"


def test_run_folders_themselves_are_not_written_to(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [str(runs / "c_just_begun"), str(runs / "a_cut")]
    assert run_command("report", folders) == 0
    assert run_command("report", folders[:1]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if re.match(r"\| [ac]_", line)]
    assert [line.split()[1] for line in lines] == ["c_just_begun", "a_cut", "c_just_begun"]  # in the given order
    assert not list(runs.rglob("ladder.*"))


def test_out_names_another_folder(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "deep"
    assert run_command("report", [str(runs / "b_finished"), "--out", str(out), "--html"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        f"ladder.{suffix}" for suffix in ("csv", "html", "json", "md", "png", "svg")
    ]


def test_a_folder_that_cannot_be_written_is_still_reported(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write anywhere
    assert run_command("report", [str(runs)]) == 0
    out, err = capsys.readouterr()
    assert "b_finished" in out
    assert err == f"{runs} cannot be written, so no files were written; choose another folder with --out DIR\n"
    assert run_command("report", [str(runs), "--out", str(runs)]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{}/nowhere"], "nowhere is not a folder"),
        (["{}/not_a_run"], "is not a run folder and contains none: expected config.yaml and run.json in it"),
        (["{}/notes.txt"], "notes.txt is not a folder"),
        (["{}/b_finished", "--html"], "--html: no folder for the page; give one with --out DIR"),
        (["{}", "--out", "{}/notes.txt/x"], "cannot be created: Not a directory; choose another folder"),
        (["{}", "--configs", "{}/not_a_run"], "not_a_run holds no ladder"),
    ],
)
def test_bad_usage_is_one_line(
    arguments: list[str], message: str, runs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_command("report", [argument.format(runs) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_without_a_ladder_the_runs_are_still_listed(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)  # no rn_configs here
    assert run_command("report", [str(runs / "b_finished")]) == 0
    out = capsys.readouterr().out
    assert "80.12" in out
    assert "no ladder found" in out


def test_without_matplotlib_the_tables_are_written_and_the_error_names_the_package(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert run_command("report", [str(runs)]) == 1
    assert "the figure needs matplotlib: pip install 'ffcv-convnext[report]'" in capsys.readouterr().err
    assert sorted(path.name for path in runs.glob("ladder.*")) == ["ladder.csv", "ladder.json", "ladder.md"]


# --- Which runs there are, and their state --------------------------------------------------------------


def test_runs_are_found_at_any_depth_once_and_in_natural_order(tmp_path: Path) -> None:
    for name in ("x/seed10", "x/seed2", "flat", ".hidden/seed0"):
        make_run(tmp_path / name)
    (tmp_path / "link").symlink_to(tmp_path / "x")
    (tmp_path / "x" / "up").symlink_to(tmp_path)
    found, notes = read_runs([tmp_path, tmp_path / "flat"])
    assert [run.name for run in found] == ["flat", "link/seed2", "link/seed10"]
    assert not notes


def test_a_log_line_cut_short_is_left_out(runs: Path) -> None:
    with open(runs / "b_finished" / "log.jsonl", "a") as file:
        file.write('{"epoch": 2, "test_a')
    ((run,), _) = read_runs([runs / "b_finished"])
    assert len(run.epochs) == 2


@pytest.mark.parametrize(
    ("epochs", "error", "age_s", "expected"),
    [
        (None, None, 0, "done"),
        (None, "of an earlier start", 0, "done"),
        (120, None, 1200, "running 120/300"),  # an evaluation of 20 minutes
        (120, None, 0, "stopped 120/300"),  # killed a moment ago
        (120, "the loss is not finite", 0, "failed 120/300"),
    ],
)
def test_the_state_of_a_run_follows_from_its_folder(
    epochs: int | None, error: str | None, age_s: float, expected: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", KERNEL7, epochs=epochs, error=error, age_s=age_s)
    lock = FolderLock(run) if expected.startswith("running") else None
    report = report_on(tmp_path)
    if lock is not None:
        lock.release()
    row = rows_of(report)["07_kernel7"]
    assert row.state == expected
    assert (row.top1 is None) == (expected != "done"), "only finished runs have a result"
    failures = [f"run failed after 120 of 300 epochs: {error}"] if expected.startswith("failed") else []
    assert report.notes == failures


@pytest.mark.parametrize("alive", [True, False], ids=["evaluating for 20 minutes", "killed a moment ago"])
def test_report_and_ladder_status_agree_on_a_run(alive: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", KERNEL7, epochs=120, age_s=1200 if alive else 0)
    write_submissions(tmp_path, [submission_of(run)])
    lock = FolderLock(run)
    if not alive:
        lock.file.close()  # as the operating system does; the holder's name stays in the file
    expected = "running" if alive else "stopped"
    assert rows_of(report_on(tmp_path))["07_kernel7"].state == f"{expected} 120/300"
    assert [row.state for row in read_status(tmp_path)] == [expected]
    lock.file.close()


@pytest.mark.parametrize(("age_s", "expected"), [(60, "running"), (1200, "stopped")])
@pytest.mark.parametrize("locks", ["of another host", "not supported"])
def test_without_a_visible_lock_a_run_that_wrote_lately_is_running(
    age_s: float, expected: str, locks: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    run = write_run(tmp_path / "run", KERNEL7, epochs=120, age_s=age_s)
    if locks == "not supported":
        monkeypatch.setattr(fcntl, "flock", unsupported)
    FolderLock(run).file.close()
    if locks == "of another host":
        (run / LOCK).write_text("process 7 on node17\n")
    assert run_state(run) == expected
    FolderLock(run).release()
    assert run_state(run) == "stopped", "a run that ends clears its name"


def test_a_job_whose_end_was_noted_after_its_last_log_line_is_not_running(tmp_path: Path) -> None:
    """A node was lost: the lock is of another host, and the batch script noted the end."""
    run = write_run(tmp_path / "run", KERNEL7, epochs=120, age_s=60)
    (run / LOCK).write_text("process 7 on node17\n")
    assert run_state(run) == "running"
    decide(run, "7", 137)
    assert run_state(run) == "failed"


def test_a_lock_file_that_cannot_be_opened_leaves_the_other_signs(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", KERNEL7, epochs=120, age_s=60)
    (run / LOCK).mkdir()  # opening it raises an OSError for any user
    assert run_state(run) == "running"
    write_run(tmp_path / "old", KERNEL7, epochs=120, age_s=1200)
    (tmp_path / "old" / LOCK).mkdir()
    assert run_state(tmp_path / "old") == "stopped"


def test_a_job_that_was_killed_has_failed_until_the_next_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", KERNEL7, epochs=120)
    decide(run, "7", 137)
    ((found,), _) = read_runs([run])
    assert (found.state, found.error) == ("failed", "job 7 ended with exit status 137")
    facts = json.loads((run / "run.json").read_text())
    facts["starts"].append({**facts["starts"][0], "time": "9999-01-01T00:00:00+0000"})
    (run / "run.json").write_text(json.dumps(facts))
    assert run_state(run) == "stopped"


def submission_of(run: Path) -> Submission:
    return Submission(
        time="", job="local-1", name="x", seed=0, folder=str(run), world=1, epochs=300, code="", commit="", command=[]
    )


def test_the_log_ends_with_the_error_until_the_run_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_run(tmp_path / "run", KERNEL7, epochs=1, age_s=7200)

    def state() -> tuple[str, str | None]:
        ((run,), _) = read_runs([folder])
        return run.state, run.error

    log = logging.getLogger("ffcv_convnext")
    try:
        setup_logging(folder, Processes.from_environment("cpu"))
        log_end(RuntimeError("CUDA error:\n  misaligned address"))
        assert state() == ("failed", "RuntimeError: CUDA error: misaligned address")
        log.info("continuing from checkpoint-last.pth")
        assert state() == ("stopped", None)
        log_end(Failure("the weights are not finite"))
        assert state() == ("failed", "the weights are not finite")
        log_end(Interrupted("stopped by SIGTERM after saving"))
        assert state() == ("stopped", None)
    finally:
        for handler in list(log.handlers):
            log.removeHandler(handler)
            handler.close()
    assert "misaligned" not in capsys.readouterr().err, "the command line prints it on the console"


def test_the_error_of_a_failed_start_is_in_the_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = {"data_path": str(tmp_path / "nowhere"), "output_dir": str(tmp_path / "runs" / "x"), "device": "cpu"}
    assert run_command("train", [word for name, value in settings.items() for word in (f"--{name}", value)]) == 2
    (shown,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    write_run(tmp_path / "runs" / "y", KERNEL7, epochs=0)
    (note,) = report_on(tmp_path / "runs").notes
    assert note == f"x has no settings yet: it is starting, or failed at the start: {shown.removeprefix('error: ')}"


def test_a_folder_without_settings_and_one_that_cannot_be_read_do_not_stop_the_report(tmp_path: Path) -> None:
    write_run(tmp_path / "good", KERNEL7, epochs=1)
    (write_run(tmp_path / "broken", KERNEL7) / "run.json").write_text("{")
    (write_run(tmp_path / "foreign", KERNEL7) / "config.yaml").write_text("resnet_colour: red\n")
    early = write_run(tmp_path / "early", KERNEL7, epochs=0, error="data_path = /x does not exist")
    (early / "run.json").unlink()
    report = report_on(tmp_path)
    assert sorted(run.name for run in report.runs) == ["broken", "good"]
    assert [note.split(": ")[0] for note in report.notes] == [
        f"{tmp_path}/broken/run.json cannot be read",
        "early has no settings yet",
        "foreign cannot be read",
    ]
    assert "unknown setting 'resnet_colour'" in report.notes[2]
    assert "data_path = /x does not exist" in report.notes[1]


# --- Steps ------------------------------------------------------------------------------------------------


def test_a_run_belongs_to_the_step_with_its_network(tmp_path: Path) -> None:
    for step in (*steps_of(), *steps_of("kernel_sizes")[:3], *steps_of("resnet200")):
        write_run(tmp_path / f"called_{len(step.change)}_{step.config.model.resnet_layers}_{step.name}", step, epochs=0)
    found = [[row.name for row in section.rows if row.runs] for section in report_on(tmp_path).sections]
    main = list(STEPS)
    assert found[0] == [*main[:7], "07_kernel5", "07_kernel7", "07_kernel9", "07_kernel11", *main[8:]]
    assert found[1] == [step.name for step in steps_of("resnet200")]


def test_seeds_are_averaged_with_the_sample_deviation(tmp_path: Path) -> None:
    values = [80.41, 80.63, 80.58]
    for seed, value in enumerate(values):
        write_run(tmp_path / f"seed{seed}", KERNEL7, seed=seed, top1=value)
    row = rows_of(report_on(tmp_path))["07_kernel7"]
    assert row.top1 is not None
    assert row.top1.n == 3
    assert row.top1.mean == pytest.approx(sum(values) / 3)
    assert row.top1.std == pytest.approx(statistics.stdev(values))
    assert row.to_paper == pytest.approx(80.54 - 80.57)
    assert row.within
    assert row.gpu_hours == pytest.approx(300 * 150 * 8 / 3600)
    assert row.parameters == 25_863_496
    assert row.gmacs == 4.146


@pytest.mark.parametrize(("top1", "within"), [(80.77, True), (80.37, True), (80.78, False), (80.36, False)])
def test_within_two_tenths_of_a_point_of_the_paper(top1: float, within: bool, tmp_path: Path) -> None:
    write_run(tmp_path / "run", KERNEL7, top1=top1)
    assert rows_of(report_on(tmp_path))["07_kernel7"].within is within


def test_released_networks_are_compared_by_their_averaged_weights(tmp_path: Path) -> None:
    write_run(tmp_path / "a", STEPS["13_separate_downsampling"], top1=81.9)
    write_run(tmp_path / "b", STEPS["convnext_tiny"], top1=82.0)
    rows = rows_of(report_on(tmp_path))
    assert rows["13_separate_downsampling"].top1.mean == pytest.approx(81.9)  # type: ignore[union-attr]
    assert rows["convnext_tiny"].top1.mean == pytest.approx(82.1)  # type: ignore[union-attr]
    assert rows["convnext_tiny"].to_base == pytest.approx(0.1), "raw weights on both sides"


def test_a_released_network_without_averaged_weights_has_no_result(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", STEPS["convnext_tiny"], model_ema=False)
    entries = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in entry.items() if not key.endswith("_ema")} for entry in entries]
    (run / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in kept))
    report = report_on(tmp_path)
    assert rows_of(report)["convnext_tiny"].top1 is None
    assert report.notes == ["convnext_tiny: a finished run has no test_acc1_ema, so it does not count"]


def test_the_difference_is_to_the_step_that_a_step_changes(tmp_path: Path) -> None:
    for name, top1 in (("06_depthwise_first", 79.9), ("07_kernel7", 80.5), ("08_gelu", 80.7), ("10_fewer_norms", 81)):
        write_run(tmp_path / name, STEPS[name], top1=top1)
    for step in steps_of("kernel_sizes")[:3]:
        write_run(tmp_path / step.name, step, top1=80.3)
    gains = {name: row.to_base for name, row in rows_of(report_on(tmp_path)).items() if row.runs}
    assert gains == {
        "06_depthwise_first": None,  # 05 is missing
        "07_kernel5": pytest.approx(0.4),
        "07_kernel7": pytest.approx(0.6),
        "07_kernel9": pytest.approx(0.4),
        "07_kernel11": pytest.approx(0.4),
        "08_gelu": pytest.approx(0.2),
        "10_fewer_norms": None,  # not bridged over 09
    }


def test_a_seed_that_was_run_twice_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path / "a", KERNEL7, top1=80.5, epochs=200)
    write_run(tmp_path / "b", KERNEL7, top1=80.6)
    write_run(tmp_path / "c", KERNEL7, top1=80.9)
    report = report_on(tmp_path)
    row = rows_of(report)["07_kernel7"]
    assert row.top1.mean == pytest.approx(80.6)  # type: ignore[union-attr]
    assert row.top1.n == 1  # type: ignore[union-attr]
    assert report.notes == [
        "07_kernel7: seed 0 was run twice; b counts, c (done) does not",
        "07_kernel7: seed 0 was run twice; b counts, a (stopped 200/300) does not",
    ]


def test_another_recipe_has_its_own_section_without_the_paper(tmp_path: Path) -> None:
    write_run(tmp_path / "long", KERNEL7, top1=80.6)
    write_run(tmp_path / "100", recipe(KERNEL7, epochs=100, warmup_epochs=7), seed=1, top1=78.0)
    write_run(tmp_path / "dropped", recipe(KERNEL7, drop_path=0.2), seed=2, top1=80.0)
    report = report_on(tmp_path)
    assert [(section.title, section.why_not) for section in report.sections] == [
        ("00_resnet50 to convnext_tiny", ""),
        ("00_resnet50 to convnext_tiny with --drop_path 0.2", "the recipe is different"),
        ("00_resnet50 to convnext_tiny with --epochs 100 --warmup_epochs 7", "the recipe is different"),
    ]
    assert [len(section.rows) for section in report.sections] == [15, 1, 1], "one section shows what is missing"
    assert rows_of(report)["07_kernel7"].top1.mean == pytest.approx(80.6)  # type: ignore[union-attr]
    assert rows_of(report, 2)["07_kernel7"].to_paper is None


def test_runs_that_differ_beside_the_recipe_are_averaged_with_a_note(tmp_path: Path) -> None:
    write_run(tmp_path / "a", KERNEL7, seed=0)
    write_run(tmp_path / "b", KERNEL7, seed=1, batch_size=64, amp="fp16", model_ema=False)
    report = report_on(tmp_path)
    assert rows_of(report)["07_kernel7"].top1.n == 2  # type: ignore[union-attr]
    assert report.notes == [
        "07_kernel7: its runs differ in batch_size (128, 64)",
        "07_kernel7: its runs differ in amp (bf16, fp16)",
        "07_kernel7: its runs differ in model_ema (false, true)",
    ]


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (DIGITS, "the data is not ImageNet-1k"),
        ({"num_classes": 1000, "images": {"train": 128_000, "val": 50_000}}, "the data is not ImageNet-1k"),
        ({"num_classes": 100}, "the data is not ImageNet-1k"),
        ({"images": {}}, "the data is not ImageNet-1k"),
        ({"global_batch": 128}, "the global batch is 128, not 4096"),
        ({"images": {"train": 1_281_150, "val": 50_000}}, ""),  # a few bad ones left out
    ],
)
def test_only_runs_on_imagenet_1k_are_compared_with_the_paper(
    facts: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", KERNEL7, top1=80.5, facts=facts)
    report = report_on(tmp_path)
    text = to_markdown(report)
    assert report.sections[0].why_not == reason
    assert (rows_of(report)["07_kernel7"].to_paper is None) == bool(reason)
    assert (f"Not compared with the paper: {reason}" in text) == bool(reason)
    assert ("80.57" in text) == (not reason), "no value of the paper next to runs that cannot be compared with it"


def test_sizes_are_those_of_the_networks_that_ran(tmp_path: Path) -> None:
    write_run(tmp_path / "run", recipe(STEPS["00_resnet50"], input_size=64), facts=DIGITS, epochs=0)
    rows = rows_of(report_on(tmp_path))
    assert rows["00_resnet50"].parameters == 25_557_032 - 990 * 2049
    assert rows["00_resnet50"].gmacs < 0.4
    assert rows["01_stage_ratio"].state == "missing"
    assert rows["01_stage_ratio"].parameters == 28_628_520 - 990 * 2049


def test_runs_on_other_data_are_not_averaged_together(tmp_path: Path) -> None:
    write_run(tmp_path / "a", KERNEL7, seed=0)
    write_run(tmp_path / "b", KERNEL7, seed=1, facts={"data": {"train": "ffffffff00", "val": "0"}})
    sections = report_on(tmp_path).sections
    assert [len(section.runs) for section in sections] == [1, 1]
    assert {section.title.partition(" on ")[2] for section in sections} == {
        "data 89f3d8e4, global batch 4096",
        "data ffffffff, global batch 4096",
    }


def test_gpu_hours_follow_the_gpus_of_each_start(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe(KERNEL7, epochs=4, warmup_epochs=0))
    facts = json.loads((run / "run.json").read_text())
    gpu = {"device_type": "cuda", "device": "H200"}
    facts["starts"] = [
        {"processes": 8, "from_step": 0, **gpu},
        {"processes": 4, "from_step": 700, **gpu},  # inside the third epoch of 312 steps
    ]
    (run / "run.json").write_text(json.dumps(facts))
    ((found,), _) = read_runs([run])
    assert found.gpu_hours == pytest.approx((8 + 8 + 4 + 4) * 150 / 3600)
    assert found.devices == "4 x H200"
    facts["starts"] = [{"processes": 1, "from_step": 0, "device_type": "cpu", "device": "EPYC CPU"}]
    (run / "run.json").write_text(json.dumps(facts))
    ((found,), _) = read_runs([run])
    assert found.gpu_hours is None


def test_missing_and_non_finite_numbers_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", recipe(KERNEL7, epochs=2, warmup_epochs=0), facts=DIGITS)
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    lines[0] |= {"images_per_s": None, "test_loss": float("nan"), "test_acc1": float("nan")}
    lines[1] |= {"test_loss": float("inf"), "epoch_s": None, "test_acc1_ema": None}
    (run / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    report = report_on(tmp_path)
    for content in (to_json(report), to_csv(report), to_markdown(report), to_html(report)):
        assert not re.search(r"\b(nan|NaN|Infinity|inf)\b", content.partition("<script")[0])
    json.loads(to_json(report), parse_constant=pytest.fail)
    curves = re.search(r'id="curves">(.*?)</script>', to_html(report))
    (curve,) = json.loads(curves[1], parse_constant=pytest.fail)  # type: ignore[index]
    assert curve["series"]["test_acc1"] == [None, 80.0]
    assert "test_loss" not in curve["series"]


# --- Files ------------------------------------------------------------------------------------------------

NASTY = "a|b<i>`c`*d*,\"e';$x_1$ </script>&_f_ =1+1\x1b[31m\n"


def test_names_that_hold_special_characters_break_nothing(tmp_path: Path) -> None:
    name = NASTY.replace("/", "\N{DIVISION SLASH}").replace("</", "<")
    make_run(tmp_path / name, epoch(0, 50.0, 10.0), epoch(1, 60.0, 10.0), done=True)
    write_run(tmp_path / "run", KERNEL7, epochs=1, error="<b>|bad|</b> </script>")
    report = report_on(tmp_path)
    assert [run.name for run in report.others] == [name]

    lines = [line for line in to_markdown(report).splitlines() if line.startswith("|")]
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in lines[-3:]}
    assert widths == {8}, "a bar in a name is escaped"
    assert "\x1b" not in to_markdown(report)
    assert not re.search(r"(?<!\\)<[ib]>", to_markdown(report))

    *_, record = csv.DictReader(io.StringIO(to_csv(report)))
    assert record["name"] == name
    assert json.loads(to_json(report))["others"][0]["name"] == name

    page = to_html(report)
    assert page.count("<script") == page.count("</script>") == 2
    assert "<i>" not in page
    assert "&lt;b&gt;|bad|&lt;/b&gt; &lt;/script&gt;" in page


def test_curves_of_two_ladders_and_two_recipes_have_different_names(tmp_path: Path) -> None:
    short = {"epochs": 2, "warmup_epochs": 0}
    for name, step in (("a", KERNEL7), ("b", {step.name: step for step in steps_of("resnet200")}["07_kernel7"])):
        write_run(tmp_path / name, recipe(step, **short))
        write_run(tmp_path / f"{name} dropped", recipe(step, drop_path=0.3, **short))
    curves = re.search(r'id="curves">(.*?)</script>', to_html(report_on(tmp_path)))
    groups = [curve["group"] for curve in json.loads(curves[1])]  # type: ignore[index]
    assert len(set(groups)) == 4
    assert "resnet200/07_kernel7 with --drop_path 0.3 --epochs 2 --warmup_epochs 0" in groups


def test_every_table_has_the_same_numbers(ladder: Path) -> None:
    report = report_on(ladder)
    records = list(csv.DictReader(io.StringIO(to_csv(report))))
    rows = json.loads(to_json(report))["sections"][0]["rows"]
    assert len(records) == len(rows) == 18
    for record, row in zip(records, rows, strict=True):
        assert record["name"] == row["name"]
        assert float(record["top1"]) == row["top1"] == pytest.approx(80.1, abs=0.11)
        assert float(record["top1_std"]) == row["top1_std"] == 0.1
        assert f"{row['top1']:.2f} +- 0.10" in to_markdown(report)
        assert [run["seed"] for run in row["runs"]] == [0, 1, 2]
    page = to_html(report)
    assert page.count("80.10 \N{PLUS-MINUS SIGN} 0.10") == 2 * 17, "in the table and in the figure"


def test_the_figure_shows_every_step_as_svg_and_png(ladder: Path, tmp_path: Path) -> None:
    assert run_command("report", [str(ladder), "--out", str(tmp_path), "--configs", str(CONFIGS)]) == 0
    svg = (tmp_path / "ladder.svg").read_text()
    texts = texts_of(svg)
    for step in read_ladders(CONFIGS)[0].steps:
        assert step.paper.label in texts
        assert step.step.base is None or step.step.change in texts or step.is_released
    assert texts.count("80.10 \N{PLUS-MINUS SIGN} 0.10") == 17
    picture = np.asarray(Image.open(tmp_path / "ladder.png").convert("RGB"))
    for colour in ((0x56, 0xB4, 0xE9), (0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)):  # steps, start, end
        assert (picture == colour).all(-1).sum() > 5000
    first = (tmp_path / "ladder.svg").read_bytes()
    assert run_command("report", [str(ladder), "--out", str(tmp_path), "--configs", str(CONFIGS)]) == 0
    assert (tmp_path / "ladder.svg").read_bytes() == first, "equal runs give equal bytes"


def texts_of(svg: str) -> list[str]:
    elements = ElementTree.fromstring(svg).iter()
    return ["".join(element.itertext()).strip() for element in elements if "}text" in element.tag]


def test_the_committed_picture_of_the_paper_is_up_to_date() -> None:
    drawn, committed = draw_paper(READ_LADDERS(CONFIGS)[0], None, "svg"), REPOSITORY / "docs" / "ladder.svg"
    how = "draw it again: ffcv-convnext ladder figure --out docs/ladder.svg"
    assert texts_of(committed.read_text()) == texts_of(drawn.decode()), how
    pinned = re.search(r"^matplotlib==(\S+)", (REPOSITORY / "requirements.txt").read_text(), re.MULTILINE)
    if version("matplotlib") == pinned[1]:  # type: ignore[index]
        assert committed.read_bytes() == drawn, how


def test_the_papers_ladder_shows_measured_runs_and_carries_its_own_background(ladder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", KERNEL7, top1=80.5)
    pictures = {}
    for name, runs in (("alone", []), ("measured", [tmp_path]), ("other recipe", [ladder])):
        argv = ["figure", "--configs", str(CONFIGS), "--out", str(tmp_path / "x.svg")]
        assert run_command("ladder", [*argv, *(["--runs", *map(str, runs)] if runs else [])]) == 0
        pictures[name] = (tmp_path / "x.svg").read_text()
    assert pictures["other recipe"] == pictures["alone"], "only runs that can be compared are drawn"
    assert any("measured" in text for text in texts_of(pictures["measured"]))
    assert not any("measured" in text for text in texts_of(pictures["alone"]))
    assert "prefers-color-scheme:dark" in pictures["alone"]
    assert texts_of(pictures["alone"]).count("no value in the paper") == 1
    assert run_command("ladder", ["figure", "--out", str(tmp_path / "x.pdf")]) == 2
    demo = str(CONFIGS / "demo_ladder")
    assert run_command("ladder", ["figure", "--out", str(tmp_path / "x.svg"), "--configs", demo]) == 2


def test_labels_of_the_figure_do_not_overlap(ladder: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "cut", KERNEL7, epochs=3)
    from ffcv_convnext.report import figure

    report = report_on(ladder, tmp_path)
    panels = [[figure._bar(section, row) for row in section.rows] for section in report.sections]
    with figure._figure([len(bars) for bars in panels]) as (drawn, axes):
        for bars, (accuracy, cost) in zip(panels, axes, strict=True):
            figure._draw_panel(accuracy, cost, figure.Panel("title", bars))
        drawn.draw_without_rendering()
        for accuracy, cost in axes:
            texts = [text for ax in (accuracy, cost) for text in (*ax.texts, *ax.get_yticklabels(), ax.xaxis.label)]
            boxes = [text.get_window_extent() for text in texts if text.get_text()]
            for i, box in enumerate(boxes):
                assert not any(box.overlaps(other) for other in boxes[:i])
                assert box.x0 >= 0
                assert box.x1 <= drawn.bbox.x1


def test_runs_are_read_without_loading_torch_or_matplotlib(tmp_path: Path) -> None:
    make_run(tmp_path / "run", epoch(0, 50.0, 10.0))
    program = (
        "import sys; from pathlib import Path; from ffcv_convnext.report import summarise, to_markdown\n"
        f"print(to_markdown(summarise([Path({str(tmp_path)!r})], Path({str(CONFIGS)!r}))))\n"
        "assert not {'torch', 'timm', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
