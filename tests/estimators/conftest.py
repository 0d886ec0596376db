from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import nn

from abste import estimators
from abste.estimators import Annealed, Binarizer

STEPS = 100


def _make(name: str, step: int = 0, role: estimators.Role = "weights") -> Binarizer:
    binarizer = estimators.resolve(name, role)
    assert binarizer is not None
    _at(binarizer, step)
    return binarizer


def _at(module: nn.Module, step: int) -> None:
    for part in module.modules():
        if isinstance(part, Annealed):
            part.set_progress(step, STEPS)


@pytest.fixture(scope="session")
def make() -> Callable[..., Binarizer]:
    """make(name, step=0, role="weights"): a binarizer after ``step`` per cent of training."""
    return _make


@pytest.fixture(scope="session", params=estimators.available())
def name(request: pytest.FixtureRequest) -> str:
    """Every registered estimator: one that is added to the registry is covered by that."""
    return request.param
