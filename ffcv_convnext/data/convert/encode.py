"""Image files of any kind -> the JPEG, or the raw pixels, that a .beton stores. Imports neither ffcv nor torch.

A common JPEG is encoded again from its planes (recompress.py) or keeps its coefficients (restart_markers.py); any
other file is converted to 8-bit RGB first.

Worker processes run `encode_stamped`, so each of them loads what this file imports; what common JPEGs do not need is
imported late.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.data.beton import EncodedImage
from ffcv_convnext.data.codec.recompress import reencode, restart_interval, shrunk_size
from ffcv_convnext.data.codec.turbojpeg import MAX_JPEG_SIDE, Subsampling, factors, read_header
from ffcv_convnext.data.convert.archives import ArchivedImages
from ffcv_convnext.data.convert.source import Source, Stamp

if TYPE_CHECKING:
    from PIL import Image

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N", "I")
QUALITY_BESIDE_ORIGINALS = 95  # with jpeg_quality = original: of images that must be encoded
OPAQUE = ("1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")


class ImageError(ValueError):
    """A file without an image that a .beton can store. The message is the reason, without the path."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Encoding:
    """How images are stored."""

    max_resolution: int | None  # longest side, pixels; larger images are shrunk; none: all keep their size
    jpeg_quality: int | Literal["original"]  # 1 ... 100, libjpeg's scale; original: coefficients are kept
    max_bytes: int  # page size of the .beton; an image cannot be larger than a page
    subsampling: Subsampling = "420"

    @property
    def quality(self) -> int:
        """Quality of JPEGs that are encoded again."""
        return QUALITY_BESIDE_ORIGINALS if self.jpeg_quality == "original" else self.jpeg_quality


class Rejected(NamedTuple):
    """A file that could not be encoded."""

    reason: str
    skippable: bool  # False: the disk or the memory failed; the file may be good


class Task(NamedTuple):
    """Images for one call of `encode_images`."""

    images: Source
    compress: list[bool]  # for each image: JPEG, or raw pixels


class Encoded(NamedTuple):
    """The answer to a task."""

    images: list[EncodedImage | Rejected]
    stamps: list[Stamp]  # of the source file of each image


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any image to 8-bit RGB.

    Transparent pixels become white in proportion to their transparency; 16-bit grey is scaled (65535 -> 255; Pillow's
    own conversion clips); CMYK is converted by Pillow, which undoes Adobe's inversion. EXIF rotation is not applied,
    as in torchvision's loader and the published recipes.
    Raises ImageError for a mode without a defined 8-bit scale, such as F (floating point).
    """
    from PIL import Image

    if image.mode in SIXTEEN_BIT:
        return Image.fromarray(_grey16_to_8(image)).convert("RGB")
    if image.mode not in OPAQUE + TRANSPARENT:
        raise ImageError(f"images of mode {image.mode} have no defined conversion to 8-bit RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":
        image = image.convert("LA")  # the only conversion Pillow has for this mode
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")


def _grey16_to_8(image: Image.Image) -> NDArray[np.uint8]:
    """Round 16-bit grey, which Pillow may also return in its 32-bit mode I, to 8 bits."""
    grey = np.asarray(image).astype(np.int64)
    if grey.min() < 0 or grey.max() > 65535:
        raise ImageError(f"grey values from {grey.min()} to {grey.max()}: expected 16 bits (0 to 65535)")
    key = image.info.get("transparency")
    if isinstance(key, int):
        grey[grey == key] = 65535  # a PNG may declare one grey value transparent
    scaled: NDArray[np.uint8] = ((grey * 255 + 32767) // 65535).astype(np.uint8)
    return scaled


def load_rgb(source: str | Path | BinaryIO) -> NDArray[np.uint8]:
    """Return a file's (first) image, shape (height, width, 3), uint8. Its content decides the format, not its name.

    Raises ImageError if the content is not a complete image or larger than Pillow's limit against decompression bombs
    (179 million pixels), OSError with its errno if the file cannot be read.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(source) as image:
            return np.asarray(to_rgb(image))
    except (ImageError, MemoryError):
        raise
    except UnidentifiedImageError:
        raise ImageError("not an image in a known format") from None
    except Exception as error:  # Pillow's readers raise many types for damaged files
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ImageError(" ".join(str(error).split()) or type(error).__name__) from error


