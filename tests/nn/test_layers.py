"""What the layers compute, held against the same written out slowly in float64 with NumPy and plain autograd."""

from __future__ import annotations

import copy
import io
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models.feature_extraction import create_feature_extractor

import abste
from abste.errors import ConfigError
from abste.estimators import Annealed, Binarizer, Estimator, EstimatorSchedule
from abste.nn import (
    AdaptiveSet,
    BinaryActivation,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    GradientBranch,
    functional,
    standardize,
)

SCALES = ("channel", "tensor", "learned", None)
BITS = {"W1A32": ("ab_tanh", None), "W1A1": ("ab_tanh", "ab_tanh"), "W32A1": (None, "ab_tanh")}

GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padding": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 3, "padding": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "depthwise": {"kernel_size": 3, "padding": 1, "groups": 4},
    "1x1": {"kernel_size": 1},
    "same": {"kernel_size": 3, "padding": "same"},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "same, even, dilated": {"kernel_size": 2, "padding": "same", "dilation": 3},
    "valid": {"kernel_size": 4, "padding": "valid"},
    "reflect": {"kernel_size": 3, "padding": 2, "padding_mode": "reflect"},
    "circular": {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    "replicate, same, even": {"kernel_size": 4, "padding": "same", "padding_mode": "replicate"},
}
UNEQUAL: dict[str, Any] = {"kernel_size": (3, 2), "stride": (1, 2), "padding": (0, 1), "dilation": (2, 1)}


def to_sign(x: Any) -> np.ndarray:
    """±1, with +1 at zero."""
    return np.where(np.asarray(x, dtype=np.float64) >= 0, 1.0, -1.0)


def standardized(latent: Any) -> np.ndarray:
    """Each filter without its mean, divided by its RMS; by that of the whole where the fan-in is 1."""
    w = np.asarray(latent, dtype=np.float64)
    flat = w.reshape(len(w), -1)
    if flat.shape[1] == 1:
        return w / np.sqrt((w**2).mean())
    centred = flat - flat.mean(1, keepdims=True)
    return (centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-10)).reshape(w.shape)


def scale_of(layer: Any) -> np.ndarray:
    """The factor of the sums, one per filter."""
    size = np.abs(layer.weight.detach().double().numpy()).reshape(len(layer.weight), -1)
    if layer.scale is None:
        return np.ones(len(size))
    if layer.scale == "learned":
        return layer.learned_scale.detach().double().numpy()
    return np.full(len(size), size.mean()) if layer.scale == "tensor" else size.mean(1)


def expected(layer: Any, x: Tensor) -> Tensor:
    """What a binary layer gives for x: torch.nn's own layer in float64, on ±1."""
    base = next(cls for cls in (nn.Conv1d, nn.Conv2d, nn.Linear) if isinstance(layer, cls))
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode")
    if base is nn.Linear:
        names = ("in_features", "out_features")
    twin = base(**{name: getattr(layer, name) for name in names}, bias=False).double()
    latent = layer.weight.detach().double().numpy()
    if layer.weight_binarizer is not None:
        latent = to_sign(standardized(latent) if layer.standardize else latent)
    twin.weight.data = torch.from_numpy(latent)
    seen = x.double() if layer.activation is None else torch.from_numpy(to_sign(x.detach().double().numpy()))
    column = (-1, *([1] * (x.dim() - 1 if base is nn.Linear else len(layer.stride))))
    if base is nn.Linear:
        column = (-1,)
    elif layer.pad_value:
        seen = F.pad(seen, twin._reversed_padding_repeated_twice, value=layer.pad_value)
        twin.padding = (0,) * len(layer.stride)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, about the cost of padding='same' with an even kernel
        sums = twin(seen).detach()
    y = sums * torch.from_numpy(scale_of(layer)).view(column)
    return y if layer.bias is None else y + layer.bias.detach().double().view(column)


