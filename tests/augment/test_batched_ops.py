"""The policy as one graph of fixed shape: the pixels of apply_policy, eager and compiled, whatever was drawn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.datasets import load_sample_images
from torch import Tensor

from ffcv_convnext.augment import Normalisation
from ffcv_convnext.augment.batched_ops import apply_policy_batched, policy_kinds, policy_tensors
from ffcv_convnext.augment.randaugment import Interpolation, Kind, PolicyDraws, apply_policy, draw_policy
from ffcv_convnext.config import DataConfig
from ffcv_convnext.policy_grammar import parse_policy

FILL = Normalisation.of(DataConfig()).fill

RECIPE = "rand-m9-mstd0.5-inc1"
CPU = torch.device("cpu")
SIZE = 61, 83  # height, width


def photographs(num: int) -> Tensor:
    """(num, 3, *SIZE) uint8, channels_last: pieces of two photographs, and of a flat picture."""
    height, width = SIZE
    pictures = [image[::2, ::2] for image in load_sample_images().images]
    pictures.append(np.full_like(pictures[0], (90, 91, 30)))
    places = np.random.default_rng(1).integers(0, 120, (num, 2))
    crops = [pictures[i % 3][y : y + height, x : x + width] for i, (y, x) in enumerate(places)]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2)


def assert_the_same(found: Tensor, expected: Tensor) -> None:
    """But for a few pixels that are off by 1: positions are rounded elsewhere, and PIL cuts fractions off."""
    difference = (found.int() - expected.int()).abs()
    assert difference.max() <= 1
    assert difference.float().mean() < 1e-4


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear", "random"])
@pytest.mark.parametrize("aa", [RECIPE, "v0", "3a", "ta_wide"])
def test_the_pixels_are_those_of_apply_policy(aa: str, interpolation: Interpolation) -> None:
    policy, images = parse_policy(aa), photographs(60)
    draws = draw_policy(policy, 60, *SIZE, interpolation, np.random.default_rng(5))
    tensors = policy_tensors(draws, *SIZE, CPU)
    before = images.clone()
    found = apply_policy_batched(images, tensors, policy_kinds(policy), interpolation, FILL)
    assert_the_same(found, apply_policy(images, draws, FILL))
    assert torch.equal(images, before)
    assert found.dtype == torch.uint8
    assert found.is_contiguous(memory_format=torch.channels_last)


COLOURS = {
    Kind.AUTO_CONTRAST: [0.0], Kind.EQUALIZE: [0.0], Kind.INVERT: [0.0], Kind.POSTERIZE: [0, 1, 4, 8],
    Kind.SOLARIZE: [0, 1, 127.5, 255, 256], Kind.SOLARIZE_ADD: [0, 1, 110, 128], Kind.BRIGHTNESS: [0.01, 0.77, 1.9],
    Kind.COLOR: [0.0, 0.77, 1.9], Kind.CONTRAST: [0.1, 0.77, 1.99], Kind.SHARPNESS: [0.01, 0.77, 1.9],
    Kind.GAUSSIAN_BLUR: [0.1, 0.9, 2.0],
}  # fmt: skip


@pytest.mark.parametrize("kind", COLOURS)
def test_colours_are_the_same_to_the_last_bit(kind: Kind) -> None:
    """Also where the other images of the batch, and the other round, have nothing drawn."""
    arguments = np.repeat(np.array(COLOURS[kind], np.float64), 3)
    images = photographs(2 * len(arguments))
    kinds, values = np.zeros((len(images), 2), np.int64), np.zeros((len(images), 2))
    kinds[: len(arguments), 1], values[: len(arguments), 1] = kind, arguments
    draws = PolicyDraws(kinds, values, np.ones(kinds.shape, dtype=bool))
    everything = frozenset(Kind) - {Kind.IDENTITY}
    found = apply_policy_batched(images, policy_tensors(draws, *SIZE, CPU), everything, "bicubic", FILL)
    assert torch.equal(found, apply_policy(images, draws, FILL))
    assert torch.equal(found[len(arguments) :], images[len(arguments) :])


def test_shapes_do_not_depend_on_what_was_drawn() -> None:
    policy = parse_policy(RECIPE)
    for seed in range(3):
        draws = draw_policy(policy, 7, *SIZE, "random", np.random.default_rng(seed))
        tensors = policy_tensors(draws, *SIZE, CPU)
        shapes = [(tuple(each.shape), each.dtype) for each in tensors]
        assert shapes == [
            ((2, 7), torch.int32),
            ((2, 7), torch.bool),
            ((2, 7, 10), torch.float64),
            ((2, 7, 256), torch.uint8),
        ]
        assert all(each.is_contiguous() for each in tensors)


def test_a_policy_s_kinds_are_those_it_draws() -> None:
    for aa in (RECIPE, "v0", "original", "3a", "ta_wide", "rand-m9-tweights"):
        policy = parse_policy(aa)
        draws = draw_policy(policy, 4000, *SIZE, "bicubic", np.random.default_rng(0))
        assert set(policy_kinds(policy)) - {Kind.IDENTITY} == {Kind(kind) for kind in np.unique(draws.kinds)} - {0}


def test_images_without_three_channels_and_other_numbers_of_draws_are_refused() -> None:
    policy = parse_policy(RECIPE)
    tensors = policy_tensors(draw_policy(policy, 2, *SIZE, "bicubic", np.random.default_rng(0)), *SIZE, CPU)
    with pytest.raises(ValueError, match=r"images are float32 \(2, 3, 8, 8\)"):
        apply_policy_batched(torch.zeros(2, 3, 8, 8), tensors, policy_kinds(policy), "bicubic", FILL)
    with pytest.raises(ValueError, match="2 rows of draws for 3 images"):
        apply_policy_batched(photographs(3), tensors, policy_kinds(policy), "bicubic", FILL)


def compiled_once(function: Callable[..., Tensor], backend: str, batches: list[tuple[Any, ...]]) -> list[Tensor]:
    """Results of a whole graph that is compiled for the first batch and must serve the others."""
    torch.compiler.reset()
    graph = torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
    found = [graph(*batches[0])]
    with torch.compiler.set_stance("fail_on_recompile"):
        return [*found, *(graph(*batch) for batch in batches[1:])]


@pytest.mark.parametrize(
    ("aa", "backend"),
    [
        ("rand-m9-n1-mstd0.5-inc1", "aot_eager"),
        ("3a", "aot_eager"),
        # one round: compiling takes half as long as for two
        pytest.param("rand-m9-n1-mstd0.5-inc1", "inductor", marks=pytest.mark.slow),
    ],
)
def test_one_compiled_graph_serves_all_draws(aa: str, backend: str) -> None:
    policy, num = parse_policy(aa), 12
    kinds = policy_kinds(policy)
    images = [photographs(num + i)[i:] for i in range(3)]
    draws = [draw_policy(policy, num, *SIZE, "bicubic", np.random.default_rng(seed)) for seed in range(3)]
    batches = [
        (each, policy_tensors(drawn, *SIZE, CPU), kinds, "bicubic", FILL)
        for each, drawn in zip(images, draws, strict=True)
    ]  # fmt: skip
    results = compiled_once(apply_policy_batched, backend, batches)
    for found, each, drawn in zip(results, images, draws, strict=True):
        assert_the_same(found, apply_policy(each, drawn, FILL))
        assert found.is_contiguous(memory_format=torch.channels_last)
