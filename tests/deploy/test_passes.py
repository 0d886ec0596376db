from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abste.deploy import format as abste_format
from abste.deploy import passes
from abste.deploy import steps as step_functions
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.passes import bits_of, fuse, linear, merge_linear, remove_dead, simplify, to_half, to_threshold
from abste.deploy.plan import ordered, plan
from abste.runtime.network import Network
from abste.runtime.reference import run

Build = Callable[[int], Graph]
seeds = st.integers(0, 2**31)


def image(graph: Graph, seed: int, batch: int = 2) -> Any:
    return np.random.default_rng(seed).normal(size=(batch, *graph.values[0].shape)).astype(np.float32)


def outputs(graph: Graph, x: Any) -> list[Any]:
    values = run(graph, [x]).values
    return [values[index] for index in graph.outputs()]


def assert_order(graph: Graph) -> None:
    """Every value is written once, and before it is read."""
    written = list(range(graph.input_count))
    for node in graph.nodes:
        assert set(node.read()) <= set(written)
        written += node.written()
    assert len(set(written)) == len(written)
    assert set(graph.outputs()) <= set(written)


def small(nodes: list[Node], kinds: str, outs: tuple[int, ...]) -> Graph:
    """Values of 2x1 pixels and 3 channels, "f" or "b" for each."""
    values = [Value((2, 1, 3), Kind.BITS if kind == "b" else Kind.FLOAT) for kind in kinds]
    for index in outs:
        values[index].output = True
    return Graph(values, nodes)


def add(number: float) -> Step:
    return Step(StepKind.ADD, a=np.full(3, number, np.float32))


@settings(max_examples=150)
@given(seed=seeds)
def test_fusing_and_thresholds_change_no_bit(loose_graph: Build, seed: int) -> None:
    graph = loose_graph(seed)
    x = image(graph, seed)
    wanted = outputs(graph, x)
    changed = copy.deepcopy(graph)
    fuse(changed)
    remove_dead(changed)
    assert_order(changed)
    assert len(changed.nodes) <= len(graph.nodes)
    for node in changed.nodes:
        to_threshold(changed, node)
    for found, one in zip(outputs(changed, x), wanted, strict=True):
        np.testing.assert_array_equal(found.view(np.uint32), one.view(np.uint32))


@given(seed=seeds)
def test_what_is_simplified_and_planned_runs(loose_graph: Build, seed: int) -> None:
    graph = plan(simplify(loose_graph(seed)))
    x = image(graph, seed)
    network = Network(np.frombuffer(abste_format.write(graph), np.uint8), "a test")
    found = network(x, layout="nhwc")
    found = found if isinstance(found, tuple) else (found,)
    for one, wanted in zip(found, outputs(graph, x), strict=True):
        np.testing.assert_array_equal(one.ravel(), wanted.ravel())


def test_there_is_something_to_fuse(loose_graph: Build) -> None:
    graphs = [loose_graph(seed) for seed in range(200)]
    before = sum(len(graph.nodes) for graph in graphs)
    for graph in graphs:
        remove_dead(graph)
    alive = sum(len(graph.nodes) for graph in graphs)
    for graph in graphs:
        simplify(graph)
    kinds = {step.kind for graph in graphs for node in graph.nodes for step in node.steps}
    assert sum(len(graph.nodes) for graph in graphs) < 0.9 * alive < 0.9 * before
    assert StepKind.THRESHOLD in kinds


def test_a_chain_becomes_one_node() -> None:
    nodes = [
        Node(Op.MAX_POOL, (0,), 1, name="pool"),
        Node(Op.IDENTITY, (1,), 2, steps=[Step(StepKind.RELU)]),
        Node(Op.IDENTITY, (2,), 3, steps=[Step(StepKind.TANH)]),
        Node(Op.IDENTITY, (3,), None, 4),
    ]
    graph = small(nodes, "ffffb", (3,))
    fuse(graph)
    (node,) = graph.nodes
    assert (node.op, node.name, node.out, node.bits) == (Op.MAX_POOL, "pool", 3, 4 if node.bits else None)
    assert [step.kind for step in node.steps] == [StepKind.RELU, StepKind.TANH]


