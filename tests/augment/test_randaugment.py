"""Policies against timm's and torchvision's: the pixels on photographs, the draws by their distributions."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from timm.data import auto_augment as timm_policies
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms import autoaugment as torchvision_policies

from ffcv_convnext.augment import Normalisation, TrainAugment, normalise
from ffcv_convnext.augment.randaugment import (
    OPERATIONS,
    WIDE_OPERATIONS,
    Kind,
    PolicyDraws,
    Strength,
    apply_policy,
    draw_policy,
)
from ffcv_convnext.config import AugmentConfig, DataConfig
from ffcv_convnext.policy_grammar import NUM_WIDE_LEVELS, parse_policy

OF_IMAGENET = Normalisation.of(DataConfig())
FILL = OF_IMAGENET.fill

RECIPE = "rand-m9-mstd0.5-inc1"
SIZES = [(224, 224), (97, 131), (61, 40)]  # width, height
FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
GEOMETRIC = {Kind.ROTATE, Kind.SHEAR_X, Kind.SHEAR_Y, Kind.TRANSLATE_X, Kind.TRANSLATE_Y}
WORDS = {Kind.POSTERIZE, Kind.SOLARIZE, Kind.SOLARIZE_ADD}  # PIL wants integers
TIMM_OPS: dict[Kind, Any] = {
    Kind.AUTO_CONTRAST: timm_policies.auto_contrast,
    Kind.EQUALIZE: timm_policies.equalize,
    Kind.INVERT: timm_policies.invert,
    Kind.POSTERIZE: timm_policies.posterize,
    Kind.SOLARIZE: timm_policies.solarize,
    Kind.SOLARIZE_ADD: timm_policies.solarize_add,
    Kind.BRIGHTNESS: timm_policies.brightness,
    Kind.COLOR: timm_policies.color,
    Kind.CONTRAST: timm_policies.contrast,
    Kind.SHARPNESS: timm_policies.sharpness,
    Kind.GAUSSIAN_BLUR: timm_policies.gaussian_blur,
    Kind.SHEAR_X: timm_policies.shear_x,
    Kind.SHEAR_Y: timm_policies.shear_y,
    Kind.TRANSLATE_X: timm_policies.translate_x_abs,
    Kind.TRANSLATE_Y: timm_policies.translate_y_abs,
    Kind.ROTATE: timm_policies.rotate,
}


def photographs(size: tuple[int, int]) -> list[Image.Image]:
    """Two photographs, and a picture almost without contrast, two of whose channels have a single value."""
    found = [Image.fromarray(image).resize(size) for image in load_sample_images().images]
    flat = np.full((size[1], size[0], 3), (90, 91, 30), np.uint8)
    flat[: size[1] // 3, :, 0] = 94
    return [*found, Image.fromarray(flat)]


def batch_of(images: list[Image.Image]) -> Tensor:
    """(N, 3, H, W) uint8, channels_last."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)


def uint8_images(num: int, size: int = 32) -> Tensor:
    images = torch.randint(0, 256, (num, 3, size, size), generator=torch.Generator().manual_seed(2))
    return images.to(torch.uint8).to(memory_format=torch.channels_last)


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def one_round(kind: Kind, arguments: Any, interpolation: str = "bicubic") -> PolicyDraws:
    arguments = np.asarray(arguments, np.float64)[:, None]
    return PolicyDraws(
        np.full(arguments.shape, int(kind)), arguments, np.full(arguments.shape, interpolation == "bicubic")
    )


def by_timm(image: Image.Image, kind: Kind, argument: float, interpolation: str) -> NDArray[np.int64]:
    if kind == Kind.POSTERIZE and argument < 1:  # black, says timm; newer versions of PIL refuse 0 bits
        return np.zeros((image.height, image.width, 3), np.int64)
    arguments = () if kind <= Kind.INVERT else (int(argument) if kind in WORDS else float(argument),)
    found = TIMM_OPS[kind](image, *arguments, fillcolor=FILL, resample=FILTERS[interpolation])
    return np.asarray(found).astype(np.int64)


