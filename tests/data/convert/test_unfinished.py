"""Conversions that are killed and resumed, or made in shards: the bytes are those of an uninterrupted one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support import REPOSITORY
from support.imagefolder import class_name

from ffcv_convnext import cli
from ffcv_convnext.data.beton.manifest import Manifest
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.data.convert import journal as journal_module
from ffcv_convnext.data.convert.journal import Journal
from ffcv_convnext.data.convert.shards import join_shards
from ffcv_convnext.errors import Failure
from ffcv_convnext.rng import Stream, permutation

SCRIPT = REPOSITORY / "write_ffcv_dataset.py"
NAMES = ("train.beton", "train.json", "train.files.txt")
UNFINISHED = ".train.unfinished"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """130 images of noise, about 240 kB each when encoded: four pages. One of them is damaged."""
    root = tmp_path_factory.mktemp("folder")
    random = np.random.default_rng(0)
    for number in range(130):
        path = root / "train" / class_name(number % 3) / f"{number:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = random.integers(0, 256, (500, 480, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, quality=95, subsampling=0)
    (root / "train" / class_name(0) / "030.jpg").write_bytes(b"not an image")
    return root


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted conversion."""
    out = tmp_path_factory.mktemp("whole")
    (manifest,) = convert(options(folder, out))
    assert len(manifest.page_crc32) >= 4
    assert [skipped.path for skipped in manifest.skipped] == [f"{class_name(0)}/030.jpg"]
    return out


def options(folder: Path, out: Path, **changes: object) -> ConversionOptions:
    base = ConversionOptions(data_path=folder, out_dir=out, split="train", num_workers=1, skip_bad=True)
    return dataclasses.replace(base, **changes)


def assert_same_files(ours: Path, theirs: Path) -> None:
    assert sorted(path.name for path in ours.iterdir()) == sorted(NAMES)
    for name in NAMES:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name


