"""Which sample goes to which rank, and when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from ffcv_convnext.data.order import QuasiRandom, Shares, eval_batches, is_shuffled
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


# --- page-wise ----------------------------------------------------------------------------------------------------

MB = 1 << 20


def stored(num: int = 3000, size: int = MB // 10) -> NDArray[np.uint64]:
    """Addresses of samples of a tenth of a MiB, none across the border of a page of 1 MiB, the first page left out."""
    per_page = MB // size
    samples = np.arange(num)
    return (MB + samples // per_page * MB + samples % per_page * size).astype(np.uint64)


@pytest.fixture(scope="module")
def windows() -> QuasiRandom:
    """3000 samples in 300 pages, 30 pages a window."""
    return QuasiRandom.of(stored(), MB, 30 * MB)


def test_each_page_wise_epoch_is_a_permutation_of_its_own(windows: QuasiRandom) -> None:
    orders = [windows.order(seed, epoch) for seed, epoch in ((5, 0), (5, 1), (6, 0))]
    assert all(np.array_equal(np.sort(order), np.arange(3000)) for order in orders)
    assert all((a != b).mean() > 0.99 for a, b in itertools.combinations(orders, 2))
    assert np.array_equal(windows.order(5, 1), orders[1])


def test_samples_stay_in_the_window_of_their_page_and_windows_differ_by_epoch(windows: QuasiRandom) -> None:
    assert windows.num_windows == 10
    met = []
    for epoch in (0, 1):
        pages = windows.pages[windows.order(5, epoch)].reshape(10, 300)
        assert [len(set(row)) for row in pages.tolist()] == [30] * 10
        assert len({page for row in pages.tolist() for page in row}) == 300
        met.append({frozenset(pair) for row in pages.tolist() for pair in itertools.combinations(sorted(set(row)), 2)})
    shared = len(met[0] & met[1]) / len(met[0])
    assert 0.05 < shared < 0.15, "of the pages that shared a window, a tenth does so in the next epoch"


def test_a_page_wise_order_mixes_within_a_window_as_a_full_shuffle_does(windows: QuasiRandom) -> None:
    """Labels in a random order in the file, as the conversion leaves it: batches hold as many classes."""
    labels = np.random.default_rng(0).permutation(np.arange(3000) % 100)

    def classes_in_a_batch(orders: list[NDArray[np.int64]]) -> float:
        batches = np.concatenate([labels[order[:2944]].reshape(-1, 64) for order in orders])
        return float(np.mean([len(set(batch)) for batch in batches.tolist()]))

    full = classes_in_a_batch([permutation(3000, 5, epoch) for epoch in range(20)])
    by_page = classes_in_a_batch([windows.order(5, epoch) for epoch in range(20)])
    assert abs(by_page - full) < 0.7, (by_page, full)
    places = np.argsort(windows.order(5, 0)).reshape(300, 10)  # where a page's samples come in the epoch
    spread = places.std(axis=1) / (300 / np.sqrt(12))
    assert 0.8 < spread.mean() < 1.1, "a page's samples are spread evenly over its window"
    assert abs(np.corrcoef(places[:, :-1].ravel() % 300, places[:, 1:].ravel() % 300)[0, 1]) < 0.05


def test_one_window_is_the_full_shuffle() -> None:
    assert np.array_equal(QuasiRandom.of(stored(), MB, 1 << 40).order(5, 3), permutation(3000, 5, 3))


@pytest.mark.parametrize("window_bytes", [1, MB, 7 * MB, 299 * MB])
def test_windows_are_even_and_no_larger_than_asked_but_for_a_page(window_bytes: int) -> None:
    windows = QuasiRandom.of(stored(), MB, window_bytes)
    sizes = [len(pages) for pages in windows._windows(0, 0)]
    assert sum(sizes) == 300
    assert max(sizes) <= max(1, window_bytes // MB)
    assert max(sizes) - min(sizes) <= 1


def test_a_page_wise_order_is_the_same_for_any_number_of_ranks_and_continues_inside_an_epoch(
    windows: QuasiRandom,
) -> None:
    def batches(shares: Shares, rank: int, first_step: int = 0) -> list[list[int]]:
        return [b.tolist() for b in shares.micro_batches(3000, 5, 2, rank, first_step, windows)]

    alone = batches(Shares(16, 4, 1), 0)
    assert np.concatenate(alone).tolist() == windows.order(5, 2)[: 46 * 64].tolist()
    for world in (2, 4):
        shares = Shares(16, 4 // world, world)
        by_rank = [batches(shares, rank) for rank in range(world)]
        assert [by_rank[m % world][m // world] for m in range(len(alone))] == alone
        assert batches(shares, 1, first_step=20) == by_rank[1][20 * 4 // world :]


@pytest.mark.parametrize("first_step", [0, 20])
def test_the_next_window_s_pages_are_due_while_this_one_is_used(windows: QuasiRandom, first_step: int) -> None:
    shares = Shares(16, 4, 1)
    order = windows.pages[windows.order(5, 2)]
    positions = list(shares.positions(3000, 0, first_step))
    ahead = list(windows.pages_ahead(5, 2, iter(positions)))
    assert len(ahead) == len(positions)
    due: set[int] = set()
    begin = positions[0] / 300  # in windows; what is due before it is left out
    for position, offsets in zip(positions, ahead, strict=True):
        new = set((offsets // MB - 1).tolist())
        assert not new & due, "each page once"
        due |= new
        assert abs(len(due) - 30 * (min(position / 300, 9) - begin)) <= 1
        if position // 300 > begin + 1:
            assert set(order[position : min(position + 16, 300 * (position // 300 + 1))].tolist()) <= due
    assert due <= set(order[int(begin + 1) * 300 :].tolist())
    if first_step == 0:
        assert due == set(order[300:].tolist())


def test_files_in_class_order_are_told_from_shuffled_ones() -> None:
    random = np.random.default_rng(0)
    for num_classes, per_class in ((2, 50), (1000, 20), (5, 4)):
        labels = np.repeat(np.arange(num_classes), per_class)
        assert not is_shuffled(labels)
        assert is_shuffled(random.permutation(labels))
        assert not is_shuffled(labels[::-1])
    long_tail = np.repeat(np.arange(3), (10_000, 100, 10))
    assert is_shuffled(random.permutation(long_tail))
    assert not is_shuffled(long_tail)
    assert is_shuffled(np.zeros(50, np.int64)), "one class only"
    assert is_shuffled(np.zeros(1, np.int64))
