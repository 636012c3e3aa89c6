"""A picture of the network's input: images of any step of a run, from the run's own loader and augmentation."""

from __future__ import annotations

import math
import os
import unicodedata
from bisect import bisect
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.config import Config
from ffcv_convnext.files import write_atomically
from ffcv_convnext.formatting import format_bytes
from ffcv_convnext.training.distributed import Processes
from ffcv_convnext.training.preflight import count_classes

if TYPE_CHECKING:  # needs numba, which is imported when a loader is built
    from ffcv_convnext.data.load import TrainLoader

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
DEFAULT_NUM = 18
_MIN_SIDE = 144  # pixels; smaller images are enlarged at least to it, by an integer factor
_MIN_WIDTH = 480  # for the header's lines
_GAP, _MARGIN, _SEAM = 8, 12, 2
_ASPECT = 1.5  # of the picture, width / height, roughly
_INK, _FAINT = "black", "#666666"
_FONT, _LINE = ImageFont.load_default(13), 18

Pixels = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Shown:
    """An image of a global batch.

    pixels, crop: (side, side, 3), the network's input, and the loader's output.
    classes: names and weights in the mixture, the image's own class first; empty if the target has no information.
    operations: of the policy, in order; those of the image itself, not of its partner.
    """

    pixels: Pixels
    crop: Pixels
    classes: list[tuple[str, float]]
    operations: list[str]
    sample: int
    copy: int


def preview(
    config: Config,
    out: Path,
    *,
    config_names: Sequence[str] = (),
    epoch: int = 0,
    step: int = 0,
    num: int | None = None,
    raw: bool = False,
) -> str:
    """Draw the first images of an optimiser step's global batch into `out`; return a summary line.

    epoch, step: from 0, the step within the epoch.   num: None for DEFAULT_NUM, or fewer if the batch is smaller.
    raw: each image beside its crop before the augmentation.
    The global batch is batch_size x update_freq, for one process; for more processes, multiply update_freq by their
    number. Raises ValueError or FileNotFoundError for arguments that cannot be drawn or written.
    """
    _check_writable(out)
    if not 0 <= epoch < config.schedule.epochs:
        raise ValueError(f"--epoch {epoch}: expected 0 to {config.schedule.epochs - 1}")
    device = Processes.from_environment(config.run.device).device
    for_one_step = replace(config.data, data_cache="os", batches_ahead=1)  # neither changes a batch
    from ffcv_convnext.data.load import TrainLoader

    with closing(TrainLoader(for_one_step, device, seed=config.run.seed)) as loader:
        global_batch = loader.sampler.global_batch
        if not 0 <= step < loader.steps_per_epoch:
            raise ValueError(f"--step {step}: expected 0 to {loader.steps_per_epoch - 1}")
        if num is not None and not 1 <= num <= global_batch:
            raise ValueError(f"--num {num}: expected 1 to {global_batch}, the global batch")
        num = min(DEFAULT_NUM, global_batch) if num is None else num
        shown = list(islice(images_of_step(config, loader, device, epoch, step), num))
        names = " ".join(config_names) or "the default settings"
        header = [names, *_facts(config, epoch, step, loader.steps_per_epoch, num)]
    picture = _Page(header, shown, raw=raw).draw()
    content = BytesIO()
    picture.save(content, FORMATS[out.suffix.lower()], quality=88, optimize=True)
    write_atomically(out, content.getvalue())
    size = format_bytes(len(content.getvalue()))
    return f"{out}: {num} images of epoch {epoch}, step {step}; {picture.width} x {picture.height} pixels, {size}"


def _check_writable(out: Path) -> None:
    folder = out.resolve().parent
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"--out {out}: expected a name that ends with {', '.join(FORMATS)}")
    if out.is_dir() or not folder.is_dir():
        raise ValueError(f"--out {out}: expected a file in a folder that exists")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--out {out}: {folder} is not writable; choose another folder")


def _facts(config: Config, epoch: int, step: int, steps_per_epoch: int, num: int) -> list[str]:
    data, augment, epochs = config.data, config.augment, config.schedule.epochs
    return [
        f"seed {config.run.seed}, epoch {epoch} (of 0 to {epochs - 1}), step {step} (of 0 to {steps_per_epoch - 1}), "
        f"optimiser step {epoch * steps_per_epoch + step} of the run",
        f"images 0 to {num - 1} of the global batch of {data.batch_size * data.update_freq} ({data.batch_size} x "
        f"{data.update_freq}), {data.train_size(epoch)} pixels",
        f"aa {augment.aa}, mixup {augment.mixup:g}, cutmix {augment.cutmix:g}, reprob {augment.reprob:g}; class "
        f"weights before label smoothing {augment.smoothing:g}",
    ]


def images_of_step(config: Config, loader: TrainLoader, device: torch.device, epoch: int, step: int) -> Iterator[Shown]:
    """Yield the images of a step's global batch. A micro-batch is augmented as a whole: its images are mixed."""
    classes = loader.manifest.classes
    augment = TrainAugment(
        config.augment,
        num_classes=count_classes(config.model, len(classes)),
        seed=config.run.seed,
        device=device,
        normalisation=Normalisation.of(config.data),
        interpolation=config.data.train_interpolation,
    )
    with closing(loader.steps(epoch, step)) as steps:
        micro_batches = zip(loader.samples(epoch, step), next(steps), strict=False)
        for number, (listed, (images, labels)) in enumerate(micro_batches):
            step_of_run = epoch * loader.steps_per_epoch + step
            inputs, targets = augment(images, labels, step=step_of_run, micro_batch=number)
            num, _, height, width = images.shape
            policy = augment.draw(num, height, width, step=step_of_run, micro_batch=number).policy
            operations: list[list[str]] = [[]] * num if policy is None else policy.words()
            for pixels, crop, target, label, words, sample, copy in zip(
                denormalise(inputs, augment.normalisation), _arrays(images), targets.cpu(), labels.tolist(), operations,
                listed.indices, listed.copies, strict=True,
            ):  # fmt: skip
                weights = [(classes[i], w) for i, w in mixing_weights(target, label, config.augment.smoothing)]
                yield Shown(pixels, crop, weights, words, int(sample), int(copy))


