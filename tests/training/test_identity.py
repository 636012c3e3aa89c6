"""A checkpoint belongs to its run, and a damaged file beside it does not stop it."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nursery import Nursery
from support.runs import assert_same_run, send_at_step, train_here

from ffcv_convnext.cli import run_command
from ffcv_convnext.errors import Interrupted
from ffcv_convnext.files import read_lines, warn_once
from ffcv_convnext.run_folder import read_facts
from ffcv_convnext.training.checkpoint import LAST, PREVIOUS, read_checkpoint


@pytest.fixture(scope="module")
def settings(small_settings: dict[str, Any]) -> dict[str, Any]:
    """3 epochs of 10 steps, checkpoints at steps 5, 10, 15, ..., a log point every 4 steps."""
    return {**small_settings, "epochs": 3, "save_ckpt_steps": 5}


@pytest.fixture(scope="module")
def undisturbed(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    train_here(settings, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def stop_a_run(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes runs that were stopped after step 15: checkpoint-last at step 15, the previous one at 10."""

    def stop(**changes: Any) -> Path:
        folder = tmp_path_factory.mktemp("stopped")
        with pytest.MonkeyPatch.context() as patch:
            send_at_step(patch, 15, signal.SIGTERM)
            with pytest.raises(Interrupted):
                train_here({**settings, "output_dir": folder, **changes})
        return folder

    return stop


@pytest.fixture(scope="module")
def stopped(stop_a_run: Callable[..., Path]) -> Path:
    return stop_a_run()


@pytest.fixture(scope="module")
def twin(stop_a_run: Callable[..., Path]) -> Path:
    """Another run of the same settings."""
    return stop_a_run()