class _Binarize(torch.autograd.Function):
    """The binary value of x r forward, a gradient that is written out backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, binarizer: Binarizer, r: float) -> Tensor:
        ctx.x, ctx.binarizer, ctx.r = x.detach(), binarizer, r
        return torch.from_numpy(to_sign(ctx.x.numpy())) if binarizer.is_sign else binarizer.binarize(ctx.x * r)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return slope_of(ctx.binarizer, ctx.x * ctx.r, grad) * grad * ctx.r, None, None


def slope_of(binarizer: Binarizer, x: Tensor, grad: Tensor) -> Tensor:
    """F'(x), as autograd sees F; what is learned gets the gradient of the sum of grad F(x) on the way.

    Where no F exists it is the binarizer's own: what it makes of the sign of grad.
    """
    if not isinstance(binarizer, Estimator):
        assert not binarizer.linear
        return binarizer.backward(grad.sign(), x) * grad.sign()
    with torch.enable_grad():
        x = x.detach().clone().requires_grad_()
        y = binarizer.surrogate(x)
        (slope,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        for tap in binarizer.taps():
            (tap.grad,) = torch.autograd.grad(y, tap, grad, retain_graph=True)
    return slope


def expected_gradients(layer: Any, x: Tensor, upstream: Tensor, inverse_rms: float) -> dict[str, Tensor | None]:
    """The gradients of a binary layer from autograd, with every tensor materialised and the scale after the sum."""
    layer = copy.deepcopy(layer).train()
    layer.zero_grad()
    x = x.detach().clone().requires_grad_()
    w = binary = layer.weight
    if layer.weight_binarizer is not None:
        latent = w
        if layer.standardize:
            centred = w.flatten(1) - w.flatten(1).mean(1, keepdim=True)
            latent = (centred / (centred.square().mean(1, keepdim=True) + 1e-10).sqrt()).view_as(w)
        binary = _Binarize.apply(latent, layer.weight_binarizer, 1.0)
    seen = x
    if layer.activation is not None:
        seen = _Binarize.apply(x, layer.activation.estimator, inverse_rms)
    spatial = len(getattr(layer, "stride", ()))
    if spatial:
        convolve = F.conv1d if spatial == 1 else F.conv2d
        seen = F.pad(seen, layer._reversed_padding_repeated_twice, value=layer.pad_value)
        y = convolve(seen, binary, None, layer.stride, 0, layer.dilation, layer.groups)
    else:
        y = F.linear(seen, binary)
    column = (-1, *([1] * spatial))
    size = w.abs() if layer.scale_gradient else w.detach().abs()
    if layer.scale == "channel":
        y = y * size.flatten(1).mean(1).view(column)
    elif layer.scale == "tensor":
        y = y * size.mean()
    elif layer.scale == "learned":
        y = y * layer.learned_scale.view(column)
    if layer.bias is not None:
        y = y + layer.bias.view(column)
    y.backward(upstream)
    return {**{name: p.grad for name, p in layer.named_parameters()}, "x": x.grad}


def at(module: nn.Module, percent: int) -> nn.Module:
    """The module with its estimators so far through training."""
    for part in module.modules():
        if isinstance(part, Annealed):
            part.set_progress(percent, 100)
    return module


def layer_and_input(kind: str, **options: Any) -> tuple[Any, Tensor]:
    """A small layer and an input for it; the latents are spread so that a raw one can lie beyond a clip."""
    dtype = options.get("dtype", torch.float32)
    geometry = {
        "kernel_size": 3,
        "padding": 1,
        **{k: options.pop(k) for k in list(options) if k in GEOMETRIES["dilation"]},
    }
    layer: Any
    if kind == "linear":
        layer, x = BinaryLinear(6, 5, **options), torch.randn(7, 3, 6, dtype=dtype)
    elif kind == "conv1d":
        layer, x = BinaryConv1d(4, 6, **geometry, **options), torch.randn(3, 4, 9, dtype=dtype)
    else:
        layer, x = BinaryConv2d(4, 6, **geometry, **options), torch.randn(2, 4, 7, 6, dtype=dtype)
    return at(layer, 60), x


KINDS = ("conv1d", "conv2d", "linear")


# ---- forward


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("geometry", [*GEOMETRIES, "unequal"])
@pytest.mark.parametrize("cls", [BinaryConv1d, BinaryConv2d])
def test_forward_is_a_convolution_of_signs(cls: type[Any], geometry: str, bits: str) -> None:
    if geometry == "unequal" and cls is BinaryConv1d:
        return
    weights, activations = BITS[bits]
    arguments = UNEQUAL if geometry == "unequal" else GEOMETRIES[geometry]
    layer = cls(4, 8, **arguments, weights=weights, activations=activations)
    x = torch.randn(2, 4, 11) if cls is BinaryConv1d else torch.randn(2, 4, 11, 10)
    y = layer(x)
    reference = expected(layer, x)
    assert y.dtype == torch.float32
    assert y.shape == reference.shape
    torch.testing.assert_close(y.double(), reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(5, 6), (6,), (2, 3, 6), (0, 6)])
@pytest.mark.parametrize("bits", BITS)
def test_forward_of_linear(bits: str, shape: tuple[int, ...]) -> None:
    weights, activations = BITS[bits]
    layer = BinaryLinear(6, 5, weights=weights, activations=activations)
    x = torch.randn(shape)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("standardized", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_scale_multiplies_the_sum(kind: str, standardized: bool, scale: Any) -> None:
    layer, x = layer_and_input(kind, scale=scale, standardize=standardized, activations="ste")
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-6, atol=1e-6)
    if scale == "learned":
        latent = layer.weight.detach().abs().flatten(1).mean(1)
        torch.testing.assert_close(layer.learned_scale.detach(), latent)


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("geometry", ["plain", "stride", "dilation", "groups", "same", "same, even"])
@pytest.mark.parametrize("cls", [BinaryConv1d, BinaryConv2d])
def test_sums_of_signs_are_exact_integers(cls: type[Any], geometry: str, pad_value: int) -> None:
    options = {"scale": None, "bias": False, "weights": "ste", "activations": "ste", "pad_value": pad_value}
    layer = cls(64, 8, **GEOMETRIES[geometry], **options)
    x = torch.randn(2, 64, 9) if cls is BinaryConv1d else torch.randn(2, 64, 9, 9)
    x[0, :4] = 0.0
    x[1, :4] = -0.0
    assert torch.equal(layer(x).double(), expected(layer, x))


def test_zero_padding_is_added_after_sign() -> None:
    layer = BinaryConv1d(1, 1, 3, padding=1, bias=False, scale=None, standardize=False, activations="ste")
    layer.weight.data.fill_(1.0)
    assert layer(torch.full((1, 1, 3), 5.0)).flatten().tolist() == [2.0, 3.0, 2.0]


@pytest.mark.parametrize("cls", [BinaryConv1d, BinaryConv2d])
def test_unbatched_and_empty_inputs(cls: type[Any]) -> None:
    layer = cls(4, 6, 3, padding=1, activations="ste").eval()
    x = torch.randn(2, 4, 8) if cls is BinaryConv1d else torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(layer(x[0]), layer(x)[0])
    layer.train()
    before = layer.activation.mean_square.clone()
    empty = x[:0].requires_grad_()
    y = layer(empty)
    y.sum().backward()
    assert y.shape == (0, 6, *x.shape[2:])
    assert empty.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros_like(layer.weight))
    assert torch.equal(layer.activation.mean_square, before)
    assert layer.activation.num_batches_tracked == 0


def test_zero_latents_and_zero_inputs_count_as_plus_one() -> None:
    layer = BinaryLinear(4, 2, bias=False, scale=None, standardize=False, activations="ste")
    layer.weight.data = torch.tensor([[0.0, -0.0, 0.0, -0.0], [0.0, 0.0, 0.0, -1.0]])
    assert layer.binary_weight().sign.tolist() == [[1, 1, 1, 1], [1, 1, 1, -1]]
    assert layer(torch.tensor([[0.0, -0.0, 1e-30, -1e-30]])).tolist() == [[2.0, 4.0]]
    layer.standardize = True
    layer.weight.data.zero_()
    assert layer.binary_weight().sign.tolist() == [[1] * 4] * 2


@pytest.mark.parametrize("bits", BITS)
def test_channels_last_is_kept(bits: str) -> None:
    weights, activations = BITS[bits]
    layer = BinaryConv2d(8, 16, 3, padding=1, weights=weights, activations=activations)
    x = torch.randn(2, 8, 6, 6)
    plain = layer.eval()(x)
    layer.to(memory_format=torch.channels_last)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert x.grad is not None
    assert x.grad.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, plain)


# ---- standardised latents


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (5, 7), (6, 1), (6, 1, 1), (3, 2, 1)])
def test_standardize(shape: tuple[int, ...]) -> None:
    weight = 0.01 * torch.randn(shape) + 0.005
    result = standardize(weight)
    np.testing.assert_allclose(result.numpy(), standardized(weight.numpy()), rtol=2e-4, atol=1e-5)
    assert result.dtype == torch.float32
    assert standardize(weight.half()).dtype == torch.float32
    assert standardize(weight.double()).dtype == torch.float64


def test_a_fan_in_of_one_still_learns() -> None:
    layer = BinaryConv2d(6, 6, 1, groups=6, bias=False)
    before = layer.binary_weight().sign
    torch.testing.assert_close(before, torch.from_numpy(to_sign(layer.weight.detach().numpy())).float())
    layer(torch.randn(2, 6, 4, 4)).square().sum().backward()
    assert layer.weight.grad.abs().min() > 0


# ---- gradients


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_equal_those_of_plain_autograd(kind: str, bits: str) -> None:
    weights, activations = BITS[bits]
    options = itertools.product(SCALES, (False, True), (True, False), (True, False), (True, False))
    for scale, scale_gradient, standardized, normalize, bias in options:
        layer, x = layer_and_input(
            kind,
            weights=weights,
            activations=activations,
            scale=scale,
            scale_gradient=scale_gradient,
            standardize=standardized,
            normalize=normalize,
            bias=bias,
            dtype=torch.float64,
        )
        x.requires_grad_()
        y = layer(x)
        upstream = torch.randn_like(y)
        y.backward(upstream)
        inverse = 1.0
        if activations is not None and normalize:
            inverse = float(layer.activation.eval().inverse_rms(x))
            assert inverse == pytest.approx(float(x.detach().square().mean().rsqrt()), rel=1e-5)
        wanted = expected_gradients(layer, x, upstream, inverse)
        found = {**{name: p.grad for name, p in layer.named_parameters()}, "x": x.grad}
        torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("estimator", abste.estimators.available())
def test_every_estimator_serves_both_sides(estimator: str) -> None:
    """Or the one that it is for."""
    roles = abste.estimators.get(estimator).roles
    weights, activations = (estimator if role in roles else "ste" for role in ("weights", "activations"))
    layer, x = layer_and_input("conv2d", weights=weights, activations=activations, dtype=torch.float64)
    x.requires_grad_()
    torch.manual_seed(0)  # of bits that are drawn
    y = layer(x)
    upstream = torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y)
    y.backward(upstream)
    inverse = float(layer.activation.eval().inverse_rms(x))
    torch.manual_seed(0)
    wanted = expected_gradients(layer, x, upstream, inverse)
    found = {**{name: p.grad for name, p in layer.named_parameters()}, "x": x.grad}
    torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("geometry", ["stride", "dilation", "groups", "same, even", "same, even, dilated"])
def test_gradients_of_other_geometries(geometry: str, pad_value: int) -> None:
    layer = BinaryConv2d(4, 6, **GEOMETRIES[geometry], activations="ab_tanh", pad_value=pad_value, dtype=torch.float64)
    at(layer, 60)
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted = expected_gradients(layer, x, upstream, float(layer.activation.eval().inverse_rms(x)))
    found = {**{name: p.grad for name, p in layer.named_parameters()}, "x": x.grad}
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("batch", [0, 3])
@pytest.mark.parametrize(
    "geometry", [*(name for name, options in GEOMETRIES.items() if "groups" not in options), "unequal"]
)
def test_gradients_of_few_outputs(geometry: str, batch: int, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the weight are a product of matrices; of many outputs they are torch's own."""
    options = UNEQUAL if geometry == "unequal" else GEOMETRIES[geometry]
    classes = [BinaryConv2d] if geometry == "unequal" else [BinaryConv1d, BinaryConv2d]
    for cls, pad_value in itertools.product(classes, (0, -1) if options.get("padding_mode") is None else (0,)):
        layer = cls(4, 6, **options, activations="ab_tanh", pad_value=pad_value, dtype=torch.float64)
        shape = (batch, 4, 6) if cls is BinaryConv1d else (batch, 4, 6, 5)
        x = torch.randn(shape, dtype=torch.float64)
        if last and cls is BinaryConv2d:
            layer, x = layer.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        found = []
        for few in (0, 1000):
            monkeypatch.setattr(functional, "_FEW_OUTPUTS", few)
            twin, seen = copy.deepcopy(layer), x.clone().requires_grad_()
            y = twin(seen)
            y.backward(torch.cos(torch.arange(y.numel(), dtype=y.dtype)).view_as(y))
            found.append({**{name: p.grad for name, p in twin.named_parameters()}, "x": seen.grad})
        assert batch == 0 or found[0]["weight"].abs().max() > 0
        torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_gradient_goes_through_other_padding_modes(mode: str) -> None:
    layer = BinaryConv2d(4, 6, 3, padding=1, padding_mode=mode, dtype=torch.float64)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 6, 6, 6, dtype=torch.float64)
    layer(x).backward(upstream)
    twin = nn.Conv2d(4, 6, 3, padding=1, padding_mode=mode, bias=False, dtype=torch.float64)
    twin.weight.data = layer.binary_weight().sign
    y = twin(x) * torch.from_numpy(scale_of(layer)).view(-1, 1, 1)
    torch.testing.assert_close(x.grad, torch.autograd.grad(y, x, upstream)[0])


