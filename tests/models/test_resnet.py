from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import abste
from abste import models
from abste.errors import ConfigError
from abste.models.resnet import Order, PadShortcut

NAMES = [name for name in models.available() if name.startswith(("resnet8", "resnet20"))]  # ResNet-18 has its own file


def _block_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and "layer" in name}


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _macs(model: nn.Module, kind: type[nn.Module], example: torch.Tensor) -> int:
    total = 0

    def add(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal total
        weight = module.weight
        assert isinstance(weight, torch.Tensor)
        total += weight[0].numel() * output.numel()

    handles = [module.register_forward_hook(add) for module in model.modules() if isinstance(module, kind)]
    model(example)
    for handle in handles:
        handle.remove()
    return total


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("channels", "size", "width"), [(3, 32, 16), (1, 8, 16), (3, 17, 5)])
def test_shapes(name: str, channels: int, size: int, width: int) -> None:
    model = models.create(name, num_classes=7, in_channels=channels, width=width)
    assert model(torch.randn(2, channels, size, size)).shape == (2, 7)


# Counted by hand: 3x3 convolutions 9 * in * out, batch norms 2 * channels, classifier 64 * 10 + 10.
RESNET20 = (
    9 * 3 * 16
    + 6 * (9 * 16 * 16)
    + (9 * 16 * 32 + 5 * (9 * 32 * 32))
    + (9 * 32 * 64 + 5 * (9 * 64 * 64))
    + 2 * (7 * 16 + 6 * 32 + 6 * 64)
    + 2 * 64
    + 650
)
RESNET8 = (
    9 * 3 * 16
    + 2 * (9 * 16 * 16)
    + (9 * 16 * 32 + 9 * 32 * 32)
    + (9 * 32 * 64 + 9 * 64 * 64)
    + 2 * (3 * 16 + 2 * 32 + 2 * 64)
    + 2 * 64
    + 650
)


@pytest.mark.parametrize(
    ("name", "parameters", "convolution_macs"),
    [
        ("resnet20", 269_850, 40_550_400),
        ("resnet20_bireal", 269_850, 40_550_400),
        ("resnet8", 75_418, 12_238_848),
        ("resnet8_bireal", 75_418, 12_238_848),
    ],
)
def test_parameters_and_macs(name: str, parameters: int, convolution_macs: int) -> None:
    model = models.create(name).eval()
    assert _count(model) == parameters == (RESNET20 if "20" in name else RESNET8)
    example = torch.zeros(1, 3, 32, 32)
    assert _macs(model, nn.Conv2d, example) == convolution_macs
    assert _macs(model, nn.Linear, example) == 640
    builder = getattr(models, name.removesuffix("_bireal"))
    assert f"{parameters:,} parameters" in builder.__doc__
    assert f"{convolution_macs + 640:,} multiply-accumulates" in builder.__doc__
    assert f"{convolution_macs:,}" in builder.__doc__


@pytest.mark.parametrize("name", NAMES)
def test_every_block_convolution_reads_signed_input(name: str) -> None:
    model = models.create(name)
    negative_share: dict[str, float] = {}
    for conv_name, conv in _block_convolutions(model).items():

        def record(_module: nn.Module, inputs: tuple[torch.Tensor, ...], key: str = conv_name) -> None:
            negative_share[key] = (inputs[0] < 0).float().mean().item()

        conv.register_forward_pre_hook(record)
    model(torch.randn(4, 3, 32, 32))
    assert len(negative_share) == (18 if "20" in name else 6)
    assert all(0.1 < share < 0.95 for share in negative_share.values()), negative_share


@pytest.mark.parametrize("name", NAMES)
def test_order_is_convolution_relu_norm(name: str) -> None:
    model = models.create(name)
    rectified: list[bool] = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(lambda _module, inputs: rectified.append(bool((inputs[0] >= 0).all())))
    model(torch.randn(4, 3, 16, 16))
    assert len(rectified) == (19 if "20" in name else 7)
    assert all(rectified)


def test_bireal_has_a_shortcut_around_every_convolution() -> None:
    ordinary, bireal = models.resnet8(), models.resnet8_bireal()
    bireal.load_state_dict(ordinary.state_dict())
    x = torch.randn(2, 16, 8, 8)
    for model in (ordinary, bireal):
        for conv in _block_convolutions(model).values():
            nn.init.zeros_(conv.weight)
        model.eval()
    # With dead convolutions a block is its shortcuts: batch norm of zero is zero in eval mode.
    torch.testing.assert_close(ordinary.layer1(x), x)
    torch.testing.assert_close(bireal.layer1(x), x)
    # A bias on the first norm tells them apart: only Bi-Real's own shortcut carries it past the second convolution.
    for model in (ordinary, bireal):
        nn.init.ones_(model.layer1[0].bn1.bias)
    torch.testing.assert_close(ordinary.layer1(x), x)
    torch.testing.assert_close(bireal.layer1(x), x + 1)


