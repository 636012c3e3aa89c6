"""Image files of any kind -> the JPEG, or the raw pixels, that go into a .beton. Imports neither ffcv nor torch.

A JPEG of the usual kind is encoded anew from its planes (planes.py), or keeps its coefficients (transcode.py); any
other file becomes 8-bit RGB first.

The worker processes of a conversion run `encode_files`, so what this file imports is what each of them loads.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ffcv_convnext.data.beton import EncodedImage
from ffcv_convnext.data.codec.recompress import reencode, restart_interval, shrunk_size
from ffcv_convnext.data.codec.turbojpeg import MAX_JPEG_SIDE, Subsampling, factors, read_header

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
QUALITY_BESIDE_ORIGINALS = 95  # jpeg_quality original: of pictures that have to be encoded nevertheless
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


class ImageError(ValueError):
    """A file that does not hold a picture we can store. The message is the reason, without the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How pictures are stored."""

    max_resolution: int | None  # longest side, pixels; larger pictures are shrunk, none: all keep their size
    jpeg_quality: int | Literal["original"]  # 1 ... 100, libjpeg's scale; original: coefficients are kept
    max_bytes: int  # a picture lies in one page of the .beton, so it cannot be larger than a page
    subsampling: Subsampling = "420"

    @property
    def quality(self) -> int:
        """Of what is encoded anew."""
        return QUALITY_BESIDE_ORIGINALS if self.jpeg_quality == "original" else self.jpeg_quality


class Rejected(NamedTuple):
    """A file that gave no picture."""

    reason: str
    skippable: bool  # False: the disk or the memory failed, which says nothing about the file


def to_rgb(image: Image.Image) -> Image.Image:
    """Any picture as 8-bit RGB.

    Transparent pixels are laid on white, 16-bit grey is scaled (65535 -> 255, where Pillow's own conversion
    clips), CMYK goes Pillow's way (which undoes Adobe's inversion). EXIF rotation is not applied: torchvision's
    loader leaves pictures as they are stored, and so do the published recipes.
    Raises ImageError for a mode without a defined 8-bit scale, such as F (floating point).
    """
    if image.mode in SIXTEEN_BIT:
        return Image.fromarray(_grey16_to_8(image)).convert("RGB")
    if image.mode not in OPAQUE + TRANSPARENT:
        raise ImageError(f"pictures of mode {image.mode} have no defined conversion to 8-bit RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion Pillow has for this mode
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey16_to_8(image: Image.Image) -> NDArray[np.uint8]:
    """Grey of 16 bits, which Pillow also hands out in its 32-bit mode I, rounded to 8 bits."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"grey values from {grey.min()} to {grey.max()}: expected 16 bits (0 to 65535)")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[grey == key] = 65535  # PNG names one grey value as transparent; white is laid under it
    scaled: NDArray[np.uint8] = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    return scaled


def load_rgb(source: str | Path | BinaryIO) -> NDArray[np.uint8]:
    """A file's (first) picture, shape (height, width, 3), uint8; the kind is told by content, not by name.

    Raises ImageError when the content is no complete picture or too large to be one (Pillow's limit against
    decompression bombs, 179 million pixels), OSError with its errno when the file cannot be read at all.
    """
    try:
        with Image.open(source) as image:
            return np.asarray(to_rgb(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not a picture in a known format") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them stumble over
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


def shrink(pixels: NDArray[np.uint8], max_resolution: int | None) -> NDArray[np.uint8]:
    """Longest side to max_resolution with Pillow's antialiased bicubic filter, never enlarging.

    The size is that of FFCV's writer, except that a side never gets shorter than one pixel.
    """
    height, width, _ = pixels.shape
    size = shrunk_size(width, height, max_resolution)
    if size == (width, height):
        return pixels
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))


def encode(pixels: NDArray[np.uint8], encoding: Encoding) -> EncodedImage:
    """RGB pixels -> JPEG with restart markers; its pixels are those of what FFCV's own RGBImageField stores.

    The markers let a reader decode a crop alone (restart.py); any other reader takes no notice of them.
    Raises ImageError for a picture that does not fit the format.
    """
    import cv2  # JPEGs do without; it would cost each worker's start

    cv2.setNumThreads(1)  # the conversion runs a process per core already
    height, width, _ = pixels.shape
    _check_side(width, height)
    success, jpeg = cv2.imencode(
        ".jpg",
        cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR),
        [
            *(cv2.IMWRITE_JPEG_QUALITY, encoding.quality),
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{encoding.subsampling}")),
            *(cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval(width, 8 * factors(encoding.subsampling)[0])),
        ],
    )
    if not success:
        raise ImageError(f"{width} x {height} pixels: OpenCV could not encode them")
    return EncodedImage(width, height, jpeg.tobytes(), "jpg")


def encode_content(content: bytes, encoding: Encoding, *, compress: bool = True) -> EncodedImage:
    """A file's content as it is to be stored: a JPEG, or raw pixels where compress is False.

    Raises ImageError for what is no picture or does not fit the format.
    """
    image = _from_jpeg(content, encoding) if compress else None
    if image is None:
        pixels = shrink(load_rgb(io.BytesIO(content)), encoding.max_resolution)
        height, width, _ = pixels.shape
        image = encode(pixels, encoding) if compress else EncodedImage(width, height, pixels.tobytes(), "raw")
    _check_side(image.width, image.height)
    if len(image.data) > encoding.max_bytes:
        kind = "JPEG takes" if compress else "raw pixels take"
        raise ImageError(
            f"{image.width} x {image.height} pixels: its {kind} {len(image.data) / 2**20:.1f} MiB, a page of the "
            f".beton holds {encoding.max_bytes / 2**20:.0f} MiB; lower --max_resolution or --jpeg_quality"
        )
    return image


def _from_jpeg(content: bytes, encoding: Encoding) -> EncodedImage | None:
    """A JPEG of the usual kind without the way through RGB; None for anything else, damaged ones included."""
    if content[:2] != b"\xff\xd8" or (header := read_header(content)) is None:
        return None
    if encoding.jpeg_quality == "original":
        width, height = header.width, header.height
        if shrunk_size(width, height, encoding.max_resolution) == (width, height):
            from ffcv_convnext.data.codec.restart_markers import NotTranscodable, add_restart_markers  # imports numba

            try:
                return EncodedImage(width, height, add_restart_markers(content), "jpg", is_original=True)
            except NotTranscodable:
                pass
    again = reencode(content, encoding.max_resolution, encoding.quality, encoding.subsampling)
    return None if again is None else EncodedImage(*again, "jpg")


def _check_side(width: int, height: int) -> None:
    if max(width, height) > MAX_JPEG_SIDE:
        raise ImageError(f"{width} x {height} pixels: a JPEG's side ends at {MAX_JPEG_SIDE}; set --max_resolution")


def encode_files(files: Sequence[tuple[str, bool]], encoding: Encoding) -> list[EncodedImage | Rejected]:
    """Every (path, compress) as a picture, or the reason why not: one unreadable file never costs its neighbours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on odd EXIF and large pictures: nothing a user could act on
        return [_encode_file(path, encoding, compress) for path, compress in files]


def _encode_file(path: str, encoding: Encoding, compress: bool) -> EncodedImage | Rejected:
    try:
        with open(path, "rb") as file:
            content = file.read()
        return encode_content(content, encoding, compress=compress)
    except ImageError as error:
        return Rejected(str(error), skippable=True)
    except MemoryError:
        return Rejected("not enough memory to decode it; lower --num_workers", skippable=False)
    except OSError as error:
        return Rejected(f"cannot be read: {error.strerror}", skippable=False)
