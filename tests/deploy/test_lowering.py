"""From torch to the packed network: it computes what the model does, or says what it cannot pack."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import abste
from abste import models
from abste.deploy import export
from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Op, StepKind
from abste.deploy.lowering import lower
from abste.deploy.verification import verify
from abste.errors import ConfigError, ConversionError
from abste.estimators import Estimator
from abste.models.resnet import PadShortcut
from abste.nn import BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear
from abste.runtime.network import Network
from abste.runtime.reference import run

IMAGE, SIGNAL, VECTOR = (4, 8, 6), (4, 9), (5,)


class Forward(nn.Module):
    """A function of a module and its input, and the modules, parameters and buffers (tensors) that it uses."""

    def __init__(self, function: Callable[[Any, Tensor], Any], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


@torch.no_grad()
def stir(model: nn.Module) -> nn.Module:
    """Statistics and factors as after training: batch norms with negative and zero factors."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_mean is not None:
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
            if module.affine:
                module.weight.uniform_(-0.5, 1.5)
                module.weight[0] = 0
                module.bias.normal_(0, 0.3)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(-0.5, 0.5)
    return model.eval()


def check(model: nn.Module, shape: tuple[int, ...] = IMAGE, *, batch: int = 3, tolerance: float = 1e-5) -> Graph:
    """Lower a model, hold its outputs against torch's, and the two runtimes against each other."""
    state = copy.deepcopy(stir(model).state_dict())
    x = torch.randn(batch, *shape)
    file = abste_format.write(lower(model, x).graph)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    with torch.no_grad():
        wanted = model(x.clone())
    wanted = wanted if isinstance(wanted, tuple | list) else (wanted,)
    network = Network(np.frombuffer(file, np.uint8), "a test")
    found = network(x.numpy())
    found = found if isinstance(found, tuple) else (found,)
    graph = abste_format.read(file)
    nhwc = x.numpy().reshape(batch, *torch.Size(shape[:1]), *([1] * (3 - len(shape))), *shape[1:])
    values = run(graph, [np.moveaxis(nhwc, 1, -1)]).values
    assert len(found) == len(wanted)
    for one, other, index in zip(found, wanted, graph.outputs(), strict=True):
        assert one.shape == other.shape
        np.testing.assert_allclose(one, other.numpy(), rtol=0, atol=tolerance * float(other.abs().max()) + 1e-30)
        np.testing.assert_array_equal(one, np.moveaxis(values[index], -1, 1).reshape(one.shape))
    return graph


def ops(graph: Graph) -> list[Op]:
    return [node.op for node in graph.nodes]


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1x1": (lambda: nn.Conv2d(4, 7, 1), IMAGE),
    "no bias": (lambda: nn.Conv2d(4, 7, 3, bias=False), IMAGE),
    "strided": (lambda: nn.Conv2d(4, 7, (3, 2), (2, 3), (1, 0)), IMAGE),
    "dilated": (lambda: nn.Conv2d(4, 7, 3, padding=(2, 3), dilation=(2, 1)), IMAGE),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), IMAGE),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4), IMAGE),
    "same": (lambda: nn.Conv2d(4, 7, 3, padding="same", dilation=2), IMAGE),
    "same, even": (lambda: nn.Conv2d(4, 7, (2, 4), padding="same"), IMAGE),
    "valid": (lambda: nn.Conv2d(4, 7, 3, padding="valid"), IMAGE),
    "1d": (lambda: nn.Conv1d(4, 7, 3, 2, 1), SIGNAL),
    "1d same": (lambda: nn.Conv1d(4, 8, 4, padding="same", dilation=2, groups=2), SIGNAL),
    "linear": (lambda: nn.Linear(5, 33), VECTOR),
    "linear, no bias": (lambda: nn.Linear(5, 3, bias=False), VECTOR),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name: str) -> None:
    build, shape = CONVOLUTIONS[name]
    assert ops(check(build(), shape)) == [Op.CONV]


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU in place": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "PReLU": nn.PReLU,
    "PReLU per channel": lambda: nn.PReLU(4),
    "Hardtanh": lambda: nn.Hardtanh(-0.5, 1.5, inplace=True),
    "GELU": nn.GELU,
    "GELU tanh": lambda: nn.GELU(approximate="tanh"),
    "SiLU": lambda: nn.SiLU(inplace=True),
    "Sigmoid": nn.Sigmoid,
    "Hardswish": nn.Hardswish,
    "Hardsigmoid": nn.Hardsigmoid,
    "Tanh": nn.Tanh,
    "clamp": lambda: Forward(lambda m, x: x.clamp(-0.3, 0.7)),
    "clamp below": lambda: Forward(lambda m, x: x.clamp(min=0.1)),
    "clamp above": lambda: Forward(lambda m, x: torch.clamp_max(x, 0.1)),
    "Identity": nn.Identity,
    "Dropout": nn.Dropout,
    "Dropout2d": nn.Dropout2d,
    "negative": lambda: Forward(lambda m, x: -x),
    "number": lambda: Forward(lambda m, x: 1 - (3 * x + 0.25) / 4),
    "add with alpha": lambda: Forward(lambda m, x: torch.add(x, 2, alpha=3)),
    "divided by constants": lambda: Forward(
        lambda m, x: x / m.std - m.mean, std=torch.rand(4, 1, 1) + 1, mean=torch.rand(1)
    ),
    "constants first": lambda: Forward(lambda m, x: m.c - x * 2, c=torch.rand(1, 4, 1, 1)),
    "tensor in the forward": lambda: Forward(lambda m, x: x * torch.tensor([1.0, -2, 0, 3]).view(1, 4, 1, 1)),
    "x + x": lambda: Forward(lambda m, x: x + x),
    "x x": lambda: Forward(lambda m, x: x * x),
    "x sigmoid(x)": lambda: Forward(lambda m, x: x.mul_(x.sigmoid())),
    "difference": lambda: Forward(lambda m, x: x.tanh() - x),
    "sum with alpha": lambda: Forward(lambda m, x: torch.sub(x.tanh(), x, alpha=-2)),
    "RPReLU": lambda: Forward(
        lambda m, x: m.act(x + m.b) + m.c,
        act=nn.PReLU(4),
        b=nn.Parameter(torch.randn(1, 4, 1, 1)),
        c=nn.Parameter(torch.randn(1, 4, 1, 1)),
    ),
    "BatchNorm2d": lambda: nn.BatchNorm2d(4),
    "BatchNorm2d, not affine": lambda: nn.BatchNorm2d(4, affine=False, eps=0.1),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("behind", ["input", "convolution"])
