"""Augmentation of a batch: the arithmetic against timm's and torchvision's, the draws against their distributions."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import timm.data.mixup
import torch
from numpy.typing import NDArray
from timm.data.random_erasing import RandomErasing
from timm.loss import LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor
from torchvision.transforms import functional as F

from ffcv_convnext.augment import Normalisation, TrainAugment, normalise, soft_targets
from ffcv_convnext.augment.color import color_jitter, draw_jitter, normalised_planes
from ffcv_convnext.augment.erasing import ErasingDraws, draw_erasing, erase, erase_batched, noise
from ffcv_convnext.augment.mix import MixDraws, cutmix_box, draw_mix, mix_batched, mix_image, mix_targets
from ffcv_convnext.augment.to_device import all_to_device
from ffcv_convnext.config import IMAGENET_MEAN, IMAGENET_STD, AugmentConfig, DataConfig, ModelConfig
from ffcv_convnext.models import build_model

CPU = torch.device("cpu")
OF_IMAGENET = Normalisation.of(DataConfig())
NUM, NUM_CLASSES, HEIGHT, WIDTH = 8, 10, 24, 36
MODES = pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
WAYS = pytest.mark.parametrize("batched", [False, True], ids=["image by image", "batched"])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def float_images(num: int = NUM) -> Tensor:
    images = torch.randn((num, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    return images.to(memory_format=torch.channels_last)


def uint8_images(num: int = NUM) -> Tensor:
    images = torch.randint(0, 256, (num, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(2))
    return images.to(torch.uint8).to(memory_format=torch.channels_last)


def labels(num: int = NUM) -> Tensor:
    return torch.arange(num) % NUM_CLASSES


# --- mixing: the arithmetic --------------------------------------------------------------------------------------


def draws_of(mode: str, num: int = NUM, seed: int = 0, **settings: Any) -> MixDraws:
    config = AugmentConfig(mixup_mode=mode, **settings)  # type: ignore[arg-type]
    return draw_mix(config, num, HEIGHT, WIDTH, generator(seed))


def apply_mix(images: Tensor, draws: MixDraws, batched: bool) -> Tensor:
    if batched:
        return mix_batched(images, torch.from_numpy(draws.lam), torch.from_numpy(draws.boxes))
    rows = list(images.permute(0, 2, 3, 1))
    mixtures = [
        mix_image(*each) for each in zip(rows, rows[::-1], draws.lam.tolist(), draws.boxes.tolist(), strict=True)
    ]
    return torch.stack(mixtures).permute(0, 3, 1, 2)


def mixed_by_timm(
    images: Tensor, draws: MixDraws, mode: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """What timm's Mixup makes of a batch of labels 0, 1, 2, ... when it draws what we drew."""
    rows = {"batch": 1, "pair": len(images) // 2, "elem": len(images)}[mode]  # what timm draws
    cut = is_cut(draws)[:rows]
    boxes = iter(draws.boxes[:rows][cut])
    mixup = timm.data.mixup.Mixup(mode=mode, label_smoothing=smoothing, num_classes=NUM_CLASSES)
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *_, **__: tuple(int(side) for side in next(boxes)))
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (float(draws.lam[0]), bool(cut[0])))
    monkeypatch.setattr(mixup, "_params_per_elem", lambda _: (draws.lam[:rows], cut))
    found: tuple[Tensor, Tensor] = mixup(images.clone(), labels(len(images)))
    assert next(boxes, None) is None, "timm pasted every box"
    return found


