"""The ways in which AB-STE's blend adapts, and the measurements and parameters they need."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import abste
from abste.errors import ConfigError
from abste.estimators import ABArcTan, ABTanh, Equilibrium, EstimatorSchedule, Gate, Learned
from abste.estimators.blends import equilibrium, make_blend


def test_an_equilibrium_goes_where_its_state_is_assigned() -> None:
    spec = {"name": "ab_tanh", "blend": "equilibrium"}
    source = abste.nn.BinaryLinear(6, 4, weights=spec)
    x = torch.randn(3, 6)
    source(x).sum().backward()
    EstimatorSchedule(source, 4).step()
    layer = abste.nn.BinaryLinear(6, 4, weights=spec, device="meta")
    idle = abste.nn.BinaryLinear(6, 4, weights=spec, device="meta")
    schedule = EstimatorSchedule(nn.ModuleList([layer, idle]), 4)
    for each in (layer, idle):
        each.load_state_dict(source.state_dict(), assign=True)
    for each in (source, layer):
        each.zero_grad()
        each(x).square().sum().backward()
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, source.weight.grad, rtol=0, atol=0)
    schedule.step()


def test_gate_is_phi_at_zero_and_the_line_in_the_tails() -> None:
    estimator = ABTanh(k=2.0, t=4.0, blend=Gate(a_max=0.8, width=0.5))
    x = torch.linspace(-4, 4, 401, dtype=torch.float64)
    a = 0.8 * torch.exp(-x.abs() / 0.5)
    sech2 = 1 - torch.tanh(2 * x) ** 2
    wanted = (1 - a) + a * 2 * sech2 / torch.tanh(torch.tensor(2.0, dtype=torch.float64))
    torch.testing.assert_close(estimator.slope(x), wanted, rtol=1e-6, atol=1e-7)
    assert estimator.slope(x)[0] == pytest.approx(1, abs=2e-3)
    y = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(estimator.surrogate(y).sum(), y)  # a counts as a constant
    torch.testing.assert_close(estimator.slope(x)[1:-1], slope[1:-1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("cls", [ABTanh, ABArcTan])
@pytest.mark.parametrize("path", ["module", "layer", "weights"])
def test_gradient_of_a_learned_blend(cls: type[ABTanh] | type[ABArcTan], path: str) -> None:
    """dL/dtheta is that of sum g F(x; a), g being the gradient with respect to sign(x)."""
    torch.manual_seed(0)
    x, estimator = 2 * torch.randn(7, 5), cls(blend=Learned(0.3))
    if path == "module":
        used, seen = estimator, x
        grad = torch.randn(7, 5)
        estimator(x.requires_grad_()).backward(grad)
    elif path == "layer":
        layer = abste.nn.BinaryLinear(5, 3, bias=False, weights=None, activations=estimator)
        assert layer.activation is not None
        used = layer.activation.estimator  # type: ignore[assignment]
        upstream = torch.randn(7, 3)
        layer(x).backward(upstream)
        inverse = layer.activation.eval().inverse_rms(x)
        assert inverse is not None
        grad, seen = upstream @ layer.weight.detach(), x * inverse
    else:
        layer = abste.nn.BinaryLinear(5, 3, bias=False, weights=estimator, scale=None)
        used = layer.weight_binarizer  # type: ignore[assignment]
        upstream = torch.randn(7, 3)
        layer(x).backward(upstream)
        grad, seen = upstream.t() @ x, abste.nn.standardize(layer.weight.detach())
    blend = used.blend
    assert isinstance(blend, Learned) and blend.theta.grad is not None
    theta = blend.theta.detach().double().requires_grad_()
    y = seen.detach().double().clamp(-used.t, used.t)
    inside = (seen.detach().abs() <= used.t) * grad.double()
    a = torch.sigmoid(theta)
    (inside * ((1 - a) * y + a * used.phi(y))).sum().backward()
    torch.testing.assert_close(blend.theta.grad.double(), theta.grad, rtol=1e-4, atol=1e-5)


def test_a_learned_blend_is_trained_and_not_decayed() -> None:
    model = nn.Sequential(nn.Linear(4, 8), abste.nn.BinaryLinear(8, 3, weights={"name": "ab_tanh", "blend": "learned"}))
    groups = {group["name"]: group for group in abste.parameter_groups(model, lr=1.0, weight_decay=0.1)}
    layer = model[1]
    theta = layer.weight_binarizer.blend.theta
    assert any(p is theta for p in groups["norms_biases"]["params"]) and groups["norms_biases"]["weight_decay"] == 0
    optimizer = torch.optim.SGD(abste.parameter_groups(model, lr=1.0))
    model(torch.randn(6, 4)).square().sum().backward()
    optimizer.step()
    assert theta.item() != 0 and "1.weight_binarizer.blend.theta" in model.state_dict()


# The equilibrium


def moments(a: Tensor, b: Tensor) -> list[Tensor]:
    """mB, vA, c, vB in units of mA, by definition."""
    a, b = a.double(), b.double()
    unit = a.mean()
    mean = [(b.mean() / unit), a.var(unbiased=False) / unit**2]
    return [*mean, ((a - unit) * (b - b.mean())).mean() / unit**2, b.var(unbiased=False) / unit**2]


def instability(a: Tensor, b: Tensor, weight: float, variance: bool) -> float:
    blended = (1 - weight) * a.double() + weight * b.double()
    spread = blended.var(unbiased=False)
    return float(spread if variance else spread / blended.mean() ** 2)


@given(seed=st.integers(0, 10**6), k=st.floats(0.5, 20), rho=st.floats(1, 20), variance=st.booleans())
def test_closed_form_is_the_largest_weight_within_the_budget(seed: int, k: float, rho: float, variance: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(2000, generator=generator, dtype=torch.float64)
    a = torch.randn(2000, generator=generator, dtype=torch.float64).abs() * (x.abs() <= 3)
    b = a * ABTanh(k=k, t=3.0, blend=make_blend("constant", 0, 1)).slope(x)
    arguments = [moment.reshape(1) for moment in moments(a, b)]
    (found,) = equilibrium(*arguments, torch.tensor([rho]), torch.tensor([variance])).tolist()
    limit = rho * instability(a, b, 0, variance)
    assert 0 <= found <= 1
    assert instability(a, b, found, variance) <= limit * (1 + 1e-6)
    for more in (x for x in (found + 1e-3, found + 0.05, (found + 1) / 2, 1.0) if found < x <= 1):
        assert instability(a, b, more, variance) > limit * (1 - 1e-9), "a larger weight would do as well"


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
}


@pytest.mark.parametrize("of_x", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (32, 16, 32, 32)])  # the second is more than is measured
def test_measured_moments_are_those_of_the_tensor(shape: tuple[int, ...], of_grad: str, of_x: str) -> None:
    """In any layout, and where channels and columns differ: a sample must not see one of them alone, or mix them up."""
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator)
    x = x * torch.linspace(0.2, 3.0, shape[1]).view(1, -1, 1, 1)  # sharply curved in some channels, not in others
    grad = grad * torch.linspace(3.0, 0.5, shape[3])
    estimator = ABTanh(k=3.0, t=2.0, blend=Equilibrium()).train()
    x, grad = LAYOUTS[of_x](x).requires_grad_(), LAYOUTS[of_grad](grad)
    estimator(x).backward(grad)
    n, a1, b1, aa, ab, bb = estimator.blend._tap.grad.double().tolist()  # type: ignore[union-attr]
    a = grad.abs() * (x.detach().abs() <= 2.0)
    b = a * ABTanh(k=3.0, t=2.0, blend=make_blend("constant", 0, 1)).slope(x.detach())
    wanted = torch.stack(moments(a, b))
    unit = a1 / n
    found = [b1 / a1, aa / n / unit**2 - 1, ab / n / unit**2 - b1 / a1, bb / n / unit**2 - (b1 / a1) ** 2]
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float64), wanted, rtol=0.05, atol=0.02)


@pytest.mark.parametrize(("t", "wanted"), [(3.0, 0.69), (1.5, 0.84)])
def test_what_the_default_budget_comes_to(t: float, wanted: float) -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 10**6, dtype=torch.float64)
    a = grad.abs() * (x.abs() <= t)
    b = a * ABTanh(t=t, blend=make_blend("constant", 0, 1)).slope(x)
    rho = torch.tensor([Equilibrium().rho_end])
    found = equilibrium(*[moment.reshape(1) for moment in moments(a, b)], rho, torch.tensor([False]))
    assert float(found) == pytest.approx(wanted, abs=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_budget_is_met(dtype: torch.dtype) -> None:
    """Where 0 < a < 1 and the rate limit is idle: on fresh gradients, within 10 %."""
    torch.manual_seed(0)
    blend = Equilibrium(rho_start=1.5, rho_end=1.5)
    layer = abste.nn.BinaryActivation(ABTanh(k=3.0, blend=blend))
    blend = layer.estimator.blend  # type: ignore[assignment]
    schedule = EstimatorSchedule(layer, total_steps=200)
    for step in range(100):
        x = torch.randn(20_000).to(dtype).requires_grad_()
        layer(x).backward(torch.randn(20_000).to(dtype) * 0.97**step)  # gradients shrink over training
        schedule.step()
    a = float(blend.weight(x))
    assert 0.3 < a < 0.9
    x, grad = torch.randn(200_000), torch.randn(200_000)
    spread = [
        instability(size := (grad * (x.abs() <= estimator.t)).abs(), size * estimator.slope(x), weight, False)
        for estimator, weight in ((ABTanh(k=3.0, t=1.5, blend=make_blend("constant", 0, 1)), w) for w in (a, 0.0))
    ]
    assert spread[0] / spread[1] == pytest.approx(1.5, rel=0.1)


def test_rate_limit_schedule_and_what_is_not_measured() -> None:
    blend = Equilibrium(rho_start=1.0, rho_end=3.0, slew=0.05)
    estimator = ABTanh(k=3.0, blend=blend)
    schedule = EstimatorSchedule(estimator, total_steps=40)
    seen = []
    for step in range(40):
        x = torch.randn(5000, requires_grad=True)
        if step != 20:  # a step without a backward changes nothing that was measured
            (estimator(x) * torch.randn(5000)).sum().backward()
        schedule.step()
        seen.append(float(blend.weight(x)))
    changes = [abs(b - a) for a, b in pairwise(seen)]
    assert max(changes) <= 0.05 + 1e-6 and seen[-1] > seen[5] + 0.1
    before = float(blend.weight(x))
    estimator.eval()
    (estimator(x) * 1.0).sum().backward()
    assert blend._tap.grad is None, "nothing is measured in evaluation"
    estimator.train()
    for bad in (0.0, float("nan"), float("inf")):
        (estimator(x) * bad).sum().backward()
        schedule.step()
    assert float(blend.weight(x)) == pytest.approx(before, abs=0.2) and schedule.progress == 1


def test_a_frozen_network_builds_no_graph() -> None:
    spec = {"name": "ab_tanh", "blend": "equilibrium"}
    layer = abste.nn.BinaryLinear(6, 4, weights=spec, activations=spec)
    model = nn.Sequential(abste.nn.BinaryActivation(spec), layer)
    x = torch.randn(9, 6)
    assert model(x).requires_grad
    model.requires_grad_(False)
    assert not model(x).requires_grad
    learned = ABTanh(blend=Learned())
    assert learned(x).requires_grad, "what is learned needs no gradient of x"
    y = x.clone().requires_grad_()
    model(y).square().sum().backward()
    taps = [m.blend._tap.grad is None for m in model.modules() if isinstance(m, ABTanh)]
    assert taps == [False, True, False], "activations are measured, frozen weights are not"


def test_state_of_an_equilibrium_survives() -> None:
    blend = Equilibrium(rho_start=2.0, rho_end=2.0)
    estimator = ABTanh(blend=blend)
    schedule = EstimatorSchedule(estimator, total_steps=10)
    for _ in range(3):
        x = torch.randn(5000, requires_grad=True)
        estimator(x).backward(torch.randn(5000))
        schedule.step()
    a = float(blend.weight(x))
    assert a > 0
    other = ABTanh(blend=Equilibrium())
    other.load_state_dict(estimator.state_dict())
    for changed in (copy.deepcopy(estimator), other, copy.deepcopy(estimator).half().float(), estimator.bfloat16()):
        assert float(changed.blend.weight(x)) == a
    assert not list(estimator.parameters()), "what is measured is no parameter that an optimizer would change"


def test_several_backwards_count_as_one() -> None:
    torch.manual_seed(0)
    x, grad = torch.randn(2, 4000)
    results = []
    for parts in (1, 4):
        estimator = ABTanh(blend=Equilibrium(rho_start=2.0, rho_end=2.0, slew=1.0))
        schedule = EstimatorSchedule(estimator, total_steps=10)
        for part, upstream in zip(x.chunk(parts), grad.chunk(parts), strict=True):
            estimator(part.clone().requires_grad_()).backward(upstream)
        schedule.step()
        results.append(float(estimator.blend.weight(x)))
    assert results[0] == pytest.approx(results[1], rel=1e-4) and 0 < results[0] < 1


@pytest.mark.parametrize("blend", ["gate", "learned", "equilibrium"])
def test_compiled_is_eager(blend: str) -> None:
    torch.manual_seed(0)
    layer = abste.nn.BinaryLinear(6, 4, weights={"name": "ab_tanh", "blend": blend}, activations=ABTanh(blend=blend))
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager")
    x = torch.randn(9, 6, requires_grad=True)
    for model in (layer, compiled):
        model(x).square().sum().backward()
    for one, two in zip(layer.parameters(), twin.parameters(), strict=True):
        assert one.grad is not None and two.grad is not None
        torch.testing.assert_close(one.grad, two.grad)
    if blend == "equilibrium":
        for one, two in zip(layer.modules(), twin.modules(), strict=True):
            if isinstance(one, Equilibrium) and isinstance(two, Equilibrium):
                assert one._tap.grad is not None and two._tap.grad is not None
                torch.testing.assert_close(one._tap.grad, two._tap.grad)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gate(a_max=1.5), r"a_max must lie in \[0, 1\]"),
        (lambda: Gate(width=0), "width must lie in"),
        (lambda: Learned(1.0), "between 0 and 1"),
        (lambda: Equilibrium(rho_end=0.5), r"rho must lie in \[1, 1e6\]"),
        (lambda: Equilibrium(smoothing=1), "needs smoothing in"),
        (lambda: Equilibrium(slew=0), "slew in"),
        (lambda: Equilibrium(shape="cosin"), "did you mean 'cosine'"),
        (lambda: Equilibrium(budget="varians"), "did you mean 'varian"),
        (lambda: ABTanh(blend={"name": "equilibrium", "rho": 2}), "takes no argument 'rho'"),
        (lambda: ABTanh(blend={"rho_end": 2}), "unknown blend None"),
    ],
    ids=range(10),
)
def test_wrong_arguments(make: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()  # type: ignore[operator]
