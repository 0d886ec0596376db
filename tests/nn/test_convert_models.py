"""convert() on torchvision's networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import abste
from abste.errors import ConversionError
from abste.nn import BinaryConv2d, BinaryLinear
from abste.nn.layers import BINARY_LAYERS


def create(name: str) -> tuple[nn.Module, Tensor]:
    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    size = 32
    if name == "vit_b_16":
        options["image_size"] = 32
    elif name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": name == "googlenet"}  # Inception's would need large images
        size = 96
    return getattr(torchvision.models, name)(**options), torch.zeros(2, 3, size, size)


def trains(model: nn.Module, x: Tensor) -> None:
    y = model.train()(torch.randn_like(x))
    y = y[0] if isinstance(y, tuple) else y
    assert y.isfinite().all()
    y.float().square().mean().backward()
    for name, module in model.named_modules():
        if isinstance(module, BINARY_LAYERS):
            assert module.weight.grad is not None, name
            assert module.weight.grad.isfinite().all(), name


def test_resnet18() -> None:
    model, x = create("resnet18")
    report = abste.convert(model, example_input=x)
    projections = [f"layer{i}.0.downsample.0" for i in (2, 3, 4)]
    assert report.kept_float == {
        "conv1": "first layer",
        **dict.fromkeys(projections, "1x1 projection shortcut"),
        "fc": "last layer",
    }
    assert len(report.binarized) == 16
    trains(model, x)


def test_bottlenecks() -> None:
    """ResNet-50's blocks, one a stage: the 1x1 convolutions of the main path are binarised, those of shortcuts not."""
    model = torchvision.models.resnet.ResNet(torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=10)
    report = abste.convert(model, example_input=torch.zeros(1, 3, 32, 32))
    kept = {"conv1", "fc", *(f"layer{i}.0.downsample.0" for i in (1, 2, 3, 4))}
    assert set(report.kept_float) == kept
    assert report.binarized == [f"layer{i}.0.conv{j}" for i in (1, 2, 3, 4) for j in (1, 2, 3)]


def test_relu_inputs_are_refused_and_every_remedy_trains() -> None:
    model, x = create("resnet18")
    with pytest.raises(ConversionError, match=r"layer1\.0\.conv1 and 15 more is never negative"):
        abste.convert(model, activations="ab_tanh", example_input=x)
    with pytest.raises(ConversionError, match="nothing to binarise"):
        abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="keep_float")
    report = abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="weights_only")
    assert len(report.binarized) == 16
    assert not any(m.activation for m in model.modules() if isinstance(m, BINARY_LAYERS))
    trains(model, x)
    model, x = create("resnet18")
    abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="batch_norm")
    assert isinstance(model.layer1[0].conv1.layer, BinaryConv2d)
    trains(model, x)
    abste.summary(model, (1, 3, 32, 32))


def test_vision_transformer() -> None:
    model = torchvision.models.VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, num_classes=10
    )
    report = abste.convert(model, example_input=torch.zeros(2, 3, 16, 16))
    layers = [f"encoder.layers.encoder_layer_{i}" for i in (0, 1)]
    assert report.binarized == [f"{layer}.mlp.{j}" for layer in layers for j in (0, 3)]
    for layer in layers:
        assert "without calling" in report.kept_float[f"{layer}.self_attention.out_proj"]
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        fused = model.eval()(x)
    torch.testing.assert_close(fused, model(x), rtol=1e-4, atol=1e-5)
    assert isinstance(model.encoder.layers[0].mlp[0], BinaryLinear)
    trains(model, x)


def test_densenet() -> None:
    model = torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10)
    x = torch.zeros(2, 3, 32, 32)
    report = abste.convert(model, example_input=x)
    assert set(report.kept_float) == {"features.conv0", "classifier"}  # its 1x1 convolutions are no shortcuts
    trains(model, x)


# Layers that are binarised, of all with a weight.
NETWORKS = {
    "resnet50": (48, 54),
    "mobilenet_v2": (51, 53),
    "efficientnet_b0": (80, 82),
    "regnet_y_400mf": (80, 86),
    "convnext_tiny": (57, 59),
    "vit_b_16": (24, 51),
    "densenet121": (119, 121),
    "googlenet": (56, 64),
    "inception_v3": (93, 95),
    "shufflenet_v2_x0_5": (55, 57),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks(name: str) -> None:
    model, x = create(name)
    report = abste.convert(model, example_input=x)
    assert all(reason for reason in report.kept_float.values())
    assert (len(report.binarized), len(report.layers)) == NETWORKS[name]
    trains(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_published_networks_with_binary_activations(name: str) -> None:
    model, x = create(name)
    report = abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="weights_only")
    assert len(report.binarized) == NETWORKS[name][0]
    trains(model, x)
