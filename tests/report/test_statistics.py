from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from abste.errors import ConfigError
from abste.report import detectable, holm, paired
from abste.report.statistics import pooled, spread

values = st.lists(st.floats(-50, 50).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(values)
def test_paired_is_students_test(differences: list[float]) -> None:
    found = paired(differences)
    if np.std(differences) < 1e-9:
        assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0), "certain of differences equal by chance"
        return
    expected = stats.ttest_1samp(differences, 0.0)
    interval = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-9)
    assert found.n == len(differences) and found.sd == pytest.approx(np.std(differences, ddof=1))


def test_one_pair_says_nothing_of_the_spread() -> None:
    found = paired([3.0])
    assert (found.mean, found.low, found.high, found.p) == (3.0, -math.inf, math.inf, 1.0) and math.isnan(found.sd)
    for equal in ([0.1] * 3, [0.0] * 2, [100 / 360] * 2):
        found = paired(equal)
        assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0) and found.mean == pytest.approx(equal[0])
    with pytest.raises(ConfigError, match="at least one pair"):
        paired([])


def test_holm() -> None:
    # 4 x 0.005, 3 x 0.01, then 2 x 0.03 = 0.06, which 1 x 0.04 must not undercut.
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0] and holm([]) == []


@given(st.lists(st.floats(0, 1), max_size=20))
def test_holm_lies_between_nothing_and_bonferroni(p_values: list[float]) -> None:
    for p, adjusted in zip(p_values, holm(p_values), strict=True):
        assert p <= adjusted <= min(1.0, p * len(p_values)) + 1e-15


@pytest.mark.parametrize(("n", "comparisons"), [(3, 1), (5, 4), (10, 1), (10, 8)])
def test_what_is_detectable_is_detected_four_times_in_five(n: int, comparisons: int) -> None:
    rng = np.random.default_rng(0)
    true = detectable(0.7, n, comparisons)
    samples = rng.normal(true, 0.7, (20_000, n))
    t = samples.mean(1) / (samples.std(1, ddof=1) / math.sqrt(n))
    power = (t > stats.t.ppf(1 - 0.025 / comparisons, n - 1)).mean()
    assert power == pytest.approx(0.8, abs=0.015)


def test_nothing_is_detectable_without_pairs() -> None:
    assert detectable(1.0, 1) == math.inf and detectable(math.nan, 5) == math.inf and detectable(0.0, 5) == math.inf


def test_spreads() -> None:
    assert spread([1.0, 2.0, 4.0]) == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert math.isnan(spread([1.0])) and math.isnan(pooled([(math.nan, 1), (0.0, 3)]))
    assert pooled([(3.0, 5), (4.0, 5), (math.nan, 1)]) == pytest.approx(math.sqrt(12.5))
    groups = [[0.3, -0.1], [1.0, 2.0, 4.0, 3.5]]
    within = sum(np.var(group) * len(group) for group in groups)
    assert pooled([(spread(group), len(group)) for group in groups]) == pytest.approx(math.sqrt(within / 4))