@WAYS
@MODES
@pytest.mark.parametrize(
    "config", [{}, {"mixup": 0}, {"cutmix": 0}, {"mixup_prob": 0.5}, {"cutmix_minmax": (0.2, 0.8)}]
)
def test_mixing_equals_timm_s_for_the_same_draws(
    mode: str, config: dict[str, Any], batched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = float_images()
    for seed in range(20):
        smoothing = [0.0, 0.1, 0.5][seed % 3]
        draws = draws_of(mode, seed=seed, **config)
        targets = mix_targets(soft_targets(labels(), NUM_CLASSES, smoothing), torch.from_numpy(draws.lam))
        expected, expected_targets = mixed_by_timm(images, draws, mode, smoothing, monkeypatch)
        assert torch.allclose(apply_mix(images, draws, batched), expected, atol=2e-6)
        assert torch.allclose(targets, expected_targets, atol=2e-6)


@WAYS
@MODES
def test_a_mixed_target_equals_the_area_pasted_after_clipping_at_the_border(mode: str, batched: bool) -> None:
    """Images of one colour each: the share of foreign pixels is the partner's share of the target."""
    images = torch.arange(float(NUM))[:, None, None, None].expand(NUM, 3, HEIGHT, WIDTH)
    clipped = 0
    for seed in range(30):
        draws = draws_of(mode, seed=seed, mixup=0)
        found = apply_mix(images, draws, batched)
        shares = torch.stack([(found == value).float().mean((1, 2, 3)) for value in range(NUM)], dim=1)
        assert torch.allclose(shares, mix_targets(torch.eye(NUM), torch.from_numpy(draws.lam)), atol=1e-6)
        on_border = (draws.boxes[:, 0] == 0) | (draws.boxes[:, 1] == HEIGHT)
        clipped += int(on_border.sum())
    assert clipped > 5


@WAYS
@MODES
@pytest.mark.parametrize("config", [{"mixup": 0}, {"cutmix": 0}])
def test_mixing_keeps_its_inputs_type_and_memory_format(mode: str, config: dict[str, Any], batched: bool) -> None:
    images, targets = float_images(), soft_targets(labels(), NUM_CLASSES, 0.1)
    images_before, targets_before = images.clone(), targets.clone()
    draws = draws_of(mode, **config)
    found, found_targets = apply_mix(images, draws, batched), mix_targets(targets, torch.from_numpy(draws.lam))
    assert torch.equal(images, images_before)
    assert torch.equal(targets, targets_before)
    assert found.dtype == found_targets.dtype == torch.float32
    assert found.stride() == images.stride()
    assert torch.allclose(found_targets.sum(1), torch.ones(NUM), atol=1e-6)
    assert not torch.equal(found, images)


@WAYS
@MODES
def test_no_mixing_changes_nothing_at_all(mode: str, batched: bool) -> None:
    images, targets = float_images(), soft_targets(labels(), NUM_CLASSES, 0.1)
    draws = draws_of(mode, mixup_prob=0)
    assert torch.equal(apply_mix(images, draws, batched), images)
    assert torch.equal(mix_targets(targets, torch.from_numpy(draws.lam)), targets)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_the_middle_image_of_an_odd_batch_stays_itself(mode: str) -> None:
    """timm refuses odd batches in every mode."""
    mix = augmentation(mixup_mode=mode, reprob=0, color_jitter=None)
    alone = augmentation(reprob=0, color_jitter=None, mixup=0, cutmix=0)
    for step in range(4):
        inputs, targets = mix(uint8_images(7), labels(7), step=step, micro_batch=0)
        plain, plain_targets = alone(uint8_images(7), labels(7), step=step, micro_batch=0)
        assert torch.allclose(inputs[3], plain[3], atol=1e-6)
        assert torch.allclose(targets[3], plain_targets[3], atol=1e-6)
        assert not torch.equal(inputs[2], plain[2])


def test_an_odd_batch_is_not_mixed_in_pairs() -> None:
    with pytest.raises(ValueError, match=r"^mixup_mode = pair: 7 images cannot form pairs; use an even batch_size"):
        augmentation(mixup_mode="pair")(uint8_images(7), labels(7), step=0, micro_batch=0)


# --- mixing: the draws -------------------------------------------------------------------------------------------


def is_cut(draws: MixDraws) -> NDArray[np.bool_]:
    return (draws.boxes[:, 1] > draws.boxes[:, 0]) & (draws.boxes[:, 3] > draws.boxes[:, 2])


def test_draws_of_the_recipe_have_its_distribution() -> None:
    """Half CutMix, half Mixup with Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 x 0.8 + 1))."""
    num = 10_000
    draws = draw_mix(AugmentConfig(mixup_mode="elem"), num, 224, 224, generator())
    cut = is_cut(draws)
    assert abs(cut.mean() - 0.5) < 0.02
    blended = draws.lam[~cut]
    assert abs(blended.mean() - 0.5) < 0.02
    assert abs(blended.var() - 1 / (4 * 2.6)) < 0.005
    top, bottom, left, right = draws.boxes[cut].T
    assert (top >= 0).all()
    assert (bottom <= 224).all()
    assert (left >= 0).all()
    assert (right <= 224).all()
    assert np.allclose(draws.lam[cut], 1 - (bottom - top) * (right - left) / 224**2)


@pytest.mark.parametrize(
    ("share", "center", "expected"),
    [
        (0.5, (24, 16), (12, 36, 8, 24)),  # sides 24 and 16
        (0.53, (24, 16), (12, 36, 8, 24)),  # 25.4 and 17.0 pixels: the odd pixel is left out on both axes
        (0.53, (3, 30), (0, 15, 22, 32)),  # clipped at the top and on the right
        (0.03, (24, 16), (24, 24, 16, 16)),  # 1 and 0 pixels: empty
        (1.0, (24, 16), (0, 48, 0, 32)),
        (1.0, (0, 0), (0, 24, 0, 16)),
    ],
)
def test_cutmix_boxes_equal_the_papers_timm_to_the_pixel(
    share: float, center: tuple[int, int], expected: tuple[int, int, int, int]
) -> None:
    assert cutmix_box(share, center, 48, 32) == expected


@pytest.mark.parametrize("side", range(0, 48, 2))
def test_cutmix_boxes_of_even_sides_equal_those_of_any_timm(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    share = (side + 0.5) / 48  # both round down to side
    for center in product(range(0, 48, 5), repeat=2):
        drawn = iter(center)
        monkeypatch.setattr(timm.data.mixup.np.random, "randint", lambda *_, drawn=drawn, **__: next(drawn))
        assert cutmix_box(share, center, 48, 48) == timm.data.mixup.rand_bbox((3, 48, 48), 1 - share**2)
        assert cutmix_box((side + 1.5) / 48, center, 48, 48) == cutmix_box(share, center, 48, 48), "the odd pixel"


def test_cutmix_boxes_are_distributed_like_timm_s() -> None:
    num = 5000
    ours = draw_mix(AugmentConfig(mixup=0, mixup_mode="elem"), num, 48, 32, generator())
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    theirs = [timm.data.mixup.cutmix_bbox_and_lam((3, 48, 32), lam) for lam in generator(1).beta(1, 1, num)]
    their_boxes, their_lam = np.array([box for box, _ in theirs]), np.array([lam for _, lam in theirs])
    assert abs(ours.lam.mean() - their_lam.mean()) < 0.02
    assert abs(ours.lam.std() - their_lam.std()) < 0.02
    assert np.abs(ours.boxes.mean(axis=0) - their_boxes.mean(axis=0)).max() < 1
    assert np.abs(ours.boxes.std(axis=0) - their_boxes.std(axis=0)).max() < 1


def test_minmax_boxes_have_sides_in_their_range_and_switch_cutmix_on() -> None:
    config = AugmentConfig(mixup=0, cutmix=0, cutmix_minmax=(0.25, 0.75), mixup_mode="elem")
    draws = draw_mix(config, 2000, 48, 32, generator())
    top, bottom, left, right = draws.boxes.T
    assert is_cut(draws).all()
    assert (bottom - top).min() == 12
    assert (bottom - top).max() == 35  # the upper end is left out, as in timm
    assert (right - left).min() == 8
    assert (right - left).max() == 23
    assert top.min() == left.min() == 0
    assert bottom.max() == 48
    assert right.max() == 32


@pytest.mark.parametrize(
    ("config", "mixed_share", "cut_share"),
    [
        ({"mixup_prob": 0.3}, 0.3, 0.15),
        ({"mixup_switch_prob": 0.2}, 1, 0.2),
        ({"cutmix": 0}, 1, 0),
        ({"mixup": 0}, 1, 1),
        ({"mixup": 0, "mixup_switch_prob": 0}, 1, 1),  # the only one there is
        ({"cutmix": 0, "mixup_switch_prob": 1}, 1, 0),
    ],
)
def test_probabilities_of_mixing_and_of_cutmix(config: dict[str, Any], mixed_share: float, cut_share: float) -> None:
    draws = draw_mix(AugmentConfig(mixup_mode="elem", **config), 4000, 224, 224, generator())
    assert abs((draws.lam != 1).mean() - mixed_share) < 0.03
    assert abs(is_cut(draws).mean() - cut_share) < 0.03


def test_one_draw_serves_a_batch_a_pair_or_an_image() -> None:
    for mode, num_different in [("batch", 1), ("pair", NUM // 2), ("elem", NUM)]:
        for config in ({"mixup": 0}, {"cutmix": 0}):
            draws = draws_of(mode, **config)
            assert len(np.unique(np.c_[draws.lam, draws.boxes], axis=0)) == num_different
            if mode == "pair":
                assert np.array_equal(draws.lam, draws.lam[::-1])
                assert np.array_equal(draws.boxes, draws.boxes[::-1])


@pytest.mark.parametrize(
    ("config", "mixes"),
    [
        ({}, True),
        ({"mixup": 0}, True),
        ({"cutmix": 0}, True),
        ({"mixup": 0, "cutmix": 0}, False),
        ({"mixup": 0, "cutmix": 0, "cutmix_minmax": (0.2, 0.8)}, True),
        ({"mixup_prob": 0}, False),
    ],
)
def test_mixes_is_true_if_mixing_can_happen(config: dict[str, Any], mixes: bool) -> None:
    assert AugmentConfig(**config).mixes is mixes


# --- erasing -----------------------------------------------------------------------------------------------------


def apply_erasing(images: Tensor, draws: ErasingDraws, batched: bool) -> Tensor:
    if batched:
        boxes, colours = torch.from_numpy(draws.boxes), torch.from_numpy(draws.colours)
        key = None if draws.key is None else torch.tensor(draws.key)
        return torch.stack(erase_batched(list(images.unbind(1)), boxes, colours, key), -1).permute(0, 3, 1, 2)
    result = images.clone()
    for i, image in enumerate(result.permute(0, 2, 3, 1)):
        erase(image, i, draws)
    return result


@WAYS
@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_changes_the_boxes_and_nothing_else(mode: str, batched: bool) -> None:
    config = AugmentConfig(reprob=0.7, recount=2, remode=mode)  # type: ignore[arg-type]
    images = float_images()
    draws = draw_erasing(config, NUM, HEIGHT, WIDTH, 3, generator(5))
    erased = apply_erasing(images, draws, batched)
    within = torch.zeros((NUM, 1, HEIGHT, WIDTH), dtype=torch.bool)
    for i, boxes in enumerate(draws.boxes):
        for top, bottom, left, right in boxes:
            within[i, :, top:bottom, left:right] = True
    assert 0.05 < float(within.float().mean()) < 0.5
    changed = erased != images
    assert torch.equal(changed, within.expand_as(changed))
    assert erased.stride() == images.stride()
    if mode == "pixel":
        assert torch.equal(erased[changed], apply_erasing(images * 0, draws, batched)[changed]), "of the pixel alone"


@WAYS
def test_erased_pixels_are_noise_one_colour_or_the_mean(batched: bool) -> None:
    patches = {}
    for mode in ("pixel", "rand", "const"):
        config = AugmentConfig(remode=mode, reprob=1, recount=3)  # type: ignore[arg-type]
        draws = draw_erasing(config, 1, 100, 100, 7, generator())
        draws = ErasingDraws(np.array([[[0, 100, 0, 100], [0, 0, 0, 0], [0, 0, 0, 0]]]), draws.colours, draws.key)
        patches[mode] = apply_erasing(torch.full((1, 3, 100, 100), 9.0), draws, batched)[0].flatten(1)
    assert torch.equal(patches["const"], torch.zeros((3, 10_000)))
    colour = patches["rand"][:, :1]
    assert torch.equal(patches["rand"], colour.expand(3, 10_000))
    assert colour.unique().numel() == 3
    assert patches["pixel"].mean(1).abs().max() < 0.04
    assert (patches["pixel"].std(1) - 1).abs().max() < 0.04


def test_noise_is_normal_and_independent_between_channels_and_neighbours() -> None:
    """Deviations under four standard errors; Kolmogorov and Smirnov's distance under 2 / sqrt(n)."""
    num = 200_000
    channels = torch.stack(noise(123456789123456789, torch.arange(num)))
    assert channels.dtype == torch.float32
    for each in channels.double():
        assert abs(float(each.mean())) < 4 / num**0.5
        assert abs(float((each**2).mean()) - 1) < 4 * (2 / num) ** 0.5
        assert abs(float((each**4).mean()) - 3) < 4 * (96 / num) ** 0.5
        below = 0.5 * (1 + torch.erf(each.sort().values / 2**0.5))
        assert float((below - (torch.arange(num) + 0.5) / num).abs().max()) < 2 / num**0.5
    assert 4 < float(channels.abs().max()) < 4.9
    pairs = [channels[:, :-1], channels[:, 1:], channels[[1, 2, 0], :-1]]
    for first, second in [(pairs[0], pairs[1]), (pairs[0], pairs[2])]:
        for a, b in [(first, second), (first.abs(), second.abs())]:
            correlations = [float(torch.corrcoef(torch.stack([x, y]))[0, 1]) for x, y in zip(a, b, strict=True)]
            assert np.abs(correlations).max() < 4 / num**0.5


def test_noise_is_a_function_of_key_and_pixel() -> None:
    pixels = torch.tensor([5, 2**31, 2**32 - 1, 0])
    for key in (0, 7, 2**62 + 9):
        found = torch.stack(noise(key, pixels))
        assert torch.equal(torch.stack(noise(torch.tensor(key), pixels)), found)
        assert torch.equal(torch.stack(noise(key, pixels[2:])), found[:, 2:])
    keys = [0, 1, 2**32, 2**33, 2**62]  # each half of a key counts
    assert len({torch.stack(noise(key, pixels)).numpy().tobytes() for key in keys}) == len(keys)


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_to_erase_are_distributed_like_timm_s(count: int) -> None:
    """Erased share of an image and probability, over 4000 images each. timm draws 1 to recount boxes, too."""
    num, height, width = 4000, 48, 40
    config = AugmentConfig(reprob=0.25, recount=count)
    ours = np.zeros((num, height, width), dtype=bool)
    for image, boxes in enumerate(draw_erasing(config, num, height, width, 0, generator()).boxes):
        for top, bottom, left, right in boxes:
            ours[image, top:bottom, left:right] = True
    random.seed(0)
    erasing = RandomErasing(probability=0.25, mode="const", max_count=count, device="cpu")
    theirs = (erasing(torch.ones((num, 1, height, width)))[:, 0] == 0).numpy()

    def describe(erased: NDArray[np.bool_]) -> list[float]:
        shares = erased.mean(axis=(1, 2))
        hit = shares > 0
        rows, columns = erased.any(axis=2).sum(axis=1)[hit], erased.any(axis=1).sum(axis=1)[hit]
        return [hit.mean(), shares[hit].mean(), shares[hit].std(), rows.mean() / height, columns.mean() / width]

    assert np.allclose(describe(ours), describe(theirs), atol=0.025)
    assert abs(describe(ours)[0] - 0.25) < 0.02
    assert np.abs(ours.mean(axis=0) - theirs.mean(axis=0)).max() < 0.03, "each pixel is erased as often"


@pytest.mark.parametrize("count", [1, 2])
def test_areas_and_aspects_of_boxes_are_distributed_like_timm_s(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two samples' empirical distributions: Kolmogorov and Smirnov's distance under that of one chance in 1000."""
    num, height, width = 4000, 160, 224
    sizes: list[tuple[int, int]] = []

    def record(_: bool, __: bool, shape: tuple[int, int, int], **___: Any) -> Tensor:
        sizes.append(shape[1:])
        return torch.zeros(())

    monkeypatch.setattr(timm.data.random_erasing, "_get_pixels", record)
    random.seed(0)
    RandomErasing(probability=1, mode="pixel", max_count=count, device="cpu")(torch.ones((num, 1, height, width)))
    theirs = np.array(sizes).T
    boxes = draw_erasing(AugmentConfig(reprob=1, recount=count), num, height, width, 0, generator()).boxes.reshape(
        -1, 4
    )
    top, bottom, left, right = boxes[boxes[:, 1] > 0].T
    ours = np.stack([bottom - top, right - left])
    assert abs(ours.shape[1] / theirs.shape[1] - 1) < 0.04, "as many boxes"
    for of in (np.multiply, np.divide):
        a, b = np.sort(of(*ours)), np.sort(of(*theirs))
        values = np.concatenate([a, b])
        apart = np.searchsorted(a, values, "right") / len(a) - np.searchsorted(b, values, "right") / len(b)
        assert np.abs(apart).max() < 1.95 * (1 / len(a) + 1 / len(b)) ** 0.5


def test_a_box_keeps_timm_s_bounds_of_area_and_aspect() -> None:
    size = 224
    for count in (1, 2):
        boxes = draw_erasing(AugmentConfig(reprob=1, recount=count), 3000, size, size, 0, generator()).boxes
        image, place = np.nonzero(boxes[..., 1])
        top, bottom, left, right = boxes[image, place].T
        heights, widths = bottom - top, right - left
        share_of_area = heights * widths / size**2 * np.bincount(image)[image]
        assert share_of_area.min() > 0.019
        assert share_of_area.max() < 0.34
        assert (heights / widths).min() > 0.28
        assert (heights / widths).max() < 3.6
        assert (top >= 0).all()
        assert (bottom <= size).all()
        assert (left >= 0).all()
        assert (right <= size).all()


def test_recount_is_the_maximum_number_of_boxes() -> None:
    boxes = draw_erasing(AugmentConfig(reprob=1, recount=3), 3000, 224, 224, 0, generator()).boxes
    shares = np.bincount((boxes[..., 1] > 0).sum(axis=1)) / 3000
    assert np.allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)


def test_no_erasing_draws_no_box() -> None:
    assert not draw_erasing(AugmentConfig(reprob=0), 100, 32, 32, 0, generator()).boxes.any()


# --- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalising_equals_torchvision_s(memory_format: torch.memory_format) -> None:
    images = uint8_images().contiguous(memory_format=memory_format)
    found = normalise(images, OF_IMAGENET)
    expected = F.normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert found.dtype == torch.float32
    assert found.stride() == images.stride()
    assert torch.allclose(found, expected, atol=2e-6)
    assert torch.allclose(
        torch.stack(normalised_planes(images, OF_IMAGENET.constants.tolist()), 1), expected, atol=2e-6
    )


def test_colour_jitter_equals_torchvision_s_for_the_same_factors_and_orders() -> None:
    """Within 0.1 of 255: torchvision's weights of gray sum up to 0.9999, PIL's to 1."""
    images, draws = uint8_images(), draw_jitter(0.4, NUM, generator(3))
    found = color_jitter(images, torch.from_numpy(draws.steps), torch.from_numpy(draws.factors))
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for i in range(NUM):
        expected = images[i].float() / 255
        for step, factor in zip(draws.steps[i], draws.factors[i], strict=True):
            expected = steps[step](expected, float(factor))
        assert (found[i] - expected * 255).abs().max() < 0.1
    assert found.dtype == torch.float32
    assert found.stride() == images.stride()


def test_colour_jitter_draws_factors_around_one_and_every_order() -> None:
    draws = draw_jitter(0.4, 3000, generator())
    assert 0.6 <= draws.factors.min() < 0.61
    assert 1.39 < draws.factors.max() <= np.float32(1.4)
    assert abs(float(draws.factors.mean()) - 1) < 0.01
    _, counts = np.unique(draws.steps, axis=0, return_counts=True)
    assert np.allclose(counts / 3000, np.full(6, 1 / 6), atol=0.03)


# --- targets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_soft_targets_give_the_loss_of_timm_s_label_smoothing(smoothing: float) -> None:
    targets = soft_targets(labels(), NUM_CLASSES, smoothing)
    logits = torch.randn((NUM, NUM_CLASSES), generator=torch.Generator().manual_seed(0))
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(NUM))
    assert torch.equal(targets.argmax(1), labels())
    expected = LabelSmoothingCrossEntropy(smoothing)(logits, labels())
    assert torch.allclose(SoftTargetCrossEntropy()(logits, targets), expected, atol=1e-6)


# --- small arrays on their way to the device ---------------------------------------------------------------------


def test_one_transfer_keeps_values_shapes_and_types() -> None:
    arrays: list[NDArray[Any]] = [
        np.array(2**62 + 1),
        np.arange(6.0).reshape(2, 3).T,
        np.ones((3, 2), dtype=bool),
        np.zeros((0, 6)),
        np.arange(3, dtype=np.uint8),
        np.arange(5, dtype=np.float32)[::-2],
    ]
    for array, tensor in zip(arrays, all_to_device(arrays, CPU), strict=True):
        assert tensor.dtype == torch.as_tensor(array.copy()).dtype
        assert tensor.shape == array.shape
        assert tensor.tolist() == array.tolist()
        assert tensor.is_contiguous()
        assert tensor.storage_offset() * tensor.element_size() % 16 == 0
    assert all_to_device([], CPU) == []


# --- the whole ---------------------------------------------------------------------------------------------------


def augmentation(
    seed: int = 0, compile: bool = False, dtype: torch.dtype = torch.float32, **settings: Any
) -> TrainAugment:
    config = AugmentConfig(**{"aa": "none", "reprob": 0.5, **settings})
    return TrainAugment(
        config, num_classes=NUM_CLASSES, seed=seed, device=CPU, normalisation=OF_IMAGENET, compile=compile, dtype=dtype
    )


COMPILED_SETTINGS: list[dict[str, Any]] = [
    {"color_jitter": None, "reprob": 0.5},
    {"color_jitter": 0.4, "reprob": 0.5, "mixup_mode": "pair", "remode": "rand", "recount": 2},
]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """What would be compiled runs as it is written."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What would be compiled is made a graph, but no machine code, which takes long."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("uncompiled")
@WAYS
@MODES
@pytest.mark.parametrize("jitter", [None, 0.4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_a_batch_keeps_its_shape_and_the_input_stays(
    mode: str, jitter: float | None, dtype: torch.dtype, batched: bool, memory_format: torch.memory_format
) -> None:
    images = uint8_images().contiguous(memory_format=memory_format)
    before = images.clone()
    augment = augmentation(mixup_mode=mode, color_jitter=jitter, dtype=dtype, compile=batched)
    inputs, targets = augment(images, labels(), step=3, micro_batch=1)
    assert torch.equal(images, before)
    assert inputs.shape == images.shape
    assert inputs.dtype == dtype
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert not inputs.requires_grad
    assert targets.shape == (NUM, NUM_CLASSES)
    assert targets.dtype == torch.float32
    assert torch.allclose(targets.sum(1), torch.ones(NUM), atol=1e-6)


@pytest.mark.usefixtures("uncompiled")
@MODES
@pytest.mark.parametrize(
    "settings",
    [
        {"color_jitter": None},
        {"color_jitter": None, "remode": "rand", "recount": 3, "smoothing": 0},
        {"color_jitter": 0.4, "remode": "const", "cutmix": 0},
        {"color_jitter": 0.4, "recount": 2, "cutmix_minmax": (0.3, 0.6), "mixup": 0},
        {"color_jitter": None, "reprob": 0, "mixup": 0, "cutmix": 0},
    ],
)
def test_image_by_image_and_batched_are_the_same(mode: str, settings: dict[str, Any]) -> None:
    one_by_one, batched = (augmentation(mixup_mode=mode, compile=each, **settings) for each in (False, True))
    for step in range(8):
        found, targets = one_by_one(uint8_images(), labels(), step=step, micro_batch=0)
        same, same_targets = batched(uint8_images(), labels(), step=step, micro_batch=0)
        assert torch.allclose(found, same, rtol=1e-6, atol=1e-6 if settings.get("color_jitter") is None else 1e-5)
        assert torch.allclose(targets, same_targets, rtol=0, atol=1e-6)


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize(
    ("mode", "aa"),
    [
        ("batch", "none"),
        ("pair", "none"),
        ("elem", "none"),
        pytest.param("batch", "rand-m9-mstd0.5-inc1", marks=pytest.mark.slow),
    ],
)
def test_one_compiled_graph_serves_all_steps_and_draws(mode: str, aa: str) -> None:
    """fullgraph refuses a second graph; a run's first call makes it, and Mixup, CutMix and no mixing share it."""
    augment = augmentation(mixup_mode=mode, aa=aa, compile=True, mixup_prob=0.7, reprob=0.1)
    augment(uint8_images(), labels(), step=0, micro_batch=0)
    kinds = set()
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in [*range(1, 12), 10**6]:
            inputs, _ = augment(uint8_images(), labels(), step=step, micro_batch=step % 3)
            assert torch.isfinite(inputs).all()
            draws = augment.draw(NUM, HEIGHT, WIDTH, step=step, micro_batch=step % 3)
            assert draws.mix is not None
            assert draws.erasing is not None
            kinds.add((bool(is_cut(draws.mix)[0]), bool(draws.mix.lam[0] < 1), bool(draws.erasing.boxes.any())))
    assert {kind[:2] for kind in kinds} == {(True, True), (False, True), (False, False)}
    assert {kind[2] for kind in kinds} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("settings", COMPILED_SETTINGS)
def test_compiled_is_the_same_as_eager(settings: dict[str, Any]) -> None:
    eager, compiled = (augmentation(compile=each, **settings) for each in (False, True))
    for step in range(6):
        with torch.compiler.set_stance("fail_on_recompile" if step else "default"):
            inputs, targets = compiled(uint8_images(), labels(), step=step, micro_batch=0)
        expected, expected_targets = eager(uint8_images(), labels(), step=step, micro_batch=0)
        assert inputs.stride() == expected.stride()
        assert torch.allclose(inputs, expected, rtol=1e-6, atol=1e-5 if settings["color_jitter"] else 1e-6)
        assert torch.allclose(targets, expected_targets, rtol=0, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("settings", COMPILED_SETTINGS)
def test_a_gpu_gives_what_a_cpu_gives(settings: dict[str, Any], compile: bool) -> None:
    config, device = AugmentConfig(aa="none", **settings), torch.device("cuda")
    on_gpu = TrainAugment(
        config, num_classes=NUM_CLASSES, seed=0, device=device, normalisation=OF_IMAGENET, compile=compile
    )
    on_cpu = TrainAugment(config, num_classes=NUM_CLASSES, seed=0, device=CPU, normalisation=OF_IMAGENET)
    for step in range(6):
        inputs, targets = on_gpu(uint8_images().to(device), labels().to(device), step=step, micro_batch=0)
        expected, expected_targets = on_cpu(uint8_images(), labels(), step=step, micro_batch=0)
        assert torch.allclose(inputs.cpu(), expected, rtol=0, atol=1e-5)
        assert torch.allclose(targets.cpu(), expected_targets, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_inputs_are_computed_in_float32_and_rounded_once(dtype: torch.dtype) -> None:
    found, targets = augmentation(dtype=dtype)(uint8_images(), labels(), step=5, micro_batch=0)
    exact, same_targets = augmentation()(uint8_images(), labels(), step=5, micro_batch=0)
    assert torch.equal(found, exact.to(dtype))
    assert torch.equal(targets, same_targets)


def test_the_loss_under_autocast_is_the_same_with_inputs_in_autocast_s_type() -> None:
    torch.manual_seed(0)
    network = build_model(ModelConfig(resnet_layers=(1, 1, 1, 1), resnet_embed_dim=8, resnet_stem="patch_embed"), 10)
    losses = []
    for dtype in (torch.float32, torch.bfloat16):
        inputs, targets = augmentation(dtype=dtype)(uint8_images(), labels(), step=0, micro_batch=0)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(SoftTargetCrossEntropy()(network(inputs), targets))
    assert torch.equal(*losses)


@pytest.mark.parametrize("mode", ["batch", "elem", "pair"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_batch_is_what_torchvision_and_timm_make_of_it_for_the_same_draws(
    mode: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    augment = augmentation(mixup_mode=mode, smoothing=smoothing, color_jitter=None, reprob=0)
    images = F.normalize(uint8_images().float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    for step in range(6):
        inputs, targets = augment(uint8_images(), labels(), step=step, micro_batch=0)
        draws = augment.draw(NUM, HEIGHT, WIDTH, step=step, micro_batch=0).mix
        assert draws is not None
        expected, expected_targets = mixed_by_timm(images, draws, mode, smoothing, monkeypatch)
        assert torch.allclose(inputs, expected, atol=4e-6)
        assert torch.allclose(targets, expected_targets, atol=2e-6)


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (torch.zeros((4, 1, 32, 32), dtype=torch.uint8), r"uint8 \(4, 1, 32, 32\)"),
        (torch.zeros((4, 4, 32, 32), dtype=torch.uint8), r"uint8 \(4, 4, 32, 32\)"),
        (torch.zeros((4, 32, 32, 3), dtype=torch.uint8), r"uint8 \(4, 32, 32, 3\)"),
        (torch.zeros((3, 32, 32), dtype=torch.uint8), r"uint8 \(3, 32, 32\)"),
        (torch.zeros((4, 3, 32, 32)), r"float32 \(4, 3, 32, 32\)"),
    ],
)
@pytest.mark.parametrize("aa", ["none", "rand-m9-mstd0.5-inc1"])
def test_images_of_other_than_three_colours_are_refused(images: Tensor, found: str, aa: str) -> None:
    with pytest.raises(ValueError, match=rf"^images are {found}: augmentation needs uint8 \(N, 3, H, W\), red,"):
        augmentation(aa=aa)(images, labels(4), step=0, micro_batch=0)


@MODES
def test_the_result_is_a_function_of_seed_step_and_micro_batch(mode: str) -> None:
    images = uint8_images()
    first = augmentation(mixup_mode=mode)
    found = {
        (seed, step, micro_batch): augmentation(seed, mixup_mode=mode)(
            images, labels(), step=step, micro_batch=micro_batch
        )
        for seed, step, micro_batch in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 10**6, 7)]
    }
    for (seed, step, micro_batch), (inputs, targets) in reversed(found.items()):
        if seed == 0:  # in another order, from one object that has drawn before
            again_inputs, again_targets = first(images, labels(), step=step, micro_batch=micro_batch)
            assert torch.equal(inputs, again_inputs)
            assert torch.equal(targets, again_targets)
    assert len({inputs.numpy().tobytes() for inputs, _ in found.values()}) == len(found)
    assert len({targets.numpy().tobytes() for _, targets in found.values()}) == len(found)


def test_the_global_random_state_is_neither_used_nor_changed() -> None:
    images, augment = uint8_images(), augmentation()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, _ = augment(images, labels(), step=0, micro_batch=0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(augment(images, labels(), step=0, micro_batch=0)[0], first)


def test_with_everything_off_a_batch_is_normalised_and_its_labels_are_one_hot() -> None:
    plain = augmentation(color_jitter=None, reprob=0, mixup=0, cutmix=0, smoothing=0)
    inputs, targets = plain(uint8_images(), labels(), step=0, micro_batch=0)
    assert torch.equal(inputs, normalise(uint8_images(), OF_IMAGENET))
    assert torch.equal(targets, torch.eye(NUM_CLASSES)[labels()])


def test_another_normalisation_reaches_inputs_and_the_outside_of_rotated_images() -> None:
    half = Normalisation((0.5, 0.5, 0.25), (0.5, 1.0, 0.25))
    assert half.fill == (128, 128, 64)
    same: dict[str, Any] = {"num_classes": NUM_CLASSES, "seed": 0, "device": CPU, "normalisation": half}
    off = {"reprob": 0, "mixup": 0, "cutmix": 0}
    images = uint8_images()
    plain = TrainAugment(AugmentConfig(aa="none", color_jitter=0, **off), **same)
    inputs, _ = plain(images, labels(), step=0, micro_batch=0)
    expected = F.normalize(images.float() / 255, list(half.mean), list(half.std))
    assert torch.allclose(inputs, expected, atol=2e-6)
    black = torch.zeros_like(images)
    geometric = TrainAugment(AugmentConfig(aa="rand-m9-n1-p1.0-mstd0.5", **off), **same)
    found = [geometric(black, labels(), step=step, micro_batch=0)[0] for step in range(8)]
    levels = (torch.cat(found) * torch.tensor(half.std)[:, None, None] + torch.tensor(half.mean)[:, None, None]) * 255
    colours = {tuple(colour) for colour in levels.permute(0, 2, 3, 1).reshape(-1, 3).round().int().tolist()}
    assert half.fill in colours, "some image was turned, sheared or moved"
    assert Normalisation.of(DataConfig()).fill not in colours
