"""Each formula, written out once more: F by its definition in NumPy, F' by finite differences of that or by SymPy."""

from __future__ import annotations

import ast
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import sympy
import torch
from numpy.typing import NDArray
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
    BiPer,
    Constant,
    EDEFloor,
    Estimator,
    ExSTE,
    IdentitySTE,
    MagnitudeAwareSign,
    Progress,
    ReSTE,
    ShapeRemoved,
    SigmoidSign,
    SiMaN,
    StochasticSign,
    SwishSign,
)

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


def ede_floor(x: Array, p: float) -> Array:
    y = np.clip(x, -2.0, 2.0)
    return 0.3 * y + 0.7 * ede(y, p)


def reste(x: Array, p: float) -> Array:
    o = 1 + (1 - np.cos(np.pi * p / 2)) * 4.0
    size = np.minimum(np.abs(x), 1.4)
    return np.sign(x) * np.where(size <= 0.2, size * 0.2 ** (1 / o) / 0.2, size ** (1 / o))


def logistic(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def swish_sign(x: Array, p: float) -> Array:
    """2 (z logistic(z))' - 1 at z = 3 x, the derivative written out by the product rule."""
    g = logistic(3.0 * x)
    return 2 * (g + 3.0 * x * g * (1 - g)) - 1


def sigmoid_sign(x: Array, p: float) -> Array:
    return logistic(2.5 * x) - logistic(-2.5 * x)


def parabola(x: Array, s: float) -> Array:
    """RBNN's surrogate as its vertex form: 1 - (1 - s |x| / sqrt 2)^2 up to the vertex."""
    rest = np.maximum(1 - s * np.abs(x) / np.sqrt(2), 0)
    return np.sign(x) * max(1 / s, 1) * (1 - rest**2)


def rbnn(x: Array, p: float) -> Array:
    return parabola(x, 0.05 * (8.0 / 0.05) ** p)


def rbnn_with_floor(x: Array, p: float) -> Array:
    return parabola(x, max(0.05 * (8.0 / 0.05) ** p, 0.7))


def fda(x: Array, p: float) -> Array:
    n = [2, 3, 4, 7][[0.0, 0.3, 0.5, 1.0].index(p)]
    y = np.clip(x, -2.0, 2.0)
    return sum(4 / np.pi * np.sin(m * 0.7 * y) / m for m in range(1, 2 * n + 2, 2))


def exste(x: Array, p: float) -> Array:
    o = 10 ** (2.8 * p - 2)
    return np.sign(x) * (1 - np.exp(-o * np.minimum(np.abs(x), 1.5))) / (1 - np.exp(-o))


def biper(x: Array, p: float) -> Array:
    return np.sin(3.0 * x)


def stochastic_sign(x: Array, p: float) -> Array:
    """The expectation: one times the probability of +1, less that of -1."""
    probability = np.clip((x + 1) / 2, 0, 1)
    return probability - (1 - probability)


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


def ab_tanh_rising(x: Array, p: float) -> Array:
    k = 0.5 + 2.5 * (1 - np.cos(np.pi * p / 2))
    return blend(x, rising(p), lambda z: np.tanh(k * z) / np.tanh(k))


def ab_arctan_raw_rising(x: Array, p: float) -> Array:
    k = 0.2 + 3.8 * (1 - np.cos(np.pi * p / 2))
    return blend(x, 0.75, lambda z: 2 / np.pi * np.arctan(np.pi / 2 * k * z))


def shape_removed(x: Array, p: float) -> Array:
    """The clipped line, times ab_tanh's mean slope over those of the points that lie inside its clip."""
    inside, h = POINTS[np.abs(POINTS) <= 2.0], 1e-6
    mean = np.mean((ab_tanh(inside + h, p) - ab_tanh(inside - h, p)) / (2 * h))
    return mean * np.clip(x, -2.0, 2.0)


def dsq(x: Array, p: float) -> Array:
    """As the port has it, at one bit: one interval of length 4 around 0."""
    k = np.log(2 / 0.3 - 1) / 4.0
    return np.tanh(k * np.clip(x, -2.0, 2.0)) / (1 - 0.3)


def magnitude_aware_sign(x: Array, p: float) -> Array:
    return np.mean(np.abs(POINTS)) * np.clip(x, -2.0, 2.0)


def siman(x: Array, p: float) -> Array:
    return np.abs(x) - np.sort(np.abs(POINTS))[7]  # of sixteen


CASES: list[tuple[Estimator, Callable[[Array, float], Array]]] = [
    (STE(t=1.25), ste),
    (IdentitySTE(), identity_ste),
    (ApproxSign(), approx_sign),
    (EDE(s_min=0.02, s_max=20.0), ede),
    (EDEFloor(floor=0.3, t=2.0, s_min=0.02, s_max=20.0), ede_floor),
    (ReSTE(o_end=5.0, t=1.4, m=0.2), reste),
    (SwishSign(beta=3.0), swish_sign),
    (SigmoidSign(k=2.5), sigmoid_sign),
    (RBNN(s_min=0.05, s_max=8.0), rbnn),
    (RBNN(s_min=0.05, s_max=8.0, s_floor=0.7), rbnn_with_floor),
    (FDA(omega=0.7, t=2.0, n_start=2, n_end=7), fda),
    (ExSTE(), exste),
    (DSQ(alpha=0.3, t=2.0), dsq),
    (MagnitudeAwareSign(t=2.0), magnitude_aware_sign),
    (SiMaN(), siman),
    (BiPer(omega=3.0), biper),
    (StochasticSign(), stochastic_sign),
    (ABTanh(k=3.0, t=2.0, a_start=0.2, a_end=0.7), ab_tanh),
    (ABTanh(k=3.0, t=2.0, a_end=0.75, blend="constant", normalized=False), ab_tanh_raw),
    (ABArcTan(k=4.0, t=2.0, blend=Progress(0.1, 0.9, "linear")), ab_arctan),
    (ABArcTan(k=4.0, t=2.0, a_start=0.2, a_end=0.7, normalized=False), ab_arctan_raw),
    (ABTanh(k_start=0.5, k=3.0, t=2.0, a_start=0.2, a_end=0.7), ab_tanh_rising),
    (ABArcTan(k_start=0.2, k=4.0, t=2.0, a_end=0.75, blend="constant", normalized=False), ab_arctan_raw_rising),
    (ShapeRemoved(ABTanh(k=3.0, t=2.0, a_start=0.2, a_end=0.7)), shape_removed),
]


@pytest.mark.parametrize(("estimator", "function"), CASES, ids=[function.__name__ for _, function in CASES])
@pytest.mark.parametrize("progress", [0.0, 0.3, 0.5, 1.0])
def test_surrogate_and_slope(estimator: Estimator, function: Callable[[Array, float], Array], progress: float) -> None:
    estimators.EstimatorSchedule(estimator, 10).load_state_dict({"last_step": round(10 * progress), "total_steps": 10})
    x = torch.from_numpy(POINTS)
    np.testing.assert_allclose(
        estimator.surrogate(x).detach().numpy(), function(POINTS, progress), rtol=1e-6, atol=1e-8
    )
    h = 1e-6
    difference = (function(POINTS + h, progress) - function(POINTS - h, progress)) / (2 * h)
    np.testing.assert_allclose(estimator.slope(x).numpy(), difference, rtol=2e-6, atol=1e-8)


def test_every_estimator_has_a_case() -> None:
    """At the start, in the middle and at the end of training; EWGS, which has no F, has its own below."""
    assert {estimator.name for estimator, _ in CASES} | {"ewgs"} >= set(estimators.available())


def test_the_example_of_the_page(example: tuple[dict[str, str], dict[str, Any]]) -> None:
    """CONTRIBUTING.md's: its size, its argument errors, and its test parameter. The property tests run it as well."""
    blocks, names = example
    nodes = (node.value for node in ast.walk(ast.parse(blocks["file"])) if isinstance(node, ast.Expr))
    texts = [node for node in nodes if isinstance(node, ast.Constant)]
    prose = {line for text in texts for line in range(text.lineno, (text.end_lineno or text.lineno) + 1)}
    lines = [line for i, line in enumerate(blocks["file"].splitlines(), 1) if line.strip() and i not in prose]
    assert len(lines) <= 40
    cases: list[Any] = []
    exec(blocks["case"], {**names, "np": np, "Array": Array, "CASES": cases})
    ((estimator, function),) = cases
    for progress in (0.0, 0.3, 0.5, 1.0):
        test_surrogate_and_slope(estimator, function, progress)
    with pytest.raises(ConfigError, match=r"^SoftSign: needs .*, got k_start=20.0 and k_end=10.0\.$"):
        names["SoftSign"](k_start=20)
    x = torch.linspace(-3, 3, 61, dtype=torch.float64)
    torch.testing.assert_close(names["SoftSign"](k_start=1e-4).slope(x), STE(t=3).slope(x), rtol=1e-3, atol=0)


def test_constant_blend() -> None:
    assert Constant(0.3).weight(torch.ones(1)) == 0.3
    assert list(Constant(0.3).state_dict()) == []


# The slopes of the literature, as its authors write them, against the derivative that SymPy takes of F


X = sympy.Symbol("x", positive=True)  # every F here is odd


def derived(slope: sympy.Expr, surrogate: sympy.Expr) -> bool:
    """Whether the slope is the derivative of the surrogate, to thirty digits at seven points."""
    difference = slope - sympy.diff(surrogate, X)
    points = [sympy.Rational(n, 7) for n in (1, 2, 3, 5, 8, 13, 21)]
    return all(abs(sympy.N(difference.subs(X, point), 30)) < 1e-25 for point in points)


def assert_is(estimator: Estimator, slope: sympy.Expr, step: int = 0) -> None:
    """The estimator's slope is the expression's value, after ``step`` per cent of training."""
    estimators.EstimatorSchedule(estimator, 100).load_state_dict({"last_step": step, "total_steps": 100})
    points = [0.0, 1e-3, 0.05, 0.13, 0.3, 0.47, 0.62, 0.99]
    wanted = [float(sympy.limit(slope, X, 0) if point == 0 else sympy.N(slope.subs(X, point), 20)) for point in points]
    for sign in (1, -1):
        found = estimator.slope(torch.tensor(points, dtype=torch.float64) * sign)
        np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-6, atol=1e-7)


