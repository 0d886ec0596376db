from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import nn

from abste import estimators
from abste.estimators import Annealed, Binarizer

STEPS = 100
VARIANTS: dict[str, Any] = {
    "ab_tanh, k rises": {"name": "ab_tanh", "k_start": 0.5, "k": 4.0},
    "ab_arctan, k rises, not normalized": {"name": "ab_arctan", "k_start": 0.5, "k": 4.0, "normalized": False},
    "shape_removed of reste": {"name": "shape_removed", "of": "reste"},
    "shape_removed of stochastic_sign": {"name": "shape_removed", "of": "stochastic_sign"},
}
"""What is held to the same as the registered names: arguments that take another path, and the page's example."""


def _example() -> dict[str, str]:
    """The code blocks of CONTRIBUTING.md's section on estimators: the file, and the parameter of the formula test."""
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = re.split(r"^## ", page, flags=re.MULTILINE)
    (text,) = (part for part in section if part.startswith("Adding an estimator"))
    file, case = re.findall(r"^```python\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    return {"file": file, "case": case}


EXAMPLE = _example()
MODULE = ModuleType("soft_sign")
sys.modules["soft_sign"] = MODULE  # torch.compile of older versions imports what it compiles by name
NAMESPACE = vars(MODULE)
exec(EXAMPLE["file"], NAMESPACE)
# Known to these tests alone, however many others run with them.
estimators.base._REGISTRY.pop("soft_sign")
VARIANTS["soft_sign of CONTRIBUTING.md"] = NAMESPACE["SoftSign"]()


def _make(name: str, step: int = 0, role: estimators.Role = "weights") -> Binarizer:
    spec = VARIANTS.get(name, name)
    if isinstance(spec, str) and role not in estimators.get(spec).roles:
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
def example() -> tuple[dict[str, str], dict[str, Any]]:
    """The example of CONTRIBUTING.md: its code blocks ("file" and "case"), and the names that the first defines."""
    return EXAMPLE, dict(NAMESPACE)


@pytest.fixture(scope="session")
def spec(name: str) -> estimators.Spec:
    """The name, or the table that a variant stands for."""
    return VARIANTS.get(name, name)
