"""Shifts, activations, centres and sets, held against the same written out in float64 with plain autograd."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abste
from abste.errors import ConfigError
from abste.estimators import EstimatorSchedule
from abste.nn import (
    AdaptiveSet,
    BinaryActivation,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    ChannelShift,
    GradientBranch,
    Maxout,
    RPReLU,
    RSign,
    parameter_groups,
)

KINDS = ("conv1d", "conv2d", "linear")
GEOMETRIES: dict[str, dict[str, Any]] = {
    "plain": {"kernel_size": 3},
    "padded": {"kernel_size": 3, "padding": 1},
    "stride, dilation": {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2},
    "groups": {"kernel_size": 3, "padding": 1, "groups": 2},
    "same, even": {"kernel_size": 4, "padding": "same"},
    "reflect": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
    "pad_value": {"kernel_size": 3, "padding": 1, "groups": 2, "pad_value": -1},
}


class Approx(torch.autograd.Function):
    """sign(x), +1 at zero, with ApproxSign's slope 2 - 2|x| inside ±1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (2 - 2 * ctx.saved_tensors[0].abs()).clamp(min=0)


class Identity(torch.autograd.Function):
    """sign(x) with slope 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def make(kind: str, geometry: str = "padded", **options: Any) -> tuple[Any, Tensor]:
    """A layer in float64 with the authors' estimators, and an input."""
    options = {"weights": "identity_ste", "normalize": False, "dtype": torch.float64, **options}
    layer: Any
    if kind == "linear":
        options.pop("pad_value", None)
        layer, x = BinaryLinear(6, 5, **options), torch.randn(7, 3, 6, dtype=torch.float64)
    else:
        arguments = {**GEOMETRIES[geometry], **options}
        if arguments.get("activations") is None:
            arguments.pop("pad_value", None)
        cls = BinaryConv1d if kind == "conv1d" else BinaryConv2d
        layer, x = cls(4, 6, **arguments), torch.randn(2, 4, *([9] if kind == "conv1d" else [7, 6])).double()
    layer.weight.data += 0.05  # a mean to speak of
    layer.reset_scale()
    return layer, x.requires_grad_()


def float_layer(layer: Any, x: Tensor, weight: Tensor, pad: Any = 0.0) -> Tensor:
    """The layer's contraction of x with any weight, padded by hand; ``pad`` stands where pad_value does."""
    if isinstance(layer, nn.Linear):
        return F.linear(x, weight)
    sides = layer._reversed_padding_repeated_twice
    if layer.padding_mode != "zeros":
        x = F.pad(x, sides, mode=layer.padding_mode)
    else:
        inside = F.pad(torch.ones_like(x), sides)
        x = F.pad(x, sides) + (1 - inside) * pad
    convolve = F.conv1d if len(layer.stride) == 1 else F.conv2d
    return convolve(x, weight, None, layer.stride, 0, layer.dilation, layer.groups)


def adabin_weight(latent: Tensor, detached: bool = False) -> Tensor:
    """alpha sign((w - beta) / alpha) + beta with beta and alpha each filter's mean and standard deviation."""
    over = tuple(range(1, latent.dim()))
    beta = latent.mean(over, keepdim=True)
    alpha = ((latent - beta).pow(2).mean(over, keepdim=True) + 1e-10).sqrt()
    signs = Identity.apply((latent - beta) / alpha)
    return signs * alpha.detach() + beta.detach() if detached else signs * alpha + beta


def grads(y: Tensor, upstream: Tensor, **tensors: Tensor | None) -> dict[str, Tensor]:
    given = {name: t for name, t in tensors.items() if t is not None}
    return dict(zip(given, torch.autograd.grad(y, list(given.values()), upstream), strict=True))


# ---- shifts and activations


