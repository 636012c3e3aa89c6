"""JPEGs encoded again from their planes: at least as close to their originals as through RGB."""

from __future__ import annotations

import io
import os
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_image

from ffcv_convnext.data.codec import turbojpeg
from ffcv_convnext.data.codec.recompress import reencode, restart_interval, shrunk_size
from ffcv_convnext.data.convert.encode import Encoding, encode_content

SUBSAMPLINGS = {"444": 0, "422": 1, "420": 2}  # Pillow's numbers


def jpeg(image: Image.Image, **options: object) -> bytes:
    content = io.BytesIO()
    image.save(content, format="JPEG", **options)
    return content.getvalue()


def pixels(content: bytes) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def psnr(ours: NDArray[np.uint8], theirs: NDArray[np.uint8]) -> float:
    """Peak signal-to-noise ratio, dB."""
    return float(10 * np.log10(255**2 / np.square(ours.astype(float) - theirs).mean()))


@pytest.fixture(scope="module")
def photograph() -> Image.Image:
    return Image.fromarray(load_sample_image("flower.jpg")).resize((600, 400))


@pytest.mark.parametrize("stored", SUBSAMPLINGS)
@pytest.mark.parametrize("original", SUBSAMPLINGS)
@pytest.mark.parametrize("size", [(600, 400), (597, 389)])
def test_encoded_anew_a_jpeg_is_as_near_to_its_original_as_through_rgb(
    photograph: Image.Image, size: tuple[int, int], original: str, stored: str
) -> None:
    source = jpeg(photograph.crop((0, 0, *size)), quality=92, subsampling=SUBSAMPLINGS[original])
    width, height, ours = reencode(source, None, 90, stored)
    assert (width, height) == size
    through_rgb = jpeg(Image.fromarray(pixels(source)), quality=90, subsampling=SUBSAMPLINGS[stored])
    gain = psnr(pixels(ours), pixels(source)) - psnr(pixels(through_rgb), pixels(source))
    assert gain > -0.1
    if original == stored == "420":
        assert gain > 1  # neither colour conversion nor resampled chroma


@pytest.mark.parametrize("original", SUBSAMPLINGS)
def test_a_shrunk_jpeg_is_nearer_to_the_antialiased_picture_than_area_averaging(
    photograph: Image.Image, original: str
) -> None:
    ours, area = shrunk(photograph.crop((0, 0, 597, 389)), original)
    assert ours > area


@pytest.mark.parametrize("original", SUBSAMPLINGS)
def test_decoding_at_half_the_size_costs_little(photograph: Image.Image, original: str) -> None:
    ours, area = shrunk(photograph.resize((1797, 1171), Image.Resampling.LANCZOS), original)
    assert ours > area - 0.5


def shrunk(image: Image.Image, original: str) -> tuple[float, float]:
    """How near a JPEG of the picture at 500 pixels is to what Pillow shrinks: ours, and by area averaging; dB."""
    import cv2

    source = jpeg(image, quality=92, subsampling=SUBSAMPLINGS[original])
    width, height, ours = reencode(source, 500, 95, "444")
    assert (width, height) == shrunk_size(*image.size, 500)
    exact = np.asarray(Image.fromarray(pixels(source)).resize((width, height), Image.Resampling.BICUBIC))
    area = cv2.resize(pixels(source), (width, height), interpolation=cv2.INTER_AREA)
    area_jpeg = jpeg(Image.fromarray(area), quality=95, subsampling=0)
    return psnr(pixels(ours), exact), psnr(pixels(area_jpeg), exact)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 9), (17, 16), (33, 1), (640, 2)])
@pytest.mark.parametrize("stored", SUBSAMPLINGS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_any_size_keeps_its_picture(photograph: Image.Image, size: tuple[int, int], stored: str, mode: str) -> None:
    source = jpeg(photograph.resize(size).convert(mode), quality=100)
    again = reencode(source, 600, 100, stored)
    assert again is not None
    assert again[:2] == shrunk_size(*size, 600)
    if max(size) <= 600:
        tolerance = 3 if mode == "L" else 60  # chroma of neighbouring pixels, twice subsampled
        assert np.abs(pixels(again[2]).astype(int) - pixels(source)).max() <= tolerance


def test_markers_never_straddle_rows(photograph: Image.Image) -> None:
    from ffcv_convnext.data.codec.crop import INTERVAL, MCU_WIDTH, read_layout

    for stored in SUBSAMPLINGS:
        for width in range(1, 600, 13):
            _, _, ours = reencode(jpeg(photograph.crop((0, 0, width, 20)), quality=80), None, 90, stored)
            layout = np.zeros(8, np.int64)
            assert read_layout(np.frombuffer(ours, np.uint8), layout)
            assert layout[INTERVAL] == restart_interval(width, layout[MCU_WIDTH])
            mcus_a_row = -(-width // layout[MCU_WIDTH])
            assert mcus_a_row % layout[INTERVAL] == 0


def ycck(image: Image.Image) -> bytes:
    return jpeg(image.convert("CMYK"))


def cut_off(image: Image.Image) -> bytes:
    return jpeg(image)[:-3000]


@pytest.mark.parametrize("make", [ycck, cut_off, lambda image: jpeg(image, keep_rgb=True), lambda _: b"\xff\xd8no"])
def test_what_is_unusual_or_damaged_is_left_to_the_usual_reader(
    photograph: Image.Image, make: Callable[[Image.Image], bytes]
) -> None:
    assert reencode(make(photograph), 500, 90, "420") is None


def test_a_library_that_ignores_the_wish_for_markers_is_noticed(photograph: Image.Image, monkeypatch) -> None:
    """libturbojpeg reads it from the environment, which a version could stop to do."""

    class Deaf(dict):
        def __setitem__(self, key: str, value: str) -> None:
            pass

    monkeypatch.setattr(turbojpeg.os, "environ", Deaf(os.environ))
    os.unsetenv("TJ_RESTART")
    with pytest.raises(RuntimeError, match="no restart markers"):
        reencode(jpeg(photograph), 500, 90, "420")


@pytest.mark.parametrize("stored", SUBSAMPLINGS)
def test_other_files_get_the_subsampling_too(photograph: Image.Image, stored: str) -> None:
    content = io.BytesIO()
    photograph.save(content, format="PNG")
    encoding = Encoding(max_resolution=300, jpeg_quality=90, subsampling=stored, max_bytes=8 << 20)
    for source in (content.getvalue(), jpeg(photograph)):
        header = turbojpeg.read_header(encode_content(source, encoding).data)
        assert header == (300, 200, stored)


def test_raw_pixels_are_those_of_the_file(photograph: Image.Image) -> None:
    encoding = Encoding(max_resolution=None, jpeg_quality=90, max_bytes=8 << 20)
    source = jpeg(photograph)
    image = encode_content(source, encoding, compress=False)
    assert (image.mode, image.width, image.height) == ("raw", 600, 400)
    assert np.array_equal(np.frombuffer(image.data, np.uint8).reshape(400, 600, 3), pixels(source))