def test_steps(name: str, behind: str) -> None:
    module = ACTIVATIONS[name]()
    if behind == "input":
        assert set(ops(check(module))) == {Op.IDENTITY}
        return
    graph = check(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1), module))
    assert graph.nodes[0].op is Op.CONV
    if name not in ("x x", "x sigmoid(x)", "difference", "sum with alpha", "x + x"):
        assert len(graph.nodes) == 1
    if name in ("number", "BatchNorm2d", "negative"):  # behind the bias, which is an intermediate of its own
        last = StepKind.MULTIPLY if name == "negative" else StepKind.AFFINE
        assert [step.kind for step in graph.nodes[0].steps] == [StepKind.ADD, last]


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.BatchNorm1d(4), SIGNAL),
        (nn.BatchNorm1d(5), VECTOR),
        (nn.BatchNorm1d(5, affine=False), VECTOR),
        (nn.PReLU(4), SIGNAL),
        (nn.PReLU(5), VECTOR),
        (Forward(lambda m, x: m.a * x + m.b, a=torch.randn(5), b=torch.randn(1, 5)), VECTOR),
        (Forward(lambda m, x: (x + 1).mul_(m.a), a=torch.randn(4, 1)), SIGNAL),
    ],
    ids=str,
)
def test_steps_of_vectors_and_signals(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(module, shape)


POOLS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "max": (nn.MaxPool2d(2), IMAGE),
    "max, padded": (nn.MaxPool2d(3, 2, 1), IMAGE),
    "max, dilated": (nn.MaxPool2d((3, 2), (1, 2), 1, dilation=(2, 3)), IMAGE),
    "max, ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (4, 8, 7)),
    "max, ceil and padded": (nn.MaxPool2d((2, 3), 3, (1, 1), ceil_mode=True), IMAGE),
    "max 1d": (nn.MaxPool1d(3, 2, 1), SIGNAL),
    "max with indices": (Forward(lambda m, x: F.max_pool2d(x, 2, return_indices=True)[0]), IMAGE),
    "average": (nn.AvgPool2d((2, 3)), IMAGE),
    "average, padded": (nn.AvgPool2d(3, 2, 1), IMAGE),
    "average, padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), IMAGE),
    "average, ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), (4, 8, 7)),
    "average, ceil and padded": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), IMAGE),
    "average, ceil, not counted": (nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False), IMAGE),
    "average 1d": (nn.AvgPool1d(3, 2, 1), SIGNAL),
    "global average": (nn.AdaptiveAvgPool2d(1), IMAGE),
    "adaptive average": (nn.AdaptiveAvgPool2d((4, 2)), IMAGE),
    "adaptive average, a side as it is": (nn.AdaptiveAvgPool2d((None, 1)), IMAGE),
    "adaptive average 1d": (nn.AdaptiveAvgPool1d(3), SIGNAL),
    "global maximum": (nn.AdaptiveMaxPool2d(1), IMAGE),
    "adaptive maximum": (nn.AdaptiveMaxPool2d((2, 3)), IMAGE),
    "adaptive maximum 1d": (nn.AdaptiveMaxPool1d(1), SIGNAL),
    "mean": (Forward(lambda m, x: x.mean((2, 3))), IMAGE),
    "mean, keepdim": (Forward(lambda m, x: x.mean((-1, -2), keepdim=True)), IMAGE),
    "mean 1d": (Forward(lambda m, x: x.mean(-1)), SIGNAL),
    "amax": (Forward(lambda m, x: x.amax((2, 3))), IMAGE),
}


@pytest.mark.parametrize("name", POOLS)
def test_pools(name: str) -> None:
    model, shape = POOLS[name]
    maximum = "max" in name
    assert ops(check(model, shape)) == [Op.MAX_POOL if maximum else Op.AVERAGE_POOL]


def squeeze_and_excite(form: str) -> nn.Module:
    def convolutions(m: Any, x: Tensor) -> Tensor:
        return x * m.up(m.down(x.mean((2, 3), keepdim=True)).relu_()).sigmoid()

    def linears(m: Any, x: Tensor) -> Tensor:
        y = F.adaptive_avg_pool2d(x, 1).view(x.shape[0], -1)
        return x * F.hardsigmoid(m.up(F.silu(m.down(y)))).view(x.shape[0], -1, 1, 1)

    if form == "convolution":
        return Forward(convolutions, down=nn.Conv2d(4, 2, 1), up=nn.Conv2d(2, 4, 1))
    return Forward(linears, down=nn.Linear(4, 2), up=nn.Linear(2, 4))


