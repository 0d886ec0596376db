"""From a torch model to a graph: twins.py, torch.export, walk.py, passes, plan."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from abste.deploy.graph import Graph, Node, Op, StepKind
from abste.deploy.operations import HANDLERS
from abste.deploy.passes import simplify, to_half
from abste.deploy.plan import plan
from abste.deploy.twins import float_copy, round_to_half, with_twins
from abste.deploy.walk import BATCH, Walk
from abste.errors import ConversionError
from abste.nn.branch import GradientBranch


@dataclass
class PackedLayer:
    """A layer with weights, as it was packed.

    Attributes:
        name: of its module.
        packed: how: ``xnor`` (binary inputs too), ``sign_conv`` (float inputs) or ``float``.
        why: for a float layer, why; for ``xnor``, whether a threshold took the place of its float steps.
        weights: how many.
        nbytes: of its weights in the file.
    """

    name: str
    packed: str
    why: str
    weights: int
    nbytes: int


@dataclass
class PackReport:
    """What was packed, and the sizes.

    Attributes:
        layers: in the order in which they run.
        rest_bytes: of factors, biases and thresholds.
        float_bytes: of the model's float32 state dict.
    """

    layers: list[PackedLayer]
    rest_bytes: int
    float_bytes: int

    def __str__(self) -> str:
        rows = [("layer", "weights", "bytes", "packed", "")]
        rows += [(x.name, f"{x.weights:,}", f"{x.nbytes:,}", x.packed, x.why) for x in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{name:{widths[0]}}  {weights:>{widths[1]}}  {nbytes:>{widths[2]}}  {packed:{widths[3]}}  {why}".rstrip()
            for name, weights, nbytes, packed, why in rows
        ]
        bits = sum(layer.nbytes for layer in self.layers if layer.packed != "float")
        floats = sum(layer.nbytes for layer in self.layers if layer.packed == "float")
        lines.append(
            f"\n1-bit weights {bits:,} bytes, float weights {floats:,}, factors and thresholds {self.rest_bytes:,}"
        )
        return "\n".join(lines)


@dataclass
class Lowered:
    """A model as a graph.

    Attributes:
        graph: simplified, its memory planned.
        report: what was packed and what stayed float.
    """

    graph: Graph
    report: PackReport


def lower(
    model: nn.Module,
    example_input: Tensor,
    *,
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    metadata: dict[str, Any] | None = None,
    float16: bool = False,
) -> Lowered:
    """Lower a model with one input to a graph.

    Args:
        model: a torch model of operations that docs/format.md knows; it is not changed.
        example_input: (N, C, H, W), (N, C, L) or (N, C) float32, for the shapes.
        classes: names of the classes.
        normalization: mean and standard deviation per channel of the input, of pixels between 0 and 1.
        metadata: what else the file shall say of itself, as JSON types.
        float16: round the weights of float layers to half precision, and store what that holds exactly in it: not
            weights that a layer computes from its own in each call.

    Raises:
        ConversionError: an operation, or a use of one, that the graph does not know: names the module, the operation,
            and what to do. Or an argument that is not of these types.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"only a torch.nn.Module can be packed, not {type(model).__name__}.")
    if (
        not isinstance(example_input, Tensor)
        or not example_input.is_floating_point()
        or example_input.dim() not in (2, 3, 4)
        or 0 in example_input.shape[1:]
    ):
        raise ConversionError(
            "example_input must be a float tensor (N, C, H, W), (N, C, L) or (N, C) with no empty dimension."
        )
    check_metadata(metadata)
    names = None if classes is None else _names(classes)
    example = torch.zeros(BATCH, *example_input.shape[1:])
    source = model
    if float16:
        source = float_copy(model)
        round_to_half(source)
    replaced = with_twins(source)
    try:
        with torch.no_grad():
            replaced(example)
    except Exception as error:  # whatever the model raises
        raise ConversionError(
            f"the model does not run on one float32 tensor of shape {tuple(example.shape)}, which is that of "
            f"example_input but for the batch: {_reason(error)}"
        ) from error
    try:
        with torch.no_grad():
            program = torch.export.export(replaced, (example,))
    except Exception as error:  # torch.export raises many kinds
        raise ConversionError(
            f"torch.export cannot trace this model, whose forward must not depend on the values of tensors: "
            f"{_reason(error)}"
        ) from error
    walk = Walk(program, HANDLERS)
    graph = walk.built
    if normalization is not None:
        channels = graph.values[0].shape[2]
        with contextlib.suppress(TypeError, ValueError):  # no numbers, or lists of several lengths
            graph.normalization = np.array(normalization, np.float32)
        if graph.normalization is None or graph.normalization.shape != (2, channels):
            raise ConversionError(
                f"normalization must be a mean and a standard deviation for each of {channels} channels."
            )
    graph.classes = names
    graph.metadata = metadata
    simplify(graph)
    _order_outputs(graph, walk.results)
    if float16:
        to_half(graph)
    graph = plan(graph)
    return Lowered(graph, _report(model, graph))


