"""Random numbers as a function of (seed, epoch, sample, stream): known answers, three twins, and what they are for."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ffcv_convnext.rng import PHILOX, Stream, permutation, philox_rounds, sample_words, short_words, step_seed, uniform

# Random123 1.14's kat_vectors, "philox4x32 10": counter, key, result.
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
SEEDS = [0, 1, 2**32 - 1, 2**32 + 5, 2**63 - 1]
SAMPLES = np.array([0, 1, 7, 2**31, 2**32 - 1, 2**32, 2**40 + 3], dtype=np.uint64)


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN_ANSWERS)
def test_philox_gives_random123_s_known_answers(counter: str, key: str, result: str) -> None:
    as_numpy = [np.array([word], dtype=np.uint64) for word in words(counter) + words(key)]
    assert [int(word[0]) for word in philox_rounds(*as_numpy, PHILOX)] == words(result)
    as_torch = [torch.tensor([word]) for word in words(counter) + words(key)]
    assert [int(word) for word in philox_rounds(*as_torch, PHILOX)] == words(result)


@pytest.mark.parametrize(
    ("counter", "key", "result"),  # of the same file, "philox2x32 10"
    [
        ("00000000 00000000", "00000000", "ff1dae59 6cd10df2"),
        ("ffffffff ffffffff", "ffffffff", "2c3f628b ab4fd7ad"),
        ("243f6a88 85a308d3", "13198a2e", "dd7ce038 f62a4c12"),
    ],
)
def test_short_philox_gives_random123_s_known_answers(counter: str, key: str, result: str) -> None:
    first, second, low = (torch.tensor(word) for word in words(f"{counter} {key}"))
    assert [int(word) for word in short_words(first << 32 | low, second)] == words(result)


def test_a_key_of_short_philox_is_a_number_or_a_tensor() -> None:
    samples = torch.tensor([0, 9, 2**32 - 1])
    for key in (0, 2**32 - 1, 2**40 + 3, 2**63 - 1):
        by_number, by_tensor = short_words(key, samples), short_words(torch.tensor(key), samples)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(by_number, by_tensor, strict=True))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("epoch", [0, 299, 2**32 - 1])
def test_numpy_torch_and_numba_agree(seed: int, epoch: int) -> None:
    crops = pytest.importorskip("ffcv_convnext.data.load.crops")
    block = 5
    by_numpy = sample_words(seed, epoch, SAMPLES, Stream.CROP, block)
    by_torch = sample_words(seed, epoch, torch.from_numpy(SAMPLES.astype(np.int64)), Stream.CROP, block)
    for ours, theirs in zip(by_numpy, by_torch, strict=True):
        assert ours.tolist() == theirs.tolist()
        assert uniform(ours).tolist() == uniform(theirs).tolist()
    key, numba_block = crops.Key(np.uint64(seed), np.uint64(epoch)), np.uint64(Stream.CROP << 16 | block)
    by_numba = [crops.uniforms(key, int(s) & 0xFFFFFFFF, int(s) >> 32, numba_block) for s in SAMPLES]
    assert np.array_equal(np.stack([uniform(w) for w in by_numpy], axis=1), np.array(by_numba))


def test_a_uniform_number_is_below_one_also_in_float32() -> None:
    extremes = np.array([0, 2**32 - 1], dtype=np.uint64)
    assert uniform(extremes).tolist() == [0, 1 - 2**-24]
    in_float32 = uniform(torch.tensor([0, 2**32 - 1]))
    assert in_float32.dtype == torch.float32
    assert in_float32.tolist() == [0, 1 - 2**-24]


def test_uniform_numbers_are_uniform_and_independent() -> None:
    """Deviations under four standard errors; the seed is fixed, so this cannot fail by chance."""
    num = 100_000
    draws = np.stack([uniform(w) for w in sample_words(3, 4, np.arange(num, dtype=np.uint64), Stream.CROP)])
    assert np.abs(draws.mean(axis=1) - 0.5).max() < 4 * np.sqrt(1 / 12 / num)
    assert np.abs((draws**2).mean(axis=1) - 1 / 3).max() < 4 * np.sqrt(4 / 45 / num)
    for row in draws:
        counts = np.histogram(row, bins=64, range=(0, 1))[0]
        assert ((counts - num / 64) ** 2 / (num / 64)).sum() < 63 + 4 * np.sqrt(2 * 63)
        assert abs(np.corrcoef(row[1:], row[:-1])[0, 1]) < 4 / np.sqrt(num)
    off_diagonal = np.corrcoef(draws) - np.eye(4)
    assert np.abs(off_diagonal).max() < 4 / np.sqrt(num)


@pytest.mark.parametrize("num", [1, 2, 80, 10_000])
def test_a_permutation_has_every_sample_once(num: int) -> None:
    order = permutation(num, seed=1, epoch=2)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num))


def test_orders_differ_between_seeds_epochs_and_streams_and_repeat_otherwise() -> None:
    asked = list(itertools.product([0, 1, 2**32], [0, 1, 2], [Stream.ORDER, Stream.SUBSET]))
    orders = {key: permutation(50, *key).tobytes() for key in asked}
    assert len(set(orders.values())) == len(asked)
    assert all(permutation(50, *key).tobytes() == order for key, order in orders.items())


def test_a_sample_s_place_in_the_order_is_uniform() -> None:
    places = np.array([np.argsort(permutation(20, seed=0, epoch=epoch)) for epoch in range(2000)])
    assert np.abs(places.mean(axis=0) - 9.5).max() < 4 * np.sqrt((20**2 - 1) / 12 / 2000)


def test_words_differ_between_samples_blocks_streams_epochs_and_seeds() -> None:
    samples = np.arange(100, dtype=np.uint64)
    found = [
        sample_words(seed, epoch, samples, stream, block)[0].tolist()
        for seed in (0, 2**32)
        for epoch in (0, 1)
        for stream in Stream
        for block in (0, 1)
    ]
    assert len(set(itertools.chain.from_iterable(found))) > 0.999 * 100 * len(found)


def test_step_seeds_differ_between_steps_micro_batches_streams_and_seeds() -> None:
    asked = list(itertools.product((0, 1, 2**32), (*range(50), 93_000), range(8), Stream))
    seeds = [step_seed(seed, step, micro_batch, stream) for seed, step, micro_batch, stream in asked]
    assert len(set(seeds)) == len(asked)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert step_seed(0, 5, 1, Stream.MIX) == step_seed(0, 5, 1, Stream.MIX)


def test_streams_have_numbers_of_their_own() -> None:
    """They are part of a run's identity: a run resumed by a newer version draws the same."""
    assert {stream.name: int(stream) for stream in Stream} == {
        "ORDER": 1, "CROP": 2, "FLIP": 3, "INTERPOLATION": 4, "SUBSET": 5, "MIX": 6, "ERASING": 7, "COLOR_JITTER": 8,
        "NETWORK": 9, "INITIALISATION": 10, "STORED_ORDER": 11, "COMPRESSION": 12, "PAGES": 13,
        "POLICY": 14,
    }  # fmt: skip
    assert permutation(8, seed=0, epoch=0).tolist() == permutation(8, seed=0, epoch=0, stream=1).tolist()
