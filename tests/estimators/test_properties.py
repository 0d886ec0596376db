"""What every registered estimator must hold to, read from what it declares."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abste import estimators
from abste.errors import ConfigError
from abste.estimators import STE, AdaptiveBlend, Binarizer, Constant, Estimator, clip_gradient, sign
from abste.estimators.base import tanh_backward

Make = Callable[..., Binarizer]

HALF = [torch.float16, torch.bfloat16]
FLOATS = [torch.float32, torch.float64, *HALF]
MOMENTS = [0, 50, 100]  # per cent of training
ROLES: list[estimators.Role] = ["weights", "activations"]
BLENDED = [cls for cls in map(estimators.get, estimators.available()) if issubclass(cls, AdaptiveBlend)]

inputs = st.lists(
    st.one_of(st.floats(-8, 8), st.sampled_from([0.0, -0.0, 1.0, -1.0, 1.5, -1.5, 3.0, -3.0])), max_size=40
)
moments = st.integers(0, 100)


def slope(binarizer: Binarizer, x: Tensor) -> Tensor:
    return binarizer.backward(torch.ones_like(x), x)


def every_finite_number(dtype: torch.dtype) -> Tensor:
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return x[x.isfinite()]


def cases(make: Make, name: str) -> Iterator[Binarizer]:
    for role in ROLES:
        for step in MOMENTS:
            yield make(name, step, role)


# What is declared


def test_declarations(name: str, make: Make) -> None:
    binarizer = make(name)
    assert binarizer.name in name
    assert binarizer.has_surrogate == isinstance(binarizer, Estimator)
    assert binarizer.t > 0
    assert binarizer.roles and all(set(values) == set(binarizer.roles) for values in binarizer.defaults.values())
    text = type(binarizer).__doc__ or ""
    for pattern in (r"F\(x\) = ", r"F'\(x\) = ", r"[Ss]chedule", r"[Cc]lip", r"[Aa]ppl(y|ied)", r"Source: "):
        assert re.search(pattern, text), f"the docstring of {name} lacks {pattern!r}"
    assert all(f"{argument}:" in text for argument in binarizer.defaults)


@given(values=inputs, step=moments)
def test_odd_and_monotone(name: str, make: Make, values: list[float], step: int) -> None:
    x = torch.tensor(values)
    for role in ROLES:
        binarizer = make(name, step, role)
        if binarizer.odd:
            assert torch.equal(slope(binarizer, x), slope(binarizer, -x))
            if isinstance(binarizer, Estimator):
                assert torch.equal(binarizer.surrogate(x), -binarizer.surrogate(-x))
        if binarizer.monotone:
            assert (slope(binarizer, x) >= 0).all()


def test_roles(spec: estimators.Spec, make: Make, name: str) -> None:
    binarizer = make(name)
    for role in ROLES:
        if role in binarizer.roles:
            assert estimators.resolve(spec, role) is not None
            continue
        with pytest.raises(ConfigError, match=rf"^\w+ is for {binarizer.roles[0]}, and cannot binarise {role}\.$"):
            estimators.resolve(spec, role)


@pytest.mark.parametrize("dtype", [None, *FLOATS])
def test_binary_value(name: str, make: Make, dtype: torch.dtype | None) -> None:
    x = torch.tensor([-math.inf, -2.0, -1e-40, -0.0, 0.0, 1e-40, 0.7, math.inf, math.nan, *torch.randn(600).tolist()])
    for binarizer in cases(make, name):
        for training in (True, False):
            drawn = binarizer.stochastic and training
            torch.manual_seed(0)
            y = binarizer.train(training).binarize(x, dtype)
            assert y.dtype == (dtype or x.dtype) and set(y.tolist()) <= {1.0, -1.0}
            torch.manual_seed(0)
            assert torch.equal(binarizer(x), y.to(x.dtype))
            assert torch.equal(binarizer.binarize(x, dtype), y) != drawn, "drawn anew, or always the same"
            if binarizer.plain_bits and not drawn:
                assert torch.equal(y, sign(x, dtype))
        assert binarizer.is_sign == (binarizer.plain_bits and not binarizer.stochastic)


# The slope is the derivative of the surrogate


@settings(max_examples=60)
@given(values=inputs, step=moments)
def test_slope_is_autograd_of_surrogate(name: str, make: Make, values: list[float], step: int) -> None:
    for role in ROLES:
        estimator = make(name, step, role)
        if not isinstance(estimator, Estimator):
            return
        kinks = [estimator.t, *(getattr(estimator, argument) for argument in estimator.defaults)]
        x = torch.tensor([v for v in values if all(abs(abs(v) - kink) > 1e-6 for kink in kinks)], dtype=torch.float64)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(estimator.surrogate(x).sum(), x)
        # The blend and the exponents are float32.
        torch.testing.assert_close(estimator.slope(x.detach()), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", FLOATS)
def test_slope_and_surrogate_keep_shape_and_dtype(name: str, make: Make, dtype: torch.dtype) -> None:
    estimator = make(name, 50)
    x = torch.randn(3, 4).to(dtype)
    results = [slope(estimator, x)] + ([estimator.surrogate(x)] if isinstance(estimator, Estimator) else [])
    assert all(y.shape == x.shape and y.dtype == dtype for y in results)


def test_backward_is_linear_in_the_gradient_or_else_scales_with_it(name: str, make: Make) -> None:
    x, grad = torch.randn(2, 500)
    for binarizer in cases(make, name):
        found = binarizer.backward(grad, x)
        if binarizer.linear:
            torch.testing.assert_close(found, grad * slope(binarizer, x), rtol=1e-5, atol=1e-7)
        else:
            assert not torch.allclose(found, grad * slope(binarizer, x), rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(binarizer.backward(3 * grad, x), 3 * found, rtol=1e-5, atol=1e-7)


# The clip


@pytest.mark.parametrize("dtype", FLOATS)
def test_zero_beyond_the_clip_and_not_at_it(name: str, make: Make, dtype: torch.dtype) -> None:
    for binarizer in cases(make, name):
        if math.isinf(binarizer.t):
            continue
        edge = torch.tensor([binarizer.t, -binarizer.t], dtype=dtype)
        beyond = torch.nextafter(edge.float(), edge.float() * 2) if dtype == torch.float32 else edge * (1 + 2**-7)
        if dtype == torch.float64:
            beyond = torch.nextafter(edge, edge * 2)
        within = edge * (1 - 2**-7)
        assert slope(binarizer, beyond).tolist() == [0.0, 0.0]
        assert slope(binarizer, torch.tensor([9.0, -1e4, math.inf, -math.inf], dtype=dtype)).tolist() == [0.0] * 4
        # Inside is what F' tends to: for ApproxSign that is 0 as well.
        torch.testing.assert_close(slope(binarizer, edge), slope(binarizer, within), rtol=0.05, atol=0.02)
        if isinstance(binarizer, Estimator):
            x = torch.tensor([binarizer.t, binarizer.t * 2, 1e4], dtype=dtype)
            assert binarizer.surrogate(x).unique().numel() == 1


@given(t=st.floats(1e-30, 1e30))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clip_gradient_at_any_t(dtype: torch.dtype, t: float) -> None:
    edge = torch.tensor([t, -t], dtype=dtype)
    beyond = torch.nextafter(edge, edge * 2)
    assert clip_gradient(torch.ones(2, dtype=dtype), edge, t).tolist() == [1.0, 1.0]
    assert clip_gradient(torch.ones(2, dtype=dtype), beyond, t).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("t", [math.inf, 1e39])
def test_no_clip(t: float) -> None:
    grad = torch.randn(4)
    assert clip_gradient(grad, torch.tensor([0.0, 1e38, -math.inf, 3.0]), t) is grad


# AB-STE


@pytest.mark.parametrize("cls", BLENDED)
@pytest.mark.parametrize("t", [1.0, 1.5, 3.0, math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_ab_ste_without_blend_is_ste(cls: type[AdaptiveBlend], t: float, dtype: torch.dtype) -> None:
    x = torch.cat([torch.randn(2000) * 2, torch.tensor([0.0, -0.0, 1e-30, t, -t, 50.0])]).to(dtype)
    grad = torch.randn_like(x)
    expected = STE(t=t).backward(grad, x)
    for blend in ("progress", Constant(0.0)):  # a progress starts at 0
        for normalized in (True, False):
            assert torch.equal(cls(t=t, blend=blend, normalized=normalized).backward(grad, x), expected)
    x = x[x.isfinite()]
    assert torch.equal(cls(t=t).surrogate(x), STE(t=t).surrogate(x))


@pytest.mark.parametrize("cls", BLENDED)
@given(k=st.floats(1e-3, 1e3), a=st.floats(0, 1), values=st.lists(st.floats(-5, 5), min_size=1, max_size=30))
def test_ab_ste_normalized(cls: type[AdaptiveBlend], k: float, a: float, values: list[float]) -> None:
    estimator = cls(k=k, t=2.0, blend=Constant(a))
    one = torch.tensor([1.0, -1.0], dtype=torch.float64)
    for function in (estimator.phi, estimator.surrogate):
        torch.testing.assert_close(function(one), one, rtol=1e-12, atol=0)
    x = torch.tensor(values, dtype=torch.float64)
    distance = (estimator.surrogate(x) - sign(x)).abs()
    assert (distance <= (x - sign(x)).abs() + 1e-12).all(), "F is further from sign than x is"
    inside = x[x.abs() <= 2.0]
    assert (estimator.slope(inside) >= (1 - a) * (1 - 1e-6)).all(), "the line is the floor of the slope"


@pytest.mark.parametrize("cls", BLENDED)
@given(k=st.floats(1e-3, 1e3), x=st.floats(-1e3, 1e3))
def test_ab_ste_not_normalized_saturates_at_one(cls: type[AdaptiveBlend], k: float, x: float) -> None:
    estimator = cls(k=k, t=math.inf, blend=Constant(1.0), normalized=False)
    y = estimator.surrogate(torch.tensor([x, 1e12, -1e12], dtype=torch.float64))
    assert abs(y[0]) <= 1
    torch.testing.assert_close(y[1:], torch.tensor([1.0, -1.0], dtype=torch.float64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("cls", BLENDED)
def test_ab_ste_blend_rises(cls: type[AdaptiveBlend], make: Make) -> None:
    errors, weights = [], []
    x = torch.linspace(-1, 1, 201)
    for step in range(0, 101, 10):
        estimator = make(cls.name, step)
        assert isinstance(estimator, AdaptiveBlend)
        errors.append((estimator.surrogate(x) - sign(x)).square().mean().item())
        weights.append(float(estimator.blend.weight(x)))
    assert errors == sorted(errors, reverse=True), "the estimating error falls as the blend rises"
    assert weights == sorted(weights) and weights[0] == 0.0 and weights[-1] == pytest.approx(0.9)


# Half precision


@pytest.mark.parametrize("dtype", HALF)
def test_half_precision_over_its_whole_range(name: str, make: Make, dtype: torch.dtype) -> None:
    # Against float32 at the same x: four roundings, of at most one unit each. Where the slope decays as exp(-z), those
    # of z = 2 s |x| and of s itself count z times. What lies under the smallest normal number may be flushed to zero.
    x = every_finite_number(dtype)
    unit = torch.finfo(dtype).eps / 2
    for binarizer in cases(make, name):
        wide, half = slope(binarizer, x.float()), slope(binarizer, x)
        assert half.isfinite().all()
        assert half.dtype == dtype
        size = wide.abs()
        exponent = (size.clamp(min=1e-30) / size.max()).log().abs()
        tolerance = unit * (4 + 2 * exponent) * size + 4 * torch.finfo(dtype).smallest_normal
        assert ((half.float() - wide).abs() <= tolerance).all()


def test_tanh_backward_in_float16_rounds_nothing_but_its_result() -> None:
    x = torch.linspace(0.5, 1.2, 50).half()
    grad = torch.full_like(x, 1e-3)
    wide = tanh_backward(grad.double(), x.double(), 3.0, 50.0)
    found = tanh_backward(grad, x, 3.0, 50.0)
    assert found.dtype == torch.float16
    torch.testing.assert_close(found.double(), wide, rtol=torch.finfo(torch.float16).eps, atol=0)


@pytest.mark.parametrize("dtype", FLOATS)
def test_saturated_and_tiny_inputs(name: str, make: Make, dtype: torch.dtype) -> None:
    info = torch.finfo(dtype)
    tiny = torch.tensor([info.tiny, -info.tiny, info.tiny * info.eps, 0.0, -0.0], dtype=dtype)
    huge = torch.tensor([info.max, -info.max, math.inf, -math.inf], dtype=dtype)
    for binarizer in cases(make, name):
        near = slope(binarizer, tiny)
        assert near.isfinite().all()
        if binarizer.odd:  # else the slope may jump at 0
            torch.testing.assert_close(near, near[-1].expand_as(near), rtol=2 * info.eps, atol=0)
        far = slope(binarizer, huge)
        assert far.isfinite().all()
        if not math.isinf(binarizer.t):
            assert (far == 0).all()


# As a function of autograd


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("autocast", [False, True])
def test_gradient_has_the_dtype_of_the_input(name: str, make: Make, dtype: torch.dtype, autocast: bool) -> None:
    binarizer = make(name, 50)
    x = torch.randn(6).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = binarizer(x)
        assert y.dtype == dtype
        y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, slope(binarizer, x.detach()))


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (2, 3, 4)])
def test_shapes(name: str, make: Make, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    y = make(name, 50)(x)
    y.sum().backward()
    assert x.grad is not None
    assert y.shape == x.shape == x.grad.shape


@pytest.mark.parametrize(
    "layout",
    [lambda x: x.transpose(0, 2), lambda x: x[:, :, ::2], lambda x: x.contiguous(memory_format=torch.channels_last)],
    ids=["transposed", "sliced", "channels_last"],
)
def test_layouts(name: str, make: Make, layout: Callable[[Tensor], Tensor]) -> None:
    binarizer = make(name, 50)
    x = layout(torch.randn(2, 4, 6, 8))
    grad = torch.randn_like(x.contiguous())
    # Not bit for bit: the order of a sum over x, where there is one, follows the layout.
    torch.testing.assert_close(binarizer.backward(grad, x), binarizer.backward(grad, x.contiguous()))
    found = binarizer.backward(layout(grad).expand(layout(grad).shape), layout(x))
    torch.testing.assert_close(found, binarizer.backward(layout(grad).contiguous(), layout(x).contiguous()))


@pytest.mark.parametrize("t", [None, math.inf])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_is_changed_in_place(name: str, make: Make, dtype: torch.dtype, t: float | None) -> None:
    binarizer = make(name, 50)
    if t is not None and "t" in binarizer.defaults:
        binarizer.t = t
    x = torch.randn(40).to(dtype).requires_grad_()
    grad = torch.randn(40).to(dtype)
    before, before_grad = x.detach().clone(), grad.clone()
    y = binarizer(x)
    (result,) = torch.autograd.grad(y, x, grad)
    assert torch.equal(x.detach(), before) and torch.equal(grad, before_grad)
    assert x._version == 0 and grad._version == 0
    assert result.data_ptr() != x.data_ptr()


def test_backward_saves_x_alone(name: str, make: Make) -> None:
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    x = torch.randn(10, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = make(name, 50)(x)
    assert [tensor.data_ptr() for tensor in saved] in ([], [x.data_ptr()])
    y.sum().backward()


def test_no_second_derivative(name: str, make: Make) -> None:
    x = torch.randn(4, requires_grad=True)
    weight = torch.ones(4, requires_grad=True)
    (grad,) = torch.autograd.grad((make(name, 50)(x) * weight).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_input_that_is_not_floating_point(name: str, make: Make, dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=rf"^\w+ needs a floating-point input, got {dtype}\.$"):
        make(name)(torch.zeros(3, dtype=dtype))


def test_meta_device(name: str, make: Make) -> None:
    x = torch.randn(2, 3, device="meta", requires_grad=True)
    y = make(name, 50).to("meta")(x)
    y.sum().backward()
    assert y.is_meta and x.grad is not None and x.grad.shape == (2, 3)
