from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from abste.estimators import sign

HALF = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64, *HALF]


@pytest.mark.parametrize("dtype", FLOATS)
def test_special_values(dtype: torch.dtype) -> None:
    tiny, smallest, largest = torch.finfo(dtype).tiny, torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    subnormal = tiny * torch.finfo(dtype).eps
    positive = [0.0, -0.0, subnormal, smallest, 1.0, largest, math.inf]
    negative = [-subnormal, -smallest, -1.0, -largest, -math.inf, math.nan, -math.nan]
    x = torch.tensor(positive + negative, dtype=dtype)
    assert x[2] > 0 > x[len(positive)], "subnormal numbers were flushed to zero"
    assert sign(x).tolist() == [1.0] * len(positive) + [-1.0] * len(negative)
    assert sign(x).dtype == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_every_number_of_half_precision(dtype: torch.dtype) -> None:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    expected = [1.0 if value >= 0 else -1.0 for value in x.double().tolist()]
    assert sign(x).tolist() == expected


@given(st.lists(st.floats(width=32), max_size=70))  # past the width of a vector register, so the remainder is met too
def test_float32(values: list[float]) -> None:
    assert sign(torch.tensor(values)).tolist() == [1.0 if value >= 0 else -1.0 for value in values]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 3),
        lambda x: x[:, ::2, 1:, ::3],
        lambda x: x[:1].expand(3, -1, -1, -1),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.flatten()[7],
        lambda x: x[:0],
    ],
    ids=["transposed", "sliced", "expanded", "channels_last", "0-d", "empty"],
)
def test_layouts(dtype: torch.dtype, layout: object) -> None:
    x = layout(torch.randn(3, 6, 5, 7).to(dtype))  # type: ignore[operator]
    y = sign(x)
    assert y.shape == x.shape
    assert y.tolist() == torch.where(x >= 0, 1.0, -1.0).tolist()
    if x.is_contiguous(memory_format=torch.channels_last) and x.dim() == 4:
        assert y.is_contiguous(memory_format=torch.channels_last)


def test_result_of_another_dtype_is_new_and_without_gradient() -> None:
    x = torch.tensor([-2.0, 3.0], requires_grad=True)
    y = sign(x, torch.bfloat16)
    assert y.dtype == torch.bfloat16 and not y.requires_grad
    assert y.tolist() == [-1.0, 1.0] and x.tolist() == [-2.0, 3.0]


def test_meta() -> None:
    assert sign(torch.empty(2, 3, device="meta")).shape == (2, 3)
