"""Damaged pages are found when they are first used, whether or not their images can still be decoded."""

from __future__ import annotations

import dataclasses
import logging
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("ffcv.reader")

from ffcv_convnext.cli import run_command
from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.load import EvalLoader, SampleError, TrainLoader, loader
from ffcv_convnext.data.load.pages import PageCheck
from ffcv_convnext.host import AvailableMemory

CPU = torch.device("cpu")
PAGE = 2  # the damaged one
CACHES = ("os", "process", "ram")


@pytest.fixture
def folder(paged: dict[str, Path], tmp_path: Path) -> Path:
    """300 samples in six pages of 2 MiB; an unused byte of one page is changed, so each image is decoded as before."""
    own = Path(shutil.copytree(paged["shuffled"], tmp_path / "own"))
    damage(own / "train.beton", PAGE)
    return own


def damage(beton: Path, page: int) -> None:
    tables, num_pages = read_tables(beton), len(Manifest.for_beton(beton).page_crc32)
    content = np.memmap(beton, np.uint8, "r+")
    end_of_page = tables.page_start(page, num_pages) + tables.page_size - 1
    content[end_of_page] ^= 1
    content.flush()


def in_page(folder: Path) -> list[int]:
    """The samples of the damaged page."""
    beton = folder / "train.beton"
    samples: list[int] = read_tables(beton).samples_in_page(PAGE, len(Manifest.for_beton(beton).page_crc32)).tolist()
    return samples


def train_loader(folder: Path, **changes: Any) -> TrainLoader:
    values = {"data_path": folder, "batch_size": 20, "input_size": 32, "num_workers": 3, "shuffle_window_mb": 4}
    return TrainLoader(DataConfig(**{**values, **changes}), CPU, seed=0)