def shrink(pixels: NDArray[np.uint8], max_resolution: int | None) -> NDArray[np.uint8]:
    """Shrink the longest side to max_resolution with the antialiased bicubic filter of Pillow; never enlarge.

    The size is that of FFCV's writer, except that a side has at least one pixel.
    """
    height, width, _ = pixels.shape
    size = shrunk_size(width, height, max_resolution)
    if size == (width, height):
        return pixels
    from ffcv_convnext.data.codec.resample import resample

    return resample(pixels, size)


def encode(pixels: NDArray[np.uint8], encoding: Encoding) -> EncodedImage:
    """Encode RGB pixels as a JPEG with restart markers. It decodes to the same pixels as FFCV's RGBImageField.

    The markers let a reader decode only a crop (crop.py); other readers ignore them.
    Raises ImageError for an image that does not fit the format.
    """
    import cv2

    cv2.setNumThreads(1)  # the conversion already runs one process per core
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
    """Encode a file's content as a JPEG, or as raw pixels if `compress` is False.

    Raises ImageError for content that is not an image or does not fit the format.
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
            f"{image.width} x {image.height} pixels: its {kind} {len(image.data) / 2**20:.1f} MiB, but a page of "
            f"the .beton has {encoding.max_bytes / 2**20:.0f} MiB; lower --max_resolution or --jpeg_quality"
        )
    return image


def _from_jpeg(content: bytes, encoding: Encoding) -> EncodedImage | None:
    """Encode a common JPEG without converting it to RGB. Return None for other files and damaged JPEGs."""
    if content[:2] != b"\xff\xd8" or (header := read_header(content)) is None:
        return None
    if encoding.jpeg_quality == "original":
        width, height = header.width, header.height
        if shrunk_size(width, height, encoding.max_resolution) == (width, height):
            from ffcv_convnext.data.codec.restart_markers import NotTranscodable, add_restart_markers

            try:
                return EncodedImage(width, height, add_restart_markers(content), "jpg", is_original=True)
            except NotTranscodable:
                pass
    again = reencode(content, encoding.max_resolution, encoding.quality, encoding.subsampling)
    return None if again is None else EncodedImage(*again, "jpg")


def _check_side(width: int, height: int) -> None:
    if max(width, height) > MAX_JPEG_SIDE:
        raise ImageError(
            f"{width} x {height} pixels: a side of a JPEG has at most {MAX_JPEG_SIDE}; set --max_resolution"
        )


def encode_images(task: Task, encoding: Encoding) -> list[EncodedImage | Rejected]:
    """Encode each image, or return why it cannot be encoded; a bad file does not affect the others."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow on unusual EXIF and large images: nothing a user can act on
        return [_encode(task.images, index, compress, encoding) for index, compress in enumerate(task.compress)]


def encode_stamped(task: Task, encoding: Encoding) -> Encoded:
    """Encode images as `encode_images` does, with the state of each source file before it was read."""
    stamps = [task.images.stamp(index) for index in range(len(task.images))]
    return Encoded(encode_images(task, encoding), stamps)


def _encode(images: Source, index: int, compress: bool, encoding: Encoding) -> EncodedImage | Rejected:
    try:
        return encode_content(images.read(index), encoding, compress=compress)
    except ImageError as error:
        archive = images.archive_of(index) if isinstance(images, ArchivedImages) else str(images.location)
        return Rejected(str(error) if archive == str(images.location) else f"{error} (in {archive})", skippable=True)
    except MemoryError:
        return Rejected("not enough memory to decode it; lower --num_workers", skippable=False)
    except OSError as error:
        return Rejected(f"cannot be read: {error.strerror or error}", skippable=False)
