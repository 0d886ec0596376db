"""From a packed network back to plain float operations, for engines that know no bits. Needs numpy alone.

An engine that is to be compared with a packed network needs a network of the same shape: :func:`unpack` writes one down
as a list of operations of ONNX, which torch, onnxruntime and OpenVINO all have (:mod:`abste.bench`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from abste.deploy.graph import Array, Graph, Kind, Node, Op, Step, StepKind

Signs = Literal["drop", "exact", "bits"]


@dataclass
class Operation:
    """One operation of a plain network.

    Attributes:
        kind: name of the operator in ONNX, or ``Binarize`` (1 where x >= 0, else 0) and ``BinaryConvolution``.
        inputs: names of tensors and constants.
        output: name of the tensor it writes.
        attributes: those of ONNX.
    """

    kind: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass
class Plain:
    """A network of plain operations on tensors (N, C, H, W) and (N, C).

    Attributes:
        inputs, outputs: names, with the shape without the batch.
        constants: float32, but for the bool weights of ``BinaryConvolution`` (out, in, kh, kw).
        operations: in the order in which they run.
    """

    inputs: dict[str, tuple[int, ...]]
    outputs: dict[str, tuple[int, ...]] = field(default_factory=dict)
    constants: dict[str, Array] = field(default_factory=dict)
    operations: list[Operation] = field(default_factory=list)


def unpack(graph: Graph, signs: Signs = "drop") -> Plain:
    """Write a graph as plain operations.

    Scales, biases and batch norms right behind a convolution are folded into its weights, as engines do themselves.

    Args:
        graph: what to write.
        signs: what becomes of signs of activations. ``"drop"``: they are left out, so that activations are floats; the
            network of the same shape that one would run without binarisation. ``"exact"``: comparisons that give
            ±1, so that the result is that of the packed network but for the rounding of sums. ``"bits"``: the same,
            with ``Binarize`` and ``BinaryConvolution`` for engines that have them, where their sizes allow.
    """
    return _Unpacking(graph, signs).plain


_OPERATORS = {
    StepKind.RELU: "Relu",
    StepKind.SIGMOID: "Sigmoid",
    StepKind.HARDSWISH: "HardSwish",
    StepKind.TANH: "Tanh",
}


class _Unpacking:
    def __init__(self, graph: Graph, signs: Signs) -> None:
        self.graph = graph
        self.signs = signs
        self.names: dict[int, str] = {}  # of floats; of bits: the tensor whose signs they are
        self.made: dict[tuple[str, str], str] = {}  # signs that were taken
        self.plain = Plain({f"input{i}": graph.values[i].torch_shape for i in range(graph.input_count)})
        for i, name in enumerate(self.plain.inputs):
            self.names[i] = name
            if graph.values[i].rank == 2:
                self.names[i] = self.emit("Unsqueeze", name, axes=[2])
        for node in graph.nodes:
            self.unpack(node)
        for index in graph.outputs():
            name = self.names[index]
            if graph.values[index].rank == 2:
                name = self.emit("Squeeze", name, axes=[2])
            elif name in self.plain.inputs or name in self.plain.outputs:
                name = self.emit("Identity", name)
            self.plain.outputs[name] = graph.values[index].torch_shape

    def emit(self, kind: str, *inputs: str, **attributes: Any) -> str:
        output = f"t{len(self.plain.operations)}"
        self.plain.operations.append(Operation(kind, inputs, output, attributes))
        return output

    def constant(self, array: Any) -> str:
        name = f"c{len(self.plain.constants)}"
        array = np.asarray(array)
        self.plain.constants[name] = array if array.dtype == bool else np.ascontiguousarray(array, np.float32)
        return name

    def sign(self, name: str) -> str:
        """The tensor's signs as floats."""
        if self.signs == "drop":
            return name
        if ("Where", name) not in self.made:
            where = self.emit("GreaterOrEqual", name, self.constant(0.0))
            self.made["Where", name] = self.emit("Where", where, self.constant(1.0), self.constant(-1.0))
        return self.made["Where", name]

    def spatial(self, index: int) -> str:
        """A value as (N, C, H, W)."""
        name = self.names[index]
        return self.emit("Unsqueeze", name, axes=[2, 3]) if self.graph.values[index].rank == 1 else name

    def vector(self, numbers: Any, flat: bool) -> str:
        """One number per channel."""
        return self.constant(np.asarray(numbers, np.float32).reshape((1, -1) if flat else (1, -1, 1, 1)))

    def unpack(self, node: Node) -> None:
        written = self.graph.values[node.written()[0]]
        steps, flat = list(node.steps), written.rank == 1
        if node.op is Op.IDENTITY:
            index = node.inputs[0]
            v = self.names[index]
            if flat != (self.graph.values[index].rank == 1):
                v = self.emit("Flatten", v) if flat else self.spatial(index)
        else:
            v, steps = self.sums(node, steps, flat)
        for step in steps:
            v = self.step(step, v, flat)
        for index in node.written():
            self.names[index] = v

    def sums(self, node: Node, steps: list[Step], flat: bool) -> tuple[str, list[Step]]:
        """What a node computes, and the steps that are left."""
        if node.weight is not None:
            return self.convolution(node, steps, flat)
        x = self.spatial(node.inputs[0])
        if node.op is Op.CONCAT:
            v = self.emit("Concat", x, self.spatial(node.inputs[1]))
        elif node.op is Op.PAD:
            v = self.pad(x, node.padding, node.fill, node.pad_channels)
        elif node.op is Op.FLATTEN:
            v = self.emit("Flatten", x)
            return (v if flat else self.emit("Unsqueeze", v, axes=[2, 3])), steps
        else:
            v = self.pool(node, x)
        return (self.emit("Flatten", v) if flat else v), steps

    def pad(self, x: str, sides: tuple[int, ...], fill: float, channels: tuple[int, int] = (0, 0)) -> str:
        """Sides are top, left, bottom, right."""
        if not any((*sides, *channels)):
            return x
        top, left, bottom, right = sides
        return self.emit("Pad", x, pads=[0, channels[0], top, left, 0, channels[1], bottom, right], value=fill)

    def convolution(self, node: Node, steps: list[Step], flat: bool) -> tuple[str, list[Step]]:
        assert node.weight is not None
        index = node.inputs[0]
        binary = node.op is Op.XNOR
        if node.op is Op.CONV:
            weight = node.weight.astype(np.float64).transpose(3, 2, 0, 1)
        else:
            weight = np.where(node.weight, 1.0, -1.0).transpose(0, 3, 1, 2)
        reach = math.prod(weight.shape[1:])
        if steps and steps[0].kind is StepKind.THRESHOLD:
            steps = [*self.threshold(steps[0], reach), *steps[1:]]
        top, left, bottom, right = node.padding
        even = (top, left) == (bottom, right)
        # A single tap has no distance to the next one: OpenVINO gets the size wrong where it is said to have.
        dilations = [d if k > 1 else 1 for d, k in zip(node.dilation, node.kernel, strict=True)]
        geometry = {"strides": list(node.stride), "dilations": dilations}
        # OpenVINO's is wrong, without a word, where input channels are no multiple of 8.
        if self.signs == "bits" and binary and node.groups == 1 and weight.shape[1] % 8 == 0 and even:
            name = self.names[index]
            if ("Binarize", name) not in self.made:
                self.made["Binarize", name] = self.emit("Binarize", self.spatial(index))
            v = self.emit(
                "BinaryConvolution",
                self.made["Binarize", name],
                self.constant(weight > 0),
                pads=[top, left, bottom, right],
                pad_value=node.pad_value,
                **geometry,
            )
            return (self.emit("Flatten", v) if flat else v), steps
        bias = np.zeros(len(weight))
        while steps and steps[0].kind in (StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD):
            step = steps.pop(0)
            assert step.a is not None
            if step.kind is not StepKind.ADD:
                weight, bias = weight * step.a[:, None, None, None], bias * step.a
            bias = bias + (step.a if step.kind is StepKind.ADD else 0 if step.b is None else step.b)
        parameters = [self.constant(bias)] if bias.any() else []
        value = self.graph.values[index]
        if value.shape[:2] == (1, 1) and node.kernel == (1, 1) and node.groups == 1 and not any(node.padding):
            x = self.names[index] if value.rank == 1 else self.emit("Flatten", self.names[index])
            v = self.emit(
                "Gemm", self.sign(x) if binary else x, self.constant(weight[:, :, 0, 0]), *parameters, transB=1
            )
            return (v if flat else self.emit("Unsqueeze", v, axes=[2, 3])), steps
        x = self.spatial(index)
        if binary:
            x = self.sign(x)
        pads = [top, left, bottom, right]
        if node.pad_value:
            x, pads = self.pad(x, node.padding, float(node.pad_value)), [0, 0, 0, 0]
        v = self.emit("Conv", x, self.constant(weight), *parameters, pads=pads, group=node.groups, **geometry)
        return (self.emit("Flatten", v) if flat else v), steps

    def threshold(self, step: Step, reach: int) -> list[Step]:
        """A number per sum that is positive where the threshold gives +1, and about as large as one in a float net."""
        assert step.a is not None
        factor = 1 / math.sqrt(reach) if self.signs == "drop" else 1.0
        bound = np.clip(step.a[:, 0].astype(np.float64), -reach - 1, reach + 1)
        a, b = factor * step.a[:, 1], factor * (0.5 - bound)
        return [Step(StepKind.AFFINE, a=a.astype(np.float32), b=b.astype(np.float32))]

    def pool(self, node: Node, x: str) -> str:
        source, (h, w, _) = self.graph.values[node.inputs[0]].shape[:2], self.graph.values[node.written()[0]].shape
        top, left, bottom, right = node.padding
        # What windows need at the bottom and at the right: more than the padding with ceil_mode.
        needed = [
            (size - 1) * stride + dilation * (kernel - 1) + 1 - before - side
            for size, stride, dilation, kernel, before, side in zip(
                (h, w), node.stride, node.dilation, node.kernel, (top, left), source, strict=True
            )
        ]
        sides = (top, left, max(bottom, needed[0]), max(right, needed[1]))
        geometry = {"kernel_shape": list(node.kernel), "strides": list(node.stride)}
        if node.op is Op.MAX_POOL:
            plain = sides == (top, left, top, left) and 2 * top <= node.kernel[0] and 2 * left <= node.kernel[1]
            pads = list(sides) if plain else [0, 0, 0, 0]
            x = x if plain else self.pad(x, sides, -math.inf)
            return self.emit("MaxPool", x, pads=pads, dilations=list(node.dilation), **geometry)
        v = self.emit("AveragePool", self.pad(x, sides, 0.0), **geometry)
        if not any(sides):
            return v
        counts = []  # numbers that each window is divided by, by rows and by columns
        for size, stride, kernel, before, after, side in zip(
            (h, w), node.stride, node.kernel, (top, left), (bottom, right), source, strict=True
        ):
            start = np.arange(size) * stride - before
            low, high = (start, side + after) if node.count_padding else (np.maximum(start, 0), side)
            counts.append(np.minimum(start + kernel, high) - low)
        divisor = counts[0][:, None] * counts[1][None, :]
        return self.emit("Mul", v, self.constant((math.prod(node.kernel) / divisor)[None, None]))

    def step(self, step: Step, v: str, flat: bool) -> str:
        kind = step.kind
        if kind in _OPERATORS:
            return self.emit(_OPERATORS[kind], v)
        if kind in (StepKind.AFFINE, StepKind.MULTIPLY):
            v = self.emit("Mul", v, self.vector(step.a, flat))
            return v if step.b is None else self.emit("Add", v, self.vector(step.b, flat))
        if kind is StepKind.ADD:
            return self.emit("Add", v, self.vector(step.a, flat))
        if kind is StepKind.PRELU:
            return self.emit("PRelu", v, self.vector(step.a, flat))
        if kind is StepKind.CLAMP:
            return self.emit("Clip", v, min=step.p, max=step.q)
        if kind in (StepKind.GELU, StepKind.GELU_TANH):
            return self.emit("Gelu", v, approximate="none" if kind is StepKind.GELU else "tanh")
        if kind is StepKind.SILU:
            return self.emit("Mul", v, self.emit("Sigmoid", v))
        if kind is StepKind.HARDSIGMOID:
            return self.emit("HardSigmoid", v, alpha=1 / 6, beta=0.5)
        if kind is StepKind.SIGN:
            return self.sign(v)
        assert step.value is not None and kind in (StepKind.ADD_VALUE, StepKind.MULTIPLY_VALUE)
        assert self.graph.values[step.value].kind is Kind.FLOAT
        other = self.names[step.value]
        if flat != (self.graph.values[step.value].rank == 1):
            other = self.emit("Flatten", other) if flat else self.spatial(step.value)
        return self.emit("Add" if kind is StepKind.ADD_VALUE else "Mul", v, other)
