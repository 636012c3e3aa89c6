"""Every form of a data set gives the .beton of the class folders; what is wrong with one is one clean error."""

from __future__ import annotations

import json
import os
import re
import sys
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
    pack,
    write,
)
from support.unfinished import interrupt_at

from ffcv_convnext import cli
from ffcv_convnext.data.beton import Manifest
from ffcv_convnext.data.beton.tables import read_tables
from ffcv_convnext.data.check import repair_data, verify_data
from ffcv_convnext.data.convert import ConversionOptions, Source, convert, join_shards
from ffcv_convnext.data.convert.imagenet import DEVKIT, VAL
from ffcv_convnext.data.convert.open_sources import open_sources
from ffcv_convnext.errors import Failure

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


def assert_same_images(found: dict[Any, Source], folder: Path, *, names: bool = True) -> None:
    """The same images in the same order with the same labels, so that a conversion writes the same bytes."""
    expected = open_sources(options_of(folder, folder))
    for split, source in found.items():
        images, wanted = (
            [(each.label(i), each.name(i) if names else "", each.read(i)) for i in range(len(each))]
            for each in (source, expected[split])
        )
        assert images == wanted
        assert not names or source.classes == expected[split].classes


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
def test_integers_without_names_are_classes(form: str, folder: Path, tmp_path: Path) -> None:
    """The order of the images is that of the folders, too, since both are sorted by label."""
    WITH_FILE[form](folder, tmp_path / "data")
    found = open_sources(options_of(tmp_path / "data", tmp_path / "out"))
    assert_same_images(found, folder, names=False)
    assert found["val"].classes == ("0", "1", "2")


@pytest.mark.parametrize("form", ["shards", "parquet", "parquet with a schema", "list"])
def test_names_that_are_not_sorted_give_the_labels_of_folders(form: str, tmp_path: Path) -> None:
    """Integer 0 is the owl, which is the last class."""
    labels = {"a.jpg": 0, "b.jpg": 2, "c.jpg": 1}
    if form == "shards":
        shards(tmp_path, [file for name, i in labels.items() for file in ((name, b"x"), (f"{name[0]}.cls", b"%d" % i))])
    elif form.startswith("parquet"):
        stated = {"lab": {"_type": "ClassLabel", "names": ["owl", "cat", "dog"]}, "img": {"_type": "Image"}}
        column, label, features = ("img", "lab", stated) if "schema" in form else ("image", "label", {})
        rows = [{column: {"bytes": b"x", "path": name}, label: i} for name, i in labels.items()]
        table(tmp_path, rows, features)
    else:
        write(tmp_path / "train.tsv", "".join(f"{name}\t{label}\n" for name, label in labels.items()).encode())
        for name in labels:
            write(tmp_path / name, b"x")
    names = write(tmp_path / "classes.txt", b"owl\ncat\ndog\n") if "schema" not in form else None
    source = open_sources(options_of(tmp_path, tmp_path / "out", split="train", classes=names))["train"]
    assert source.classes == ("cat", "dog", "owl")
    assert [(source.name(i).rpartition("/")[2], source.label(i)) for i in range(3)] == [
        ("c.jpg", 0),
        ("b.jpg", 1),
        ("a.jpg", 2),
    ]


def test_integers_are_padded_so_that_names_are_in_their_order(tmp_path: Path) -> None:
    shards(tmp_path, [file for i in (2, 0, 10) for file in ((f"{i}.jpg", b"x"), (f"{i}.cls", b"%d" % i))])
    source = open_sources(options_of(tmp_path, tmp_path / "out", split="train"))["train"]
    assert source.classes == ("00", "02", "10")
    assert [source.name(i) for i in range(3)] == ["00/0.jpg", "02/2.jpg", "10/10.jpg"]


@pytest.mark.parametrize("train", OF_TRAIN)
@pytest.mark.parametrize("val", OF_VAL)
def test_train_and_val_may_have_different_forms(train: str, val: str, folder: Path, tmp_path: Path) -> None:
    OF_TRAIN[train](folder, tmp_path / "data")
    OF_VAL[val](folder, tmp_path / "data")
    assert_same_images(dict(open_sources(options_of(tmp_path / "data", tmp_path / "out"))), folder)


