"""The statistics against SciPy's, against hand-worked numbers, and their behaviour at the edges."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ffcv_convnext.ladder.statistics import (
    bootstrap,
    kendall_tau_b,
    mean_interval,
    resolved_difference,
    spearman_rho,
    t_probability,
    t_quantile,
)

stats = pytest.importorskip("scipy.stats")


@pytest.mark.parametrize("seed", range(20))
def test_rank_correlations_are_scipys(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = (rng.integers(0, 4 if seed % 2 else 1000, 12).tolist() for _ in range(2))  # with and without ties
    assert kendall_tau_b(x, y) == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
    assert spearman_rho(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)


def test_rank_correlations_by_hand() -> None:
    # Pairs of 1 2 3 4 beside 1 3 2 4: five agree, one does not. Ranks differ by 1 twice: 1 - 6 x 2 / (4 x 15).
    assert kendall_tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    assert spearman_rho([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(0.8)
    assert kendall_tau_b([1, 2, 3], [9, 5, 1]) == spearman_rho([1, 2, 3], [9, 5, 1]) == -1
    # 1 1 2 beside 1 2 3: two of three pairs are untied on the left, all on the right: 2 / sqrt(2 x 3).
    assert kendall_tau_b([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(kendall_tau_b([1, 1], [1, 2]))
    assert math.isnan(spearman_rho([1, 1], [1, 2]))


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 31])
def test_students_t_is_scipys(freedom: int) -> None:
    for t in (-4.0, -0.5, 0.0, 0.3, 2.0, 12.0):
        assert t_probability(t, freedom) == pytest.approx(stats.t.cdf(t, freedom), abs=1e-12)
    for probability in (0.025, 0.5, 0.8, 0.975):
        assert t_quantile(probability, freedom) == pytest.approx(stats.t.ppf(probability, freedom), rel=1e-9, abs=1e-9)


def test_an_interval_of_a_mean() -> None:
    interval = mean_interval([1.0, 2.0, 3.0])
    assert interval is not None
    expected = stats.t.interval(0.95, 2, loc=2, scale=1 / math.sqrt(3))
    assert tuple(interval) == pytest.approx(expected)
    assert mean_interval([1.0]) is None


def test_a_resolved_difference_by_hand() -> None:
    # Three seeds: 4 degrees of freedom, t(0.975) = 2.776, t(0.8) = 0.941, sqrt(2 / 3) = 0.816.
    assert resolved_difference(0.1, 3) == pytest.approx(0.1 * (2.776 + 0.941) * 0.8165, rel=1e-3)
    assert resolved_difference(0.1, 1) is None


def test_the_resolved_difference_is_found_as_often_as_said() -> None:
    rng = np.random.default_rng(0)
    gap, number = resolved_difference(1.0, 5) or 0.0, 4000
    a, b = rng.normal(0, 1, (number, 5)), rng.normal(gap, 1, (number, 5))
    found = np.mean(stats.ttest_ind(a, b, axis=1).pvalue < 0.05)
    assert 0.75 < found < 0.85


def test_a_bootstrap_is_repeatable_and_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    truth = np.arange(8.0)
    x, y = ([rng.normal(mean, 0.6, 3).tolist() for mean in truth] for _ in range(2))
    interval = bootstrap(x, y, kendall_tau_b)
    assert interval is not None
    assert interval == bootstrap(x, y, kendall_tau_b)
    found = kendall_tau_b([np.mean(scores) for scores in x], [np.mean(scores) for scores in y])
    assert interval.low <= found <= interval.high <= 1
    assert interval.low < 1, "neighbours overlap"
    apart = [[10 * mean, 10 * mean + 1] for mean in truth]
    assert bootstrap(apart, apart, kendall_tau_b) == (1, 1), "no draw changes the order"
    assert bootstrap([[1.0], [2.0]], [[3.0], [4.0]], kendall_tau_b) is None, "one seed each"
    assert bootstrap([[1.0], [2.0]], [[3.0, 3.5], [4.0, 2.0]], kendall_tau_b) is not None