def test_what_another_reads_or_what_is_an_output_stays() -> None:
    relu = [Step(StepKind.RELU)]
    read_twice = [
        Node(Op.MAX_POOL, (0,), 1),
        Node(Op.IDENTITY, (1,), 2, steps=[*relu]),
        Node(Op.CONCAT, (1, 2), 3),
    ]
    graph = small(read_twice, "ffff", (3,))
    graph.values[3].shape = (2, 1, 6)
    fuse(graph)
    assert [node.op for node in graph.nodes] == [Op.MAX_POOL, Op.IDENTITY, Op.CONCAT]
    graph = small([Node(Op.MAX_POOL, (0,), 1), Node(Op.IDENTITY, (1,), 2, steps=[*relu])], "fff", (1, 2))
    fuse(graph)
    assert len(graph.nodes) == 2
    squared = [Step(StepKind.MULTIPLY_VALUE, value=1)]
    graph = small([Node(Op.MAX_POOL, (0,), 1), Node(Op.IDENTITY, (1,), 2, steps=squared)], "fff", (2,))
    fuse(graph)
    assert len(graph.nodes) == 2


def test_a_node_that_takes_steps_waits_for_what_they_read() -> None:
    nodes = [
        Node(Op.MAX_POOL, (0,), 1, name="early"),
        Node(Op.AVERAGE_POOL, (0,), 2, name="late"),
        Node(Op.IDENTITY, (2,), 3, steps=[Step(StepKind.TANH)]),
        Node(Op.IDENTITY, (1,), 4, steps=[Step(StepKind.ADD_VALUE, value=3)]),
        Node(Op.IDENTITY, (4,), 5, steps=[Step(StepKind.RELU)]),
        Node(Op.IDENTITY, (5,), None, 6),
        Node(Op.XNOR, (6,), 7, weight=np.ones((3, 1, 1, 3), bool)),
    ]
    graph = small(nodes, "ffffffbf", (7,))
    x = image(graph, 0)
    wanted = outputs(graph, x)
    fuse(graph)
    assert_order(graph)
    assert [node.name for node in graph.nodes] == ["late", "early", ""]
    np.testing.assert_array_equal(outputs(graph, x), wanted)


def test_two_bits_of_one_value_become_one() -> None:
    weight = np.ones((3, 1, 1, 3), bool)
    nodes = [
        Node(Op.MAX_POOL, (0,), 1),
        Node(Op.IDENTITY, (1,), None, 2),
        Node(Op.XNOR, (2,), 4, weight=weight),
        Node(Op.IDENTITY, (1,), None, 3),
        Node(Op.XNOR, (3,), 5, weight=~weight),
        Node(Op.XNOR, (2,), 6, weight=weight),
    ]
    graph = small(nodes, "ffbbfff", (4, 5, 6))
    x = image(graph, 0)
    wanted = outputs(graph, x)
    fuse(graph)
    assert [node.inputs for node in graph.nodes] == [(0,), (2,), (2,), (2,)]
    remove_dead(graph)
    assert (graph.nodes[0].out, graph.nodes[0].bits) == (None, 2)
    np.testing.assert_array_equal(outputs(graph, x), wanted)


def test_bits_are_asked_for_once() -> None:
    graph = small([], "f", ())
    assert bits_of(graph, 0) == bits_of(graph, 0) == 1
    assert len(graph.nodes) == 1 and graph.values[1].kind is Kind.BITS


numbers = st.sampled_from([-2.0, -0.5, -0.0, 0.0, 1.0, 0.1, 3.0, -1e20, 1e30])


