"""Image files of any kind -> 8-bit RGB -> the JPEG that goes into a .beton. Imports neither ffcv nor torch.

The worker processes of a conversion run `encode_files`, so what this file imports is what each of them loads.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_JPEG_SIDE = 65500  # libjpeg's limit, just below the 65535 that FFCV's sample table can hold
SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


class ImageError(ValueError):
    """A file that does not hold a picture we can store. The message is the reason, without the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How pictures are stored."""

    max_resolution: int | None  # longest side, pixels; larger pictures are shrunk, none: all keep their size
    jpeg_quality: int  # 1 ... 100, libjpeg's scale
    max_bytes: int  # a picture lies in one page of the .beton, so it cannot be larger than a page


class EncodedImage(NamedTuple):
    """A picture as it lies in a .beton."""

    width: int
    height: int
    jpeg: bytes


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


def load_rgb(path: str | Path) -> NDArray[np.uint8]:
    """The file's (first) picture, shape (height, width, 3), uint8; the kind is told by content, not by name.

    Raises ImageError when the content is no complete picture or too large to be one (Pillow's limit against
    decompression bombs, 179 million pixels), OSError with its errno when the file cannot be read at all.
    """
    try:
        with Image.open(path) as image:
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
    """FFCV's resize on writing: longest side to max_resolution by area averaging, never enlarging.

    The same pixels as `ffcv.fields.rgb_image.resizer`, except that a side never gets shorter than one pixel.
    """
    size = np.array([pixels.shape[1], pixels.shape[0]])
    if max_resolution is None or size.max() <= max_resolution:
        return pixels
    width, height = np.maximum((max_resolution / size.max() * size).astype(int), 1)
    small: Any = cv2.resize(pixels, (int(width), int(height)), interpolation=cv2.INTER_AREA)
    return np.asarray(small, dtype=np.uint8)


def restart_interval(width: int, mcu_width: int = 16) -> int:
    """MCUs between restart markers, such that none straddles two rows of MCUs.

    width: of the picture, pixels.   mcu_width: pixels; 16 in 4:2:0 and 4:2:2, 8 in 4:4:4 and grey, 32 in 4:1:1.
    The least that is 32 to 64 pixels wide, else the widest from 16 pixels on, else (in a row of narrow MCUs that few
    numbers divide) the least above: markers every 8 pixels would make a file 10 to 17 % larger, which is not worth it.
    """
    mcus_a_row = -(-width // mcu_width)
    least, most = 32 // mcu_width, 64 // mcu_width
    below, above = range(least - 1, 16 // mcu_width - 1, -1), range(most + 1, mcus_a_row)
    wanted = (interval for interval in (*range(least, most + 1), *below, *above) if mcus_a_row % interval == 0)
    return next(wanted, mcus_a_row)


def encode(pixels: NDArray[np.uint8], encoding: Encoding) -> EncodedImage:
    """RGB pixels -> JPEG with restart markers; its pixels are those of what FFCV's own RGBImageField stores.

    The markers let a reader decode a crop alone (restart.py); any other reader takes no notice of them.
    Raises ImageError for a picture that does not fit the format.
    """
    pixels = shrink(pixels, encoding.max_resolution)
    height, width, _ = pixels.shape
    if max(width, height) > MAX_JPEG_SIDE:
        raise ImageError(f"{width} x {height} pixels: a JPEG's side ends at {MAX_JPEG_SIDE}; set --max_resolution")
    bgr = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)
    success, jpeg = cv2.imencode(
        ".jpg",
        bgr,
        [
            *(cv2.IMWRITE_JPEG_QUALITY, encoding.jpeg_quality),
            *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_420),
            *(cv2.IMWRITE_JPEG_RST_INTERVAL, restart_interval(width)),
        ],
    )
    if not success:
        raise ImageError(f"{width} x {height} pixels: OpenCV could not encode them")
    if jpeg.size > encoding.max_bytes:
        raise ImageError(
            f"{width} x {height} pixels: its JPEG takes {jpeg.size / 2**20:.1f} MiB, a page of the .beton holds "
            f"{encoding.max_bytes / 2**20:.0f} MiB; lower --max_resolution or --jpeg_quality"
        )
    return EncodedImage(width, height, jpeg.tobytes())


def encode_files(paths: Sequence[str], encoding: Encoding) -> list[EncodedImage | Rejected]:
    """Every file as a JPEG, or the reason why not: one unreadable file never costs its neighbours."""
    cv2.setNumThreads(1)  # the conversion runs a process per core already
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on odd EXIF and large pictures: nothing a user could act on
        return [_encode_file(path, encoding) for path in paths]


def _encode_file(path: str, encoding: Encoding) -> EncodedImage | Rejected:
    try:
        return encode(load_rgb(path), encoding)
    except ImageError as error:
        return Rejected(str(error), skippable=True)
    except MemoryError:
        return Rejected("not enough memory to decode it; lower --num_workers", skippable=False)
    except OSError as error:
        return Rejected(f"cannot be read: {error.strerror}", skippable=False)
