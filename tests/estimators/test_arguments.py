from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from abste import estimators
from abste.errors import ConfigError
from abste.estimators import (
    DSQ,
    EDE,
    EWGS,
    FDA,
    RBNN,
    STE,
    ABArcTan,
    ABTanh,
    ApproxSign,
    Binarizer,
    BiPer,
    Constant,
    EDEFloor,
    EstimatorSchedule,
    ExSTE,
    MagnitudeAwareSign,
    Progress,
    ReSTE,
    SigmoidSign,
    SiMaN,
    StochasticSign,
    SwishSign,
    resolve,
)

ROLES: list[estimators.Role] = ["weights", "activations"]
ARGUMENTS = [
    (name, argument) for name in estimators.available() for argument in estimators.get(name).defaults
]  # the numeric ones


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize(
    "value", ["2", True, math.nan, [1.0], {}, 1j, torch.tensor(2.0), 10**400], ids=lambda v: repr(v)[:12]
)
def test_no_number(name: str, argument: str, value: Any) -> None:
    cls = estimators.get(name)
    with pytest.raises(ConfigError, match=rf"^{cls.__name__}: {argument} must be a number, got [^\n]*\.$"):
        resolve({"name": name, argument: value}, "weights")


@pytest.mark.parametrize(("name", "argument"), ARGUMENTS)
@pytest.mark.parametrize("value", [-1.0, -math.inf])
def test_out_of_range(name: str, argument: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^[A-Z]\w+: .*{argument}.*got [^\n]*\.$"):
        resolve({"name": name, argument: value}, "weights")


@pytest.mark.parametrize(
    ("cls", "arguments", "message"),
    [
        (ABTanh, {"k": 0}, "ABTanh: k must lie in [1e-6, 1e4], got 0.0."),
        (ABArcTan, {"k": math.inf}, "ABArcTan: k must lie in [1e-6, 1e4], got inf."),
        (ABTanh, {"t": 0}, "ABTanh: t must be positive, got 0.0."),
        (ABTanh, {"a_end": 1.1}, "ABTanh: a_end must lie in [0, 1], got 1.1."),
        (ABTanh, {"a_start": 2, "blend": Constant(0.5)}, "ABTanh: a_start must lie in [0, 1], got 2.0."),
        (ABTanh, {"k_start": True}, "ABTanh: k_start must be a number, got True."),
        (ABTanh, {"k_start": 0}, "ABTanh: k_start must lie in [1e-6, k = 2], got 0.0."),
        (ABArcTan, {"k_start": 3, "k": 2.9}, "ABArcTan: k_start must lie in [1e-6, k = 2.9], got 3.0."),
        (ABTanh, {"normalized": "no"}, "ABTanh: normalized must be true or false, got 'no'."),
        (ABTanh, {"blend": "progres"}, "unknown blend 'progres'; did you mean 'progress'?"),
        (ABTanh, {"blend": 0.5}, "unknown blend 0.5; known: constant, equilibrium, gate, learned, progress."),
        (ABTanh, {"blend": None}, "unknown blend None; known: constant, equilibrium, gate, learned, progress."),
        (STE, {"t": -math.inf}, "STE: t must be positive, got -inf."),
        (ApproxSign, {"t": 2.0}, "ApproxSign takes no argument 't', nor any other."),
        (EDE, {"s_min": 20.0}, "EDE: needs 1e-6 <= s_min <= s_max <= 1e4, got s_min=20.0 and s_max=10.0."),
        (EDEFloor, {"floor": 1.5}, "EDEFloor: floor must lie in [0, 1], got 1.5."),
        (ReSTE, {"m": 2}, "ReSTE: needs 1 <= o_end <= 1e4 and 1e-4 <= m < t, got o_end=3.0, m=2.0 and t=1.5."),
        (ReSTE, {"o_end": 0.5}, "ReSTE: needs 1 <= o_end <= 1e4 and 1e-4 <= m < t, got o_end=0.5, m=0.1 and t=1.5."),
        (SwishSign, {"beta": 0}, "SwishSign: beta must lie in [1e-6, 1e4], got 0.0."),
        (SigmoidSign, {"k": math.inf}, "SigmoidSign: k must lie in [1e-6, 1e4], got inf."),
        (
            RBNN,
            {"s_floor": 11},
            "RBNN: needs 1e-4 <= s_min <= s_max <= 1e4 and 0 <= s_floor <= s_max, "
            "got s_min=0.01, s_max=10.0 and s_floor=11.0.",
        ),
        (ExSTE, {"o_end": 0.001}, "ExSTE: needs 1e-4 <= o_start <= o_end <= 1e4, got o_start=0.01 and o_end=0.001."),
        (FDA, {"t": 32}, "FDA: needs 1e-6 <= omega <= 100 and omega * t < pi, got omega=0.1 and t=32.0."),
        (FDA, {"t": math.inf}, "FDA: needs 1e-6 <= omega <= 100 and omega * t < pi, got omega=0.1 and t=inf."),
        (FDA, {"n_end": 9.5}, "FDA: needs integers 0 <= n_start <= n_end <= 100, got n_start=9.0 and n_end=9.5."),
        (FDA, {"n_end": 8}, "FDA: needs integers 0 <= n_start <= n_end <= 100, got n_start=9.0 and n_end=8.0."),
        (DSQ, {"alpha": 1}, "DSQ: needs 0 < alpha < 1 and 1e-3 <= t <= 1e4, got alpha=1.0 and t=3.0."),
        (DSQ, {"t": math.inf}, "DSQ: needs 0 < alpha < 1 and 1e-3 <= t <= 1e4, got alpha=0.2 and t=inf."),
        (SiMaN, {"t": 1.0}, "SiMaN takes no argument 't', nor any other."),
        (MagnitudeAwareSign, {"t": 0}, "MagnitudeAwareSign: t must be positive, got 0.0."),
        (BiPer, {"omega": 0}, "BiPer: omega must lie in [1e-6, 1e4], got 0.0."),
        (EWGS, {"delta": 2.5}, "EWGS: needs 0 <= delta <= 2 and t <= 1e4, got delta=2.5 and t=3.0."),
        (StochasticSign, {"t": 0}, "StochasticSign: t must be positive, got 0.0."),
        (Constant, {"a": "half"}, "Constant: a must be a number, got 'half'."),
        (Constant, {"a": -0.1}, "Constant: a must lie in [0, 1], got -0.1."),
        (Progress, {"a_end": True}, "Progress: a_end must be a number, got True."),
        (Progress, {"shape": "lineal"}, "unknown blend shape 'lineal'; did you mean 'linear'?"),
    ],
    ids=lambda value: None if isinstance(value, str) else value.__name__ if isinstance(value, type) else repr(value),
)
def test_message(cls: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        cls(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("ab_tahn", "unknown estimator 'ab_tahn'; did you mean 'ab_tanh' or 'ab_arctan'?"),
        ({"name": "stee"}, "unknown estimator 'stee'; did you mean 'ste' or 'reste' or 'exste'?"),
        ({"name": 3}, "unknown estimator 3; known: " + ", ".join(estimators.available()) + "."),
        ({"name": ["ste"]}, "unknown estimator ['ste']; did you mean 'ste'?"),
        ({"k": 2.0}, "an estimator's table needs a name, got {'k': 2.0}."),
        ({"name": "ab_tanh", "a_ende": 1}, "estimator 'ab_tanh' takes no argument 'a_ende'; did you mean 'a_end'?"),
        ({"name": "ste", "k": 1}, "estimator 'ste' takes no argument 'k'; known: t."),
        ({"name": "approx_sign", "t": 1}, "estimator 'approx_sign' takes no argument 't', nor any other."),
        ({"name": "reste", "self": 1}, "estimator 'reste' takes no argument 'self'; known: m, o_end, t."),
        (3, "weights must be a name, a table, a Binarizer object or None, got int."),
        (ABTanh, "weights must be a name, a table, a Binarizer object or None, got the class ABTanh."),
    ],
    ids=str,
)
def test_spec_message(spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve(spec, "weights")
    assert str(caught.value) == message


def test_get() -> None:
    assert estimators.get("ab_tanh") is ABTanh
    assert estimators.available() == sorted(estimators.available())


def test_register_refuses_a_name_that_is_taken() -> None:
    with pytest.raises(ConfigError, match="an estimator named 'ste' is registered already"):
        estimators.register("ste")(STE)


def test_base_is_abstract() -> None:
    class Half(Binarizer):
        pass

    with pytest.raises(TypeError, match="backward"):
        Half()  # type: ignore[abstract]


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), np.float64(2)])
def test_numbers(value: Any) -> None:
    estimator = ABTanh(value)
    assert estimator.k == 2.0 and type(estimator.k) is float