def test_shifts_and_activations_are_their_formulas() -> None:
    x = torch.randn(3, 4, 5, 2, dtype=torch.float64, requires_grad=True)
    numbers = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    a, b, c = (n.view(4, 1, 1) for n in numbers)
    cases: list[tuple[nn.Module, list[str], Tensor]] = [
        (ChannelShift(4), ["shift"], x + a),
        (RSign(4, normalize=False), ["before.shift"], Approx.apply(x + a)),
        (Maxout(4), ["positive", "negative"], torch.where(x >= 0, a * x, b * x)),
        (
            RPReLU(4),
            ["before.shift", "prelu.weight", "after.shift"],
            torch.where(x + a >= 0, x + a, b * (x + a)) + c,
        ),
    ]
    for module, names, wanted in cases:
        module.double()
        state = dict(module.named_parameters())
        assert list(state) == names
        for name, value in zip(names, numbers, strict=False):
            state[name].data.copy_(value)
        found = module(x)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        upstream = torch.randn_like(found)
        one = torch.autograd.grad(found, [x, *state.values()], upstream)
        two = torch.autograd.grad(wanted, [x, *numbers[: len(names)]], upstream, retain_graph=True)
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_starting_values() -> None:
    x = torch.randn(2, 4, 3)
    assert torch.equal(ChannelShift(4)(x), x)
    torch.testing.assert_close(RPReLU(4)(x), F.prelu(x, torch.tensor([0.25])))
    torch.testing.assert_close(Maxout(4)(x), F.prelu(x, torch.tensor([0.25])))
    assert torch.equal(RSign(4)(x), torch.where(x >= 0, 1.0, -1.0))


def test_rsign_is_a_shift_before_a_layer_that_binarises() -> None:
    shift = ChannelShift(4)
    one = nn.Sequential(RSign(4), BinaryConv2d(4, 3, 3))
    two = nn.Sequential(shift, BinaryConv2d(4, 3, 3, activations="approx_sign"))
    two[1].load_state_dict(one[1].state_dict(), strict=False)
    for net in (one, two):
        net[0].get_submodule("before" if net is one else "").shift.data = torch.linspace(-1, 1, 4)
    x = [torch.randn(2, 4, 5, 5).requires_grad_()]
    x.append(x[0].detach().clone().requires_grad_())
    y = [net(t) for net, t in zip((one, two), x, strict=True)]
    torch.testing.assert_close(y[0], y[1])
    for t in y:
        t.square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad)
    torch.testing.assert_close(one[0].before.shift.grad, shift.shift.grad)


def test_channels_may_be_last() -> None:
    x = torch.randn(2, 7, 4)
    shift = ChannelShift(4, dim=-1)
    shift.shift.data = torch.arange(4.0)
    assert torch.equal(shift(x), x + torch.arange(4.0))
    assert RSign(4, dim=-1)(x).shape == x.shape
    assert torch.equal(shift(x[0, 0]), x[0, 0] + torch.arange(4.0))
    assert "dim=-1" in repr(shift)


def test_low_precision_stays() -> None:
    x = torch.randn(2, 4, 3, dtype=torch.bfloat16)
    for module in (ChannelShift(4), RSign(4), Maxout(4)):
        assert module(x).dtype == torch.bfloat16


def test_what_is_learned_is_never_decayed() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), RSign(4), BinaryConv2d(4, 4, 3), RPReLU(4), Maxout(4), ChannelShift(4))
    model.append(AdaptiveSet(BinaryConv2d(4, 4, 1, activations="ste", center="learned", scale="learned")))
    groups = {group["name"]: group for group in parameter_groups(model, 0.1, 5e-4)}
    learned = {
        id(p) for name, p in model.named_parameters() if not name.endswith("weight") or name.endswith("prelu.weight")
    }
    assert {id(p) for p in groups["norms_biases"]["params"]} == learned
    assert groups["norms_biases"]["weight_decay"] == 0


