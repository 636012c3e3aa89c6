"""Other sources than an ImageFolder: the same images give the same bytes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from support.imagefolder import TarSource, class_name, make_image_folder

from ffcv_convnext.data.beton.manifest import Manifest, Split
from ffcv_convnext.data.convert import ConversionOptions, ImageFolder, Source, convert
from ffcv_convnext.data.convert.archives import in_threads
from ffcv_convnext.data.convert.source import list_classes, scan
from ffcv_convnext.errors import Failure


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_image_folder(tmp_path / "folder", num_classes=3, train_per_class=5)


def test_a_tar_file_gives_the_bytes_of_the_folder_it_was_packed_from(folder: Path, tmp_path: Path) -> None:
    tar = TarSource.pack(folder / "train", tmp_path / "train.tar")
    manifests = {}
    cases: dict[str, Mapping[Split, Source] | None] = {"folder": None, "tar": {"train": tar}}
    for name, sources in cases.items():
        options = ConversionOptions(
            data_path=folder, out_dir=tmp_path / name, split="train", num_workers=2, compress_probability=0.7, subset=12
        )
        (manifests[name],) = convert(options, sources=sources)
    for file in ("train.beton", "train.files.txt"):
        assert (tmp_path / "tar" / file).read_bytes() == (tmp_path / "folder" / file).read_bytes()
    assert manifests["tar"].identity == manifests["folder"].identity
    assert manifests["tar"].num_samples == 12
    assert Manifest.check(tmp_path / "tar" / "train.beton").source == str(tar.location)


def test_an_error_names_the_image_inside_the_source(folder: Path, tmp_path: Path) -> None:
    (folder / "train" / class_name(1) / "000.JPEG").write_bytes(b"not an image")
    tar = TarSource.pack(folder / "train", tmp_path / "train.tar")
    options = ConversionOptions(data_path=folder, out_dir=tmp_path / "out", split="train", num_workers=1)
    with pytest.raises(Failure, match=rf"train\.tar/{class_name(1)}/000\.JPEG: not an image in a known format"):
        convert(options, sources={"train": tar})


def test_a_selection_has_the_chosen_images_in_the_chosen_order(folder: Path, tmp_path: Path) -> None:
    train = folder / "train"
    images: list[Source] = [scan(train, list_classes(train), all_classes=True), TarSource.pack(train, tmp_path / "tar")]
    for source in images:
        some = source.select([7, 2])
        assert [some.name(i) for i in range(len(some))] == [source.name(7), source.name(2)]
        assert [some.label(i) for i in range(len(some))] == [1, 0]
        assert some.read(1) == source.read(2)
    assert isinstance(images[0], ImageFolder)


@pytest.mark.parametrize("seconds", [0, 0.02])
def test_results_of_threads_keep_the_order_and_raise_the_first_error(seconds: float) -> None:
    def work(number: int) -> int:
        time.sleep(seconds)
        if number == 30:
            raise ValueError(str(number))
        return -number

    assert list(in_threads(work, [])) == []
    assert list(in_threads(work, range(30))) == [-number for number in range(30)]
    found: list[int] = []
    with pytest.raises(ValueError, match="30"):
        found.extend(in_threads(work, range(60)))
    assert len(found) == 30
