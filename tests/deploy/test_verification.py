"""`verify` passes what is the network and fails what is not, be it one bit."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import abste
from abste.deploy import format as abste_format
from abste.deploy import lower, verify, verify_file
from abste.deploy.graph import Graph, Op, Step, StepKind
from abste.deploy.verification import compare_constants, random_batches
from abste.errors import FormatError

EXAMPLE = torch.zeros(1, 3, 12, 12)


def settled(model: nn.Module) -> nn.Module:
    """With batch norms that have seen data, and factors of both signs."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            module.momentum = None
    for _ in range(4):
        model(torch.randn(16, *EXAMPLE.shape[1:]))
    return model.eval()


@cache
def chain() -> nn.Module:
    """Binary layers one behind the other, so that thresholds arise."""
    torch.manual_seed(0)
    options: Any = {"padding": 1, "bias": False, "activations": "ste"}
    return settled(
        nn.Sequential(
            *(nn.Conv2d(3, 9, 3, bias=False), nn.BatchNorm2d(9)),
            *(abste.nn.BinaryConv2d(9, 20, 3, **options), nn.BatchNorm2d(20)),
            *(abste.nn.BinaryConv2d(20, 17, 3, **options), nn.BatchNorm2d(17)),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(17, 5)),
        )
    )


@cache
def resnet(binary_activations: bool) -> nn.Module:
    torch.manual_seed(1)
    model = abste.models.create("resnet8_bireal", width=6)
    abste.convert(model, weights="ste", activations="ste" if binary_activations else None, example_input=EXAMPLE)
    return settled(model)


@cache
def lowered(model: nn.Module) -> Graph:
    return lower(model, EXAMPLE).graph


def failed(model: nn.Module, graph: Graph) -> bool:
    checks = verify_file(model, abste_format.write(graph), EXAMPLE, graph=lowered(model))
    return not all(check.passed for check in checks)


def fresh(model: nn.Module, example: Tensor = EXAMPLE) -> Graph:
    """A graph of one's own, whose steps and weights may be replaced."""
    return abste_format.read(abste_format.write(lowered(model) if example is EXAMPLE else lower(model, example).graph))


@pytest.mark.parametrize("model", [chain, lambda: resnet(True), lambda: resnet(False)], ids=["chain", "w1a1", "w1a32"])
def test_the_network_passes(model: Callable[[], nn.Module]) -> None:
    file = abste_format.write(lower(model(), EXAMPLE).graph)
    constants, noise = verify_file(model(), file, EXAMPLE)
    assert constants.passed and noise.passed, f"{constants}\n{noise}"
    assert str(constants).startswith("passed: ") and str(noise).startswith("passed on 64 images: Gaussian noise")
    assert noise.logit_difference < 1e-5 and noise.agreement == 64 and noise.reference_images == 1
    assert noise.signs == sum(layer.weight.numel() for layer in model().modules() if hasattr(layer, "binary_weight"))


# The three mutations of the design: a weight bit, a threshold, a scale.


@settings(max_examples=20)
@given(st.data())
def test_one_flipped_weight_bit_fails(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([chain(), resnet(True), resnet(False)]))
    graph = fresh(model)
    node = data.draw(st.sampled_from([node for node in graph.nodes if node.op in (Op.XNOR, Op.SIGN_CONV)]))
    assert node.weight is not None
    node.weight = node.weight.copy()
    node.weight.flat[data.draw(st.integers(0, node.weight.size - 1))] ^= True
    assert failed(model, graph)
    # The comparison of what it computes sees it too.
    assert not verify(model, abste_format.write(graph), random_batches((3, 12, 12)), "noise").passed


def thresholds(graph: Graph) -> list[Step]:
    return [step for node in graph.nodes for step in node.steps if step.kind is StepKind.THRESHOLD]


@settings(max_examples=20)
@given(st.data())
def test_one_threshold_off_by_one_fails(data: st.DataObject) -> None:
    graph = fresh(chain())
    (step,) = thresholds(graph)
    assert step.a is not None
    step.a = step.a.copy()
    channel = data.draw(st.integers(0, len(step.a) - 1))
    step.a[channel, 0] += data.draw(st.sampled_from([-2, 2, -1, 1]))
    assert failed(chain(), graph)


def test_a_threshold_off_by_one_is_seen_in_the_bits() -> None:
    """Where sums reach it. They are all odd or all even, by channel count and border: hence by two."""
    graph = fresh(chain())
    (step,) = thresholds(graph)
    assert step.a is not None
    bounds, seen = step.a, 0
    for channel in range(len(bounds)):
        step.a = bounds.copy()
        step.a[channel, 0] += 2
        found = verify(chain(), abste_format.write(graph), random_batches((3, 12, 12)), "noise")
        assert found.passed == (found.far_bits == 0)
        seen += not found.passed
    assert seen > len(bounds) / 2


