from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from abste.errors import AbsteError, CheckpointError, ConfigError, RunError
from abste.train import Recipe, fit, load_recipe, load_run
from abste.train.distill import Teacher, distillation_loss
from abste.train.recipe import DistillSection
from abste.train.run import evaluation_batches, load_data

Tiny = Callable[..., Recipe]


@pytest.fixture(scope="module")
def teacher(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("teacher") / "float"
    fit(tiny("binarize=none", "model.kwargs.width=8", "average.decay=0.9"), None, out, progress=False)
    return out


@pytest.mark.parametrize(("alpha", "temperature"), [(1.0, 1.0), (0.3, 1.0), (0.5, 4.0), (1.0, 2.0)])
def test_the_loss(alpha: float, temperature: float) -> None:
    rng = np.random.default_rng(0)
    s, t, labels = rng.normal(size=(6, 5)), rng.normal(size=(6, 5)), rng.integers(0, 5, 6)

    def softmax(x: Any) -> Any:
        return np.exp(x) / np.exp(x).sum(1, keepdims=True)

    p, q = softmax(t / temperature), softmax(s / temperature)
    divergence = (p * np.log(p / q)).sum(1).mean()
    smooth = 0.9 * np.eye(5)[labels] + 0.1 / 5
    entropy = -(smooth * np.log(softmax(s))).sum(1).mean()
    expected = (1 - alpha) * entropy + alpha * temperature**2 * divergence
    section = DistillSection(teacher="x", alpha=alpha, temperature=temperature)
    arguments = (torch.tensor(s).float(), torch.tensor(t).float(), torch.tensor(labels), section, 0.1)
    assert float(distillation_loss(*arguments)) == pytest.approx(expected, rel=1e-5)


def test_only_a_student_that_agrees_has_no_loss() -> None:
    logits = torch.randn(4, 3, requires_grad=True)
    loss = distillation_loss(
        logits, logits.detach() + 1, torch.zeros(4, dtype=torch.int64), DistillSection(teacher="x")
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6) and gradient.abs().max() < 1e-6


def test_a_run(tiny: Tiny, teacher: Path, tmp_path: Path, outcome: Any) -> None:
    own = ["train.epochs=2", "average.decay=0.9"]
    distilled = tiny(*own, f"distill.teacher='{teacher}'")
    summary = fit(distilled, None, tmp_path / "a", progress=False)
    sums = json.loads((teacher / "summary.json").read_text())["sha256"]
    assert summary["teacher"]["sha256"] == sums["weights.safetensors"]
    assert summary["teacher"]["file"] == "weights.safetensors"
    cost = summary["cost"]
    taught = json.loads((teacher / "summary.json").read_text())["cost"]["forward_macs"]
    assert cost["estimated_training_flops"] == (6 * cost["forward_macs"] + 2 * taught) * cost["samples"]
    plain = fit(tiny(*own), None, tmp_path / "b", progress=False)
    assert "teacher" not in plain and outcome(tmp_path / "a")[0] != outcome(tmp_path / "b")[0]
    # The teacher is a file: nothing of its own random state or weights is trained.
    again = fit(tiny(*own, f"distill.teacher='{teacher}/averaged.safetensors'"), None, tmp_path / "c", progress=False)
    assert again["teacher"]["sha256"] == sums["averaged.safetensors"]
    assert outcome(tmp_path / "a")[0] != outcome(tmp_path / "c")[0]


def test_the_teacher_teaches(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    # Labels play no part with alpha = 1, and the student comes to agree with its teacher.
    agreement = []
    for alpha in (1.0, 1e-9):
        recipe = tiny(f"distill={{teacher = '{teacher}', alpha = {alpha}, temperature = 2.0}}")
        out = tmp_path / str(alpha)
        fit(recipe, None, out, progress=False)
        images = load_data(recipe, None)[1]
        student, master = load_run(out), load_run(teacher)
        with torch.no_grad():
            divergence = [
                distillation_loss(student(x), master(x), y, DistillSection(teacher="x"))
                for x, y in evaluation_batches(images, recipe, "cpu").epoch(0)
            ]
        agreement.append(float(torch.stack(divergence).mean()))
    assert agreement[0] < 0.8 * agreement[1]


def test_the_teacher_stays_what_it_is(tiny: Tiny, teacher: Path) -> None:
    recipe = tiny(f"distill.teacher='{teacher}'")
    made = Teacher(recipe, torch.device("cpu"), torch.no_grad, lambda module: module)
    model = made._model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images = torch.randn(8, 1, 8, 8, requires_grad=True)
    logits = made(images)
    assert not logits.requires_grad and not any(p.requires_grad for p in model.parameters())
    assert torch.allclose(logits, load_run(teacher)(images), atol=1e-3)  # in another memory format
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_resuming_needs_the_same_teacher(tiny: Tiny, teacher: Path, tmp_path: Path, outcome: Any) -> None:
    mine, out = tmp_path / "mine", tmp_path / "r"
    shutil.copytree(teacher, mine)
    recipe = tiny(f"distill.teacher='{mine}'", "train.epochs=2")
    fit(recipe, None, tmp_path / "whole", progress=False)
    fit(recipe, None, out, max_steps=30, progress=False)
    checkpoint = (out / "last.ckpt").read_bytes()
    shutil.move(mine, tmp_path / "away")
    with pytest.raises(RunError, match=r"distill.teacher = '.*mine': .*mine holds no run of abste"):
        fit(recipe, None, out, resume=True, progress=False)
    fit(tiny("binarize=none", "model.kwargs.width=8", "train.epochs=1"), None, mine, progress=False)
    message = (
        r"had the teacher [0-9a-f]{12} \(weights.safetensors of .*\), but .*mine now holds [0-9a-f]{12} .*; put that "
        "teacher back, or start again"
    )
    with pytest.raises(CheckpointError, match=message):
        fit(recipe, None, out, resume=True, progress=False)
    assert (out / "last.ckpt").read_bytes() == checkpoint
    shutil.rmtree(mine)
    shutil.move(tmp_path / "away", mine)
    fit(recipe, None, out, resume=True, progress=False)
    assert outcome(out) == outcome(tmp_path / "whole")
    shutil.rmtree(mine)
    assert fit(recipe, None, out, resume=True, progress=False)["finished"]  # which needs none any more


@pytest.mark.parametrize(
    ("own", "error", "message"),
    [
        (["data.holdout=200"], ConfigError, r"distill.teacher = '.*': that run was trained with data.holdout = 0"),
        (["distill.teacher='nothing'"], RunError, r"distill.teacher = 'nothing': nothing holds no run of abste"),
        (
            ["distill.teacher='runs/cifar10-resnet20-float'"],
            RunError,
            r"is not there yet: train it first \(abste train cifar10-resnet20-float --out runs/cifar10-resnet20",
        ),
    ],
)
def test_teachers_that_do_not_fit(
    tiny: Tiny, teacher: Path, tmp_path: Path, own: list[str], error: type[AbsteError], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(tiny(f"distill.teacher='{teacher}'", *own), None, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_other_data(tiny: Tiny, teacher: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    text = (other / "recipe.toml").read_text()
    (other / "recipe.toml").write_text(text.replace('name = "digits"\n', 'name = "cifar10"\n'))
    with pytest.raises(ConfigError, match=r"has data.name = 'cifar10', but this one 'digits'; a teacher must know"):
        fit(tiny(f"distill.teacher='{other}'"), None, tmp_path / "r")


@pytest.fixture
def downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    """torchvision's ResNet-18 with weights of our own, where it keeps what it has downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    network = torchvision.models.resnet18().eval()
    file = tmp_path / "hub" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    return network


def photos(*overrides: str) -> Recipe:
    return load_recipe("finetune", ["data.classes=1000", "data.holdout=0", "data.image_shape=[3,64,64]", *overrides])


def test_a_teacher_of_torchvision(downloaded: torch.nn.Module, tmp_path: Path) -> None:
    recipe = photos("distill.teacher='torchvision:resnet18'")
    teacher = Teacher(recipe, torch.device("cpu"), contextlib.nullcontext, lambda module: module)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), downloaded(images))
    file = tmp_path / "hub" / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    assert teacher.record["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert teacher.record["name"] == "ResNet18_Weights.IMAGENET1K_V1" and teacher.macs > 1e8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["distill.teacher='torchvision:resnet19'"], r"no classifier named 'resnet19'; did you mean 'resnet1"),
        (["distill.teacher='torchvision:resnet18:V3'"], r"no weights 'V3' of resnet18"),
        (["data.classes=10"], r"knows the 1000 classes of ImageNet, but this run has 10 of data set 'folder'"),
        (["data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]"], r"leave data\.mean and data\.std out"),
    ],
)
def test_teachers_of_torchvision_that_do_not_fit(changes: list[str], message: str) -> None:
    recipe = photos("distill.teacher='torchvision:resnet18'", *changes)
    with pytest.raises(ConfigError, match=message):
        Teacher(recipe, torch.device("cpu"), contextlib.nullcontext, lambda module: module)


def test_a_teacher_that_is_damaged(downloaded: torch.nn.Module, tmp_path: Path) -> None:
    (tmp_path / "hub" / "hub" / "checkpoints" / "resnet18-f37072fd.pth").write_bytes(b"no weights")
    recipe = photos("distill.teacher='torchvision:resnet18'")
    with pytest.raises(ConfigError, match=r"resnet18-f37072fd\.pth cannot be downloaded from https://.* or read"):
        Teacher(recipe, torch.device("cpu"), contextlib.nullcontext, lambda module: module)