def changed_in_place(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    before, alias = y * 2, m.dropout(y)
    y += 1
    alias.relu_()
    return before + y


SHAPES: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "concatenate": (Forward(lambda m, x: torch.cat([m.conv(x), x], 1), conv=nn.Conv2d(4, 3, 1)), IMAGE),
    "concatenate three": (Forward(lambda m, x: torch.cat([x, x.tanh(), x], -3)), IMAGE),
    "concatenate one": (Forward(lambda m, x: torch.cat([x], 1)), IMAGE),
    "concatenate vectors": (Forward(lambda m, x: torch.cat([x, -x], -1)), VECTOR),
    "flatten": (nn.Sequential(nn.Conv2d(4, 3, 3), nn.Flatten(), nn.Linear(72, 5)), IMAGE),
    "flatten signals": (nn.Sequential(nn.Flatten(), nn.Linear(36, 5)), SIGNAL),
    "view": (Forward(lambda m, x: m.fc(x.relu().view(x.shape[0], -1)), fc=nn.Linear(192, 3)), IMAGE),
    "reshape": (Forward(lambda m, x: m.fc(x.reshape(-1, 192)), fc=nn.Linear(192, 3)), IMAGE),
    "squeeze": (Forward(lambda m, x: F.max_pool2d(x, (8, 6)).squeeze(3).squeeze(-1)), IMAGE),
    "unsqueeze": (Forward(lambda m, x: m.conv(x[:, :, None, None]), conv=nn.Conv2d(5, 3, 1)), VECTOR),
    "signal as an image": (Forward(lambda m, x: m.conv(x.unsqueeze(2)), conv=nn.Conv2d(4, 3, (1, 3))), SIGNAL),
    "pad": (Forward(lambda m, x: F.pad(x, (1, 2, 0, 3))), IMAGE),
    "pad with a number": (Forward(lambda m, x: F.pad(x, (1, 2), value=-1.5)), SIGNAL),
    "pad channels": (Forward(lambda m, x: F.pad(x, (0, 0, 0, 0, 1, 2))), IMAGE),
    "pad vectors": (Forward(lambda m, x: F.pad(x, (2, 1), value=0.1)), VECTOR),
    "pad by nothing": (Forward(lambda m, x: F.pad(x, (0, 0)) * 2), IMAGE),
    "ZeroPad2d": (nn.Sequential(nn.ZeroPad2d((1, 0, 2, 0)), nn.Conv2d(4, 3, 3, 2)), IMAGE),
    "every second pixel": (Forward(lambda m, x: x[:, :, ::2, ::2]), IMAGE),
    "every third row": (Forward(lambda m, x: x[:, :, ::3]), IMAGE),
    "every second column, read twice": (Forward(lambda m, x: (y := x[..., ::2]) + y.relu()), (4, 7, 5)),
    "squeeze and excite": (squeeze_and_excite("convolution"), IMAGE),
    "squeeze and excite, linear": (squeeze_and_excite("linear"), IMAGE),
    "in place": (Forward(changed_in_place, conv=nn.Conv2d(4, 4, 1), dropout=nn.Dropout()), IMAGE),
    "input changed in place": (Forward(lambda m, x: (x.relu_() - 1) * x), IMAGE),
    "contiguous, clone, float": (Forward(lambda m, x: x.contiguous().clone().float().detach() + 1), IMAGE),
    "several outputs": (Forward(lambda m, x: (y := m.conv(x), y.relu(), y.tanh()), conv=nn.Conv2d(4, 3, 1)), IMAGE),
    "outputs in another order": (
        Forward(lambda m, x: ((y := m.conv(x)).relu(), x, y, m.conv(x)), conv=nn.Conv2d(4, 4, 1)),
        IMAGE,
    ),
    "an output twice": (Forward(lambda m, x: (y := m.conv(x), y), conv=nn.Conv2d(4, 3, 1)), IMAGE),
    "an output that is read": (
        Forward(lambda m, x: (y := m.conv(x), m.conv(y.relu())), conv=nn.Conv2d(4, 4, 1)),
        IMAGE,
    ),
    "the input": (Forward(lambda m, x: x), IMAGE),
    "the input twice, and more": (Forward(lambda m, x: [x, x * 2, x]), SIGNAL),
    "a module used twice": (Forward(lambda m, x: m.conv(m.conv(x).relu()), conv=nn.Conv2d(4, 4, 3, padding=1)), IMAGE),
    "a binary module used twice": (
        Forward(lambda m, x: m.conv(m.conv(x)), conv=BinaryConv2d(4, 4, 3, activations="ste")),
        IMAGE,
    ),
    "what nothing reads": (Forward(lambda m, x: (m.unused(x).argmax(1), x * 2)[1], unused=nn.Linear(6, 3)), IMAGE),
}


@pytest.mark.parametrize("name", SHAPES)
def test_networks_of_pieces(name: str) -> None:
    model, shape = SHAPES[name]
    check(model, shape)


def test_shared_weights() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)
            self.b = self.a
            self.c = BinaryConv2d(4, 4, 1, activations="ste")
            self.d = self.c

        def forward(self, x: Tensor) -> Tensor:
            return self.d(self.c(self.b(self.a(x))) - 0.1)

    assert [node.name for node in check(Shared()).nodes] == ["a", "b", "c", "d"]


def standardised(m: Any, x: Tensor) -> Tensor:
    weight = m.conv.weight - m.conv.weight.mean((1, 2, 3), keepdim=True)
    weight /= weight.std((1, 2, 3), keepdim=True)
    var, mean = torch.var_mean(m.conv.bias)
    return F.conv2d(x, weight, (m.conv.bias - mean) / var.sqrt())


def test_what_depends_on_parameters_alone_is_folded() -> None:
    assert ops(check(Forward(standardised, conv=nn.Conv2d(4, 5, 3)))) == [Op.CONV]


def test_dense_networks_share_concatenations() -> None:
    def dense(m: Any, x: Tensor) -> Tensor:
        parts = [x]
        for conv in m.convs:
            parts.append(conv(torch.cat(parts, 1)))
        return torch.cat(parts, 1)

    convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 1) for i in range(5))
    assert ops(check(Forward(dense, convs=convs))).count(Op.CONCAT) == 5


# Binary layers

BINARY: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "1x1": (lambda **o: BinaryConv2d(4, 7, 1, **o), IMAGE),
    "strided": (lambda **o: BinaryConv2d(4, 33, 3, (2, 1), 1, bias=False, **o), IMAGE),
    "dilated": (lambda **o: BinaryConv2d(4, 7, (3, 2), padding=(2, 1), dilation=(2, 1), **o), IMAGE),
    "grouped": (lambda **o: BinaryConv2d(4, 6, 3, padding=1, groups=2, **o), IMAGE),
    "depthwise": (lambda **o: BinaryConv2d(4, 4, 3, padding=1, groups=4, **o), IMAGE),
    "same, even": (lambda **o: BinaryConv2d(4, 7, (2, 4), padding="same", **o), IMAGE),
    "many channels": (lambda **o: BinaryConv2d(70, 3, 3, padding=1, **o), (70, 4, 3)),
    "1d": (lambda **o: BinaryConv1d(4, 7, 3, 2, 1, **o), SIGNAL),
    "1d same": (lambda **o: BinaryConv1d(4, 8, 4, padding="same", groups=2, **o), SIGNAL),
    "linear": (lambda **o: BinaryLinear(65, 33, **o), (65,)),
    "linear, no bias": (lambda **o: BinaryLinear(5, 3, bias=False, **o), VECTOR),
}