def test_networks_of_pieces_convert_and_count() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        ChannelShift(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        RPReLU(8),
        ChannelShift(8),
        nn.Conv2d(8, 6, 3),
        Maxout(6),
        nn.Flatten(),
        nn.Linear(6 * 16, 5),
    )
    report = abste.convert(model, activations="approx_sign", example_input=torch.zeros(2, 3, 10, 10))
    assert report.binarized == ["3", "7"]
    assert set(report.kept_float) == {"0", "10"}
    costs = {row.name: row for row in abste.summary(model, (1, 3, 10, 10)).layers}
    assert costs["2"].float_parameters == 8 and costs["2"].packed_bytes == 32
    assert costs["5.prelu"].float_parameters == costs["5.after"].float_parameters == 8
    assert costs["8"].float_parameters == 12
    model(torch.randn(2, 3, 10, 10)).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


# ---- centres of weights


@pytest.mark.parametrize("activations", [None, "approx_sign"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_adabin(kind: str, geometry: str, activations: str | None) -> None:
    for scale_gradient in (True, False):
        layer, x = make(
            kind, geometry, activations=activations, scale="std", center="mean", scale_gradient=scale_gradient
        )
        latent = layer.weight.detach().clone().requires_grad_()
        weight = adabin_weight(latent, detached=not scale_gradient)
        seen = x if activations is None else Approx.apply(x)
        wanted = float_layer(layer, seen, weight, getattr(layer, "pad_value", 0))
        bias = layer.bias.view(-1, *[1] * (layer.weight.dim() - 2)) if kind != "linear" else layer.bias
        found, wanted = layer(x), wanted + bias
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        upstream = torch.randn_like(found)
        one, two = grads(found, upstream, x=x, w=layer.weight), grads(wanted, upstream, x=x, w=latent)
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("scale", ["channel", "tensor", "std", "learned", None])
@pytest.mark.parametrize("kind", KINDS)
def test_a_learned_centre(kind: str, scale: Any) -> None:
    layer, x = make(kind, "groups", scale=scale, center="learned", activations="approx_sign")
    column = (-1, *[1] * (layer.weight.dim() - 1))
    torch.testing.assert_close(layer.learned_center.detach(), layer.weight.detach().flatten(1).mean(1))
    layer.learned_center.data = torch.randn_like(layer.learned_center)
    given = layer.binary_weight()
    assert torch.equal(layer.binary_center(), layer.learned_center)
    center = layer.learned_center.detach().clone().requires_grad_()
    factor = torch.ones(1) if given.scale is None else given.scale
    wanted = float_layer(layer, Approx.apply(x), given.sign * factor.view(column) + center.view(column))
    found = layer(x) - (layer.bias if kind == "linear" else layer.bias.view(-1, *[1] * (layer.weight.dim() - 2)))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    upstream = torch.randn_like(found)
    one, two = grads(found, upstream, x=x, c=layer.learned_center), grads(wanted, upstream, x=x, c=center)
    torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)
    layer.reset_scale()
    torch.testing.assert_close(layer.learned_center.detach(), layer.weight.detach().flatten(1).mean(1))


def test_std_is_that_of_each_filter() -> None:
    layer = BinaryConv2d(3, 4, 3, scale="std")
    torch.testing.assert_close(layer.binary_weight().scale, layer.weight.detach().flatten(1).std(1, unbiased=False))
    assert layer.binary_center() is None
    assert BinaryConv2d(3, 4, 3, weights=None, activations="ste", center="mean").binary_center() is None
    assert "center='mean'" in repr(BinaryLinear(3, 2, center="mean"))


@pytest.mark.parametrize("center", ["mean", "learned"])
def test_layers_with_a_centre_keep_the_format_and_low_precision(center: Any) -> None:
    layer = BinaryConv2d(8, 16, 3, padding=1, activations="ste", center=center)
    x = torch.randn(2, 8, 6, 6).contiguous(memory_format=torch.channels_last)
    layer.to(memory_format=torch.channels_last).eval()
    y = layer(x)
    assert y.shape == (2, 16, 6, 6) and y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y[0], layer(x[0]))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = layer(x)
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), y, rtol=5e-2, atol=5e-2)
    half = layer.half()(x.half())
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), y, rtol=2e-2, atol=2e-2)
    assert layer(x[:0].half()).shape == (0, 16, 6, 6)


