"""FFCV operations that turn stored images into crops: random ones for training, central ones for evaluation.

Crop, flip and interpolation of a training sample are drawn from (seed, epoch, sample as listed in order.py: index and
copy), so they do not depend on threads, processes or what came before. `draws`, a (2,) uint64 array with seed and
epoch, and `listed`, (n,) int64, travel in FFCV's storage state beside the stored data and the addresses of the C
functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ffcv_convnext.config import DataConfig
from ffcv_convnext.data.beton.ffcv_import import importing_ffcv
from ffcv_convnext.data.codec.crop import HEIGHT, WIDTH, cut_jpeg, read_layout
from ffcv_convnext.data.codec.decode import OK, OUTSIDE_FILE, UNKNOWN_MODE, WRONG_SIZE, decode_jpeg
from ffcv_convnext.data.codec.jit import jit
from ffcv_convnext.data.codec.resize import BICUBIC, BILINEAR, resize_window, scratch_size, source_span
from ffcv_convnext.data.codec.simd import LANES
from ffcv_convnext.rng import PHILOX, Stream, philox_rounds

with importing_ffcv():
    from ffcv.fields.basics import IntDecoder
    from ffcv.fields.rgb_image import IMAGE_MODES
    from ffcv.pipeline.allocation_query import AllocationQuery
    from ffcv.pipeline.operation import Operation
    from ffcv.pipeline.state import State

_PHILOX = tuple(np.uint64(x) for x in PHILOX)
_JPG, _RAW = int(IMAGE_MODES["jpg"]), int(IMAGE_MODES["raw"])
_MASK, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)
_CROP, _FLIP, _INTERPOLATION = (np.uint64(s << 16) for s in (Stream.CROP, Stream.FLIP, Stream.INTERPOLATION))
_NUM_TRIES = 10  # torchvision's RandomResizedCrop gives up after as many

_philox = jit(philox_rounds)


@dataclass(frozen=True)
class WorkerScratch(AllocationQuery):  # type: ignore[misc]
    """Memory that a worker thread needs once, not once for every sample of a batch."""


@jit
def _uniforms(draws, sample, block):  # type: ignore[no-untyped-def]
    """Four numbers in [0, 1); the numba twin of rng.uniform(rng.sample_words(...))."""
    sample, epoch, seed = np.uint64(sample), draws[1], draws[0]
    a, b, c, d = _philox(
        sample & _MASK, epoch & _MASK, block, (sample >> _32) & _MASK, seed & _MASK, (seed >> _32) & _MASK, _PHILOX
    )
    eight, unit = np.uint64(8), 2.0**-24
    return (a >> eight) * unit, (b >> eight) * unit, (c >> eight) * unit, (d >> eight) * unit


@jit
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


@jit
def stored_bytes(address, state):  # type: ignore[no-untyped-def]
    """A sample's data, see storage.Stored; empty when the table does not know it or it lies outside the content."""
    content, addresses, sizes, offsets = state[0], state[1], state[2], state[5]
    entry = np.searchsorted(addresses, address)
    if entry == len(addresses) or addresses[entry] != address:
        return content[:0]
    start, size, end = offsets[entry], sizes[entry], np.uint64(len(content))
    if start > end or size > end - start:
        return content[:0]
    return content[start : start + size]


@jit
def read_region(sample, box, metadata, state, scratch):  # type: ignore[no-untyped-def]
    """Decode what holds a box (top, left, height, width) of a stored image.

    A JPEG with restart markers is cut down to the segments that the box touches; any other image is decoded whole.
    Returns a status of data/jpeg.py, the pixels (h, w, 3) as a view of the scratch, and their top and left.
    """
    field = metadata[sample]
    height, width = int(field["height"]), int(field["width"])
    pixel_scratch, _, cut_scratch, ends, layout = scratch
    top, left, status = 0, 0, OK
    data = stored_bytes(field["data_ptr"], state)
    if data.size == 0:
        status = OUTSIDE_FILE
    elif field["mode"] == _JPG:
        is_part = box[2] < height or box[3] < width
        if is_part and read_layout(data, layout) and layout[HEIGHT] == height and layout[WIDTH] == width:
            size, cut_top, cut_left, cut_height, cut_width = cut_jpeg(
                data, box[0], box[1], box[2], box[3], layout, ends, cut_scratch, state[4]
            )
            if size > 0:
                data = cut_scratch[:size]
                top, left, height, width = int(cut_top), int(cut_left), int(cut_height), int(cut_width)
        status = decode_jpeg(data, height, width, pixel_scratch, state[4])
    elif field["mode"] != _RAW:
        status = UNKNOWN_MODE
    elif data.size != height * width * 3:
        status = WRONG_SIZE
    else:
        pixel_scratch[: data.size] = data
    return status, pixel_scratch[: height * width * 3].reshape(height, width, 3), top, left


