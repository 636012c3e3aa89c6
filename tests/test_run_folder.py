"""Reading a run folder whose files are damaged or were changed by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ffcv_convnext.config import Config
from ffcv_convnext.files import append_lines, write_object
from ffcv_convnext.run_folder import (
    LOCK,
    FolderLock,
    check_same_config,
    finite,
    is_running,
    known,
    read_attempts,
    read_config,
    read_epochs,
    read_error,
    read_facts,
    read_scores,
    record_attempt,
    run_state,
    write_config,
)

CONFIG = Config.from_flat({"epochs": 5, "warmup_epochs": 0})


def lost(folder: Path) -> list[str]:
    """The warnings about log.jsonl."""
    warnings: list[str] = []
    read_epochs(folder, warnings.append)
    return warnings


def test_epochs_that_are_missing_are_named(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    append_lines(log, ({"epoch": epoch} for epoch in (2, 3, 6)))
    assert lost(tmp_path) == [f"{log} lacks epochs 4, 5: lines were lost"]
    write_object(tmp_path / "run.json", {"starts": [{"from_step": 85}], "steps_per_epoch": 10, "first_step": 20})
    assert lost(tmp_path) == [f"{log} lacks epochs 4, 5, 7: lines were lost"], "the last start continued from epoch 8"
    write_object(tmp_path / "done", {"epochs": 10})
    assert lost(tmp_path) == [f"{log} lacks epochs 4, 5, 7, 8, 9: lines were lost"]
    log.write_bytes(b"")
    assert lost(tmp_path) == [f"{log} lacks epochs 2, 3, 4, 5, 6, 7, 8, 9: lines were lost"]
    log.write_bytes(b"?\n")
    assert lost(tmp_path) == [f"{log}: line 1 cannot be read (not JSON); left out"], "one warning"


def test_an_unfinished_log_of_a_run_without_facts_is_no_warning(tmp_path: Path) -> None:
    assert lost(tmp_path) == []
    append_lines(tmp_path / "log.jsonl", ({"epoch": epoch} for epoch in range(3, 5)))
    assert lost(tmp_path) == []


@pytest.mark.parametrize(
    "text", ["", "{}", '{"starts": 3}', '{"starts": [{"processes": "two"}]}', "[", '{"starts": [3]}']
)
def test_a_damaged_run_json_is_a_warning_and_no_facts(text: str, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(text)
    warnings: list[str] = []
    assert read_facts(tmp_path, warnings.append) == {}
    assert len(warnings) == 1
    assert warnings[0].startswith(f"{tmp_path}/run.json cannot be read: ")


@pytest.mark.parametrize("text", ["", "{}", "null", '{"epochs": "all"}'])
def test_a_damaged_done_leaves_the_run_unfinished(text: str, tmp_path: Path) -> None:
    (tmp_path / "done").write_text(text)
    warnings: list[str] = []
    assert read_scores(tmp_path, warnings.append) is None
    assert run_state(tmp_path, warnings.append) == "stopped"
    assert "its command, repeated, writes the file again" in warnings[0]


def test_config_yaml_has_a_checksum_and_a_change_is_an_error(tmp_path: Path) -> None:
    write_config(tmp_path, CONFIG)
    assert read_config(tmp_path) == CONFIG
    path = tmp_path / "config.yaml"
    whole = path.read_text()
    path.write_text(whole.replace("epochs: 5", "epochs: 7"))
    with pytest.raises(ValueError, match=r"config\.yaml was changed after the run wrote it: .*remove the file's first"):
        read_config(tmp_path)
    check_same_config(tmp_path, CONFIG)  # the checkpoint's settings decide
    write_config(tmp_path, CONFIG)
    assert path.read_text() == whole
    assert "epochs: 7" in (tmp_path / "config.yaml.damaged").read_text()
    path.write_text("".join(whole.splitlines(keepends=True)[1:]).replace("epochs: 5", "epochs: 7"))
    with pytest.raises(ValueError, match=r"holds a run with other settings \(epochs: 5 != 7\)"):
        check_same_config(tmp_path, CONFIG)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"a: [", b"lr: 2026-99-99", b"[" * 5000, b"lr: {a: 1}"])
def test_a_damaged_config_yaml_is_an_error_for_readers_and_a_warning_for_the_run(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.yaml"):
        read_config(tmp_path)
    check_same_config(tmp_path, CONFIG)
    assert "keeps it as config.yaml.damaged" in caplog.text
    write_config(tmp_path, CONFIG)
    assert (tmp_path / "config.yaml.damaged").read_bytes() == content


def test_a_lock_that_is_not_text_does_not_stop_anyone(tmp_path: Path) -> None:
    (tmp_path / LOCK).write_bytes(b"process \xff on \xfe")
    assert not is_running(tmp_path)
    FolderLock(tmp_path).release()


def test_an_absurd_number_of_processes_does_not_matter(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"starts": [{"processes": 1 << 60}]}))
    line = "2026-11-20 11:00:00,456 ERROR ffcv_convnext.training.runlog: "
    for rank, reason in ((2, "second"), (10, "third")):
        (tmp_path / f"rank{rank}.log").write_text(f"{line}{reason}\n")
    (tmp_path / "rankle.log").write_text(f"{line}no process\n")
    assert read_error(tmp_path) == "second"


def test_the_last_usable_attempt_tells_the_exit_status(tmp_path: Path) -> None:
    record_attempt(tmp_path, {"time": "2026", "job": "7", "status": 9, "checkpoint_saved": None})
    with open(tmp_path / "attempts.jsonl", "a") as file:
        file.write('{"time": "2026", "job": 8, "st')
    assert read_error(tmp_path, lambda _: None) == "job 7 ended with exit status 9"
    assert len(read_attempts(tmp_path, lambda _: None)) == 1


def test_numbers_that_were_not_measured_are_left_out() -> None:
    values = [1, 0.0, None, float("nan"), float("inf"), "2"]
    assert [finite(value) for value in values] == [1.0, 0.0, None, None, None, None]
    assert known([{"rate": value} for value in values] + [{}], "rate") == [1.0, 0.0]