# --- the pixels --------------------------------------------------------------------------------------------------


def differences(size: tuple[int, int], name: str, interpolation: str) -> tuple[int, float]:
    """Largest difference from timm's pixels, and the largest mean one, for all magnitudes and both signs."""
    images = photographs(size)
    batch, (kind, argument) = batch_of(images), OPERATIONS[name]
    num, extent = len(images), size[1] if kind == Kind.TRANSLATE_Y else size[0]
    magnitudes, signs = np.meshgrid(np.arange(11.0), [-1.0, 1.0])
    strength = Strength(magnitudes.ravel(), signs.ravel(), np.linspace(0, 0.99, 22), extent)
    largest, mean = 0, 0.0
    for value in np.unique(argument(strength)):
        found = apply_policy(batch, one_round(kind, [value] * num, interpolation), FILL).permute(0, 2, 3, 1).numpy()
        for ours, image in zip(found, images, strict=True):
            difference = np.abs(ours - by_timm(image, kind, value, interpolation))
            largest, mean = max(largest, int(difference.max())), max(mean, float(difference.mean()))
    return largest, mean


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name, (kind, _) in OPERATIONS.items() if kind not in GEOMETRIC])
def test_colours_are_timm_s_at_every_magnitude(name: str, size: tuple[int, int]) -> None:
    largest, _ = differences(size, name, "bicubic")
    assert largest == 0


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", [name for name, (kind, _) in OPERATIONS.items() if kind in GEOMETRIC])
def test_geometry_is_timm_s_at_every_magnitude(name: str, size: tuple[int, int], interpolation: str) -> None:
    """Within 1 of 255: PIL cuts fractions off, and rounding decides about those that should be whole."""
    largest, mean = differences(size, name, interpolation)
    assert largest <= 1
    assert mean < 0.1


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("kind", [Kind.SHEAR_X, Kind.SHEAR_Y])
@pytest.mark.parametrize("argument", [0.99, -0.99])
def test_a_line_moved_by_almost_the_whole_image_is_timm_s(kind: Kind, argument: float, interpolation: str) -> None:
    images = photographs((32, 32))
    found = apply_policy(batch_of(images), one_round(kind, [argument] * len(images), interpolation), FILL)
    for ours, image in zip(found.permute(0, 2, 3, 1).numpy(), images, strict=True):
        assert np.abs(ours - by_timm(image, kind, argument, interpolation)).max() <= 1


@pytest.mark.parametrize("interpolation", FILTERS)
@pytest.mark.parametrize("kind", sorted(GEOMETRIC))
def test_the_outside_is_filled_as_in_timm(kind: Kind, interpolation: str) -> None:
    """Black images: what is not black is fill."""
    size, num = (90, 64), 41
    black = Image.new("RGB", size)
    arguments = np.linspace(-1.0, 1.0, num) * {Kind.ROTATE: 180.0}.get(kind, 0.99 if "SHEAR" in kind.name else 100.5)
    found = apply_policy(batch_of([black] * num), one_round(kind, arguments, interpolation), FILL).permute(0, 2, 3, 1)
    for ours, argument in zip(found.numpy(), arguments, strict=True):
        assert np.array_equal(ours, by_timm(black, kind, argument, interpolation))
    assert {tuple(pixel) for pixel in found.reshape(-1, 3).unique(dim=0).tolist()} == {(0, 0, 0), FILL}


