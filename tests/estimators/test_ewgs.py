"""EWGS, whose backward is not linear in the gradient; it is not in the registry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from abste.estimators import EWGS, STE, Estimator, Role, available, resolve, sign
from abste.nn import BinaryLinear

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def test_declarations() -> None:
    assert EWGS.name == "ewgs" and EWGS.name not in available()
    assert not issubclass(EWGS, Estimator) and not EWGS.has_surrogate
    assert not EWGS.linear and not EWGS.odd and EWGS.monotone and EWGS.plain_bits


@pytest.mark.parametrize(("role", "t"), [("weights", 3.0), ("activations", 1.5)])
def test_as_the_authors_compute_it(role: Role, t: float) -> None:
    """Through [0, 1]: normalise, clamp, round, and scale the gradient of the rounding; all else by autograd."""

    class Round(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x - x.round())
            return x.round()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            (difference,) = ctx.saved_tensors
            return grad * (1 + 0.3 * grad.sign() * difference)

    x = torch.randn(400, dtype=torch.float64) * 2
    grad = torch.randn_like(x)
    x.requires_grad_()
    binary = 2 * (Round.apply(((x + t) / (2 * t)).clamp(0, 1)) - 0.5)
    binarizer = resolve(EWGS(delta=0.3), role)
    assert binarizer is not None and binarizer.t == t
    y = binarizer(x)
    assert torch.equal(y, binary)
    # Their two factors, 2 and 1 / (2 t), belong to the interval: they are 1 / t together, and 1 for us.
    wanted, found = torch.autograd.grad(binary, x, grad)[0] * t, torch.autograd.grad(y, x, grad)[0]
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("dtype", FLOATS)
def test_without_delta_it_is_ste(dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(400) * 3, torch.tensor([0.0, -0.0, 3.0, -3.0, math.inf, -math.inf])]).to(dtype)
    grad = torch.randn_like(x)
    assert torch.equal(EWGS(delta=0).backward(grad, x), STE(t=3).backward(grad, x))


def test_which_way_it_scales() -> None:
    x, down, up = torch.tensor([0.2, -0.2]), torch.ones(2), -torch.ones(2)
    scale_down = EWGS(delta=1).backward(down, x) / down  # a step along -1
    scale_up = EWGS(delta=1).backward(up, x) / up
    assert scale_down[0] < 1 < scale_down[1], "towards zero it is smaller"
    assert scale_up[0] > 1 > scale_up[1], "towards the binary value it is larger"
    torch.testing.assert_close(scale_down + scale_up, torch.full((2,), 2.0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_no_gradient_changes_its_sign_or_overflows(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.tensor([-3.0, -1e-3, -0.0, 0.0, 1e-3, 3.0, largest, -largest, math.inf, -math.inf], dtype=dtype)
    for delta in (0.001, 2.0):
        for g in (-1.0, 1.0):
            y = EWGS(delta=delta).backward(torch.full_like(x, g), x)
            assert y.dtype == dtype and y.isfinite().all()
            assert (y * g >= 0).all() and (y[6:] == 0).all()


def test_in_a_layer() -> None:
    layer = BinaryLinear(6, 5, weights=EWGS(), activations=EWGS())
    x = torch.randn(3, 6, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None and layer.weight.grad is not None
    assert torch.equal(layer.binary_weight().sign, sign(layer.weight - layer.weight.mean(1, keepdim=True)))