def test_sums_over_windows_are_counted() -> None:
    plain = BinaryConv2d(8, 12, 3, padding=1, bias=False, activations="ste", groups=4)
    costs = []
    for center in (None, "mean", "learned"):
        layer = BinaryConv2d(8, 12, 3, padding=1, bias=False, activations="ste", groups=4, center=center)  # type: ignore[arg-type]
        costs.append(abste.summary(nn.Sequential(layer), (1, 8, 5, 5)).layers[0])
    none, mean, learned = costs
    assert none.packed_bytes == plain.weight.numel() // 8 + 48
    ones = 8 * 9 // 8 + 4 * 12  # a filter of 2x3x3 bits for each of four groups, and twelve factors of one
    assert mean.packed_bytes == learned.packed_bytes == none.packed_bytes + ones + 4 * 12
    assert (mean.float_bytes, learned.float_bytes) == (none.float_bytes,) * 2
    assert mean.binary_macs == none.binary_macs + 4 * 18 * 25
    assert mean.float_macs == 12 * 25 and none.float_macs == 0


# ---- sets of activations


@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("geometry", GEOMETRIES)
@pytest.mark.parametrize("kind", KINDS)
def test_activations_of_adabin(kind: str, geometry: str, center: Any) -> None:
    for bias in (True, False):
        layer, x = make(
            kind, geometry, activations="approx_sign", scale="std", scale_gradient=True, center=center, bias=bias
        )
        adaptive = AdaptiveSet(layer, scale=0.7, center=0.4)
        alpha, beta = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 0.4))
        adaptive.scale.data.copy_(alpha), adaptive.center.data.copy_(beta)
        latent = layer.weight.detach().clone().requires_grad_()
        weight = adabin_weight(latent)
        if center is None:
            weight = weight - latent.flatten(1).mean(1).view(-1, *[1] * (latent.dim() - 1))
        seen = alpha * (Approx.apply((x - beta) / alpha) + beta)
        pad = alpha * (layer.pad_value + beta) if getattr(layer, "pad_value", 0) else 0.0
        wanted = float_layer(layer, seen, weight, pad)
        if bias:
            wanted = wanted + (layer.bias if kind == "linear" else layer.bias.view(-1, *[1] * (latent.dim() - 2)))
        found = adaptive(x)
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
        upstream = torch.randn_like(found)
        one = grads(found, upstream, x=x, w=layer.weight, alpha=adaptive.scale, beta=adaptive.center, bias=layer.bias)
        two = grads(wanted, upstream, x=x, w=latent, alpha=alpha, beta=beta, bias=layer.bias)
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-8)


def test_a_set_begins_as_the_plain_layer() -> None:
    layer = BinaryConv2d(4, 6, 3, padding=1, activations="ab_tanh")
    x = torch.randn(2, 4, 5, 5)
    wanted = copy.deepcopy(layer)(x)
    adaptive = AdaptiveSet(layer)
    torch.testing.assert_close(adaptive(x), wanted)
    torch.testing.assert_close(adaptive(x[0]), wanted[0])
    half = adaptive.half()(x.half())
    assert half.dtype == torch.float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adaptive.float()(x).dtype == torch.bfloat16


