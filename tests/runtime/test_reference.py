from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan
from abste.runtime.network import Network
from abste.runtime.reference import run


def run_node(node: Node, x: Any, shape: tuple[int, int, int]) -> Any:
    """One node on an image (C, H, W); gives (C, H, W)."""
    inputs = np.moveaxis(x, 0, -1)
    values = [Value(inputs.shape, Kind.FLOAT), Value(inputs.shape, Kind.BITS), Value(shape, output=True)]
    nodes = [Node(Op.IDENTITY, (0,), None, 1), node]
    node.inputs, node.out = (1 if node.op is Op.XNOR else 0,), 2
    return np.moveaxis(run(Graph(values, nodes), [inputs]).values[2], -1, 0)


@given(
    op=st.sampled_from([Op.CONV, Op.SIGN_CONV, Op.XNOR]),
    groups=st.sampled_from([1, 2, 3]),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    padding=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    pad_value=st.sampled_from([-1, 0, 1]),
    seed=st.integers(0, 99),
)
def test_convolutions(
    op: Op,
    groups: int,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    dilation: tuple[int, int],
    padding: tuple[int, int],
    pad_value: int,
    seed: int,
) -> None:
    rng = np.random.default_rng(seed)
    channels, outputs = 6, 12
    pad_value = pad_value if op is Op.XNOR else 0
    x = rng.normal(size=(channels, 7, 6)).astype(np.float32)
    weight = rng.normal(size=(outputs, channels // groups, *kernel)).astype(np.float32)
    if op is not Op.CONV:
        weight = np.where(weight >= 0, np.float32(1), np.float32(-1))
    seen = np.where(x >= 0, np.float32(1), np.float32(-1)) if op is Op.XNOR else x
    sides = (padding[1], padding[1], padding[0], padding[0])
    padded = F.pad(torch.from_numpy(seen)[None].double(), sides, value=float(pad_value))
    wanted = F.conv2d(padded, torch.from_numpy(weight).double(), None, stride, 0, dilation, groups)[0].numpy()
    node = Node(
        op,
        (0,),
        weight=weight.transpose(2, 3, 1, 0) if op is Op.CONV else weight.transpose(0, 2, 3, 1) > 0,
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        padding=(padding[0], padding[1], padding[0], padding[1]),
        groups=groups,
        pad_value=pad_value,
    )
    found = run_node(node, x, (wanted.shape[1], wanted.shape[2], outputs))
    if op is Op.XNOR:
        np.testing.assert_array_equal(found, wanted)
    else:
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


@given(
    average=st.booleans(),
    kernel=st.integers(1, 4),
    stride=st.integers(1, 3),
    ceil_mode=st.booleans(),
    count=st.booleans(),
    size=st.tuples(st.integers(4, 9), st.integers(4, 9)),
    data=st.data(),
)
def test_pools(
    average: bool, kernel: int, stride: int, ceil_mode: bool, count: bool, size: tuple[int, int], data: st.DataObject
) -> None:
    padding = data.draw(st.integers(0, kernel // 2))
    x = np.random.default_rng(0).normal(size=(3, *size)).astype(np.float32)
    tensor = torch.from_numpy(x)[None]
    if average:
        wanted = F.avg_pool2d(tensor, kernel, stride, padding, ceil_mode, count)[0].numpy()
    else:
        wanted = F.max_pool2d(tensor, kernel, stride, padding, 1, ceil_mode)[0].numpy()
    node = Node(
        Op.AVERAGE_POOL if average else Op.MAX_POOL,
        (0,),
        kernel=(kernel, kernel),
        stride=(stride, stride),
        padding=(padding,) * 4,
        count_padding=average and count,
    )
    found = run_node(node, x, (*wanted.shape[1:], 3))
    np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("size", "kernel", "stride"), [(1, 2, 2), (2, 3, 2), (3, 5, 3), (5, 2, 2)])
@pytest.mark.parametrize("average", [False, True])
def test_a_window_larger_than_the_image(average: bool, size: int, kernel: int, stride: int) -> None:
    """With ceil_mode: both readers take it, and give what PyTorch does."""
    x = torch.randn(1, 2, size, 7)
    pool = F.avg_pool2d if average else F.max_pool2d
    wanted = pool(x, (kernel, 1), (stride, 1), ceil_mode=True)
    node = Node(Op.AVERAGE_POOL if average else Op.MAX_POOL, (0,), 1, kernel=(kernel, 1), stride=(stride, 1))
    values = [Value((size, 7, 2)), Value((wanted.shape[2], 7, 2), output=True)]
    graph = plan(Graph(values, [node]))
    (found,) = run(graph, [x[0].permute(1, 2, 0).numpy()]).values[1:]
    np.testing.assert_allclose(found, wanted[0].permute(1, 2, 0).numpy(), rtol=1e-6)
    network = Network(np.frombuffer(abste_format.write(graph), np.uint8), "pool")
    np.testing.assert_array_equal(network(x)[0].transpose(1, 2, 0), found)


def test_maximum_of_nan_is_nan() -> None:
    x = np.array([[[1, np.nan, 3], [0, 5, 4], [2, 2, 2]]], np.float32)
    found = run_node(Node(Op.MAX_POOL, (0,), kernel=(2, 2)), x, (2, 2, 1))
    np.testing.assert_array_equal(found[0], [[np.nan, np.nan], [5, 5]])


def test_pad_flatten_and_concatenation() -> None:
    x = np.arange(2 * 3 * 4, dtype=np.float32).reshape(2, 3, 4)
    node = Node(Op.PAD, (0,), padding=(1, 0, 2, 3), pad_channels=(1, 2), fill=-7.0)
    wanted = F.pad(torch.from_numpy(x), (0, 3, 1, 2, 1, 2), value=-7.0).numpy()
    np.testing.assert_array_equal(run_node(node, x, (6, 7, 5)), wanted)
    flat = run_node(Node(Op.FLATTEN, (0,)), x, (1, 1, 24))
    np.testing.assert_array_equal(flat[:, 0, 0], torch.from_numpy(x).flatten().numpy())
    image = np.moveaxis(x, 0, -1)
    values = [Value((3, 4, 2)), Value((3, 4, 4), output=True)]
    both = run(Graph(values, [Node(Op.CONCAT, (0, 0), 1)]), [image]).values[1]
    np.testing.assert_array_equal(both, np.concatenate([image, image], -1))


def test_batches_values_and_points() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 3, 4, 2)).astype(np.float32)
    values = [Value((3, 4, 2)), Value((1, 1, 2)), Value((3, 4, 2), output=True), Value((3, 4, 2), Kind.BITS)]
    steps = [Step(StepKind.MULTIPLY_VALUE, value=1), Step(StepKind.ADD_VALUE, value=0), Step(StepKind.RELU)]
    nodes = [Node(Op.AVERAGE_POOL, (0,), 1, kernel=(3, 4)), Node(Op.IDENTITY, (0,), 2, 3, steps=steps)]
    result = run(Graph(values, nodes), [x])
    single = [run(Graph(values, nodes), [image]) for image in x]
    for index in range(4):
        np.testing.assert_array_equal(result.values[index], np.stack([one.values[index] for one in single]))
    np.testing.assert_allclose(result.values[2], np.maximum(x * x.mean((1, 2), keepdims=True) + x, 0), atol=1e-6)
    np.testing.assert_array_equal(result.values[3], result.points[1][-1] >= 0)
    assert [point.dtype for point in result.points[1]] == [np.float32] * 4


def test_bits_of_zero_and_nan() -> None:
    x = np.array([[[0.0, -0.0, np.nan, -1e-45]]], np.float32)
    values = [Value((1, 1, 4)), Value((1, 1, 4), Kind.BITS)]
    bits = run(Graph(values, [Node(Op.IDENTITY, (0,), None, 1)]), [x]).values[1]
    assert bits.tolist() == [[[True, True, False, False]]]


@pytest.mark.parametrize("threshold", [False, True])
def test_xnor_sums_are_integers(threshold: bool) -> None:
    bounds = np.array([[0, 1], [1, -1]], np.int32)
    steps = [Step(StepKind.THRESHOLD, a=bounds)] if threshold else []
    values = [Value((1, 1, 3)), Value((1, 1, 3), Kind.BITS), Value((1, 1, 2), Kind.BITS)]
    weight = np.array([[1, 1, 1], [0, 0, 1]], bool).reshape(2, 1, 1, 3)
    nodes = [Node(Op.IDENTITY, (0,), None, 1), Node(Op.XNOR, (1,), None, 2, weight=weight, steps=steps)]
    result = run(Graph(values, nodes), [np.array([[[1, 1, -1]]], np.float32)])
    assert result.points[1][0].dtype == np.int32 and result.points[1][0].tolist() == [[[1, -3]]]
    assert result.values[2].tolist() == [[[True, threshold]]]