def assert_verified(model: nn.Module, shape: tuple[int, ...], *, count: int = 4, integers: bool | None = None) -> Graph:
    """Lower a model and verify it on noise, whose numbers include zeros of both signs."""
    x = torch.randn(count, *shape)
    x[torch.rand_like(x) < 0.1] = 0
    x[torch.rand_like(x) < 0.1] = -0.0
    file = abste_format.write(lower(model, x).graph)
    found = verify(model, file, [(x[:1], None), (x[1:], None)], "noise", reference_images=2)
    assert found.passed, str(found)
    assert integers is None or (found.integers > 0) == integers
    return abste_format.read(file)


@pytest.mark.parametrize("name", BINARY)
@pytest.mark.parametrize("bits", ["W1A1", "W1A32", "W32A1"])
def test_binary_layers(name: str, bits: str) -> None:
    build, shape = BINARY[name]
    weights, activations = {"W1A1": ("ste", "ste"), "W1A32": ("ab_tanh", None), "W32A1": (None, "ste")}[bits]
    layer = build(weights=weights, activations=activations).eval()
    graph = check(layer, shape)
    assert graph.nodes[-1].op is {"W1A1": Op.XNOR, "W1A32": Op.SIGN_CONV, "W32A1": Op.CONV}[bits]
    if bits != "W32A1":
        assert_verified(layer, shape, integers=bits == "W1A1")


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
@pytest.mark.parametrize("name", ["dilated", "depthwise", "same, even", "1d", "1d same"])
@pytest.mark.parametrize("weights", ["ste", None])
def test_what_padding_adds_to_bits(name: str, pad_value: int, weights: str | None) -> None:
    build, shape = BINARY[name]
    layer = build(weights=weights, activations="ste", pad_value=pad_value)
    graph = check(layer, shape)
    if weights:
        (node,) = [node for node in graph.nodes if node.op is Op.XNOR]
        assert node.pad_value == pad_value
        assert_verified(layer, shape, integers=True)


@pytest.mark.parametrize(
    "options", [{"scale": s} for s in ("channel", "tensor", "learned", None)] + [{"standardize": False}], ids=str
)
@pytest.mark.parametrize("activations", ["ste", None])
@pytest.mark.parametrize("name", ["grouped", "1d", "linear"])
def test_scales_and_raw_latents(name: str, activations: str | None, options: dict[str, Any]) -> None:
    build, shape = BINARY[name]
    layer: Any = build(activations=activations, **options)
    with torch.no_grad():
        layer.weight.view(-1)[::3] = 0  # whose sign is +1 where latents are raw
        layer.weight.view(-1)[1] = -0.0
        if layer.learned_scale is not None:
            layer.learned_scale.copy_(torch.randn(len(layer.learned_scale)))
            layer.learned_scale[:2] = torch.tensor([0.0, -2.0])
    check(layer, shape)
    assert_verified(layer, shape)


def test_integers_are_those_of_the_signs() -> None:
    layer = BinaryConv2d(37, 5, 3, 2, 1, activations="ste")
    model = nn.Sequential(layer, nn.BatchNorm2d(5)).eval()
    x = torch.randn(2, 37, 6, 5)
    network = Network(np.frombuffer(abste_format.write(lower(model, x).graph), np.uint8), "a test")
    y, found = network(x.numpy(), intermediates=["0", "1"])
    signs = torch.where(x >= 0, 1.0, -1.0)
    wanted = F.conv2d(signs, layer.binary_weight().sign, None, 2, 1)
    assert found["0"].dtype == np.int32
    np.testing.assert_array_equal(found["0"], wanted.numpy())
    np.testing.assert_array_equal(found["1"], y)