@given(
    kinds=st.lists(st.sampled_from([StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD, StepKind.RELU]), max_size=6),
    data=st.data(),
)
def test_merged_steps_compute_what_the_single_ones_do(kinds: list[StepKind], data: st.DataObject) -> None:
    def vector() -> Any:
        return np.array(data.draw(st.lists(numbers, min_size=3, max_size=3)), np.float32)

    steps = [
        Step(
            kind,
            f"step{i}",
            None if kind is StepKind.RELU else vector(),
            vector() if kind is StepKind.AFFINE else None,
        )
        for i, kind in enumerate(kinds)
    ]
    merged = merge_linear(steps)
    linear_steps = (StepKind.AFFINE, StepKind.MULTIPLY, StepKind.ADD)
    huge = any(step.a is not None and np.abs(step.a).max() > 1e6 for step in steps)
    if not huge:
        assert not any(a.kind in linear_steps and b.kind in linear_steps for a, b in itertools.pairwise(merged))
        assert [step.name for step in merged[-1:]] == [step.name for step in steps[-1:]]
    x = np.array([[-3.0], [0.0], [0.25], [7.0]]) * np.ones(3)
    exact, size, found = x, np.abs(x), x.astype(np.float32)
    fits = np.ones(x.shape, bool)
    with np.errstate(all="ignore"):
        for step in steps:  # and how large what is added up gets, which the error is relative to
            if step.kind is StepKind.RELU:
                exact = np.maximum(exact, 0)
                continue
            a = np.float64(1) if step.kind is StepKind.ADD else np.asarray(step.a, np.float64)
            b = step.a if step.kind is StepKind.ADD else step.b if step.b is not None else np.zeros(3)
            b = np.asarray(b, np.float64)
            exact, size = exact * a + b, size * np.abs(a) + np.abs(b)
            fits &= size < 1e38
        for step in merged:
            found = step_functions.apply(step, found)
    assert (np.abs(found - exact)[fits] <= 1e-6 * size[fits] + 1e-37).all()


def test_linear_takes_the_cheapest_step() -> None:
    zeros, ones, twos = np.zeros(3), np.ones(3), np.full(3, 2.0)
    assert [linear(a, b, "").kind for a, b in [(twos, zeros), (ones, twos), (twos, ones)]] == [
        StepKind.MULTIPLY,
        StepKind.ADD,
        StepKind.AFFINE,
    ]


def xnor(steps: list[Step], channels: int, fan_in: int) -> tuple[Graph, Node]:
    node = Node(Op.XNOR, (1,), None, 2, weight=np.ones((channels, 1, 1, fan_in), bool), steps=steps)
    values = [Value((1, 1, fan_in)), Value((1, 1, fan_in), Kind.BITS), Value((1, 1, channels), Kind.BITS)]
    return Graph(values, [Node(Op.IDENTITY, (0,), None, 1), node]), node


factors = st.sampled_from([-4.0, -1.0, -0.5, -0.1, -0.0, 0.0, 1e-30, 0.1, 0.25, 1.0, 3.0])
shifts = st.sampled_from([-100.0, -7.0, -1.5, -0.3, -0.0, 0.0, 0.5, 2.0, 6.0, 100.0])
MONOTONE = [StepKind.RELU, StepKind.CLAMP, StepKind.SIGMOID, StepKind.TANH, StepKind.HARDSIGMOID, StepKind.SIGN]
BENT = [StepKind.GELU, StepKind.GELU_TANH, StepKind.SILU, StepKind.HARDSWISH]


