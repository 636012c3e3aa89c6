"""JSON files that are damaged: what can be used is used, and what cannot is named."""

from __future__ import annotations

import json
from pathlib import Path
from types import NoneType
from typing import Any

import pytest

from ffcv_convnext.files import (
    Damaged,
    Form,
    append_lines,
    complaint,
    damaged_copy,
    encode,
    keep_lines,
    read_lines,
    read_object,
    write_object,
)

FORM = Form({"step": int}, {"rate": (float, NoneType), "words": [str], "inner": Form({"a": str})}, unique="step")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Five lines, steps 0 to 4."""
    append_lines(tmp_path / "log.jsonl", ({"step": step, "loss": 1 / (step + 1)} for step in range(5)))
    return tmp_path / "log.jsonl"


def steps_in(path: Path) -> tuple[list[int], list[str]]:
    """Steps of the usable lines, and the warnings."""
    warnings: list[str] = []
    return [entry["step"] for entry in read_lines(path, FORM, warnings.append)], warnings


def replace_line(path: Path, number: int, text: bytes) -> None:
    lines = path.read_bytes().split(b"\n")
    lines[number - 1] = text
    path.write_bytes(b"\n".join(lines))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b'{"step": 2, "los', "not JSON"),
        (b"\x00" * 30, "not JSON"),
        (b"   ", "empty"),
        (b'{"step": 2, "name": "\xff\xfe"}', "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "'step' is missing"),
        (b"[1, 2]", "not an object"),
        (b"null", "not an object"),
        (b'{"step": "2"}', "step is '2'"),
        (b'{"step": true}', "step is True"),
        (b'{"step": 2.0}', "step is 2.0"),
        (b'{"step": NaN}', "step is nan"),
        (b'{"step": 1000000000000000000000}', "step is 1000000000000000000000"),
        (b'{"step": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"step": 2, "rate": "fast"}', "rate is 'fast'"),
        (b'{"step": 2, "words": ["a", 1]}', "words is 1"),
        (b'{"step": 2, "words": "a"}', "words is not a list"),
        (b'{"step": 2, "inner": {}}', "'a' is missing"),
        (b'{"step": 1}', "step 1 again, as in line 2"),
        (encode({"step": 2, "loss": 0.5}).strip().replace(b"0.5", b"0.7"), "its checksum does not match"),
        (encode({"step": 2}).strip().replace(b"2,", b"3,"), "its checksum does not match"),
    ],
)
def test_a_line_that_cannot_be_used_is_left_out_with_one_warning(text: bytes, reason: str, path: Path) -> None:
    replace_line(path, 3, text)
    expected = f"{path}: line 3 cannot be read ({reason}); left out"
    assert steps_in(path) == ([0, 1, 3, 4], [expected])


def test_several_damaged_lines_are_one_warning(path: Path) -> None:
    replace_line(path, 2, b"?")
    replace_line(path, 5, b"")
    replace_line(path, 4, b"{}")
    assert steps_in(path) == ([0, 2], [f"{path}: lines 2, 4 cannot be read (not JSON); left out"])


def test_each_flip_of_a_bit_in_a_line_is_found_or_harmless(path: Path) -> None:
    """Only the word crc32 may be damaged: then a line has a key that nobody reads, and the right values."""
    whole = read_lines(path)
    content = path.read_bytes()
    end = content.index(b"\n")
    for bit in range(8 * end):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(changed))
        warnings: list[str] = []
        entries = read_lines(path, FORM, warnings.append)
        if not warnings:
            assert [{"step": e["step"], "loss": e["loss"]} for e in entries] == whole, changed[:end]
            assert b"crc32" not in changed[:end] or entries == whole


@pytest.mark.parametrize("content", [{"a": 1e-300, "b": [None, "ä\n", {"c": float("nan")}]}, {}, {"n": -(2**62)}])
def test_an_object_is_read_as_it_was_written(content: dict[str, Any], tmp_path: Path) -> None:
    for indent in (None, 2):
        write_object(tmp_path / "run.json", content, indent=indent)
        assert repr(read_object(tmp_path / "run.json")) == repr(content)
    (tmp_path / "old.json").write_text(json.dumps(content))
    assert repr(read_object(tmp_path / "old.json")) == repr(content), "files of version 0.2.0 have no checksum"
    assert read_object(tmp_path / "none.json") is None


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"7", b'{"step": "x"}', encode({"step": 1})[:-4]])
def test_a_damaged_object_is_an_error_that_names_the_file(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text)
    with pytest.raises(Damaged, match=f"{tmp_path}/run.json cannot be read: "):
        read_object(tmp_path / "run.json", FORM)


def test_a_folder_in_the_place_of_a_file_is_damage(tmp_path: Path) -> None:
    with pytest.raises(Damaged, match="Is a directory"):
        read_object(tmp_path)
    warnings: list[str] = []
    assert read_lines(tmp_path, warn=warnings.append) == []
    assert warnings == [f"{tmp_path} cannot be read: Is a directory"]


def test_a_line_is_appended_behind_one_that_was_cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])
    append_lines(path, [{"step": 9}])
    assert steps_in(path)[0] == [0, 1, 2, 3, 9]
    assert "line 5" in steps_in(path)[1][0]


def test_keeping_lines_moves_the_damaged_ones_and_leaves_the_others_as_they_are(path: Path) -> None:
    before = path.read_bytes().split(b"\n")
    replace_line(path, 2, b"\xff damaged")
    warnings: list[str] = []
    kept = keep_lines(path, FORM, lambda entry: entry["step"] < 4, warnings.append)
    assert [entry["step"] for entry in kept] == [0, 2, 3]
    assert path.read_bytes().split(b"\n") == [before[0], before[2], before[3], b""]
    assert damaged_copy(path).read_bytes() == b"\xff damaged\n"
    assert warnings == [f"{path}: line 2 cannot be read (not UTF-8); moved to log.jsonl.damaged"]
    replace_line(path, 1, b"again")
    keep_lines(path, FORM, lambda _: True, warnings.append)
    assert damaged_copy(path).read_bytes() == b"\xff damaged\nagain\n", "nothing is lost the second time"


def test_a_form_names_the_first_value_that_does_not_fit() -> None:
    assert complaint({"step": 1, "rate": None, "words": [], "more": object()}, FORM) == ""
    assert complaint({"step": 1, "rate": 3}, FORM) == ""
    assert complaint([], FORM) == "it is not an object"
    assert complaint({"step": 1, "inner": []}, FORM) == "inner is not an object"
    assert complaint({"step": 10**5000}, FORM) == "step is too large"