def denormalise(inputs: Tensor, by: Normalisation) -> Pixels:
    """Convert the network's input (N, 3, H, W) to pixels (N, H, W, 3), clipped to 0 to 255."""
    scale, shift = torch.from_numpy(by.constants)[:, :, None, None]
    levels = (inputs.double().cpu() - shift) / scale
    return _arrays(levels.round().clamp(0, 255).to(torch.uint8))


def _arrays(images: Tensor) -> Pixels:
    pixels: Pixels = images.permute(0, 2, 3, 1).cpu().numpy()
    return pixels


def mixing_weights(target: Tensor, label: int, smoothing: float) -> list[tuple[int, float]]:
    """Return a soft target's classes with their weights before label smoothing, the image's own class first.

    target: (num_classes,) float32.   Weights below 0.005 are omitted; smoothing 1 leaves none.
    """
    if smoothing == 1:
        return []
    weights = (target - smoothing / len(target)) / (1 - smoothing)
    found = [(int(i), float(weights[i])) for i in (weights >= 0.005).nonzero()[:, 0]]
    return sorted(found, key=lambda each: (each[0] != label, -each[1]))


class _Page:
    """The picture: a header, and rows of cells; a cell is an image (with `raw`, beside its crop) above some lines."""

    def __init__(self, header: list[str], shown: list[Shown], *, raw: bool) -> None:
        self.shown, self.raw = shown, raw
        side = shown[0].pixels.shape[0]
        self.factor = math.ceil(_MIN_SIDE / side)
        self.side = side * self.factor
        self.cell_width = self.side * 2 + _SEAM if raw else self.side
        self.captions = [self._caption(image) for image in shown]
        self.cell_height = self.side + _LINE * max(map(len, self.captions)) + _SEAM
        rows = max(1, round(math.sqrt(len(shown) * self.cell_width / self.cell_height / _ASPECT)))
        self.columns = math.ceil(len(shown) / rows)
        self.width = max(self.columns * (self.cell_width + _GAP) - _GAP, _MIN_WIDTH)
        self.header = [line for text in header for line in _wrapped(_in_ascii(text), self.width)]

    def _caption(self, image: Shown) -> list[tuple[str, str]]:
        """Return lines and their colours."""
        parts = [(_in_ascii(name), f" {weight:.2f}") for name, weight in image.classes]
        joined = " + ".join(name + weight for name, weight in parts) or "all classes equal"
        lines = [joined]
        if _FONT.getlength(joined) > self.cell_width:
            lines = [_shortened(name, weight, self.cell_width) for name, weight in parts]
        origin = ", ".join([f"sample {image.sample}", *([f"copy {image.copy}"] if image.copy else [])])
        done = f": {', '.join(image.operations)}" if image.operations else ""
        return [(line, _INK) for line in lines] + [(line, _FAINT) for line in _wrapped(origin + done, self.cell_width)]

    def draw(self) -> Image.Image:
        """Return the picture."""
        top = _MARGIN + _LINE * len(self.header) + _GAP
        num_rows = math.ceil(len(self.shown) / self.columns)
        height = top + num_rows * (self.cell_height + _GAP) - _GAP + _MARGIN
        page = Image.new("RGB", (self.width + 2 * _MARGIN, height), "white")
        pen = ImageDraw.Draw(page)
        for number, line in enumerate(self.header):
            pen.text((_MARGIN, _MARGIN + number * _LINE), line, _INK, _FONT)
        for number, (image, caption) in enumerate(zip(self.shown, self.captions, strict=True)):
            row, column = divmod(number, self.columns)
            x, y = _MARGIN + column * (self.cell_width + _GAP), top + row * (self.cell_height + _GAP)
            for place, pixels in enumerate([image.crop, image.pixels] if self.raw else [image.pixels]):
                page.paste(self._enlarged(pixels), (x + place * (self.side + _SEAM), y))
            for place, (line, ink) in enumerate(caption):
                pen.text((x, y + self.side + _SEAM + place * _LINE), line, ink, _FONT)
        return page

    def _enlarged(self, pixels: Pixels) -> Image.Image:
        return Image.fromarray(pixels.repeat(self.factor, axis=0).repeat(self.factor, axis=1))


def _in_ascii(name: str) -> str:
    """Convert to characters of Pillow's built-in font: without accents, escapes for others, spaces for line ends."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return " ".join(plain.encode("ascii", "backslashreplace").decode().split())


def _wrapped(text: str, width: int) -> list[str]:
    """Split into lines of at most `width` pixels at spaces; shorten words that are too long."""
    lines: list[str] = []
    for word in text.split():
        joined = f"{lines[-1]} {word}" if lines else word
        if lines and _FONT.getlength(joined) <= width:
            lines[-1] = joined
        else:
            lines.append(_shortened(word, "", width))
    return lines


def _shortened(text: str, ending: str, width: int) -> str:
    """Fit text and ending into at most `width` pixels, with an ellipsis in the middle of the text if necessary."""

    def keeping(num: int) -> str:
        return f"{text[: (num + 1) // 2]}…{text[len(text) - num // 2 :]}{ending}"

    if _FONT.getlength(text + ending) <= width:
        return text + ending
    return keeping(bisect(range(1, len(text)), float(width), key=lambda num: _FONT.getlength(keeping(num))))
