"""ResNet-18, small and large: counts, block orders, and the way from training to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import abste
from abste import models
from abste.models.resnet import pooled_projection, projection

NAMES = [name for name in models.available() if "18" in name and "react" not in name]  # test_imagenet.py has that


def macs(model: nn.Module, example: torch.Tensor) -> dict[type[nn.Module], int]:
    """Multiply-accumulates of convolutions and of linear layers."""
    totals: dict[type[nn.Module], int] = {nn.Conv2d: 0, nn.Linear: 0}

    def add(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        assert isinstance(module.weight, torch.Tensor)
        totals[type(module)] += module.weight[0].numel() * output.numel()

    for module in model.modules():
        if type(module) in totals:
            module.register_forward_hook(add)
    model(example)
    return totals


# He et al. give 11.69 million parameters and 1.8e9 multiply-accumulates for ImageNet; the usual CIFAR network has
# 11,173,962 parameters and 0.56e9. A batch norm of 512 channels before the classifier is 1,024 parameters more.
@pytest.mark.parametrize(
    ("name", "parameters", "size", "convolutions", "linear"),
    [
        ("resnet18", 11_173_962 + 1024, 32, 555_417_600, 5120),
        ("resnet18_bireal", 11_173_962 + 1024, 32, 555_417_600, 5120),
        ("imagenet_resnet18", 11_689_512 + 1024, 224, 1_813_561_344, 512_000),
        ("imagenet_resnet18_bireal", 11_689_512, 224, 1_813_561_344, 512_000),
    ],
)
def test_parameters_and_macs(name: str, parameters: int, size: int, convolutions: int, linear: int) -> None:
    with torch.device("meta"):
        model = models.create(name).eval()
        assert sum(parameter.numel() for parameter in model.parameters()) == parameters
        assert macs(model, torch.zeros(1, 3, size, size)) == {nn.Conv2d: convolutions, nn.Linear: linear}
    builder = getattr(models, name)
    assert f"{parameters:,} parameters" in builder.__doc__ or "those of `resnet18`" in builder.__doc__
    stated = getattr(models, name.removesuffix("_bireal")).__doc__
    assert f"{convolutions + linear:,} multiply-accumulates" in stated and f"{convolutions:,}" in stated


def test_parameters_of_react() -> None:
    with torch.device("meta"):
        plain, react = (models.resnet18_bireal(order=order) for order in ("reste", "react"))
    count = [sum(parameter.numel() for parameter in model.parameters()) for model in (plain, react)]
    assert count[1] - count[0] == 14_912 and "14,912 parameters" in (models.resnet18_bireal.__doc__ or "")


def test_half_the_width() -> None:
    model = models.resnet18(width=32)
    channels = [model.get_submodule(f"layer{i}.1.conv2").weight.shape[0] for i in (1, 2, 3, 4)]
    assert channels == [32, 64, 128, 256] and model.fc.in_features == 256


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [5, 32, 45])
def test_shapes(name: str, size: int) -> None:
    model = models.create(name, num_classes=7, in_channels=2, width=4)
    assert model(torch.randn(2, 2, size, size)).shape == (2, 7)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_convolution_reads_signed_input(name: str) -> None:
    model = models.create(name, width=8)
    negative: list[float] = []
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and "layer" in key and "shortcut" not in key:
            module.register_forward_pre_hook(lambda _, x: negative.append((x[0] < 0).float().mean().item()))
    model(torch.randn(4, 3, 64, 64))
    # Max pooling leaves few negative numbers to the first one.
    assert len(negative) == 16 and negative[0] > 0 and all(0.05 < share < 0.95 for share in negative[1:]), negative


@pytest.mark.parametrize("name", NAMES)
def test_shortcuts(name: str) -> None:
    """With dead convolutions, a first norm that adds 1 is carried past the second by a shortcut of its own alone."""
    model = models.create(name, width=4).eval()
    for key, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and key.startswith("layer1."):
            nn.init.zeros_(module.weight)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(model.layer1(x), x)
    nn.init.ones_(model.layer1[0].bn1.bias)
    torch.testing.assert_close(model.layer1(x), x + (name != "resnet18"))
    # Where the shape changes, the shortcut is real-valued and 1x1.
    shortcut = model.layer2[0].shortcut
    assert any(isinstance(module, nn.AvgPool2d) for module in shortcut) == (name == "imagenet_resnet18_bireal")
    assert [module.kernel_size for module in shortcut if isinstance(module, nn.Conv2d)] == [(1, 1)]


def test_rectified() -> None:
    """Every norm of a block reads what a ReLU gives, but in Bi-Real net, which has none."""
    for name in NAMES:
        model = models.create(name, width=4)
        rectified: list[bool] = []
        for key, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d) and "shortcut" not in key:
                module.register_forward_pre_hook(lambda _, x, seen=rectified: seen.append(bool((x[0] >= 0).all())))
        model(torch.randn(4, 3, 64, 64))
        assert len(rectified) == 17
        assert not any(rectified) if name == "imagenet_resnet18_bireal" else all(rectified)


def test_projections_agree_where_pixels_do() -> None:
    torch.manual_seed(0)
    strided, pooled = projection(3, 5, 2).eval(), pooled_projection(3, 5, 2).eval()
    pooled[1].weight.data.copy_(strided[0].weight.data)
    x = torch.randn(2, 3, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :7, :7]
    torch.testing.assert_close(pooled(x), strided(x))


@pytest.mark.parametrize("activations", [None, "ab_tanh"])
@pytest.mark.parametrize("name", NAMES)
def test_from_conversion_to_file(name: str, activations: str | None, tmp_path: Path) -> None:
    """Blocks become binary, projections and ends stay float, and the file is the network."""
    torch.manual_seed(0)
    size = 64 if "imagenet" in name else 16
    model = models.create(name, width=8, num_classes=5)
    for module in model.modules():  # norms that do something
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    example = torch.zeros(1, 3, size, size)
    report = abste.convert(model, weights="ab_tanh", activations=activations, example_input=example)
    assert len(report.binarized) == 16
    reasons = set(report.kept_float.values())
    assert reasons == {"first layer", "last layer", "1x1 projection shortcut"} and len(report.kept_float) == 5
    model(torch.randn(8, 3, size, size))  # statistics
    exported = abste.deploy.export(model, tmp_path / "net.abste", example, kept_float=report.kept_float)
    packed = [layer.packed for layer in exported.report.layers]
    assert packed.count("xnor" if activations else "sign_conv") == 16 and packed.count("float") == 5
    x = torch.randn(3, 3, size, size)
    assert abste.load(tmp_path / "net.abste")(x).shape == (3, 5)
