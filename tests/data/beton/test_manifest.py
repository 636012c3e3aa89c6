"""Manifests: round trip, and every way a .beton can differ from its own."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from support.imagefolder import class_name, make_image_folder

from ffcv_convnext.data.beton.manifest import FORMAT, Manifest, tables_digest
from ffcv_convnext.data.convert.conversion import ConversionOptions, convert


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("manifest")
    make_image_folder(root / "folder", num_classes=2, train_per_class=3, val_per_class=2)
    convert(ConversionOptions(data_path=root / "folder", out_dir=root / "out", num_workers=2))
    return root / "out"


@pytest.fixture
def beton(converted: Path, tmp_path: Path) -> Path:
    """A .beton a test may damage."""
    shutil.copytree(converted, tmp_path / "copy")
    return tmp_path / "copy" / "train.beton"


def test_a_manifest_describes_its_beton(beton: Path) -> None:
    manifest = Manifest.check(beton)
    assert manifest == Manifest.for_beton(beton) == Manifest.read(beton.with_suffix(".json"))
    assert manifest.class_to_idx == {class_name(0): 0, class_name(1): 1}
    assert (manifest.split, manifest.num_samples, manifest.write_mode) == ("train", 6, "jpg")
    assert (manifest.max_resolution, manifest.jpeg_quality, manifest.subset) == (500, 90, None)
    assert (manifest.ffcv_version, manifest.num_bytes) == ("1.0.2", beton.stat().st_size)
    assert manifest.source.endswith("folder/train")
    assert json.loads(beton.with_suffix(".json").read_text())["class_to_idx"] == manifest.class_to_idx


def test_writing_and_reading_keep_every_field(beton: Path, tmp_path: Path) -> None:
    manifest = dataclasses.replace(Manifest.for_beton(beton), subset=5, max_resolution=None, classes=("b", "ä"))
    manifest.write(tmp_path / "again.json")
    assert Manifest.read(tmp_path / "again.json") == manifest
    assert [path.name for path in tmp_path.glob("*again*")] == ["again.json"]


def test_the_original_of_a_sample_is_found(beton: Path) -> None:
    manifest = Manifest.for_beton(beton)
    originals = [manifest.original_file(beton, sample) for sample in range(6)]
    names = sorted(f"{original.parent.name}/{original.name}" for original in originals if original)
    assert names == [f"{class_name(label)}/{i:03d}.{'png' if i == 2 else 'JPEG'}" for label in (0, 1) for i in range(3)]
    assert manifest.original_file(beton, 6) is None
    beton.with_suffix(".files.txt").write_text("of\nanother\nconversion\n")
    assert manifest.original_file(beton, 1) is None
    beton.with_suffix(".files.txt").unlink()
    assert manifest.original_file(beton, 1) is None


def test_a_missing_file_is_named(beton: Path) -> None:
    beton.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match=r"train\.beton has no manifest train\.json.*convert it again"):
        Manifest.check(beton)
    beton.unlink()
    with pytest.raises(FileNotFoundError, match=r"train\.beton does not exist; create it"):
        Manifest.check(beton)
    with pytest.raises(FileNotFoundError, match=r"manifest .*train\.json not found"):
        Manifest.read(beton.with_suffix(".json"))


def test_a_truncated_beton_has_another_size_than_its_manifest_states(beton: Path) -> None:
    with open(beton, "r+b") as file:
        file.truncate(beton.stat().st_size - 1)
    with pytest.raises(ValueError, match=r"has \d+ bytes, its manifest states \d+: an incomplete copy"):
        Manifest.check(beton)


@pytest.mark.parametrize(
    ("place", "part"),
    [
        (8, "number of samples"),
        (16, "place of the allocation table"),
        (30, "field descriptors"),
        (24 + 2 * 1041 + 30, "sample table"),
        (-1, "allocation table"),
    ],
)
def test_a_flipped_byte_outside_the_pictures_is_noticed(beton: Path, place: int, part: str) -> None:
    with open(beton, "r+b") as file:
        file.seek(place, 0 if place >= 0 else 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(ValueError, match="header or sample table differ"):
        Manifest.check(beton)
    assert part


def test_a_flipped_bit_of_ffcv_s_version_number_is_noticed(beton: Path) -> None:
    with open(beton, "r+b") as file:
        file.write(b"\x03")
    with pytest.raises(ValueError, match="does not begin with FFCV's version number 2"):
        Manifest.check(beton)


def test_a_manifest_of_another_conversion_is_an_error(beton: Path) -> None:
    """A crash between the renames of an overwriting conversion leaves such a pair."""
    shutil.copy(beton.with_name("val.beton"), beton)
    with pytest.raises(ValueError, match="bytes, its manifest states"):
        Manifest.check(beton)


def test_an_empty_file_has_no_digest(tmp_path: Path) -> None:
    (tmp_path / "empty.beton").touch()
    assert tables_digest(tmp_path / "empty.beton") == "no whole allocation table"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: "{", "Expecting property name"),
        (lambda _: [1], "is not usable"),
        (lambda _: {"format": FORMAT}, "class_to_idx"),
        (lambda content: content | {"format": 99}, "another version"),
        (lambda content: content | {"surprise": 1}, "surprise"),
        (lambda content: content | {"split": "test"}, "split is 'test'"),
        (lambda content: content | {"class_to_idx": {"a": 0}}, "disagree"),
        (lambda content: content | {"skipped": [{"path": "x"}]}, "reason"),
    ],
)
def test_text_that_is_no_manifest_is_one_line(beton: Path, change, reason: str) -> None:
    path = beton.with_suffix(".json")
    changed = change(json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    with pytest.raises(ValueError, match=reason) as caught:
        Manifest.check(beton)
    assert "\n" not in str(caught.value)
    assert "convert it again" in str(caught.value)