def check_metadata(metadata: Any) -> None:
    """Refuse what an .abste file cannot say of itself.

    Raises:
        ConversionError: it is no dict of JSON types.
    """
    if metadata is None:
        return
    if not isinstance(metadata, dict):
        raise ConversionError(f"metadata must be a dict of JSON types, not {type(metadata).__name__}.")
    for key, value in metadata.items():
        try:  # as the file has it; JSON has no word for NaN and infinity
            json.dumps({key: value}, ensure_ascii=False, allow_nan=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ConversionError(
                f"metadata[{key!r}] must be of JSON types (str, int, float, bool, None, lists and dicts): {error}."
            ) from error


def _names(classes: Any) -> tuple[str, ...]:
    if isinstance(classes, str):  # else each of its letters would be a class
        raise ConversionError(f"classes must be a sequence of names, not the str {classes!r}.")
    try:
        names = tuple(classes)
        for name in names:
            str.encode(name)  # as the file has it
    except (TypeError, UnicodeEncodeError) as error:
        raise ConversionError(f"classes must be a sequence of names, each of them a str: {error}.") from error
    return names


def _order_outputs(graph: Graph, results: list[int]) -> None:
    """Outputs stand in the file in the order in which nodes write them: copy those that come before their turn."""
    written = {index: number for number, node in enumerate(graph.nodes) for index in node.written()}
    latest = -1
    for index in results:
        if written[index] > latest:
            latest = written[index]
            continue
        value = graph.values[index]
        graph.values.append(replace(value))
        value.output = False
        graph.nodes.append(Node(Op.IDENTITY, (index,), len(graph.values) - 1))
        latest = len(graph.nodes) - 1


def _reason(error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


_PARTS = {"window": "sums over windows, for the centres", "border": "zero padding, for the adaptive set"}


def _report(model: nn.Module, graph: Graph) -> PackReport:
    layers, rest = [], 0
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        rest += sum(array.nbytes for step in node.steps for array in (step.a, step.b) if array is not None)
        if node.weight is None:
            continue
        packed = "float" if node.op is Op.CONV else node.op.name.lower()
        why = ""
        if node.op is Op.CONV:
            why = "its weights are not binary in the model" + (", float16" if node.weight.itemsize == 2 else "")
        elif node.steps and node.steps[0].kind is StepKind.THRESHOLD:
            why = "threshold on integer sums"
        owner, _, part = node.name.rpartition(".")
        if part in _PARTS and node.name not in names:
            why = f"{_PARTS[part]} of {owner or 'the model'}"
        size = node.weight.nbytes if node.op is Op.CONV else -(-node.weight.size // 8)
        layers.append(PackedLayer(node.name, packed, why, node.weight.size, size))
    branches = {module.branch.data_ptr() for module in model.modules() if isinstance(module, GradientBranch)}
    floats = sum(
        4 * tensor.numel()
        for tensor in model.state_dict().values()
        if tensor.is_floating_point() and tensor.data_ptr() not in branches
    )
    return PackReport(layers, rest, floats)