@pytest.fixture
def folder(stopped: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def files_of(folder: Path) -> dict[str, bytes]:
    """All that a refused start must leave as it is: not its own log and lock."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in ("rank0.log", ".lock")}


# --- Whose checkpoint it is ------------------------------------------------------------------------------------


def test_a_run_and_its_checkpoints_have_one_id(folder: Path, twin: Path, settings: dict[str, Any]) -> None:
    run_id = read_facts(folder)["run_id"]
    assert len(run_id) == 16
    assert {read_checkpoint(folder / name)["run"] for name in (LAST, PREVIOUS)} == {run_id}
    assert read_facts(twin)["run_id"] != run_id
    train_here(settings, output_dir=folder)
    assert read_facts(folder)["run_id"] == run_id
    assert read_checkpoint(folder / LAST)["run"] == run_id
    train_here(settings, output_dir=folder, auto_resume=False, epochs=3)
    assert read_facts(folder)["run_id"] != run_id, "a repeated run is another one"
    assert read_checkpoint(folder / LAST)["run"] == read_facts(folder)["run_id"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 1}, r"seed: 0 != 1"),
        ({"order": "quasi_random"}, r"order: random != quasi_random"),
        ({"lr": 1e-3, "drop_path": 0.1}, r"drop_path: 0\.2 != 0\.1; lr: 0\.002 != 0\.001"),
        ({}, r"run id: \w{16} != \w{16}"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_nothing_changes(
    change: dict[str, Any],
    words: str,
    stop_a_run: Callable[..., Path],
    folder: Path,
    settings: dict[str, Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copy(stop_a_run(**change) / LAST, folder / LAST)
    before = files_of(folder)
    flags = [w for name, value in {**settings, "output_dir": folder}.items() for w in (f"--{name}", str(value))]
    assert run_command("train", flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    message = rf"{folder / LAST} belongs to another run \({words}\); to continue from it on purpose, add --resume "
    assert re.search(message, line), line
    assert line.endswith(f"add --resume {folder / LAST}; else remove it, or choose another output_dir")
    assert files_of(folder) == before


def test_the_ways_out_of_a_foreign_checkpoint(
    folder: Path, twin: Path, settings: dict[str, Any], undisturbed: Path
) -> None:
    shutil.copy(twin / LAST, folder / LAST)
    own = read_facts(folder)["run_id"]
    again = Path(shutil.copytree(folder, folder.parent / "again"))
    (again / LAST).unlink()
    train_here(settings, output_dir=again)  # from its own previous one
    assert_same_run(again, undisturbed)
    assert read_facts(again)["run_id"] == own
    train_here(settings, output_dir=folder, resume=folder / LAST)
    assert_same_run(folder, undisturbed)
    assert read_facts(folder)["run_id"] == read_facts(twin)["run_id"], "the folder is now that run's"
    (folder / "done").unlink()
    train_here(settings, output_dir=folder)


def test_a_foreign_previous_checkpoint_is_refused_too(folder: Path, twin: Path, settings: dict[str, Any]) -> None:
    shutil.copy(twin / PREVIOUS, folder / PREVIOUS)
    (folder / LAST).write_bytes((folder / LAST).read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"{folder / PREVIOUS} belongs to another run \(run id: "):
        train_here(settings, output_dir=folder)


def test_a_run_folder_may_move_and_lose_its_other_files(
    stopped: Path, settings: dict[str, Any], undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    shutil.copy(stopped / LAST, folder / LAST)  # run.json and config.yaml are lost
    train_here(settings, output_dir=folder)
    assert "run.json does not name its run: the id" in caplog.text
    assert read_facts(folder)["run_id"] == read_facts(stopped)["run_id"]
    moved = folder.rename(tmp_path / "moved")
    (moved / "done").unlink()
    train_here(settings, output_dir=moved)
    assert_same_checkpoint(moved, undisturbed)


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name, tensor in read_checkpoint(theirs / LAST)["model"].items():
        assert torch.equal(read_checkpoint(ours / LAST)["model"][name], tensor), name


def test_a_checkpoint_without_an_id_continues_if_its_settings_agree(
    folder: Path, settings: dict[str, Any], undisturbed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As version 0.2.0 wrote them: no id in run.json and checkpoints, no checksums."""
    for name in (LAST, PREVIOUS):
        content = read_checkpoint(folder / name)
        del content["run"]
        torch.save(content, folder / name)
    facts = read_facts(folder)
    for key in ("run_id", "first_step"):
        del facts[key]
    (folder / "run.json").write_text(json.dumps(facts))
    for name in ("log.jsonl", "steps.jsonl"):
        entries = read_lines(folder / name)
        (folder / name).write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    config = folder / "config.yaml"
    config.write_text("".join(config.read_text().splitlines(keepends=True)[1:]))
    content["config"]["seed"] = 7
    foreign = Path(shutil.copytree(folder, folder.parent / "foreign"))
    torch.save(content, foreign / LAST)
    with pytest.raises(ValueError, match=r"belongs to another run \(seed: 0 != 7"):
        train_here(settings, output_dir=foreign)
    caplog.clear()
    train_here(settings, output_dir=folder)
    assert (
        f"{folder / LAST} has no run id, because an older version wrote it; its settings are this run's" in caplog.text
    )
    assert "warning" not in [record.levelname.lower() for record in caplog.records if "run" in record.name]
    assert_same_run(folder, undisturbed)
    assert read_checkpoint(folder / LAST)["run"] == read_facts(folder)["run_id"]


@pytest.mark.parametrize("part", ["optimizer", "step", "config", "epoch_loss"])
def test_a_file_that_is_no_state_is_one_error(part: str, folder: Path, settings: dict[str, Any]) -> None:
    content = read_checkpoint(folder / LAST)
    torch.save({**content, part: "x"}, folder / LAST)
    with pytest.raises(ValueError, match=f"{folder / LAST} is not the state of a run: {part} is"):
        train_here(settings, output_dir=folder)


@pytest.mark.slow
def test_two_processes_refuse_a_foreign_checkpoint_together(
    folder: Path, twin: Path, settings: dict[str, Any], nursery: Nursery
) -> None:
    shutil.copy(twin / LAST, folder / LAST)
    before = files_of(folder)
    ends = nursery.run_ranks({**settings, "output_dir": folder, "update_freq": 1}, strikes={})
    for status, output in ends:
        assert status == 2, output
        assert "belongs to another run (run id: " in output.splitlines()[-1]
        assert "Traceback" not in output
    after = files_of(folder)
    assert {name: after[name] for name in before} == before


# --- Damaged files beside it -----------------------------------------------------------------------------------

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: content[:0],
    "cut": lambda content: content[: len(content) * 2 // 3],
    "not UTF-8": lambda content: content[:20] + b"\xff\xfe" + content[20:],
    "{}": lambda content: b"{}\n" + content[:0],
    "bit flip": lambda content: content[:50] + bytes([content[50] ^ 1]) + content[51:],
}  # scripts/damage.py tries many more


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("run.json", "{}"),
        ("run.json", "bit flip"),
        ("log.jsonl", "empty"),
        ("log.jsonl", "bit flip"),
        ("steps.jsonl", "cut"),
        ("config.yaml", "not UTF-8"),
    ],
)
def test_a_damaged_file_is_one_warning_and_the_checkpoint_continues(
    name: str,
    how: str,
    folder: Path,
    settings: dict[str, Any],
    undisturbed: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(DAMAGE[how](whole))
    warn_once.cache_clear()
    train_here(settings, output_dir=folder)
    assert_same_checkpoint(folder, undisturbed)
    assert (folder / "done").read_text() == (undisturbed / "done").read_text()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    (about,) = [message for message in warnings if str(folder / name) in message]
    if name.endswith(".jsonl"):
        key = {"log.jsonl": "epoch", "steps.jsonl": "step"}[name]
        written = [entry[key] for entry in read_lines(folder / name)]
        assert set(written) < {entry[key] for entry in read_lines(undisturbed / name)}
        for line in whole.splitlines():
            kept = line in (folder / name).read_bytes().splitlines()
            assert kept or "lines were lost" in about or "moved to" in about
    else:
        assert (folder / f"{name}.damaged").read_bytes() == DAMAGE[how](whole)
        train_here(settings, output_dir=folder)
        assert read_facts(folder)["run_id"] == read_checkpoint(folder / LAST)["run"]


@pytest.mark.parametrize("how", ["{}", "cut"])
def test_a_damaged_done_is_written_again(
    how: str, settings: dict[str, Any], undisturbed: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))
    whole = (folder / "done").read_bytes()
    (folder / "done").write_bytes(DAMAGE[how](whole))
    train_here(settings, output_dir=folder)
    assert (folder / "done").read_bytes() == whole
    assert f"{folder / 'done'} cannot be read" in caplog.text
    assert_same_run(folder, undisturbed)
