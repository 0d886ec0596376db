from __future__ import annotations

import copy
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import abste
from abste.deploy import export, lower, verify_file
from abste.deploy import format as abste_format
from abste.errors import ConversionError, RunError

EXAMPLE = torch.zeros(1, 3, 8, 8)


def network(width: int = 4) -> tuple[nn.Module, abste.nn.ConversionReport]:
    torch.manual_seed(0)
    model = abste.models.create("resnet8", width=width)
    report = abste.convert(model, example_input=EXAMPLE)
    return model.eval(), report


def test_export_says_what_it_did(tmp_path: Path) -> None:
    model, report = network()
    images = torch.randn(30, 3, 8, 8)
    exported = export(
        model,
        tmp_path / "net.abste",
        EXAMPLE,
        classes=[f"c{i}" for i in range(10)],
        normalization=([0.1, 0.2, 0.3], [1, 2, 3]),
        metadata={"name": "net"},
        data=("mine", [(images, model(images).argmax(1))]),
        kept_float=report.kept_float,
    )
    assert exported.file_bytes == (tmp_path / "net.abste").stat().st_size
    text = str(exported)
    assert re.search(r"^conv1 .* float +first layer$", text, re.MULTILINE) and re.search(r"fc .* last layer\n", text)
    assert "passed on 64 images: Gaussian noise" in text and "passed on 30 images: mine" in text
    assert "PyTorch 100.00%, packed 100.00%" in text and f"{exported.ratio:.1f} times smaller" in text
    net = abste.load(tmp_path / "net.abste")
    np.testing.assert_allclose(net(images), model(images).detach(), atol=1e-5)
    assert net.classes == tuple(f"c{i}" for i in range(10)) and net.metadata == {"name": "net"}
    assert net.normalization is not None and net.normalization[1].tolist() == [1, 2, 3]


def test_half_precision_says_what_it_changes(tmp_path: Path) -> None:
    model, _ = network(16)
    images = torch.randn(50, 3, 8, 8)
    sizes = {}
    for float16 in (False, True):
        exported = export(
            model, tmp_path / "net.abste", EXAMPLE, float16=float16, data=("mine", [(images, model(images).argmax(1))])
        )
        sizes[float16] = exported.file_bytes
        assert ("half precision changes logits" in str(exported)) is float16
    assert abs(sizes[False] - sizes[True] - 2 * (3 * 9 * 16 + 64 * 10)) < 256
    noise, mine = exported.rounding
    assert 0 < mine.difference < 1e-2 and mine.images == mine.labelled == 50 and noise.labelled == 0
    assert mine.correct[0] == 50 and "accuracy 100.00% before" in str(mine)
    assert abste.load(tmp_path / "net.abste").metadata == {"float16": True}


class Scaled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight * 0.37


def scaled(module: nn.Module) -> nn.Module:
    parametrize.register_parametrization(module, "weight", Scaled())
    return module


