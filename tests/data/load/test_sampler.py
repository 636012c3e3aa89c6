"""Which sample goes to which rank, and when."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from support.samples import COPY, pack

from ffcv_convnext.data.load.sampler import GlobalBatchSampler, PageShuffle, eval_batches, is_shuffled
from ffcv_convnext.rng import permutation


def lists(
    shares: GlobalBatchSampler, rank: int, *, num: int = 100, epoch: int = 3, first_step: int = 0
) -> list[list[int]]:
    return [pack(batch).tolist() for batch in shares.micro_batches(num, 5, epoch, rank, first_step)]


@pytest.mark.parametrize(("update_freq", "world"), [(8, 1), (4, 2), (2, 4), (1, 8)])
def test_a_step_s_micro_batches_do_not_depend_on_how_ranks_share_them(update_freq: int, world: int) -> None:
    alone = lists(GlobalBatchSampler(3, 8, 1), 0)
    shares = GlobalBatchSampler(3, update_freq, world)
    assert shares.global_batch == 24
    by_rank = [lists(shares, rank) for rank in range(world)]
    together = [by_rank[m % world][m // world] for m in range(len(alone))]  # micro-batch m goes to rank m mod world
    assert together == alone


def test_an_epoch_is_the_start_of_its_permutation() -> None:
    """100 samples, global batch 24: four steps; four samples sit this epoch out."""
    samples = np.concatenate(lists(GlobalBatchSampler(3, 8, 1), 0)).tolist()
    assert samples == permutation(100, 5, 3)[:96].tolist()
    assert len(set(samples)) == 96
    assert np.concatenate(lists(GlobalBatchSampler(3, 8, 1), 0, epoch=4)).tolist() != samples


def test_other_samples_sit_out_in_another_epoch() -> None:
    seen = {
        sample for epoch in range(8) for batch in lists(GlobalBatchSampler(3, 8, 1), 0, epoch=epoch) for sample in batch
    }
    assert seen == set(range(100))


@pytest.mark.parametrize("first_step", [0, 1, 3, 4])
def test_a_later_start_gives_the_rest_of_the_same_list(first_step: int) -> None:
    shares = GlobalBatchSampler(3, 4, 2)
    for rank in (0, 1):
        assert lists(shares, rank, first_step=first_step) == lists(shares, rank)[first_step * 4 :]


def test_a_set_of_exactly_one_global_batch_is_one_step_and_a_smaller_one_is_refused() -> None:
    shares = GlobalBatchSampler(4, 2, 3)
    assert shares.num_steps(24) == 1
    assert shares.num_steps(47) == 1
    message = r"23 images, fewer than the global batch of 24 \(batch_size 4 x update_freq 2 x 3 processes\); lower"
    with pytest.raises(ValueError, match=message):
        shares.num_steps(23)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("num", [1, 20, 21])
@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_evaluation_has_every_image_exactly_once(num: int, batch_size: int, world: int) -> None:
    batches = [batch.indices for rank in range(world) for batch in eval_batches(num, batch_size, rank, world)]
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert np.concatenate(batches).tolist() == list(range(num))


def test_ranks_share_an_evaluation_evenly() -> None:
    shares = [sum(len(batch) for batch in eval_batches(50_000, 128, rank, 32)) for rank in range(32)]
    assert max(shares) - min(shares) <= 1


# --- repeated augmentation -----------------------------------------------------------------------------------------


def steps(shares: GlobalBatchSampler, *, num: int = 100, epoch: int = 3) -> NDArray[np.int64]:
    """(steps, micro-batches, batch_size), as one process lists them."""
    return np.array(lists(shares, 0, num=num, epoch=epoch)).reshape(-1, shares.update_freq, shares.batch_size)


@pytest.mark.parametrize("copies", [2, 3, 4, 5])
def test_a_step_holds_copies_of_its_samples_numbered_from_0(copies: int) -> None:
    """24 places: 12, 8, 6 or 5 samples; where the copies do not divide 24, some samples lack their last one."""
    found = steps(GlobalBatchSampler(3, 8, 1, copies))
    num_different = GlobalBatchSampler(3, 8, 1, copies).num_different
    assert num_different == -(-24 // copies)
    assert len(found) == GlobalBatchSampler(3, 8, 1).num_steps(100), "as many steps as without"
    for step in found:
        assert len(np.unique(step)) == 24, "a sample and a copy come once"
        samples, counts = np.unique(step % COPY, return_counts=True)
        assert len(samples) == num_different
        assert set(counts) <= {copies, copies - 1}
        for sample, count in zip(samples, counts, strict=True):
            assert sorted((step[step % COPY == sample] // COPY).tolist()) == list(range(count))


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_an_epoch_with_copies_is_the_start_of_its_permutation(copies: int) -> None:
    """No sample is in two steps, and other epochs begin with other samples."""
    found = steps(GlobalBatchSampler(3, 8, 1, copies)) % COPY
    different = [sample for step in found for sample in dict.fromkeys(step.ravel().tolist())]
    assert different == permutation(100, 5, 3)[: 4 * 24 // copies].tolist()
    seen = {
        int(s) for epoch in range(40) for s in np.unique(steps(GlobalBatchSampler(3, 8, 1, copies), epoch=epoch) % COPY)
    }
    assert seen == set(range(100))


@pytest.mark.parametrize(
    ("batch_size", "update_freq", "copies"), [(3, 8, 2), (3, 8, 3), (16, 3, 3), (128, 32, 3), (5, 4, 3)]
)
def test_copies_are_in_different_micro_batches_and_meet_different_partners(
    batch_size: int, update_freq: int, copies: int
) -> None:
    """The partner of Mixup and CutMix is the one in the mirror position; an odd micro-batch's middle is its own."""
    for micro_batches in steps(GlobalBatchSampler(batch_size, update_freq, 1, copies), num=5000)[:2] % COPY:
        assert all(len(set(batch.tolist())) == batch_size for batch in micro_batches)
        pairs = np.stack([micro_batches, micro_batches[:, ::-1]], axis=-1).reshape(-1, 2)
        met = pairs[pairs[:, 0] != pairs[:, 1]]
        assert len(met) >= len(pairs) - update_freq * (batch_size % 2)
        assert len(np.unique(met, axis=0)) == len(met), "no two copies are paired alike"


