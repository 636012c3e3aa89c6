"""RandAugment, AutoAugment and TrivialAugment on a batch: each image draws its own operations and strengths.

Operations and magnitudes are those of timm with PIL (for ta_wide, torchvision's magnitudes). Draws are made on the
host, in float64. apply_policy applies each image's own operations, one image after the other, which suits a CPU;
batched_ops.py does the same work as one graph for all images, which suits a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ffcv_convnext.augment import pil_ops as pil
from ffcv_convnext.augment.color import Colour
from ffcv_convnext.augment.to_device import to_device
from ffcv_convnext.policy_grammar import FULL_MAGNITUDE, NUM_WIDE_LEVELS, Policy

Interpolation = Literal["bicubic", "bilinear", "random"]


class Kind(IntEnum):
    """Operation on the pixels. The comment describes its argument."""

    IDENTITY = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits that are kept; 0: black
    SOLARIZE = 5  # values from here on are inverted
    SOLARIZE_ADD = 6  # added to values below 128
    BRIGHTNESS = 7  # factor: 0 black, 1 unchanged
    COLOR = 8  # factor: 0 gray, 1 unchanged
    CONTRAST = 9  # factor: 0 the mean gray, 1 unchanged
    SHARPNESS = 10  # factor: 0 smoothed, 1 unchanged
    GAUSSIAN_BLUR = 11  # standard deviation, pixels
    SHEAR_X = 12  # pixels left for each pixel down
    SHEAR_Y = 13  # pixels up for each pixel right
    TRANSLATE_X = 14  # pixels left
    TRANSLATE_Y = 15  # pixels up
    ROTATE = 16  # degrees, counterclockwise


TABLES = frozenset({Kind.INVERT, Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD, Kind.BRIGHTNESS})
BLENDS = frozenset({Kind.COLOR, Kind.CONTRAST, Kind.SHARPNESS})  # with gray, the mean gray, the smoothed image

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Strength:
    """Inputs of an operation's argument, one entry per image."""

    magnitude: Floats  # 0 to 10 unless mmax is set; TrivialAugment: level 0 to 30
    sign: Floats  # -1 or 1
    uniform: Floats  # in [0, 1)
    size: int  # the image's extent along the operation's axis, pixels


def _signed(nominal: float) -> Callable[[Strength], Floats]:
    return lambda s: s.sign * (s.magnitude / FULL_MAGNITUDE * nominal)


def _factor(s: Strength) -> Floats:
    return s.magnitude / FULL_MAGNITUDE * 1.8 + 0.1


def _factor_increasing(s: Strength) -> Floats:
    return np.maximum(0.1, 1.0 + s.sign * (s.magnitude / FULL_MAGNITUDE * 0.9))


def _bits(s: Strength) -> Floats:
    return np.floor(s.magnitude / FULL_MAGNITUDE * 4)


def _threshold(s: Strength) -> Floats:
    return np.minimum(256.0, np.floor(s.magnitude / FULL_MAGNITUDE * 256))


def _between(low: float, high: float) -> Callable[[Strength], Floats]:
    return lambda s: np.clip(low + (high - low) * (s.magnitude / FULL_MAGNITUDE), low, high)


def _random_radius(s: Strength) -> Floats:
    largest = 2.0 * _between(0.0, 1.0)(s)
    return 0.1 + (largest - 0.1) * s.uniform


def _none(s: Strength) -> Floats:
    return np.zeros_like(s.magnitude)


def _translation(s: Strength) -> Floats:
    return _signed(0.45)(s) * s.size


