"""The table of published accuracies, and what is shown of it."""

from __future__ import annotations

import tomllib

import pytest

from abste import models
from abste.train import load_recipe
from abste.train.published import IMAGENET_TITLES, PUBLISHED, TITLES, comments, overview, published_for


def test_the_table_is_sound() -> None:
    keys = [(row.network, row.bits, row.method) for row in PUBLISHED]
    assert len(keys) == len(set(keys))
    titles = TITLES | IMAGENET_TITLES
    assert len(titles) == len(TITLES) + len(IMAGENET_TITLES)
    assert {row.network for row in PUBLISHED} == titles.keys() <= set(models.available())
    small = [row for row in PUBLISHED if row.network in TITLES]
    assert all(80 < row.accuracy < 95 and row.source for row in small)
    assert all(55 < row.accuracy < 75 and row.source for row in PUBLISHED if row not in small)
    binary = [row.accuracy for row in small if row.bits != "float"]
    assert max(binary) < max(row.accuracy for row in small if row.bits == "float")
    # Numbers that were never read, only remembered, are none.
    assert not [row for row in PUBLISHED if row.method in ("AdaSTE", "LQ-Net")]


def test_restes_own_rows_are_those_of_its_readme() -> None:
    rows = {(row.network, row.bits): (row.accuracy, row.epochs) for row in PUBLISHED if row.method == "ReSTE"}
    assert rows == {
        ("resnet20", "W1A1"): (86.75, 1000),
        ("resnet20", "W1A32"): (91.32, 1000),
        ("resnet20_bireal", "W1A1"): (87.92, 1000),
        ("resnet18", "W1A1"): (92.63, 2000),
        ("vgg_small", "W1A1"): (92.55, 1000),
        ("imagenet_resnet18", "W1A32"): (67.40, 250),
        ("imagenet_resnet18", "W1A1"): (60.88, 250),
        ("imagenet_resnet34", "W1A32"): (70.74, 250),
        ("imagenet_resnet34", "W1A1"): (65.05, 250),
    }


def methods(recipe: str, *overrides: str) -> list[str]:
    return [row.method for row in published_for(load_recipe(recipe, overrides))]


def test_a_recipe_has_the_rows_of_its_network_and_bits() -> None:
    assert methods("cifar10-resnet18-w1a32-paper") == ["AB-STE (W/A inferred)"]
    assert methods("cifar10-resnet20-w1a1-paper") == ["IR-Net", "RBNN", "ReSTE"]
    assert methods("cifar10-resnet20-w1a1") == ["IR-Net", "RBNN", "ReSTE"]  # another protocol, the same network
    assert methods("cifar10-resnet20-w1a1", "model.name=resnet20")[:3] == ["DSQ", "DoReFa", "STE alone"]
    assert methods("cifar10-vgg-small-float-paper") == ["full precision"]
    for nothing in (
        methods("digits-resnet8-w1a32"),
        methods("cifar10-resnet20-float", "model.name=resnet8"),
        methods("cifar10-resnet20-float", "model.kwargs.width=8"),
        methods("cifar10-resnet20-w1a1", "binarize.weights=none"),
    ):
        assert nothing == []


@pytest.mark.parametrize("width", [60, 80, 120])
def test_the_overview_has_every_row_in_lines_that_fit(width: int) -> None:
    text = overview(width)
    assert text.startswith("Published accuracy on CIFAR-10 in %")
    assert max(map(len, text.splitlines())) <= width
    lines = [line for line in text.splitlines() if line[0] == " "]
    words = " ".join(text.split())
    for row in PUBLISHED:
        assert f"{row.method} {row.accuracy}" in words
    assert len([line for line in lines if line[2] != " "]) == len({(row.network, row.bits) for row in PUBLISHED})


def test_comments_have_epochs_and_sources_and_are_toml() -> None:
    recipe = load_recipe("cifar10-resnet18-w1a1-paper")
    text = comments(recipe)
    assert "#   ReSTE              92.63  2000 epochs  repository: DravenALG/ReSTE\n" in text
    assert "A&B (ReActNet-18)  91.94               repository: Ruichen0424/AB-BNN; abstract: 92.30\n" in text
    assert max(map(len, text.splitlines())) <= 120
    assert tomllib.loads(text + recipe.to_toml()) == recipe.to_dict()
    assert comments(load_recipe("digits-resnet8-w1a32")) == ""
