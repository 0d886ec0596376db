"""EWGS, whose backward is not linear in the gradient."""

from __future__ import annotations

import math

import pytest
import torch

from abste.estimators import EWGS, STE

FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


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