@pytest.mark.parametrize(
    ("split", "pattern"),
    [
        ("train", "train-{000000..000002}.tar"),
        ("val", "val-*.tar"),
        ("train", "data/train-0000{0,1}-of-00002.parquet"),
        ("val", "data/validation-{00000..00001}-of-00002.parquet"),
        ("val", "val.tsv"),
    ],
)
def test_a_pattern_names_the_files_of_one_split(split: Any, pattern: str, folder: Path, tmp_path: Path) -> None:
    add_shards(folder, tmp_path, split, "json", f"{split}-{{:06d}}.tar")
    add_parquet(folder, tmp_path, split)
    add_list(folder, tmp_path, split)
    classes = class_file(folder, tmp_path / "classes.txt")
    found = open_sources(options_of(tmp_path / pattern, tmp_path / "out", split=split, classes=classes))
    assert list(found) == [split]
    assert_same_images(dict(found), folder)


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
def test_pages_of_every_kind_are_read(options: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    for split in BOTH:
        add_parquet(folder, tmp_path / "data", split, **options)
    assert_same_images(dict(open_sources(options_of(tmp_path / "data", tmp_path / "out"))), folder)


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


def test_val_alone_takes_the_classes_of_a_converted_train(folder: Path, expected: Path, tmp_path: Path) -> None:
    add_parquet(folder, tmp_path / "data", "train")
    add_shards(folder, tmp_path / "other", "val", "cls", "val/{}.tar")
    out = converted(tmp_path / "data", tmp_path / "out", split="train")
    converted(tmp_path / "other", out, split="val")  # integers, whose names are in train.json
    assert_same(out, expected, names=False)
    with pytest.raises(FileNotFoundError, match=r"class list of train is not known.*--classes FILE"):
        open_sources(options_of(tmp_path / "other", tmp_path / "nowhere", split="val"))


# --- errors: each is found before any work, and names the file and the member --------------------------------------


def shards(root: Path, *samples: list[tuple[str, bytes]]) -> Path:
    for number, files in enumerate(samples):
        write(root / f"train-{number}.tar", pack(files))
    return root


def cut(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])


def shard_cut_off(folder: Path, root: Path) -> None:
    cut(add_shards(folder, root, "train", "cls", "train-{}.tar")[1], 3000)


def parquet_cut_off(folder: Path, root: Path) -> None:
    cut(add_parquet(folder, root, "train")[1], 5000)


def two_labels_of_one_shard(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b"0"), ("a.jpg", b"y")])


def one_key_in_two_shards(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b"0")], [("a.jpg", b"y"), ("a.cls", b"1")])


def two_images_of_one_sample(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b"0"), ("a.png", b"y")])


def sample_without_label(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b"0"), ("b.jpg", b"y")])


def sample_with_broken_json(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.json", b'{"label": ')])


def sample_with_a_list_as_label(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.json", b'{"label": [1, 2]}')])


def sample_with_negative_label(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b"-1")])


def sample_with_empty_label(_: Path, root: Path) -> None:
    shards(root, [("a.jpg", b"x"), ("a.cls", b" \n")])


def shards_without_images(_: Path, root: Path) -> None:
    shards(root, [("a.txt", b"x"), ("a.cls", b"1")])


def table(root: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None, **options: Any) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    root.mkdir(parents=True, exist_ok=True)
    about = {"huggingface": json.dumps({"info": {"features": features}})} if features else None
    pq.write_table(pa.Table.from_pylist(rows).replace_schema_metadata(about), root / "train.parquet", **options)


IMAGE = {"bytes": b"x", "path": "a.jpg"}


def null_image(_: Path, root: Path) -> None:
    table(root, [{"image": IMAGE, "label": 0}, {"image": {"bytes": None, "path": "b.jpg"}, "label": 1}])


def null_image_without_statistics(_: Path, root: Path) -> None:
    rows = [{"image": {**IMAGE, "path": f"{i}.jpg"}, "label": 0} for i in range(7)]
    table(root, [*rows, {"image": None, "label": 1}], write_statistics=False, row_group_size=3)


def null_label(_: Path, root: Path) -> None:
    table(root, [{"image": IMAGE, "label": 0}, {"image": IMAGE, "label": None}])


def path_twice(_: Path, root: Path) -> None:
    table(root, [{"image": IMAGE, "label": 0}, {"image": IMAGE, "label": 0}])


def no_label_column(_: Path, root: Path) -> None:
    table(root, [{"image": IMAGE, "caption": "x"}])


def image_as_text(_: Path, root: Path) -> None:
    table(root, [{"image": 3, "label": 0}])


