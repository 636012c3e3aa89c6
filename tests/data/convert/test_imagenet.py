"""ILSVRC2012's archives, read in place, give the bytes of the unpacked folders; each damage is one clean error."""

from __future__ import annotations

import gzip
import os
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
from support.sources import add_train_tar, add_val_tar, make_imagenet, pack
from support.unfinished import interrupt_at

from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.check import repair_data, verify_data
from ffcv_convnext.data.convert import ConversionOptions, convert
from ffcv_convnext.data.convert.imagenet import DEVKIT, TRAIN, VAL, open_train, reopen
from ffcv_convnext.data.convert.tars import list_members


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_imagenet(tmp_path / "folder")


@pytest.fixture
def tars(folder: Path, tmp_path: Path) -> Path:
    """The same images as the archives that are downloaded."""
    add_train_tar(folder, tmp_path / "tars")
    add_val_tar(folder, tmp_path / "tars")
    return tmp_path / "tars"


def _convert(data_path: Path, out_dir: Path, **settings: object) -> None:
    convert(ConversionOptions(data_path=data_path, out_dir=out_dir, num_workers=1, **settings))  # type: ignore[arg-type]


def test_the_archives_give_the_files_of_the_unpacked_folders(folder: Path, tars: Path, tmp_path: Path) -> None:
    _convert(folder, tmp_path / "a")
    _convert(tars, tmp_path / "b")
    for file in ("train.beton", "val.beton", "train.files.txt", "val.files.txt"):
        assert (tmp_path / "b" / file).read_bytes() == (tmp_path / "a" / file).read_bytes()


def test_a_file_of_labels_replaces_the_development_kit(folder: Path, tars: Path, tmp_path: Path) -> None:
    (tars / DEVKIT).unlink()
    with pytest.raises(FileNotFoundError, match="--val_labels FILE"):
        _convert(tars, tmp_path / "b")
    classes = sorted(path.name for path in (folder / "val").iterdir())
    images = sorted((folder / "val").glob("*/*"))
    labels = tmp_path / "labels.txt"
    words = [path.parent.name if i % 2 else str(classes.index(path.parent.name)) for i, path in enumerate(images)]
    labels.write_text("".join(f"{path.name} {word}\n" for path, word in zip(images, words, strict=True)))
    _convert(folder, tmp_path / "a", split="val")
    _convert(tars, tmp_path / "b", split="val", val_labels=labels)
    assert (tmp_path / "b" / "val.beton").read_bytes() == (tmp_path / "a" / "val.beton").read_bytes()
    labels.write_text("".join(labels.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match=rf"{VAL}: the ground truth has no class for {images[0].name}"):
        _convert(tars, tmp_path / "c", split="val", val_labels=labels)


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_names_of_both_formats_and_hidden_files(tmp_path: Path, form: int) -> None:
    name = "ä" * 60 + "b" * 150 + ".jpg"
    (tmp_path / "a.tar").write_bytes(pack([("._x.jpg", b"no"), (name, b"yes")], form))
    (member,) = list_members(tmp_path / "a.tar")
    assert (member.name, (tmp_path / "a.tar").read_bytes()[member.start :][: member.size]) == (name, b"yes")


@pytest.mark.parametrize("keep", [600, 512 + 1024 + 100, 512 + 1024])
def test_an_archive_that_is_cut_off_names_the_last_member(tmp_path: Path, keep: int) -> None:
    (tmp_path / "a.tar").write_bytes(pack([("first.jpg", b"x" * 1000), ("second.jpg", b"y" * 1000)])[:keep])
    with pytest.raises(ValueError, match=r"a\.tar is cut off or damaged .*first\.jpg; copy it again"):
        list(list_members(tmp_path / "a.tar"))


def test_a_class_archive_that_is_cut_off_is_named(tmp_path: Path) -> None:
    cut = pack([("first.jpg", b"x" * 1000), ("second.jpg", b"y" * 1000)])[:1600]
    (tmp_path / TRAIN).write_bytes(pack([("n1.tar", cut)]))
    with pytest.raises(ValueError, match=rf"{TRAIN}/n1\.tar is cut off"):
        open_train(tmp_path / TRAIN)


def test_compressed_and_doubled_members_are_errors(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(gzip.compress(pack([("a.jpg", b"x")])))
    with pytest.raises(ValueError, match=r"a\.tar is compressed .* gunzip"):
        list(list_members(tmp_path / "a.tar"))
    (tmp_path / "b.tar").write_bytes(pack([("a.jpg", b"x"), ("a.jpg", b"y")]))
    with pytest.raises(ValueError, match=r"b\.tar: two members are named a\.jpg"):
        list(list_members(tmp_path / "b.tar"))


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_damaged_page_is_repaired_from_the_archive(split: str, tars: Path, tmp_path: Path) -> None:
    _convert(tars, tmp_path / "out")
    beton = tmp_path / "out" / f"{split}.beton"
    before = beton.read_bytes()
    address = int(read_tables(beton).addresses[1])
    with open(beton, "r+b") as file:
        file.seek(address + 200)
        file.write(b"damage")
    assert not verify_data(beton, 1).good
    [page] = repair_data(beton, 1)
    assert page.reason is None
    assert beton.read_bytes() == before


def test_another_archive_repairs_nothing(tars: Path, tmp_path: Path) -> None:
    _convert(tars, tmp_path / "out", split="train")
    with pytest.raises(ValueError, match=r"img_train.tar has no member for c0/elsewhere\.jpg; it is not the archive"):
        reopen(tars / TRAIN, ["c0/elsewhere.jpg"])


def test_a_conversion_continues_from_an_archive_unless_it_has_changed(
    tars: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffcv_convnext.data.convert.options.MIN_PAGE_BYTES", 1 << 14)  # several pages
    raw = {"split": "train", "compress_probability": 0.0, "max_resolution": 64}
    _convert(tars, tmp_path / "whole", **raw)
    with monkeypatch.context() as patch:
        patch.setattr("ffcv_convnext.data.convert.conversion._Conversion._add_to_journal", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            _convert(tars, tmp_path / "out", **raw)
    said: list[str] = []
    options = ConversionOptions(data_path=tars, out_dir=tmp_path / "out", num_workers=1, resume=True, **raw)
    convert(options, said.append)
    assert any("of them from an earlier attempt" in line for line in said)
    assert (tmp_path / "out" / "train.beton").read_bytes() == (tmp_path / "whole" / "train.beton").read_bytes()

    with monkeypatch.context() as patch:
        patch.setattr("ffcv_convnext.data.convert.conversion._Conversion._add_to_journal", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            _convert(tars, tmp_path / "again", **raw)
    os.utime(tars / TRAIN, (1, 1))
    with pytest.raises(ValueError, match="changed since"):
        convert(replace(options, out_dir=tmp_path / "again"))