@pytest.fixture(scope="module")
def killed_once(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a conversion that was killed with SIGKILL after its first page."""
    out = tmp_path_factory.mktemp("killed") / "out"
    flags = ["--data_path", str(folder), "--out_dir", str(out), "--split", "train", "--skip_bad", "--num_workers", "1"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stdout=subprocess.DEVNULL)
    patience = time.monotonic() + 120
    while not Journal(out, "train").num_pages and time.monotonic() < patience:
        time.sleep(0.002)
    process.kill()
    process.wait(timeout=30)
    assert os.listdir(out) == [UNFINISHED]
    assert 1 <= Journal(out, "train").num_pages < 4
    return out


@pytest.fixture
def killed(killed_once: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(killed_once, tmp_path / "out"))


def test_a_killed_conversion_resumes_to_the_bytes_of_an_uninterrupted_one(
    folder: Path, killed: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--data_path", str(folder), "--out_dir", str(killed), "--split", "train", "--skip_bad", "--resume"]
    assert cli.main(["write", *flags]) == 0
    assert "of them from an earlier attempt), 3 classes" in capsys.readouterr().out
    assert_same_files(killed, whole)
    before = (killed / "train.beton").stat().st_mtime_ns
    assert cli.main(["write", *flags]) == 0  # as a requeued job does
    assert capsys.readouterr().out == f"{killed / 'train.beton'} is already complete\n"
    assert (killed / "train.beton").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "damage",
    ["journal cut off", "journal damaged", "page never reached the disk", "no page reached the disk", "file lost"],
)
def test_pages_lost_in_a_power_failure_are_written_again(folder: Path, killed: Path, whole: Path, damage: str) -> None:
    place = Journal(killed, "train")
    if damage == "journal cut off":
        place.path.write_bytes(place.path.read_bytes()[:-40])
    elif damage == "journal damaged":
        content = bytearray(place.path.read_bytes())
        content[content.index(b"\n") + 40] ^= 1  # in the first page's numbers
        place.path.write_bytes(content)
    elif damage == "page never reached the disk":
        os.truncate(place.beton, place.beton.stat().st_size - (9 << 20))
    elif damage == "file lost":
        place.beton.unlink()
    else:
        os.truncate(place.beton, 100)
    convert(options(folder, killed, resume=True))
    assert_same_files(killed, whole)


def test_an_unfinished_conversion_is_neither_lost_nor_mixed_with_another(
    folder: Path, killed: Path, whole: Path
) -> None:
    with pytest.raises(FileExistsError, match=r"\.train\.unfinished contains .*--resume, .*--overwrite"):
        convert(options(folder, killed))
    said: list[str] = []
    other = options(folder, killed, resume=True, jpeg_quality=50)
    convert(other, said.append)
    assert any("nothing to resume for these images and settings" in line for line in said)
    assert Manifest.check(killed / "train.beton").jpeg_quality == 50
    with pytest.raises(FileExistsError, match=r"train\.beton exists"):  # finished, but not this one
        convert(options(folder, killed, resume=True))
    convert(options(folder, killed, overwrite=True))
    assert_same_files(killed, whole)


@pytest.mark.usefixtures("own")  # it lists the images in the order of the conversion
@pytest.mark.parametrize("tail", [1, 100, 1 << 16])
def test_the_number_of_saved_images_is_read_from_the_end(
    killed: Path, tail: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "_TAIL", tail)
    place = Journal(killed, "train")
    identity = json.loads(place.path.read_bytes().partition(b"\n")[0].partition(b" ")[2])[0]
    saved = json.loads(place.path.read_bytes().splitlines()[-1].partition(b" ")[2])[2]
    assert place.num_done(identity) == saved > 0
    assert place.num_done("other") == 0
    pages = place.num_pages
    with open(place.path, "ab") as file:
        file.write(b"00000000 [cut off")
    assert (place.num_done(identity), place.num_pages) == (saved, pages)
    place.path.write_bytes(place.path.read_bytes().partition(b"\n")[0] + b"\n")
    assert (place.num_done(identity), place.num_pages) == (0, 0)


# --- source files that change in between ---------------------------------------------------------------------


def converted_names(out: Path) -> list[str]:
    """The source files of the pages that are saved."""
    (manifest_free, *lines) = Journal(out, "train").path.read_bytes().splitlines()
    assert manifest_free
    num_done = json.loads(lines[-1].partition(b" ")[2])[2]
    return (out.parent / "order.txt").read_text().splitlines()[:num_done]


@pytest.fixture
def own(folder: Path, killed: Path, whole: Path, tmp_path: Path) -> Path:
    """A copy of `folder`, with its times, that a test may change."""
    names = (whole / "train.files.txt").read_text().splitlines()
    bad = f"{class_name(0)}/030.jpg"
    listed = sorted([*names, bad])
    order = permutation(len(listed), 0, epoch=0, stream=Stream.STORED_ORDER)
    (killed.parent / "order.txt").write_text("".join(f"{listed[i]}\n" for i in order))
    return Path(shutil.copytree(folder, tmp_path / "own"))


def resume(own: Path, out: Path, capsys: pytest.CaptureFixture[str], *flags: str) -> tuple[int, str]:
    words = ["--data_path", str(own), "--out_dir", str(out), "--split", "train", "--skip_bad", "--num_workers", "1"]
    status = cli.run_command("write", [*words, "--resume", *flags])
    return status, capsys.readouterr().err


def other_content(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-2] + b"xy")


def other_size_same_time(path: Path) -> None:
    before = path.stat()
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [other_content, other_size_same_time])
def test_a_source_file_that_changed_since_its_page_was_saved_is_an_error(
    own: Path, killed: Path, whole: Path, change: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    path = own / "train" / converted_names(killed)[3]
    content, before = path.read_bytes(), path.stat()
    change(path)
    status, stderr = resume(own, killed, capsys)
    assert status == 2
    assert stderr.startswith(f"error: 1 source file changed since {killed / UNFINISHED} was written: {path}; ")
    assert "restore them, or start from the beginning with --overwrite" in stderr
    assert stderr.count("\n") == 1
    assert Journal(killed, "train").num_pages >= 1, "nothing is lost"
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert resume(own, killed, capsys)[0] == 0
    assert (killed / "train.beton").read_bytes() == (whole / "train.beton").read_bytes()


def test_many_changed_files_are_counted_and_the_first_are_named(
    own: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = converted_names(killed)
    for path in own.glob("train/*/*.jpg"):
        os.utime(path)
    status, stderr = resume(own, killed, capsys)
    assert status == 2
    shown = ", ".join(str(own / "train" / name) for name in names[:3])
    assert f"{len(names)} source files changed since {killed / UNFINISHED} was written: {shown}, ...; " in stderr


def test_a_file_that_is_still_to_be_read_may_change(
    own: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done = set(converted_names(killed))
    later = [path for path in own.glob("train/*/*.jpg") if str(path.relative_to(own / "train")) not in done]
    for path in later:
        os.utime(path)
    assert later
    assert resume(own, killed, capsys)[0] == 0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("add", "1 source file added: {0}/train/class_01/new.jpg; "),
        ("remove", "1 source file removed: {0}/train/class_01/001.jpg; "),
        (
            "both",
            "1 source file added: {0}/train/class_01/new.jpg, and 1 source file removed: {0}/train/class_01/001.jpg",
        ),
    ],
)
def test_source_files_added_or_removed_in_between_are_an_error(
    own: Path, killed: Path, change: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = own / "train" / class_name(1) / "001.jpg", own / "train" / class_name(1) / "new.jpg"
    if change == "add":
        shutil.copy(old, new)
    elif change == "remove":
        old.unlink()
    else:
        old.rename(new)
    status, stderr = resume(own, killed, capsys)
    assert status == 2
    assert words.format(own) in stderr
    assert "restore them, or start from the beginning with --overwrite" in stderr
    assert resume(own, killed, capsys)[0] == 2, "the error does not remove what is saved"
    words_again = ["--data_path", str(own), "--out_dir", str(killed), "--split", "train", "--skip_bad", "--overwrite"]
    assert cli.run_command("write", words_again) == 0


def test_the_record_of_source_files_survives_a_second_interruption(
    own: Path, killed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt's pages still count for the third one."""
    first = own / "train" / converted_names(killed)[0]
    monkeypatch.setattr("ffcv_convnext.data.convert.conversion.publish", raise_interrupt)
    assert resume(own, killed, capsys)[0] == 130
    monkeypatch.undo()
    os.utime(first)
    status, stderr = resume(own, killed, capsys)
    assert status == 2
    assert f"1 source file changed since {killed / UNFINISHED} was written: {first}; " in stderr


def raise_interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_conversion_of_an_earlier_version_is_refused_with_one_line(
    folder: Path, killed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(killed, "train")
    journal.path.write_text('"0123abc"\n[1, [], 2, 0, []]\n')
    status, stderr = resume(folder, killed, capsys)
    assert status == 2
    assert f"{killed / UNFINISHED} was written by an earlier version of this package" in stderr
    assert stderr.endswith("start from the beginning with --overwrite instead of --resume\n")


def test_a_bad_file_late_in_a_conversion_loses_no_pages(folder: Path, whole: Path, tmp_path: Path) -> None:
    last = (whole / "train.files.txt").read_text().splitlines()[-1]
    own = Path(shutil.copytree(folder, tmp_path / "own"))
    content = (own / "train" / last).read_bytes()
    (own / "train" / last).write_bytes(b"")
    (own / "train" / class_name(0) / "030.jpg").write_bytes(content)  # so that this one is the only bad one
    said: list[str] = []
    with pytest.raises(Failure, match=rf"{last}: not an image"):
        convert(options(own, tmp_path / "out", skip_bad=False), said.append)
    assert "images are saved; the same command with --resume" in said[-1]
    (own / "train" / last).write_bytes(content)
    (manifest,) = convert(options(own, tmp_path / "out", skip_bad=False, resume=True))
    assert manifest.num_samples == 130


def test_sigterm_keeps_whole_pages(folder: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    flags = ["--data_path", str(folder), "--out_dir", str(out), "--split", "train", "--skip_bad", "--num_workers", "1"]
    process = subprocess.Popen([sys.executable, str(SCRIPT), *flags], stdout=subprocess.PIPE, text=True)
    while not Journal(out, "train").num_pages and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "of 130 images are saved; the same command with --resume" in said
    convert(options(folder, out, resume=True))
    assert_same_files(out, whole)


def test_shards_join_to_the_bytes_of_one_conversion(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    flags = ["--data_path", str(folder), "--out_dir", str(out), "--split", "train", "--skip_bad"]
    join = ["write", "--out_dir", str(out), "--split", "train", "--join"]
    assert cli.main(["write", *flags, "--shard", "2/3"]) == 0
    assert cli.main(["write", *flags, "--shard", "0/3"]) == 0
    assert cli.main(join) == 2
    assert "1 of 3 shards of train are missing; convert them with --shard 1/3" in capsys.readouterr().err
    assert cli.main(["write", *flags, "--shard", "1/3"]) == 0
    sizes = [Manifest.check(out / f"train.part-{i}-of-3.beton").num_samples for i in range(3)]
    assert sum(sizes) == 129
    assert cli.main(join) == 0
    assert "joined 3 shards, 129 images, 3 classes" in capsys.readouterr().out
    assert_same_files(out, whole)


def test_shards_of_different_conversions_are_refused(folder: Path, tmp_path: Path) -> None:
    for index, quality in ((0, 90), (1, 80)):
        convert(options(folder, tmp_path, subset=6, shard=(index, 2), jpeg_quality=quality))
    with pytest.raises(ValueError, match=r"part-1-of-2\.beton has other images or settings than"):
        join_shards(tmp_path, "train", overwrite=False, say=print)
    convert(options(folder, tmp_path, subset=6, shard=(1, 2), overwrite=True))
    content = bytearray((tmp_path / "train.part-1-of-2.beton").read_bytes())
    content[-200_000] ^= 1  # inside an image or after the last one
    (tmp_path / "train.part-1-of-2.beton").write_bytes(content)
    with pytest.raises(ValueError, match=r"part-1-of-2\.beton: page 0 differs from its checksum"):
        join_shards(tmp_path, "train", overwrite=False, say=print)
    assert not (tmp_path / "train.beton").exists()
    convert(options(folder, tmp_path, subset=6, shard=(0, 3)))
    with pytest.raises(ValueError, match="shards of train of several conversions: N = 2, 3"):
        join_shards(tmp_path, "train", overwrite=False, say=print)
    with pytest.raises(FileNotFoundError, match="contains no shards of val; write them with --shard"):
        join_shards(tmp_path, "val", overwrite=False, say=print)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--shard", "3/3"], "shard = 3/3: expected I/N with I from 0 to N - 1"),
        (["--shard", "one"], "shard = one: expected 2 whole numbers >= 0 or none, e.g. 0/8"),
        (["--shard", "0/1000"], "shard = 0/1000: train has only 130 images"),
        (["--resume", "--overwrite"], "choose one of them"),
        (["--join"], "--join accepts only --out_dir, --split and --overwrite, not --data_path"),
    ],
)
def test_invalid_flags_are_one_line(folder: Path, tmp_path: Path, capsys, flags, words) -> None:
    status = cli.run_command("write", ["--data_path", str(folder), "--out_dir", str(tmp_path), *flags, "--split=train"])
    stderr = capsys.readouterr().err
    assert status == 2
    assert stderr.count("\n") == 1
    assert words in stderr


def test_a_disk_without_room_is_an_error_before_any_work(folder: Path, tmp_path: Path, monkeypatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=20_000_000))
    message = r"out has room for 20\.0 MB, about [34]\d\.\d MB are needed; make room, choose another --out_dir"
    with pytest.raises(ValueError, match=message):
        convert(options(folder, tmp_path / "out"))
    assert not (tmp_path / "out").exists()
