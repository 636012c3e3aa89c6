"""A JPEG encoded anew, perhaps smaller, without leaving Y, Cb and Cr.

Most pictures of a folder are JPEGs and become JPEGs. Going through RGB would enlarge their chroma, convert colours
twice and shrink the chroma again: slower, and each step rounds. Here the planes are taken as they are stored, resized
one by one where the picture is too large, and encoded.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

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

_GAP = 1.2  # a picture is decoded at 1.2 times its final size or more; that costs 0.4 dB on average


def shrunk_size(width: int, height: int, max_resolution: int | None) -> tuple[int, int]:
    """Width and height after shrinking the longest side to max_resolution pixels, as FFCV's writer rounds them.

    Never larger; a side never gets shorter than one pixel, where FFCV's would become none.
    """
    size = np.array([width, height])
    if max_resolution is None or size.max() <= max_resolution:
        return width, height
    width, height = np.maximum((max_resolution / size.max() * size).astype(int), 1).tolist()
    return width, height


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


def reencode(
    jpeg: bytes, max_resolution: int | None, quality: int, subsampling: Subsampling
) -> tuple[int, int, bytes] | None:
    """Width, height and bytes of the JPEG, encoded again with restart markers.

    max_resolution: longest side, pixels; a larger picture is shrunk with an antialiased bicubic filter.
    None for a JPEG that has to go through RGB (CMYK, RGB, a subsampling that nobody uses) or that libturbojpeg
    complains of: then the caller's usual reader decides what it is.
    """
    header = read_header(jpeg)
    if header is None or header.width * header.height > (Image.MAX_IMAGE_PIXELS or 0):
        return None
    width, height = shrunk_size(header.width, header.height, max_resolution)
    longest, wanted_longest = max(header.width, header.height), max(width, height)
    reduction = next(r for r in REDUCTIONS if r == 1 or longest >= _GAP * r * wanted_longest)
    planes = decode_planes(jpeg, header, reduction)
    if planes is None:
        return None
    covered = header.width / reduction, header.height / reduction  # what of the luma plane is picture, not padding
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
    """Map the first `covered` columns and rows of a plane to `wanted` ones, in a plane of `size`.

    Both may end inside a sample, as the chroma of an odd width does; the last sample is repeated beyond the edge.
    """
    height, width = plane.shape
    if covered == wanted:
        return _extend(plane[: size[1], : size[0]], size)
    scale = covered[0] / wanted[0], covered[1] / wanted[1]
    box = scale[0] * size[0], scale[1] * size[1]
    needed = int(np.ceil(box[0] - 1e-6)), int(np.ceil(box[1] - 1e-6))
    plane = _extend(plane[: min(height, needed[1]), : min(width, needed[0])], needed)
    if scale in ((2, 1), (1, 2), (2, 2)):  # chroma subsampled further: the mean, as libjpeg does it
        import cv2  # few JPEGs need it, and it would cost each worker's start

        small = cv2.resize(plane, size, interpolation=cv2.INTER_AREA)
    else:
        limits = (0, 0, min(box[0], needed[0]), min(box[1], needed[1]))
        enlarging = min(scale) < 1  # chroma: the triangle filter is what decoders enlarge it with
        kind = Image.Resampling.BILINEAR if enlarging else Image.Resampling.BICUBIC
        small = np.asarray(Image.fromarray(plane).resize(size, kind, limits))
    return np.ascontiguousarray(small, dtype=np.uint8)


def _extend(plane: Plane, size: tuple[int, int]) -> Plane:
    """The plane with its last column and row repeated up to `size` (width, height)."""
    height, width = plane.shape
    if (width, height) == size:
        return np.ascontiguousarray(plane)
    return np.pad(plane, ((0, size[1] - height), (0, size[0] - width)), mode="edge")