def test_positional_arguments() -> None:
    estimator = ABTanh(3.0, None, "constant", None, 0.5, False)
    assert (estimator.k, estimator.t, estimator.a_start, estimator.a_end) == (3.0, 3.0, 0.0, 0.5)
    assert isinstance(estimator.blend, Constant) and estimator.blend.a == 0.5 and not estimator.normalized


# Roles


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", estimators.available())
def test_none_means_the_default_of_the_role(name: str, role: estimators.Role) -> None:
    cls = estimators.get(name)
    if role not in cls.roles:
        return
    binarizer = resolve(name, role)
    assert binarizer is not None
    defaults = {argument: values[role] for argument, values in binarizer.defaults.items()}
    assert {argument: getattr(binarizer, argument) for argument in defaults} == defaults
    nothing = resolve(cls(**dict.fromkeys(defaults)), role)
    assert {argument: getattr(nothing, argument) for argument in defaults} == defaults


def test_the_clip_depends_on_the_role() -> None:
    for name in ("ab_tanh", "ab_arctan", "ste"):
        binarizers = [resolve(name, role) for role in ROLES]
        assert [binarizer.t for binarizer in binarizers if binarizer is not None] == [3.0, 1.5]


def test_explicit_values_stay_whatever_the_role() -> None:
    spec = {"name": "ab_tanh", "t": 2.5, "a_end": 0.5}
    for role in ROLES:
        estimator = resolve(spec, role)
        assert isinstance(estimator, ABTanh)
        assert estimator.t == 2.5 and estimator.a_end == 0.5
        assert isinstance(estimator.blend, Progress) and estimator.blend.a_end == 0.5
    assert spec == {"name": "ab_tanh", "t": 2.5, "a_end": 0.5}, "a table is read, not used up"


