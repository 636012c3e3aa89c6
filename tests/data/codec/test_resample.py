"""The conversion's resize against Pillow's, bit for bit, and without numba."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
from contextlib import suppress

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images

from ffcv_convnext.data.codec.recompress import reencode
from ffcv_convnext.data.codec.resample import filter_weights, resample
from ffcv_convnext.data.convert.encode import Encoding, encode_content

Pixels = NDArray[np.uint8]
PILLOW_S = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
KINDS = pytest.mark.parametrize("kind", PILLOW_S)
Box = tuple[float, float]


@pytest.fixture(scope="module")
def pictures() -> list[Pixels]:
    """Photographs of 640 x 427, and noise, whose edges are the hardest ones; RGB and grey.

    Those of scikit-image too, where it is installed.
    """
    noise = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    extremes = np.where(noise > 127, np.uint8(255), np.uint8(0))
    colour = [*load_sample_images().images, noise, extremes]
    with suppress(ImportError):
        from skimage import data

        colour += [data.astronaut(), data.chelsea()]
    return [*colour, *(np.ascontiguousarray(each[..., 1]) for each in colour)]


def pillow_s(image: Pixels, size: tuple[int, int], kind: str, extent: Box | None = None) -> Pixels:
    """Horizontal pass, then vertical pass, as two resizes: Pillow 13 may choose the other order for one."""
    height, width = image.shape[:2]
    across, down = extent or (width, height)
    narrow = Image.fromarray(image).resize((size[0], height), PILLOW_S[kind], (0, 0, across, height))
    return np.asarray(narrow.resize(size, PILLOW_S[kind], (0, 0, size[0], down)))


@KINDS
def test_any_size_and_part_equals_pillow_s(pictures: list[Pixels], kind: str) -> None:
    """From enlarging 40-fold to shrinking 400-fold; sides of one pixel and parts that end inside a pixel included."""
    random = np.random.default_rng(1)
    for i in range(300):
        picture = pictures[i % len(pictures)]
        height, width = (int(np.exp(random.uniform(0, np.log(side + 1)))) for side in picture.shape[:2])
        size = tuple(int(np.exp(random.uniform(0, np.log(520)))) for _ in range(2))
        part = picture[:height, :width]  # a view: its rows are not contiguous
        extent = None if i % 2 else (width - random.uniform(0, 0.99), height - random.uniform(0, 0.99))
        found, expected = resample(part, size, kind, extent), pillow_s(part, size, kind, extent)
        assert np.array_equal(found, expected), (part.shape, size, extent)
        assert found.flags.c_contiguous


@pytest.mark.parametrize("longest", [500, 499, 320, 256, 64, 1])
def test_a_photograph_that_keeps_its_shape_equals_one_resize_of_pillow(pictures: list[Pixels], longest: int) -> None:
    for picture in pictures:
        height, width = picture.shape[:2]
        size = max(1, width * longest // 640), max(1, height * longest // 640)
        expected = np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BICUBIC))
        assert np.abs(resample(picture, size).astype(int) - expected).max() <= 1  # Pillow 13 may begin with the height
        assert np.array_equal(resample(picture, size), pillow_s(picture, size, "bicubic"))


@KINDS
@pytest.mark.parametrize("shape", [(1, 1), (1, 20_000), (20_000, 1), (63, 65), (64, 64), (65, 21), (3, 9000, 3)])
def test_narrow_strips_and_sizes_around_a_block_equal_pillow_s(kind: str, shape: tuple[int, ...]) -> None:
    strip = np.random.default_rng(2).integers(0, 256, shape, dtype=np.uint8)
    for size in ((1, 1), (48, 32), (64, 65), shape[1::-1]):
        assert np.array_equal(resample(strip, size, kind), pillow_s(strip, size, kind)), size


@KINDS
def test_weights_are_those_of_the_loader_s_resize(kind: str) -> None:
    loader_s = pytest.importorskip("ffcv_convnext.data.codec.resize")
    code = {"bilinear": loader_s.BILINEAR, "bicubic": loader_s.BICUBIC}[kind]
    for size, out in [(1, 1), (1, 9), (500, 224), (1333, 500), (224, 500), (7, 3)]:
        ours, theirs = filter_weights(size, float(size), out, kind), loader_s.filter_weights(size, out, 0, out, code)
        assert np.array_equal(ours.starts, theirs[0])
        assert np.array_equal(ours.lengths, theirs[1])
        assert np.array_equal(ours.values, theirs[2][:, : ours.values.shape[1]])


def test_the_image_is_left_untouched(pictures: list[Pixels]) -> None:
    before = pictures[0].copy()
    resample(pictures[0], (100, 50))
    assert np.array_equal(pictures[0], before)


@pytest.mark.parametrize(
    ("image", "size", "extent"),
    [
        (np.zeros((4, 4), np.float32), (2, 2), None),
        (np.zeros((4, 4, 4), np.uint8), (2, 2), None),
        (np.zeros((4,), np.uint8), (2, 2), None),
        (np.zeros((4, 4), np.uint8), (0, 2), None),
        (np.zeros((4, 4), np.uint8), (2, 2), (5.0, 4.0)),
        (np.zeros((4, 4), np.uint8), (2, 2), (4.0, 0.0)),
        (np.zeros((0, 4), np.uint8), (2, 2), None),
    ],
)
def test_what_it_cannot_resize_is_an_error(image: NDArray[np.generic], size: tuple[int, int], extent: Box) -> None:
    with pytest.raises(ValueError, match=r"expected \(height, width|impossible"):
        resample(image, size, "bicubic", extent)


def test_the_bytes_are_the_same_on_every_processor() -> None:
    """Integers and separately rounded float64 only: a digest that any machine must find."""
    line = (np.arange(300 * 401, dtype=np.uint64) * 2654435761 >> 13).astype(np.uint8)
    found = resample(line.reshape(300, 401), (187, 140), "bicubic", (400.5, 299.5))
    assert hashlib.sha256(found.tobytes()).hexdigest()[:16] == "9c0577e309821de6"


@pytest.mark.parametrize("quality", [90, "original"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P"])
def test_a_conversion_s_pixels_are_within_one_level_of_pillow_s(pictures: list[Pixels], mode: str, quality) -> None:
    """The bytes of a JPEG that is encoded again are those with Pillow's planes; other modes are resized as RGB."""
    from ffcv_convnext.data.convert.encode import load_rgb

    content = io.BytesIO()
    Image.fromarray(pictures[0]).convert(mode).save(content, "PNG" if mode == "P" else "JPEG", quality=95)
    encoding = Encoding(max_resolution=300, jpeg_quality=quality, max_bytes=8 << 20)
    image = encode_content(content.getvalue(), encoding, compress=False)
    assert (image.width, image.height) == (300, 200)
    rgb = Image.fromarray(load_rgb(io.BytesIO(content.getvalue())))
    expected = np.asarray(rgb.resize((300, 200), Image.Resampling.BICUBIC)).astype(int)
    found = np.frombuffer(image.data, np.uint8).reshape(200, 300, 3)
    assert np.abs(found - expected).max() <= 1


def test_a_shrunk_jpeg_has_the_bytes_of_pillow_s_resize(pictures: list[Pixels], monkeypatch) -> None:
    from ffcv_convnext.data.codec import resample as module

    for number, (width, height) in enumerate([(640, 427), (639, 425), (301, 127), (640, 3)]):
        content = io.BytesIO()
        Image.fromarray(pictures[0][:height, :width]).save(content, "JPEG", quality=95, subsampling=number % 3)
        ours = reencode(content.getvalue(), 200, 90, "420")
        with monkeypatch.context() as patch:
            patch.setattr(module, "resample", pillow_s)
            assert reencode(content.getvalue(), 200, 90, "420") == ours


def test_a_worker_needs_no_numba_to_shrink() -> None:
    code = """
import sys, numpy as np
from ffcv_convnext.data.codec.resample import resample
resample(np.zeros((40, 60, 3), np.uint8), (30, 20))
print([name for name in ("numba", "torch", "ffcv", "cv2") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"
