"""Random networks for tests of what is done to graphs, and for the seeds of the fuzzer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan

STEPS = [kind for kind in StepKind if kind not in (StepKind.THRESHOLD, StepKind.ADD_VALUE, StepKind.MULTIPLY_VALUE)]


class Builder:
    """A random network, node by node; everything about it follows from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        h, w = self.rng.integers(1, 9, 2)
        self.values = [Value((int(h), int(w), int(self.rng.choice([1, 2, 3, 5, 8, 33]))), name="input")]
        self.nodes: list[Node] = []

    def pick(self, *choices: Any) -> Any:
        return choices[int(self.rng.integers(len(choices)))]

    def vector(self, c: int) -> Any:
        vector = self.rng.normal(size=c).astype(np.float32)
        vector[self.rng.random(c) < 0.1] = self.pick(0.0, -0.0)
        return vector

    def value(self, shape: tuple[int, int, int], kind: Kind) -> int:
        self.values.append(Value(shape, kind, name=f"value{len(self.values)}"))
        return len(self.values) - 1

    def floats(self) -> list[int]:
        return [i for i, value in enumerate(self.values) if value.kind is Kind.FLOAT]

    def steps(self, shape: tuple[int, int, int], count: int) -> list[Step]:
        steps = []
        fitting = [i for i in self.floats() if self.values[i].shape in (shape, (1, 1, shape[2]))]
        for number in range(count):
            kind = self.pick(*STEPS)
            step = Step(kind, f"step{number}")
            if fitting and self.rng.random() < 0.3:
                step = Step(self.pick(StepKind.ADD_VALUE, StepKind.MULTIPLY_VALUE), value=self.pick(*fitting))
            elif kind in (StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD, StepKind.PRELU):
                step.a = self.vector(shape[2])
                if kind is StepKind.AFFINE:
                    step.b = self.vector(shape[2])
            elif kind is StepKind.CLAMP:
                step.p, step.q = -0.5, 1.25
            steps.append(step)
        return steps

    def add(self, op: Op) -> None:
        rng = self.rng
        want = Kind.BITS if op is Op.XNOR else Kind.FLOAT
        sources = [i for i, value in enumerate(self.values) if value.kind is want and value.shape[2] < 200]
        if not sources:
            return
        source = int(self.pick(*sources))
        h, w, c = self.values[source].shape
        node = Node(op, (source,), name=f"node{len(self.nodes)}")
        shape = (h, w, c)
        if op in (Op.CONV, Op.SIGN_CONV, Op.XNOR, Op.MAX_POOL, Op.AVERAGE_POOL):
            node.kernel = (int(rng.integers(1, min(h, 3) + 1)), int(rng.integers(1, min(w, 3) + 1)))
            node.stride = (int(rng.integers(1, 3)), int(rng.integers(1, 3)))
            if op is not Op.AVERAGE_POOL:
                node.dilation = (self.pick(1, 1, 2), self.pick(1, 1, 2))
            most = [d * (k - 1) for d, k in zip(node.dilation, node.kernel, strict=True)]
            if op not in (Op.MAX_POOL, Op.AVERAGE_POOL):
                most = [m + 1 for m in most]
            node.padding = tuple(int(rng.integers(0, most[i % 2] + 1)) for i in range(4))  # type: ignore[assignment]
            sides = []
            for i, size in enumerate((h, w)):
                room = size + node.padding[i] + node.padding[i + 2] - node.dilation[i] * (node.kernel[i] - 1) - 1
                if room < 0:
                    return
                count = room // node.stride[i] + 1
                if op in (Op.MAX_POOL, Op.AVERAGE_POOL):
                    if (count - 1) * node.stride[i] - node.padding[i] >= size:
                        return
                    rest = room % node.stride[i]
                    if rest and count * node.stride[i] - node.padding[i] < size and rng.random() < 0.5:
                        count += 1  # as with ceil_mode
                sides.append(count)
            shape = (sides[0], sides[1], c)
        if op in (Op.CONV, Op.SIGN_CONV, Op.XNOR):
            node.groups = int(self.pick(*[g for g in (1, 1, 2, 3, c) if c % g == 0]))
            outputs = node.groups * int(self.pick(1, 2, 3, 17)) if node.groups > 1 else int(self.pick(1, 4, 31, 70))
            shape = (*shape[:2], outputs)
            if op is Op.CONV:
                node.weight = rng.normal(size=(*node.kernel, c // node.groups, outputs)).astype(
                    self.pick(np.float32, np.float16)
                )
            else:
                node.weight = rng.random((outputs, *node.kernel, c // node.groups)) < 0.5
            node.pad_value = self.pick(-1, 0, 1) if op is Op.XNOR else 0
        elif op is Op.AVERAGE_POOL:
            node.count_padding = self.pick(False, True)
        elif op is Op.CONCAT:
            others = [i for i in self.floats() if self.values[i].shape[:2] == (h, w)]
            other = int(self.pick(*others))
            node.inputs = (source, other)
            shape = (h, w, c + self.values[other].shape[2])
        elif op is Op.PAD:
            node.padding = tuple(int(n) for n in rng.integers(0, 3, 4))  # type: ignore[assignment]
            node.pad_channels = (int(rng.integers(0, 3)), int(rng.integers(0, 3)))
            node.fill = self.pick(0.0, -1.5)
            top, left, bottom, right = node.padding
            shape = (h + top + bottom, w + left + right, c + sum(node.pad_channels))
        elif op is Op.FLATTEN:
            shape = (1, 1, h * w * c)
        if op is Op.XNOR and rng.random() < 0.4:
            reach = int(np.prod(node.kernel)) * (c // node.groups) + 1
            pairs = [rng.integers(-reach, reach + 1, shape[2]), rng.choice([-1, 1], shape[2])]
            node.steps = [Step(StepKind.THRESHOLD, "threshold", np.stack(pairs, 1).astype(np.int32))]
            node.bits = self.value(shape, Kind.BITS)
        else:
            node.steps = self.steps(shape, int(rng.integers(0, 4)))
            which = self.pick("out", "bits", "both")
            if which != "bits":
                node.out = self.value(shape, Kind.FLOAT)
            if which != "out":
                node.bits = self.value(shape, Kind.BITS)
        self.nodes.append(node)

    def graph(self) -> Graph:
        last = self.floats()[-1]
        if last == 0:
            last = self.value(self.values[0].shape, Kind.FLOAT)
            self.nodes.append(Node(Op.IDENTITY, (0,), last))
        self.values[last].output = True
        return plan(Graph(self.values, self.nodes))


@pytest.fixture(scope="session")
def random_graph() -> Callable[[int], Graph]:
    """A small network from a seed: every operation and step, in sizes that are multiples of nothing."""

    def build(seed: int) -> Graph:
        builder = Builder(seed)
        for op in builder.rng.permutation([*Op, Op.CONV, Op.XNOR, Op.XNOR, Op.SIGN_CONV])[
            : int(builder.rng.integers(2, 12))
        ]:
            builder.add(Op(int(op)))
        return builder.graph()

    return build
