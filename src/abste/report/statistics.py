"""The few statistics of a comparison: paired differences, Holm's correction, what a design can detect."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from abste.errors import ConfigError

ALPHA = 0.05
"""Two-sided level of every test; intervals cover 1 - ALPHA."""
POWER = 0.8
"""Probability with which the smallest detectable difference would be found."""
ROUNDING = 1e-9
"""Standard deviation, in points, up to which numbers are equal but for rounding."""


@dataclass(frozen=True)
class Paired:
    """Differences of pairs: their mean, its Student-t interval, and the p-value of there being none.

    ``low`` and ``high`` are infinite and ``p`` is 1 where the spread is not known: for a single pair, and for
    differences that are all equal. A few accuracies, which come in steps of an image, are so by chance.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float
    p: float


def spread(values: Sequence[float]) -> float:
    """The standard deviation with n - 1 in the denominator; NaN for a single value."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def paired(differences: Sequence[float]) -> Paired:
    """What paired differences say of their mean (Student, 1908).

    Raises:
        ConfigError: there is no difference.
    """
    from scipy import stats

    n = len(differences)
    if not n:
        raise ConfigError("a paired comparison needs at least one pair.")
    mean = math.fsum(differences) / n
    sd = spread(differences)
    if n == 1 or sd <= ROUNDING:
        return Paired(n, mean, sd, -math.inf, math.inf, 1.0)
    error = sd / math.sqrt(n)
    half = float(stats.t.ppf(1 - ALPHA / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, sd, mean - half, mean + half, p)


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values adjusted for their number (Holm, 1979): below ALPHA, the family-wise error rate is at most that."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def pooled(groups: Sequence[tuple[float, int]]) -> float:
    """The standard deviation that groups of numbers have in common; NaN where none is known.

    Args:
        groups: standard deviation and size of each; those of fewer than two numbers, or of equal ones, do not count.
    """
    known = [(spread, n - 1) for spread, n in groups if n > 1 and spread > ROUNDING]
    freedom = sum(degrees for _, degrees in known)
    return math.sqrt(math.fsum(s * s * degrees for s, degrees in known) / freedom) if known else math.nan


def detectable(sd: float, n: int, comparisons: int = 1) -> float:
    """The smallest true difference that a paired t-test finds with probability POWER.

    Args:
        sd: standard deviation of the differences.
        n: pairs.
        comparisons: how many are made; the level is ALPHA divided by it, which is Holm's first step and its strictest.

    Returns:
        In the units of ``sd``; infinite for fewer than two pairs or an unknown spread, such as 0.
    """
    from scipy import optimize, stats

    if n < 2 or math.isnan(sd) or sd <= ROUNDING:
        return math.inf
    limit = float(stats.t.ppf(1 - ALPHA / comparisons / 2, n - 1))

    def lack(noncentrality: float) -> float:
        with np.errstate(divide="ignore"):  # scipy 1.11 divides by zero on its way to the right result
            return float(stats.nct.sf(limit, n - 1, noncentrality)) - POWER  # on the right side: the other is no find

    high = 1.0
    while lack(high) < 0:
        high *= 2
    return float(optimize.brentq(lack, 0.0, high)) * sd / math.sqrt(n)
