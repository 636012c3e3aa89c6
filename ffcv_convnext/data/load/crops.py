"""Compiled kernels that decode a crop of each stored image: random crops for training, central ones for evaluation.

Crop, flip and interpolation of a training sample are drawn from (seed, epoch, sample, copy), so they do not depend on
threads, processes or earlier batches. A kernel is a function of this module and everything that differs between runs
is an argument of it. So its compiled code is cached, and another loader or process does not compile again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton import JPG, RAW
from ffcv_convnext.data.codec.crop import HEIGHT, WIDTH, cut_jpeg, read_layout
from ffcv_convnext.data.codec.decode import OK, OUTSIDE_FILE, UNKNOWN_MODE, WRONG_SIZE, decode_jpeg
from ffcv_convnext.data.codec.jit import Bytes, Ints, jit
from ffcv_convnext.data.codec.resize import BICUBIC, BILINEAR, resize_window, scratch_size, source_span
from ffcv_convnext.data.codec.simd import LANES
from ffcv_convnext.data.load.sources import Stored
from ffcv_convnext.rng import PHILOX, Stream, philox_rounds

_PHILOX = tuple(np.uint64(x) for x in PHILOX)
_MASK, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_CROP, _FLIP, _INTERPOLATION = (np.uint64(s << 16) for s in (Stream.CROP, Stream.FLIP, Stream.INTERPOLATION))
_NUM_TRIES = 10  # as in torchvision's RandomResizedCrop

_philox = jit(philox_rounds)


class Chunk(NamedTuple):
    """The part of a batch that one call of a kernel decodes."""

    indices: NDArray[np.int64]  # (n,) samples
    copies: NDArray[np.int64]  # (n,)
    images: NDArray[np.uint8]  # (n, size, size, 3), result
    status: NDArray[np.int32]  # (n,), result: OK or another value of codec/decode.py; the image is valid if it is OK


class Key(NamedTuple):
    """What random draws depend on besides sample and copy."""

    seed: np.uint64
    epoch: np.uint64


class RandomCrop(NamedTuple):
    """Parameters of `decode_random_crops`."""

    min_scale: float  # area of the crop as a share of the image
    max_scale: float
    min_ratio: float  # aspect ratio of the crop, width / height
    max_ratio: float
    hflip: float  # probability of a horizontal flip
    bicubic_share: float  # probability of the bicubic filter; otherwise bilinear


class CenterCrop(NamedTuple):
    """Parameters of `decode_center_crops`."""

    side: int  # of the resized image before the crop, pixels: the short one, or both if it is warped
    warp: bool  # resize to a square
    bicubic: bool  # otherwise bilinear


class Scratch(NamedTuple):
    """Memory that a thread reuses for every image."""

    pixels: NDArray[np.uint8]  # the decoded part; resize reads up to 16 bytes beyond it
    resize: NDArray[np.uint8]
    jpeg: NDArray[np.uint8]  # a JPEG cut out of a larger one
    segments: NDArray[np.int64]  # where its segments end
    layout: NDArray[np.int64]  # see codec.crop.read_layout


@dataclass(frozen=True, slots=True)
class CropKernel:
    """A kernel with its parameters."""

    size: int  # side of the largest result, pixels
    decode: Any  # decode_random_crops or decode_center_crops, compiled
    parameters: RandomCrop | CenterCrop

    def scratch_sizes(self, rows: NDArray[Any], max_bytes: int) -> dict[str, tuple[int, type]]:
        """Return length and dtype of each array of a thread's Scratch.

        rows: of the file's sample table, with height and width.   max_bytes: of its largest stored image.
        """
        height, width = int(rows["height"].max()), int(rows["width"].max())
        largest = int(np.multiply(rows["height"], rows["width"], dtype=np.uint32).max())
        return {
            "pixels": (3 * largest + LANES, np.uint8),
            "resize": (scratch_size(height, width, self.size), np.uint8),
            "jpeg": (max_bytes, np.uint8),
            "segments": ((height // 8 + 1) * (width // 8 + 1) + 1, np.int64),
            "layout": (8, np.int64),
        }


def random_crop_kernel(config: DataConfig) -> CropKernel:
    """Return the training kernel: a random resized crop, perhaps mirrored."""
    bicubic_share = {"bicubic": 1.0, "bilinear": 0.0, "random": 0.5}[config.train_interpolation]
    parameters = RandomCrop(*config.scale, *config.ratio, config.hflip, bicubic_share)
    return CropKernel(config.max_train_size, decode_random_crops, parameters)


def center_crop_kernel(config: DataConfig) -> CropKernel:
    """Return the evaluation kernel: resize by the short side or to a square, then crop, as in torchvision."""
    parameters = CenterCrop(config.eval_side, config.eval_warps, config.eval_interpolation == "bicubic")
    return CropKernel(config.test_size, decode_center_crops, parameters)


@jit
def uniforms(key: Key, sample: Any, copy: Any, block: np.uint64) -> tuple[float, float, float, float]:
    """Draw four numbers in [0, 1): the compiled twin of rng.uniform(rng.sample_words(...))."""
    sample, copy = np.uint64(sample), np.uint64(copy)
    a, b, c, d = _philox(
        sample & _MASK, key.epoch & _MASK, block, copy & _MASK, key.seed & _MASK, (key.seed >> _32) & _MASK, _PHILOX
    )
    eight, unit = np.uint64(8), 2.0**-24
    return (a >> eight) * unit, (b >> eight) * unit, (c >> eight) * unit, (d >> eight) * unit


@jit
def random_crop(
    key: Key, sample: int, copy: int, height: int, width: int, crop: RandomCrop
) -> tuple[int, int, int, int]:
    """Draw a random resized crop's box in an image, as torchvision's RandomResizedCrop does.

    height, width: of the image, pixels.   crop: a RandomCrop.   Returns top, left, height, width in pixels.
    """
    for attempt in range(_NUM_TRIES):
        u_area, u_ratio, u_top, u_left = uniforms(key, sample, copy, _CROP + np.uint64(attempt))
        area = height * width * (crop.min_scale + u_area * (crop.max_scale - crop.min_scale))
        aspect = np.exp(np.log(crop.min_ratio) + u_ratio * (np.log(crop.max_ratio) - np.log(crop.min_ratio)))
        w = int(np.rint(np.sqrt(area * aspect)))
        h = int(np.rint(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = height, width
    if width < crop.min_ratio * height:
        h = min(height, int(np.rint(width / crop.min_ratio)))
    elif width > crop.max_ratio * height:
        w = min(width, int(np.rint(height * crop.max_ratio)))
    return (height - h) // 2, (width - w) // 2, h, w


@jit
def stored_bytes(address: np.uint64, stored: Stored) -> Bytes:
    """Return an image's stored bytes; empty if the table lacks the address or the data lies outside the content."""
    entry = np.searchsorted(stored.addresses, address)
    if entry == len(stored.addresses) or stored.addresses[entry] != address:
        return stored.content[:0]
    start, size, end = stored.offsets[entry], stored.sizes[entry], np.uint64(len(stored.content))
    if start > end or size > end - start:
        return stored.content[:0]
    return stored.content[start : start + size]


