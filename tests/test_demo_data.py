"""The generated pictures of `make demo-ladder`: the same each time, and no class is known by its colours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapes_to_folder as shapes
from PIL import Image


def picture(shape: int, kind: str, number: int) -> np.ndarray:
    rng = np.random.default_rng((0, shape, shapes.TEXTURES.index(kind), number))
    return shapes.draw(shape, kind, shapes.outlines(), rng)


def test_the_folder_has_the_pictures_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "NUM_SHAPES", 2)
    monkeypatch.setattr(shapes, "NUM_TRAIN", 3)
    monkeypatch.setattr(shapes, "NUM_VAL", 1)
    assert shapes.write_folder(tmp_path / "out", seed=0) == {"train": 60, "val": 20}
    classes = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert classes == sorted(f"shape{number:02d}_{kind}" for number in (0, 1) for kind in shapes.TEXTURES)
    assert len(list((tmp_path / "out" / "val").glob("*/*.jpg"))) == 20
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    with pytest.raises(FileExistsError, match=r"thesis\.tex"):
        shapes.write_folder(tmp_path / "taken", seed=0)


def test_a_picture_is_the_same_each_time_and_pictures_differ() -> None:
    first = picture(3, "dots", 0)
    assert first.shape == (shapes.SIDE, shapes.SIDE, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, picture(3, "dots", 0))
    assert not np.array_equal(first, picture(3, "dots", 1))


def test_shapes_differ_by_more_than_a_pixel_at_every_rotation() -> None:
    """Otherwise two classes would be one."""
    radii = 28 * shapes.outlines()
    assert radii.shape == (shapes.NUM_SHAPES, 360)
    for i, one in enumerate(radii):
        for other in radii[:i]:
            assert min(np.abs(one - np.roll(other, shift)).max() for shift in range(0, 360, 5)) > 1


@pytest.mark.parametrize("kind", shapes.TEXTURES)
def test_a_texture_has_values_from_0_to_1(kind: str) -> None:
    along, across = np.meshgrid(np.linspace(-4, 4, 64), np.linspace(-4, 4, 64))
    values = shapes.texture(kind, along, across, np.random.default_rng(0))
    assert values.shape == along.shape
    assert values.min() >= 0
    assert values.max() <= 1
    assert values.std() > 0.1 or kind == "plain"


def test_an_unknown_texture_is_an_error() -> None:
    with pytest.raises(ValueError, match="plain, stripes"):
        shapes.texture("wool", np.zeros((2, 2)), np.zeros((2, 2)), np.random.default_rng(0))


def test_small_copies_of_the_pictures_do_not_tell_their_class() -> None:
    """The nearest mean of 8x8 copies is right for fewer than 1 in 4 of 20 classes: the rest is outline and texture."""
    classes = [(shape, kind) for shape in (0, 7, 12, 19) for kind in ("plain", "stripes", "checks", "rings", "clouds")]

    def small(shape: int, kind: str, number: int) -> np.ndarray:
        image = Image.fromarray(picture(shape, kind, number)).resize((8, 8), Image.Resampling.BOX)
        return np.asarray(image, np.float64).ravel()

    means = np.array([np.mean([small(*name, number) for number in range(12)], axis=0) for name in classes])
    found = [
        int(np.argmin(((means - small(*name, number)) ** 2).sum(axis=1))) == index
        for index, name in enumerate(classes)
        for number in range(12, 15)
    ]
    assert np.mean(found) < 0.25