def epoch(of: TrainLoader, number: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [batch for step in of.steps(number) for batch in step]


@pytest.mark.parametrize("data_cache", CACHES)
@pytest.mark.parametrize("order", ["random", "quasi_random"])
def test_a_damaged_page_stops_training_before_one_of_its_samples_is_used(
    folder: Path, data_cache: str, order: str
) -> None:
    train, page = train_loader(folder, data_cache=data_cache, order=order), set(in_page(folder))
    listed = [set(samples.indices.tolist()) for samples in train.samples(0)]
    num_before = next(number for number, samples in enumerate(listed) if samples & page)
    batches = (batch for step in train.steps(0) for batch in step)
    for _ in range(num_before):
        next(batches)
    with pytest.raises(SampleError) as caught:
        next(batches)
    beton = folder / "train.beton"
    assert f"{beton}: sample " in str(caught.value)
    assert f"page {PAGE} (samples {min(page)} to {max(page)}), which differs from its checksum" in str(caught.value)
    assert str(caught.value).endswith(f"repair it with: ffcv-convnext verify {beton} --repair")
    assert "\n" not in str(caught.value)
    train.close()


@pytest.mark.parametrize("data_cache", CACHES)
def test_with_bad_samples_skip_no_sample_of_a_damaged_page_is_used(
    folder: Path, caplog: pytest.LogCaptureFixture, data_cache: str
) -> None:
    never = train_loader(folder, check_data="never", data_cache=data_cache)
    skipping = train_loader(folder, bad_samples="skip", data_cache=data_cache)
    page, num_replaced = set(in_page(folder)), 0
    lists = [samples.indices.tolist() for samples in never.samples(0)]
    for samples, (images, labels), (theirs, their_labels) in zip(lists, epoch(skipping), epoch(never), strict=True):
        good = [i for i, sample in enumerate(samples) if sample not in page]
        num_replaced += len(samples) - len(good)
        assert len(good) < len(samples) or torch.equal(images, theirs)
        for i, sample in enumerate(samples):
            source = i if sample not in page else next((j for j in good if j > i), good[0])
            assert torch.equal(images[i], theirs[source]), sample
            assert labels[i] == their_labels[source]
    assert skipping.num_replaced == num_replaced == len(page)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(page)
    assert all(
        f"lies in page {PAGE} (samples " in warning and "; replaced by sample" in warning for warning in warnings
    )
    for each in (never, skipping):
        each.close()


def test_checks_change_no_batch_of_a_good_file_and_can_be_turned_off(paged: dict[str, Path], folder: Path) -> None:
    checked = train_loader(paged["shuffled"])
    unchecked = train_loader(folder, check_data="never")
    assert checked.decoder.page_check is not None
    assert unchecked.decoder.page_check is None
    for ours, theirs in zip(epoch(checked), epoch(unchecked), strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_evaluation_stops_at_a_damaged_page_although_training_would_skip_it(beton_dir: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(beton_dir, tmp_path / "own"))
    damage(own / "val.beton", 0)
    config = DataConfig(data_path=own, batch_size=8, input_size=32, num_workers=2, bad_samples="skip")
    with pytest.raises(SampleError, match=r"val\.beton: sample 0 lies in page 0 \(samples 0 to 19\)"):
        list(EvalLoader(config, CPU))


def test_several_processes_check_the_pages_that_they_use_themselves(folder: Path) -> None:
    """Each rank stops by itself: none trains on samples that another one has yet to check."""
    for rank in range(3):
        config = DataConfig(data_path=folder, batch_size=20, input_size=32, num_workers=1)
        ours = TrainLoader(config, CPU, seed=0, rank=rank, world=3, local_rank=rank, num_local=3)
        with pytest.raises(SampleError, match=f"lies in page {PAGE} "):
            epoch(ours)
        ours.close()


@pytest.mark.usefixtures("one_thread")
def test_a_run_ends_with_one_line_and_status_1_and_goes_on_after_the_repair(
    beton_dir: Path, tmp_path: Path, small_settings: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    own = Path(shutil.copytree(beton_dir, tmp_path / "own"))
    damage(own / "train.beton", 0)
    values = {**small_settings, "data_path": own, "output_dir": tmp_path / "run", "epochs": 1, "warmup_epochs": 0}
    words = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    assert run_command("train", words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"error: {own / 'train.beton'}: sample ")
    assert "lies in page 0 (samples 0 to 79), which differs from its checksum" in last
    assert run_command("verify", [str(own / "train.beton"), "--repair"]) == 0
    assert run_command("train", words) == 0


def test_a_file_larger_than_memory_in_random_order_is_not_read_twice_and_the_log_says_so(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(loader, "available_memory", lambda: AvailableMemory(1 << 20, "in this test", 0))
    caplog.set_level(logging.INFO)
    train = train_loader(folder)
    epoch(train)
    epoch(train, 1)
    notes = [record.getMessage() for record in caplog.records if "check_data" in record.getMessage()]
    assert notes == [
        "check_data = first_read: train.beton is larger than memory and read in random order, so its pages are not "
        f"checked; check it once with: ffcv-convnext verify {folder / 'train.beton'}"
    ]
    train = train_loader(folder, order="quasi_random")
    with pytest.raises(SampleError, match=f"lies in page {PAGE} "):
        epoch(train)


def test_a_manifest_without_checksums_is_noted_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = folder / "train.json"
    dataclasses.replace(Manifest.read(path), page_crc32=()).write(path)
    caplog.set_level(logging.INFO)
    train = train_loader(folder)
    epoch(train)
    notes = [record.getMessage() for record in caplog.records if "check_data" in record.getMessage()]
    assert len(notes) == 1
    assert "train.beton is without checksums in its manifest, so its pages are not checked" in notes[0]


def test_each_page_is_read_once_however_many_threads_use_it() -> None:
    reads: list[int] = []
    together = threading.Barrier(8)

    def crc32(start: int, _num_bytes: int) -> int:
        reads.append(start)
        return 0 if start != 300 else 7

    check = PageCheck([0] * 8, 100, 100, np.arange(0, 1000, 10).astype(np.uint64), crc32)

    def use(thread: int) -> list[bool]:
        together.wait(10)
        found: list[bool] = check.damaged(np.roll(np.arange(100), thread)).tolist()
        return np.roll(found, -thread).tolist()

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(use, range(8)))
    assert sorted(reads) == list(range(100, 900, 100))
    assert answers == [[30 <= sample < 40 for sample in range(100)]] * 8, "samples outside all pages are the decoder's"
    assert check.describe(35) == "page 2 (samples 30 to 39)"


def test_an_address_beyond_any_file_lies_in_no_page() -> None:
    check = PageCheck([0], 0, 100, np.array([5, 1 << 63, (1 << 64) - 1], np.uint64), lambda *_: 1)
    assert check.damaged(np.arange(3)).tolist() == [True, False, False]
