from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from abste import estimators
from abste.estimators import Annealed, Binarizer

STEPS = 100
VARIANTS: dict[str, dict[str, Any]] = {
    "ab_tanh, k rises": {"name": "ab_tanh", "k_start": 0.5, "k": 4.0},
    "ab_arctan, k rises, not normalized": {"name": "ab_arctan", "k_start": 0.5, "k": 4.0, "normalized": False},
    "shape_removed of reste": {"name": "shape_removed", "of": "reste"},
    "shape_removed of stochastic_sign": {"name": "shape_removed", "of": "stochastic_sign"},
}
"""What is held to the same as the registered names: arguments that take another path."""


def _make(name: str, step: int = 0, role: estimators.Role = "weights") -> Binarizer:
    spec = VARIANTS.get(name, name)
    if role not in estimators.get(VARIANTS.get(name, {"name": name})["name"]).roles:
        role = "weights"
    binarizer = estimators.resolve(spec, role)
    assert binarizer is not None
    _at(binarizer, step)
    return binarizer


def _at(module: nn.Module, step: int) -> None:
    for part in module.modules():
        if isinstance(part, Annealed):
            part.set_progress(step, STEPS)


@pytest.fixture(scope="session")
def make() -> Callable[..., Binarizer]:
    """make(name, step=0, role="weights"): a binarizer after ``step`` per cent of training.

    One that is for weights alone is made for weights.
    """
    return _make


@pytest.fixture(scope="session", params=[*estimators.available(), *VARIANTS])
def name(request: pytest.FixtureRequest) -> str:
    """Every registered estimator: one that is added to the registry is covered by that. And the variants."""
    return request.param


@pytest.fixture(scope="session")
def spec(name: str) -> estimators.Spec:
    """The name, or the table that a variant stands for."""
    return VARIANTS.get(name, name)