def test_objects_are_copied() -> None:
    original = ABTanh(k=3.0)
    first, second = resolve(original, "weights"), resolve(original, "activations")
    assert isinstance(first, ABTanh) and isinstance(second, ABTanh)
    assert len({id(original), id(first), id(second)}) == 3
    assert (original.t, first.t, second.t) == (3.0, 3.0, 1.5)
    EstimatorSchedule(first, 10).step()
    assert float(first.blend.weight(torch.ones(1))) > 0
    assert float(original.blend.weight(torch.ones(1))) == float(second.blend.weight(torch.ones(1))) == 0.0


def test_a_copy_keeps_where_its_original_stood() -> None:
    for original in (ABTanh(), ABTanh(blend=Progress(0.1, 0.2)), ABArcTan(k_start=0.1), ReSTE()):
        EstimatorSchedule(original, 4).step()
        copy = resolve(original, "weights")
        assert copy is not None
        x = torch.randn(20)
        assert torch.equal(copy.backward(torch.ones(20), x), original.backward(torch.ones(20), x))


def test_a_blend_object_overrides_the_numbers() -> None:
    estimator = resolve(ABTanh(a_end=0.9, blend=Constant(0.25)), "activations")
    assert isinstance(estimator, ABTanh)
    assert estimator.blend.weight(torch.ones(1)) == 0.25


def test_none_and_repr() -> None:
    assert resolve(None, "weights") is None
    assert "k=3, t=3" in repr(ABTanh(k=3.0)) and "a_end=0.9" in repr(ABTanh())
    assert repr(STE(t=1.25)) == "STE(t=1.25)"
    assert "normalized=False" in repr(ABTanh(normalized=False))


def test_an_estimator_of_the_user() -> None:
    class Mine(estimators.Estimator):
        """F(x) = c x."""

        defaults = {"c": {"weights": 1.0, "activations": 2.0}}
        c: float

        def __init__(self, c: float | None = None) -> None:
            super().__init__(c=c)

        def surrogate(self, x: Tensor) -> Tensor:
            return self.c * x

        def backward(self, grad: Tensor, x: Tensor) -> Tensor:
            return grad * self.c

    class ForActivations(Mine):
        roles = ("activations",)
        defaults = {"c": {"activations": 2.0}}

    assert ForActivations().c == 2.0 and resolve(ForActivations(), "activations") is not None
    mine = resolve(Mine(), "activations")
    assert mine is not None
    x = torch.randn(3, requires_grad=True)
    mine(x).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [2.0] * 3