@settings(max_examples=20)
@given(st.data())
def test_one_scale_off_by_a_thousandth_fails(data: st.DataObject) -> None:
    model = data.draw(st.sampled_from([chain(), resnet(True), resnet(False)]))
    graph = fresh(model)
    scaled = [s for node in graph.nodes for s in node.steps if s.kind in (StepKind.MULTIPLY, StepKind.AFFINE)]
    step = data.draw(st.sampled_from(scaled))
    assert step.a is not None
    step.a = step.a.copy()
    step.a[data.draw(st.integers(0, len(step.a) - 1))] *= np.float32(1.001)
    assert failed(model, graph)


def test_a_scale_off_by_a_thousandth_is_seen_in_the_logits() -> None:
    graph = fresh(resnet(False))
    node = next(node for node in graph.nodes if node.op is Op.SIGN_CONV)
    step = next(step for step in node.steps if step.kind in (StepKind.MULTIPLY, StepKind.AFFINE))
    assert step.a is not None
    step.a = step.a * np.float32(1.001)
    found = verify(resnet(False), abste_format.write(graph), random_batches((3, 12, 12)), "noise")
    assert not found.passed and found.images_off > 32 and "FAILED" in str(found)


def test_what_differs_is_named() -> None:
    graph = fresh(chain())
    (step,) = thresholds(graph)
    assert step.a is not None
    step.a = step.a.copy()
    step.a[3:5, 0] += 1
    found = compare_constants(graph, lowered(chain()))
    assert found.differences == ["  2, step 0 (threshold, 3): 2 of 40"]
    assert str(found).startswith("FAILED: ")


def test_other_nodes_are_no_difference_of_constants() -> None:
    """What another version of abste made is judged by what it computes."""
    graph = fresh(chain())
    graph.nodes[-1].steps.append(Step(StepKind.ADD, a=np.zeros(5, np.float32)))
    constants, noise = verify_file(chain(), abste_format.write(graph), EXAMPLE)
    assert constants.passed and not constants.comparable and "not compared" in str(constants)
    assert noise.passed


