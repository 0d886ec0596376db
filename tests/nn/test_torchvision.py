"""torchvision's networks: conversion, a step of training, summary, and the way to a file or what is in its way."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn

import abste
from abste.errors import ConversionError
from abste.nn import BinaryConv2d, BinaryLinear
from abste.nn.layers import BINARY_LAYERS


def create(name: str, size: int) -> tuple[nn.Module, Tensor]:
    """A network with random weights, and a batch of two images of that size; Inception's are larger."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"weights": None, "num_classes": 10}
    if name == "vit_b_16":
        options["image_size"] = size
    elif name in ("convnext_tiny", "efficientnet_b0"):
        options["stochastic_depth_prob"] = 0.0  # a block that is left out gets no gradient
        if name == "convnext_tiny":
            options["layer_scale"] = 0.1  # with the default a first step is too small to be seen
    elif name in ("googlenet", "inception_v3"):
        options |= {"init_weights": False, "aux_logits": name == "googlenet"}  # Inception's would need large images
        size = 96
    model = getattr(torchvision.models, name)(**options)
    if name == "vit_b_16":
        nn.init.normal_(model.heads.head.weight)  # it starts from zero, and passes no gradient on
    return model, torch.zeros(2, 3, size, size)


def trains(model: nn.Module, x: Tensor) -> None:
    y = model.train()(torch.randn_like(x))
    y = y[0] if isinstance(y, tuple) else y
    assert y.isfinite().all()
    y.float().square().mean().backward()
    for name, module in model.named_modules():
        if isinstance(module, BINARY_LAYERS):
            assert module.weight.grad is not None, name
            assert module.weight.grad.isfinite().all(), name


@dataclass(frozen=True)
class Expected:
    """What conversion makes of a network.

    Attributes:
        binarized: layers that become binary.
        projections, depthwise: layers that stay float for these reasons, besides the first and the last.
        others: further reasons and how many layers have them.
        obstacle: why it can not be packed at 64 pixels; None where it can.
    """

    binarized: int
    projections: int = 0
    depthwise: int = 0
    others: dict[str, int] = field(default_factory=dict)
    obstacle: str | None = None


NETWORKS = {
    "resnet18": Expected(16, projections=3),
    "resnet50": Expected(48, projections=4),
    "vgg11_bn": Expected(
        9, obstacle="avgpool: aten.adaptive_avg_pool2d cannot be packed: its output size 7x7 does not divide 2x2."
    ),
    "mobilenet_v2": Expected(34, depthwise=17),
    "mobilenet_v3_small": Expected(41, depthwise=11),
    "regnet_y_400mf": Expected(80, projections=4),
    "convnext_tiny": Expected(
        39,
        depthwise=18,
        obstacle="features.0.1: aten.permute cannot be packed: the packed format has no such operation; replace it by "
        "one that it has (docs/format.md), or leave this part out of the exported model.",
    ),
    "efficientnet_b0": Expected(64, depthwise=16),
    "vit_b_16": Expected(
        24,
        others={
            "in_proj_weight: of no Conv or Linear layer, but of the MultiheadAttention itself": 12,
            "pos_embedding: of no Conv or Linear layer, but of the Encoder itself": 1,
            "its weight is read without calling it, so a swap would have no effect or a wrong one": 12,  # out_proj
        },
        obstacle="the model's forward: aten.reshape cannot be packed: it turns (2, 768, 4, 4) into (2, 768, 16); "
        "flatten to (N, features) instead.",
    ),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str, tmp_path: Path) -> None:
    """W1A32 with the defaults: converted, reported, trained for a step, summarised and, where possible, packed."""
    expected = NETWORKS[name]
    model, x = create(name, 64)
    before = {key: weight.clone() for key, weight in model.state_dict().items() if key.endswith("weight")}
    report = abste.convert(model, example_input=x)

    # What stayed float, and why.
    kept = {"first layer": 1, "last layer": 1} | expected.others
    if expected.projections:
        kept["1x1 projection shortcut"] = expected.projections
    reasons = Counter(re.sub(r"(?<=: )\d+ weights", "n weights", reason) for reason in report.kept_float.values())
    if expected.depthwise:
        kept["depthwise convolution: n weights for a channel, little to gain and much to lose"] = expected.depthwise
    assert reasons == kept
    assert len(report.binarized) == expected.binarized
    text = str(report)
    assert all(f"  {reason}" in text for reason in report.kept_float.values())
    assert f"{expected.binarized} of {len(report.layers)} layers binarised" in text

    # The float weights are the latents.
    assert set(before) <= set(model.state_dict())
    for key, weight in model.state_dict().items():
        assert key not in before or torch.equal(weight, before[key])
    assert {key for key, m in model.named_modules() if isinstance(m, BINARY_LAYERS)} == set(report.binarized)

    # A step changes every one of them.
    optimizer = torch.optim.SGD(abste.parameter_groups(model, lr=0.01))
    trains(model, x)
    optimizer.step()
    for key in report.binarized:
        latents = model.get_submodule(key).weight
        assert isinstance(latents, Tensor) and latents.isfinite().all()
        assert not torch.equal(latents, before[f"{key}.weight"]), key

    summary = abste.summary(model, (1, 3, 64, 64))
    assert summary.binary_parameters == sum(before[f"{key}.weight"].numel() for key in report.binarized)
    assert summary.compression > 1 and "times smaller" in str(summary)

    file, example = tmp_path / "net.abste", torch.zeros(1, 3, 64, 64)
    if expected.obstacle is not None:
        with pytest.raises(ConversionError) as caught:
            abste.deploy.export(model, file, example)
        assert str(caught.value) == expected.obstacle and not file.exists()
        return
    exported = abste.deploy.export(model, file, example, kept_float=report.kept_float)
    packed = Counter(layer.packed for layer in exported.report.layers)
    assert packed == {"sign_conv": expected.binarized, "float": len(report.kept_float)}
    assert {layer.name: layer.why for layer in exported.report.layers if layer.packed == "float"} == report.kept_float
    assert 0 < exported.file_bytes < summary.packed_bytes * 1.05


