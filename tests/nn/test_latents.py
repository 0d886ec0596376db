"""What happens to latents before their binarizer: ReCU held against its formula, and modules of one's own."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import abste
from abste.errors import ConfigError
from abste.estimators import EstimatorSchedule
from abste.nn import BinaryConv2d, BinaryLinear, ReCU, Standardize, standardize


def tau_of(p: float, low: float = 0.85, high: float = 0.99) -> float:
    """A e^p + B with A = (high - low) / (e - 1) and B = low - A, as the authors write it."""
    a = (high - low) / (math.e - 1)
    return a * math.exp(p) + low - a


def recu(w: Tensor, tau: float, rms: float) -> Tensor:
    """Written out with NumPy's constants: each filter standardised, then clamped; the clamp passes no gradient."""
    flat = w.flatten(1)
    centred = flat - flat.mean(1, keepdim=True)
    w1 = (rms * centred / (centred.pow(2).mean(1, keepdim=True) + 1e-10).sqrt()).view_as(w)
    q = -float(np.abs(w1.detach().numpy()).mean()) * math.log(2 - 2 * tau)
    inside = (w1 >= -q) & (w1 <= q)
    return torch.where(inside, w1, (q * w1.sign()).detach())


@pytest.mark.parametrize("rms", [1.0, 2 * math.sqrt(2)])
@pytest.mark.parametrize("percent", [0, 40, 100])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 30)])
def test_recu_is_its_formula(shape: tuple[int, ...], percent: int, rms: float) -> None:
    module = ReCU(rms=rms)
    module.set_progress(percent, 100)
    assert float(module.tau()) == pytest.approx(tau_of(percent / 100), rel=1e-6)
    w = (0.03 * torch.randn(shape, dtype=torch.float64) + 0.01).requires_grad_()
    twin = w.detach().clone().requires_grad_()
    found, wanted = module(w), recu(twin, tau_of(percent / 100), rms)
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)  # tau is float32
    upstream = torch.randn(shape, dtype=torch.float64)
    found.backward(upstream)
    wanted.backward(upstream)
    torch.testing.assert_close(w.grad, twin.grad, rtol=1e-6, atol=1e-7)
    assert (found.detach().abs() < float(found.detach().abs().max()) * (1 - 1e-9)).any()
    if percent < 100:  # something is clamped
        assert int((found.detach().abs() >= found.detach().abs().max() * (1 - 1e-12)).sum()) > 3


@pytest.mark.parametrize("estimator", ["identity_ste", "ste", "ab_tanh", "reste"])
def test_recu_goes_with_any_estimator(estimator: str) -> None:
    layer = BinaryConv2d(4, 6, 3, weights=estimator, standardize="recu", scale=None, bias=False, dtype=torch.float64)
    assert isinstance(layer.standardize, ReCU)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    upstream = torch.randn(2, 6, 3, 3, dtype=torch.float64)
    layer(x).backward(upstream)
    latent = layer.weight.detach().clone().requires_grad_()
    clamped = recu(latent, 0.85, 1.0)
    assert layer.weight_binarizer is not None
    signs = layer.weight_binarizer(clamped)
    nn.functional.conv2d(x, signs).backward(upstream)
    torch.testing.assert_close(layer.weight.grad, latent.grad, rtol=1e-5, atol=1e-7)
    assert torch.equal(layer.binary_weight().sign, torch.where(standardize(layer.weight) >= 0, 1.0, -1.0).double())


def test_recu_moves_with_the_schedule_and_is_saved() -> None:
    def network() -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 2))
        abste.convert(model, standardize={"name": "recu", "tau_end": 0.95}, example_input=torch.zeros(2, 4))
        return model

    model = network()
    layer: Any = model[2]  # type: ignore[index]
    schedule = EstimatorSchedule(model, 10)
    for _ in range(4):
        schedule.step()
    assert float(layer.standardize.tau()) == pytest.approx(tau_of(0.4, high=0.95), rel=1e-6)
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other: Any = network()
    other.load_state_dict(torch.load(stream, weights_only=True))
    assert torch.equal(other[2].standardize.tau(), layer.standardize.tau())
    before = layer.standardize.tau()
    assert torch.equal(model.half()[2].standardize.tau(), before)  # type: ignore[index]
    assert layer(torch.randn(3, 8).half()).isfinite().all()


def test_every_layer_has_its_own_module() -> None:
    class Halve(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.tensor(0.5))

        def forward(self, weight: Tensor) -> Tensor:
            return weight * self.factor

    given = nn.Sequential(Standardize(), Halve())
    layers = [BinaryLinear(5, 4, weights="ste", standardize=given) for _ in range(2)]
    for layer in layers:
        assert layer.standardize is not given
        layer(torch.randn(3, 5)).sum().backward()
        assert isinstance(layer.standardize, nn.Sequential)
        assert layer.standardize[1].factor.grad is not None
        assert torch.equal(layer.binary_weight().sign, torch.where(standardize(layer.weight) >= 0, 1.0, -1.0))
    assert given[1].factor.grad is None


def test_names_that_mean_the_default() -> None:
    assert BinaryLinear(3, 2).standardize is True
    plain, named = BinaryLinear(9, 4), BinaryLinear(9, 4, standardize="standardize")
    named.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9)
    assert torch.equal(plain(x), named(x))
    assert set(plain.state_dict()) == set(named.state_dict())


def test_only_raw_latents_are_clamped() -> None:
    layer = BinaryLinear(3, 2, weights="ste", standardize=nn.Identity())
    layer.weight.data.fill_(9.0)
    layer(torch.randn(1, 3))
    assert layer.weight.max() == 9.0


class Flatten(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.flatten()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BinaryLinear(3, 2, standardize="reku"), r"latent weights 'reku' \(standardize\); did you mean 'recu'"),
        (lambda: BinaryLinear(3, 2, standardize={"name": "recu", "tau": 0.9}), "takes no argument 'tau'; did you mean"),
        (lambda: BinaryLinear(3, 2, standardize={"name": "standardize", "a": 1}), "no argument 'a'; it has none"),
        (lambda: BinaryLinear(3, 2, standardize={"tau_end": 0.9}), "needs a name"),
        (lambda: BinaryLinear(3, 2, standardize=None), "a name, a table or a torch.nn.Module object, got None"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 2, standardize=ReCU), "got the class ReCU"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 2, standardize=1), "got 1"),
        (lambda: BinaryLinear(3, 2, standardize={}), "needs a name"),
        (lambda: BinaryLinear(3, 2, standardize=Flatten())(torch.zeros(1, 3)), r"Flatten .* \(2, 3\) into \(6,\)"),
        (lambda: ReCU(tau_start=0.5), "0.5 < tau_start <= tau_end < 1, got 0.5 and 0.99"),
        (lambda: ReCU(tau_end=1), "tau_end < 1"),
        (lambda: ReCU(0.9, 0.8), "tau_start <= tau_end"),
        (lambda: ReCU(rms=0), "rms must be positive"),
        (lambda: ReCU(rms="one"), "rms must be a number"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
