"""Damaged tables, manifests and lists: every command ends with a result or one clean error, never with a traceback."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from support.hostile import FILES, TABLES, damage
from support.imagefolder import draw_image, make_image_folder
from support.samples import write_again

pytest.importorskip("ffcv.reader")

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import Config
from ffcv_convnext.data.beton import EncodedImage, Manifest
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.data.convert.encode import Encoding, encode
from ffcv_convnext.data.load import TrainLoader
from ffcv_convnext.errors import exit_status
from ffcv_convnext.training.preflight import check_config

SEED, NUM = 1, 420
GOOD, CLEAN = (0,), (1, 2)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training images in pages of 16 KiB, which is quick to copy and to hash, and a good val.beton."""
    root = tmp_path_factory.mktemp("good")
    make_image_folder(root / "images", num_classes=4, train_per_class=6, val_per_class=2)
    convert(ConversionOptions(data_path=root / "images", out_dir=root / "beton", num_workers=1))
    encoding = Encoding(max_resolution=None, jpeg_quality=90, max_bytes=1 << 14)
    samples: list[tuple[EncodedImage, int]] = [
        (encode(draw_image(i % 4, i, (50 + i, 70 - i)), encoding), i % 4) for i in range(24)
    ]
    beton = root / "beton" / "train.beton"
    manifest = Manifest.for_beton(beton)
    beton.unlink()
    write_again(beton, manifest, samples, encoding.max_bytes)
    assert len(Manifest.check(beton).page_crc32) > 1
    return root / "beton"


def damaged(good: Path, folder: Path, number: int) -> str:
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(good, folder)
    return str(damage(folder / "train.beton", SEED, number))


def load(folder: Path) -> int:
    """What a run does with the file: the check before submission, the loader, an epoch."""
    settings = {"data_path": folder, "batch_size": 8, "input_size": 32, "num_workers": 2, "device": "cpu"}
    config = Config.from_flat({**settings, "recipe_batch": 8, "epochs": 1, "warmup_epochs": 0})
    check_config(config, world=1)
    with closing(TrainLoader(config.data, torch.device("cpu"), seed=0)) as loader:
        for step in loader.steps(0):
            for images, labels in step:
                assert len(images) == len(labels) == 8
    return 0


def assert_clean(status: int, stderr: str, what: str) -> None:
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert status in GOOD + CLEAN, what
    assert len(errors) == (status != 0), f"{what}: {stderr}"


@pytest.mark.usefixtures("one_thread")
def test_no_damaged_table_or_manifest_reaches_the_user_as_a_traceback(
    good: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(lambda: load(good)) == 0
    seen: Counter[tuple[str, int]] = Counter()
    for number in range(NUM):
        what = damaged(good, tmp_path / "own", number)
        capsys.readouterr()
        commands: dict[str, Callable[[], int]] = {
            "info": lambda: run_command("data", ["info", str(tmp_path / "own")]),
            "load": lambda: exit_status(lambda: load(tmp_path / "own")),
        }
        for name, command in commands.items():
            status = command()
            assert_clean(status, capsys.readouterr().err, f"{name}, {number}: {what}")
            seen[name, status] += 1
    assert seen["load", 2] > NUM / 3, "refused before the first batch"
    assert seen["load", 0], "damage that changes nothing that is read, e.g. of the list of original files"
    assert seen["info", 2]
    assert seen["info", 0]


def verify(folder: Path, *flags: str) -> int:
    return run_command("verify", [str(folder), "--num_workers", "2", *flags])


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "numbers", [range(1000, 1048), pytest.param(range(2000, 2420), marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_verify_repair_join_preview_and_doctor_end_cleanly_too(
    good: Path, tmp_path: Path, small_settings: dict[str, Any], capsys: pytest.CaptureFixture[str], numbers: range
) -> None:
    own = tmp_path / "own"
    settings = {**small_settings, "data_path": own, "epochs": 1, "warmup_epochs": 0}
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    doctor = ["--data_path", str(own), "--seconds", "0.05", "--device", "cpu", "--input_size", "32"]
    seen: Counter[tuple[str, int]] = Counter()
    for number in numbers:
        what = damaged(good, own, number)
        commands: dict[str, Callable[[], int]] = {
            "verify": lambda: verify(own),
            "repair": lambda: verify(own, "--repair"),
            "preview": lambda: run_command("data", ["preview", "--out", str(own / "p.png"), *flags]),
        }
        if number % 16 == 0:
            commands["doctor"] = lambda: run_command("doctor", doctor)
            commands["train"] = lambda: run_command("train", ["--output_dir", str(own / "run"), *flags])
        for name, command in commands.items():
            status = command()
            stderr = capsys.readouterr().err
            assert "Traceback" not in stderr
            if name in ("verify", "repair"):
                assert status in GOOD + CLEAN
            else:
                assert_clean(status, stderr, f"{name}, {number}: {what}")
            seen[name, status] += 1
        for end in ("beton", "json", "files.txt"):
            (own / f"train.{end}").rename(own / f"train.part-0-of-1.{end}")
        status = run_command("write", ["--join", "--split", "train", "--out_dir", str(own), "--overwrite"])
        assert_clean(status, capsys.readouterr().err, f"join, {number}: {what}")
    assert seen["verify", 1] > len(numbers) / 3, "damage is found"
    assert seen["preview", 2]


def test_every_part_is_damaged_in_every_way(good: Path, tmp_path: Path) -> None:
    draws = [damage(Path(shutil.copytree(good, tmp_path / str(i))) / "train.beton", SEED, i) for i in range(120)]
    assert {draw.part for draw in draws} == {*TABLES, *FILES}
    assert {draw.kind for draw in draws} == {"value", "key", "flip", "zero", "random", "truncate"}
    assert {draw.restated for draw in draws} == {True, False}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_samples": -1}, "num_samples is -1"),
        ({"num_samples": True}, "num_samples is True"),
        ({"page_crc32": ["a"]}, "page_crc32 is ('a',)"),
        ({"classes": [None]}, "classes is (None,)"),
        ({"sha256": "no whole allocation table"}, "sha256 is 'no whole allocation table'"),
        ({"jpeg_quality": "best"}, "jpeg_quality is 'best'"),
        ({"shard": [1]}, "shard is (1,)"),
        ({"left_out": {".gif": "9"}}, "left_out is "),
        ({"skipped": [{"path": 1, "reason": "x"}]}, "skipped is "),
    ],
)
def test_a_value_of_another_type_in_a_manifest_is_named(
    good: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps({**json.loads((good / "train.json").read_text()), **change}))
    with pytest.raises(ValueError, match="is not usable") as caught:
        Manifest.read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_manifest_that_states_another_number_than_the_file_has_is_refused(good: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(good, tmp_path / "own"))
    manifest = Manifest.for_beton(own / "train.beton")
    for change in ({"num_samples": 25}, {"page_bytes": 1 << 15}, {"page_crc32": manifest.page_crc32[1:]}):
        dataclasses.replace(manifest, **change).write(own / "train.json")
        with pytest.raises(ValueError, match=r"has 24 samples in \d+ pages of 16384 bytes, its manifest states"):
            Manifest.check(own / "train.beton")