def check_intermediates(model: nn.Module, shape: tuple[int, ...]) -> list[str]:
    """Each is what PyTorch's module gives, or the integer sums of a binary layer; their names."""
    x = torch.randn(2, *shape)
    network = Network(np.frombuffer(abste_format.write(lower(model, x).graph), np.uint8), "a test")
    given: dict[str, Tensor] = {}
    modules = dict(model.named_modules())
    handles = [
        module.register_forward_hook(lambda _, __, output, name=name: given.update({name: output}))
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    names = [name for name in network.intermediates() if name in modules]  # not the parts of a layer's twin
    _, found = network(x.numpy(), intermediates=names)
    xnor = [node.name for node in network.nodes if node.operation == "xnor"]
    for name in names:
        shape = given[name].shape
        if found[name].ndim == 2:  # a flattening follows
            assert shape == (*found[name].shape, *[1] * (len(shape) - 2)), name
            given[name] = given[name].flatten(1)
        else:
            assert found[name].shape == shape, name
        if name in xnor:
            assert found[name].dtype == np.int32
        else:
            scale = float(given[name].abs().max())
            np.testing.assert_allclose(found[name], given[name].numpy(), rtol=0, atol=1e-4 * scale, err_msg=name)
    return names


ste = {"weights": "ste", "activations": "ste"}


class PoolConvDouble(nn.Module):
    """What it gives is made of a node of its own and of its layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(5, 5, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.max_pool2d(x, 2)) * 2


def test_intermediates_are_what_modules_give() -> None:
    first = (nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), BinaryConv2d(5, 6, 3, **ste), nn.BatchNorm2d(6))
    last = (nn.Hardtanh(), BinaryConv2d(6, 5, 2, **ste), nn.BatchNorm2d(5), nn.Flatten(), nn.Linear(5 * 3, 3))
    names = check_intermediates(stir(nn.Sequential(*first, *last)), IMAGE)
    assert names == ["0", "1", "2", "5", "6", "8"]  # 3 and 4 have gone into bits
    pooled = nn.Sequential(nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    assert check_intermediates(stir(nn.Sequential(*pooled, nn.BatchNorm1d(5))), IMAGE) == ["0", "1", "2", "4"]
    double = nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU(), PoolConvDouble(), nn.BatchNorm2d(5))
    assert check_intermediates(stir(double), (4, 12, 12)) == ["0", "1", "2", "2.conv", "3"]
    means = nn.Sequential(nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5), Forward(lambda _, x: x.mean((2, 3))), nn.Linear(5, 3))
    assert check_intermediates(stir(means), IMAGE) == ["0", "1", "2", "3"]
    centred = BinaryConv2d(4, 5, 3, weights="ste", center="mean")
    assert check_intermediates(stir(nn.Sequential(centred, nn.BatchNorm2d(5), nn.ReLU())), IMAGE) == ["0", "1", "2"]
    model = stir(nn.Sequential(BinaryConv2d(4, 5, 3), nn.BatchNorm2d(5)))
    file = abste_format.write(lower(model, torch.zeros(1, *IMAGE)).graph)
    network = Network(np.frombuffer(file, np.uint8), "a test")
    with pytest.raises(ConfigError, match=r"^no output of '0' stands anywhere in this network \(it may be folded"):
        network(np.zeros((1, *IMAGE), np.float32), intermediates="0")


@pytest.mark.parametrize(
    "name", ["resnet8", "resnet8_bireal", "imagenet_resnet18_bireal", "vgg_small", "react_resnet18"]
)
@pytest.mark.parametrize("bits", ["W1A32", "W1A1"])
def test_intermediates_of_our_networks(name: str, bits: str) -> None:
    model = models.create(name, width=4, num_classes=7)
    x = torch.randn(2, 3, 32, 32)
    activations = "ste" if bits == "W1A1" else None
    abste.convert(stir(model), activations=activations, example_input=x, unsigned_inputs="batch_norm")
    names = check_intermediates(model.eval(), (3, 32, 32))
    assert "layer1.0.bn2" in names or name == "vgg_small"


SIGNS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "sign alone": (BinaryActivation("ste"), IMAGE),
    "sign of a sign": (nn.Sequential(BinaryActivation("ste"), BinaryActivation("ste")), VECTOR),
    "sign, then a layer without": (nn.Sequential(BinaryActivation("ste"), BinaryConv2d(4, 3, 3)), IMAGE),
    "sign, then a layer with": (nn.Sequential(BinaryActivation("ste"), BinaryConv2d(4, 3, 3, **ste)), IMAGE),
    "sign, then a float layer": (nn.Sequential(BinaryActivation("ste"), nn.Conv2d(4, 3, 3)), IMAGE),
    "sign, identity": (nn.Sequential(BinaryActivation("ste"), nn.Identity(), BinaryConv1d(4, 3, 3)), SIGNAL),
    "sign, flattened": (nn.Sequential(BinaryActivation("ste"), nn.Flatten(), BinaryLinear(192, 3)), IMAGE),
    "sign of a pixel, flattened": (
        nn.Sequential(nn.AdaptiveAvgPool2d(1), BinaryActivation("ste"), nn.Flatten(), BinaryLinear(4, 3)),
        IMAGE,
    ),
    "sign, also as floats": (
        Forward(
            lambda m, x: (y := m.sign(x)) * 0.5 + m.conv(y), sign=BinaryActivation("ste"), conv=BinaryConv2d(4, 4, 1)
        ),
        IMAGE,
    ),
    "sign, pooled": (nn.Sequential(BinaryActivation("ste"), nn.AvgPool2d(2)), IMAGE),
    "two layers of one input": (
        Forward(
            lambda m, x: m.a(y := m.bn(x)) + m.b(y),
            bn=nn.BatchNorm2d(4),
            a=BinaryConv2d(4, 5, 1, **ste),
            b=BinaryConv2d(4, 5, 1, **ste),
        ),
        IMAGE,
    ),
    "sign, then changed in place": (
        Forward(
            lambda m, x: m.conv(y := m.sign(z := m.bn(x))) + z.neg_() * y,
            bn=nn.BatchNorm2d(4),
            sign=BinaryActivation("ste"),
            conv=BinaryConv2d(4, 4, 1),
        ),
        IMAGE,
    ),
}


@pytest.mark.parametrize("name", SIGNS)
def test_signs(name: str) -> None:
    model, shape = SIGNS[name]
    graph = check(model, shape)
    bits = sum(value.kind is Kind.BITS for value in graph.values)
    assert bits == any(isinstance(module, BinaryConv1d | BinaryConv2d | BinaryLinear) for module in model.modules())


def chain(act: Callable[[], nn.Module], batch_norm: nn.Module | None = None) -> nn.Module:
    norm = batch_norm or nn.BatchNorm2d(6)
    return nn.Sequential(BinaryConv2d(4, 6, 3, bias=False, **ste), norm, act(), BinaryConv2d(6, 5, 2, **ste))


@pytest.mark.parametrize(
    ("act", "threshold"),
    [
        (nn.Identity, True),
        (nn.Hardtanh, True),
        (nn.ReLU, True),  # a constant
        (nn.Tanh, True),
        (nn.Sigmoid, True),
        (lambda: nn.LeakyReLU(0.1), True),
        (lambda: nn.LeakyReLU(-0.1), True),  # a constant again, but for rounding
        (lambda: Forward(lambda m, x: (x - 0.5) * (-0.25)), True),
        (lambda: Forward(bent_silu), False),
        (lambda: Forward(bent_gelu), False),
        (lambda: Forward(lambda m, x: F.hardswish(x) + 0.25), False),
        (lambda: Forward(lambda m, x: F.prelu(x, m.a) - 0.5, a=torch.tensor([-1.0])), False),
    ],
    ids=[
        *("identity", "hardtanh", "relu", "tanh", "sigmoid", "leaky", "leaky, negative", "linear"),
        *("silu", "gelu", "hardswish", "prelu"),
    ],
)
def test_thresholds_where_the_steps_rise_or_fall(act: Callable[[], nn.Module], threshold: bool) -> None:
    model = chain(act)
    norm: Any = model[1]  # type: ignore[index]
    with torch.no_grad():  # exact, with ties; the sums are 36 at most, and the bend of an activation is within
        norm.eps = 0.0
        norm.running_var.fill_(16)
        norm.weight.copy_(torch.tensor([1.0, 1, -2, 1, -0.5, 0]))
        norm.bias.copy_(torch.tensor([0.0, -1, 0.5, 0, 0.25, 0]))
        model[0].weight.copy_(torch.randn_like(model[0].weight).sign() + 0.0)  # type: ignore[index, operator, union-attr]
    graph = assert_verified(model.eval(), IMAGE, count=6, integers=True)
    first = next(node for node in graph.nodes if node.op is Op.XNOR)
    assert first.out is None
    assert (first.steps[0].kind is StepKind.THRESHOLD) == threshold


def test_report() -> None:
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), chain(nn.Identity, None), BinaryConv2d(5, 3, 1))
    layers = lower(model.eval(), torch.zeros(1, 4, 9, 9), float16=True).report.layers
    assert [(x.name, x.packed, x.weights) for x in layers] == [
        ("0", "float", 144),
        ("2.0", "xnor", 216),
        ("2.3", "xnor", 120),
        ("3", "sign_conv", 15),
    ]
    assert [x.nbytes for x in layers] == [288, 27, 15, 2]
    assert "float16" in layers[0].why and layers[1].why == "threshold on integer sums" and not layers[2].why


# Random networks

exact = st.sampled_from([-2.0, -1.0, -0.5, -0.0, 0.0, 0.25, 0.5, 1.0, 2.0])


def bent_silu(m: Any, x: Tensor) -> Tensor:
    """Falls and rises through zero. Without the shift nothing but its tail might be seen, where erf is not as exact."""
    return F.silu(x) + 0.25


def bent_gelu(m: Any, x: Tensor) -> Tensor:
    return F.gelu(x) + 0.125


@st.composite
def networks(draw: st.DrawFn) -> tuple[nn.Module, tuple[int, ...]]:
    """Binary convolutions, batch norms and activations in a row.

    Numbers are binary fractions, so ties arise. Sums of floats that are none would cancel to their rounding, and no two
    orders of summation agree on its sign: only where all inputs are binary may scales and activations be any.
    """
    torch.manual_seed(draw(st.integers(0, 2**16)))
    dims = draw(st.sampled_from([1, 2, 2]))
    conv, norm = (BinaryConv1d, nn.BatchNorm1d) if dims == 1 else (BinaryConv2d, nn.BatchNorm2d)
    channels = draw(st.sampled_from([1, 3, 6, 13, 33, 67]))
    sides = [draw(st.integers(1, 7)) for _ in range(dims)]
    shape = (channels, *sides)
    acts = [nn.Identity(), nn.Hardtanh(), nn.ReLU(), nn.PReLU()]
    scales: list[Any] = ["learned", None]
    inputs: list[str | None] = ["ste", None]
    if draw(st.booleans()):
        acts += [nn.Tanh(), Forward(bent_silu), Forward(bent_gelu)]
        scales += ["channel", "tensor"]
        inputs = ["ste"]
    layers: list[nn.Module] = []
    for _ in range(draw(st.integers(1, 3))):
        groups = draw(st.sampled_from([g for g in (1, 1, 3, channels) if channels % g == 0]))
        outputs = groups * draw(st.sampled_from([1, 2, 5] if groups > 1 else [1, 7, 35]))
        dilation = draw(st.integers(1, 2))
        padding = [draw(st.integers(0, 2)) for _ in range(dims)]
        kernel = [
            draw(st.integers(1, min(3, (n + 2 * p - 1) // dilation + 1))) for n, p in zip(sides, padding, strict=True)
        ]
        stride = draw(st.integers(1, 2))
        activations = draw(st.sampled_from(inputs))
        layer = conv(
            channels,
            outputs,
            tuple(kernel),
            stride,
            tuple(padding),
            dilation,
            groups,
            draw(st.booleans()),
            weights="ste",
            activations=activations,
            scale=draw(st.sampled_from(scales)),
            standardize=draw(st.booleans()),
            pad_value=draw(st.sampled_from([-1, 0, 1])) if activations else 0,
        )
        batch_norm = norm(outputs, eps=0.0)
        with torch.no_grad():
            for tensor in (
                batch_norm.weight,
                batch_norm.bias,
                batch_norm.running_mean,
                layer.bias,
                layer.learned_scale,
            ):
                if tensor is not None:
                    few = torch.tensor(draw(st.lists(exact, min_size=1, max_size=4)))
                    tensor.copy_(few.repeat(outputs)[:outputs])
            batch_norm.running_var.fill_(draw(st.sampled_from([1.0, 0.25, 4.0])))
        layers += [layer, batch_norm, draw(st.sampled_from(acts))]
        channels = outputs
        sides = [
            (n + 2 * p - dilation * (k - 1) - 1) // stride + 1 for n, p, k in zip(sides, padding, kernel, strict=True)
        ]
    layers.append(nn.Flatten())
    if draw(st.booleans()):
        layers.append(BinaryLinear(channels * math.prod(sides), 5, activations=draw(st.sampled_from(["ste", None]))))
    # One logit is 1: where the others cancel, rounding is all that is left of them.
    layers.append(nn.ConstantPad1d((0, 1), 1.0))
    return nn.Sequential(*layers).eval(), shape


@settings(max_examples=80)
@given(network=networks())
def test_random_networks(network: tuple[nn.Module, tuple[int, ...]]) -> None:
    model, shape = network
    x = torch.randn(3, *shape).mul(4).round().div(4)  # zeros too
    file = abste_format.write(lower(model, x).graph)
    found = verify(model, file, [(x[:1], None), (x[1:], None)], "random images")
    assert found.passed, str(found)
    empty = Network(np.frombuffer(file, np.uint8), "a test")(x[:0].numpy())
    assert empty.shape == (0, *model(x).shape[1:])


# Whole networks


# tests/models/test_imagenet.py has those that are made of more than these.
@pytest.mark.parametrize("name", [name for name in models.available() if not name.startswith(("react", "quicknet"))])
@pytest.mark.parametrize("bits", ["W32A32", "W1A32", "W1A1"])
def test_our_networks(name: str, bits: str) -> None:
    model = models.create(name, width=8, num_classes=7)
    x = torch.randn(2, 3, 32, 32)
    stir(model)
    if bits != "W32A32":
        abste.convert(model, activations="ste" if bits == "W1A1" else None, example_input=x)
    model.eval()
    lowered = lower(model, x)
    found = verify(model, abste_format.write(lowered.graph), [(x, None)], "noise", reference_images=0)
    assert found.passed, str(found)
    packed = {layer.packed for layer in lowered.report.layers}
    assert packed == {"W32A32": {"float"}, "W1A32": {"float", "sign_conv"}, "W1A1": {"float", "xnor"}}[bits]
    nodes = {nn.Conv2d: 1, nn.Linear: 1, PadShortcut: 2, nn.MaxPool2d: 1, nn.AvgPool2d: 1, nn.AdaptiveAvgPool2d: 1}
    wanted = sum(count for module in model.modules() for kind, count in nodes.items() if isinstance(module, kind))
    wanted += name == "vgg_small"  # it flattens 4x4 places: a reordering, where 1x1 is none
    assert len(lowered.graph.nodes) == wanted


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "mobilenet_v3_small",
        "squeezenet1_1",
        "regnet_y_400mf",
        pytest.param("resnet18", marks=slow),
        pytest.param("mobilenet_v2", marks=slow),
        pytest.param("efficientnet_b0", marks=slow),
        pytest.param("densenet121", marks=slow),
        pytest.param("mnasnet0_5", marks=slow),
        pytest.param("googlenet", marks=slow),
        pytest.param("vgg11_bn", marks=slow),
    ],
)
def test_networks_of_torchvision(name: str) -> None:
    options: dict[str, Any] = {"aux_logits": False, "init_weights": False} if name == "googlenet" else {}
    model = stir(getattr(torchvision.models, name)(weights=None, num_classes=10, **options))
    x = torch.randn(2, 3, *([224, 224] if name.startswith("vgg") else [64, 64]))
    file = abste_format.write(lower(model, x).graph)
    found = verify(model, file, [(x, None)], "noise", reference_images=0)
    assert found.passed, str(found)


# What is refused


class NotPlain(Estimator):
    """A binarizer that is something else at inference."""

    plain_bits = False
    defaults = {}

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad


class TwoInputs(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


def stale_view(m: Any, x: Tensor) -> Tensor:
    y = x * 2
    rows = y.flatten(1)
    y += 1
    return m.fc(rows)


def counting(m: Any, x: Tensor) -> Tensor:
    m.count += 1
    return x * 2


def replaced_buffer(m: Any, x: Tensor) -> Tensor:
    m.count = m.count * 0.9
    return x * 2


REFUSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], str]] = {
    "unknown": (
        lambda: nn.Sequential(nn.Identity(), nn.Softmax(1)),
        VECTOR,
        "1: aten.softmax.int cannot be packed: .* no such operation",
    ),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm([8, 6])), IMAGE, "0: aten.layer_norm cannot be packed"),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 2)), IMAGE, "0: aten.conv_transpose2d.input cannot"),
    "chunks": (
        lambda: Forward(lambda m, x: torch.cat(x.chunk(2, 1), 1)),
        IMAGE,
        "the model's forward: aten.chunk cannot",
    ),
    "control flow": (
        lambda: Forward(lambda m, x: x if x.sum() > 0 else -x),
        IMAGE,
        "must not depend on the values of tensors",
    ),
    "statistics": (
        lambda: nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False)),
        IMAGE,
        "0: .*track_running_stats=True",
    ),
    "statistics depend": (
        lambda: Forward(lambda m, x: F.batch_norm(x, m.a, m.a, x.mean((0, 2, 3))), a=torch.ones(4)),
        IMAGE,
        "aten.mean.dim .*|depends on the input",
    ),
    "adaptive": (
        lambda: nn.Sequential(nn.AdaptiveAvgPool2d((3, 3))),
        IMAGE,
        "0: .*output size 3x3 does not divide 8x6",
    ),
    "indices": (lambda: nn.Sequential(nn.AdaptiveMaxPool2d(1, return_indices=True)), IMAGE, "0: .*indices are read"),
    "max pool of a signal": (lambda: nn.MaxPool2d(1), SIGNAL, "no batch dimension"),
    "divisor": (lambda: nn.AvgPool2d(2, divisor_override=3), IMAGE, "divisor_override"),
    "linear on sequences": (lambda: nn.Sequential(nn.Linear(9, 3)), SIGNAL, r"0: .*shape \(2, 4, 9\).*flatten first"),
    "binary linear on sequences": (lambda: nn.Sequential(BinaryLinear(9, 3)), SIGNAL, "0: .*flatten first"),
    "reflected padding": (
        lambda: nn.Sequential(nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        "0: .*'reflect'",
    ),
    "reflected bits": (
        lambda: nn.Sequential(BinaryConv2d(4, 3, 3, padding=1, padding_mode="reflect")),
        IMAGE,
        "^0: a binary layer with padding_mode='reflect'",
    ),
    "not plain bits": (
        lambda: nn.Sequential(BinaryConv2d(4, 3, 3, activations=NotPlain())),
        IMAGE,
        "^0: NotPlain is not plain sign",
    ),
    "pad negative": (lambda: Forward(lambda m, x: F.pad(x, (-1, 0))), IMAGE, "crops"),
    "one map for all channels": (
        lambda: Forward(lambda m, x: x * m.conv(x), conv=nn.Conv2d(4, 1, 1)),
        IMAGE,
        r"combines \(2, 4, 8, 6\) and \(2, 1, 8, 6\)",
    ),
    "aligned to the right": (
        lambda: Forward(lambda m, x: x * x.mean((2, 3))),
        (4, 2, 4),
        r"combines \(2, 4, 2, 4\) and \(2, 4\)",
    ),
    "aligned to the right, first": (
        lambda: Forward(lambda m, x: x.mean((2, 3)) * x),
        (4, 2, 4),
        r"combines \(2, 4\) and \(2, 4, 2, 4\)",
    ),
    "a constant per pixel": (
        lambda: Forward(lambda m, x: x + m.c, c=torch.ones(8, 6)),
        IMAGE,
        "one number per channel",
    ),
    "a constant that widens": (
        lambda: Forward(lambda m, x: x + m.c, c=torch.ones(1, 4, 1, 1)),
        (1, 8, 6),
        "broadcasts",
    ),
    "quotient": (lambda: Forward(lambda m, x: x / x.tanh()), IMAGE, "divides by a tensor"),
    "reciprocal": (lambda: Forward(lambda m, x: 1 / x), IMAGE, "reciprocal"),
    "division by zero": (lambda: Forward(lambda m, x: x / m.c, c=torch.zeros(4, 1, 1)), IMAGE, "by zero"),
    "floor": (lambda: Forward(lambda m, x: torch.div(x, 2, rounding_mode="floor")), IMAGE, "it rounds"),
    "limits": (lambda: Forward(lambda m, x: x.clamp(2, 1)), IMAGE, "wrong order"),
    "mean of channels": (lambda: Forward(lambda m, x: x.mean(1, keepdim=True)), IMAGE, "other dimensions"),
    "concatenated rows": (lambda: Forward(lambda m, x: torch.cat([x, x], 2)), IMAGE, "other dimensions than channels"),
    "channels": (lambda: Forward(lambda m, x: x[:, 1:]), IMAGE, "whole dimensions"),
    "view": (lambda: Forward(lambda m, x: x.view(-1, 2, 2, 8, 6)), IMAGE, "flatten to"),
    "view of a sign": (
        lambda: Forward(lambda m, x: m.sign(x).view(-1, 8, 4, 6), sign=BinaryActivation("ste")),
        IMAGE,
        "flatten to",
    ),
    "torch.sign": (lambda: Forward(lambda m, x: x.sign()), IMAGE, "BinaryActivation"),
    "double": (lambda: Forward(lambda m, x: x.double()), IMAGE, "float64"),
    "dropout that stays": (lambda: Forward(lambda m, x: F.dropout(x, 0.5, True)), IMAGE, "random"),
    "noise": (lambda: Forward(lambda m, x: x + torch.randn(4, 1, 1)), IMAGE, "random"),
    "weights of the input": (lambda: Forward(lambda m, x: F.linear(x, x)), VECTOR, "weight depends on the input"),
    "slope of the input": (lambda: Forward(lambda m, x: F.prelu(x, x.new_ones(1) * 2)), VECTOR, "new_ones|slope"),
    "no output": (lambda: Forward(lambda m, x: 3), IMAGE, "returns no tensor"),
    "a constant output": (
        lambda: Forward(lambda m, x: m.c * 2, c=torch.ones(1)),
        IMAGE,
        "does not depend on the input",
    ),
    "state": (lambda: Forward(counting, count=torch.zeros(())), IMAGE, "buffer of the model"),
    "replaced state": (lambda: Forward(replaced_buffer, count=torch.zeros(())), IMAGE, "buffer of the model"),
    "stale view": (lambda: Forward(stale_view, fc=nn.Linear(192, 3)), IMAGE, "changed in place since"),
    "two inputs": (TwoInputs, IMAGE, "does not run on one float32 tensor .*'y'"),
    "other channels": (lambda: nn.Conv2d(3, 4, 1), IMAGE, r"shape \(2, 4, 8, 6\).*to have 3 channels"),
    "error of the model": (lambda: models.create("resnet8"), IMAGE, "takes a floating-point batch"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    build, shape, message = REFUSED[name]
    with pytest.raises(ConversionError, match=message) as caught:
        lower(build(), torch.zeros(1, *shape))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shufflenet_v2_x0_5", "^stage2.0: aten.view .*flatten"),
        pytest.param("vgg11_bn", "^avgpool: aten.adaptive_avg_pool2d .* does not divide 2x2", marks=slow),
        pytest.param("convnext_tiny", "^features.0.1: aten.permute .* no such operation", marks=slow),
    ],
)
def test_networks_of_torchvision_that_are_refused(name: str, message: str) -> None:
    model = getattr(torchvision.models, name)(weights=None, num_classes=10)
    with pytest.raises(ConversionError, match=message):
        lower(model, torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    "example",
    [
        None,
        np.zeros((1, 4, 8, 6), np.float32),
        torch.zeros(4),
        torch.zeros(1, 4, 2, 2, 2),
        torch.zeros(1, 0, 3),
        torch.zeros(1, 4, 8, 6, dtype=torch.uint8),
    ],
    ids=lambda example: type(example).__name__ if example is None else str(example.shape),
)
def test_wrong_example_inputs(example: Any) -> None:
    with pytest.raises(ConversionError, match="example_input must be"):
        lower(nn.ReLU(), example)


def test_wrong_models_and_normalization() -> None:
    with pytest.raises(ConversionError, match=r"only a torch.nn.Module"):
        lower(torch.relu, torch.zeros(1, 4))  # type: ignore[arg-type]
    with pytest.raises(ConversionError, match="each of 4 channels"):
        lower(nn.ReLU(), torch.zeros(1, *IMAGE), normalization=([0.5], [0.5]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"classes": [0, 1, 2]}, "classes must be a sequence of names"),
        ({"classes": "abcd"}, "classes must be a sequence of names"),
        ({"classes": 4}, "classes must be a sequence of names"),
        ({"classes": ["a\ud800"]}, "classes must be a sequence of names"),
        ({"normalization": ([0.5] * 2, [0.5])}, "each of 4 channels"),
        ({"normalization": ("mean", "std")}, "each of 4 channels"),
        ({"normalization": 0.5}, "each of 4 channels"),
        ({"metadata": {"a": np.float32(1)}}, r"metadata\['a'\] must be of JSON types"),
        ({"metadata": {"a": [1, {"b": float("nan")}]}}, r"metadata\['a'\] must be of JSON types"),
        ({"metadata": {"a": float("inf")}}, r"metadata\['a'\] must be of JSON types"),
        ({"metadata": {(1, 2): 3}}, r"metadata\[\(1, 2\)\] must be of JSON types"),
        ({"metadata": {"a": "\ud800"}}, r"metadata\['a'\] must be of JSON types"),
        ({"metadata": [1]}, "metadata must be a dict of JSON types, not list"),
    ],
    ids=str,
)
def test_what_a_file_cannot_say_of_itself(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    for float16 in (False, True):
        with pytest.raises(ConversionError, match=f"^[^\n]*{message}[^\n]*$"):
            export(nn.ReLU(), tmp_path / "net.abste", torch.zeros(1, *IMAGE), float16=float16, **arguments)
    assert not list(tmp_path.iterdir())


def test_a_signal_that_is_too_long() -> None:
    with pytest.raises(ConversionError, match="65535"):
        lower(nn.MaxPool1d(2), torch.zeros(1, 1, 70_000))
