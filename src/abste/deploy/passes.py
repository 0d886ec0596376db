"""Makes a graph smaller and computes the same: steps move into the nodes before them, sums become thresholds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from abste.deploy import steps as step_functions
from abste.deploy.graph import WITH_VALUE, Array, Graph, Kind, Node, Op, Step, StepKind

_LINEAR = (StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD)
_TABLE = 2**22
"""Numbers that are evaluated at once in search of a threshold: 16 MiB."""


def simplify(graph: Graph) -> Graph:
    """All passes, in their order. The graph is changed in place; the result is it, with values that nothing writes."""
    fuse(graph)
    names = {node.name for node in graph.nodes if node.name}
    for node in graph.nodes:
        node.steps = merge_linear(node.steps, names, node)
    remove_dead(graph)
    for node in graph.nodes:
        to_threshold(graph, node)
    return graph


def fuse(graph: Graph) -> None:
    """Give the steps and the bits of identity nodes to the node that writes what they read."""
    remove_dead(graph)
    readers = Counter(index for node in graph.nodes for index in node.read())
    nodes: list[Node | None] = []
    place: dict[int, int] = {}  # where in `nodes` a value is written
    same: dict[int, int] = {}  # a bits value that is gone, and the one that holds the same
    for node in graph.nodes:
        node.inputs = tuple(same.get(index, index) for index in node.inputs)
        source = node.inputs[0]
        at = place.get(source)
        before = None if at is None or node.op is not Op.IDENTITY else nodes[at]
        if at is not None and before is not None:
            if not node.steps and node.out is None and node.bits is not None:
                if before.bits is None:
                    before.bits, place[node.bits] = node.bits, at
                else:
                    same[node.bits] = before.bits
                continue
            if readers[source] == 1 and not graph.values[source].output and before.bits is None:
                before.steps += node.steps
                before.out, before.bits = node.out, node.bits
                if any(place.get(index, -1) > at for index in node.read()[1:]):  # it has to wait for these
                    nodes[at], at = None, len(nodes)
                    nodes.append(before)
                place.update(dict.fromkeys(before.written(), at))
                continue
        place.update(dict.fromkeys(node.written(), len(nodes)))
        nodes.append(node)
    graph.nodes[:] = [node for node in nodes if node is not None]


def merge_linear(steps: list[Step], names: Collection[str] = (), node: Node | None = None) -> list[Step]:
    """Neighbouring steps that multiply and add become one, computed in float64 and rounded once.

    Args:
        steps: of a node.
        names: of all nodes. A step of such a name stays: where it was gone, the node's sums would be taken for the
            module's output. But those of a layer with binary weights never are.
        node: whose steps they are.
    """
    merged: list[Step] = []
    for step in steps:
        if not (merged and step.kind in _LINEAR and merged[-1].kind in _LINEAR):
            merged.append(step)
            continue
        binary = node is not None and node.op in (Op.SIGN_CONV, Op.XNOR) and merged[-1].name == node.name
        if merged[-1].name in names and not binary:
            merged.append(step)
            continue
        a1, b1 = _coefficients(merged[-1])
        a2, b2 = _coefficients(step)
        a, b = a1 * a2, b1 * a2 + b2
        if max(np.abs(a).max(initial=0), np.abs(b).max(initial=0)) <= np.finfo(np.float32).max:
            merged[-1] = linear(a, b, step.name)
        else:  # 0 times infinity would be no number
            merged.append(step)
    return merged


def _coefficients(step: Step) -> tuple[Array, Array]:
    assert step.a is not None
    a = step.a.astype(np.float64)
    if step.kind is StepKind.MULTIPLY:
        return a, np.zeros_like(a)
    if step.kind is StepKind.ADD:
        return np.ones_like(a), a
    assert step.b is not None
    return a, step.b.astype(np.float64)


def linear(a: Array, b: Array, name: str) -> Step:
    """v a + b as the cheapest step; a and b are (c,) float64."""
    if not b.any():
        return Step(StepKind.MULTIPLY, name, a.astype(np.float32))
    if (a == 1).all():
        return Step(StepKind.ADD, name, b.astype(np.float32))
    return Step(StepKind.AFFINE, name, a.astype(np.float32), b.astype(np.float32))


def remove_dead(graph: Graph) -> None:
    """Remove what nothing reads."""
    read = set(graph.outputs())
    kept = []
    for node in reversed(graph.nodes):
        if node.out not in read:
            node.out = None
        if node.bits not in read:
            node.bits = None
        if node.written():
            read.update(node.read())
            kept.append(node)
    graph.nodes[:] = reversed(kept)


def to_threshold(graph: Graph, node: Node) -> None:
    """Replace the steps of an xnor node that writes bits alone by a bound on its sums, where that says the same.

    The steps are evaluated, in the runtime's arithmetic, at every sum there can be, so that ties, negative and zero
    factors come out as they would have. Where the sign of some channel changes more than once, the steps stay.
    """
    if node.op is not Op.XNOR or node.out is not None or node.bits is None or node.weight is None:
        return
    if any(step.kind in (*WITH_VALUE, StepKind.THRESHOLD) for step in node.steps):
        return
    channels, reach = node.weight.shape[0], int(np.prod(node.weight.shape[1:]))
    sums = np.arange(-reach, reach + 1, dtype=np.int32)
    pairs = np.empty((channels, 2), np.int32)
    at_once = max(1, _TABLE // len(sums))
    for first in range(0, channels, at_once):
        part = slice(first, first + at_once)
        v: Array = np.repeat(sums.astype(np.float32)[:, None], len(pairs[part]), 1)
        for step in node.steps:
            a, b = (None if array is None else array[part] for array in (step.a, step.b))
            v = step_functions.apply(replace(step, a=a, b=b), v)
        positive = v >= 0
        if ((positive[1:] != positive[:-1]).sum(0) > 1).any():
            return
        for o, column in enumerate(positive.T, first):
            where = sums[column]
            if len(where) == 0:
                pairs[o] = 2**31 - 1, 1
            elif len(where) == len(sums):
                pairs[o] = -(2**31), 1
            else:
                pairs[o] = (where[0], 1) if column[-1] else (-where[-1], -1)
    name = node.steps[-1].name if node.steps else ""
    node.steps = [Step(StepKind.THRESHOLD, name, pairs)]


def to_half(graph: Graph) -> None:
    """Store the weights of float convolutions in half precision that it holds exactly."""
    for node in graph.nodes:
        if node.op is Op.CONV and node.weight is not None and np.abs(node.weight).max(initial=0) < 65504:
            half = node.weight.astype(np.float16)
            if (half == node.weight).all():
                node.weight = half


def bits_of(graph: Graph, index: int) -> int:
    """A new bits value with the signs of a float value, and the node that writes it; shared by all who ask."""
    for node in graph.nodes:
        if node.op is Op.IDENTITY and node.inputs == (index,) and not node.steps and node.bits is not None:
            return node.bits
    value = graph.values[index]
    graph.values.append(replace(value, kind=Kind.BITS, output=False))
    graph.nodes.append(Node(Op.IDENTITY, (index,), None, len(graph.values) - 1))
    return len(graph.values) - 1
