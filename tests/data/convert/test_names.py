from __future__ import annotations

import hashlib
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from ffcv_convnext.data.beton import encode_file_list, write_file_list
from ffcv_convnext.data.convert import names as names_module
from ffcv_convnext.data.convert.names import Names

EXAMPLES = ["a/1.jpg", "", "über/\u00e9.png", "n01440764/n01440764_10026.JPEG", "broken\udcff.jpg", "a/1.jpg"]


@pytest.fixture(params=[1, 4, 1 << 15])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(names_module, "_BLOCK", request.param)
    return int(request.param)


def test_names_come_back_as_they_were(block: int) -> None:  # noqa: ARG001
    packed = Names.of(iter(EXAMPLES))
    assert list(packed) == EXAMPLES
    assert [packed[index] for index in range(len(packed))] == EXAMPLES
    assert packed[-2] == EXAMPLES[-2]
    with pytest.raises(IndexError):
        packed[-len(EXAMPLES) - 1]
    with pytest.raises(IndexError):
        packed[len(EXAMPLES)]
    assert list(pickle.loads(pickle.dumps(packed))) == EXAMPLES


@pytest.mark.parametrize("chosen", [[], [1], [5, 0, 0, 3], list(range(6))[::-1], [1, 1, 4, 2, 1]])
def test_a_selection_has_these_names_in_this_order(block: int, chosen: list[int]) -> None:  # noqa: ARG001
    expected = [EXAMPLES[index] for index in chosen]
    assert list(Names.of(EXAMPLES).select(chosen)) == expected
    assert list(Names.of(EXAMPLES).select(np.array(chosen, np.int64)).select(range(len(chosen)))) == expected


def test_a_name_takes_its_bytes_and_eight() -> None:
    packed = Names.of(f"n01440764/n01440764_{index:05}.JPEG" for index in range(10_000))
    assert len(packed.packed) + packed.ends.nbytes == 10_000 * (30 + 8)


def test_the_lines_of_a_list_of_files_are_names(tmp_path: Path) -> None:
    digest = write_file_list(tmp_path / "list", encode_file_list(EXAMPLES))
    content = (tmp_path / "list").read_bytes()
    assert content == b"".join(os.fsencode(name) + b"\n" for name in EXAMPLES)
    assert digest == hashlib.sha256(content).hexdigest()
    assert list(Names.of_lines(content)) == EXAMPLES
    assert list(Names.of_lines(b"")) == []
