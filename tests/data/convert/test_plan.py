"""The plan of a conversion: its identity is that of earlier versions, and it holds no object for an image."""

from __future__ import annotations

import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from ffcv_convnext.data.convert import ConversionOptions, ImageFolder
from ffcv_convnext.data.convert import plan as plan_module
from ffcv_convnext.data.convert.names import Names
from ffcv_convnext.data.convert.plan import _digest, make_plans

NUM = 300_000


def made_up_source(number: int) -> ImageFolder:
    names = Names.of(f"n{index % 7:08d}/n{index % 7:08d}_{index:08d}.JPEG" for index in range(number))
    classes = tuple(f"n{label:08d}" for label in range(7))
    return ImageFolder(Path("/nowhere"), classes, names, (np.arange(number) % 7).astype(np.int32))


@pytest.mark.parametrize("block", [1, 3, 5, 1 << 14])
def test_the_digest_of_a_stream_is_that_of_a_list(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan_module, "_BLOCK", block)
    names = ["a/1.jpg", "\u00fc.png", "broken\udcff.jpg", 'quote".jpg', "e"]
    for some in ([], names):
        expected = hashlib.sha256(json.dumps(["train", ("b", "c"), some, [1, 2], None]).encode()).hexdigest()
        assert _digest(["train", ("b", "c"), iter(some), iter([1, 2]), None]) == expected


def test_a_plan_names_the_images_in_the_stored_order(tmp_path: Path) -> None:
    options = ConversionOptions(
        data_path=tmp_path, out_dir=tmp_path, split="train", num_workers=1, subset=50, shard=(1, 3),
        compress_probability=0.5,
    )  # fmt: skip
    source = made_up_source(90)
    [plan] = make_plans({"train": source}, options, lambda _: None)
    assert len(plan) == len(plan.order) == len(plan.compress) == 17
    task = plan.task(slice(3, 6))
    assert [task.images.name(index) for index in range(3)] == [plan.name(index) for index in (3, 4, 5)]
    assert [task.images.label(index) for index in range(3)] == [plan.label(index) for index in (3, 4, 5)]
    assert task.compress == plan.compress[3:6].tolist()
    assert len({plan.name(index) for index in range(17)}) == 17
    assert 0 < plan.compress.sum() < 17


def test_a_task_is_small_for_any_number_of_classes(tmp_path: Path) -> None:
    source = made_up_source(1000)
    many = ImageFolder(source.location, tuple(f"n{label:08d}" for label in range(21_841)), source.files, source.labels)
    options = ConversionOptions(data_path=tmp_path, out_dir=tmp_path, split="train", num_workers=1)
    [plan] = make_plans({"train": many}, options, lambda _: None)
    assert len(pickle.dumps(plan.task(slice(0, 32)))) < 32 * 100
    assert plan.source.classes == many.classes


def test_a_plan_takes_a_hundred_bytes_an_image_at_most(tmp_path: Path) -> None:
    options = ConversionOptions(data_path=tmp_path, out_dir=tmp_path, split="train", num_workers=1)
    source = made_up_source(NUM)
    make_plans({"train": made_up_source(100)}, options, lambda _: None)
    tracemalloc.start()
    try:
        [plan] = make_plans({"train": source}, options, lambda _: None)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(plan) == NUM
    assert held < 15 * NUM, "an index and a choice"
    assert peak < 100 * NUM