def test_orders_of_a_block() -> None:
    """Stem and first convolution of each order, step by step, with norms and nonlinearities that do something."""
    x = torch.randn(4, 3, 9, 9)
    for order in get_args(Order):
        model = models.resnet8_bireal(order=order)
        for name, parameter in model.named_parameters():
            if ".act" in name or "bn" in name or ".shift" in name:
                nn.init.normal_(parameter, 0.5, 0.3)
        model.eval()
        block, stem = model.layer2[0], model.conv1(x)
        if order == "reste":
            assert torch.equal(model.stem(x), model.bn1(F.relu(stem)))
            first = block.bn1(F.relu(block.conv1(y := model.layer1(model.stem(x))))) + block.shortcut(y)
            expected = block.bn2(F.relu(block.conv2(first))) + first
        else:
            last = F.hardtanh if order == "irnet" else nn.Identity()
            assert torch.equal(model.stem(x), last(model.bn1(stem)))
            react = order == "react"
            shift1, act1, shift2, act2 = (
                (block.shift1, block.act1, block.shift2, block.act2) if react else (nn.Identity(), last) * 2
            )
            first = act1(block.bn1(block.conv1(shift1(y := model.layer1(model.stem(x))))) + block.shortcut(y))
            expected = act2(block.bn2(block.conv2(shift2(first))) + first)
        torch.testing.assert_close(block(y), expected)


@pytest.mark.parametrize(("name", "more"), [("resnet8_bireal", 848), ("resnet20_bireal", 2640)])
def test_parameters_of_an_order(name: str, more: int) -> None:
    """A shift of each convolution's input, and three numbers for each channel of its output."""
    assert f"{more:,} parameters more" in getattr(models, name).__doc__
    for order in get_args(Order):
        assert _count(models.create(name, order=order)) - _count(models.create(name)) == (order == "react") * more


@pytest.mark.parametrize("order", get_args(Order))
def test_every_order_is_exported(order: Order, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.resnet8_bireal(width=8, num_classes=5, order=order)
    example = torch.randn(8, 3, 16, 16)
    report = abste.convert(model, weights="ab_tanh", activations="ab_tanh", example_input=example)
    assert len(report.binarized) == 6
    model(example)  # statistics
    exported = abste.deploy.export(model, tmp_path / "net.abste", example[:1], kept_float=report.kept_float)
    assert [layer.packed for layer in exported.report.layers].count("xnor") == 6
    model.eval()
    logits = torch.from_numpy(abste.load(tmp_path / "net.abste")(example.numpy()))
    torch.testing.assert_close(logits, model(example), rtol=1e-3, atol=1e-3)


def test_unknown_order_is_one_sentence() -> None:
    for name in ("resnet8_bireal", "resnet20_bireal", "resnet18_bireal"):
        with pytest.raises(ConfigError, match=r"^unknown order 'ir-net' of a ResNet: did you mean 'irnet'\?$"):
            models.create(name, order="ir-net")


def test_shortcut_subsamples_and_pads_both_sides() -> None:
    x = torch.arange(2 * 4 * 5 * 5, dtype=torch.float32).reshape(2, 4, 5, 5)
    out = PadShortcut(4, 7, stride=2)(x)
    assert out.shape == (2, 7, 3, 3)
    assert torch.equal(out[:, 1:5], x[:, :, ::2, ::2])
    assert not out[:, 0].any()
    assert not out[:, 5:].any()


def test_initialisation() -> None:
    model = models.resnet20()
    for conv in _block_convolutions(model).values():
        fan_in = conv.weight[0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_in) ** 0.5, rel=0.1)
        assert conv.bias is None
    assert not model.fc.bias.any()


def test_default_initialisation_is_that_of_torch() -> None:
    torch.manual_seed(0)
    model = models.resnet18(width=16, init="default")
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            bound = module.weight[0].numel() ** -0.5
            assert 0.95 * bound < module.weight.abs().max().item() <= bound
            assert module.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
    assert model.fc.bias.any()
    for name in models.available():
        if "resnet" in name:  # each builder hands it on
            assert models.create(name, width=4, init="default").fc.bias.any()
            assert not models.create(name, width=4).fc.bias.any()


def test_unknown_initialisation_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"^unknown init 'defualt' of a ResNet: did you mean 'default'\?$"):
        models.resnet8(init="defualt")  # type: ignore[arg-type]


def test_channels_last_is_kept() -> None:
    model = models.resnet8().to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    for stage in (model.conv1, model.bn1, model.layer1, model.layer2, model.layer3):
        x = stage(x)
        assert x.is_contiguous(memory_format=torch.channels_last)


def test_bfloat16_autocast() -> None:
    model = models.resnet8()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(torch.randn(4, 3, 16, 16))
    logits.float().sum().backward()
    assert torch.isfinite(logits).all()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(
    ("name", "arguments"), [("resnet8", {}), *(("resnet8_bireal", {"order": order}) for order in get_args(Order))]
)
def test_compiles_to_one_graph(name: str, arguments: dict[str, object]) -> None:
    model = models.create(name, **arguments).eval()
    x = torch.randn(2, 3, 16, 16)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))


@pytest.mark.parametrize("name", ["resnet8", "resnet8_bireal"])
def test_exports(name: str) -> None:
    model = models.create(name).eval()
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},)).module()
    torch.testing.assert_close(exported(x), model(x))
    x = torch.randn(5, 3, 16, 16)
    torch.testing.assert_close(exported(x), model(x))


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((2, 1, 8, 8), torch.float32), ((3, 8, 8), torch.float32), ((2, 3, 8, 8), torch.uint8)],
)
def test_wrong_input_is_one_sentence(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    with pytest.raises(ConfigError, match=r"takes a floating-point batch of shape \(N, 3, H, W\), not torch"):
        models.resnet8()(torch.zeros(shape, dtype=dtype))


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "16"])
@pytest.mark.parametrize("argument", ["num_classes", "in_channels", "width"])
def test_wrong_count_is_one_sentence(argument: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"^{argument} of a ResNet must be a positive integer, not"):
        models.create("resnet8", **{argument: value})
