"""FFCV operations that turn stored images into crops: random ones for training, central ones for evaluation.

Crop, flip and interpolation of a training sample are drawn from (seed, epoch, sample index), so they do not depend
on threads, processes or what came before. `draws`, a (2,) uint64 array with seed and epoch, travels in FFCV's
storage state beside the mapped file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ffcv.fields.rgb_image import IMAGE_MODES
from ffcv.pipeline.allocation_query import AllocationQuery
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.state import State
from numba import njit

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.jpeg import OK, OUTSIDE_FILE, UNKNOWN_MODE, WRONG_SIZE, decode_jpeg
from ffcv_convnext.data.resize import BICUBIC, BILINEAR, resize_window, scratch_size
from ffcv_convnext.data.simd import LANES
from ffcv_convnext.rng import PHILOX, Stream, philox_rounds

_PHILOX = tuple(np.uint64(x) for x in PHILOX)
_JPG, _RAW = int(IMAGE_MODES["jpg"]), int(IMAGE_MODES["raw"])
_MASK, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_CROP, _FLIP, _INTERPOLATION = (np.uint64(s << 16) for s in (Stream.CROP, Stream.FLIP, Stream.INTERPOLATION))
_NUM_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many

_philox = njit(nogil=True)(philox_rounds)


@dataclass(frozen=True)
class WorkerScratch(AllocationQuery):  # type: ignore[misc]
    """Memory that a worker thread needs once, not once for every sample of a batch."""


@njit(nogil=True)
def _uniforms(draws, sample, block):  # type: ignore[no-untyped-def]
    """Four numbers in [0, 1); the numba twin of rng.uniform(rng.sample_words(...))."""
    sample, epoch, seed = np.uint64(sample), draws[1], draws[0]
    a, b, c, d = _philox(
        sample & _MASK, epoch & _MASK, block, (sample >> _32) & _MASK, seed & _MASK, (seed >> _32) & _MASK, _PHILOX
    )
    eight, unit = np.uint64(8), 2.0**-24
    return (a >> eight) * unit, (b >> eight) * unit, (c >> eight) * unit, (d >> eight) * unit


@njit(nogil=True)
def random_crop(draws, sample, height, width, scale, ratio):  # type: ignore[no-untyped-def]
    """A random resized crop's box in an image: torchvision's RandomResizedCrop, drawn from (seed, epoch, sample).

    scale: least and most area, as a share of the image.   ratio: least and most aspect ratio, width / height.
    Returns top, left, height, width in pixels.
    """
    for attempt in range(_NUM_TRIES):
        u_area, u_ratio, u_top, u_left = _uniforms(draws, sample, _CROP + np.uint64(attempt))
        area = height * width * (scale[0] + u_area * (scale[1] - scale[0]))
        aspect = np.exp(np.log(ratio[0]) + u_ratio * (np.log(ratio[1]) - np.log(ratio[0])))
        w = int(np.rint(np.sqrt(area * aspect)))
        h = int(np.rint(np.sqrt(area / aspect)))
        if 0 < w <= width and 0 < h <= height:
            return int(u_top * (height - h + 1)), int(u_left * (width - w + 1)), h, w
    h, w = height, width
    if width < ratio[0] * height:
        h = min(height, int(np.rint(width / ratio[0])))
    elif width > ratio[1] * height:
        w = min(width, int(np.rint(height * ratio[1])))
    return (height - h) // 2, (width - w) // 2, h, w


@njit(nogil=True)
def stored_bytes(address, state):  # type: ignore[no-untyped-def]
    """A sample's data in the mapped file; empty when the table does not know it or it lies outside the file."""
    file, pointers, sizes = state[0], state[1], state[2]
    entry = np.searchsorted(pointers, address)
    if entry == len(pointers) or pointers[entry] != address or address + sizes[entry] > len(file):
        return file[:0]
    return file[address : address + sizes[entry]]