def test_wide_operations_are_torchvision_s_at_every_level() -> None:
    """Within 1 of 255, but for a pixel on the very edge: torchvision turns a shear into an angle and back."""
    images = photographs((97, 131))
    space = torchvision_policies.TrivialAugmentWide()._augmentation_space(NUM_WIDE_LEVELS)
    assert list(space) == list(WIDE_OPERATIONS)
    assert tuple(steps[0].name for steps in parse_policy("ta_wide").sequences) == tuple(space)
    for name, (kind, argument) in WIDE_OPERATIONS.items():
        magnitudes, signed = space[name]
        for level in range(0, NUM_WIDE_LEVELS, 3):
            strength = Strength(np.full(1, float(level)), np.full(1, -1.0), np.zeros(1), 0)
            value = argument(strength)
            # rounded: cutting off 15.999999, float32, would make 15 pixels of 16
            expected_value = round(float(magnitudes[level]), 4) if magnitudes.ndim else 0.0
            image = images[level // 3 % 3]
            found = apply_policy(batch_of([image]), one_round(kind, value), FILL)[0].permute(1, 2, 0).numpy()
            expected = torchvision_policies._apply_op(
                image, name, -expected_value if signed else expected_value, InterpolationMode.BICUBIC, list(FILL)
            )
            differs = (np.abs(found.astype(int) - np.asarray(expected)) > 1).any(axis=-1)
            assert differs.sum() <= 1, (name, level)


def test_rounds_follow_one_another_and_images_do_not_mix() -> None:
    images = photographs((97, 131))
    first, second = [Kind.COLOR, Kind.EQUALIZE, Kind.ROTATE], [Kind.ROTATE, Kind.IDENTITY, Kind.SOLARIZE]
    arguments = [(0.3, -20.0), (0.0, 0.0), (15.0, 33.0)]
    draws = PolicyDraws(np.array([first, second]).T, np.array(arguments), np.ones((3, 2), dtype=bool))
    found = apply_policy(batch_of(images), draws, FILL).permute(0, 2, 3, 1).numpy()
    for ours, image, kinds, values in zip(found, images, draws.kinds, arguments, strict=True):
        expected = image
        for kind, value in zip(kinds, values, strict=True):
            if kind != Kind.IDENTITY:
                expected = Image.fromarray(by_timm(expected, Kind(kind), value, "bicubic").astype(np.uint8))
        assert np.abs(ours - np.asarray(expected).astype(np.int64)).max() <= 1


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_policy_keeps_type_shape_and_memory_format_and_its_input(memory_format: torch.memory_format) -> None:
    images = uint8_images(40).contiguous(memory_format=memory_format)
    before = images.clone()
    draws = draw_policy(parse_policy("rand-m9-n3-p1"), 40, 32, 32, "random", generator())
    found = apply_policy(images, draws, FILL)
    assert torch.equal(images, before)
    assert found.dtype == torch.uint8
    assert found.shape == images.shape
    assert found.is_contiguous(memory_format=memory_format)
    assert not torch.equal(found, images)
    assert found.data_ptr() != images.data_ptr()


def test_an_image_s_result_does_not_depend_on_its_neighbours() -> None:
    images = uint8_images(40)
    draws = draw_policy(parse_policy(RECIPE), 40, 32, 32, "random", generator())
    found = apply_policy(images, draws, FILL)
    for i in range(0, 40, 7):
        alone = PolicyDraws(draws.kinds[i : i + 1], draws.arguments[i : i + 1], draws.bicubic[i : i + 1])
        assert torch.equal(apply_policy(images[i : i + 1], alone, FILL), found[i : i + 1])


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros((2, 1, 32, 32), dtype=torch.uint8), r"uint8 \(2, 1, 32, 32\)"),
        (torch.zeros((2, 4, 32, 32), dtype=torch.uint8), r"uint8 \(2, 4, 32, 32\)"),
        (torch.zeros((2, 3, 32, 32)), r"float32 \(2, 3, 32, 32\)"),
        (torch.zeros((3, 32, 32), dtype=torch.uint8), r"uint8 \(3, 32, 32\)"),
    ],
)
def test_other_images_are_refused(images: Tensor, found: str) -> None:
    with pytest.raises(ValueError, match=rf"images are {found}: a policy needs uint8 \(N, 3, H, W\)"):
        apply_policy(images, one_round(Kind.INVERT, [0.0, 0.0]), FILL)


