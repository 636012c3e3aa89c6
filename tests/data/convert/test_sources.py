"""Every form of a data set gives the .beton of the class folders; what is wrong with one is one clean error."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.sources import (
    add_class_tars,
    add_flat_val,
    add_folders,
    add_list,
    add_parquet,
    add_shards,
    add_train_tar,
    add_val_tar,
    classes_of,
    make_imagenet,
    write,
)

from ffcv_convnext.data.beton import Manifest, Page
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.check import repair_data, verify_data
from ffcv_convnext.data.convert import ConversionOptions, convert, join_shards
from ffcv_convnext.data.convert.conversion import _Conversion
from ffcv_convnext.data.convert.open_sources import open_sources

Add = Callable[[Path, Path], object]

BOTH = ("train", "val")
FORMS: dict[str, Add] = {
    "shards in folders, names in .cls": lambda folder, root: [
        add_shards(folder, root, split, "names", f"{split}/{{}}.tar") for split in BOTH
    ],
    "shards with the split in their names, file names in .json": lambda folder, root: [
        add_shards(folder, root, "train", "json", "imagenet1k-train-{:04d}.tar"),
        add_shards(folder, root, "val", "json", "imagenet1k-validation-{:02d}.tar", 1),
    ],
    "parquet, names in the schema": lambda folder, root: [add_parquet(folder, root, split) for split in BOTH],
    "parquet, names in the file names": lambda folder, root: [
        add_parquet(folder, root, split, stated=False) for split in BOTH
    ],
    "lists": lambda folder, root: [add_list(folder, root, split) for split in BOTH],
    "archives of classes": lambda folder, root: [add_class_tars(folder, root), add_flat_val(folder, root)],
}
WITH_FILE: dict[str, Add] = {
    "shards with integers": lambda folder, root: [
        add_shards(folder, root, split, "cls", f"x-{split}-{{}}.tar") for split in BOTH
    ],
    "parquet without names": lambda folder, root: [
        add_parquet(folder, root, split, stated=False, paths=False) for split in BOTH
    ],
}
OF_TRAIN: dict[str, Add] = {
    "train folder": lambda folder, root: add_folders(folder, root, "train"),
    "train tar": add_train_tar,
}
OF_VAL: dict[str, Add] = {
    "val folders": lambda folder, root: add_folders(folder, root, "val"),
    "flat val": add_flat_val,
    "val tar": add_val_tar,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_imagenet(tmp_path_factory.mktemp("folder"))


@pytest.fixture(scope="module")
def expected(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the class folders give."""
    out = tmp_path_factory.mktemp("expected")
    converted(folder, out)
    return out


def options_of(data_path: Path, out_dir: Path, **settings: Any) -> ConversionOptions:
    return ConversionOptions(data_path=data_path, out_dir=out_dir, num_workers=1, **settings)


def converted(data_path: Path, out_dir: Path, **settings: Any) -> Path:
    convert(options_of(data_path, out_dir, **settings))
    return out_dir


def assert_same(out: Path, expected: Path, *, names: bool = True) -> None:
    for file in ("train.beton", "val.beton", *(["train.files.txt", "val.files.txt"] if names else [])):
        if (out / file).exists():
            assert (out / file).read_bytes() == (expected / file).read_bytes(), file
    assert (out / "val.beton").exists()


def class_file(folder: Path, path: Path) -> Path:
    return write(path, "".join(f"{name}\n" for name in classes_of(folder)).encode())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_files_of_the_class_folders(
    form: str, folder: Path, expected: Path, tmp_path: Path
) -> None:
    FORMS[form](folder, tmp_path / "data")
    out = converted(tmp_path / "data", tmp_path / "out")
    assert_same(out, expected, names="names in .cls" not in form)


@pytest.mark.parametrize("form", WITH_FILE)
def test_integers_get_their_names_from_a_file(form: str, folder: Path, expected: Path, tmp_path: Path) -> None:
    WITH_FILE[form](folder, tmp_path / "data")
    out = converted(tmp_path / "data", tmp_path / "out", classes=class_file(folder, tmp_path / "classes.txt"))
    assert_same(out, expected, names=False)
    assert Manifest.check(out / "train.beton").label_names == tuple(classes_of(folder))


@pytest.mark.parametrize("form", WITH_FILE)
def test_integers_without_names_are_classes(form: str, folder: Path, expected: Path, tmp_path: Path) -> None:
    """The order of the images is that of the folders, too, since both are sorted by label."""
    WITH_FILE[form](folder, tmp_path / "data")
    out = converted(tmp_path / "data", tmp_path / "out")
    assert_same(out, expected, names=False)
    assert Manifest.check(out / "val.beton").classes == ("0", "1", "2")


@pytest.mark.parametrize("train", OF_TRAIN)
@pytest.mark.parametrize("val", OF_VAL)
def test_train_and_val_may_have_different_forms(
    train: str, val: str, folder: Path, expected: Path, tmp_path: Path
) -> None:
    OF_TRAIN[train](folder, tmp_path / "data")
    OF_VAL[val](folder, tmp_path / "data")
    assert_same(converted(tmp_path / "data", tmp_path / "out"), expected)


