from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from abste.deploy import steps
from abste.deploy.graph import Step, StepKind

X = np.concatenate([np.linspace(-12, 12, 4001), [-1e30, -100, -88, -0.0, 0.0, 88, 100, 1e30]]).astype(np.float32)


def test_exp_is_as_exact_as_the_format_says() -> None:
    x = np.linspace(-87, 88, 200_001).astype(np.float32)
    assert np.abs(steps.exp(x) / np.exp(x.astype(np.float64)) - 1).max() < 1.0e-7
    assert np.isnan(steps.exp(np.array([np.nan], np.float32)))[0]
    assert np.isfinite(steps.exp(np.array([-np.inf, np.inf], np.float32))).all()


def test_erf_is_as_exact_as_the_format_says() -> None:
    x = np.linspace(-6, 6, 20_001).astype(np.float32)
    assert max(abs(float(y) - math.erf(v)) for v, y in zip(x, steps.erf(x), strict=True)) < 5e-7


@pytest.mark.parametrize(
    ("step", "function"),
    [
        (Step(StepKind.RELU), F.relu),
        (Step(StepKind.CLAMP, p=-1, q=0.5), lambda x: F.hardtanh(x, -1, 0.5)),
        (Step(StepKind.GELU), F.gelu),
        (Step(StepKind.GELU_TANH), lambda x: F.gelu(x, approximate="tanh")),
        (Step(StepKind.SILU), F.silu),
        (Step(StepKind.SIGMOID), torch.sigmoid),
        (Step(StepKind.HARDSWISH), F.hardswish),
        (Step(StepKind.HARDSIGMOID), F.hardsigmoid),
        (Step(StepKind.TANH), torch.tanh),
        (Step(StepKind.PRELU, a=np.array([-0.3], np.float32)), lambda x: F.prelu(x, torch.tensor([-0.3]))),
        (Step(StepKind.MULTIPLY, a=np.array([-0.3], np.float32)), lambda x: x * np.float32(-0.3)),
        (Step(StepKind.ADD, a=np.array([2.5], np.float32)), lambda x: x + 2.5),
        (Step(StepKind.SIGN), lambda x: torch.where(x >= 0, 1.0, -1.0)),
    ],
    ids=lambda value: value.kind.name if isinstance(value, Step) else "",
)
def test_steps_are_those_of_torch(step: Step, function: object) -> None:
    x = X[np.abs(X) < 1e29]
    wanted = function(torch.from_numpy(x)[:, None])[:, 0].numpy()  # type: ignore[operator]
    found = steps.apply(step, x[:, None])[:, 0]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, wanted, rtol=2e-6, atol=2e-6)


def test_huge_numbers_stay_what_they_are() -> None:
    x = np.array([-np.inf, -1e30, 1e30, np.inf], np.float32)
    np.testing.assert_array_equal(steps.sigmoid(x)[2:], 1)
    assert (steps.sigmoid(x)[:2] < 1e-37).all()
    np.testing.assert_array_equal(steps.tanh(x), [-1, -1, 1, 1])


def test_threshold() -> None:
    step = Step(StepKind.THRESHOLD, a=np.array([[3, 1], [-2, -1], [-(2**31), 1]], np.int32))
    sums = np.array([[2, 1, -9], [3, 2, 9], [4, 3, 0]], np.int32)
    np.testing.assert_array_equal(steps.threshold(step, sums), [[-1, 1, 1], [1, 1, 1], [1, -1, 1]])
