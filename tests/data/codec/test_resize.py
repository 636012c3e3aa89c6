"""Our resize against Pillow's, bit for bit, on photographs."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

resize_module = pytest.importorskip("ffcv_convnext.data.codec.resize")
BICUBIC, BILINEAR = resize_module.BICUBIC, resize_module.BILINEAR
PILLOW_S = {BICUBIC: Image.Resampling.BICUBIC, BILINEAR: Image.Resampling.BILINEAR}
KINDS = pytest.mark.parametrize("kind", [BICUBIC, BILINEAR], ids=["bicubic", "bilinear"])

Pixels = NDArray[np.uint8]


@pytest.fixture(scope="module")
def photographs() -> list[Pixels]:
    """Two photographs of 640 x 427, and noise, whose edges are the hardest ones."""
    datasets = pytest.importorskip("sklearn.datasets")
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    extremes = np.where(noise > 127, np.uint8(255), np.uint8(0))
    return [*datasets.load_sample_images().images, noise, extremes]


def pillow_s(image: Pixels, height: int, width: int, kind: int) -> Pixels:
    """Horizontal pass, then vertical pass, as two resizes: Pillow 13 may choose the other order for one."""
    picture = Image.fromarray(image).resize((width, image.shape[0]), PILLOW_S[kind])
    return np.asarray(picture.resize((width, height), PILLOW_S[kind]))


def crops(photographs: list[Pixels], num: int, seed: int) -> Iterator[tuple[Pixels, int, int]]:
    """Crops of random size, and a size to resize each to: from enlarging 40-fold to shrinking 400-fold."""
    random = np.random.default_rng(seed)
    for i in range(num):
        photograph = photographs[i % len(photographs)]
        height, width = (int(np.exp(random.uniform(0, np.log(side + 1)))) for side in photograph.shape[:2])
        top, left = (
            int(random.integers(0, s - c + 1)) for s, c in zip(photograph.shape, (height, width), strict=False)
        )
        out_height, out_width = (int(np.exp(random.uniform(0, np.log(260)))) for _ in range(2))
        yield np.ascontiguousarray(photograph[top : top + height, left : left + width]), out_height, out_width


def windows(photographs: list[Pixels]) -> Iterator[tuple[Pixels, int, int, tuple[int, int, int, int]]]:
    """Crops with a size to resize to, and a random window (top, left, height, width) of that."""
    random = np.random.default_rng(3)
    for image, height, width in crops(photographs, 60, seed=4):
        rows, columns = (int(random.integers(1, side + 1)) for side in (height, width))
        top, left = int(random.integers(0, height - rows + 1)), int(random.integers(0, width - columns + 1))
        yield image, height, width, (top, left, rows, columns)


@KINDS
def test_one_pass_equals_pillow(photographs: list[Pixels], kind: int) -> None:
    for image, height, width in crops(photographs, 150, seed=1):
        rows, columns = image.shape[:2]
        wide, high = resize_module.resize(image, rows, width, kind), resize_module.resize(image, height, columns, kind)
        assert np.array_equal(wide, pillow_s(image, rows, width, kind)), (image.shape, width)
        assert np.array_equal(high, pillow_s(image, height, columns, kind)), (image.shape, height)


@KINDS
def test_both_passes_equal_pillow_s_horizontal_then_vertical_one(photographs: list[Pixels], kind: int) -> None:
    for image, height, width in crops(photographs, 200, seed=2):
        found = resize_module.resize(image, height, width, kind)
        assert np.array_equal(found, pillow_s(image, height, width, kind)), (image.shape, height, width)


@KINDS
@pytest.mark.parametrize("size", [(224, 224), (256, 383), (427, 640), (160, 160), (512, 512)])
def test_a_photograph_at_the_recipe_s_sizes_equals_one_resize_of_pillow(
    photographs: list[Pixels], kind: int, size: tuple[int, int]
) -> None:
    for photograph in photographs:
        expected = np.asarray(Image.fromarray(photograph).resize(size[::-1], PILLOW_S[kind]))
        assert np.array_equal(resize_module.resize(photograph, *size, kind), expected)


@KINDS
@pytest.mark.parametrize("flip", [False, True])
def test_a_window_is_the_crop_of_the_whole_resize_and_a_flip_its_mirror_image(
    photographs: list[Pixels], kind: int, flip: bool
) -> None:
    for image, height, width, window in windows(photographs):
        found = resize_module.resize(image, height, width, kind, window=window, flip=flip)
        top, left, rows, columns = window
        expected = resize_module.resize(image, height, width, kind)[top : top + rows, left : left + columns]
        assert np.array_equal(found, expected[:, ::-1] if flip else expected)


@KINDS
def test_a_window_needs_no_more_of_the_image_than_its_span(photographs: list[Pixels], kind: int) -> None:
    for image, height, width, (top, left, rows, columns) in windows(photographs):
        y, num_rows = resize_module.source_span(image.shape[0], height, top, rows, kind)
        x, num_columns = resize_module.source_span(image.shape[1], width, left, columns, kind)
        part = image[y : y + num_rows, x : x + num_columns]
        assert part.shape[:2] == (num_rows, num_columns), "the span lies inside the image"
        readable = np.zeros(part.size + 16, np.uint8)
        source = readable[: part.size].reshape(part.shape)
        source[:] = part
        found = np.full((rows, columns, 3), 7, np.uint8)
        scratch = np.empty(resize_module.scratch_size(*image.shape[:2], columns), np.uint8)
        in_size, out_size = image.shape[:2], (height, width)
        resize_module.resize_window(source, (y, x), in_size, out_size, (top, left), kind, False, scratch, found)
        whole = resize_module.resize(image, height, width, kind)
        assert np.array_equal(found, whole[top : top + rows, left : left + columns])


@KINDS
def test_resizing_writes_nothing_beside_its_scratch_and_destination(photographs: list[Pixels], kind: int) -> None:
    guard = 64
    for image, height, width in crops(photographs, 60, seed=5):
        readable = np.zeros(image.size + 16, np.uint8)
        source = readable[: image.size].reshape(image.shape)
        source[:] = image
        size = resize_module.scratch_size(*image.shape[:2], width)
        scratch, out = np.full(size + 2 * guard, 77, np.uint8), np.full(height * width * 3 + 2 * guard, 77, np.uint8)
        found = out[guard:-guard].reshape(height, width, 3)
        resize_module.resize_window(
            source, (0, 0), image.shape[:2], (height, width), (0, 0), kind, False, scratch[guard:-guard], found
        )
        for memory in (scratch, out):
            assert (memory[:guard] == 77).all()
            assert (memory[-guard:] == 77).all()
        assert np.array_equal(source, image)
        assert np.array_equal(found, pillow_s(image, height, width, kind))


@KINDS
@pytest.mark.parametrize("shape", [(10, 60_000), (15, 3000), (1, 20_000), (20_000, 1), (16, 5000), (17, 4)])
def test_a_very_narrow_strip_equals_pillow(kind: int, shape: tuple[int, int]) -> None:
    strip = np.random.default_rng(6).integers(0, 256, (*shape, 3), dtype=np.uint8)
    assert np.array_equal(resize_module.resize(strip, 48, 32, kind), pillow_s(strip, 48, 32, kind))


@KINDS
def test_a_view_into_a_larger_image_is_read_as_it_is(photographs: list[Pixels], kind: int) -> None:
    view = photographs[0][11:150, 7:200]
    assert not view.flags.c_contiguous
    assert np.array_equal(resize_module.resize(view, 32, 48, kind), pillow_s(view.copy(), 32, 48, kind))


@KINDS
def test_a_single_pixel_becomes_its_own_colour_everywhere(kind: int) -> None:
    pixel = np.array([[[1, 128, 255]]], dtype=np.uint8)
    assert (resize_module.resize(pixel, 5, 9, kind) == pixel).all()
    assert np.array_equal(resize_module.resize(pixel, 1, 1, kind), pixel)


@KINDS
def test_a_resize_to_one_pixel_equals_pillow(photographs: list[Pixels], kind: int) -> None:
    for photograph in photographs:
        assert np.array_equal(resize_module.resize(photograph, 1, 1, kind), pillow_s(photograph, 1, 1, kind))


@KINDS
def test_the_same_size_changes_nothing(photographs: list[Pixels], kind: int) -> None:
    for photograph in photographs:
        assert np.array_equal(resize_module.resize(photograph, *photograph.shape[:2], kind), photograph)
