from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import abste
from abste.errors import ConfigError
from abste.nn import BinaryConv2d
from abste.train import Recipe, fit
from abste.train.recipe import MOST_SIZES, load_recipe
from abste.train.run import build_model
from abste.train.setup import compile_module
from abste.train.sizes import check_sizes, image_size, image_sizes, resized

Tiny = Callable[..., Recipe]
SIZES = "train.image_sizes=[[0, 4], [0.3, 6], [0.6, 8]]"


def test_sizes_of_epochs(tiny: Tiny) -> None:
    recipe = tiny("train.epochs=10", SIZES)
    assert [image_size(recipe, epoch)[0] for epoch in range(10)] == [4, 4, 4, 6, 6, 6, 8, 8, 8, 8]
    assert image_sizes(recipe) == {(4, 4): 3, (6, 6): 3, (8, 8): 4}
    assert image_sizes(tiny("train.epochs=10")) == {(8, 8): 10}
    wide = tiny("data.image_shape=[1, 8, 12]", SIZES)
    assert [image_size(wide, epoch) for epoch in range(3)] == [(4, 6), (6, 9), (8, 12)]
    few = tiny("train.epochs=2", SIZES.replace("0.6", "0.5"))  # one of them has no epoch
    assert image_sizes(few) == {(4, 4): 1, (8, 8): 1}


@pytest.mark.parametrize("last", [False, True])
def test_resized(last: bool) -> None:
    images = torch.rand(5, 3, 32, 32)
    if last:
        images = images.to(memory_format=torch.channels_last)
    half = resized(images, (16, 16))
    assert half.shape == (5, 3, 16, 16) and half.dtype == images.dtype
    assert half.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)
    assert resized(images, (32, 32)) is images
    # Every pixel counts, all alike but near the border: the mean stays, and so does a slope.
    assert float(half.mean()) == pytest.approx(float(images.mean()), abs=0.01)
    slope = torch.arange(32.0).expand(1, 1, 32, 32)
    assert torch.allclose(resized(slope, (16, 16))[..., 2:-2], torch.arange(0.5, 32, 2)[2:-2].expand(1, 1, 16, 12))
    spike = torch.zeros(1, 1, 32, 32)
    spike[0, 0, 9, 9] = 4
    assert float(resized(spike, (8, 8)).sum()) == pytest.approx(0.25, rel=0.01)


def test_a_run(tiny: Tiny, tmp_path: Path, outcome: Any) -> None:
    seen: list[tuple[int, ...]] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: seen.append(tuple(inputs[0].shape)) if type(module).__name__ == "CifarResNet" else None
    )
    try:
        summary = fit(tiny(SIZES), None, tmp_path / "r", progress=False)
    finally:
        hook.remove()
    trained = [shape[2] for shape in seen if shape[0] == 64]
    assert trained == [4] * 22 + [6] * 22 + [8] * 22
    assert {shape[2] for shape in seen if shape[0] == 355} == {8}  # evaluation
    cost = summary["cost"]
    assert cost["flops_rule"] == "6 x MACs of one forward pass at the size of the epoch x samples seen"
    network = build_model(tiny())[0]
    macs = [abste.summary(network, (1, 1, size, size)).total_macs for size in (4, 6, 8)]
    assert cost["estimated_training_flops"] == 6 * sum(macs) * 22 * 64 < 0.7 * 6 * macs[-1] * cost["samples"]
    assert cost["forward_macs"] == macs[-1]
    assert summary["test"]["accuracy"] > 0.2


class Strided(nn.Module):
    """A network that wants a certain size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(2)
        self.fc = nn.Linear(4 * 2 * 2, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(self.pool(self.conv(x)).flatten(1))


def test_networks_that_cannot(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"images of 2x2 pixels, but the network 'resnet8' has nothing left for the "
                                          r"stride of 'layer3.0.conv1'; begin with larger ones"):  # fmt: skip
        fit(tiny("train.image_sizes=[[0, 2], [0.5, 8]]"), None, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []
    module = Strided().train()
    with pytest.raises(
        ConfigError, match=r"images of 4x4 pixels, but the network 'resnet8' fails on them: mat1 and mat2"
    ):
        check_sizes(module, tiny("train.image_sizes=[[0, 4], [0.5, 8]]"))
    assert module.training and not module.conv._forward_pre_hooks
    check_sizes(module, tiny())


def test_an_empty_list_takes_sizes_back(tiny: Tiny) -> None:
    assert tiny("train.image_sizes=[]") == tiny()
    assert load_recipe("cifar10-vgg-small-w1a1").train.image_sizes is None  # which extends one with sizes


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (
            "16",
            "'train.image_sizes' must be a list of 2 to 8 pairs [part of the run after which a size begins, pixels]",
        ),
        ("[[0, 8]]", "must be a list of 2 to 8 pairs"),
        ("[[0, 4.0], [0.5, 8]]", "must be a list of 2 to 8 pairs"),
        ("[[0, 4], [0.5]]", "must be a list of 2 to 8 pairs"),
        ("[[0, true], [0.5, 8]]", "must be a list of 2 to 8 pairs"),
        ("[[0.1, 4], [0.5, 8]]", "must begin at 0 and go on at rising parts below 1, not [0.1, 0.5]."),
        ("[[0, 4], [0, 8]]", "must begin at 0 and go on at rising parts below 1, not [0, 0]."),
        ("[[0, 4], [1.0, 8]]", "must begin at 0 and go on at rising parts below 1, not [0, 1.0]."),
        ("[[0, 4], [nan, 8]]", "must begin at 0 and go on at rising parts below 1"),
        ("[[0, 0], [0.5, 8]]", "must have sizes that rise, from at least 1 pixel on, not [0, 8]."),
        ("[[0, 8], [0.5, 4]]", "must have sizes that rise, from at least 1 pixel on, not [8, 4]."),
        (
            "[[0, 4], [0.5, 6]]",
            "'train.image_sizes' must end with 8 pixels, the full height of the images, not with 6.",
        ),
        (
            "[[0, 4], [0.5, 16]]",
            "'train.image_sizes' must end with 8 pixels, the full height of the images, not with 16.",
        ),
        (
            "[[0, 4], [0.7, 8]]",
            "'train' has image_sizes whose last size would begin at 0.7 of 3 epochs, after the last",
        ),
    ],
)
def test_recipes_that_do_not_fit(tiny: Tiny, sizes: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tiny(f"train.image_sizes={sizes}")
    assert message in str(caught.value) and str(caught.value).startswith("recipe 'digits-resnet8-w1a32': ")


def test_as_many_sizes_as_are_compiled(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size gets code of its own, whatever came before: a resumed run has that of the first one."""
    compiled: list[Any] = []
    kernel = (3, 3)

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(
            [tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.shape[2:] not in (kernel, ())]
        )
        return graph.forward

    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda module, **options: compile(module, backend=backend, **options))
    recipe = tiny("train.compile=true")
    module = nn.Sequential(BinaryConv2d(1, 2, 3, padding=1, activations="ab_tanh"), nn.BatchNorm2d(2))
    model = compile_module(module, recipe, torch.device("meta")).train()
    for _ in range(2):
        for size in range(5, 5 + MOST_SIZES):
            model(torch.randn(2, 1, size, size)).sum().backward()
    assert [shapes[0] for shapes in compiled] == [(2, 1, size, size) for size in range(5, 5 + MOST_SIZES)]
