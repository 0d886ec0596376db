"""The graph of a packed network: values, nodes and steps, as docs/format.md defines them. Needs numpy alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]


class Kind(IntEnum):
    """What a value holds."""

    FLOAT = 0
    BITS = 1


class Op(IntEnum):
    """How a node computes its sums."""

    IDENTITY = 0
    CONV = 1
    SIGN_CONV = 2
    XNOR = 3
    MAX_POOL = 4
    AVERAGE_POOL = 5
    CONCAT = 6
    PAD = 7
    FLATTEN = 8


CONVOLUTIONS = (Op.CONV, Op.SIGN_CONV, Op.XNOR)
POOLS = (Op.MAX_POOL, Op.AVERAGE_POOL)


class StepKind(IntEnum):
    """What a step does to each number."""

    AFFINE = 0
    MULTIPLY = 1
    ADD = 2
    RELU = 3
    PRELU = 4
    CLAMP = 5
    GELU = 6
    GELU_TANH = 7
    SILU = 8
    SIGMOID = 9
    HARDSWISH = 10
    HARDSIGMOID = 11
    TANH = 12
    ADD_VALUE = 13
    MULTIPLY_VALUE = 14
    THRESHOLD = 15
    SIGN = 16


# Which operands a step takes.
WITH_A = (StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD, StepKind.PRELU, StepKind.THRESHOLD)
WITH_VALUE = (StepKind.ADD_VALUE, StepKind.MULTIPLY_VALUE)


@dataclass
class Value:
    """A tensor of one image.

    Attributes:
        shape: (h, w, c); pixel by pixel, channels last.
        kind: float32, or bits.
        rank: PyTorch's, without the batch: 1 (c), 2 (c, w), 3 (c, h, w).
        name: of the module or graph node it came from.
        output: whether it is an output of the network.
        offset: where it lives in the arena, in bytes; None until memory is planned.
    """

    shape: tuple[int, int, int]
    kind: Kind = Kind.FLOAT
    rank: int = 3
    name: str = ""
    output: bool = False
    offset: int | None = None

    @property
    def nbytes(self) -> int:
        """Bytes in the arena."""
        h, w, c = self.shape
        return h * w * 4 * (c if self.kind is Kind.FLOAT else -(-c // 32))

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape it had in PyTorch, without the batch."""
        h, w, c = self.shape
        return {1: (c,), 2: (c, w), 3: (c, h, w)}[self.rank]


@dataclass
class Step:
    """What happens to each number on its way out of a node.

    Attributes:
        kind: what.
        name: the module whose output stands after this step, or "".
        a, b: one number per channel, (c,) float32; for a threshold a is (c, 2) int32: bound and direction.
        value: index of the value that is added or multiplied.
        p, q: the limits of a clamp.
    """

    kind: StepKind
    name: str = ""
    a: Array | None = None
    b: Array | None = None
    value: int | None = None
    p: float = 0.0
    q: float = 0.0


@dataclass
class Node:
    """An operation and the steps behind it.

    Attributes:
        op: the operation.
        inputs: indexes of the values it reads: one, for a concatenation two.
        out: index of the float value it writes, or None.
        bits: index of the bits value it writes, or None.
        name: the module it came from.
        weight: of `conv` (kh, kw, C / groups, c), float32 or float16; of `sign_conv` and `xnor`
            (c, kh, kw, C / groups), bool, True for +1.
        kernel, stride, dilation: (vertical, horizontal).
        padding: (top, left, bottom, right).
        pad_channels: (before, after), of `pad`.
        groups: of a convolution.
        pad_value: of `xnor`: -1, 0, 1.
        fill: what `pad` pads with.
        count_padding: average pooling divides by the whole window.
        steps: in their order.
    """

    op: Op
    inputs: tuple[int, ...]
    out: int | None = None
    bits: int | None = None
    name: str = ""
    weight: Array | None = None
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    pad_channels: tuple[int, int] = (0, 0)
    groups: int = 1
    pad_value: int = 0
    fill: float = 0.0
    count_padding: bool = False
    steps: list[Step] = field(default_factory=list)

    def written(self) -> tuple[int, ...]:
        """Indexes of the values it writes."""
        return tuple(index for index in (self.out, self.bits) if index is not None)

    def read(self) -> tuple[int, ...]:
        """Indexes of the values it reads, those of its steps included."""
        return (*self.inputs, *(step.value for step in self.steps if step.value is not None))


@dataclass
class Graph:
    """A network.

    Attributes:
        values: all tensors; the first ``input_count`` are the inputs.
        nodes: in the order in which they run.
        input_count: how many inputs there are.
        normalization: (2, c) float32: mean and standard deviation per channel of input 0, or None.
        classes: names of the classes, or None.
        metadata: what else the file says of itself; JSON types.
        arena_bytes: working memory of a run.
    """

    values: list[Value]
    nodes: list[Node]
    input_count: int = 1
    normalization: Array | None = None
    classes: tuple[str, ...] | None = None
    metadata: dict[str, Any] | None = None
    arena_bytes: int = 0

    def outputs(self) -> list[int]:
        """Indexes of the outputs."""
        return [index for index, value in enumerate(self.values) if value.output]

    def in_place(self, node: Node) -> list[int]:
        """The values that ``out`` of a node could take the place of, were it the last to read them (docs/format.md)."""
        if node.out is None:
            return []
        size = self.values[node.out].shape
        operands = [step.value for step in node.steps if step.value is not None]
        if node.op is Op.IDENTITY:
            operands += node.inputs
        taken = [] if node.op is Op.IDENTITY else node.inputs
        return [i for i in dict.fromkeys(operands) if i not in taken and self.values[i].shape == size]

    def lives(self) -> list[tuple[int, int]]:
        """For each value the first and the last node during which it must stand; -1 is before the first node."""
        births = [-1] * len(self.values)
        deaths = [-1] * len(self.values)
        for number, node in enumerate(self.nodes):
            for index in node.written():
                births[index] = deaths[index] = number
            for index in node.read():
                deaths[index] = number
        for index in self.outputs():
            deaths[index] = len(self.nodes)
        return list(zip(births, deaths, strict=True))