def test_labels_give_the_accuracy_of_both_sides() -> None:
    images = torch.randn(40, *EXAMPLE.shape[1:])
    labels = chain()(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 5
    data: list[tuple[Tensor, Tensor | None]] = [(images[:15], labels[:15]), (images[15:], labels[15:])]
    found = verify(chain(), abste_format.write(lowered(chain())), data, "mine")
    assert found.passed and found.images == found.labelled == 40
    assert found.accuracy == (0.75, 0.75) and "PyTorch 75.00%, packed 75.00% (40 labelled images)" in str(found)


@pytest.mark.parametrize(("shift", "passes"), [(1e-7, True), (1.0, False)])
def test_bits_may_differ_only_next_to_zero(shift: float, passes: bool) -> None:
    model = nn.Sequential(abste.nn.BinaryLinear(64, 4, bias=False, activations="ste")).eval()
    graph = fresh(model, torch.zeros(1, 64))
    signs = graph.nodes[0]
    assert signs.op is Op.IDENTITY and not signs.steps
    signs.steps = [Step(StepKind.ADD, a=np.full(64, -shift, np.float32))]
    images = torch.randn(20, 64)
    images[:, 5] = 0  # +1 in PyTorch, -1 in the file
    found = verify(model, abste_format.write(graph), [(images, None)], "zeros")
    assert found.passed is passes and found.wrong_integers == 0
    assert found.images_with_bits == 20 and (found.far_bits == 0) is passes
    if passes:
        assert found.differing_bits == 20 and found.farthest_bit == 0


class Twice(nn.Module):
    """A binary layer that is called twice, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = abste.nn.BinaryConv2d(3, 3, 3, padding=1, bias=False, activations="ste")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        first = self.conv(x)
        return self.conv(first - 1.5).mean((2, 3)), first


class Alias(nn.Module):
    """One layer by two names, and a call by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.one = abste.nn.BinaryConv2d(3, 3, 1, activations="ste")
        self.two, self.norm = self.one, nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(self.norm(self.two(input=x))).mean((2, 3))


class Dead(Alias):
    """A call that leads to nothing, before the one that does."""

    def forward(self, x: Tensor) -> Tensor:
        return (self.one(x), self.two(self.norm(x)))[1].mean((2, 3))


class Gated(Alias):
    """Two calls, of which the first waits for the second in the graph."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x)
        return y * self.one(self.norm(x)).mean((2, 3), keepdim=True).sigmoid()


@pytest.mark.parametrize("make", [Alias, Dead, Gated])
def test_calls_of_a_layer_are_told_apart(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = settled(make())
    file = abste_format.write(lower(model, EXAMPLE).graph)
    constants, noise = verify_file(model, file, EXAMPLE)
    assert constants.passed and noise.passed and noise.integers > 0, str(noise)
    graph = abste_format.read(file)
    node = next(node for node in graph.nodes if node.op is Op.XNOR)
    assert node.weight is not None
    node.weight = node.weight.copy()
    node.weight[0, 0, 0, 0] ^= True
    assert not verify(model, abste_format.write(graph), random_batches((3, 12, 12)), "noise").passed


def test_layers_that_are_called_twice_and_several_outputs() -> None:
    torch.manual_seed(0)
    model = Twice().eval()
    file = abste_format.write(lower(model, EXAMPLE).graph)
    constants, noise = verify_file(model, file, EXAMPLE)
    assert constants.passed and noise.passed, str(noise)
    assert noise.integers == 2 * 64 * 3 * 12 * 12
    # The second output counts as well.
    graph = abste_format.read(file)
    for node in graph.nodes:
        if node.out is not None and graph.values[node.out].output and graph.values[node.out].rank == 3:
            node.steps = [*node.steps, Step(StepKind.ADD, a=np.full(3, 1e-3, np.float32))]
    assert not verify(model, abste_format.write(graph), random_batches((3, 12, 12)), "noise").passed


def sized(width: int = 8, classes: int = 5, size: int = 3, stride: int = 1, features: int = 3) -> nn.Module:
    """A network that can differ in one shape, on images of 12x12."""
    torch.manual_seed(0)
    options: Any = {"bias": False, "activations": "ste"}
    layers = [
        *(nn.Conv2d(features, 6, 3, bias=False), nn.BatchNorm2d(6)),
        *(abste.nn.BinaryConv2d(6, width, size, stride=stride, **options), nn.BatchNorm2d(width)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)),
    ]
    return nn.Sequential(*layers).eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 9}, r"  2, weight: \(9, 6, 3, 3\) in the file, \(8, 6, 3, 3\) in the model"),
        ({"size": 5}, r"  2, weight: \(8, 6, 5, 5\) in the file, \(8, 6, 3, 3\) in the model"),
        ({"classes": 1}, r"  output: \(1,\) in the file, \(5,\) in the model"),
        ({"classes": 7}, r"  output: \(7,\) in the file, \(5,\) in the model"),
        ({"features": 1}, r"  input: \(1, 12, 12\) in the file, \(3, 12, 12\) in the model"),
        ({"stride": 2}, r"  2, output: \(8, 4, 4\) in the file, \(8, 8, 8\) in the model"),
    ],
    ids=str,
)
def test_a_file_of_other_shapes_fails_and_says_where(change: dict[str, int], message: str) -> None:
    example = torch.zeros(1, change.get("features", 3), 12, 12)
    file = abste_format.write(lower(sized(**change), example).graph)
    data = "mine", [(torch.randn(2, 3, 12, 12), torch.zeros(2))]
    constants, check = verify_file(sized(), file, EXAMPLE, data=data, int8="all")
    assert not check.passed and constants.passed
    first, line = str(check).splitlines()
    assert first == "FAILED: the file is of another network than the model, and there differ"
    assert re.fullmatch(message, line)


def test_a_file_with_binary_weights_of_a_layer_that_has_none_fails() -> None:
    model = sized()
    file = abste_format.write(lower(model, EXAMPLE).graph)
    torch.manual_seed(0)
    model[2] = abste.nn.BinaryConv2d(6, 8, 3, weights=None, activations="ste", bias=False)
    *_, check = verify_file(model, file, EXAMPLE)
    assert not check.passed and "  2, weight: binary in the file, float in the model" in str(check)


def test_one_layer_more_in_the_file_fails() -> None:
    """A layer that the file runs twice, and the model once."""
    torch.manual_seed(0)
    model = Twice().eval()
    file = abste_format.write(lower(model, EXAMPLE).graph)
    model.forward = lambda x: ((y := model.conv(x)).mean((2, 3)), y)  # type: ignore[assignment]
    check = verify(model, file, random_batches((3, 12, 12)), "noise")
    assert not check.passed and "calls: 2 in the file, 1 in the model" in str(check)


def test_a_file_of_another_model_fails() -> None:
    file = abste_format.write(lower(resnet(True), EXAMPLE).graph)
    torch.manual_seed(7)
    other = abste.models.create("resnet8_bireal", width=6)
    abste.convert(other, weights="ste", activations="ste", example_input=EXAMPLE)
    assert not all(check.passed for check in verify_file(settled(other), file, EXAMPLE))
    with pytest.raises(FormatError, match="damaged"):
        verify_file(resnet(True), file[:-1] + bytes([file[-1] ^ 1]), EXAMPLE)
