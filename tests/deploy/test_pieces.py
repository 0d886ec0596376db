"""The pieces of methods, exported: what is packed is verified, and stays bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import abste
from abste.deploy import format as abste_format
from abste.deploy.graph import Op, Step, StepKind
from abste.deploy.lowering import lower
from abste.deploy.packing import export
from abste.deploy.verification import verify
from abste.errors import ConversionError
from abste.estimators import EstimatorSchedule
from abste.nn import (
    AdaptiveSet,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    ChannelShift,
    GradientBranch,
    Maxout,
    RPReLU,
    RSign,
    remove_branches,
)

A: dict[str, Any] = {"activations": "approx_sign"}
IMAGE, SIGNAL, VECTOR = (4, 8, 6), (4, 9), (12,)


@torch.no_grad()
def settled(model: nn.Module) -> nn.Module:
    """As after training: no shift, slope or centre where it began."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            module.weight.uniform_(-0.5, 1.5)
            module.bias.normal_(0, 0.3)
        elif isinstance(module, ChannelShift):
            module.shift.normal_(0, 0.5)
        elif isinstance(module, nn.PReLU):
            module.weight.uniform_(-0.5, 0.5)
        elif isinstance(module, Maxout):
            module.positive.uniform_(-0.5, 1.5)
            module.negative.uniform_(-0.5, 1.5)
        elif isinstance(module, AdaptiveSet):
            module.scale.uniform_(0.3, 1.5)
            module.center.uniform_(-1.5, 1.5)
        elif isinstance(module, BinaryConv2d | BinaryConv1d | BinaryLinear):
            module.weight += 0.1
            module.reset_scale()
    return model.eval()


def exported(model: nn.Module, shape: tuple[int, ...], folder: Path, **options: Any) -> Any:
    """Export, which verifies; and the same once more on other images."""
    settled(model)
    done = export(model, folder / "model.abste", torch.zeros(1, *shape), **options)
    assert all(check.passed for check in done.checks)
    if not options:
        images = torch.randn(9, *shape)
        found = verify(model, (folder / "model.abste").read_bytes(), [(images, None)], "more", reference_images=9)
        assert found.passed, str(found)
    return done


def packed(done: Any) -> dict[str, str]:
    return {layer.name: layer.packed for layer in done.report.layers}


def block(channels: int, out: int, before: nn.Module, act: nn.Module, **options: Any) -> list[nn.Module]:
    conv = BinaryConv2d(channels, out, 3, padding=1, bias=False, **{**A, **options})
    return [before, conv, nn.BatchNorm2d(out), act]


def reactnet(sign: Callable[[int], nn.Module], act: Callable[[int], nn.Module], **options: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        *block(8, 12, sign(8), act(12), **options),
        *block(12, 6, sign(12), act(6), **options),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )


@pytest.mark.parametrize("act", [RPReLU, Maxout])
@pytest.mark.parametrize("sign", [ChannelShift, RSign])
def test_networks_of_reactnet(sign: Any, act: Any, tmp_path: Path) -> None:
    model = reactnet(sign, act, activations=None if sign is RSign else "approx_sign")
    names = packed(exported(model, IMAGE, tmp_path))
    assert names == {"0": "float", "3": "xnor", "7": "xnor", "12": "float"}


def test_shifts_become_thresholds() -> None:
    model = nn.Sequential(
        BinaryConv2d(4, 6, 3, bias=False, **A), nn.BatchNorm2d(6), ChannelShift(6), BinaryConv2d(6, 5, 1, **A)
    )
    first = lower(settled(model), torch.zeros(1, *IMAGE)).graph.nodes[1]
    assert first.op is Op.XNOR and first.out is None
    assert [step.kind for step in first.steps] == [StepKind.THRESHOLD]


CENTERED: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "plain": (lambda **o: BinaryConv2d(4, 6, 3, **o), IMAGE),
    "padded": (lambda **o: BinaryConv2d(4, 6, (3, 2), (2, 1), (1, 0), bias=False, **o), IMAGE),
    "groups": (lambda **o: BinaryConv2d(4, 6, 3, padding=2, dilation=2, groups=2, **o), IMAGE),
    "same, even": (lambda **o: BinaryConv2d(4, 6, 4, padding="same", **o), IMAGE),
    "1x1, strided": (lambda **o: BinaryConv2d(4, 6, 1, 2, **o), IMAGE),
    "1d": (lambda **o: BinaryConv1d(4, 6, 3, padding=1, **o), SIGNAL),
    "linear": (lambda **o: BinaryLinear(12, 7, **o), VECTOR),
}


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("activations", ["approx_sign", None])
@pytest.mark.parametrize("name", CENTERED)
def test_centres(name: str, activations: str | None, float16: bool, tmp_path: Path) -> None:
    build, shape = CENTERED[name]
    options: dict[str, Any] = {"float16": True} if float16 else {}
    for center, scale in (("mean", "std"), ("learned", None)):
        model = nn.Sequential(build(activations=activations, center=center, scale=scale))
        done = exported(model, shape, tmp_path, **options)
        kind = "xnor" if activations else "sign_conv"
        assert [(layer.name, layer.packed) for layer in done.report.layers] == [
            ("0", kind),
            ("0.window", kind),
            ("0.window", "float"),
        ]
        assert done.report.layers[1].why == "sums over windows, for the centres of 0"


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("pad_value", [0, 1, -1])
@pytest.mark.parametrize("center", [None, "mean"])
@pytest.mark.parametrize("name", CENTERED)
def test_sets(name: str, center: Any, pad_value: int, tmp_path: Path) -> None:
    build, shape = CENTERED[name]
    options: dict[str, Any] = {**A, "center": center, "scale": "channel"}
    if name != "linear":
        options["pad_value"] = pad_value
    elif pad_value:
        return
    done = exported(nn.Sequential(AdaptiveSet(build(**options))), shape, tmp_path)  # type: ignore[arg-type]
    names = packed(done)
    assert names["0.layer"] == "xnor"
    assert ("0.border" in names) == (pad_value == 0 and name in ("padded", "groups", "same, even", "1d"))