def test_the_zero_padding_of_a_set_is_counted() -> None:
    model = nn.Sequential(AdaptiveSet(BinaryConv2d(8, 12, 3, padding=1, bias=False, activations="ste")))
    rows = {row.name: row for row in abste.summary(model, (1, 8, 5, 5)).layers}
    assert rows["0.layer"].binary_macs == 12 * 72 * 25
    # Two numbers; a 1x1 filter of 8 bits that makes the ones, and their convolution with a factor per channel.
    assert rows["0"].packed_bytes == 8 + 1 + 4 * (12 * 9 + 12)
    assert (rows["0"].binary_macs, rows["0"].float_macs) == (8 * 25, 12 * 9 * 25)
    centered = AdaptiveSet(BinaryConv2d(8, 12, 3, padding=1, bias=False, activations="ste", center="mean"))
    row = abste.summary(nn.Sequential(centered), (1, 8, 5, 5)).layers[0]
    # With centres also a filter of 9 bits that counts what is no padding, and twice a factor per channel.
    assert row.packed_bytes == 8 + 3 + 4 * (12 * 9 + 12 + 24)
    assert row.float_macs == 12 * 9 * 25 + 9 * 25 + 12 * 25
    for layer in (BinaryConv2d(8, 12, 3, activations="ste"), BinaryLinear(8, 3, activations="ste")):
        size = (1, 8, 5, 5) if isinstance(layer, BinaryConv2d) else (1, 8)
        row = abste.summary(nn.Sequential(AdaptiveSet(layer)), size).layers[0]
        assert row.packed_bytes == 8 and row.float_macs == row.binary_macs == 0


# ---- conversion, compilation


def network(**options: Any) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        ChannelShift(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        RPReLU(8),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        Maxout(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )
    abste.convert(model, **{"activations": "ab_tanh", **options}, example_input=torch.zeros(2, 3, 8, 8))
    return model


def test_conversion_wraps_what_it_is_asked_to() -> None:
    model = network(adaptive_set=True, gradient_branch=0.25, center="mean", standardize="recu")
    for i in (3, 6):
        branch: Any = model[i]
        assert isinstance(branch, GradientBranch) and branch.eta == 0.25
        assert isinstance(branch.layer, AdaptiveSet)
        assert isinstance(branch.layer.layer, BinaryConv2d) and branch.layer.layer.center == "mean"
    again = abste.convert(model, activations="ste", keep_first=False, example_input=torch.zeros(2, 3, 8, 8))
    assert again.binarized[1:] == ["3.layer.layer", "6.layer.layer"]
    assert isinstance(network(activations=None, gradient_branch=0.1)[3], GradientBranch)
    mixed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    abste.convert(
        mixed,
        activations="ste",
        unsigned_inputs="batch_norm",
        keep_last=False,
        adaptive_set=True,
        example_input=torch.zeros(2, 3, 4, 4),
    )
    assert isinstance(mixed[2].layer, AdaptiveSet) and isinstance(mixed[4], AdaptiveSet)
    mixed(torch.randn(2, 3, 4, 4)).sum().backward()


@pytest.mark.parametrize("training", [True, False])
def test_wrappers_keep_the_mode(training: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)).train(training)
    abste.convert(model, activations="ste", adaptive_set=True, gradient_branch=0.1, example_input=torch.zeros(1, 4))
    assert all(module.training is training for module in model.modules())


@pytest.fixture
def dynamo() -> Iterator[Any]:
    torch._dynamo.reset()
    yield torch._dynamo
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "options",
    [
        {"standardize": "recu", "scale": "std", "scale_gradient": True, "center": "mean"},
        {"adaptive_set": True, "center": "learned"},
        {"gradient_branch": 0.5},
    ],
    ids=["recu, center", "set", "branch"],
)
def test_compiled_training_is_one_graph_throughout(dynamo: Any, options: dict[str, Any]) -> None:
    model = network(**options)
    twin = copy.deepcopy(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    schedules = [EstimatorSchedule(net, 10) for net in (model, twin)]
    for i in range(4):
        x = torch.randn(4, 3, 8, 8)
        found: list[dict[str, Tensor]] = []
        for net, call in ((model, compiled), (twin, twin)):
            net.zero_grad()
            with dynamo.config.patch(error_on_recompile=i > 0):
                y = call(x)
                y.square().sum().backward()
            found.append({"y": y.detach(), **{name: p.grad for name, p in net.named_parameters()}})
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)
        for schedule in schedules:
            schedule.step()


