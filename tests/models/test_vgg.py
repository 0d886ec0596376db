"""VGG-Small: counts, block order, and the way from training to a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import abste
from abste import models
from abste.errors import ConfigError


def test_parameters_and_macs() -> None:
    with torch.device("meta"):
        model = models.vgg_small().eval()
        done = {nn.Conv2d: 0, nn.Linear: 0}

        def count(module: nn.Module, _: object, output: torch.Tensor) -> None:
            assert isinstance(module.weight, torch.Tensor)
            done[type(module)] += module.weight[0].numel() * output.numel()

        for module in model.modules():
            if type(module) in done:
                module.register_forward_hook(count)
        model(torch.zeros(1, 3, 32, 32))
    # By hand, from the layers of the source: 3-128-128-256-256-512-512 at 32, 32, 16, 16, 8, 8 pixels.
    weights = [9 * i * o for i, o in ((3, 128), (128, 128), (128, 256), (256, 256), (256, 512), (512, 512))]
    convolutions = sum(count * side**2 for count, side in zip(weights, (32, 32, 16, 16, 8, 8), strict=True))
    classifier = 512 * 4 * 4 * 10
    parameters = sum(weights) + 2 * 2 * (128 + 256 + 512) + classifier + 10
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters == 4_660_106
    assert done == {nn.Conv2d: convolutions, nn.Linear: classifier}
    stated = models.vgg_small.__doc__ or ""
    for number in (parameters, convolutions, convolutions + classifier):
        assert f"{number:,}" in stated


def test_initialisation_is_that_of_the_source() -> None:
    torch.manual_seed(0)
    model = models.vgg_small()
    for number, out_channels in enumerate((128, 128, 256, 256, 512, 512), 1):
        weight = model.get_submodule(f"conv{number}").weight
        assert isinstance(weight, torch.Tensor)
        assert weight.std().item() == pytest.approx((2 / (9 * out_channels)) ** 0.5, rel=0.05)
    assert model.fc.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_every_convolution_but_the_first_reads_signed_input() -> None:
    model = models.vgg_small(width=8)
    negative: list[float] = []
    for number in range(2, 7):
        module = model.get_submodule(f"conv{number}")
        module.register_forward_pre_hook(lambda _, x: negative.append((x[0] < 0).float().mean().item()))
    model(torch.randn(8, 3, 32, 32))
    assert len(negative) == 5 and all(0.05 < share < 0.95 for share in negative), negative


@pytest.mark.parametrize("activations", [None, "ab_tanh"], ids=["w1a32", "w1a1"])
def test_it_is_binarised_trained_and_packed(activations: str | None, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = models.vgg_small(width=8)
    example = torch.zeros(1, 3, 32, 32)
    report = abste.convert(model, weights="ab_tanh", activations=activations, example_input=example)
    binary = [name for name, module in model.named_modules() if isinstance(module, abste.nn.BinaryConv2d)]
    assert binary == [f"conv{number}" for number in range(2, 7)]
    optimizer = torch.optim.SGD(abste.parameter_groups(model, lr=0.005, weight_decay=0.0), momentum=0.9)
    images, labels = torch.randn(32, 3, 32, 32), torch.randint(10, (32,))
    losses = []
    for _ in range(8):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    file = tmp_path / "vgg.abste"
    abste.deploy.export(model.eval(), file, example, kept_float=report.kept_float)
    with torch.no_grad():
        expected = model(images).argmax(1)
    assert (abste.load(file)(images).argmax(1) == expected.numpy()).all()


def test_another_image_size_is_an_argument() -> None:
    assert models.vgg_small(width=4, image_size=16, num_classes=3)(torch.randn(2, 3, 16, 16)).shape == (2, 3)
    with pytest.raises(ConfigError, match=r"\(N, 3, 32, 32\), not torch.float32 of shape \(2, 3, 16, 16\); image"):
        models.vgg_small(width=4)(torch.randn(2, 3, 16, 16))
    with pytest.raises(ConfigError, match=r"^image_size of VGG-Small must be a multiple of 8, not 30\.$"):
        models.vgg_small(image_size=30)
    with pytest.raises(ConfigError, match=r"^width of VGG-Small must be a positive integer, not 0\.$"):
        models.vgg_small(width=0)