# timm's names: the kind and its argument.
OPERATIONS: dict[str, tuple[Kind, Callable[[Strength], Floats]]] = {
    "AutoContrast": (Kind.AUTO_CONTRAST, _none),
    "Equalize": (Kind.EQUALIZE, _none),
    "Invert": (Kind.INVERT, _none),
    "Rotate": (Kind.ROTATE, _signed(30.0)),
    "Posterize": (Kind.POSTERIZE, _bits),
    "PosterizeIncreasing": (Kind.POSTERIZE, lambda s: 4 - _bits(s)),
    "PosterizeOriginal": (Kind.POSTERIZE, lambda s: 4 + _bits(s)),
    "Solarize": (Kind.SOLARIZE, _threshold),
    "SolarizeIncreasing": (Kind.SOLARIZE, lambda s: 256 - _threshold(s)),
    "SolarizeAdd": (Kind.SOLARIZE_ADD, lambda s: np.minimum(128.0, np.floor(s.magnitude / FULL_MAGNITUDE * 110))),
    "Color": (Kind.COLOR, _factor),
    "ColorIncreasing": (Kind.COLOR, _factor_increasing),
    "Contrast": (Kind.CONTRAST, _factor),
    "ContrastIncreasing": (Kind.CONTRAST, _factor_increasing),
    "Brightness": (Kind.BRIGHTNESS, _factor),
    "BrightnessIncreasing": (Kind.BRIGHTNESS, _factor_increasing),
    "Sharpness": (Kind.SHARPNESS, _factor),
    "SharpnessIncreasing": (Kind.SHARPNESS, _factor_increasing),
    "ShearX": (Kind.SHEAR_X, _signed(0.3)),
    "ShearY": (Kind.SHEAR_Y, _signed(0.3)),
    "TranslateXRel": (Kind.TRANSLATE_X, _translation),
    "TranslateYRel": (Kind.TRANSLATE_Y, _translation),
    "Desaturate": (Kind.COLOR, lambda s: np.clip(1.0 - _between(0.5, 1.0)(s), 0.0, 1.0)),
    "GaussianBlur": (Kind.GAUSSIAN_BLUR, _between(0.1, 2.0)),
    "GaussianBlurRand": (Kind.GAUSSIAN_BLUR, _random_radius),
}


def _wide(largest: float, start: float = 0.0) -> Callable[[Strength], Floats]:
    return lambda s: start + s.sign * (s.magnitude / (NUM_WIDE_LEVELS - 1) * largest)


# torchvision's TrivialAugmentWide.
WIDE_OPERATIONS: dict[str, tuple[Kind, Callable[[Strength], Floats]]] = {
    "Identity": (Kind.IDENTITY, _none),
    "ShearX": (Kind.SHEAR_X, _wide(0.99)),
    "ShearY": (Kind.SHEAR_Y, _wide(0.99)),
    "TranslateX": (Kind.TRANSLATE_X, lambda s: -np.trunc(_wide(32.0)(s))),
    "TranslateY": (Kind.TRANSLATE_Y, lambda s: -np.trunc(_wide(32.0)(s))),
    "Rotate": (Kind.ROTATE, _wide(135.0)),
    "Brightness": (Kind.BRIGHTNESS, _wide(0.99, start=1.0)),
    "Color": (Kind.COLOR, _wide(0.99, start=1.0)),
    "Contrast": (Kind.CONTRAST, _wide(0.99, start=1.0)),
    "Sharpness": (Kind.SHARPNESS, _wide(0.99, start=1.0)),
    "Posterize": (Kind.POSTERIZE, lambda s: 8 - np.rint(s.magnitude / ((NUM_WIDE_LEVELS - 1) / 6))),
    "Solarize": (Kind.SOLARIZE, lambda s: 255.0 - s.magnitude / (NUM_WIDE_LEVELS - 1) * 255.0),
    "AutoContrast": (Kind.AUTO_CONTRAST, _none),
    "Equalize": (Kind.EQUALIZE, _none),
}


@dataclass(frozen=True, slots=True)
class PolicyDraws:
    """Draws for a micro-batch: one row per image, one column per round.

    kinds: (N, rounds) int64, of Kind.   arguments: (N, rounds) float64.   bicubic: (N, rounds) bool, else bilinear.
    """

    kinds: NDArray[np.int64]
    arguments: Floats
    bicubic: NDArray[np.bool_]

    def words(self) -> list[list[str]]:
        """Describe each image's operations in order, such as 'rotate -12.3', with the arguments described in Kind."""
        return [
            [_words(Kind(kind), argument) for kind, argument in zip(*row, strict=True) if kind != Kind.IDENTITY]
            for row in zip(self.kinds.tolist(), self.arguments.tolist(), strict=True)
        ]


def _words(kind: Kind, argument: float) -> str:
    name = kind.name.lower().replace("_", " ")
    return name if kind in (Kind.AUTO_CONTRAST, Kind.EQUALIZE, Kind.INVERT) else f"{name} {argument:.3g}"


