"""Each kind of file that the project reads back, damaged in each way: scripts/damage.py."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import damage
import pytest
from support import REPOSITORY

from ffcv_convnext.files import encode

WHOLE = (0, "weights", "table", "an old line\n", "")  # exit status, what must stay, what may differ, output, failure
FILE = Path("run.json")


@pytest.mark.parametrize(
    ("after", "end"),
    [
        (WHOLE, "same result"),
        ((0, "weights", "table", "warning: run.json: line 3\n", ""), "warning"),
        ((0, "weights", "shorter table", "warning: run.json: line 3\n", ""), "warning"),
        ((0, "weights", "shorter table", "an old line\n", ""), "silent"),
        ((0, "other weights", "table", "warning: run.json: line 3\n", ""), "silent"),
        ((2, None, None, "error: run.json is damaged\n", ""), "error"),
        ((1, None, None, "", ""), "silent"),
        ((0, "weights", "table", "", "KeyError: 'starts'"), "traceback"),
    ],
)
def test_the_end_of_a_command_has_one_class(after: Any, end: str) -> None:
    assert damage.classify("train", WHOLE, after, FILE)[0] == end


@pytest.mark.parametrize("name", damage.JSON)
def test_each_mutation_changes_a_file_and_is_the_same_each_time(name: str) -> None:
    content = b"".join(encode({"epoch": epoch, "rate": 1.5, "inner": {"a": 1}}) for epoch in range(4))
    found = [damage.JSON[name](content, random.Random(seed)) for seed in range(20)]
    assert found == [damage.JSON[name](content, random.Random(seed)) for seed in range(20)]
    assert any(changed != content for changed in found)


def test_every_class_of_unseen_damage_is_in_the_docs() -> None:
    text = (REPOSITORY / "docs" / "reliability.md").read_text()
    for file, reason in damage.UNSEEN.items():
        assert file in [kind[0] for kind in damage.KINDS]
        assert f"- `{file}`: {reason}" in text
    assert damage.UNSEEN_WITHOUT_CHECKSUM in text


@pytest.mark.slow
def test_no_damaged_file_ends_in_a_traceback_or_is_used_without_a_word(tmp_path: Path) -> None:
    cases = damage.run_all(620, 0, tmp_path)
    assert [case.number for case in cases] == list(range(620))
    assert {(case.file, case.command) for case in cases} == {(kind[0], command) for kind, command in damage.PAIRS}
    wrong = [
        case for case in cases if case.end == "traceback" or (case.end == "silent" and not damage.may_be_unseen(case))
    ]
    assert not wrong, json.dumps([vars(case) for case in wrong], indent=1)
