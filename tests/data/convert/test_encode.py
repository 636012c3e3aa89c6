"""Files of every kind -> RGB -> JPEG, without ffcv."""

from __future__ import annotations

import dataclasses
import io
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from support.imagefolder import draw_every_mode, draw_image

from ffcv_convnext.data.convert import ImageFolder
from ffcv_convnext.data.convert.encode import (
    EncodedImage,
    Encoding,
    ImageError,
    Rejected,
    Task,
    encode_content,
    encode_images,
    load_rgb,
    shrink,
    to_rgb,
)
from ffcv_convnext.data.convert.names import Names

ENCODING = Encoding(max_resolution=500, jpeg_quality=90, max_bytes=8 << 20)
LOSSY = (".jpg", ".JPEG")


def encode_all(folder: Path, *files: str) -> list[EncodedImage | Rejected]:
    images = ImageFolder(folder, ("only",), Names.of(files), np.zeros(len(files), np.int32))
    return encode_images(Task(images, [True] * len(files)), ENCODING)


def test_every_mode_is_converted_to_the_expected_rgb(tmp_path: Path) -> None:
    for name, expected in draw_every_mode(tmp_path).items():
        pixels = load_rgb(tmp_path / name)
        assert pixels.shape == expected.shape, name
        assert pixels.dtype == np.uint8, name
        tolerance = 12 if name.endswith(LOSSY) and name != "png_inside.JPEG" else 1
        assert np.abs(pixels.astype(int) - expected).max() <= tolerance, name


@pytest.mark.parametrize("mode", ["RGBX", "YCbCr", "HSV", "PA", "RGBa", "La", "I;16L", "I;16N"])
def test_rare_modes_are_converted(mode: str) -> None:
    assert to_rgb(Image.new(mode, (3, 2))).mode == "RGB"


def test_transparent_grey_of_16_bits_is_white(tmp_path: Path) -> None:
    grey = np.full((4, 4), 1000, dtype=np.uint16)
    grey[0] = 30000
    Image.fromarray(grey).save(tmp_path / "key.png", transparency=1000)
    pixels = load_rgb(tmp_path / "key.png")
    assert pixels[0, 0].tolist() == [117] * 3
    assert pixels[1, 0].tolist() == [255] * 3


def test_colour_of_16_bits_keeps_its_high_byte(tmp_path: Path) -> None:
    rgb = draw_image(1, 2, (8, 8))
    cv2.imwrite(str(tmp_path / "rgb16.png"), rgb[..., ::-1].astype(np.uint16) * 257)
    assert np.array_equal(load_rgb(tmp_path / "rgb16.png"), rgb)


def bomb(path: Path) -> None:
    """A PNG of 68 bytes that claims 40000 x 40000 pixels."""
    Image.new("L", (1, 1)).save(path, format="PNG")
    content = bytearray(path.read_bytes())
    content[16:24] = struct.pack(">II", 40000, 40000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    path.write_bytes(content)


def truncated(path: Path) -> None:
    Image.effect_noise((200, 200), 100).save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:-5000])


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (truncated, "truncated"),
        (bomb, "could be decompression bomb"),
        (lambda path: path.write_text("not an image"), "not an image in a known format"),
        (lambda path: path.write_bytes(b""), "not an image in a known format"),
        (lambda path: Image.new("F", (4, 4)).save(path, format="TIFF"), "mode F"),
        (lambda path: Image.new("LAB", (4, 4)).save(path, format="TIFF"), "mode LAB"),
        (lambda path: Image.new("I", (4, 4), 70000).save(path, format="TIFF"), "grey values from 70000 to 70000"),
    ],
)
def test_a_file_without_an_image_gives_the_reason_and_does_not_affect_others(tmp_path: Path, write, reason) -> None:
    write(tmp_path / "bad.jpg")
    Image.fromarray(draw_image(0, 0, (64, 48))).save(tmp_path / "good.jpg")
    with pytest.raises(ImageError, match=reason):
        load_rgb(tmp_path / "bad.jpg")
    bad, good = encode_all(tmp_path, "bad.jpg", "good.jpg")
    assert isinstance(bad, Rejected)
    assert bad.skippable
    assert good[:2] == (64, 48)


def test_a_file_that_cannot_be_read_is_not_skippable(tmp_path: Path) -> None:
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere")
    assert encode_all(tmp_path, "gone.jpg") == [Rejected("cannot be read: No such file or directory", skippable=False)]


def png(pixels: NDArray[np.uint8]) -> bytes:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, format="PNG")
    return content.getvalue()


def test_a_side_above_the_jpeg_limit_needs_max_resolution() -> None:
    wide = png(np.zeros((2, 65501, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match=r"65501 x 2 pixels.*max_resolution"):
        encode_content(wide, dataclasses.replace(ENCODING, max_resolution=None))
    assert encode_content(wide, ENCODING)[:2] == (500, 1)  # FFCV's own resize fails here: the short side would be 0


@pytest.mark.parametrize(("compress", "kind"), [(True, "JPEG takes 0.0 MiB"), (False, "raw pixels take 0.0 MiB")])
def test_an_image_larger_than_a_page_names_both_sizes(compress: bool, kind: str) -> None:
    noise = png(np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8))
    with pytest.raises(ImageError, match=rf"{kind}.*max_resolution or --jpeg_quality"):
        encode_content(noise, dataclasses.replace(ENCODING, max_bytes=1000), compress=compress)


def test_small_images_are_not_enlarged() -> None:
    small = draw_image(0, 0, (30, 20))
    assert shrink(small, 500) is small
    assert shrink(draw_image(0, 0, (300, 200)), 150).shape == (100, 150, 3)
