"""docs/models.md: what it says of the networks of CIFAR-10 is what they are."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import abste
from abste import models

ROW = re.compile(
    r"^\| [^|]+ \| `(\w+)`(?:, `width = (\d+)`)? \| ([\d,]+) \| ([\d,]+) \| ([\d,]+) \| ([\d.]*) ?\|", re.MULTILINE
)


def rows(root: Path) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = ROW.findall((root / "docs" / "models.md").read_text(encoding="utf-8"))
    return found


def test_every_network_has_its_row(repo_root: Path) -> None:
    names = [(row[0], row[1]) for row in rows(repo_root)]
    assert len(names) == len(set(names)) == 9
    classes = {name: inspect.signature(getattr(models, name)).parameters["num_classes"] for name in models.available()}
    assert {name for name, _ in names} == {name for name, count in classes.items() if count.default == 10}


@pytest.mark.parametrize("row", rows(Path(__file__).parents[2]), ids=lambda row: f"{row[0]}{row[1]}")
def test_numbers_are_those_counted(row: tuple[str, ...]) -> None:
    name, width, *stated = row
    model = models.create(name, **({"width": int(width)} if width else {})).eval()
    abste.convert(model, weights="ste", example_input=torch.zeros(1, 3, 32, 32))
    macs = 0

    def add(module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        nonlocal macs
        assert isinstance(module.weight, torch.Tensor)
        macs += module.weight[0].numel() * output.numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 32, 32))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    binary = sum(weight.numel() for weight in abste.nn.latent_weights(model))
    assert stated[:3] == [f"{count:,}" for count in (parameters, binary, macs)]
    if stated[3]:
        assert stated[3] == f"{parameters / 1e6:.2f}"


def test_resnet18_of_others_has_no_last_batch_norm() -> None:
    model = models.resnet18()
    others = sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith("bn2."))
    assert others == 11_173_962