@settings(max_examples=200)
@given(data=st.data(), fan_in=st.integers(1, 40), channels=st.integers(1, 5), table=st.sampled_from([1, 100, 2**22]))
def test_a_threshold_says_what_the_steps_say_at_every_sum(
    data: st.DataObject, fan_in: int, channels: int, table: int
) -> None:
    def vector(of: st.SearchStrategy[float]) -> Any:
        return np.array(data.draw(st.lists(of, min_size=channels, max_size=channels)), np.float32)

    steps = []
    for kind in data.draw(
        st.lists(st.sampled_from([*MONOTONE, *BENT, *[StepKind.AFFINE] * 6, StepKind.PRELU]), max_size=4)
    ):
        step = Step(kind)
        if kind in (StepKind.AFFINE, StepKind.PRELU):
            step.a = vector(factors)
            step.b = vector(shifts) if kind is StepKind.AFFINE else None
        elif kind is StepKind.CLAMP:
            step.p, step.q = data.draw(st.sampled_from([(-1.0, 1.0), (0.0, 6.0), (-3.0, -1.0)]))
        steps.append(step)
    sums = np.arange(-fan_in, fan_in + 1, dtype=np.int32)[:, None] * np.ones(channels, np.int32)
    v = sums.astype(np.float32)
    for step in steps:
        v = step_functions.apply(step, v)
    wanted = v >= 0
    graph, node = xnor(list(steps), channels, fan_in)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passes, "_TABLE", table)
        to_threshold(graph, node)
    once = ((wanted[1:] != wanted[:-1]).sum(0) <= 1).all()
    assert once == (len(node.steps) == 1 and node.steps[0].kind is StepKind.THRESHOLD)
    if once:
        np.testing.assert_array_equal(step_functions.threshold(node.steps[0], sums) > 0, wanted)
    else:
        assert node.steps == steps


@pytest.mark.parametrize(
    ("a", "b", "bounds"),
    [
        (1.0, 0.0, (0, 1)),  # zero itself is +1
        (-1.0, 0.0, (0, -1)),
        (0.5, -1.0, (2, 1)),
        (-0.5, 1.0, (-2, -1)),
        (0.0, 0.0, (-(2**31), 1)),
        (-0.0, -0.0, (-(2**31), 1)),
        (0.0, -1.0, (2**31 - 1, 1)),
        (1.0, 100.0, (-(2**31), 1)),
        (1.0, -5.0, (5, 1)),
        (1.0, -6.0, (2**31 - 1, 1)),  # out of reach of five inputs
        (np.nan, 0.0, (2**31 - 1, 1)),
    ],
)
def test_bounds(a: float, b: float, bounds: tuple[int, int]) -> None:
    graph, node = xnor([Step(StepKind.AFFINE, "bn", np.array([a], np.float32), np.array([b], np.float32))], 1, 5)
    to_threshold(graph, node)
    (step,) = node.steps
    assert (step.name, step.kind, tuple(step.a[0])) == ("bn", StepKind.THRESHOLD, bounds)  # type: ignore[index]


def test_steps_stay_where_more_than_bits_depends_on_them() -> None:
    graph, node = xnor([Step(StepKind.RELU)], 3, 3)
    graph.values.append(Value((1, 1, 3), output=True))
    node.out = 3
    to_threshold(graph, node)
    assert node.steps[0].kind is StepKind.RELU
    graph, node = xnor([Step(StepKind.ADD_VALUE, value=0)], 3, 3)
    to_threshold(graph, node)
    assert node.steps[0].kind is StepKind.ADD_VALUE
    conv = Node(Op.SIGN_CONV, (0,), None, 1, weight=np.ones((3, 1, 1, 3), bool))
    to_threshold(Graph(graph.values, [conv]), conv)
    assert not conv.steps


