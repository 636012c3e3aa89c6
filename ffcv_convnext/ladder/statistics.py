"""Statistics of a few runs: rank correlations, their bootstrap intervals, and Student's t.

numpy alone: SciPy has all of it, but a run's environment need not. Tests compare every function with SciPy's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

CONFIDENCE = 0.95  # of every interval
POWER = 0.8  # probability that a difference of the resolved size is found
NUM_DRAWS = 2000  # of a bootstrap
SEED = 0  # of its draws


class Interval(NamedTuple):
    """Limits of a confidence interval."""

    low: float
    high: float


def kendall_tau_b(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Kendall's rank correlation tau-b (Kendall 1945), which accounts for ties; nan if a list has one value.

    x, y: n values, pair by pair.
    """
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (np.asarray(x), np.asarray(y)))
    size = math.sqrt(float(np.abs(a).sum()) * float(np.abs(b).sum()))
    return float((a * b).sum()) / size if size else math.nan


def spearman_rho(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation, with mean ranks for ties; nan if a list has one value only.

    x, y: n values, pair by pair.
    """
    a, b = (ranks - ranks.mean() for ranks in (_ranks(x), _ranks(y)))
    size = math.sqrt(float((a**2).sum()) * float((b**2).sum()))
    return float((a * b).sum()) / size if size else math.nan


def _ranks(values: Sequence[float]) -> NDArray[np.float64]:
    """Return (n,) ranks from 1; equal values share their mean rank."""
    found = np.asarray(values)
    smaller = (found[:, None] > found).sum(axis=1)
    equal = (found[:, None] == found).sum(axis=1)
    ranks: NDArray[np.float64] = smaller + (equal + 1) / 2
    return ranks


def bootstrap(
    x: Sequence[Sequence[float]],
    y: Sequence[Sequence[float]],
    statistic: Callable[[Sequence[float], Sequence[float]], float],
) -> Interval | None:
    """Return the percentile interval of a statistic of means over seeds (Efron 1979), the same for the same values.

    x, y: for each pair, the scores of its seeds. Each draw takes as many seeds of each as there are, with replacement.
    None if every score is alone: nothing is known about the spread then. With three seeds it is a rough guide.
    """
    if all(len(scores) < 2 for scores in (*x, *y)):
        return None
    rng = np.random.default_rng(SEED)

    def means(groups: Sequence[Sequence[float]]) -> NDArray[np.float64]:
        """(NUM_DRAWS, n) means of the drawn seeds."""
        drawn = [rng.choice(np.asarray(scores), (NUM_DRAWS, len(scores))).mean(axis=1) for scores in groups]
        return np.stack(drawn, axis=1)

    found = [statistic(a, b) for a, b in zip(means(x).tolist(), means(y).tolist(), strict=True)]
    outside = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(found, [outside, 1 - outside])
    return Interval(float(low), float(high))


def t_probability(t: float, freedom: int) -> float:
    """Return P(T <= t) of Student's t distribution.

    The finite sums for whole degrees of freedom: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    angle = math.atan(t / math.sqrt(freedom))
    cosine = math.cos(angle)
    term, total = (cosine if freedom % 2 else 1.0), 0.0
    for k in range(1 + freedom % 2, freedom, 2):  # the coefficients: 1, 2/3, 2/3 4/5, ... or 1, 1/2, 1/2 3/4, ...
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = math.sin(angle) * total
    if freedom % 2:
        inside = (angle + inside) * 2 / math.pi
    return 0.5 + inside / 2


def t_quantile(probability: float, freedom: int) -> float:
    """Return t with P(T <= t) = probability, by bisection."""
    low, high = -1e6, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if t_probability(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def mean_interval(values: Sequence[float]) -> Interval | None:
    """Return Student's interval of the mean of n values; None for a single one."""
    if len(values) < 2:
        return None
    half = t_quantile(0.5 + CONFIDENCE / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(fmean(values) - half, fmean(values) + half)


def resolved_difference(std: float, num_seeds: int) -> float | None:
    """Return the smallest difference of two steps' means that a two-sided t test finds with probability POWER.

    (t(0.975) + t(0.8)) sqrt(2 / n) std with 2 (n - 1) degrees of freedom: the usual approximation, which does without
    the noncentral t distribution.   std: of one step, over seeds.   num_seeds: n, of each step; None for fewer than
    two, with which there is no such test.
    """
    if num_seeds < 2:
        return None
    both = sum(t_quantile(p, 2 * (num_seeds - 1)) for p in (0.5 + CONFIDENCE / 2, POWER))
    return both * math.sqrt(2 / num_seeds) * std