def test_a_pattern_names_the_files_of_one_split(folder: Path, expected: Path, tmp_path: Path) -> None:
    for split in BOTH:
        add_shards(folder, tmp_path, split, "json", f"{split}-{{:06d}}.tar")
        add_parquet(folder, tmp_path, split)
    out = tmp_path / "out"
    converted(tmp_path / "train-{000000..000002}.tar", out, split="train")
    converted(tmp_path / "val-*.tar", out, split="val")
    assert_same(out, expected)
    converted(tmp_path / "data" / "train-0000{0,1}-of-00002.parquet", tmp_path / "b", split="train")
    converted(tmp_path / "data" / "validation-{00000..00001}-of-00002.parquet", tmp_path / "b", split="val")
    assert_same(tmp_path / "b", expected)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False},
        {"compression": "gzip", "data_page_version": "2.0"},
        {"compression": "brotli", "row_group_size": 1000, "data_page_size": 1},
        {"compression": "snappy", "write_statistics": False},
    ],
)
def test_pages_of_every_kind_are_read(options: dict[str, Any], folder: Path, expected: Path, tmp_path: Path) -> None:
    for split in BOTH:
        add_parquet(folder, tmp_path / "data", split, **options)
    assert_same(converted(tmp_path / "data", tmp_path / "out"), expected)


# --- what other commands do with them ----------------------------------------------------------------------------

REOPENED = {**FORMS, **{name: OF_VAL[name] for name in ("flat val",)}, **WITH_FILE}


@pytest.mark.parametrize("form", REOPENED)
def test_a_damaged_page_is_repaired_from_every_form(form: str, folder: Path, tmp_path: Path) -> None:
    REOPENED[form](folder, tmp_path / "data")
    if form == "flat val":
        add_folders(folder, tmp_path / "data", "train")
    settings = {"classes": class_file(folder, tmp_path / "classes.txt")} if form in WITH_FILE else {}
    out = converted(tmp_path / "data", tmp_path / "out", **settings)
    for beton in (out / "train.beton", out / "val.beton"):
        before = beton.read_bytes()
        with open(beton, "r+b") as file:
            file.seek(int(read_tables(beton).addresses[1]) + 200)
            file.write(b"damage")
        assert not verify_data(beton, 1).good
        [page] = repair_data(beton, 1)
        assert page.reason is None
        assert beton.read_bytes() == before


@pytest.mark.parametrize("form", ["shards in folders, names in .cls", "parquet, names in the schema", "lists"])
def test_parts_are_joined_to_the_whole(form: str, folder: Path, expected: Path, tmp_path: Path) -> None:
    FORMS[form](folder, tmp_path / "data")
    out = tmp_path / "out"
    for index in range(3):
        converted(tmp_path / "data", out, split="train", shard=(index, 3))
    join_shards(out, "train", overwrite=False, say=lambda _: None)
    assert (out / "train.beton").read_bytes() == (expected / "train.beton").read_bytes()


@pytest.mark.parametrize("form", ["shards in folders, names in .cls", "parquet, names in the schema", "lists"])
def test_a_conversion_continues_unless_a_file_has_changed(
    form: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ffcv_convnext.data.convert.options.MIN_PAGE_BYTES", 1 << 14)  # several pages
    FORMS[form](folder, tmp_path / "data")
    raw: dict[str, Any] = {"split": "train", "compress_probability": 0.0, "max_resolution": 64}
    converted(tmp_path / "data", tmp_path / "whole", **raw)
    for out in ("out", "again"):
        with monkeypatch.context() as patch:
            patch.setattr("ffcv_convnext.data.convert.conversion._Conversion._add_to_journal", interrupt_at(2))
            with pytest.raises(KeyboardInterrupt):
                converted(tmp_path / "data", tmp_path / out, **raw)
    said: list[str] = []
    options = options_of(tmp_path / "data", tmp_path / "out", resume=True, **raw)
    convert(options, said.append)
    assert any("of them from an earlier attempt" in line for line in said)
    assert (tmp_path / "out" / "train.beton").read_bytes() == (tmp_path / "whole" / "train.beton").read_bytes()
    for path in tmp_path.glob("data/**/*"):
        if path.is_file():
            os.utime(path, (1, 1))
    with pytest.raises(ValueError, match="changed since"):
        convert(replace(options, out_dir=tmp_path / "again"))


def test_a_list_with_other_lines_is_not_resumed(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ffcv_convnext.data.convert.options.MIN_PAGE_BYTES", 1 << 14)
    file = add_list(folder, tmp_path / "data", "train")
    raw: dict[str, Any] = {"split": "train", "compress_probability": 0.0, "max_resolution": 64}
    with monkeypatch.context() as patch:
        patch.setattr("ffcv_convnext.data.convert.conversion._Conversion._add_to_journal", interrupt_at(2))
        with pytest.raises(KeyboardInterrupt):
            converted(tmp_path / "data", tmp_path / "out", **raw)
    file.write_text("".join(file.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(ValueError, match="1 source file removed"):
        converted(tmp_path / "data", tmp_path / "out", resume=True, **raw)


def interrupt_at(number: int) -> Callable[[_Conversion, Page], None]:
    """A journal that is interrupted after this number of pages."""
    add, count = _Conversion._add_to_journal, itertools.count(1)

    def interrupted(self: _Conversion, page: Page) -> None:
        add(self, page)
        if next(count) == number:
            raise KeyboardInterrupt

    return interrupted


def test_val_alone_takes_the_classes_of_a_converted_train(folder: Path, expected: Path, tmp_path: Path) -> None:
    add_parquet(folder, tmp_path / "data", "train")
    add_shards(folder, tmp_path / "other", "val", "cls", "val/{}.tar")
    out = converted(tmp_path / "data", tmp_path / "out", split="train")
    converted(tmp_path / "other", out, split="val")  # integers, whose names are in train.json
    assert_same(out, expected, names=False)
    with pytest.raises(FileNotFoundError, match=r"class list of train is not known.*--classes FILE"):
        open_sources(options_of(tmp_path / "other", tmp_path / "nowhere", split="val"))