def draw_policy(
    policy: Policy, num: int, height: int, width: int, interpolation: Interpolation, generator: np.random.Generator
) -> PolicyDraws:
    """Draw the operations of `num` images and their arguments."""
    num_sequences = len(policy.sequences)
    if policy.weights is None:
        chosen = generator.integers(0, num_sequences, (num, policy.num_draws))
    else:  # the first arrivals of exponential clocks with these rates: a weighted draw without replacement
        clocks = generator.exponential(size=(num, num_sequences)) / np.array(policy.weights)
        chosen = clocks.argsort(axis=1)[:, : policy.num_draws]
    names = np.array([[step.name for step in steps] for steps in policy.sequences])[chosen].reshape(num, -1)
    probs = np.array([[step.prob for step in steps] for steps in policy.sequences])[chosen].reshape(num, -1)
    nominal = np.array([[step.magnitude for step in steps] for steps in policy.sequences])[chosen].reshape(num, -1)
    shape = names.shape
    applied = generator.random(shape) < probs
    sign = np.where(generator.random(shape) < 0.5, -1.0, 1.0)
    uniform = generator.random(shape)
    if policy.wide:
        magnitude = generator.integers(0, NUM_WIDE_LEVELS, shape).astype(np.float64)
    elif math.isinf(policy.magnitude_std):
        magnitude = np.clip(generator.random(shape) * nominal, 0, policy.magnitude_max)
    else:
        magnitude = np.clip(generator.normal(nominal, policy.magnitude_std), 0, policy.magnitude_max)
    coin = generator.random(shape) < 0.5
    bicubic = coin if interpolation == "random" else np.full(shape, interpolation == "bicubic")
    kinds, arguments = np.zeros(shape, np.int64), np.zeros(shape)
    for name in np.unique(names[applied]):
        kind, argument = (WIDE_OPERATIONS if policy.wide else OPERATIONS)[str(name)]
        at = applied & (names == name)
        size = height if kind == Kind.TRANSLATE_Y else width
        kinds[at] = kind
        arguments[at] = argument(Strength(magnitude[at], sign[at], uniform[at], size))
    return PolicyDraws(kinds, arguments, bicubic)


def apply_policy(images: Tensor, draws: PolicyDraws, fill: Colour) -> Tensor:
    """Apply each image's operations, one round after the other. For a CPU: on other devices the host waits for it.

    images: (N, 3, H, W) uint8, not modified.   draws: of N images, made for their height and width.
    fill: the colour outside of an image, for geometric operations.
    Returns a new tensor of the same shape, dtype and memory format. Raises ValueError for other images.
    """
    check_images(images, len(draws.kinds))
    pixels = images.permute(0, 2, 3, 1).contiguous()
    result = torch.empty_like(pixels)
    for image, found, kinds, arguments, bicubic in zip(
        pixels, result, draws.kinds.tolist(), draws.arguments.tolist(), draws.bicubic.tolist(), strict=True
    ):
        for kind, argument, cubic in zip(kinds, arguments, bicubic, strict=True):
            if kind != Kind.IDENTITY:
                image = _APPLY[Kind(kind)](image, argument, cubic, fill)
        found.copy_(image)
    channels_last = images.is_contiguous(memory_format=torch.channels_last)
    result = result.permute(0, 3, 1, 2)
    return result if channels_last else result.contiguous()


def check_images(images: Tensor, num: int) -> None:
    """Raise ValueError for images that are not uint8 (num, 3, H, W)."""
    if images.ndim != 4 or images.shape[1] != 3 or images.dtype != torch.uint8:
        found = f"{str(images.dtype).removeprefix('torch.')} {tuple(images.shape)}"
        raise ValueError(f"images are {found}: a policy needs uint8 (N, 3, H, W); use --aa none for others")
    if len(images) != num:
        raise ValueError(f"{num} rows of draws for {len(images)} images")


def _rotate(image: Tensor, angle: float, bicubic: bool, fill: Colour) -> Tensor:
    height, width, _ = image.shape
    matrix = _matrices(np.array(Kind.ROTATE), np.array(angle), height, width)
    return pil.affine(image, to_device(matrix, image.device), fill, bicubic=bicubic)


def _blur(image: Tensor, sigma: float, _: bool, __: Colour) -> Tensor:
    return pil.gaussian_blur(image, torch.tensor(_box_weights(sigma), dtype=torch.int64, device=image.device))


