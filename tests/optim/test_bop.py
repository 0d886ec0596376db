"""Bop against the algorithm of the paper, written out in numpy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import abste
from abste.errors import ConfigError
from abste.nn import parameter_groups
from abste.optim import Bop, Combined


@given(st.floats(1e-4, 0.9), st.floats(0, 1), st.integers(0, 1000))
def test_flips_are_those_of_the_paper(gamma: float, threshold: float, seed: int) -> None:
    generator = np.random.default_rng(seed)
    w = np.where(generator.random(50) < 0.5, 1.0, -1.0)
    m = np.zeros(50)
    weight = nn.Parameter(torch.from_numpy(w.copy()))
    optimizer = Bop([weight], gamma=gamma, threshold=threshold * gamma)
    flips = 0
    for _ in range(8):
        g = generator.normal(size=50)
        m = (1 - gamma) * m + gamma * g
        unsure = np.abs(np.abs(m) - threshold * gamma) < 1e-12  # decided by rounding
        weight.grad = torch.from_numpy(g)
        optimizer.step()
        if unsure.any():
            return
        flip = (np.abs(m) > threshold * gamma) & (np.sign(m) == np.sign(w))
        w, flips = np.where(flip, -w, w), flips + flip.sum()
        assert np.array_equal(weight.detach().numpy(), w)
    assert flips > 0 or threshold > 0.1


def test_hysteresis() -> None:
    # A weight that has flipped stays until the average has crossed zero and the threshold on the other side.
    weight = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Bop([weight], gamma=0.5, threshold=0.25)

    def after(gradient: float) -> float:
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        return weight.item()

    assert after(0.5) == 1  # m = 0.25: not above the threshold
    assert after(0.375) == -1  # m = 0.3125
    assert after(1.0) == -1  # m has the other sign than the weight: it agrees with what was done
    assert after(-0.65625) == -1  # m = 0
    assert after(-0.5) == -1  # m = -0.25
    assert after(-0.5) == 1  # m = -0.375
    assert after(-5.0) == 1


def test_weights_become_signs_and_stay_so() -> None:
    weight = nn.Parameter(torch.tensor([[0.3, -0.1, 0.0, -0.0], [5.0, -7.0, 1e-30, -1.0]]))
    optimizer = Bop([weight], gamma=0.5, threshold=0.0)
    assert weight.tolist() == [[1, -1, 1, 1], [1, -1, 1, -1]]
    for seed in range(5):
        weight.grad = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.step()
        assert set(weight.detach().abs().flatten().tolist()) == {1.0}


def test_zero_average_and_zero_gamma_flip_nothing() -> None:
    weight = nn.Parameter(torch.ones(6))
    optimizer = Bop([weight], gamma=0.5, threshold=0.0)
    weight.grad = torch.zeros(6)
    optimizer.step()
    assert torch.equal(weight, torch.ones(6))
    weight.grad = torch.tensor([1.0, -1.0, 2.0, -2.0, 3.0, -3.0])
    optimizer.step()
    flipped = weight.detach().clone()
    assert flipped.tolist() == [-1, 1, -1, 1, -1, 1]
    optimizer.param_groups[0]["lr"] = 0.0  # as a schedule may end
    weight.grad = -100 * weight.grad
    optimizer.step()
    assert torch.equal(weight, flipped)


def test_schedulers_move_gamma() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = Bop([{"params": [weight], "gamma": 0.5, "threshold": 0.1}, {"params": [nn.Parameter(torch.ones(2))]}])
    assert [(g["lr"], g["threshold"]) for g in optimizer.param_groups] == [(0.5, 0.1), (1e-4, 1e-8)]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1)
    weight.grad = torch.ones(3)
    optimizer.step()
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


@pytest.mark.parametrize("gamma", [1e-4, 0.5])
def test_resumes(resumes: Callable[..., None], gamma: float) -> None:
    resumes(lambda parameters: Bop(parameters, gamma=gamma), [(4, 3, 3, 3), (5, 7)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1e-4}, "Bop: gamma must be a finite number, at least 0 and less than 1, got -0.0001."),
        ({"gamma": 1}, "Bop: gamma must be a finite number, at least 0 and less than 1, got 1."),
        ({"threshold": float("inf")}, "Bop: threshold must be a finite number, at least 0, got inf."),
        ({"threshold": None}, "Bop: threshold must be a finite number, at least 0, got None."),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    weight = nn.Parameter(torch.full((2, 2), 0.5))
    with pytest.raises(ConfigError) as caught:
        Bop([weight], **options)
    assert str(caught.value) == message
    assert torch.equal(weight, torch.full((2, 2), 0.5))


def test_bad_groups() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ConfigError, match="Bop has no learning rate: leave 'lr' out of its groups, and give gamma"):
        Bop([{"params": [weight], "lr": 0.1}])
    with pytest.raises(ConfigError, match=r"Bop needs weights in float32 or float64, got torch\.bfloat16"):
        Bop([nn.Parameter(torch.ones(2, 2).bfloat16())])


# ---- with binary layers


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, bias=False), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)
    )
    abste.convert(model, example_input=torch.zeros(2, 1, 8, 8), **options)
    return model


@pytest.mark.parametrize("scale", [None, "learned"])
def test_gradient_and_output_of_a_layer(scale: Any) -> None:
    model = network(weights="identity_ste", standardize=False, scale=scale)
    latents, *rest = parameter_groups(model, 0.01, flips=True)
    (weight,) = latents["params"]
    assert weight is model[2].weight
    optimizer = Combined(Bop([latents], gamma=0.9, threshold=0.0), torch.optim.Adam(rest))
    x = torch.randn(4, 1, 8, 8)
    before = weight.detach().clone()
    assert torch.equal(before, model[2].binary_weight().sign)
    model(x).square().sum().backward()

    plain = before.clone().requires_grad_()
    y = nn.functional.conv2d(model[1](model[0](x)), plain)
    if scale == "learned":
        y = y * model[2].learned_scale.view(-1, 1, 1)
    model[4](model[3](y)).square().sum().backward()
    torch.testing.assert_close(weight.grad, plain.grad, rtol=1e-4, atol=1e-4)

    optimizer.step()
    assert torch.equal(weight, torch.where(before == weight.grad.sign(), -before, before))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "layer '2' standardises its weights, which must stay ±1; convert with standardize = false."),
        (
            {"standardize": False},
            "layer '2' takes its scale 'channel' from its weights, but they are ±1; use 'none' or 'learned'.",
        ),
        ({"standardize": "recu", "scale": None}, "layer '2' standardises its weights, which must stay ±1"),
        ({"standardize": False, "scale": "std"}, "layer '2' takes its scale 'std' from its weights"),
        ({"standardize": False, "scale": None, "center": "mean"}, "layer '2' takes its center from its weights"),
        (
            {"standardize": False, "scale": None, "weights": "ab_tanh"},
            "layer '2' has the estimator 'ab_tanh' on weights of ±1, where its slope is a constant; use 'identity_",
        ),
        ({"weights": None, "activations": "ste"}, "the model has no trainable binary weight that could flip"),
    ],
)
def test_layers_that_do_not_take_weights_as_they_are(options: dict[str, Any], message: str) -> None:
    model = network(**{"weights": "identity_ste", **options})
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(ConfigError) as caught:
        parameter_groups(model, 0.01, flips=True)
    assert message in str(caught.value)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_averages_of_flipping_weights_are_votes() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 1.0, -1.0]))
    layer = nn.ParameterList([weight])
    averaged = torch.optim.swa_utils.AveragedModel(layer)
    optimizer = Bop([weight], gamma=0.9, threshold=0.0)
    for gradient in ([1.0, -1.0, 1.0], [1.0, 9.0, 1.0], [-9.0, 9.0, -9.0]):
        weight.grad = torch.tensor(gradient)
        optimizer.step()
        averaged.update_parameters(layer)
    votes: Tensor = averaged.module[0]
    assert votes.abs().max() <= 1 and votes.sign().tolist() == [-1, -1, -1]