def adabin(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(4, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 12, 3, padding=1, bias=False),
        nn.BatchNorm2d(12),
        Maxout(12),
        nn.Conv2d(12, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        Maxout(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 5),
    )
    adaptive = {"scale": "std", "scale_gradient": True, "center": "mean", "adaptive_set": True}
    abste.convert(model, **{**A, **adaptive, **options}, example_input=torch.zeros(2, *IMAGE))
    return model


@pytest.mark.parametrize("float16", [False, True])
def test_a_network_of_adabin(float16: bool, tmp_path: Path) -> None:
    done = exported(adabin(), IMAGE, tmp_path, **({"float16": True} if float16 else {}))
    names = packed(done)
    assert names["2.layer"] == names["5.layer"] == "xnor"
    assert "for the adaptive set of 2" in next(x.why for x in done.report.layers if x.name == "2.border")
    wanted = abste.summary(adabin(), (1, *IMAGE)).packed_bytes
    packed_bytes = sum(layer.nbytes for layer in done.report.layers) + done.report.rest_bytes
    if not float16:  # batch norms become one factor and one addend for each channel
        assert packed_bytes <= wanted


def test_a_flipped_border_fails(tmp_path: Path) -> None:
    model = settled(adabin())
    graph = lower(model, torch.zeros(1, *IMAGE)).graph
    node = next(node for node in graph.nodes if node.name == "2.border" and node.op is Op.CONV)
    assert node.weight is not None
    node.weight = node.weight + np.float32(1)
    images = torch.randn(4, *IMAGE)
    assert not verify(model, abste_format.write(graph), [(images, None)], "noise").passed


def test_branches_are_left_behind(tmp_path: Path) -> None:
    model = adabin(gradient_branch=0.2, standardize="recu")
    schedule = EstimatorSchedule(model, 4)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    for _ in range(4):
        model(torch.randn(8, *IMAGE)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    done = exported(model, IMAGE, tmp_path)
    names = packed(done)
    assert names["2.layer.layer"] == "xnor" and not any(name.endswith("branch") for name in names)
    assert isinstance(model.get_submodule("2"), GradientBranch)
    remove_branches(model)
    lean = lower(model, torch.zeros(1, *IMAGE))
    assert lean.report.float_bytes == done.report.float_bytes
    assert {layer.name: layer.packed for layer in lean.report.layers}["2.layer"] == "xnor"


@pytest.mark.parametrize("wrap", [False, True])
def test_the_model_itself_may_be_a_piece(wrap: bool, tmp_path: Path) -> None:
    piece: nn.Module = AdaptiveSet(BinaryConv2d(4, 6, 3, padding=1, **A))
    if wrap:
        piece = GradientBranch(piece)  # type: ignore[arg-type]
    assert packed(exported(piece, IMAGE, tmp_path))["layer.layer" if wrap else "layer"] == "xnor"
    exported(RSign(4), IMAGE, tmp_path)


def test_what_cannot_be_packed_is_named() -> None:
    padded = nn.Sequential(AdaptiveSet(BinaryConv2d(4, 6, 3, padding=1, padding_mode="reflect", **A)))
    with pytest.raises(ConversionError, match=r"^0\.layer: a binary layer with padding_mode='reflect' cannot be pac"):
        lower(padded.eval(), torch.zeros(1, *IMAGE))
    gone = nn.Sequential(AdaptiveSet(BinaryConv2d(4, 6, 3, **A)))
    with torch.no_grad():
        gone[0].scale.zero_()  # type: ignore[operator, union-attr]
    with pytest.raises(ConversionError, match=r"^0: aten\.div.* divides by a tensor, or by zero"):
        lower(gone.eval(), torch.zeros(1, *IMAGE))


@pytest.mark.parametrize(("shift", "passes"), [(1e-7, True), (1.0, False)])
def test_a_bit_is_judged_by_what_stood_before_its_sign(shift: float, passes: bool) -> None:
    """A sign module gives ±1, of which none is near zero: what counts is the number that it took the sign of."""
    model = nn.Sequential(RSign(64), nn.Flatten(), BinaryLinear(64, 4, bias=False)).eval()
    graph = lower(model, torch.zeros(1, 64)).graph
    signs = next(node for node in graph.nodes if node.bits is not None)
    signs.steps = [*signs.steps, Step(StepKind.ADD, a=np.full(64, -shift, np.float32))]
    images: Tensor = torch.randn(20, 64)
    images[:, 5] = 0  # +1 in PyTorch, -1 in the file
    found = verify(model, abste_format.write(graph), [(images, None)], "zeros")
    assert found.passed is passes and found.wrong_integers == 0
    assert found.images_with_bits == 20 and (found.far_bits == 0) is passes