# An image (H, W, 3), the operation's argument, whether to interpolate bicubically, the colour outside of the image.
_APPLY: dict[Kind, Callable[[Tensor, float, bool, Colour], Tensor]] = {
    Kind.AUTO_CONTRAST: lambda image, *_: pil.autocontrast(image),
    Kind.EQUALIZE: lambda image, *_: pil.equalize(image),
    Kind.INVERT: lambda image, *_: pil.invert(image),
    Kind.POSTERIZE: lambda image, bits, *_: pil.posterize(image, min(max(int(bits), 0), 8)),
    Kind.SOLARIZE: lambda image, threshold, *_: pil.solarize(image, math.ceil(threshold)),
    Kind.SOLARIZE_ADD: lambda image, amount, *_: pil.solarize_add(image, int(amount)),
    Kind.BRIGHTNESS: lambda image, factor, *_: pil.brightness(image, factor),
    Kind.COLOR: lambda image, factor, *_: pil.color(image, factor),
    Kind.CONTRAST: lambda image, factor, *_: pil.contrast(image, factor),
    Kind.SHARPNESS: lambda image, factor, *_: pil.sharpness(image, factor),
    Kind.GAUSSIAN_BLUR: _blur,
    Kind.SHEAR_X: lambda image, slope, cubic, fill: pil.shear_rows(image, slope, fill, bicubic=cubic),
    Kind.SHEAR_Y: lambda image, slope, cubic, fill: pil.shear_columns(image, slope, fill, bicubic=cubic),
    Kind.TRANSLATE_X: lambda image, by, cubic, fill: pil.translate(image, by, 1, fill, bicubic=cubic),
    Kind.TRANSLATE_Y: lambda image, by, cubic, fill: pil.translate(image, by, 0, fill, bicubic=cubic),
    Kind.ROTATE: _rotate,
}


def kind_tables(kinds: NDArray[np.int64], arguments: Floats) -> NDArray[np.uint8]:
    """Return (..., 256): the new value of each value; unchanged if the kind is not in TABLES."""
    found = np.empty((*kinds.shape, 256), np.uint8)
    found[...] = values = np.arange(256)
    for kind in TABLES:
        at = kinds == kind
        argument = arguments[at][:, None]
        if kind == Kind.INVERT:
            found[at] = 255 - values
        elif kind == Kind.POSTERIZE:
            found[at] = values & 255 << 8 - np.clip(argument.astype(np.int64), 0, 8)
        elif kind == Kind.SOLARIZE:
            found[at] = np.where(values < argument, values, 255 - values)
        elif kind == Kind.SOLARIZE_ADD:
            found[at] = np.where(values < 128, np.minimum(255, values + argument.astype(np.int64)), values)
        else:  # truncated by the cast, as in PIL
            found[at] = np.clip(values.astype(np.float32) * argument.astype(np.float32), 0, 255)
    return found


def kind_numbers(kinds: NDArray[np.int64], arguments: Floats, height: int, width: int) -> Floats:
    """Return (..., 10): a matrix's six numbers (see pil_ops.places), a blend's factor, a blur's three weights.

    Numbers of other kinds have no effect.   height, width: of the images, pixels.
    """
    found = np.zeros((*kinds.shape, 10))
    found[..., :6] = _matrices(kinds, arguments, height, width)
    found[..., 6] = np.where(np.isin(kinds, list(BLENDS)), arguments, 1.0)
    found[..., 7] = 1 << 24
    blurred = kinds == Kind.GAUSSIAN_BLUR
    found[blurred, 7:] = np.array([_box_weights(sigma) for sigma in arguments[blurred].tolist()]).reshape(-1, 3)
    return found


def _matrices(kinds: NDArray[np.int64], arguments: Floats, height: int, width: int) -> Floats:
    """Return (..., 6): from the output to the input; the identity for kinds that are not geometric."""
    found = np.zeros((*kinds.shape, 6))
    found[..., (0, 4)] = 1.0
    for column, kind in ((1, Kind.SHEAR_X), (3, Kind.SHEAR_Y), (2, Kind.TRANSLATE_X), (5, Kind.TRANSLATE_Y)):
        at = kinds == kind
        found[at, column] = arguments[at]
    turned = kinds == Kind.ROTATE
    angles = -np.radians(arguments[turned] % 360.0)
    cos, sin = np.cos(angles).round(15), np.sin(angles).round(15)
    x, y = width / 2, height / 2  # the centre stays
    found[turned] = np.stack([cos, sin, cos * -x + sin * -y + x, -sin, cos, -sin * -x + cos * -y + y], -1)
    return found


def _box_weights(sigma: float) -> tuple[float, float, float]:
    """Return the weights in 1 / 2^24 of a box with fractional ends that, applied three times, has this deviation.

    Source: Gwosdek et al. 2011, "Theoretical foundations of Gaussian convolution by extended box filtering".
    """
    variance = np.float32(sigma) * np.float32(sigma) / np.float32(3)
    length = np.float32(math.sqrt(12.0 * variance + 1.0))
    whole = math.floor((length - 1.0) / 2.0)
    assert whole <= 1, "five pixels suffice for a deviation up to 2.8"
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    radius = np.float32(whole + part)
    inner = int(np.float32(1 << 24) / np.float32(radius * 2 + 1))
    outer = ((1 << 24) - (2 * int(radius) + 1) * inner) // 2
    return (inner, inner, outer) if int(radius) == 1 else (inner, outer, 0)