@pytest.mark.parametrize("copies", [2, 3, 4, 5, 8])
@pytest.mark.parametrize(("batch_size", "update_freq"), [(128, 1), (127, 1), (32, 2), (64, 3)])
def test_where_copies_share_a_micro_batch_two_samples_at_most_meet_themselves(
    batch_size: int, update_freq: int, copies: int
) -> None:
    for micro_batches in steps(GlobalBatchSampler(batch_size, update_freq, 1, copies), num=1000) % COPY:
        for batch in micro_batches:
            assert len(set(batch[batch == batch[::-1]].tolist())) <= 2


@pytest.mark.parametrize("quasi_random", [False, True])
@pytest.mark.parametrize("copies", [2, 3])
def test_copies_do_not_depend_on_how_ranks_share_a_step_and_continue_inside_an_epoch(
    windows: PageShuffle, copies: int, quasi_random: bool
) -> None:
    order = windows if quasi_random else None

    def batches(shares: GlobalBatchSampler, rank: int, first_step: int = 0) -> list[list[int]]:
        return [pack(b).tolist() for b in shares.micro_batches(3000, 5, 2, rank, first_step, order)]

    alone = batches(GlobalBatchSampler(16, 4, 1, copies), 0)
    for world in (2, 4):
        shares = GlobalBatchSampler(16, 4 // world, world, copies)
        by_rank = [batches(shares, rank) for rank in range(world)]
        assert [by_rank[m % world][m // world] for m in range(len(alone))] == alone
        assert batches(shares, 1, first_step=20) == by_rank[1][20 * 4 // world :]


def test_pages_are_read_ahead_for_copies_as_the_epoch_gets_to_them(windows: PageShuffle) -> None:
    shares = GlobalBatchSampler(16, 4, 1, 2)
    order = windows.pages[windows.order(5, 2)]
    positions = list(shares.positions(3000, 0))
    assert positions[:9] == [0, 16, 32, 32, 32, 48, 64, 64, 64]
    due: set[int] = set()
    for position, offsets in zip(positions, windows.pages_ahead(5, 2, iter(positions)), strict=True):
        due |= set((offsets // MB - 1).tolist())
        if position >= 300:
            assert set(order[300:position].tolist()) <= due
    assert len(due) == pytest.approx(30 * positions[-1] / 300, abs=1), "half an epoch's pages"


def test_more_copies_than_a_global_batch_holds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"repeated_aug = 9: .* into the global batch of 8; lower repeated_aug"):
        GlobalBatchSampler(4, 2, 1, 9).num_steps(100)
    assert GlobalBatchSampler(4, 2, 1, 8).num_steps(100) == 12


# --- page-wise ----------------------------------------------------------------------------------------------------

MB = 1 << 20


def stored(num: int = 3000, size: int = MB // 10) -> NDArray[np.uint64]:
    """Addresses of samples of a tenth of a MiB, none across the border of a page of 1 MiB, the first page left out."""
    per_page = MB // size
    samples = np.arange(num)
    return (MB + samples // per_page * MB + samples % per_page * size).astype(np.uint64)


@pytest.fixture(scope="module")
def windows() -> PageShuffle:
    """3000 samples in 300 pages, 30 pages a window."""
    return PageShuffle.of(stored(), MB, 30 * MB)


def test_each_page_shuffle_epoch_is_another_permutation(windows: PageShuffle) -> None:
    orders = [windows.order(seed, epoch) for seed, epoch in ((5, 0), (5, 1), (6, 0))]
    assert all(np.array_equal(np.sort(order), np.arange(3000)) for order in orders)
    assert all((a != b).mean() > 0.99 for a, b in itertools.combinations(orders, 2))
    assert np.array_equal(windows.order(5, 1), orders[1])


def test_samples_stay_in_the_window_of_their_page_and_windows_differ_by_epoch(windows: PageShuffle) -> None:
    assert windows.num_windows == 10
    met = []
    for epoch in (0, 1):
        pages = windows.pages[windows.order(5, epoch)].reshape(10, 300)
        assert [len(set(row)) for row in pages.tolist()] == [30] * 10
        assert len({page for row in pages.tolist() for page in row}) == 300
        met.append({frozenset(pair) for row in pages.tolist() for pair in itertools.combinations(sorted(set(row)), 2)})
    shared = len(met[0] & met[1]) / len(met[0])
    assert 0.05 < shared < 0.15, "of the pages that shared a window, a tenth does so in the next epoch"


def test_a_page_wise_order_mixes_within_a_window_as_a_full_shuffle_does(windows: PageShuffle) -> None:
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
    assert np.array_equal(PageShuffle.of(stored(), MB, 1 << 40).order(5, 3), permutation(3000, 5, 3))


@pytest.mark.parametrize("window_bytes", [1, MB, 7 * MB, 299 * MB])
def test_windows_are_even_and_no_larger_than_asked_but_for_a_page(window_bytes: int) -> None:
    windows = PageShuffle.of(stored(), MB, window_bytes)
    sizes = [len(pages) for pages in windows._windows(0, 0)]
    assert sum(sizes) == 300
    assert max(sizes) <= max(1, window_bytes // MB)
    assert max(sizes) - min(sizes) <= 1


def test_a_page_wise_order_is_the_same_for_any_number_of_ranks_and_continues_inside_an_epoch(
    windows: PageShuffle,
) -> None:
    def batches(shares: GlobalBatchSampler, rank: int, first_step: int = 0) -> list[list[int]]:
        return [pack(b).tolist() for b in shares.micro_batches(3000, 5, 2, rank, first_step, windows)]

    alone = batches(GlobalBatchSampler(16, 4, 1), 0)
    assert np.concatenate(alone).tolist() == windows.order(5, 2)[: 46 * 64].tolist()
    for world in (2, 4):
        shares = GlobalBatchSampler(16, 4 // world, world)
        by_rank = [batches(shares, rank) for rank in range(world)]
        assert [by_rank[m % world][m // world] for m in range(len(alone))] == alone
        assert batches(shares, 1, first_step=20) == by_rank[1][20 * 4 // world :]


@pytest.mark.parametrize("first_step", [0, 20])
def test_the_next_window_s_pages_are_due_while_this_one_is_used(windows: PageShuffle, first_step: int) -> None:
    shares = GlobalBatchSampler(16, 4, 1)
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


def test_is_shuffled_is_false_for_files_in_class_order() -> None:
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
