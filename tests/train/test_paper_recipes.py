"""The `paper` recipes are ReSTE's protocol and nothing else, and they train.

Wu et al., arXiv 2308.06689; its numbers are those of the authors' code (DravenALG/ReSTE: main.py, utils/arguments.py,
dataset/load_data.py, model/models_cifar, model/binary_module) and the commands of its README. What a field has to be is
written out below, a second time and by hand: a key that changes, or appears, fails.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from abste.data import Splits
from abste.nn import BinaryConv2d
from abste.train import fit, load_recipe
from abste.train.checkpoint import load_checkpoint
from abste.train.recipe import builtin_recipes
from abste.train.run import build_model

# RandomCrop(32, padding=4), RandomHorizontalFlip, Normalize with ImageNet's numbers.
DATA = {
    "name": "cifar10",
    "image_shape": [3, 32, 32],
    "classes": 10,
    "holdout": 0,
    "crop_padding": 4,
    "crop_fill": "zero",
    "flip": "random",
    "cutout": 0,
    "statistics": "imagenet",
}
# torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4); betas are another optimizer's.
OPTIMIZER = {
    "name": "sgd",
    "lr": 0.1,
    "momentum": 0.9,
    "nesterov": False,
    "betas": [0.9, 0.999],
    "weight_decay": 1e-4,
    "decay_norms": True,
}
# Cross-entropy, float32; from "channels_last" on what decides nothing but speed, reports and random numbers.
TRAIN = {
    "label_smoothing": 0.0,
    "precision": "32-true",
    "channels_last": True,
    "compile": False,
    "seed": 0,
    "eval_every": 10,
    "log_every": 50,
    "checkpoint_minutes": 10.0,
}
LENGTH = {
    "resnet18": {"epochs": 2000, "batch_size": 96},
    "resnet20": {"epochs": 1000, "batch_size": 256},
    "vgg-small": {"epochs": 1000, "batch_size": 256},
}
MODEL: dict[str, dict[str, Any]] = {
    "resnet18": {"name": "resnet18", "kwargs": {"init": "default"}},
    "resnet20": {"name": "resnet20", "kwargs": {}},
    "resnet20, w1a1": {"name": "resnet20_bireal", "kwargs": {}},
    "vgg-small": {"name": "vgg_small", "kwargs": {}},
}
# Raw latents and activations; one scale for the tensor, whose gradient reaches the latents; first, last and 1x1 float.
BINARIZE = {
    "weights": "ab_tanh",
    "keep_float": [],
    "keep_first": True,
    "keep_last": True,
    "keep_projections": True,
    "unsigned_inputs": "error",
    "standardize": False,
    "normalize": False,
    "scale": "tensor",
    "scale_gradient": True,
    "pad_value": 0,
}
NETWORKS = list(LENGTH)
BITS: dict[str, dict[str, Any]] = {
    "float": {},
    "w1a32": {"binarize": BINARIZE},
    "w1a1": {"binarize": {**BINARIZE, "activations": "ab_tanh"}},
}
ALL = [(network, bits) for network in NETWORKS for bits in BITS]


def test_there_are_no_others() -> None:
    names = [name for name in builtin_recipes() if name.endswith("-paper")]
    assert names == sorted(f"cifar10-{network}-{bits}-paper" for network, bits in ALL)


@pytest.mark.parametrize(("network", "bits"), ALL)
def test_every_field(network: str, bits: str) -> None:
    recipe = load_recipe(f"cifar10-{network}-{bits}-paper").to_dict()
    length = LENGTH[network]
    assert recipe.pop("name") == f"cifar10-{network}-{bits}-paper"
    assert f"{length['epochs']} epochs" in recipe.pop("description")
    notes = recipe.pop("notes")
    assert "once per epoch" in notes and "our reconstruction" in notes and "best epoch" in notes
    assert recipe == {
        "data": DATA,
        "model": MODEL.get(f"{network}, {bits}", MODEL[network]),
        "optimizer": OPTIMIZER,
        "schedule": {"shape": "cosine", "warmup": 5 / length["epochs"], "final": 0.0},
        "train": {**length, **TRAIN},
        **BITS[bits],
    }


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("bits", ["w1a32", "w1a1"])
def test_binary_ones_differ_in_model_and_binarisation_alone(network: str, bits: str) -> None:
    a, b = (load_recipe(f"cifar10-{network}-{kind}-paper").to_dict() for kind in ("float", bits))
    differing = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    model = {"model"} if (network, bits) == ("resnet20", "w1a1") else set()
    assert differing == {"name", "description", "binarize"} | model


def test_the_page_says_what_the_recipes_do(repo_root: Path) -> None:
    fast, bits, vgg, large, paper, long = (
        load_recipe(f"cifar10-{name}")
        for name in (
            *("resnet20-w1a32", "resnet20-w1a1", "vgg-small-w1a1"),
            *("resnet18-w1a1", "resnet20-w1a1-paper", "resnet18-w1a1-paper"),
        )
    )
    assert bits.train.image_sizes is vgg.train.image_sizes is None
    assert (fast.schedule.warmup, bits.schedule.warmup) == (1 / 5, 1 / 10)
    assert fast.optimizer.muon_filters and large.train.image_sizes == fast.train.image_sizes == [[0, 24], [0.5, 32]]
    rows = [
        f"| epochs, batch | {fast.train.epochs}, {fast.train.batch_size}; VGG-Small: {vgg.train.epochs}; "
        f"ResNet-18: {large.train.epochs} | "
        f"{paper.train.epochs}, {paper.train.batch_size}; ResNet-18: {long.train.epochs}, {long.train.batch_size} |",
        f"| optimizer of convolutions and latents | Muon, {fast.optimizer.latent_lr}; "
        f"ResNet-20 W1A1: {bits.optimizer.latent_lr} | as all else |",
        f"| of all else | SGD, {fast.optimizer.lr}; ResNet-20 W1A1: {bits.optimizer.lr}; Nesterov "
        f"{fast.optimizer.momentum} | SGD, {paper.optimizer.lr}, "
        f"momentum {paper.optimizer.momentum}, no Nesterov |",
        f"| weight decay | {mantissa(fast.optimizer.weight_decay)}, of weights | "
        f"{mantissa(paper.optimizer.weight_decay)}, of all parameters (`decay_norms`) |",
        f"| loss | label smoothing {fast.train.label_smoothing} | cross-entropy |",
        f"| crop | {fast.data.crop_padding} pixels (ResNet-18: {large.data.crop_padding}), mirrored at the border | "
        f'{paper.data.crop_padding} pixels, black (`crop_fill = "{paper.data.crop_fill}"`) |',
        f"| cutout | none; ResNet-18: {large.data.cutout} pixels | none |",
        f"| flip | {fast.data.flip} | {paper.data.flip} |",
    ]
    lines = (repo_root / "docs" / "train.md").read_text(encoding="utf-8").splitlines()
    assert [row for row in rows if row not in lines] == []


def mantissa(value: float) -> str:
    """1e-4 for 0.0001."""
    return re.sub("e-0", "e-", f"{value:.0e}")


FLOAT = {
    "resnet18": {"conv1", "fc", "layer2.0.shortcut.0", "layer3.0.shortcut.0", "layer4.0.shortcut.0"},
    "resnet20": {"conv1", "fc"},
    "vgg-small": {"conv1", "fc"},
}
BINARY = {"resnet18": 16, "resnet20": 18, "vgg-small": 5}


@pytest.mark.parametrize(("network", "bits"), [pair for pair in ALL if pair[1] != "float"])
def test_what_is_binary(network: str, bits: str) -> None:
    model, report = build_model(load_recipe(f"cifar10-{network}-{bits}-paper", ["model.kwargs.width=4"]))
    assert report.kept_float.keys() == FLOAT[network]
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    assert len(layers) == BINARY[network]
    for layer in layers:
        assert layer.weight_binarizer is not None and layer.weight_binarizer.name == "ab_tanh"
        assert (layer.activation is not None) == (bits == "w1a1")
        scale = layer.binary_weight().scale
        assert scale is not None
        torch.testing.assert_close(scale, layer.weight.detach().abs().mean().expand_as(scale))
    last = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d)]
    assert len(last) == (network != "vgg-small")


@pytest.mark.parametrize(("network", "bits"), ALL)
def test_twenty_steps(network: str, bits: str, made_cifar10: Splits, tmp_path: Path) -> None:
    """As they are, but for narrow layers, small batches and the images."""
    small = ["model.kwargs.width=4", "train.batch_size=4", "train.threads=1", "train.log_every=1"]
    recipe = load_recipe(f"cifar10-{network}-{bits}-paper", small)
    before = build_model(recipe)[0].state_dict()
    result = fit(recipe, None, tmp_path / "r", max_steps=20, progress=False)
    assert result["step"] == 20 and not result["finished"]
    after = load_checkpoint(tmp_path / "r" / "last.ckpt")["model"]
    assert after.keys() == before.keys()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    parameters = dict(build_model(recipe)[0].named_parameters()).keys()
    assert moved >= parameters
    assert all(value.isfinite().all() for value in after.values())
    lines = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    train = [line for line in lines if line["kind"] == "train"]
    assert len(train) == 20 and all(math.isfinite(line["loss"]) for line in train)
    # The first of five epochs of warm-up, 20 steps each.
    assert [line["lr"] for line in train] == pytest.approx([0.1 * step / 101 for step in range(1, 21)])
