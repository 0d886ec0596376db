"""The estimators for weights alone, whose forward is not sign(x). They are not in the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from abste.errors import ConfigError
from abste.estimators import BiPer, Estimator, StochasticSign, available, resolve, sign
from abste.nn import BinaryConv2d, BinaryLinear

HALF = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64, *HALF]
BOTH: Any = pytest.mark.parametrize("cls", [BiPer, StochasticSign])


def every_finite_number(dtype: torch.dtype) -> torch.Tensor:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


@BOTH
def test_declarations(cls: type[Estimator]) -> None:
    assert cls.name not in available()
    assert cls.has_surrogate and cls.odd
    assert (cls is StochasticSign) == cls.monotone == cls.plain_bits
    with pytest.raises(ConfigError, match=rf"^{cls.__name__} is for weights, and cannot binarise activations\.$"):
        resolve(cls(), "activations")
    with pytest.raises(ConfigError, match="is for weights"):
        BinaryLinear(3, 4, weights=cls(), activations=cls())
    with pytest.raises(ConfigError, match=rf"^{cls.__name__} needs a floating-point input, got torch.int64\.$"):
        cls()(torch.zeros(3, dtype=torch.int64))


@BOTH
@pytest.mark.parametrize("dtype", FLOATS)
def test_gradient_is_the_slope_and_of_the_dtype(cls: type[Estimator], dtype: torch.dtype) -> None:
    estimator = cls()
    x = torch.randn(3, 40).to(dtype).requires_grad_()
    before = x.detach().clone()
    y = estimator(x)
    assert y.dtype == dtype and y.shape == x.shape and set(y.flatten().tolist()) == {1.0, -1.0}
    y.sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype
    assert torch.equal(x.grad, estimator.slope(x.detach()))
    assert torch.equal(x.detach(), before)
    grad = torch.randn_like(before)
    torch.testing.assert_close(estimator.backward(grad, before), grad * estimator.slope(before))


@BOTH
def test_slope_is_autograd_of_surrogate(cls: type[Estimator]) -> None:
    estimator = cls()
    x = torch.randn(500, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(estimator.surrogate(x).sum(), x)
    torch.testing.assert_close(estimator.slope(x.detach()), expected)
    assert torch.equal(estimator.slope(x.detach()), estimator.slope(-x.detach()))
    assert torch.equal(estimator.surrogate(x), -estimator.surrogate(-x))


@BOTH
@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_over_its_whole_range(cls: type[Estimator], dtype: torch.dtype) -> None:
    x = every_finite_number(dtype)
    estimator = cls()
    wide, half = estimator.slope(x.float()), estimator.slope(x)
    assert half.isfinite().all()
    assert ((half.float() - wide).abs() <= torch.finfo(dtype).eps * wide.abs() + torch.finfo(dtype).tiny).all()
    special = torch.tensor([math.inf, -math.inf, torch.finfo(dtype).max, -0.0, 0.0], dtype=dtype)
    assert estimator.slope(special).isfinite().all()


@BOTH
def test_saves_x_alone_and_has_no_second_derivative(cls: type[Estimator]) -> None:
    saved: list[int] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    x = torch.randn(10, requires_grad=True)
    weight = torch.ones(10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = cls()(x)
    assert saved == [x.data_ptr()]
    (grad,) = torch.autograd.grad((y * weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@BOTH
@pytest.mark.parametrize("training", [True, False])
def test_compiled(cls: type[Estimator], training: bool) -> None:
    torch._dynamo.reset()
    estimator = cls().train(training)
    compiled = torch.compile(estimator, backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, estimator):
        torch.manual_seed(0)
        x = torch.linspace(-2, 2, 333).requires_grad_()
        y = function(x)
        (grad,) = torch.autograd.grad(y.sum(), x)
        results.append((y.detach(), grad))
    torch._dynamo.reset()
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@BOTH
def test_meta_device_and_state(cls: type[Estimator]) -> None:
    x = torch.randn(2, 3, device="meta", requires_grad=True)
    cls().to("meta")(x).sum().backward()
    assert x.grad is not None and x.grad.shape == (2, 3)
    assert cls().state_dict() == {}


@BOTH
def test_weights_of_a_layer(cls: type[Estimator]) -> None:
    layer = BinaryConv2d(3, 4, 3, weights=cls(), activations=None, standardize=False)
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    latent = layer.weight.detach()
    signs = layer.eval().binary_weight().sign
    assert torch.equal(signs, sign(torch.sin(20 * latent) if cls is BiPer else latent))


# BiPer


def test_biper_is_a_square_wave() -> None:
    half_period = math.pi / 20
    middles = torch.arange(-6, 6) * half_period + half_period / 2
    for dtype in FLOATS:
        assert BiPer()(middles.to(dtype)).tolist() == [1.0, -1.0] * 6
    assert BiPer()(torch.tensor([0.0, -0.0, math.nan])).tolist() == [1.0, 1.0, -1.0]
    assert BiPer().slope(torch.zeros(1)).item() == 20.0
    assert BiPer().slope(torch.tensor([half_period])).item() == pytest.approx(-20.0)


# StochasticSign


def test_stochastic_sign_is_sign_in_evaluation() -> None:
    x = torch.tensor([-math.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.7, math.inf, math.nan])
    assert torch.equal(StochasticSign().eval()(x), sign(x))


@pytest.mark.parametrize("dtype", FLOATS)
def test_stochastic_sign_probabilities(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    count = 100_000
    estimator = StochasticSign()
    for value in (-0.9, -0.25, 0.0, 0.5, 0.995):
        x = torch.full((count,), value, dtype=dtype)
        p = (x[0].item() + 1) / 2
        share = (estimator(x) == 1).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / count), "within five standard deviations"
    sure = torch.tensor([-math.inf, -3.0, -1.0, 1.0, 1.5, math.inf, math.nan], dtype=dtype)
    for _ in range(20):
        assert estimator(sure).tolist() == [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0]


def test_stochastic_sign_draws_anew_and_again_from_the_same_seed() -> None:
    x = torch.zeros(200)
    estimator = StochasticSign()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws += [estimator(x), estimator(x)]
    assert torch.equal(draws[0], draws[2]) and torch.equal(draws[1], draws[3])
    assert not torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[4])


def test_stochastic_sign_without_a_clip_is_the_identity_backward() -> None:
    grad = torch.randn(9)
    assert torch.equal(StochasticSign(t=math.inf).backward(grad, torch.randn(9) * 5), grad)
