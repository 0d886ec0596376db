"""The recipes for ImageNet: their protocols, that they train, and what docs/imagenet.md says of their cost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from abste import models
from abste.models import imagenet_resnet34
from abste.nn import latent_weights, summary
from abste.train import fit, load_recipe, load_run
from abste.train.published import published_for
from abste.train.recipe import builtin_recipes
from abste.train.run import build_model

NAMES = [name for name in builtin_recipes() if name.startswith("imagenet-")]
SMALLER = ["imagenette-resnet18-w1a1", "imagenette-resnet18-w1a32"]
IMAGES, PEAK, SHARE, SCALING = 1_281_167, 312e12, 0.15, 0.9
COMMON = {"name": "folder", "image_shape": [3, 224, 224], "classes": 1000, "holdout": 0, "flip": "random"}
RESTE = {"name": "sgd", "lr": 0.1, "momentum": 0.9, "nesterov": False, "weight_decay": 1e-4, "decay_norms": True}
# estimators.md and the authors' code: network, optimizer, schedule, epochs, batch, scale of the crop, label smoothing.
PROTOCOL: dict[str, Any] = {
    "resnet": (RESTE, ("cosine", 0.0, 0.0), 250, 768, [0.08, 1.25], 0.0),
    "birealnet": ({"name": "adam", "lr": 1e-3, "weight_decay": 0.0}, ("linear", 0.0, 0.0), 256, 512, [0.08, 1.0], 0.1),
    "reactnet": ({"name": "adam", "lr": 1.25e-3}, ("linear", 0.0, 0.0), 128, 256, [0.08, 1.0], 0.0),
}
NETWORKS = {
    "resnet18": "imagenet_resnet18",
    "resnet34": "imagenet_resnet34",
    "birealnet18": "imagenet_resnet18_bireal",
    "reactnet-a": "reactnet_a",
}


def test_there_are_no_others() -> None:
    resnets = [f"imagenet-resnet{depth}-{bits}" for depth in (18, 34) for bits in ("float", "w1a32", "w1a1")]
    steps = [f"imagenet-reactnet-a-step{step}" for step in (1, 2)]
    assert sorted(NAMES) == sorted(["imagenet-birealnet18-w1a1", *resnets, *steps])


@pytest.mark.parametrize("name", NAMES)
def test_the_protocol(name: str) -> None:
    recipe = load_recipe(name)
    optimizer, schedule, epochs, batch, scale, smoothing = PROTOCOL[re.findall(r"[a-z]+", name)[1]]
    found = recipe.to_dict()
    assert found["data"].items() >= (COMMON | {"scale": scale, "resize": 256}).items()
    assert found["optimizer"].items() >= optimizer.items()
    assert tuple(found["schedule"][key] for key in ("shape", "warmup", "final")) == schedule
    train = found["train"]
    assert (train["epochs"], train["batch_size"], train["label_smoothing"]) == (epochs, batch, smoothing)
    assert found["model"] == {"name": next(NETWORKS[key] for key in NETWORKS if key in name), "kwargs": {}}
    if "step" in name:
        assert found["distill"] == {"teacher": "torchvision:resnet34", "alpha": 1.0, "temperature": 1.0}
        assert found["optimizer"]["weight_decay"] == (1e-5 if name.endswith("1") else 0.0)
        assert found.get("init") == (None if name.endswith("1") else "runs/imagenet-reactnet-a-step1")
    binarize = found.get("binarize", {})
    sides = {side for side in ("weights", "activations") if binarize.get(side)}
    wanted = {"float": set(), "w1a32": {"weights"}, "step1": {"activations"}}
    assert sides == wanted.get(name.rpartition("-")[2], {"weights", "activations"})
    module, _ = build_model(recipe)
    assert bool(latent_weights(module)) == ("weights" in sides)


def test_bits_are_all_that_differs() -> None:
    for depth in (18, 34):
        whole, *binary = (
            load_recipe(f"imagenet-resnet{depth}-{bits}").to_dict() for bits in ("float", "w1a32", "w1a1")
        )
        for recipe in binary:
            assert {key for key in recipe if recipe[key] != whole.get(key)} == {"name", "description", "binarize"}


@pytest.mark.parametrize("name", NAMES)
def test_the_page_has_the_cost(name: str, repo_root: Path) -> None:
    recipe = load_recipe(name)
    shape = (1, 3, 224, 224)
    macs = summary(models.create(recipe.model.name), shape).total_macs
    work = 6 * macs + (0 if recipe.distill is None else 2 * summary(imagenet_resnet34(), shape).total_macs)
    operations = work * IMAGES * recipe.train.epochs
    hours = operations / (PEAK * SHARE) / 3600
    cells = [f"`{name}`", str(recipe.train.epochs), f"{macs / 1e9:.3f}", f"{operations / 1e15:,.0f}"]
    cells += [f"{hours:.1f}", f"{hours / 8 / SCALING:.1f}"]
    page = (repo_root / "docs" / "imagenet.md").read_text(encoding="utf-8")
    line = next((line for line in page.splitlines() if line.startswith(f"| `{name}` |")), "")
    assert line.startswith("| " + " | ".join(cells) + " |")
    for row in published_for(recipe):
        assert f"{row.accuracy:.2f}".rstrip("0") in line.replace("67.40", "67.4")


def test_images_a_second_that_the_page_says_are_needed(repo_root: Path) -> None:
    rate = 8 * SCALING * PEAK * SHARE / (6 * 1.814e9)
    page = (repo_root / "docs" / "imagenet.md").read_text(encoding="utf-8")
    (said,) = re.findall(r"about ([\d,]+) images of ResNet-18 a second", page)
    assert int(said.replace(",", "")) == round(rate, -3)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for split in ("train", "val"):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for number in range(4):
                pixels = rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


@pytest.mark.parametrize("name", [*NAMES, *SMALLER])
def test_it_trains(name: str, photos: Path, tmp_path: Path) -> None:
    """Some steps at 32 pixels; without the teacher, which would be downloaded, and step 2 without step 1."""
    small = ["data.classes=2", "data.image_shape=[3,32,32]", "data.resize=36", "data.workers=0", "model.kwargs.width=8"]
    short = ["train.epochs=2", "train.batch_size=4", "train.threads=1", "distill=none", "init=none"]
    if name in SMALLER:
        short += ["data.image_shape=[3,64,64]", "data.resize=72", "train.image_sizes=[[0,32],[0.5,64]]"]
    recipe = load_recipe(name, [*small, *short])
    summary = fit(recipe, photos, tmp_path / "run", progress=False)
    assert summary["finished"] and summary["cost"]["steps"] == 4 and summary["test"]["images"] == 8
    load_run(tmp_path / "run")