def unread_encoding(_: Path, root: Path) -> None:
    encoding = {"image.bytes": "DELTA_LENGTH_BYTE_ARRAY"}
    table(root, [{"image": IMAGE, "label": 0}], use_dictionary=False, column_encoding=encoding)


def other_names_in_the_second_file(folder: Path, root: Path) -> None:
    add_parquet(folder, root, "train", stated=False)
    (root / "data" / "train-00001-of-00002.parquet").rename(root / "keep")
    add_parquet(folder, root, "train")
    (root / "keep").rename(root / "data" / "train-00001-of-00002.parquet")


def parquet_file_missing(folder: Path, root: Path) -> None:
    add_parquet(folder, root, "train", num_files=3)[1].unlink()


def line_without_tab(_: Path, root: Path) -> None:
    write(root / "train.tsv", b"a.jpg\tcat\nb.jpg dog\n")


def listed_twice(_: Path, root: Path) -> None:
    write(root / "a.jpg", b"x")
    write(root / "train.tsv", b"a.jpg\tcat\n./a.jpg\tdog\n")


def listed_but_missing(_: Path, root: Path) -> None:
    write(root / "train.tsv", b"a.jpg\tcat\n")


def empty_list(_: Path, root: Path) -> None:
    write(root / "train.tsv", b"\n")


def ground_truth_for_more(folder: Path, root: Path) -> None:
    add_folders(folder, root, "train")
    add_flat_val(folder, root)
    (root / "val" / "ILSVRC2012_val_00000002.JPEG").unlink()


def val_tar_without_an_image(folder: Path, root: Path) -> None:
    add_train_tar(folder, root)
    add_val_tar(folder, root)
    write(root / VAL, pack([("ILSVRC2012_val_00000001.JPEG", b"x")]))


def devkit_damaged(folder: Path, root: Path) -> None:
    add_folders(folder, root, "train")
    add_flat_val(folder, root)
    cut(root / DEVKIT, 200)


WRONG: dict[Callable[[Path, Path], None], str] = {
    shard_cut_off: r"train-1\.tar is cut off or damaged .*member n\d+_\d+\.\w+; copy it again",
    parquet_cut_off: r"train-00001-of-00002\.parquet is cut off or damaged \(.*\); copy it again",
    two_labels_of_one_shard: r"train-0\.tar: two members are named a\.jpg; remove one",
    one_key_in_two_shards: r"train-0\.tar and \S+train-1\.tar both hold a sample a; remove one",
    two_images_of_one_sample: r"train-0\.tar: a\.jpg and a\.png are images of one sample",
    sample_without_label: r"train-0\.tar: b\.jpg has no label; expected a member b\.cls, or b\.json with label",
    sample_with_broken_json: r"train-0\.tar: a\.json is not JSON",
    sample_with_a_list_as_label: r"train-0\.tar: a\.json: the label \[1, 2\] is no name or number",
    sample_with_negative_label: r"train-0\.tar: a\.jpg: the label -1 means that there is none",
    sample_with_empty_label: r"train-0\.tar: a\.jpg: the label '' is empty or has line breaks",
    shards_without_images: r" has no samples with an image",
    null_image: r"train\.parquet: row 1: the image is null; remove the row",
    null_image_without_statistics: r"train\.parquet: row 7: the image is null; remove the row",
    null_label: r"train\.parquet: row 1: the label is null",
    path_twice: r"train\.parquet: two members are named a\.jpg; remove one",
    no_label_column: r"train\.parquet has no column label or labels or cls; it has image, caption: expected",
    image_as_text: r"train\.parquet: the column image has no binary field `bytes`",
    unread_encoding: r"train\.parquet: its images have encoding DELTA_LENGTH_BYTE_ARRAY, .*; write the file again",
    other_names_in_the_second_file: r"00000-of-00002\.parquet and \S+00001-of-00002\.parquet have different class",
    parquet_file_missing: r"data: 1 of 3 files are missing, e\.g\. train-00001-of-00003\.parquet",
    line_without_tab: r"train\.tsv, line 2: 'b\.jpg dog'; expected `path<TAB>class`",
    listed_twice: r"train\.tsv lists a\.jpg twice; remove one line",
    listed_but_missing: r"train\.tsv: \S+/a\.jpg does not exist; paths are relative to the folder of the list",
    empty_list: r"train\.tsv lists no images",
    ground_truth_for_more: r"val has 5 of the 6 images of the ground truth; ILSVRC2012_val_00000002\.JPEG is missing",
    val_tar_without_an_image: r"val\.tar has 1 of the 6 images of the ground truth; ILSVRC2012_val_0+2\.JPEG is",
    devkit_damaged: r"ILSVRC2012_devkit_t12\.tar\.gz is not a usable development kit \(.*\); copy it again",
}


