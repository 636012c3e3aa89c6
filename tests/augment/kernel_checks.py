"""The augmentation's Triton kernels against the CPU path: natively on a GPU, else under Triton's interpreter.

test_augment_kernels.py runs this file in a separate process, because TRITON_INTERPRET must be set before Triton is
imported.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images
from torch import Tensor

from ffcv_convnext.augment import Normalisation, TrainAugment
from ffcv_convnext.augment.batched_ops import policy_kinds
from ffcv_convnext.augment.kernels import finish as finish_kernels
from ffcv_convnext.augment.kernels import policy as policy_kernels
from ffcv_convnext.augment.kernels.arguments import PolicyArguments, policy_arrays
from ffcv_convnext.augment.kernels.noise import normal
from ffcv_convnext.augment.randaugment import Interpolation, Kind, PolicyDraws, apply_policy, draw_policy
from ffcv_convnext.augment.to_device import all_to_device
from ffcv_convnext.config import AugmentConfig, DataConfig
from ffcv_convnext.policy_grammar import parse_policy

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
FILL = Normalisation.of(DataConfig()).fill
RECIPE = "rand-m9-mstd0.5-inc1"
SLOW_SIZES = [pytest.param(size, marks=pytest.mark.slow) for size in [(7, 5), (32, 32), (61, 83)]]
SIZES = [(23, 30), *SLOW_SIZES]

if DEVICE.type == "cpu":  # a program costs the interpreter as much as a thousand pixels
    policy_kernels._BLOCK = finish_kernels._BLOCK = 4096

COLOURS: dict[Kind, list[float]] = {
    Kind.IDENTITY: [0], Kind.AUTO_CONTRAST: [0], Kind.EQUALIZE: [0], Kind.INVERT: [0], Kind.POSTERIZE: [0, 1, 4, 8],
    Kind.SOLARIZE: [0, 1, 127.5, 255, 256], Kind.SOLARIZE_ADD: [0, 1, 110, 128], Kind.BRIGHTNESS: [0.01, 0.77, 1.9],
    Kind.COLOR: [0.0, 0.77, 1.9], Kind.CONTRAST: [0.1, 0.77, 1.99], Kind.SHARPNESS: [0.01, 0.77, 1.9],
    Kind.GAUSSIAN_BLUR: [0.1, 0.9, 2.0],
}  # fmt: skip
GEOMETRY: dict[Kind, list[float]] = {
    Kind.SHEAR_X: [0, 0.3, -0.271, 0.99, -0.99], Kind.SHEAR_Y: [0, 0.3, -0.271, 0.99, -0.99],
    Kind.TRANSLATE_X: [0, 5, -14.37, 20.25, -0.5, 1e4], Kind.TRANSLATE_Y: [0, 5, -14.37, 20.25, -0.5, -1e4],
    Kind.ROTATE: [0, 30, -17.3, 45, 90, -135, 180, 270],
}  # fmt: skip


def pictures(num: int, height: int, width: int) -> NDArray[np.uint8]:
    """(num, H, W, 3): pieces of two photographs, one low in contrast, a flat picture, and noise."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(1)
    found = []
    for i in range(num):
        y, x = rng.integers(0, 150, 2)
        piece = photographs[i % 2][y : y + height, x : x + width]
        kinds = [piece, piece // 3 + 60, np.full_like(piece, (90, 91, 30)), rng.integers(0, 256, piece.shape)]
        found.append(kinds[i % 4 if i % 8 else 0])
    return np.stack(found).astype(np.uint8)


def unpacked(words: Tensor) -> NDArray[np.int64]:
    """Return (N, H, W, 3) from words with a byte each of red, green and blue."""
    values = words.cpu().numpy().astype(np.int64)
    assert (values >> 24 == 0).all()
    return np.stack([values & 255, values >> 8 & 255, values >> 16], -1)


def differences(images: NDArray[np.uint8], draws: PolicyDraws, kinds: frozenset[Kind]) -> NDArray[np.int64]:
    """Return the kernels' values minus the CPU path's."""
    height, width = images.shape[1:3]
    pixels = torch.from_numpy(images)
    expected = apply_policy(pixels.permute(0, 3, 1, 2), draws, FILL).permute(0, 2, 3, 1).numpy()
    arguments = PolicyArguments(*all_to_device(policy_arrays(draws, height, width), DEVICE))
    before = pixels.clone()
    found = policy_kernels.apply_policy_kernels(pixels.to(DEVICE), arguments, kinds, FILL)
    assert torch.equal(pixels, before)
    return unpacked(found) - expected


def one_operation(kind: Kind, arguments: Sequence[float], size: tuple[int, int], *, bicubic: bool) -> NDArray[np.int64]:
    """Differences of one operation, between two images that draw none, in the second of two rounds too."""
    num = 2 * len(arguments)
    kinds, values = np.zeros((num + 2, 2), np.int64), np.zeros((num + 2, 2))
    values[1:-1, :] = np.tile(np.array(arguments), 2)[:, None]
    kinds[1:-1, 0] = kinds[1:-1, 1] = kind
    kinds[1 : num // 2, 1] = 0
    draws = PolicyDraws(kinds, values, np.full(kinds.shape, bicubic))
    return differences(pictures(num + 2, *size), draws, frozenset({kind}))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", COLOURS)
def test_colours_and_blur_are_the_same_to_the_last_bit(kind: Kind, size: tuple[int, int]) -> None:
    assert not one_operation(kind, COLOURS[kind], size, bicubic=True).any()


def test_gray_that_is_halfway_is_rounded_up() -> None:
    levels = np.arange(256)
    sums = 19595 * levels[:, None, None] + 38470 * levels[:, None] + 7471 * levels
    halfway = np.argwhere(sums % 65536 == 32768)
    assert len(halfway) > 100
    images = np.resize(halfway, (1, 16, 16, 3)).astype(np.uint8)
    draws = PolicyDraws(np.full((1, 1), int(Kind.COLOR)), np.zeros((1, 1)), np.ones((1, 1), dtype=bool))
    assert not differences(images, draws, frozenset({Kind.COLOR})).any()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bicubic", [True, False], ids=["bicubic", "bilinear"])
@pytest.mark.parametrize("kind", GEOMETRY)
def test_geometric_operations_differ_by_one_at_most_in_few_values(
    kind: Kind, bicubic: bool, size: tuple[int, int]
) -> None:
    found = np.abs(one_operation(kind, GEOMETRY[kind], size, bicubic=bicubic))
    assert found.max() <= 1
    assert found.mean() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("size", [(224, 224), (224, 161)])
def test_random_strengths_of_every_geometric_operation_at_full_size(size: tuple[int, int]) -> None:
    rng = np.random.default_rng(2)
    kinds = np.repeat(np.array(list(GEOMETRY)), 4)
    largest = np.array(
        [{Kind.ROTATE: 135.0, Kind.TRANSLATE_X: 101.0, Kind.TRANSLATE_Y: 101.0}.get(kind, 0.99) for kind in kinds]
    )
    draws = PolicyDraws(
        kinds[:, None], (rng.uniform(-1, 1, len(kinds)) * largest)[:, None], rng.random((len(kinds), 1)) < 0.5
    )
    found = np.abs(differences(pictures(len(kinds), *size), draws, frozenset(GEOMETRY)))
    assert found.max() <= 1
    assert found.mean() < 1e-4


OTHER_POLICIES = ["v0", "3a", "ta_wide", "rand-m5-n3", "rand-n2-t3a", "rand-m9-mstd101-inc1-tweights"]
WHOLE: list[Any] = [(RECIPE, "random"), ("rand-n1-p1-t3a", "bilinear")]
WHOLE += [pytest.param(aa, "bicubic", marks=pytest.mark.slow) for aa in OTHER_POLICIES]


@pytest.mark.parametrize(("aa", "interpolation"), WHOLE)
def test_whole_policies_give_the_images_of_the_cpu_path(aa: str, interpolation: Interpolation) -> None:
    policy, size, num = parse_policy(aa), (41, 36), 40
    draws = draw_policy(policy, num, *size, interpolation, np.random.default_rng(5))
    found = np.abs(differences(pictures(num, *size), draws, policy_kinds(policy)))
    # a value that is off by 1 may be moved by a later operation that multiplies: equalize, contrast
    assert (found > 1).mean() < 1e-5
    assert found.mean() < 2e-4


# --- the whole ---------------------------------------------------------------------------------------------------

OFF: dict[str, Any] = {"aa": "none", "color_jitter": 0, "reprob": 0, "mixup": 0, "cutmix": 0}
NUM_CLASSES = 10


def both_ways(
    settings: dict[str, Any], num: int, size: tuple[int, int], step: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs and targets by the kernels and by the CPU path, of the same draws."""
    same: dict[str, Any] = {
        "num_classes": NUM_CLASSES, "seed": 3, "normalisation": Normalisation.of(DataConfig()), "dtype": dtype,
    }  # fmt: skip
    config = AugmentConfig(**settings)
    images = torch.from_numpy(pictures(num, *size)).permute(0, 3, 1, 2)
    labels = torch.arange(num) % NUM_CLASSES
    ours = TrainAugment(config, device=DEVICE, kernels=True, **same)
    found = ours(images.to(DEVICE), labels.to(DEVICE), step=step, micro_batch=1)
    expected = TrainAugment(config, device=torch.device("cpu"), **same)(images, labels, step=step, micro_batch=1)
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    assert found[0].shape == images.shape
    assert found[0].dtype == dtype
    return found[0].cpu(), found[1].cpu(), *expected


@pytest.mark.parametrize("num", [6, 7])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"reprob": 1, "remode": "const", "recount": 3},
        {"reprob": 1, "remode": "rand", "recount": 2, "smoothing": 0},
        {"reprob": 1, "remode": "pixel", "recount": 2},
        {"mixup": 0.8, "reprob": 0.5},
        {"cutmix": 1.0, "mixup_mode": "elem"},
        {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "elem", "mixup_prob": 0.8, "reprob": 0.5},
        {"mixup": 0.8, "cutmix": 1.0, "mixup_mode": "batch", "cutmix_minmax": (0.3, 0.6)},
        {"color_jitter": 0.4},
        {"color_jitter": 1.0, "mixup": 0.8, "reprob": 0.5},
    ],
    ids=lambda settings: "-".join(f"{name}={value}" for name, value in settings.items()) or "nothing",
)
def test_jitter_erasing_and_mixing_give_what_the_cpu_path_gives(settings: dict[str, Any], num: int) -> None:
    for step in range(3):
        inputs, targets, expected, expected_targets = both_ways({**OFF, **settings}, num, (23, 31), step)
        assert torch.allclose(inputs, expected, rtol=1e-6, atol=1e-5)
        assert torch.allclose(targets, expected_targets, rtol=0, atol=1e-6)


def test_images_are_mixed_in_pairs() -> None:
    settings = {**OFF, "mixup": 0.8, "cutmix": 1.0, "mixup_mode": "pair"}
    inputs, targets, expected, expected_targets = both_ways(settings, 8, (16, 24), 0)
    assert torch.allclose(inputs, expected, rtol=1e-6, atol=1e-6)
    assert torch.allclose(targets, expected_targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(32, 32), pytest.param((224, 224), marks=pytest.mark.slow)])
def test_the_recipe_gives_what_the_cpu_path_gives(size: tuple[int, int], dtype: torch.dtype) -> None:
    inputs, targets, expected, expected_targets = both_ways({"reprob": 0.5}, 10, size, 2, dtype)
    level = 1 / (255 * min(DataConfig().std))  # a value off by 1, before it is mixed
    units = 1 if dtype == torch.bfloat16 and DEVICE.type == "cpu" else 0.5  # the interpreter cuts bfloat16 off
    rounding = torch.finfo(dtype).eps * units * expected.float().abs() + 1e-5
    off = (inputs.float() - expected.float()).abs() > 2 * rounding
    assert off.float().mean() < 1e-4
    assert (inputs.float() - expected.float()).abs().max() <= 2 * level
    assert torch.allclose(targets, expected_targets, rtol=0, atol=1e-6)


def test_images_of_another_memory_format_are_copied() -> None:
    images, labels = torch.from_numpy(pictures(4, 20, 24)).permute(0, 3, 1, 2).to(DEVICE), torch.arange(4).to(DEVICE)
    augment = TrainAugment(
        AugmentConfig(), num_classes=NUM_CLASSES, seed=0, device=DEVICE, normalisation=Normalisation.of(DataConfig()),
        kernels=True,
    )  # fmt: skip
    expected, _ = augment(images, labels, step=0, micro_batch=0)
    found, _ = augment(images.contiguous(), labels.repeat_interleave(2)[::2], step=0, micro_batch=0)
    assert torch.equal(found, expected)


def test_three_augment_jitters_colours_too() -> None:
    inputs, _, expected, _ = both_ways({**OFF, "aa": "3a", "color_jitter": 0.3}, 12, (33, 20), 0)
    assert torch.allclose(inputs, expected, rtol=1e-6, atol=1e-5)


def test_noise_is_that_of_the_cpu_path() -> None:
    """The same words become noise, so no value is another one; values differ by rounding."""
    inputs, _, expected, _ = both_ways({**OFF, "reprob": 1}, 4, (50, 60), 7)
    assert (inputs - expected).abs().max() < 1e-5


@triton.jit
def _normals(words, cosines, sines, BLOCK: tl.constexpr) -> None:  # noqa: N803
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    word = tl.load(words + at).to(tl.uint32)
    tl.store(cosines + at, normal(word, at < 0))
    tl.store(sines + at, normal(word, at >= 0))


def test_every_radius_and_every_angle_is_within_rounding_of_float64() -> None:
    numbers = np.arange(65536)
    for upper, lower in ((numbers, np.full(65536, 6789)), (np.full(65536, 0), numbers), (numbers, numbers[::-1])):
        words = torch.from_numpy(upper << 16 | lower).to(DEVICE)
        cosines, sines = torch.empty((2, 65536), device=DEVICE)
        _normals[(4,)](words, cosines, sines, BLOCK=16384)
        radius, angle = np.sqrt(-2 * np.log((upper + 0.5) / 65536)), lower * (2 * np.pi / 65536)
        for found, exact in ((cosines, radius * np.cos(angle)), (sines, radius * np.sin(angle))):
            # rounding of the last operations: relative to the value, and to the radius where the cosine is small
            assert (np.abs(found.cpu().numpy() - exact) <= 3e-7 * np.abs(exact) + 1e-7 * radius).all()