def test_swish_sign() -> None:
    beta = sympy.Integer(5)
    logistic = 1 / (1 + sympy.exp(-beta * X))
    surrogate = 2 * logistic * (1 + beta * X * (1 - logistic)) - 1
    slope = beta * (2 - beta * X * sympy.tanh(beta * X / 2)) / (1 + sympy.cosh(beta * X))
    assert derived(slope, surrogate)
    swish = X * logistic
    assert derived(slope, 2 * sympy.diff(swish, X) - 1), "twice the derivative of the swish function, less one"
    assert_is(SwishSign(), slope)
    zero = sympy.nsolve(slope.subs(X, X / beta), X, 2.4)
    least = sympy.nsolve(sympy.diff(slope, X).subs(X, X / beta), X, 3.4)
    assert float(zero) == pytest.approx(2.3994, abs=5e-5), "the docstring's figures"
    assert float(least) == pytest.approx(3.4358, abs=5e-5)
    assert float(slope.subs(X, least / beta) / beta) == pytest.approx(-0.0738, abs=5e-5)
    assert float(surrogate.subs(X, zero / beta)) == pytest.approx(1.1997, abs=5e-5)


def test_sigmoid_sign() -> None:
    logistic = 1 / (1 + sympy.exp(-3 * X))
    slope = 2 * 3 * logistic * (1 - logistic)
    assert derived(slope, 2 * logistic - 1)
    assert_is(SigmoidSign(), slope)
    ede = EDE(s_min=1.5, s_max=1.5)
    x = torch.linspace(-9, 9, 99, dtype=torch.float64)
    torch.testing.assert_close(SigmoidSign().slope(x), ede.slope(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(SigmoidSign().surrogate(x), ede.surrogate(x))


@pytest.mark.parametrize(
    ("role", "step", "s"),
    [
        ("weights", 0, "0.01"),
        ("weights", 100, "10"),
        ("activations", 0, "1"),
        ("activations", 60, "1"),
        ("activations", 100, "10"),
    ],
)
def test_rbnn(role: estimators.Role, step: int, s: str) -> None:
    sharpness = sympy.Rational(s)
    k = sympy.Max(1 / sharpness, 1)
    inside = k * (sympy.sqrt(2) * sharpness * X - sharpness**2 * X**2 / 2)
    slope = sympy.Piecewise((sympy.diff(inside, X), sharpness * X < sympy.sqrt(2)), (0, True))
    estimator = estimators.resolve("rbnn", role)
    assert isinstance(estimator, RBNN)
    assert_is(estimator, slope, step)
    edge = sympy.sqrt(2) / sharpness
    assert sympy.simplify(inside.subs(X, edge) - k) == 0 and sympy.simplify(sympy.diff(inside, X).subs(X, edge)) == 0
    assert estimator.surrogate(torch.tensor([1e3, -1e3])).tolist() == pytest.approx([float(k), -float(k)])


def test_rbnn_contains_approx_sign() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    estimator = RBNN(s_min=2**0.5, s_max=2**0.5)
    torch.testing.assert_close(estimator.slope(x), ApproxSign().slope(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(estimator.surrogate(x), ApproxSign().surrogate(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("step", "n"), [(0, 9), (50, 13), (99, 17), (100, 18)])
def test_fda(step: int, n: int) -> None:
    omega = sympy.Rational(1, 10)
    odds = range(1, 2 * n + 2, 2)
    surrogate = 4 / sympy.pi * sympy.Add(*(sympy.sin(i * omega * X) / i for i in odds))
    slope = 4 * omega / sympy.pi * sympy.Add(*(sympy.cos(i * omega * X) for i in odds))
    assert derived(slope, surrogate)
    assert_is(FDA(), slope, step)
    first_zero = float(sympy.pi / (2 * omega * (n + 1)))
    assert float(sympy.N(slope.subs(X, first_zero))) == pytest.approx(0, abs=1e-12)
    assert {9: 1.57, 13: 1.12, 17: 0.87, 18: 0.83}[n] == pytest.approx(first_zero, abs=5e-3), "the docstring's figures"


@pytest.mark.parametrize(("step", "o"), [(0, sympy.Rational(1, 100)), (100, 10 ** sympy.Rational(4, 5))])
def test_exste(step: int, o: sympy.Expr) -> None:
    surrogate = (1 - sympy.exp(-o * X)) / (1 - sympy.exp(-o))
    slope = o * sympy.exp(-o * X) / (1 - sympy.exp(-o))
    assert derived(slope, surrogate)
    assert sympy.simplify(surrogate.subs(X, 1)) == 1
    assert_is(ExSTE(), slope, step)


def test_exste_is_ste_for_a_small_o() -> None:
    x = torch.linspace(-2, 2, 81, dtype=torch.float64)
    assert float((ExSTE(o_start=1e-4).slope(x) - STE(t=1.5).slope(x)).abs().max()) < 2e-4


@pytest.mark.parametrize(("role", "t"), [("weights", 3.0), ("activations", 1.5)])
def test_ewgs(role: estimators.Role, t: float) -> None:
    """Through [0, 1]: normalise, clamp, round, and scale the gradient of the rounding; all else by autograd."""

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x - x.round())
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (difference,) = ctx.saved_tensors
            return grad * (1 + 0.3 * grad.sign() * difference)

    x = torch.randn(400, dtype=torch.float64) * 2
    grad = torch.randn_like(x)
    x.requires_grad_()
    binary = 2 * (Round.apply(((x + t) / (2 * t)).clamp(0, 1)) - 0.5)
    binarizer = estimators.resolve(EWGS(delta=0.3), role)
    assert binarizer is not None and binarizer.t == t
    y = binarizer(x)
    assert torch.equal(y, binary)
    # Their two factors, 2 and 1 / (2 t), belong to the interval: they are 1 / t together, and 1 for us.
    wanted, found = torch.autograd.grad(binary, x, grad)[0] * t, torch.autograd.grad(y, x, grad)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("alpha", [1e-6, 0.05, 0.2, 0.7, 0.95])
@pytest.mark.parametrize("t", [1.5, 3.0])
def test_what_dsq_learns(alpha: float, t: float) -> None:
    """dL/dalpha by autograd of the formula as the paper has it, in alpha; theta has alpha (1 - alpha) times that."""
    torch.manual_seed(0)
    x, grad = 2 * torch.randn(2, 400, dtype=torch.float64)
    leaf = torch.tensor(alpha, dtype=torch.float64, requires_grad=True)
    y = torch.tanh(torch.log(2 / leaf - 1) / (2 * t) * x.clamp(-t, t)) / (1 - leaf)
    (wanted,) = torch.autograd.grad(y, leaf, grad * (x.abs() <= t))
    estimator = DSQ(alpha=alpha, t=t)
    estimator(x.requires_grad_()).backward(grad)
    assert estimator.theta.grad is not None
    torch.testing.assert_close(estimator.theta.grad.double(), wanted * alpha * (1 - alpha), rtol=1e-4, atol=1e-6)
    (mine,) = torch.autograd.grad(estimator.surrogate(x), estimator.theta, grad * (x.abs() <= t))
    torch.testing.assert_close(estimator.theta.grad, mine, rtol=1e-4, atol=1e-6)


def test_dsq_between_its_ends() -> None:
    x = torch.linspace(-2, 2, 80, dtype=torch.float64)
    torch.testing.assert_close(DSQ(alpha=1 - 1e-9, t=2.0).slope(x), STE(t=2.0).slope(x) / 2, rtol=1e-3, atol=0)
    x = x[x.abs() > 0.2]
    torch.testing.assert_close(DSQ(alpha=1e-30, t=2.0).surrogate(x), estimators.sign(x), rtol=0, atol=1e-2)
    end = torch.tensor([2.0, -2.0, 9.0], dtype=torch.float64)
    for alpha in (0.9, 0.2, 1e-9):
        torch.testing.assert_close(DSQ(alpha=alpha, t=2.0).surrogate(end), estimators.sign(end))
    for theta in (-1e4, 1e4):  # wherever an optimizer may take it
        estimator = DSQ()
        estimator.theta.data.fill_(theta)
        y = torch.randn(50, requires_grad=True)
        estimator(y).sum().backward()
        assert y.grad is not None and estimator.theta.grad is not None
        assert y.grad.isfinite().all() and estimator.theta.grad.isfinite() and estimator.slope(y.detach()).max() < 1e2


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7), (6, 1, 3)])
def test_siman_as_its_authors_compute_it(shape: tuple[int, ...]) -> None:
    """The larger half of each filter by sorting, and the gradient through |w| alone."""
    torch.manual_seed(0)
    latent = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    size = latent.abs().view(shape[0], -1)
    bits = torch.zeros_like(size)
    for i, row in enumerate(size.detach()):
        bits[i, row.sort(descending=True).indices[: len(row) // 2]] = 1
    binary = (size - size.detach() + bits * 2 - 1).view_as(latent)
    grad = torch.randn_like(binary)
    estimator = SiMaN()
    y = estimator(latent)
    torch.testing.assert_close(y, binary)
    assert torch.equal(torch.autograd.grad(y, latent, grad)[0], torch.autograd.grad(binary, latent, grad)[0])


@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 7)])
def test_magnitude_aware_sign_as_larq_computes_it(shape: tuple[int, ...]) -> None:
    """Scaled by the mean magnitude of the filter, which counts as a constant, of a sign that is STE clipped at 1."""
    torch.manual_seed(0)
    latent = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    alpha = latent.detach().abs().mean(tuple(range(1, len(shape))), keepdim=True)
    clipped = latent.clamp(-1, 1)
    scaled = alpha * (clipped - clipped.detach() + estimators.sign(latent))
    grad = torch.randn_like(latent)
    y = MagnitudeAwareSign(t=1)(latent)
    assert torch.equal(alpha * y, scaled)
    torch.testing.assert_close(torch.autograd.grad(y, latent, grad)[0], torch.autograd.grad(scaled, latent, grad)[0])


@pytest.mark.parametrize("cls", [SiMaN, MagnitudeAwareSign])
def test_filters_of_one_weight_count_as_one(cls: type[SiMaN | MagnitudeAwareSign]) -> None:
    latent = torch.randn(9, 1, 1, 1)
    for found, whole in (
        (cls()(latent), cls()(latent.flatten())),
        (cls().slope(latent), cls().slope(latent.flatten())),
    ):
        assert torch.equal(found.flatten(), whole) and found.abs().max() > 0
