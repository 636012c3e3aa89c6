"""Which sample goes to which rank, and when."""

from __future__ import annotations

import numpy as np
import pytest

from ffcv_convnext.data.order import Shares, eval_batches
from ffcv_convnext.rng import permutation


def lists(shares: Shares, rank: int, *, num: int = 100, epoch: int = 3, first_step: int = 0) -> list[list[int]]:
    return [batch.tolist() for batch in shares.micro_batches(num, 5, epoch, rank, first_step)]


@pytest.mark.parametrize(("update_freq", "world"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_step_s_micro_batches_do_not_depend_on_how_ranks_share_them(update_freq: int, world: int) -> None:
    alone = lists(Shares(3, 8, 1), 0)
    shares = Shares(3, update_freq, world)
    assert shares.global_batch == 24
    by_rank = [lists(shares, rank) for rank in range(world)]
    together = [by_rank[m % world][m // world] for m in range(len(alone))]  # micro-batch m goes to rank m mod world
    assert together == alone


def test_an_epoch_is_the_start_of_its_permutation() -> None:
    """100 samples, global batch 24: four steps; four samples sit this epoch out."""
    samples = np.concatenate(lists(Shares(3, 8, 1), 0)).tolist()
    assert samples == permutation(100, 5, 3)[:96].tolist()
    assert len(set(samples)) == 96
    assert np.concatenate(lists(Shares(3, 8, 1), 0, epoch=4)).tolist() != samples


def test_other_samples_sit_out_in_another_epoch() -> None:
    seen = {sample for epoch in range(8) for batch in lists(Shares(3, 8, 1), 0, epoch=epoch) for sample in batch}
    assert seen == set(range(100))


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_a_later_start_gives_the_rest_of_the_same_list(first_step: int) -> None:
    shares = Shares(3, 4, 2)
    for rank in (0, 1):
        assert lists(shares, rank, first_step=first_step) == lists(shares, rank)[first_step * 4 :]


def test_a_set_of_exactly_one_global_batch_is_one_step_and_a_smaller_one_is_refused() -> None:
    shares = Shares(4, 2, 3)
    assert shares.num_steps(24) == 1
    assert shares.num_steps(47) == 1
    message = r"23 images, fewer than the global batch of 24 \(batch_size 4 x update_freq 2 x 3 processes\); lower"
    with pytest.raises(ValueError, match=message):
        shares.num_steps(23)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("num", [1, 20, 21])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_has_every_image_exactly_once(num: int, batch_size: int, world: int) -> None:
    batches = [batch for rank in range(world) for batch in eval_batches(num, batch_size, rank, world)]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert np.concatenate(batches).tolist() == list(range(num))


def test_ranks_share_an_evaluation_evenly() -> None:
    shares = [sum(len(batch) for batch in eval_batches(50_000, 128, rank, 32)) for rank in range(32)]
    assert max(shares) - min(shares) <= 1