def test_vgg_is_packed_for_the_size_it_was_made_for() -> None:
    model = torchvision.models.VGG(torchvision.models.vgg.make_layers([8, "M"] * 5), num_classes=10)
    model.classifier = nn.Sequential(nn.Linear(8 * 7 * 7, 16), nn.ReLU(), nn.Linear(16, 10))  # 120 million weights less
    example = torch.zeros(1, 3, 224, 224)
    report = abste.convert(model, example_input=example)
    packed = abste.deploy.lower(model, example).report.layers
    assert [layer.name for layer in packed if layer.packed == "sign_conv"] == report.binarized
    assert len(report.binarized) == 5


def test_relu_inputs_are_refused_and_every_remedy_trains() -> None:
    model, x = create("resnet18", 32)
    with pytest.raises(ConversionError, match=r"layer1\.0\.conv1 and 15 more is never negative"):
        abste.convert(model, activations="ab_tanh", example_input=x)
    with pytest.raises(ConversionError, match="nothing to binarise"):
        abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="keep_float")
    report = abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="weights_only")
    assert len(report.binarized) == 16
    assert not any(m.activation for m in model.modules() if isinstance(m, BINARY_LAYERS))
    trains(model, x)
    model, x = create("resnet18", 32)
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


# Further networks: layers that are binarised, of all with a weight.
OTHERS = {
    "densenet121": (119, 121),
    "googlenet": (56, 64),
    "inception_v3": (93, 95),
    "shufflenet_v2_x0_5": (36, 57),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_other_networks(name: str) -> None:
    model, x = create(name, 32)
    report = abste.convert(model, example_input=x)
    assert all(reason for reason in report.kept_float.values())
    assert (len(report.binarized), len(report.layers)) == OTHERS[name]
    trains(model, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*NETWORKS, *OTHERS])
def test_networks_with_binary_activations(name: str) -> None:
    model, x = create(name, 32)
    report = abste.convert(model, activations="ab_tanh", example_input=x, unsigned_inputs="weights_only")
    assert len(report.binarized) == (NETWORKS[name].binarized if name in NETWORKS else OTHERS[name][0])
    trains(model, x)