@jit
def read_region(
    row: Any, box: tuple[int, int, int, int], stored: Stored, scratch: Scratch, functions: Ints
) -> tuple[int, Bytes, int, int]:
    """Decode a part of a stored image that contains a box (top, left, height, width).

    A JPEG with restart markers is cut down to the segments that the box touches; any other image is decoded whole.
    row: of the sample table.   functions: from codec.decode.addresses.
    Returns a status of codec/decode.py, the pixels (h, w, 3) as a view of the scratch, and their top and left.
    """
    height, width = int(row["height"]), int(row["width"])
    top, left, status = 0, 0, OK
    data = stored_bytes(row["data_ptr"], stored)
    if data.size == 0:
        status = OUTSIDE_FILE
    elif row["mode"] == JPG:
        is_part = box[2] < height or box[3] < width
        layout = scratch.layout
        if is_part and read_layout(data, layout) and layout[HEIGHT] == height and layout[WIDTH] == width:
            size, cut_top, cut_left, cut_height, cut_width = cut_jpeg(
                data, box[0], box[1], box[2], box[3], layout, scratch.segments, scratch.jpeg, functions
            )
            if size > 0:
                data = scratch.jpeg[:size]
                top, left, height, width = int(cut_top), int(cut_left), int(cut_height), int(cut_width)
        status = decode_jpeg(data, height, width, scratch.pixels, functions)
    elif row["mode"] != RAW:
        status = UNKNOWN_MODE
    elif data.size != height * width * 3:
        status = WRONG_SIZE
    else:
        scratch.pixels[: data.size] = data
    return status, scratch.pixels[: height * width * 3].reshape(height, width, 3), top, left


@jit
def decode_random_crops(
    chunk: Chunk, rows: Any, stored: Stored, key: Key, parameters: RandomCrop, scratch: Scratch, functions: Ints
) -> None:
    """Decode a random crop of each sample of a chunk.

    chunk: a Chunk.   rows: the file's sample table.   stored: a sources.Stored that holds the samples.   key: a Key.
    parameters: a RandomCrop.   scratch: a Scratch.   functions: from codec.decode.addresses.
    """
    size = chunk.images.shape[1]
    for i in range(len(chunk.indices)):
        sample, copy = chunk.indices[i], chunk.copies[i]
        row = rows[sample]
        crop = random_crop(key, sample, copy, int(row["height"]), int(row["width"]), parameters)
        status, pixels, top, left = read_region(row, crop, stored, scratch, functions)
        chunk.status[i] = status
        if status != OK:
            continue
        flip = uniforms(key, sample, copy, _FLIP)[0] < parameters.hflip
        is_bicubic = uniforms(key, sample, copy, _INTERPOLATION)[0] < parameters.bicubic_share
        kind = BICUBIC if is_bicubic else BILINEAR
        origin = (top - crop[0], left - crop[1])  # the filter ends at the crop's edges
        resize_window(
            pixels, origin, (crop[2], crop[3]), (size, size), (0, 0), kind, flip, scratch.resize, chunk.images[i]
        )


@jit
def decode_center_crops(
    chunk: Chunk, rows: Any, stored: Stored, _key: Key, parameters: CenterCrop, scratch: Scratch, functions: Ints
) -> None:
    """Decode the central crop of each sample of a chunk; arguments as in `decode_random_crops`, a CenterCrop."""
    size, side = chunk.images.shape[1], parameters.side
    kind = BICUBIC if parameters.bicubic else BILINEAR
    for i in range(len(chunk.indices)):
        row = rows[chunk.indices[i]]
        height, width = int(row["height"]), int(row["width"])
        out_size = side, side
        if not parameters.warp:
            out_size = (int(side * height / width), side) if width <= height else (side, int(side * width / height))
        corner = int(np.rint((out_size[0] - size) / 2)), int(np.rint((out_size[1] - size) / 2))
        first_row, num_rows = source_span(height, out_size[0], corner[0], size, kind)
        first_column, num_columns = source_span(width, out_size[1], corner[1], size, kind)
        box = (first_row, first_column, num_rows, num_columns)
        status, pixels, top, left = read_region(row, box, stored, scratch, functions)
        chunk.status[i] = status
        if status == OK:
            in_size = (height, width)
            resize_window(pixels, (top, left), in_size, out_size, corner, kind, False, scratch.resize, chunk.images[i])