def test_training_lowers_the_loss() -> None:
    options = [
        {"standardize": "recu", "scale": "learned"},
        {"scale": "std", "scale_gradient": True, "center": "mean", "adaptive_set": True},
        {"gradient_branch": 0.5},
    ]
    for option, activations in itertools.product(options, ("approx_sign",)):
        model = network(activations=activations, **option)
        schedule = EstimatorSchedule(model, 60)
        optimizer = torch.optim.SGD(parameter_groups(model, 0.1), momentum=0.9)
        x, labels = torch.randn(32, 3, 8, 8), torch.randint(0, 4, (32,))
        losses = []
        for _ in range(60):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.7 * losses[0], option


def test_reset_makes_new_pieces() -> None:
    """As after `to_empty` of a model on the meta device, whose memory holds anything."""

    def build() -> nn.Sequential:
        layer = AdaptiveSet(BinaryLinear(4, 4, activations="dsq", bias=False), scale=0.5, center=0.25)
        return nn.Sequential(ChannelShift(4), RSign(4), RPReLU(4, 0.1), Maxout(4, 2.0, 0.5), layer)

    model = build()
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(7)
    torch.manual_seed(1)
    for module in model.modules():
        if callable(reset := getattr(module, "reset_parameters", None)):
            reset()
    fresh = build().state_dict()
    torch.manual_seed(1)
    fresh["4.layer.weight"] = BinaryLinear(4, 4, activations="dsq", bias=False).weight.detach()
    torch.testing.assert_close(model.state_dict(), fresh, rtol=0, atol=0)


# ---- bad input


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ChannelShift(0), "ChannelShift: channels must be a positive whole number, got 0"),
        (lambda: RSign(4.0), "must be a positive whole number, got 4.0"),  # type: ignore[arg-type]
        (lambda: RPReLU(-1), "RPReLU: channels must be"),
        (lambda: Maxout(True), "Maxout: channels must be"),
        (
            lambda: ChannelShift(4)(torch.zeros(2, 3, 4)),
            r"needs an input with 4 channels in dimension 1, got shape .2, 3, 4",
        ),
        (lambda: Maxout(4)(torch.zeros(4)), r"Maxout needs an input with 4 channels in dimension 1, got shape \(4,\)"),
        (lambda: RSign(4, None), "needs an estimator"),
        (lambda: RSign(4, momentum=1.5), r"BinaryActivation: momentum must lie in \[0, 1\], got 1.5"),
        (lambda: BinaryActivation(momentum=None), "BinaryActivation: momentum must be a number, got None"),  # type: ignore[arg-type]
        (lambda: RSign(4, "aprox_sign"), "did you mean 'approx_sign'"),
        (lambda: RPReLU(4, "0.1"), "RPReLU: slope must be a number"),  # type: ignore[arg-type]
        (lambda: AdaptiveSet(nn.Linear(3, 2)), "wraps a BinaryConv1d, BinaryConv2d or BinaryLinear, got Linear"),  # type: ignore[arg-type]
        (lambda: AdaptiveSet(BinaryLinear(3, 2)), "give it activations"),
        (lambda: AdaptiveSet(BinaryLinear(3, 2, activations="ste"), scale=0), "scale must not be 0"),
        (lambda: AdaptiveSet(BinaryLinear(3, 2, activations="ste"), center="0"), "center must be a number"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 2)(torch.zeros(1, 3), torch.tensor(0.5)), "offset needs a layer that binarises"),
        (lambda: BinaryLinear(3, 2, center="means"), "unknown center 'means'; did you mean 'mean'"),  # type: ignore[arg-type]
        (lambda: BinaryLinear(3, 2, scale="sdt"), "unknown scale 'sdt'; did you mean 'std'"),  # type: ignore[arg-type]
        (lambda: network(activations=None, adaptive_set=True), "adaptive_set .* needs activations"),
        (lambda: network(gradient_branch=-1), "GradientBranch: eta must lie in"),
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def test_binary_activation_is_within_rsign() -> None:
    assert isinstance(RSign(3).activation, BinaryActivation)