@pytest.mark.parametrize("change", list(WRONG))
def test_what_is_wrong_is_one_line_before_any_work(
    change: Callable[[Path, Path], None], folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    change(folder, root)
    split = "val" if (root / DEVKIT).exists() else "train"
    words = ["--data_path", str(root), "--out_dir", str(tmp_path / "out"), "--split", split]
    assert cli.run_command("write", words) == 2
    stdout, stderr = capsys.readouterr()
    assert stdout == ""
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1
    assert re.search(WRONG[change], stderr), stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ("", "names no classes"),
        ("cat\n\ndog\n", "line 2: '' is no class name"),
        ("cat\ndog\ncat\n", "line 3: the class cat is line 1 already"),
        ("cat\ndog\n", "the label 2 is none of the 2 classes of classes = "),
        ("a\nb\nc\nd\n", "no images of class d"),
    ],
)
def test_a_wrong_file_of_classes(lines: str, words: str, folder: Path, tmp_path: Path) -> None:
    add_shards(folder, tmp_path, "train", "cls", "train-{}.tar")
    names = write(tmp_path / "classes.txt", lines.encode())
    with pytest.raises(ValueError, match=re.escape(words)):
        open_sources(options_of(tmp_path, tmp_path / "out", split="train", classes=names))


@pytest.mark.parametrize(
    ("path", "settings", "words"),
    [
        ("train-{0..1}.tar", {}, "names the images of one split; add --split train or --split val"),
        ("train-{0..4}.tar", {"split": "train"}, "2 of 5 files are missing: "),
        ("train-{2..1}.tar", {"split": "train"}, "expected a range that increases"),
        ("train-{x}.tar", {"split": "train"}, "expected a range or a list in braces"),
        ("none-*.tar", {"split": "train"}, "no file matches"),
        ("", {"split": "train", "val_labels": Path("x")}, "only a flat val folder and ILSVRC2012_img_val.tar need it"),
        (
            "",
            {"split": "train", "source": "parquet"},
            "source = parquet requires .* is of the form webdataset",
        ),
        (
            "",
            {"split": "val"},
            r"has images of train \(.*\), but none of val: .* choose --split train",
        ),
    ],
)
def test_a_path_that_names_no_images(
    path: str, settings: dict[str, Any], words: str, folder: Path, tmp_path: Path
) -> None:
    add_shards(folder, tmp_path, "train", "cls", "train-{}.tar")
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        open_sources(options_of(tmp_path / path, tmp_path / "out", **settings))


def test_classes_of_folders_are_their_names(folder: Path, tmp_path: Path) -> None:
    names = class_file(folder, tmp_path / "classes.txt")
    with pytest.raises(ValueError, match="only webdataset, parquet and list need it"):
        open_sources(options_of(folder, tmp_path / "out", classes=names))


@pytest.mark.parametrize(("module", "extra"), [("pyarrow", "parquet"), ("scipy", "imagenet")])
def test_a_missing_package_is_named(
    module: str, extra: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_flat_val(folder, tmp_path)
    add_parquet(folder, tmp_path, "train")
    for name in [module, *(name for name in sys.modules if name.startswith(f"{module}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=rf"install it with: pip install 'ffcv-convnext\[{extra}\]'"):
        open_sources(options_of(tmp_path, tmp_path / "out"))


def test_an_image_that_cannot_be_decoded_is_named_with_its_archive(tmp_path: Path) -> None:
    shards(tmp_path, [("a.jpg", b"no image"), ("a.cls", b"0")])
    with pytest.raises(Failure, match=r"0/a\.jpg: not an image in a known format \(in \S+train-0\.tar\); repair"):
        converted(tmp_path, tmp_path / "out", split="train")


def test_a_source_that_is_said_is_taken_before_the_folders(folder: Path, tmp_path: Path) -> None:
    add_folders(folder, tmp_path, "train")
    file = add_list(folder, tmp_path, "train")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    options = options_of(tmp_path, tmp_path / "out", split="train")
    numbers = [len(open_sources(replace(options, source=kind))["train"]) for kind in ("auto", "folder", "list")]
    assert numbers == [12, 12, 11]
