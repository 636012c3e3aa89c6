"""Folders of images for the benchmarks."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from ffcv_convnext.bench.synthetic_data import find_photographs, image_folder


def longest_sides(folder: Path) -> list[int]:
    """Return the longest side of every JPEG in a folder, in ascending order."""
    sides = []
    for file in folder.rglob("*.jpg"):
        with Image.open(file) as image:
            sides.append(max(image.size))
    return sorted(sides)


def test_synthetic_images_have_the_sizes_of_imagenet(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "photos", 20, data_path=None, photographs=None, originals=False)
    assert longest_sides(folder / "train") == [500] * 20
    assert len(list((folder / "train").iterdir())) == 10
    pictures = find_photographs(folder)
    assert len(pictures) == 20
    again = image_folder(tmp_path / "again", 3, data_path=None, photographs=folder, originals=False)
    assert len(list(again.rglob("*.jpg"))) == 3, "cut from the pictures in the given folder"
    with pytest.raises(ValueError, match="no photographs found"):
        find_photographs(tmp_path / "nothing")
    (folder / "train" / "broken.jpg").write_bytes(b"no JPEG")
    with pytest.raises(ValueError, match=r"broken\.jpg is not a picture"):
        find_photographs(folder)


def test_a_tenth_of_the_originals_is_large(tmp_path: Path) -> None:
    folder = image_folder(tmp_path, 100, data_path=None, photographs=None, originals=True)
    large = [side for side in longest_sides(folder) if side > 500]
    assert 4 <= len(large) <= 20
    assert 1200 <= large[0] <= large[-1] <= 2000


def test_links_are_spread_over_the_classes_of_a_folder(tmp_path: Path) -> None:
    source = image_folder(tmp_path / "data", 40, data_path=None, photographs=None, originals=False)
    part = image_folder(tmp_path / "part", 20, data_path=source, photographs=None, originals=False)
    links = list(part.rglob("*.jpg"))
    assert len(links) == 20
    assert len({link.parent for link in links}) == 10
    assert all(link.is_symlink() and link.resolve().is_relative_to(source) for link in links)
