"""The shape-removed control: the clip and the mean slope of another estimator, and everything else it has."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import abste
from abste.errors import ConfigError
from abste.estimators import (
    ABTanh,
    Annealed,
    Equilibrium,
    EstimatorSchedule,
    Learned,
    ReSTE,
    Role,
    ShapeRemoved,
    available,
    get,
    resolve,
)
from abste.nn import BinaryLinear


@pytest.mark.parametrize("step", [0, 50, 100])
@pytest.mark.parametrize("of", available())
def test_mean_and_clip_are_those_of_the_other(of: str, step: int) -> None:
    torch.manual_seed(0)
    for role in get(of).roles:
        other, control = resolve(of, role), resolve({"name": "shape_removed", "of": of}, role)
        assert other is not None and isinstance(control, ShapeRemoved)
        for module in (other, control):
            EstimatorSchedule(module, 100).load_state_dict({"last_step": step, "total_steps": 100})
        x = 2 * torch.randn(8, 500, dtype=torch.float64)
        inside = x.abs() <= other.t
        found, slope = control.slope(x), other.backward(torch.ones_like(x), x)
        assert control.t == other.t and (found[~inside] == 0).all() and found[inside].unique().numel() == 1
        torch.testing.assert_close(found[inside].mean(), slope[inside].mean())
        assert (control.odd, control.monotone, control.plain_bits) == (other.odd, other.monotone, other.plain_bits)


def test_what_is_learned_goes_on_learning() -> None:
    """The gradient of theta is that under the estimator itself, though the gradient of x is another."""
    torch.manual_seed(0)
    x = torch.randn(9, 6)
    grads = []
    learned: dict[str, Any] = {"name": "ab_tanh", "blend": "learned"}
    for spec in (learned, {"name": "shape_removed", "of": learned}):
        torch.manual_seed(1)
        layer = BinaryLinear(6, 4, weights=spec, activations=spec)
        y = layer(x)
        y.backward(torch.cos(torch.arange(36.0)).view(9, 4))
        grads.append({name.replace(".of.", "."): p.grad for name, p in layer.named_parameters()})
    thetas = [name for name in grads[0] if name.endswith("theta")]
    assert len(thetas) == 2 and grads[0].keys() == grads[1].keys()
    for name in thetas:
        assert grads[0][name] is not None and float(grads[0][name]) != 0
        torch.testing.assert_close(grads[0][name], grads[1][name])
    assert not torch.allclose(grads[0]["weight"], grads[1]["weight"])


def test_what_is_measured_goes_on_being_measured() -> None:
    weights = []
    for wrap in (lambda estimator: estimator, ShapeRemoved):
        torch.manual_seed(0)
        estimator = wrap(ABTanh(blend=Equilibrium(rho_start=2.0, rho_end=2.0)))
        schedule = EstimatorSchedule(estimator, total_steps=10)
        for _ in range(3):
            x = torch.randn(5000, requires_grad=True)
            estimator(x).backward(torch.randn(5000))
            schedule.step()
        blend = next(module for module in estimator.modules() if isinstance(module, Equilibrium))
        weights.append(float(blend.weight(x)))
    assert weights[0] == weights[1] > 0


@pytest.mark.parametrize("role", ["weights", "activations"])
def test_role_schedule_and_learned_state_reach_the_other(role: Role) -> None:
    control = resolve(ShapeRemoved(ABTanh(blend=Learned(0.3))), role)
    assert isinstance(control, ShapeRemoved) and isinstance(control.of, ABTanh)
    assert control.t == control.of.t == {"weights": 3.0, "activations": 1.5}[role]
    control = ShapeRemoved("reste")
    EstimatorSchedule(control, 4).step()
    assert [float(part.progress()) for part in control.modules() if isinstance(part, Annealed)] == [0.25]
    assert isinstance(control.of, ReSTE) and set(control.state_dict()) == {"of.annealing"}


def test_nothing_inside_the_clip_gives_zero_and_no_nan() -> None:
    for of in ("ab_tanh", "ste"):
        control = ShapeRemoved(of)
        for x in (torch.tensor([9.0, -9.0, math.inf]), torch.empty(0)):
            assert torch.equal(control.slope(x), torch.zeros_like(x))
            assert torch.equal(control.surrogate(x.nan_to_num(posinf=50.0)), torch.zeros_like(x))


def test_of_itself_it_is_itself() -> None:
    x = 2 * torch.randn(500, dtype=torch.float64)
    torch.testing.assert_close(ShapeRemoved("shape_removed").slope(x), ShapeRemoved().slope(x))
    assert torch.equal(ShapeRemoved("ste").slope(x), get("ste")().slope(x)), "STE has no shape to lose"  # type: ignore


def test_in_a_recipe_and_a_model() -> None:
    spec = {"name": "shape_removed", "of": {"name": "ab_tanh", "k": 3.0, "blend": {"name": "gate", "width": 2.0}}}
    recipe = abste.train.recipe.make_recipe({"binarize": {"weights": spec, "activations": "shape_removed"}}, "test")
    assert recipe.binarize is not None
    arguments = recipe.binarize.arguments()
    layer = BinaryLinear(3, 4, weights=arguments["weights"], activations=arguments["activations"])
    assert isinstance(layer.weight_binarizer, ShapeRemoved) and isinstance(layer.weight_binarizer.of, ABTanh)
    assert layer.weight_binarizer.of.k == 3.0 and "ABTanh(\n" in repr(layer)


@pytest.mark.parametrize(
    ("of", "message"),
    [
        (None, "ShapeRemoved: of must be the estimator to compare with, got None."),
        (3, "ShapeRemoved: of must be a name, a table, a Binarizer object or None, got int."),
        ("ab_tahn", "unknown estimator 'ab_tahn'; did you mean 'ab_tanh' or 'ab_arctan'?"),
        ({"k": 2.0}, "an estimator's table needs a name, got {'k': 2.0}."),
        ({"name": "ste", "k": 1}, "estimator 'ste' takes no argument 'k'; known: t."),
    ],
    ids=str,
)
def test_message(of: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve({"name": "shape_removed", "of": of}, "weights")
    assert str(caught.value) == message