@jit
def _decode_random_crops(samples, memory, metadata, state, parameters):  # type: ignore[no-untyped-def]
    images, status, scratch = memory
    scale_low, scale_high, ratio_low, ratio_high, hflip, bicubic_share = parameters
    size, draws = images.shape[1], state[3]
    for i in range(len(samples)):
        sample, listed = samples[i], state[6][i]
        height, width = int(metadata[sample]["height"]), int(metadata[sample]["width"])
        scale, ratio = (scale_low, scale_high), (ratio_low, ratio_high)
        crop = random_crop(draws, listed, height, width, scale, ratio)
        status[i], pixels, top, left = read_region(sample, crop, metadata, state, scratch)
        if status[i] != OK:
            continue
        flip = _uniforms(draws, listed, _FLIP)[0] < hflip
        kind = BICUBIC if _uniforms(draws, listed, _INTERPOLATION)[0] < bicubic_share else BILINEAR
        origin = (top - crop[0], left - crop[1])  # the crop is an image of its own: the filter ends at its edges
        resize_window(pixels, origin, (crop[2], crop[3]), (size, size), (0, 0), kind, flip, scratch[1], images[i])


@jit
def _decode_center_crops(samples, memory, metadata, state, parameters):  # type: ignore[no-untyped-def]
    images, status, scratch = memory
    size, resize = images.shape[1], parameters[0]
    for i in range(len(samples)):
        sample = samples[i]
        height, width = int(metadata[sample]["height"]), int(metadata[sample]["width"])
        if width <= height:
            out_size = int(resize * height / width), int(resize)
        else:
            out_size = int(resize), int(resize * width / height)
        corner = int(np.rint((out_size[0] - size) / 2)), int(np.rint((out_size[1] - size) / 2))
        first_row, num_rows = source_span(height, out_size[0], corner[0], size, BICUBIC)
        first_column, num_columns = source_span(width, out_size[1], corner[1], size, BICUBIC)
        box = (first_row, first_column, num_rows, num_columns)
        status[i], pixels, top, left = read_region(sample, box, metadata, state, scratch)
        if status[i] == OK:
            in_size = (height, width)
            resize_window(pixels, (top, left), in_size, out_size, corner, BICUBIC, False, scratch[1], images[i])


class CropDecoder(Operation):  # type: ignore[misc]
    """Decode, crop and resize to a square of `size` pixels.

    Its result is a pair: images (n, size, size, 3) uint8 and status (n,) int32, a value of data/jpeg.py for each;
    where that is not OK the image is not to be used.

    The work is done by a function of the module, whose compiled code is kept; what differs from run to run is passed
    to it as numbers. So a further loader, or process, costs no further compilation.
    """

    kernel: Any
    parameters: tuple[float, ...]

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size
        self.most_bytes = 0  # of a stored sample; the loader, which sees the whole file, sets it

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, tuple[AllocationQuery, ...]]:
        shape = (self.size, self.size, 3)
        heights, widths = self.metadata["height"].astype(np.int64), self.metadata["width"].astype(np.int64)
        height, width, largest = int(heights.max()), int(widths.max()), int((heights * widths).max())
        byte, word = np.dtype("<u1"), np.dtype("<i8")
        return replace(previous_state, jit_mode=True, shape=shape, dtype=byte), (
            AllocationQuery(shape, byte),
            AllocationQuery((), np.dtype("<i4")),
            WorkerScratch((3 * largest + LANES,), byte),  # pixels; the resize may read 16 bytes behind them
            WorkerScratch((scratch_size(height, width, self.size),), byte),
            WorkerScratch((self.most_bytes,), byte),  # a cut JPEG
            WorkerScratch(((height // 8 + 1) * (width // 8 + 1) + 1,), word),  # its segments
            WorkerScratch((8,), word),  # its layout
        )

    def generate_code(self) -> Callable[..., Any]:
        kernel, parameters = self.kernel, self.parameters

        def decode(samples: Any, memory: Any, metadata: Any, state: Any) -> Any:
            kernel(samples, memory, metadata, state, parameters)
            return memory[0], memory[1]

        return decode


class RandomCropDecoder(CropDecoder):
    """Training: a random resized crop, perhaps mirrored, each a function of (seed, epoch, sample and its copy)."""

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


class LabelDecoder(IntDecoder):  # type: ignore[misc]
    """A batch's labels, (n, 1) int64."""

    def generate_code(self) -> Callable[..., Any]:
        def decode(samples: Any, labels: Any, metadata: Any, _state: Any) -> Any:
            labels[:, 0] = metadata[samples]
            return labels

        return decode