@given(seed=seeds)
def test_no_two_values_that_live_share_memory(loose_graph: Build, random_graph: Build, seed: int) -> None:
    """Block by block: whoever reads a value finds there what was written last."""
    for graph in (random_graph(seed), loose_graph(seed), plan(simplify(loose_graph(seed)))):
        owner: dict[int, int] = {}

        def blocks(index: int, graph: Graph = graph) -> range:
            value = graph.values[index]
            assert value.offset is not None and value.offset % 64 == 0
            assert value.offset + value.nbytes <= graph.arena_bytes
            return range(value.offset // 64, -(-(value.offset + value.nbytes) // 64))

        def write(indexes: Any, owner: dict[int, int] = owner, blocks: Any = blocks) -> None:
            for index in indexes:
                owner.update(dict.fromkeys(blocks(index), index))

        write(range(graph.input_count))
        for node in graph.nodes:
            for index in node.read():
                assert {owner[block] for block in blocks(index)} == {index}
            replaced = [i for i in graph.in_place(node) if graph.values[i].offset == graph.values[node.out].offset]
            write(node.written())  # before what it reads is done with
            for index in node.written():
                assert {owner[block] for block in blocks(index)} == {index}
            for index in node.read():
                if index not in replaced:
                    assert {owner[block] for block in blocks(index)} == {index}
        for index in graph.outputs():
            assert {owner[block] for block in blocks(index)} == {index}
        assert graph.arena_bytes % 64 == 0
        assert graph.arena_bytes <= sum(-(-value.nbytes // 64) * 64 for value in graph.values)


def test_memory_is_used_again() -> None:
    nodes = [Node(Op.IDENTITY, (i,), i + 1, steps=[Step(StepKind.RELU)]) for i in range(6)]
    assert plan(small(nodes, "fffffff", (6,))).arena_bytes == 64, "in place"
    nodes = [Node(Op.MAX_POOL, (i,), i + 1) for i in range(6)]
    assert plan(small(nodes, "fffffff", (6,))).arena_bytes == 2 * 64


def test_a_residual_stream_stays_where_it_is() -> None:
    """Each block adds to what it keeps reading: one buffer for the stream and one for what is between."""
    nodes = []
    for i in range(0, 6, 2):
        nodes += [
            Node(Op.MAX_POOL, (i,), i + 1),
            Node(Op.MAX_POOL, (i + 1,), i + 2, steps=[Step(StepKind.ADD_VALUE, value=i)]),
        ]
    graph = plan(small(nodes, "fffffff", (6,)))
    assert {graph.values[i].offset for i in (0, 2, 4, 6)} == {0} and graph.arena_bytes == 2 * 64
    nodes[1].steps = [Step(StepKind.ADD_VALUE, value=1)]  # reads it at other places, too
    assert plan(small(nodes[:2], "fff", (2,))).values[2].offset != plan(small(nodes[:2], "fff", (2,))).values[1].offset


def test_values_are_numbered_as_they_are_written() -> None:
    nodes = [
        Node(Op.IDENTITY, (0,), 4, 2),
        Node(Op.XNOR, (2,), 1, weight=np.ones((3, 1, 1, 3), bool), steps=[Step(StepKind.ADD_VALUE, value=4)]),
    ]
    graph = small(nodes, "ffbff", (1,))
    numbered = ordered(graph)
    assert [(node.inputs, node.out, node.bits) for node in numbered.nodes] == [((0,), 1, 2), ((2,), 3, None)]
    assert numbered.nodes[1].steps[0].value == 1 and numbered.outputs() == [3]
    assert [value.kind for value in numbered.values] == [Kind.FLOAT, Kind.FLOAT, Kind.BITS, Kind.FLOAT]
    assert graph.nodes[1].steps[0].value == 4  # the graph itself stays


def test_half_precision_is_for_weights_that_it_holds() -> None:
    weights = [np.full((1, 1, 3, 3), number, np.float32) for number in (0.125, 0.1, 1e5)]
    signs = np.ones((3, 1, 1, 3), bool)
    nodes = [Node(Op.CONV, (0,), 1 + number, weight=weight) for number, weight in enumerate(weights)]
    nodes.append(Node(Op.SIGN_CONV, (0,), 4, weight=signs))
    to_half(small(nodes, "fffff", (1, 2, 3, 4)))
    assert [node.weight.dtype for node in nodes] == [np.float16, np.float32, np.float32, bool]  # type: ignore[union-attr]