@pytest.mark.parametrize("shape", [(6,), (2, 3, 6), (0, 6)])
def test_gradient_of_linear_for_any_leading_dimensions(shape: tuple[int, ...]) -> None:
    layer = BinaryLinear(6, 5, dtype=torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    wanted = expected_gradients(layer, x, upstream, 1.0)
    torch.testing.assert_close({"x": x.grad, "weight": layer.weight.grad}, {k: wanted[k] for k in ("x", "weight")})


def test_only_what_needs_a_gradient_gets_one() -> None:
    for frozen, needs_x in itertools.product((True, False), repeat=2):
        layer, x = layer_and_input("conv2d", activations="ste", scale="learned")
        layer.weight.requires_grad_(not frozen)
        x.requires_grad_(needs_x)
        layer(x).sum().backward()
        assert (layer.weight.grad is None) == frozen
        assert (x.grad is None) != needs_x
        assert layer.learned_scale.grad is not None


def test_a_second_derivative_is_refused() -> None:
    layer, x = layer_and_input("conv2d", activations="ste")
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_a_raw_layer_may_be_called_twice_before_the_backward(kind: str) -> None:
    layer, x = layer_and_input(kind, weights={"name": "ste", "t": 0.1}, standardize=False, bias=False)
    (layer(x) + layer(2 * x)).sum().backward()
    both = layer.weight.grad.clone()
    layer.zero_grad()
    layer(x).sum().backward()
    layer(2 * x).sum().backward()
    torch.testing.assert_close(layer.weight.grad, both)


# ---- memory


def saved_by(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The tensors that a forward keeps for the backward, each memory once."""
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        layer(x)
    return list(kept.values())


@pytest.mark.parametrize("kind", KINDS)
def test_backward_keeps_x_and_not_its_sign(kind: str) -> None:
    layer, x = layer_and_input(kind, activations="ab_tanh")
    x = x.repeat(8, *([1] * (x.dim() - 1))).requires_grad_()
    base = nn.Linear(6, 5) if kind == "linear" else (nn.Conv1d if kind == "conv1d" else nn.Conv2d)(4, 6, 3, padding=1)
    large = [t for t in saved_by(layer, x) if t.numel() >= x.numel()]
    assert [t.data_ptr() for t in large] == [x.data_ptr()]
    extra = sum(t.nbytes for t in saved_by(layer, x)) - sum(t.nbytes for t in saved_by(base, x))
    assert extra <= 6 * layer.weight.nbytes + 256


# ---- dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind: str, bits: str, dtype: torch.dtype) -> None:
    weights, activations = BITS[bits]
    layer, x = layer_and_input(kind, weights=weights, activations=activations)
    for given in (x, x.to(dtype)):
        given = given.clone().requires_grad_()
        with torch.autocast("cpu", dtype=dtype):
            y = layer(given)
        assert y.dtype == dtype
        y.float().square().mean().backward()
        assert given.grad is not None
        assert given.grad.dtype == given.dtype
        assert {p.grad.dtype for p in layer.parameters()} == {torch.float32}
        torch.testing.assert_close(y.double(), expected(layer, given), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_model(kind: str, dtype: torch.dtype) -> None:
    layer, x = layer_and_input(kind, activations="ab_tanh")
    reference = layer.eval()(x)
    layer.to(dtype).train()
    half = x.to(dtype).requires_grad_()
    y = layer(half)
    y.square().mean().backward()
    assert y.dtype == half.grad.dtype == layer.weight.grad.dtype == dtype
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    torch.testing.assert_close(y.float(), reference, rtol=2e-2, atol=2e-2)
    assert layer.binary_weight().sign.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_but_zeros_gives_no_nan(dtype: torch.dtype) -> None:
    layer = BinaryLinear(4, 3, activations="ab_tanh", dtype=dtype)
    x = torch.zeros(5, 4, dtype=dtype, requires_grad=True)
    for _ in range(3):
        layer(x).mean().backward()
    assert not x.grad.isnan().any()
    assert not layer.weight.grad.isnan().any()
    assert layer.activation.inverse_rms(x).isfinite()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1e4])
def test_tiny_and_saturated_inputs(size: float, dtype: torch.dtype) -> None:
    layer = BinaryConv1d(4, 3, 3, activations="ab_tanh", dtype=dtype)
    x = (size * torch.randn(2, 4, 8)).to(dtype).requires_grad_()
    y = layer(x)
    (y * 1e-3).sum().backward()
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    raw = BinaryConv1d(4, 3, 3, activations="ste", normalize=False, dtype=dtype)
    x = torch.full((2, 4, 8), 100.0, dtype=dtype, requires_grad=True)
    raw(x).sum().backward()
    assert torch.equal(x.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_small_inputs_keep_their_sign_whatever_the_rms(dtype: torch.dtype) -> None:
    module = BinaryActivation("ste")
    module(torch.full((4,), 1e4))
    x = torch.tensor([-1e-7, 1e-7, -0.0, 0.0, -1.0], dtype=dtype, requires_grad=True)
    y = module.eval()(x)
    assert y.dtype == dtype and y.tolist() == [-1, 1, 1, 1, -1]
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-4), rtol=1e-2, atol=0)


# ---- running RMS


def test_running_rms_is_exact_at_first_and_then_an_exponential_average() -> None:
    module = BinaryActivation("ste")
    batches = [(1.0 + i % 3) * torch.randn(64, 10) for i in range(25)]
    squares = [float(b.square().mean()) for b in batches]
    module(batches[0])
    assert float(module.inverse_rms(batches[0][:0])) == pytest.approx(squares[0] ** -0.5, rel=1e-5)
    average = squares[0]
    for i, batch in enumerate(batches[1:], start=2):
        module(batch)
        average += max(1 / i, 0.1) * (squares[i - 1] - average)
        assert float(module.mean_square) == pytest.approx(average, rel=1e-4)
    assert int(module.num_batches_tracked) == 25


def test_evaluation_leaves_the_running_rms_alone() -> None:
    layer, x = layer_and_input("conv2d", activations="ste")
    layer(x)
    before = copy.deepcopy(layer.state_dict())
    layer.eval()
    layer(3 * x)
    layer.binary_weight()
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_running_rms_moves_the_slope_and_not_the_sign() -> None:
    module = BinaryActivation("ste")
    x = torch.tensor([-30.0, -3.0, -0.0, 0.0, 3.0, 30.0], requires_grad=True)
    y = module(x)
    y.sum().backward()
    rms = float(x.detach().square().mean().sqrt())
    assert y.tolist() == [-1, -1, 1, 1, 1, 1]
    torch.testing.assert_close(x.grad, (x.detach().abs() <= 1.5 * rms).float() / rms)
    raw = BinaryActivation("ste", normalize=False)
    x.grad = None
    raw(x).sum().backward()
    assert x.grad.tolist() == [0, 0, 1, 1, 0, 0]
    assert not list(raw.buffers())


def test_activation_module_has_the_gradient_of_the_layer() -> None:
    layer, x = layer_and_input("linear", activations="ab_tanh", weights=None, bias=False)
    one, two = x.clone().requires_grad_(), x.clone().requires_grad_()
    layer(one).sum().backward()
    module = at(BinaryActivation("ab_tanh"), 60)
    F.linear(module(two), layer.weight).sum().backward()
    torch.testing.assert_close(one.grad, two.grad)


# ---- state


def test_binary_weight_is_signs_and_scale() -> None:
    layer, _ = layer_and_input("conv2d", scale="channel")
    weight = layer.binary_weight()
    assert set(weight.sign.unique().tolist()) == {-1.0, 1.0}
    assert weight.sign.shape == layer.weight.shape
    np.testing.assert_allclose(weight.scale.numpy(), scale_of(layer), rtol=1e-6)
    assert not weight.sign.requires_grad
    assert not weight.scale.requires_grad
    assert layer_and_input("conv2d", scale=None)[0].binary_weight().scale is None
    with pytest.raises(ConfigError, match="full-precision weights"):
        layer_and_input("conv2d", weights=None, activations="ste")[0].binary_weight()


def test_raw_latents_are_clamped_in_training_only() -> None:
    for estimator, limit in (("ste", 3.0), ({"name": "ste", "t": 0.5}, 0.5), ("identity_ste", 9.0)):
        layer, x = layer_and_input("conv2d", weights=estimator, standardize=False)
        layer.weight.data[0] = 9.0
        layer.eval()(x)
        layer.train().binary_weight()
        assert layer.weight.max() == 9.0
        layer(x)
        assert layer.weight.max() == limit
    layer, x = layer_and_input("conv2d", weights="ste")
    layer.weight.data[0] = 9.0
    layer(x)
    assert layer.weight.max() == 9.0


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


def binary_network(**options: Any) -> nn.Sequential:
    model = network()
    abste.convert(model, **{"activations": "ab_tanh", **options}, example_input=torch.zeros(2, 3, 8, 8))
    return model


def test_state_dict_is_complete_and_needs_no_pickle() -> None:
    model = binary_network(scale="learned")
    schedule = EstimatorSchedule(model, 10)
    for _ in range(3):
        model(torch.randn(4, 3, 8, 8))
        schedule.step()
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = binary_network(scale="learned")
    other.load_state_dict(torch.load(stream, weights_only=True))
    x = torch.randn(4, 3, 8, 8)
    grads = []
    for net in (model, other):
        net.zero_grad()
        net(x).sum().backward()
        grads.append({name: p.grad for name, p in net.named_parameters()})
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    torch.testing.assert_close(model.state_dict(), other.state_dict(), rtol=0, atol=0)


def test_a_float_state_dict_gives_the_latents() -> None:
    trained = network()
    for p in trained.parameters():
        p.data.add_(1.0)
    model = binary_network()
    missing = model.load_state_dict(trained.state_dict(), strict=False)
    assert not missing.unexpected_keys
    assert all("binarizer" in key or "activation" in key for key in missing.missing_keys)
    torch.testing.assert_close(model[2].weight, trained[2].weight, rtol=0, atol=0)


def test_a_copy_is_independent() -> None:
    model = binary_network()
    model(torch.randn(4, 3, 8, 8))
    twin = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    at(twin, 100)(torch.randn(4, 3, 8, 8))
    twin[2].weight.data.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_buffers_can_be_broadcast() -> None:
    model = binary_network().to(memory_format=torch.channels_last)
    model(torch.randn(4, 3, 8, 8))
    buffers = list(model.buffers())
    assert all(buffer.is_contiguous() for buffer in buffers)
    assert len({buffer.data_ptr() for buffer in buffers}) == len(buffers)


def test_repr_says_what_is_binary() -> None:
    layer = BinaryConv2d(
        4, 6, 3, padding=1, weights="ste", activations="ste", pad_value=-1, standardize=False, scale_gradient=True
    )
    text = repr(layer)
    for part in (
        "scale='channel'",
        "standardize=False",
        "scale_gradient=True",
        "pad_value=-1",
        "STE(t=3)",
        "STE(t=1.5)",
    ):
        assert part in text


def test_help_reads_well() -> None:
    for cls in (BinaryConv1d, BinaryConv2d, BinaryLinear):
        text = cls.__doc__ or ""
        assert "\\" not in text
        assert "{" not in text
        assert "weights" in text.partition("Args:")[2]


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: BinaryConv2d(3, 8, 3)(torch.zeros(1, 3, 8, 8, dtype=torch.int64)),
            "floating-point tensor as input, got torch.int64",
        ),
        (lambda: BinaryConv2d(3, 8, 3)(torch.zeros(1, 4, 8, 8)), r"shape \(\[N,\] 3, H, W\), got \(1, 4, 8, 8\)"),
        (lambda: BinaryConv2d(3, 8, 3)(torch.zeros(1, 1, 3, 8, 8)), r"got \(1, 1, 3, 8, 8\)"),
        (lambda: BinaryConv2d(3, 8, 3)([1.0]), "needs a floating-point tensor as input, got list"),
        (lambda: BinaryConv1d(3, 8, 3)(torch.zeros(3, 4, 8)), r"shape \(\[N,\] 3, L\), got \(3, 4, 8\)"),
        (lambda: BinaryLinear(3, 8)(torch.zeros(2, 4)), r"shape \(\.\.\., 3\), got \(2, 4\)"),
        (lambda: BinaryLinear(3, 8)(torch.zeros(())), r"shape \(\.\.\., 3\), got \(\)"),
        (lambda: BinaryActivation()(torch.zeros(2, dtype=torch.bool)), "got torch.bool"),
        (lambda: BinaryActivation(None), "needs an estimator"),
        (lambda: BinaryLinear(3, 8, weights="ab_tahn"), "did you mean 'ab_tanh'"),
        (lambda: BinaryLinear(3, 8, activations="sted"), "did you mean 'ste'"),
        (lambda: BinaryLinear(3, 8, weights=3), "weights must be a name"),
        (lambda: BinaryLinear(3, 8, scale="chanel"), "did you mean 'channel'"),
        (lambda: BinaryLinear(3, 8, dtype=torch.complex64), "floating-point dtype, got torch.complex64"),
        (lambda: BinaryConv2d(3, 8, 3, activations="ste", pad_value=2), "pad_value must be 0, 1 or -1, got 2"),
        (lambda: BinaryConv2d(3, 8, 3, pad_value=1), "pad_value=1 needs binarised activations"),
        (
            lambda: BinaryConv2d(3, 8, 3, activations="ste", pad_value=1, padding_mode="reflect"),
            "needs binarised activations and padding_mode='zeros'",
        ),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about complex modules
        with pytest.raises(ConfigError, match=message) as raised:
            call()
    assert "\n" not in str(raised.value)


# ---- torch.compile


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


def gradients(model: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.square().sum().backward()
    return {**{name: p.grad for name, p in model.named_parameters()}, "x": x.grad, "y": y.detach()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"standardize": False, "scale": "learned", "normalize": False, "pad_value": 1},
        {"activations": None, "scale_gradient": True},
    ],
    ids=["W1A1", "raw", "W1A32"],
)
def test_compiled_training_is_one_graph_throughout(dynamo: Any, options: dict[str, Any]) -> None:
    model = binary_network(**options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    schedules = [EstimatorSchedule(net, 10) for net in (model, twin)]
    for i in range(4):
        x = torch.randn(4, 3, 8, 8)
        with dynamo.config.patch(error_on_recompile=i > 0):
            found = gradients(model, compiled, x)
        torch.testing.assert_close(found, gradients(twin, twin, x), rtol=1e-4, atol=1e-5)
        for schedule in schedules:
            schedule.step()
    torch.testing.assert_close(model.state_dict(), twin.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_inductor_equals_eager(dynamo: Any, autocast: bool) -> None:
    model = at(binary_network(), 60).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found, wanted = gradients(model, compiled, x), gradients(twin, twin, x)
    tolerance = 5e-2 if autocast else 1e-4
    # The bias before a batch norm has a gradient of zero but for rounding: compared with the others' it must be small.
    noise = 1e-2 * tolerance * max(grad.norm() for grad in wanted.values())
    for name, grad in wanted.items():
        assert (found[name] - grad).norm() <= tolerance * grad.norm() + noise, name


def stack(**options: Any) -> nn.Sequential:
    """Two linear layers, with binary inputs where they are binary."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), BinaryLinear(8, 8, activations="ab_tanh", **options))
    return model.train()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
def test_a_batch_that_overflows_is_forgotten(bad: float) -> None:
    # A loop that leaves out steps with gradients that are not finite, as GradScaler does, goes on with the next batch.
    layer, spared = (BinaryLinear(8, 8, activations="ab_tanh") for _ in range(2))
    spared.load_state_dict(layer.state_dict())
    for step in range(12):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step))
        spared(x)
        layer(x)
        if step == 4:
            layer(torch.full((32, 8), bad))
    state, expected = layer.state_dict(), spared.state_dict()
    for key, value in expected.items():
        torch.testing.assert_close(state[key], value, rtol=0, atol=0, msg=key)
    x = torch.randn(32, 8, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


def test_the_first_batch_may_be_the_one_that_overflows() -> None:
    layer = BinaryActivation()
    layer(torch.full((4,), float("nan")))
    layer(torch.full((4,), 3.0))
    assert layer.num_batches_tracked == 1 and layer.mean_square == 9


def test_half_precision_holds_the_largest_mean_square_it_can() -> None:
    layer = BinaryActivation().half()
    x = (torch.randn(64, 8, generator=torch.Generator().manual_seed(0)) * 300).half().requires_grad_()
    layer(x).sum().backward()
    assert layer.mean_square == torch.finfo(torch.float16).max
    assert x.grad is not None and x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_count_a_batch_once(reentrant: bool) -> None:
    plain, saving = stack(), stack()
    for step in range(15):
        x = torch.randn(32, 8, generator=torch.Generator().manual_seed(step)) * (1 + step)
        grads = []
        for model, inner in ((plain, plain[2]), (saving, lambda x: checkpoint(saving[2], x, use_reentrant=reentrant))):
            model.zero_grad()
            hidden = model[0](x)  # without batch norm, so that the scale of the batches reaches the layer
            inner(hidden).square().sum().backward()
            grads.append(model[0].weight.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
    assert saving[2].activation.num_batches_tracked == 15


@pytest.mark.parametrize(
    "estimator",
    [
        "ab_tanh",
        "dsq",
        {"name": "ab_tanh", "blend": "learned"},
        {"name": "ab_tanh", "blend": "equilibrium"},
    ],
    ids=str,
)
def test_reset_parameters_makes_memory_of_the_meta_device_a_new_layer(estimator: Any) -> None:
    options: dict[str, Any] = {"weights": estimator, "activations": estimator, "scale": "learned", "center": "learned"}
    layer = BinaryLinear(8, 6, device="meta", **options).to_empty(device="cpu")
    for tensor in (*layer.parameters(), *layer.buffers()):
        tensor.data.fill_(7)
    torch.manual_seed(1)
    layer.reset_parameters()
    torch.manual_seed(1)
    fresh = BinaryLinear(8, 6, **options).state_dict()
    assert layer.state_dict().keys() == fresh.keys()
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, fresh[key], rtol=0, atol=0, msg=key)


def test_frozen_latents_are_not_clamped() -> None:
    layer = BinaryLinear(4, 4, standardize=False)
    with torch.no_grad():
        layer.weight.fill_(100)
    layer.weight.requires_grad_(False)
    layer(torch.ones(2, 4))
    assert (layer.weight == 100).all()
    layer.weight.requires_grad_()
    layer(torch.ones(2, 4))
    assert (layer.weight < 100).all()


@pytest.mark.parametrize("wrap", [None, "set", "branch"])
def test_the_input_can_be_named_as_in_torch(wrap: str | None) -> None:
    layer: Any = BinaryConv2d(3, 4, 3, activations="ab_tanh")
    if wrap is not None:
        layer = AdaptiveSet(layer) if wrap == "set" else GradientBranch(layer)
    layer.eval()
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(layer(input=x), layer(x), rtol=0, atol=0)
    linear = BinaryLinear(5, 2).eval()
    torch.testing.assert_close(linear(input=x), linear(x), rtol=0, atol=0)


def test_layers_tell_their_shape_on_the_meta_device() -> None:
    with torch.device("meta"):
        layer = BinaryConv2d(3, 4, 3, activations="ab_tanh")
        assert layer(torch.empty(2, 3, 8, 8)).shape == (2, 4, 6, 6)


def test_feature_extractors_keep_binary_layers_whole() -> None:
    model = nn.Sequential(BinaryConv2d(3, 4, 3, activations="ab_tanh"), nn.ReLU()).eval()
    with pytest.raises(ConfigError, match=r"torch\.fx cannot trace into BinaryConv2d: make it a leaf"):
        create_feature_extractor(model, ["1"])
    traced = create_feature_extractor(model, ["1"], tracer_kwargs={"leaf_modules": list(abste.nn.BINARY_LAYERS)})
    x = torch.randn(2, 3, 5, 5)
    torch.testing.assert_close(traced(x)["1"], model(x), rtol=0, atol=0)