@njit(nogil=True)
def read_image(sample, metadata, state, scratch):  # type: ignore[no-untyped-def]
    """Decode a stored image into scratch; returns a status of data/jpeg.py and the (height, width, 3) pixels."""
    field = metadata[sample]
    mode, height, width = field["mode"], int(field["height"]), int(field["width"])
    data = stored_bytes(field["data_ptr"], state)
    num_bytes = height * width * 3
    pixels = scratch[:num_bytes].reshape(height, width, 3)
    if data.size == 0:
        return OUTSIDE_FILE, pixels
    if mode == _JPG:
        return decode_jpeg(data, height, width, scratch), pixels
    if mode != _RAW:
        return UNKNOWN_MODE, pixels
    if data.size != num_bytes:
        return WRONG_SIZE, pixels
    scratch[:num_bytes] = data
    return OK, pixels


@njit(nogil=True)
def _decode_random_crops(samples, memory, metadata, state, parameters):  # type: ignore[no-untyped-def]
    images, status, pixel_scratch, row_scratch = memory
    scale_low, scale_high, ratio_low, ratio_high, hflip, bicubic_share = parameters
    size, draws = images.shape[1], state[3]
    for i in range(len(samples)):
        status[i], pixels = read_image(samples[i], metadata, state, pixel_scratch)
        if status[i] != OK:
            continue
        height, width, _ = pixels.shape
        scale, ratio = (scale_low, scale_high), (ratio_low, ratio_high)
        top, left, crop_height, crop_width = random_crop(draws, samples[i], height, width, scale, ratio)
        source = pixels[top : top + crop_height, left : left + crop_width]
        flip = _uniforms(draws, samples[i], _FLIP)[0] < hflip
        kind = BICUBIC if _uniforms(draws, samples[i], _INTERPOLATION)[0] < bicubic_share else BILINEAR
        resize_window(source, size, size, 0, 0, kind, flip, row_scratch, images[i])


@njit(nogil=True)
def _decode_center_crops(samples, memory, metadata, state, parameters):  # type: ignore[no-untyped-def]
    images, status, pixel_scratch, row_scratch = memory
    size, resize = images.shape[1], parameters[0]
    for i in range(len(samples)):
        status[i], pixels = read_image(samples[i], metadata, state, pixel_scratch)
        if status[i] != OK:
            continue
        height, width, _ = pixels.shape
        if width <= height:
            out_height, out_width = int(resize * height / width), int(resize)
        else:
            out_height, out_width = int(resize), int(resize * width / height)
        top, left = int(np.rint((out_height - size) / 2)), int(np.rint((out_width - size) / 2))
        resize_window(pixels, out_height, out_width, top, left, BICUBIC, False, row_scratch, images[i])


class CropDecoder(Operation):  # type: ignore[misc]
    """Decode, crop and resize to a square of `size` pixels.

    Its result is a pair: images (n, size, size, 3) uint8 and status (n,) int32, a value of data/jpeg.py for each;
    where that is not OK the image is not to be used.

    The work is done by a function of the module, compiled once a process; what differs from run to run is passed to
    it as numbers, so a further loader costs no further compilation.
    """

    kernel: Any
    parameters: tuple[float, ...]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shape = (self.size, self.size, 3)
        heights, widths = self.metadata["height"].astype(np.int64), self.metadata["width"].astype(np.int64)
        largest = int((heights * widths).max()) * 3
        byte = np.dtype("<u1")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=byte), (
            AllocationQuery(shape, byte),
            AllocationQuery((), np.dtype("<i4")),
            WorkerScratch((largest + LANES,), byte),  # the resize may read 16 bytes behind a picture
            WorkerScratch((scratch_size(int(heights.max()), int(widths.max()), self.size),), byte),
        )

    def generate_code(self) -> Callable[..., Any]:
        kernel, parameters = self.kernel, self.parameters

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            kernel(batch_indices, memory, metadata, storage_state, parameters)
            return memory[0], memory[1]

        return decode


class RandomCropDecoder(CropDecoder):
    """Training: a random resized crop, perhaps mirrored, each a function of (seed, epoch, sample index)."""

    kernel = staticmethod(_decode_random_crops)

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.input_size)
        bicubic_share = {"bicubic": 1.0, "bilinear": 0.0, "random": 0.5}[config.train_interpolation]
        self.parameters = (*config.scale, *config.ratio, config.hflip, bicubic_share)


class CenterCropDecoder(CropDecoder):
    """Evaluation: short side to eval_resize (bicubic), then the central crop, as torchvision does on PIL images."""

    kernel = staticmethod(_decode_center_crops)

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.input_size)
        self.parameters = (float(config.eval_resize),)
