"""Binarizers whose binary value is not always sign(x), alone and in a layer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import abste
from abste.errors import ConversionError
from abste.estimators import BiPer, StochasticSign, sign
from abste.nn import BinaryActivation, BinaryConv2d, BinaryLinear
from abste.nn.functional import Product, contract

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


# In a layer


def test_the_layer_binarises_as_the_module_does() -> None:
    """Both at the normalised input, in training and in evaluation."""
    layer = BinaryLinear(6, 5, bias=False, weights=None, activations=BiPer(omega=3.0))
    module = BinaryActivation(BiPer(omega=3.0))
    x = 4 * torch.randn(7, 6)
    for training in (True, False):
        layer.train(training), module.train(training)
        y = module(x)
        torch.testing.assert_close(layer(x), y @ layer.weight.t())
    inverse = module.inverse_rms(x)
    assert inverse is not None and torch.equal(y, sign(torch.sin(3 * (x * inverse)))) and not torch.equal(y, sign(x))


def test_bits_that_were_drawn_serve_the_backward() -> None:
    x, weight = torch.randn(7, 6), sign(torch.randn(5, 6)).requires_grad_()
    binarizer = StochasticSign()
    torch.manual_seed(3)
    y = contract(x, weight, Product(), binarizer=binarizer)
    torch.manual_seed(3)
    bits = binarizer(x)
    assert torch.equal(y, bits @ weight.t()) and not torch.equal(bits, sign(x))
    grad = torch.randn_like(y)
    binarizer.eval()  # not even what happens in between matters
    y.backward(grad)
    torch.testing.assert_close(weight.grad, grad.t() @ bits)


@pytest.mark.parametrize("estimator", ["biper", "stochastic_sign"])
def test_compiled_layer(estimator: str) -> None:
    torch._dynamo.reset()
    layer = BinaryLinear(6, 5, weights=estimator, activations=estimator)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = 3 * torch.randn(7, 6)
    for _ in range(3):
        results = []
        for model in (layer, compiled):
            torch.manual_seed(0)
            y = model(x)
            y.square().sum().backward()
            results.append(y.detach())
        torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(twin.weight.grad, layer.weight.grad)
    torch._dynamo.reset()


@pytest.mark.parametrize("cls", [BiPer, StochasticSign])
def test_weights_are_baked(cls: type[BiPer] | type[StochasticSign]) -> None:
    layer = BinaryConv2d(3, 4, 3, weights=cls(), standardize=False)
    layer(torch.randn(2, 3, 8, 8)).sum().backward()
    assert layer.weight.grad is not None and layer.weight.grad.isfinite().all()
    latent = layer.weight.detach()
    signs = layer.eval().binary_weight().sign
    assert torch.equal(signs, sign(torch.sin(20 * latent) if cls is BiPer else latent))


@pytest.mark.parametrize("weights", ["biper", "stochastic_sign"])
def test_what_can_be_packed(weights: str) -> None:
    """Any weights, and the activations of stochastic_sign, which is sign in evaluation; not those of biper."""

    def packed(activations: str) -> abste.deploy.Graph:
        model = nn.Sequential(BinaryLinear(8, 4, weights=weights, activations=activations))
        model(torch.randn(5, 8))
        return abste.deploy.lower(model.eval(), torch.randn(1, 8))

    assert packed("stochastic_sign")
    with pytest.raises(ConversionError, match=r"^0: BiPer is not plain sign\(x\) at inference"):
        packed("biper")


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
