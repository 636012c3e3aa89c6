"""Encode a JPEG again, perhaps smaller, without leaving Y, Cb and Cr.

Most images of a data set are JPEGs and become JPEGs. Conversion through RGB would enlarge their chroma, convert colours
twice and shrink the chroma again: slower, and each step rounds. Here the planes are decoded as they are stored, resized
one by one if the image is too large, and encoded.
"""

from __future__ import annotations

import numpy as np

from ffcv_convnext.data.codec.turbojpeg import (
    REDUCTIONS,
    Plane,
    Subsampling,
    decode_planes,
    encode_planes,
    factors,
    plane_sizes,
    read_header,
)

_MAX_PIXELS = 89_478_485  # above it Pillow warns of a decompression bomb, or refuses
_GAP = 1.2  # decode at 1.2 times the final size or more; costs 0.4 dB on average against full size


def shrunk_size(width: int, height: int, max_resolution: int | None) -> tuple[int, int]:
    """Return width and height after shrinking the longest side to max_resolution pixels, rounded like FFCV.

    Never larger, and at least one pixel (FFCV's writer rounds down to 0).
    """
    size = np.array([width, height])
    if max_resolution is None or size.max() <= max_resolution:
        return width, height
    width, height = np.maximum((max_resolution / size.max() * size).astype(int), 1).tolist()
    return width, height


def restart_interval(width: int, mcu_width: int = 16) -> int:
    """Return the MCUs between restart markers, so that no segment crosses a row of MCUs.

    width: of the image, pixels.   mcu_width: pixels; 16 in 4:2:0 and 4:2:2, 8 in 4:4:4 and grey, 32 in 4:1:1.
    The narrowest segment of 32 to 64 pixels; otherwise the widest from 16 pixels on; otherwise (a row of narrow MCUs
    with few divisors) the narrowest above 64. Markers every 8 pixels would make a file 10 to 17 % larger.
    """
    mcus_a_row = -(-width // mcu_width)
    low, high = 32 // mcu_width, 64 // mcu_width
    below, above = range(low - 1, 16 // mcu_width - 1, -1), range(high + 1, mcus_a_row)
    divisors = (interval for interval in (*range(low, high + 1), *below, *above) if mcus_a_row % interval == 0)
    return next(divisors, mcus_a_row)


def reencode(
    jpeg: bytes, max_resolution: int | None, quality: int, subsampling: Subsampling
) -> tuple[int, int, bytes] | None:
    """Encode a JPEG again with restart markers; return width, height and bytes.

    max_resolution: longest side, pixels; a larger image is shrunk with an antialiased bicubic filter.
    Returns None for a JPEG that must be converted through RGB (CMYK, RGB, a rare subsampling) or for which libturbojpeg
    reports an error or a warning: then the caller reads it with Pillow.
    """
    header = read_header(jpeg)
    if header is None or header.width * header.height > _MAX_PIXELS:
        return None
    width, height = shrunk_size(header.width, header.height, max_resolution)
    longest, wanted_longest = max(header.width, header.height), max(width, height)
    reduction = next(r for r in REDUCTIONS if r == 1 or longest >= _GAP * r * wanted_longest)
    planes = decode_planes(jpeg, header, reduction)
    if planes is None:
        return None
    covered = (
        header.width / reduction,
        header.height / reduction,
    )  # the part of the luma plane that is image, not padding
    sizes = plane_sizes(width, height, subsampling)
    across, down = factors(header.subsampling)
    out_across, out_down = factors(subsampling)
    result = [_resize(planes[0], covered, (width, height), sizes[0])]
    if header.subsampling == "grey":
        result += [np.full(size[::-1], 128, np.uint8) for size in sizes[1:]]
    else:
        covered = covered[0] / across, covered[1] / down
        wanted = width / out_across, height / out_down
        result += [_resize(plane, covered, wanted, size) for plane, size in zip(planes[1:], sizes[1:], strict=True)]
    interval = restart_interval(width, 8 * out_across)
    return width, height, encode_planes(result, width, height, subsampling, quality, interval)


def _resize(plane: Plane, covered: tuple[float, float], wanted: tuple[float, float], size: tuple[int, int]) -> Plane:
    """Resize the first `covered` columns and rows of a plane to `wanted` ones, in a plane of `size`.

    Both may end inside a sample, as the chroma of an odd width does; the last sample is repeated beyond the edge.
    """
    height, width = plane.shape
    if covered == wanted:
        return _extend(plane[: size[1], : size[0]], size)
    scale = covered[0] / wanted[0], covered[1] / wanted[1]
    box = scale[0] * size[0], scale[1] * size[1]
    needed = int(np.ceil(box[0] - 1e-6)), int(np.ceil(box[1] - 1e-6))
    plane = _extend(plane[: min(height, needed[1]), : min(width, needed[0])], needed)
    if scale in ((2, 1), (1, 2), (2, 2)):  # chroma subsampled further: the mean, as in libjpeg
        import cv2  # imported late: few JPEGs need it, and it would slow down each worker's start

        small = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    else:
        from ffcv_convnext.data.codec.resample import resample  # imported late: large images only

        enlarging = min(scale) < 1  # chroma: decoders enlarge it with the triangle filter
        extent = min(box[0], needed[0]), min(box[1], needed[1])
        small = resample(plane, size, "bilinear" if enlarging else "bicubic", extent)
    return np.ascontiguousarray(small, dtype=np.uint8)


def _extend(plane: Plane, size: tuple[int, int]) -> Plane:
    """Repeat a plane's last column and row up to `size` (width, height); a plane of this size is returned as it is."""
    height, width = plane.shape
    if (width, height) == size:
        return plane
    return np.pad(plane, ((0, size[1] - height), (0, size[0] - width)), mode="edge")
