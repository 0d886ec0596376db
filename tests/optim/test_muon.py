"""Muon against numpy: the iteration through the singular values, the steps written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.optim import Muon, orthogonalize

SHAPES = [(4, 4), (3, 11), (11, 3), (16, 72), (1, 9), (9, 1)]


def through_svd(matrix: np.ndarray, steps: int) -> np.ndarray:
    """What the iteration does to the singular values, which is all it does."""
    u, s, vt = np.linalg.svd(matrix, full_matrices=False)
    s = s / np.sqrt((s**2).sum())
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return (u * s) @ vt


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("steps", [1, 3, 5])
def test_iteration_acts_on_singular_values(shape: tuple[int, int], steps: int) -> None:
    matrix = random(*shape)
    expected = torch.from_numpy(through_svd(matrix.numpy(), steps))
    torch.testing.assert_close(orthogonalize(matrix, steps), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(orthogonalize(matrix.float(), steps), expected.float(), rtol=1e-4, atol=1e-5)


@given(st.lists(st.floats(0.002, 1), min_size=1, max_size=8), st.integers(0, 100))
def test_result_is_nearly_orthogonal(values: list[float], seed: int) -> None:
    s = torch.tensor(values, dtype=torch.float64)
    s /= s.norm()
    n = len(s)
    u, v = (torch.linalg.qr(random(n + 3, n, seed=seed + i))[0] for i in range(2))
    if s.min() < 0.002:  # of the norm: these need more than five steps
        return
    got = torch.linalg.svdvals(orthogonalize((u * s) @ v.T))[:n]
    assert got.min() > 0.67 and got.max() < 1.21


def test_size_of_the_matrix_does_not_matter() -> None:
    matrix = random(6, 10, dtype=torch.float32)
    expected = orthogonalize(matrix, 3)
    for factor in (2.0**-50, 0.5, 2.0**40):
        assert torch.equal(orthogonalize(matrix * factor, 3), expected)
    torch.testing.assert_close(orthogonalize(matrix * 1e-9, 3), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(orthogonalize(torch.zeros(3, 4)), torch.zeros(3, 4))
    assert orthogonalize(matrix * 1e-30).norm() < expected.norm()  # where its square underflows: small, not infinite
    assert orthogonalize(matrix.bfloat16()).dtype == torch.float32


class Numpy:
    """Muon written out in float64."""

    def __init__(self, weight: np.ndarray, **options: Any) -> None:
        self.w, self.options = weight.reshape(len(weight), -1).copy(), options
        self.b = np.zeros_like(self.w)

    def step(self, gradient: np.ndarray) -> np.ndarray:
        o = self.options
        g = gradient.reshape(len(gradient), -1)
        self.b = o["momentum"] * self.b + g
        direction = g + o["momentum"] * self.b if o["nesterov"] else self.b
        if o["normalize"] == "tensor":
            self.w = self.w * np.sqrt(len(self.w)) / np.sqrt((self.w**2).sum())
        if o["normalize"] == "filter":
            self.w = self.w / np.sqrt((self.w**2).sum(1, keepdims=True))
        self.w = self.w - o["lr"] * o["weight_decay"] * self.w - o["lr"] * through_svd(direction, o["steps"])
        return self.w


OPTIONS = [
    {"lr": 0.24, "momentum": 0.6, "nesterov": True, "steps": 3, "normalize": "tensor", "weight_decay": 0.0},
    {"lr": 0.1, "momentum": 0.9, "nesterov": False, "steps": 5, "normalize": "filter", "weight_decay": 0.1},
    {"lr": 0.02, "momentum": 0.95, "nesterov": True, "steps": 5, "normalize": None, "weight_decay": 0.01},
    {"lr": 0.3, "momentum": 0.0, "nesterov": False, "steps": 1, "normalize": None, "weight_decay": 0.0},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 9), (8, 2, 1), (6, 1, 3, 3)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps(options: dict[str, Any], shape: tuple[int, ...], layout: torch.memory_format) -> None:
    weight = nn.Parameter(random(*shape))
    if len(shape) == 4:
        weight.data = weight.data.to(memory_format=layout)
    strides = weight.stride()
    expected = Numpy(weight.detach().numpy(), **options)
    optimizer = Muon([weight], **options)
    for seed in range(1, 5):
        weight.grad = random(*shape, seed=seed) * 10.0**-seed
        w = expected.step(weight.grad.numpy())
        optimizer.step()
        torch.testing.assert_close(weight.detach(), torch.from_numpy(w).view(shape), rtol=1e-8, atol=1e-9)
    assert weight.stride() == strides


def test_defaults_are_those_of_airbench() -> None:
    (group,) = Muon([nn.Parameter(torch.ones(2, 2))]).param_groups
    found = {key: group[key] for key in OPTIONS[0]}
    assert found == OPTIONS[0]


@pytest.mark.parametrize("normalize", ["tensor", "filter"])
def test_neither_the_size_of_weights_nor_of_gradients_matters(normalize: Any) -> None:
    def trained(weight_factor: float, gradient_factor: float) -> Tensor:
        weight = nn.Parameter(random(4, 3, 3, 3) * weight_factor)
        optimizer = Muon([weight], normalize=normalize)
        for seed in range(3):
            weight.grad = random(4, 3, 3, 3, seed=seed) * gradient_factor
            optimizer.step()
        return weight.detach()

    torch.testing.assert_close(trained(1.0, 1.0), trained(37.0, 1e-6), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", ["tensor", "filter"])
def test_weights_are_normalised(normalize: Any) -> None:
    weight = nn.Parameter(random(4, 3, 3, 3, dtype=torch.float32))
    weight.data[1] = 0  # nothing to normalise
    optimizer = Muon([weight], lr=0.0, normalize=normalize)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    norms = weight.detach().flatten(1).norm(dim=1)
    assert norms[1] == 0 and weight.isfinite().all()
    if normalize == "filter":
        torch.testing.assert_close(norms, torch.tensor([1.0, 0.0, 1.0, 1.0]))
    else:
        torch.testing.assert_close(norms.norm(), torch.tensor(2.0))
    weight.data.zero_()
    optimizer.step()
    assert not weight.any()


def test_groups_and_parameters_without_gradient() -> None:
    a, b, c = (nn.Parameter(random(3, 4, seed=seed)) for seed in range(3))
    optimizer = Muon([{"params": [a], "lr": 0.5, "normalize": None}, {"params": [b, c]}], lr=0.25, normalize=None)
    before = [p.detach().clone() for p in (a, b, c)]
    a.grad = b.grad = random(3, 4, seed=7)
    loss = optimizer.step(lambda: 3.0)
    assert loss == 3.0
    torch.testing.assert_close(before[0] - a, 2 * (before[1] - b))
    assert torch.equal(c, before[2]) and c not in optimizer.state


@pytest.mark.parametrize("options", OPTIONS)
def test_resumes(resumes: Callable[..., None], options: dict[str, Any]) -> None:
    resumes(lambda parameters: Muon(parameters, **options), [(4, 3, 3, 3), (5, 7)])


def test_half_precision_weights() -> None:
    weight = nn.Parameter(random(4, 9).bfloat16())
    optimizer = Muon([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.dtype == torch.bfloat16 and weight.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -0.1}, "Muon: lr must be a finite number, at least 0, got -0.1."),
        ({"lr": float("nan")}, "Muon: lr must be a finite number, at least 0, got nan."),
        ({"momentum": 1.0}, "Muon: momentum must be a finite number, at least 0 and less than 1, got 1.0."),
        ({"momentum": 0.0}, "Muon: nesterov needs a momentum above 0."),
        ({"weight_decay": "much"}, "Muon: weight_decay must be a finite number, at least 0, got 'much'."),
        ({"steps": 0}, "Muon: steps must be a whole number from 1 to 20, got 0."),
        ({"steps": 3.0}, "Muon: steps must be a whole number from 1 to 20, got 3.0."),
        ({"normalize": "filters"}, "Muon: unknown normalize 'filters'; did you mean 'filter'?"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Muon([nn.Parameter(torch.ones(2, 2))], **options)
    assert str(caught.value) == message


def test_bad_parameters() -> None:
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    message = r"at least two dimensions, got torch.float32 of shape \(2,\); give norms and biases to another optimizer"
    with pytest.raises(ConfigError, match=message):
        Muon([weight, bias])
    optimizer = Muon([weight])
    with pytest.raises(ConfigError, match=message):
        optimizer.add_param_group({"params": [bias]})
    assert len(optimizer.param_groups) == 1
    weight.grad = torch.ones(2, 2).to_sparse()
    with pytest.raises(ConfigError, match="Muon needs dense gradients"):
        optimizer.step()