@pytest.mark.parametrize("wrap", [scaled, parametrizations.weight_norm, parametrizations.spectral_norm])
def test_half_precision_of_parametrised_weights(wrap: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    convolution, linear = wrap(nn.Conv2d(3, 4, 3)), wrap(nn.Linear(144, 5))
    model = nn.Sequential(convolution, nn.ReLU(), nn.Flatten(), linear).eval()
    images = torch.randn(8, 3, 8, 8)
    before = model(images)
    exported = export(model, tmp_path / "net.abste", EXAMPLE, float16=True)
    assert 0 < exported.rounding[0].difference < 1e-2
    assert torch.equal(model(images), before) and parametrize.is_parametrized(linear, "weight")
    file = (tmp_path / "net.abste").read_bytes()
    weights = [node.weight for node in abste_format.read(file).nodes if node.weight is not None]
    assert [weight.dtype for weight in weights] == [np.float16] * 2
    assert all(check.passed for check in verify_file(model, file, EXAMPLE, float16=True))


class Standardised(nn.Conv2d):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(input, weight / weight.std((1, 2, 3), keepdim=True), self.bias)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(4, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.kernel)


class Borrowed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.conv2d(x, self.conv.weight, self.conv.bias)


@pytest.mark.parametrize(
    ("make", "half"), [(lambda: Standardised(3, 4, 3), False), (Functional, False), (Borrowed, True)]
)
def test_half_precision_leaves_weights_that_are_computed(make: Any, half: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 4, 1)
    model = nn.Sequential(make(), nn.ReLU(), layer, layer, nn.Flatten()).eval()
    exported = export(
        model, tmp_path / "net.abste", EXAMPLE, float16=True, kept_float={"0": "so", "2": "it is", "3": "it is"}
    )
    file = (tmp_path / "net.abste").read_bytes()
    weights = [node.weight for node in abste_format.read(file).nodes if node.weight is not None]
    assert [weight.dtype for weight in weights] == [np.float16 if half else np.float32, np.float16, np.float16]
    assert all(check.passed for check in verify_file(model, file, EXAMPLE, float16=True))
    first, *others = [layer.why for layer in exported.report.layers]
    assert first.endswith(", float16") == half and others == ["it is, float16"] * 2


def test_half_precision_changes_no_model_in_training(tmp_path: Path) -> None:
    """Reading this weight in training changes it."""
    convolution = parametrizations.spectral_norm(nn.Conv2d(3, 8, 3))
    model = nn.Sequential(convolution, nn.Flatten(), nn.Linear(8 * 36, 5)).train()
    before = copy.deepcopy(model.state_dict())
    export(model, tmp_path / "net.abste", EXAMPLE, float16=True)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


class Doubled(abste.nn.BinaryConv2d):
    def forward(self, input: torch.Tensor, offset: torch.Tensor | None = None) -> torch.Tensor:
        return 2 * super().forward(input, offset)


def test_binary_layers_with_hooks_and_forwards_of_their_own(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = abste.nn.BinaryConv2d(3, 4, 3, weights="ste", activations="ste")
    model = nn.Sequential(layer, nn.Flatten()).eval()
    seen: list[float] = []
    watching = layer.register_forward_hook(lambda module, _, output: seen.append(float(output.mean())))
    export(model, tmp_path / "net.abste", EXAMPLE)  # which verifies
    watching.remove()
    layer.register_forward_hook(lambda _, __, output: 3 * output)
    with pytest.raises(ConversionError, match=r"was not written \(0 has hooks, which are not packed: remove them"):
        export(model, tmp_path / "net.abste", EXAMPLE)
    model = nn.Sequential(Doubled(3, 4, 3, weights="ste"), nn.Flatten()).eval()
    with pytest.raises(ConversionError, match=r"^0: Doubled has a forward of its own .* use BinaryConv2d itself"):
        lower(model, EXAMPLE)


def test_a_path_that_is_none() -> None:
    with pytest.raises(ConversionError, match=r"^the path of the file must be a str or a Path, not NoneType\.$"):
        export(nn.Flatten(), None, EXAMPLE)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("wrap", "remedy"),
    [
        (nn.utils.weight_norm, "call torch.nn.utils.remove_weight_norm(module, 'weight') first."),
        (nn.utils.spectral_norm, "call torch.nn.utils.remove_spectral_norm(module, 'weight') first."),
        (
            lambda m: prune.l1_unstructured(m, "weight", 0.5),
            "call torch.nn.utils.prune.remove(module, 'weight') first.",
        ),
    ],
    ids=["weight_norm", "spectral_norm", "prune"],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*was assigned during export")
def test_weights_that_a_hook_computes(wrap: Any, remedy: str, tmp_path: Path) -> None:
    model = nn.Sequential(wrap(nn.Conv2d(3, 4, 3)), nn.Flatten())
    file = abste_format.write(lower(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), EXAMPLE).graph)
    model(torch.ones(1, 3, 8, 8))  # what it leaves has a gradient
    for call in (
        lambda: export(model, tmp_path / "net.abste", EXAMPLE),
        lambda: lower(model, EXAMPLE),
        lambda: verify_file(model, file, EXAMPLE),
    ):
        with pytest.raises(ConversionError, match=rf"^0\.weight is computed from .*{re.escape(remedy)}$"):
            call()
    with torch.no_grad():
        model.eval()(EXAMPLE)  # nor can what can be copied be rounded, if it is computed anew
    export(model, tmp_path / "net.abste", EXAMPLE)
    with pytest.raises(ConversionError, match=rf"^0: its weight .*to half precision; {re.escape(remedy)}$"):
        export(model, tmp_path / "net.abste", EXAMPLE, float16=True)


def test_what_cannot_be_copied(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    model.kept = model(EXAMPLE)  # as a forward that keeps its output for later does
    with pytest.raises(ConversionError, match=r"^kept is .* was kept from an earlier call.*; remove it first\.$"):
        export(model, tmp_path / "net.abste", EXAMPLE)


def test_what_is_not_the_network_is_not_written(tmp_path: Path) -> None:
    """Numbers that cancel: sums in another order give another result, and the earlier file stays."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 8), nn.Linear(8, 4)).eval()
    path = tmp_path / "net.abste"
    export(model, path, EXAMPLE)
    before = path.read_bytes()
    with torch.no_grad():
        first, second = model[1], model[2]
        first.weight.copy_(first.weight[:1].expand(8, -1) * 1e3)
        first.bias.zero_()
        second.bias.zero_()
        second.weight.copy_(torch.tensor([1.0, -1.0] * 4).expand(4, -1))
        first.weight[1::2] += 1e-4
    with pytest.raises(ConversionError, match="the packed network is not the model, and was not written:\nFAILED"):
        export(model, path, EXAMPLE)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_leaves_the_earlier_file(tmp_path: Path) -> None:
    model, _ = network()
    path = tmp_path / "net.abste"
    export(model, path, EXAMPLE)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"cannot write .*net\.abste: File too large"):
            export(model, path, EXAMPLE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RunError, match="cannot write"):
        export(model, tmp_path / "nowhere" / "net.abste", EXAMPLE)


class CifarResNet18(nn.Module):
    """torchvision's ResNet-18 with the stem of CIFAR."""

    def __new__(cls) -> Any:
        model = torchvision.models.resnet18(num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = nn.Identity()
        return model


def test_size_of_resnet18(tmp_path: Path) -> None:
    """1-bit weights cost one bit: the promised ratios to the float32 state dict, 1x1 shortcuts staying float."""
    torch.manual_seed(0)
    model = CifarResNet18()
    report = abste.convert(model, example_input=torch.zeros(1, 3, 32, 32))
    assert len(report.binarized) == 16 and len(report.kept_float) == 5
    torch.save(model.state_dict(), tmp_path / "state.pt")
    for float16, wanted in ((False, 20.5), (True, 24.5)):
        file = abste_format.write(lower(model.eval(), torch.zeros(1, 3, 32, 32), float16=float16).graph)
        assert (tmp_path / "state.pt").stat().st_size / len(file) >= wanted
    binary = sum(layer.parameters for layer in report.layers if layer.binarized)
    bits = sum(
        node.weight.size
        for node in abste_format.read(file).nodes
        if node.weight is not None and node.weight.dtype == bool
    )
    assert bits == binary


def test_torch_is_not_imported_to_load_and_run(tmp_path: Path) -> None:
    model, _ = network()
    export(model, tmp_path / "net.abste", EXAMPLE)
    code = (
        "import sys, numpy, abste\n"
        f"net = abste.load({str(tmp_path / 'net.abste')!r})\n"
        "print(net(numpy.zeros((2, 3, 8, 8), numpy.float32)).shape)\n"
        "print(sorted(m for m in sys.modules if m.split('.')[0] in ('torch', 'PIL', 'abste')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shape, modules = done.stdout.splitlines()
    assert shape == "(2, 10)" and "torch" not in modules and "PIL" not in modules
    assert "abste.deploy" not in modules.replace("'", "").strip("[]").split(", ")
