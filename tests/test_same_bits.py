"""The same input gives the same bits for any number of workers, any cache, any read-ahead, in shards or at once.

`scripts/golden.py compare REVISION` makes the same checks between two versions of the source.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from support.imagefolder import make_image_folder
from support.runs import assert_equal, log_without_timings, train_here

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.convert import ConversionOptions, convert, join_shards
from ffcv_convnext.data.load import EvalLoader, TrainLoader
from ffcv_convnext.training.checkpoint import LAST, read_checkpoint

CPU = torch.device("cpu")
FILES = ("train.beton", "train.json", "train.files.txt", "val.beton", "val.json", "val.files.txt")
CONVERSIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "small, 4:4:4": {"max_resolution": 48, "jpeg_quality": 75, "subsampling": "444"},
    "originals": {"jpeg_quality": "original", "max_resolution": None},
    "some raw": {"compress_probability": 0.5, "seed": 7},
    "raw, in order": {"compress_probability": 0.0, "shuffle_indices": False},
    "subset": {"subset": 12, "seed": 3},
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_image_folder(tmp_path_factory.mktemp("images"), num_classes=3, train_per_class=12, val_per_class=4)


@pytest.mark.parametrize("name", CONVERSIONS)
def test_a_conversion_has_the_same_bytes_for_any_number_of_workers_and_shards(
    name: str, images: Path, tmp_path: Path
) -> None:
    def options(out: str, **changes: Any) -> ConversionOptions:
        return ConversionOptions(data_path=images, out_dir=tmp_path / out, **{**CONVERSIONS[name], **changes})

    convert(options("one", num_workers=1))
    convert(options("three", num_workers=3))
    for shard in range(2):
        convert(options("shards", num_workers=1, shard=(shard, 2)))
    for split in ("train", "val"):
        join_shards(tmp_path / "shards", split, overwrite=False, say=lambda _: None)
    for file in FILES:
        expected = (tmp_path / "one" / file).read_bytes()
        assert (tmp_path / "three" / file).read_bytes() == expected, file
        assert (tmp_path / "shards" / file).read_bytes() == expected, file


@pytest.fixture(scope="module")
def several_pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 large raw images: two pages of train, so that a window of quasi_random is less than the file."""
    root = tmp_path_factory.mktemp("pages")
    sizes: dict[str, Any] = {"width": (500, 500), "height": (480, 500)}
    make_image_folder(root / "images", num_classes=3, train_per_class=10, val_per_class=1, **sizes)
    convert(
        ConversionOptions(data_path=root / "images", out_dir=root / "beton", compress_probability=0.0, num_workers=2)
    )
    return root / "beton"


def batches(folder: Path, **changes: Any) -> Iterator[torch.Tensor]:
    settings: dict[str, Any] = {"batch_size": 3, "update_freq": 2, "input_size": 48, "num_workers": 2}
    config = DataConfig(data_path=folder, shuffle_window_mb=9, **{**settings, **changes})
    with closing(TrainLoader(config, CPU, seed=5)) as train, closing(EvalLoader(config, CPU)) as val:
        for step in train.steps(epoch=1, first_step=1):
            for batch in step:
                yield from (part.clone() for part in batch)
        for batch in val:
            yield from (part.clone() for part in batch)


@pytest.mark.parametrize(
    ("order", "copies", "interpolation"),
    [*product(("random", "quasi_random"), (1, 3), ("bicubic", "random")), ("random", 1, "bilinear")],
)
def test_batches_have_the_same_bits_for_any_cache_and_any_number_of_workers(
    order: str, copies: int, interpolation: str, several_pages: Path
) -> None:
    choice = {"order": order, "repeated_aug": copies, "train_interpolation": interpolation}
    expected = list(batches(several_pages, **choice, data_cache="os"))
    for changes in ({"data_cache": "process", "num_workers": 1}, {"data_cache": "ram", "batches_ahead": 1}):
        found = list(batches(several_pages, **choice, **changes))
        assert len(found) == len(expected)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True)), changes


def test_the_batches_of_different_choices_differ(several_pages: Path) -> None:
    """Otherwise the test above would compare what cannot differ."""
    choices = product(("random", "quasi_random"), (1, 3), ("bicubic", "bilinear"))
    first = {
        next(batches(several_pages, order=order, repeated_aug=copies, train_interpolation=kind)).numpy().tobytes()
        for order, copies, kind in choices
    }
    assert len(first) == 8


def test_twenty_steps_have_the_same_bits_for_any_loader(small_settings: dict[str, Any], tmp_path: Path) -> None:
    """Losses and the checkpoint: RandAugment, mixing, erasing and stochastic depth are on."""
    settings = {**small_settings, "aa": "rand-m9-mstd0.5-inc1"}
    train_here(settings, output_dir=tmp_path / "one", num_workers=1, batches_ahead=1)
    train_here(settings, output_dir=tmp_path / "other", num_workers=3, data_cache="process", log_every=7)
    ours, theirs = (read_checkpoint(tmp_path / name / LAST) for name in ("one", "other"))
    assert theirs["step"] == 20
    for part in ("model", "ema", "optimizer", "epoch_loss"):
        assert_equal(ours[part], theirs[part], where=part)
    ours, theirs = (log_without_timings(tmp_path / name) for name in ("one", "other"))
    assert ours == theirs
