"""FFCV operations that turn stored images into crops: random ones for training, central ones for evaluation.

Crop, flip and interpolation of a training sample are drawn from (seed, epoch, sample index), so they do not depend
on threads, processes or what came before. `draws`, a (2,) uint64 array with seed and epoch, travels in FFCV's
storage state beside the mapped file.
"""

from __future__ import annotations

from abc import abstractmethod
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
from ffcv_convnext.data.resize import BICUBIC, BILINEAR, resize_window
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
def read_image(data, mode, height, width, scratch):  # type: ignore[no-untyped-def]
    """Decode a stored image into scratch; returns a status of data/jpeg.py and the (height, width, 3) pixels."""
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


class CropDecoder(Operation):  # type: ignore[misc]
    """Decode, crop and resize to a square of `size` pixels.

    Its result is a pair: images (n, size, size, 3) uint8 and status (n,) int32, a value of data/jpeg.py for each;
    where that is not OK the image is not to be used.
    """

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
            WorkerScratch((largest,), byte),
            WorkerScratch((int(heights.max()) * self.size * 3,), byte),
        )

    @abstractmethod
    def window(self) -> Any:
        """A jitted function (draws, sample, height, width) -> crop box, resized size, window corner, filter, flip."""

    def generate_code(self) -> Callable[..., Any]:
        mem_read = self.memory_read
        window = self.window()

        def decode(batch_indices, memory, metadata, storage_state):  # type: ignore[no-untyped-def]
            images, status, pixel_scratch, row_scratch = memory
            for i in range(len(batch_indices)):
                sample = batch_indices[i]
                field = metadata[sample]
                height, width = int(field["height"]), int(field["width"])
                data = mem_read(field["data_ptr"], storage_state)
                status[i], pixels = read_image(data, field["mode"], height, width, pixel_scratch)
                if status[i] != OK:
                    continue
                crop, size, corner, kind, flip = window(storage_state[3], sample, height, width)
                source = pixels[crop[0] : crop[0] + crop[2], crop[1] : crop[1] + crop[3]]
                resize_window(source, size[0], size[1], corner[0], corner[1], kind, flip, row_scratch, images[i])
            return images, status

        return decode


class RandomCropDecoder(CropDecoder):
    """Training: a random resized crop, perhaps mirrored, each a function of (seed, epoch, sample index)."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.input_size)
        self.config = config

    def window(self) -> Any:
        size, scale, ratio, hflip = self.size, self.config.scale, self.config.ratio, self.config.hflip
        bicubic_share = {"bicubic": 1.0, "bilinear": 0.0, "random": 0.5}[self.config.train_interpolation]

        @njit(nogil=True)
        def window(draws, sample, height, width):  # type: ignore[no-untyped-def]
            crop = random_crop(draws, sample, height, width, scale, ratio)
            flip = _uniforms(draws, sample, _FLIP)[0] < hflip
            kind = BICUBIC if _uniforms(draws, sample, _INTERPOLATION)[0] < bicubic_share else BILINEAR
            return crop, (size, size), (0, 0), kind, flip

        return window


class CenterCropDecoder(CropDecoder):
    """Evaluation: short side to eval_resize (bicubic), then the central crop, as torchvision does on PIL images."""

    def __init__(self, config: DataConfig) -> None:
        super().__init__(config.input_size)
        self.resize = config.eval_resize

    def window(self) -> Any:
        size, resize = self.size, self.resize

        @njit(nogil=True)
        def window(_draws, _sample, height, width):  # type: ignore[no-untyped-def]
            if width <= height:
                out_height, out_width = int(resize * height / width), resize
            else:
                out_height, out_width = resize, int(resize * width / height)
            top, left = int(np.rint((out_height - size) / 2)), int(np.rint((out_width - size) / 2))
            return (0, 0, height, width), (out_height, out_width), (top, left), BICUBIC, False

        return window
