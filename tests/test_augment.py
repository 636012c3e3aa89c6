"""Augmentation of a batch: the arithmetic against timm's and torchvision's, the draws against their distributions."""

from __future__ import annotations

import random
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

from ffcv_convnext.augment import TrainAugment, normalise, soft_targets
from ffcv_convnext.augment.erasing import draw_boxes, erase
from ffcv_convnext.augment.mix import MixDraws, apply_mix, draw_mix
from ffcv_convnext.augment.ops import IMAGENET_MEAN, IMAGENET_STD, color_jitter
from ffcv_convnext.config import AugmentConfig

CPU = torch.device("cpu")
NUM, NUM_CLASSES, HEIGHT, WIDTH = 8, 10, 24, 36
MODES = pytest.mark.parametrize("mode", ["batch", "pair", "elem"])


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def float_images(num: int = NUM) -> Tensor:
    images = torch.randn((num, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(1))
    return images.to(memory_format=torch.channels_last)


def uint8_images(num: int = NUM) -> Tensor:
    images = torch.randint(0, 256, (num, 3, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(2))
    return images.to(torch.uint8).to(memory_format=torch.channels_last)


def rows_of(mode: str, num: int = NUM) -> int:
    return {"batch": 1, "pair": num // 2, "elem": num}[mode]


def labels(num: int = NUM) -> Tensor:
    return torch.arange(num) % NUM_CLASSES


# --- mixing: the arithmetic --------------------------------------------------------------------------------------


def mixed_by_timm(
    images: Tensor, draws: MixDraws, mode: str, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> tuple[Tensor, Tensor]:
    """What timm's Mixup makes of a batch of labels 0, 1, 2, ... when it draws what we drew."""
    cut = draws.boxes[:, 1] > draws.boxes[:, 0]
    boxes = iter(draws.boxes[cut])
    mixup = timm.data.mixup.Mixup(mode=mode, label_smoothing=smoothing, num_classes=NUM_CLASSES)
    monkeypatch.setattr(timm.data.mixup, "rand_bbox", lambda *_, **__: tuple(int(side) for side in next(boxes)))
    monkeypatch.setattr(mixup, "_params_per_batch", lambda: (float(draws.lam[0]), bool(cut[0])))
    monkeypatch.setattr(mixup, "_params_per_elem", lambda _: (draws.lam.astype(np.float32), cut))
    mixed: tuple[Tensor, Tensor] = mixup(images.clone(), labels(len(images)))
    assert next(boxes, None) is None, "timm pasted every box"
    return mixed


@MODES
@pytest.mark.parametrize(
    "config", [{}, {"mixup": 0}, {"cutmix": 0}, {"mixup_prob": 0.5}, {"cutmix_minmax": (0.2, 0.8)}]
)
def test_mixing_equals_timm_s_for_the_same_draws(
    mode: str, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    images, targets = float_images(), soft_targets(labels(), NUM_CLASSES, 0.1)
    for seed in range(20):
        draws = draw_mix(AugmentConfig(**config), HEIGHT, WIDTH, rows_of(mode), generator(seed))
        mixed, mixed_targets = apply_mix(images, targets, draws)
        expected, expected_targets = mixed_by_timm(images, draws, mode, 0.1, monkeypatch)
        assert torch.allclose(mixed, expected, atol=2e-6)
        assert torch.allclose(mixed_targets, expected_targets, atol=2e-6)


@MODES
def test_a_mixed_target_equals_the_area_pasted_after_clipping_at_the_border(mode: str) -> None:
    """Images of one colour each: the share of foreign pixels is the partner's share of the target."""
    images = torch.arange(float(NUM))[:, None, None, None].expand(NUM, 3, HEIGHT, WIDTH)
    targets = torch.eye(NUM)
    clipped = 0
    for seed in range(30):
        draws = draw_mix(AugmentConfig(mixup=0), HEIGHT, WIDTH, rows_of(mode), generator(seed))
        mixed, mixed_targets = apply_mix(images, targets, draws)
        shares = torch.stack([(mixed == value).float().mean((1, 2, 3)) for value in range(NUM)], dim=1)
        assert torch.allclose(shares, mixed_targets, atol=1e-6)
        on_border = (draws.boxes[:, 0] == 0) | (draws.boxes[:, 1] == HEIGHT)
        clipped += int(on_border.sum())
    assert clipped > 5


@MODES
@pytest.mark.parametrize("config", [{"mixup": 0}, {"cutmix": 0}])
def test_mixing_leaves_its_inputs_alone_and_keeps_type_and_memory_format(mode: str, config: dict[str, Any]) -> None:
    for images in (float_images(), float_images().contiguous(), float_images().bfloat16()):
        targets = soft_targets(labels(), NUM_CLASSES, 0.1)
        images_before, targets_before = images.clone(), targets.clone()
        draws = draw_mix(AugmentConfig(**config), HEIGHT, WIDTH, rows_of(mode), generator())
        mixed, mixed_targets = apply_mix(images, targets, draws)
        assert torch.equal(images, images_before)
        assert torch.equal(targets, targets_before)
        assert mixed.dtype == images.dtype
        assert mixed.stride() == images.stride()
        assert mixed_targets.dtype == torch.float32
        assert torch.allclose(mixed_targets.sum(1), torch.ones(NUM), atol=1e-6)
        assert not torch.equal(mixed, images)


@MODES
def test_no_mixing_changes_nothing_at_all(mode: str) -> None:
    images, targets = float_images(), soft_targets(labels(), NUM_CLASSES, 0.1)
    draws = draw_mix(AugmentConfig(mixup_prob=0), HEIGHT, WIDTH, rows_of(mode), generator())
    mixed, mixed_targets = apply_mix(images, targets, draws)
    assert torch.equal(mixed, images)
    assert torch.equal(mixed_targets, targets)


@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_the_middle_image_of_an_odd_batch_stays_itself(mode: str) -> None:
    images, targets = float_images(7), soft_targets(labels(7), NUM_CLASSES, 0.1)
    draws = draw_mix(AugmentConfig(), HEIGHT, WIDTH, rows_of(mode, 7), generator())
    mixed, mixed_targets = apply_mix(images, targets, draws)
    assert torch.allclose(mixed[3], images[3], atol=1e-6)
    assert torch.allclose(mixed_targets[3], targets[3], atol=1e-6)


@pytest.mark.parametrize("num", [2, 3, 7])
def test_a_number_of_draws_that_does_not_fit_is_refused(num: int) -> None:
    draws = MixDraws(np.ones(num), np.zeros((num, 4), dtype=np.int64))
    with pytest.raises(ValueError, match=f"{num} draws for 8 images: expected 1, 8 or half as many"):
        apply_mix(float_images(), torch.eye(NUM), draws)


# --- mixing: the draws -------------------------------------------------------------------------------------------


def is_cut(draws: MixDraws) -> NDArray[np.bool_]:
    return (draws.boxes[:, 1] > draws.boxes[:, 0]) & (draws.boxes[:, 3] > draws.boxes[:, 2])


def test_draws_of_the_recipe_have_its_distribution() -> None:
    """Half CutMix, half Mixup with Beta(0.8, 0.8): mean 1/2, variance 1 / (4 (2 x 0.8 + 1))."""
    num = 10_000
    draws = draw_mix(AugmentConfig(), 224, 224, num, generator())
    cut = is_cut(draws)
    assert abs(cut.mean() - 0.5) < 0.02
    mixed = draws.lam[~cut]
    assert abs(mixed.mean() - 0.5) < 0.02
    assert abs(mixed.var() - 1 / (4 * 2.6)) < 0.005
    top, bottom, left, right = draws.boxes[cut].T
    assert (top >= 0).all()
    assert (bottom <= 224).all()
    assert (left >= 0).all()
    assert (right <= 224).all()
    assert np.allclose(draws.lam[cut], 1 - (bottom - top) * (right - left) / 224**2)


def test_cutmix_boxes_are_distributed_like_timm_s() -> None:
    num = 5000
    ours = draw_mix(AugmentConfig(mixup=0), 48, 32, num, generator())
    np.random.seed(0)  # noqa: NPY002 - what timm draws from
    theirs = [timm.data.mixup.cutmix_bbox_and_lam((3, 48, 32), lam) for lam in generator(1).beta(1, 1, num)]
    their_boxes, their_lam = np.array([box for box, _ in theirs]), np.array([lam for _, lam in theirs])
    assert abs(ours.lam.mean() - their_lam.mean()) < 0.02
    assert abs(ours.lam.std() - their_lam.std()) < 0.02
    assert np.abs(ours.boxes.mean(axis=0) - their_boxes.mean(axis=0)).max() < 1
    assert np.abs(ours.boxes.std(axis=0) - their_boxes.std(axis=0)).max() < 1


def test_minmax_boxes_have_sides_in_their_range_and_switch_cutmix_on() -> None:
    draws = draw_mix(AugmentConfig(mixup=0, cutmix=0, cutmix_minmax=(0.25, 0.75)), 48, 32, 2000, generator())
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
    draws = draw_mix(AugmentConfig(**config), 224, 224, 4000, generator())
    assert abs((draws.lam != 1).mean() - mixed_share) < 0.03
    assert abs(is_cut(draws).mean() - cut_share) < 0.03


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
def test_mixing_is_on_where_it_can_happen(config: dict[str, Any], mixes: bool) -> None:
    assert AugmentConfig(**config).mixes is mixes


# --- erasing -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
def test_erasing_changes_the_boxes_and_nothing_else(mode: str) -> None:
    config = AugmentConfig(reprob=0.7, recount=2, remode=mode)  # type: ignore[arg-type]
    images = float_images()
    erased = images.clone()
    boxes = draw_boxes(config, NUM, HEIGHT, WIDTH, generator(5))
    assert len(boxes) > 4
    erase(erased, boxes, config, torch.Generator().manual_seed(3))
    inside = torch.zeros((NUM, 1, HEIGHT, WIDTH), dtype=torch.bool)
    for image, top, bottom, left, right in boxes:
        inside[image, :, top:bottom, left:right] = True
    changed = erased != images
    assert torch.equal(changed, inside.expand_as(changed))
    assert erased.stride() == images.stride()


def test_erased_pixels_are_noise_one_colour_or_the_mean() -> None:
    box = np.array([[0, 0, 100, 0, 100]])
    patches = {}
    for mode in ("pixel", "rand", "const"):
        images = torch.full((1, 3, 100, 100), 9.0)
        erase(images, box, AugmentConfig(remode=mode), torch.Generator().manual_seed(0))  # type: ignore[arg-type]
        patches[mode] = images[0].flatten(1)
    assert torch.equal(patches["const"], torch.zeros((3, 10_000)))
    colour = patches["rand"][:, :1]
    assert torch.equal(patches["rand"], colour.expand(3, 10_000))
    assert colour.unique().numel() == 3
    assert patches["pixel"].mean(1).abs().max() < 0.04
    assert (patches["pixel"].std(1) - 1).abs().max() < 0.04


@pytest.mark.parametrize("count", [1, 3])
def test_boxes_to_erase_are_distributed_like_timm_s(count: int) -> None:
    """Erased share of an image and probability, over 4000 images each. timm draws 1 to recount boxes, too."""
    num, height, width = 4000, 48, 40
    config = AugmentConfig(reprob=0.25, recount=count)
    ours = np.zeros((num, height, width), dtype=bool)
    for image, top, bottom, left, right in draw_boxes(config, num, height, width, generator()):
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


def test_a_box_keeps_timm_s_bounds_of_area_and_aspect() -> None:
    size = 224
    for count in (1, 2):
        boxes = draw_boxes(AugmentConfig(reprob=1, recount=count), 3000, size, size, generator())
        image, top, bottom, left, right = boxes.T
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


def test_recount_is_the_most_boxes_of_an_image() -> None:
    image = draw_boxes(AugmentConfig(reprob=1, recount=3), 3000, 224, 224, generator())[:, 0]
    shares = np.bincount(np.bincount(image, minlength=3000)) / 3000
    assert np.allclose(shares, [0, 1 / 3, 1 / 3, 1 / 3], atol=0.03)


def test_no_erasing_draws_no_box() -> None:
    assert draw_boxes(AugmentConfig(reprob=0), 100, 32, 32, generator()).shape == (0, 5)


# --- pixels ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_normalising_equals_torchvision_s(memory_format: torch.memory_format) -> None:
    images = uint8_images().contiguous(memory_format=memory_format)
    found = normalise(images)
    expected = F.normalize(images.float() / 255, list(IMAGENET_MEAN), list(IMAGENET_STD))
    assert found.dtype == torch.float32
    assert found.stride() == images.stride()
    assert torch.allclose(found, expected, atol=2e-6)


class _Fixed(np.random.Generator):
    """Draws the factors and orders it was given."""

    def __init__(self, factors: NDArray[np.float64], orders: NDArray[np.int64]) -> None:
        super().__init__(np.random.PCG64(0))
        self.factors, self.orders = factors, orders

    def uniform(self, *_: Any, **__: Any) -> Any:
        return self.factors

    def permuted(self, *_: Any, **__: Any) -> Any:
        return self.orders


def test_colour_jitter_equals_torchvision_s_for_the_same_factors_and_orders() -> None:
    """Within 0.1 of 255: torchvision's weights of gray sum up to 0.9999, PIL's to 1."""
    images = uint8_images()
    factors = generator(3).uniform(0.6, 1.4, (NUM, 3))
    orders = generator(4).permuted(np.tile(np.arange(3), (NUM, 1)), axis=1)
    found = color_jitter(images, 0.4, _Fixed(factors, orders))
    steps = [F.adjust_brightness, F.adjust_contrast, F.adjust_saturation]
    for i in range(NUM):
        expected = images[i].float() / 255
        for kind in orders[i]:
            expected = steps[kind](expected, float(factors[i, kind]))
        assert (found[i] - expected * 255).abs().max() < 0.1
    assert found.dtype == torch.float32
    assert found.stride() == images.stride()


def test_colour_jitter_draws_factors_around_one_and_every_order() -> None:
    """A gray image shows brightness alone: contrast and saturation leave it."""
    gray = torch.full((3000, 3, 2, 2), 100, dtype=torch.uint8)
    factors = color_jitter(gray, 0.4, generator())[:, 0, 0, 0] / 100
    assert 0.6 <= factors.min() < 0.61
    assert 1.39 < factors.max() <= 1.4
    assert abs(float(factors.mean()) - 1) < 0.02


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


# --- the whole ---------------------------------------------------------------------------------------------------


def augmentation(seed: int = 0, **settings: Any) -> TrainAugment:
    config = AugmentConfig(**{"aa": "none", "reprob": 0.5, **settings})
    return TrainAugment(config, num_classes=NUM_CLASSES, seed=seed, device=CPU)


@MODES
@pytest.mark.parametrize("jitter", [None, 0.4])
def test_a_batch_keeps_its_shape_and_memory_format_and_the_input_stays(mode: str, jitter: float | None) -> None:
    images = uint8_images()
    before = images.clone()
    inputs, targets = augmentation(mixup_mode=mode, color_jitter=jitter)(images, labels(), step=3, micro_batch=1)
    assert torch.equal(images, before)
    assert inputs.shape == images.shape
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous(memory_format=torch.channels_last)
    assert targets.shape == (NUM, NUM_CLASSES)
    assert torch.allclose(targets.sum(1), torch.ones(NUM), atol=1e-6)


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


def test_the_global_random_state_plays_no_part_and_is_left_alone() -> None:
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
    assert torch.equal(inputs, normalise(uint8_images()))
    assert torch.equal(targets, torch.eye(NUM_CLASSES)[labels()])
