"""Each formula, written out once more in NumPy: F by its definition, F' by finite differences of that."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from abste import estimators
from abste.estimators import EDE, STE, ABArcTan, ABTanh, ApproxSign, Constant, Estimator, IdentitySTE, Progress, ReSTE

Array = NDArray[np.float64]

POINTS = np.array([-7.3, -2.9, -1.51, -1.49, -0.93, -0.31, -0.09, -0.002, 0.004, 0.07, 0.12, 0.8, 1.1, 1.7, 2.8, 3.2])


def ste(x: Array, p: float) -> Array:
    return np.clip(x, -1.25, 1.25)


def identity_ste(x: Array, p: float) -> Array:
    return x


def approx_sign(x: Array, p: float) -> Array:
    return np.select([x < -1, x < 0, x < 1], [-1.0, 2 * x + x**2, 2 * x - x**2], 1.0)


def ede(x: Array, p: float) -> Array:
    sharpness = 10 ** (np.log10(0.02) + p * (np.log10(20.0) - np.log10(0.02)))
    return max(1 / sharpness, 1.0) * np.tanh(sharpness * x)


def reste(x: Array, p: float) -> Array:
    o = 1 + (1 - np.cos(np.pi * p / 2)) * 4.0
    size = np.minimum(np.abs(x), 1.4)
    return np.sign(x) * np.where(size <= 0.2, size * 0.2 ** (1 / o) / 0.2, size ** (1 / o))


def blend(x: Array, a: float, phi: Callable[[Array], Array]) -> Array:
    x = np.clip(x, -2.0, 2.0)
    return (1 - a) * x + a * phi(x)


def rising(p: float) -> float:
    return 0.2 + 0.5 * (1 - np.cos(np.pi * p / 2))


def ab_tanh(x: Array, p: float) -> Array:
    return blend(x, rising(p), lambda z: (1 - np.exp(-6 * z)) / (1 + np.exp(-6 * z)) / np.tanh(3.0))


def ab_tanh_raw(x: Array, p: float) -> Array:
    return blend(x, 0.75, lambda z: np.tanh(3 * z))


def ab_arctan(x: Array, p: float) -> Array:
    return blend(x, 0.1 + 0.8 * p, lambda z: np.arctan2(4 * z, 1.0) / np.arctan2(4.0, 1.0))


def ab_arctan_raw(x: Array, p: float) -> Array:
    return blend(x, rising(p), lambda z: 2 / np.pi * np.arctan(np.pi / 2 * 4 * z))


CASES: list[tuple[Estimator, Callable[[Array, float], Array]]] = [
    (STE(t=1.25), ste),
    (IdentitySTE(), identity_ste),
    (ApproxSign(), approx_sign),
    (EDE(s_min=0.02, s_max=20.0), ede),
    (ReSTE(o_end=5.0, t=1.4, m=0.2), reste),
    (ABTanh(k=3.0, t=2.0, a_start=0.2, a_end=0.7), ab_tanh),
    (ABTanh(k=3.0, t=2.0, a_end=0.75, blend="constant", normalized=False), ab_tanh_raw),
    (ABArcTan(k=4.0, t=2.0, blend=Progress(0.1, 0.9, "linear")), ab_arctan),
    (ABArcTan(k=4.0, t=2.0, a_start=0.2, a_end=0.7, normalized=False), ab_arctan_raw),
]


@pytest.mark.parametrize(("estimator", "function"), CASES, ids=[function.__name__ for _, function in CASES])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
def test_surrogate_and_slope(estimator: Estimator, function: Callable[[Array, float], Array], progress: float) -> None:
    estimators.EstimatorSchedule(estimator, 10).load_state_dict({"last_step": round(10 * progress), "total_steps": 10})
    x = torch.from_numpy(POINTS)
    np.testing.assert_allclose(estimator.surrogate(x).numpy(), function(POINTS, progress), rtol=1e-6, atol=1e-8)
    h = 1e-6
    difference = (function(POINTS + h, progress) - function(POINTS - h, progress)) / (2 * h)
    np.testing.assert_allclose(estimator.slope(x).numpy(), difference, rtol=2e-6, atol=1e-8)


def test_every_estimator_has_a_case() -> None:
    assert {estimator.name for estimator, _ in CASES} == set(estimators.available())


def test_constant_blend() -> None:
    assert Constant(0.3).weight() == 0.3
    assert list(Constant(0.3).state_dict()) == []