def test_draws_for_another_number_of_images_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows of draws for 2 images"):
        apply_policy(uint8_images(2), one_round(Kind.INVERT, [0.0] * 3), FILL)


# --- what magnitudes mean ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATIONS)
def test_magnitudes_have_timm_s_strengths(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    magnitudes = np.concatenate([np.linspace(0, 10, 101), [12.0, 15.0]])  # beyond 10 with mmax
    level = timm_policies.LEVEL_TO_ARG[name]
    for sign in (-1.0, 1.0):
        monkeypatch.setattr(random, "random", lambda sign=sign: 0.9 if sign < 0 else 0.1)
        num = len(magnitudes)
        found = OPERATIONS[name][1](Strength(magnitudes, np.full(num, sign), np.full(num, 0.25), 200))
        for magnitude, ours in zip(magnitudes, found, strict=True):
            expected: Any = 0.0
            if level is not None:
                drawn = level(magnitude, {})
                expected = drawn[0] if isinstance(drawn, tuple) else drawn  # SolarizeAdd's is bare
            if name.startswith("Translate"):
                expected *= 200
            elif name == "Desaturate":
                expected = min(1.0, max(0.0, 1.0 - expected))
            elif name == "GaussianBlurRand":
                expected = 0.1 + (2.0 * expected - 0.1) * 0.25
            assert ours == pytest.approx(expected, abs=1e-12)
            if OPERATIONS[name][0] in WORDS:
                assert ours == expected, "integers are the same"


# --- the draws ---------------------------------------------------------------------------------------------------

NUM_DRAWS = 6000


def timm_s_draws(text: str, monkeypatch: pytest.MonkeyPatch) -> list[list[tuple[str, tuple[float, ...]]]]:
    """What timm applies to each of NUM_DRAWS images: names of functions and their arguments, in turn."""
    applied: list[tuple[str, tuple[float, ...]]] = []

    def recorder(name: str) -> Any:
        def record(image: Any, *arguments: float, **_: Any) -> Any:
            applied.append((name, arguments))
            return image

        return record

    monkeypatch.setattr(timm_policies, "NAME_TO_OP", {name: recorder(name) for name in timm_policies.NAME_TO_OP})
    build = timm_policies.rand_augment_transform if text.startswith("rand") else timm_policies.auto_augment_transform
    transform = build(text, {"img_mean": FILL})
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    result = []
    for _ in range(NUM_DRAWS):
        applied.clear()
        transform(None)
        result.append(list(applied))
    return result


def distance(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    """Largest difference of two samples' cumulative distributions."""
    at = np.concatenate([first, second])
    shares = [np.searchsorted(np.sort(each), at, side="right") / len(each) for each in (first, second)]
    return float(np.abs(shares[0] - shares[1]).max())


@pytest.mark.parametrize(
    "text",
    [
        RECIPE, "rand-m7", "rand-m5-n3-p0.8-mstd2-mmax6", "rand-m9-mstd101-inc1", "rand-m15-mmax20-mstd4-inc1",
        "rand-m9-n4-tweights-inc1", "rand-t3aw-n3-p0.7", "rand-m6-t3a", "v0", "v0r-mstd0.5", "original-mstd1",
        "originalr", "3a",
    ],
)  # fmt: skip
def test_operations_and_their_strengths_are_distributed_like_timm_s(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By kind: how often, and with which arguments; and how many operations an image gets."""
    theirs = timm_s_draws(text, monkeypatch)
    ours = draw_policy(parse_policy(text), NUM_DRAWS, 1, 1, "bicubic", generator(3))
    counts = np.bincount((ours.kinds > 0).sum(axis=1), minlength=8)
    assert np.abs(counts - np.bincount([len(each) for each in theirs], minlength=8)).max() < 5 * NUM_DRAWS**0.5
    arguments: dict[Kind, list[float]] = {}
    for each in theirs:
        for name, values in each:
            kind = OPERATIONS[name][0]
            value = values[0] if values else 0.0
            if name == "GaussianBlurRand":
                value = random.uniform(0.1, 2.0 * value)
            arguments.setdefault(kind, []).append(1 - value if name == "Desaturate" else value)
    assert {int(kind) for kind in arguments} == set(np.unique(ours.kinds)) - {0}
    for kind, values in arguments.items():
        found = ours.arguments[ours.kinds == kind]
        expected = np.array(values)
        assert abs(len(found) - len(expected)) < 5 * max(len(expected), 25) ** 0.5, kind.name
        # Kolmogorov and Smirnov's distance; of samples of one distribution it is larger once in 2000 times
        assert distance(np.round(found, 9), np.round(expected, 9)) < 2.0 * (2 / len(expected)) ** 0.5, kind.name


@pytest.mark.parametrize(
    ("text", "twice"), [("rand-n2-p1", 1 / 15), ("rand-n2-p1-tweights", 0.0), ("rand-n2-p1-w0-inc1", 0.0)]
)
def test_weighted_operations_are_drawn_without_replacement(text: str, twice: float) -> None:
    kinds = draw_policy(parse_policy(text), 8000, 64, 64, "bicubic", generator()).kinds
    assert abs((kinds[:, 0] == kinds[:, 1]).mean() - twice) < 0.015


def test_w0_has_the_weights_of_older_versions_of_timm() -> None:
    kinds = draw_policy(parse_policy("rand-n1-p1-w0-inc1"), 20_000, 64, 64, "bicubic", generator()).kinds
    shares = np.bincount(kinds[:, 0], minlength=17) / len(kinds)
    assert abs(shares[Kind.ROTATE] - 0.3) < 0.015
    assert abs(shares[Kind.SHEAR_X] - 0.2) < 0.015
    assert abs(shares[Kind.TRANSLATE_Y] - 0.1) < 0.015
    assert abs(shares[Kind.COLOR] - 0.025) < 0.006
    assert shares[Kind.POSTERIZE] == shares[Kind.INVERT] == 0


def test_trivialaugment_draws_one_operation_of_fourteen_and_any_level() -> None:
    draws = draw_policy(parse_policy("ta_wide"), 20_000, 64, 64, "bicubic", generator())
    assert draws.kinds.shape == (20_000, 1)
    shares = np.bincount(draws.kinds[:, 0], minlength=17) / 20_000
    assert np.abs(shares[shares > 0] - 1 / 14).max() < 0.01
    assert (shares > 0).sum() == 14
    rotations = draws.arguments[draws.kinds == Kind.ROTATE]
    assert np.allclose(np.unique(np.abs(rotations)), np.arange(31) * 4.5)
    assert abs((rotations < 0).mean() - 0.5) < 0.05


@pytest.mark.parametrize(("interpolation", "share"), [("bicubic", 1.0), ("bilinear", 0.0), ("random", 0.5)])
def test_interpolation_follows_the_setting(interpolation: Any, share: float) -> None:
    draws = draw_policy(parse_policy(RECIPE), 2000, 64, 64, interpolation, generator())
    assert abs(draws.bicubic.mean() - share) < 0.04


# --- what a string says ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["v0", "v0r", "original", "originalr", "3a"])
def test_autoaugment_s_sequences_are_timm_s(text: str) -> None:
    expected = tuple(
        tuple((op.name, op.prob, op.magnitude) for op in steps) for steps in timm_policies.auto_augment_policy(text)
    )
    found = parse_policy(text).sequences
    assert tuple(tuple((step.name, step.prob, step.magnitude) for step in steps) for steps in found) == expected


@pytest.mark.parametrize("text", [RECIPE, "rand", "rand-m3-n5-p0.25-mstd1-mmax12", "rand-t3a", "rand-tweights-inc1"])
def test_randaugment_s_settings_are_timm_s(text: str) -> None:
    found, expected = parse_policy(text), timm_policies.rand_augment_transform(text, {})
    assert found.num_draws == expected.num_layers
    assert [(steps[0].name, steps[0].prob, steps[0].magnitude) for steps in found.sequences] == [
        (op.name, op.prob, op.magnitude) for op in expected.ops
    ]
    assert {found.magnitude_std} == {op.magnitude_std for op in expected.ops}
    assert {found.magnitude_max} == {op.magnitude_max or 10 for op in expected.ops}
    if expected.choice_weights is None:
        assert found.weights is None
    else:
        assert np.allclose(np.array(found.weights), expected.choice_weights)


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("rnd-m9", "unknown policy rnd"),
        ("", "unknown policy without a name"),
        ("augmix-m5-w4", "AugMix is not available on the device"),
        ("rand-m9-q3", "unknown section q of rand"),
        ("rand-m9-inc", "unknown section 'inc'"),
        ("rand-m9.5", "m9.5 is not an integer"),
        ("rand-mstd0.5x", "mstd0.5x is not a number"),
        ("rand-m9-m8", "section m occurs twice"),
        ("rand-n0", "n0 is not a number of operations"),
        ("rand-p1.5", "p1.5 is not a probability"),
        ("rand-mmax0", "mmax0 leaves no magnitude"),
        ("rand-tcolours", "unknown set of operations tcolours"),
        ("rand-w1", "unknown weights w1"),
        ("rand-w0-tweights", "w and t cannot be combined"),
        ("rand-n14-w0", "n14 of 13 weighted operations"),
        ("v0-m9", "unknown section m of v0"),
        ("ta_wide-m9", "unknown section m of ta_wide"),
    ],
)
def test_invalid_policies_are_refused_with_the_grammar(text: str, wrong: str) -> None:
    with pytest.raises(ValueError, match=f"^aa = {text}: {wrong}") as error:
        AugmentConfig(aa=text)
    for word in ("rand", "-mstd", "-mmax", "originalr", "3a", "ta_wide"):
        assert word in str(error.value)


# --- in a run ----------------------------------------------------------------------------------------------------

OFF = {"reprob": 0.0, "mixup": 0.0, "cutmix": 0.0}


def augmented(images: Tensor, seed: int = 0, step: int = 0, micro_batch: int = 0, **settings: Any) -> Tensor:
    config = AugmentConfig(**{**OFF, **settings})
    augment = TrainAugment(config, num_classes=4, seed=seed, device=torch.device("cpu"), normalisation=OF_IMAGENET)
    return augment(images, torch.zeros(len(images), dtype=torch.int64), step=step, micro_batch=micro_batch)[0]


@pytest.mark.parametrize("aa", [RECIPE, "v0", "3a", "ta_wide"])
def test_a_run_s_policy_is_a_function_of_seed_step_and_micro_batch(aa: str) -> None:
    images = uint8_images(24)
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    found = [augmented(images, *key, aa=aa) for key in keys]
    assert all(torch.equal(augmented(images, *key, aa=aa), each) for key, each in zip(keys, found, strict=True))
    assert len({each.numpy().tobytes() for each in found}) == len(keys)


def test_a_run_applies_the_policy_before_it_normalises() -> None:
    images = uint8_images(24)
    found = augmented(images, aa="rand-m9-mstd0.5-inc1")
    unchanged = (found == normalise(images, OF_IMAGENET)).flatten(1).all(1)
    assert 0 < int(unchanged.sum()) < 16, "about a quarter of the images draw no operation"


@pytest.mark.parametrize(("aa", "jitters"), [("none", True), (RECIPE, False), ("3a", True), ("rand-t3a", True)])
def test_colour_jitter_is_enabled_as_in_timm(aa: str, jitters: bool) -> None:
    images = uint8_images(6)
    assert AugmentConfig(aa=aa).jitters is jitters
    assert not AugmentConfig(aa=aa, color_jitter=0.0).jitters
    assert torch.equal(augmented(images, aa=aa), augmented(images, aa=aa, color_jitter=None)) is not jitters
