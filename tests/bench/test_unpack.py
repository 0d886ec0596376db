"""Packed networks as plain float operations: the same network, whoever runs it."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from abste.bench import peers
from abste.bench.as_torch import as_torch
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.unpack import Plain, unpack
from abste.runtime.reference import run

Build = Callable[[int], Graph]


def image(graph: Graph, seed: int, batch: int = 2) -> Any:
    return np.random.default_rng(seed).normal(size=(batch, *graph.values[0].shape)).astype(np.float32)


def in_torch(plain: Plain, x: Any) -> Any:
    result = as_torch(plain)(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    return result.numpy()


def in_onnx(plain: Plain, x: Any) -> Any:
    import onnxruntime

    from abste.bench.as_onnx import as_onnx

    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    model = as_onnx(plain, len(x)).SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"input0": np.ascontiguousarray(np.moveaxis(x, -1, 1))})[0]


def in_openvino(plain: Plain, x: Any) -> Any:
    import openvino

    from abste.bench.as_openvino import as_openvino

    compiled = openvino.compile_model(as_openvino(plain, len(x)), "CPU", peers.openvino_options(1))
    return compiled([np.ascontiguousarray(np.moveaxis(x, -1, 1))])[0]


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


ENGINES = [in_torch]
ENGINES += [in_onnx] if installed("onnx") and installed("onnxruntime") else []
OPENVINO = [in_openvino] if installed("openvino") else []


@pytest.mark.parametrize("engine", ENGINES)
def test_exact_signs_give_the_packed_network(random_graph: Build, engine: Any) -> None:
    """Every number but those behind a sign that rounding turned: nine of ten networks have none of those."""
    different = 0
    for seed in range(40):
        graph = random_graph(seed)
        x = image(graph, seed)
        wanted = np.moveaxis(run(graph, [x]).values[graph.outputs()[0]], -1, 1)
        found = engine(unpack(graph, "exact"), x)
        wanted = wanted.reshape(found.shape)
        with np.errstate(all="ignore"):
            close = np.isclose(found, wanted, rtol=1e-4, atol=1e-4, equal_nan=True)
        different += not close.all()
        assert close.mean() > 0.5, seed
    assert different <= 4


@pytest.mark.parametrize("engine", [*ENGINES[1:], *OPENVINO])
def test_engines_agree_without_signs(random_graph: Build, engine: Any) -> None:
    """OpenVINO gets the size of some strided 1x1 convolutions wrong; what it does not refuse it computes as torch."""
    refused = 0
    for seed in range(40):
        graph = random_graph(seed)
        plain = unpack(graph, "drop")
        x = image(graph, seed)
        wanted, found = in_torch(plain, x), engine(plain, x)
        if found.shape != wanted.shape:
            refused += 1
            continue
        with np.errstate(all="ignore"):
            close = np.isclose(found, wanted, rtol=1e-3, atol=1e-3, equal_nan=True)
        assert close.all(), (seed, [node.op.name for node in graph.nodes])
    assert refused <= (4 if engine is in_openvino else 0)


def binary(pad_value: int, channels: int = 24) -> Graph:
    """Signs, an xnor with thresholds, an xnor with a batch norm and a residual, floats."""
    rng = np.random.default_rng(pad_value + 1)
    shape = (6, 5, channels)
    values = [Value(shape), Value(shape, Kind.BITS), Value(shape, Kind.BITS), Value(shape, output=True)]
    weights = [rng.random((channels, 3, 3, channels)) < 0.5 for _ in range(2)]
    pairs = np.stack([2 * rng.integers(-9, 9, channels), rng.choice([-1, 1], channels)], 1).astype(np.int32)
    pairs[0], pairs[1] = (2**31 - 1, 1), (-(2**31), 1)  # never and always
    nodes = [
        Node(Op.IDENTITY, (0,), None, 1),
        Node(Op.XNOR, (1,), None, 2, "a", weights[0], (3, 3), padding=(1,) * 4, pad_value=pad_value),
        Node(Op.XNOR, (2,), 3, None, "b", weights[1], (3, 3), padding=(1,) * 4, pad_value=pad_value),
    ]
    nodes[1].steps = [Step(StepKind.THRESHOLD, a=pairs)]
    factors = rng.normal(size=(2, channels)).astype(np.float32)
    nodes[2].steps = [Step(StepKind.AFFINE, a=factors[0], b=factors[1]), Step(StepKind.ADD_VALUE, value=0)]
    return Graph(values, nodes)


@pytest.mark.parametrize("pad_value", [-1, 0, 1])
def test_ties_and_padding_of_binary_layers(pad_value: int) -> None:
    """Sums on a threshold, which are even as it is, go the way that the packed network sends them."""
    graph = binary(pad_value)
    x = image(graph, 1, 3)
    wanted = np.moveaxis(run(graph, [x]).values[-1], -1, 1)
    for engine in ENGINES:
        np.testing.assert_allclose(engine(unpack(graph, "exact"), x), wanted, rtol=1e-5, atol=1e-4)
    for engine in OPENVINO:
        plain = unpack(graph, "bits")
        assert [operation.kind for operation in plain.operations].count("BinaryConvolution") == 2
        np.testing.assert_allclose(engine(plain, x), wanted, rtol=1e-5, atol=1e-4)


def test_channels_that_openvino_gets_wrong_stay_float() -> None:
    plain = unpack(binary(0, channels=20), "bits")
    kinds = [operation.kind for operation in plain.operations]
    assert "BinaryConvolution" not in kinds and kinds.count("Conv") == 2


def test_floats_without_signs_stay_in_range() -> None:
    """Thresholds become biases of convolutions that keep numbers of the size of their input."""
    plain = unpack(binary(0), "drop")
    kinds = [operation.kind for operation in plain.operations]
    assert kinds == ["Conv", "Conv", "Add"]  # folded into them
    assert np.abs(plain.constants[plain.operations[0].inputs[2]]).max() < 20
    x = image(binary(0), 0)
    first = as_torch(Plain(plain.inputs, {plain.operations[0].output: ()}, plain.constants, plain.operations[:1]))
    y = first(torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))))
    assert 0.3 < y[:, 2:].std() < 3


def test_linear_layers_and_vectors() -> None:
    rng = np.random.default_rng(0)
    values = [Value((1, 1, 8), rank=1), Value((1, 1, 5), rank=1, output=True)]
    node = Node(Op.SIGN_CONV, (0,), 1, weight=rng.random((5, 1, 1, 8)) < 0.5)
    node.steps = [Step(StepKind.MULTIPLY, a=rng.normal(size=5).astype(np.float32)), Step(StepKind.RELU)]
    graph = Graph(values, [node])
    plain = unpack(graph)
    assert [operation.kind for operation in plain.operations] == ["Gemm", "Relu"]
    assert (list(plain.inputs.values()), list(plain.outputs.values())) == ([(8,)], [(5,)])
    x = rng.normal(size=(3, 8)).astype(np.float32)
    wanted = run(graph, [x[:, None, None, :]]).values[1][:, 0, 0]
    np.testing.assert_allclose(as_torch(plain)(torch.from_numpy(x)).numpy(), wanted, rtol=1e-5, atol=1e-6)


def test_rank_two_and_several_outputs() -> None:
    values = [Value((1, 7, 3), rank=2), Value((1, 7, 3), rank=2, output=True), Value((1, 7, 3), rank=2, output=True)]
    nodes = [Node(Op.IDENTITY, (0,), 1), Node(Op.IDENTITY, (1,), 2, steps=[Step(StepKind.TANH)])]
    plain = unpack(Graph(values, nodes))
    x = torch.randn(2, 3, 7)
    same, tanh = as_torch(plain)(x)
    assert torch.equal(same, x)
    torch.testing.assert_close(tanh, x.tanh())


def test_bfloat16_and_compile() -> None:
    graph = binary(0)
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(image(graph, 0), -1, 1)))
    module = as_torch(unpack(graph))
    wanted = module(x)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted)
    half = as_torch(unpack(graph)).to(torch.bfloat16)(x.bfloat16())
    assert half.dtype is torch.bfloat16
    assert peers.distance(half.float().numpy(), wanted.numpy()) < 0.02


def test_torch_has_no_bits() -> None:
    with pytest.raises(ValueError, match=r"^torch has no Binarize, BinaryConvolution$"):
        as_torch(unpack(binary(0), "bits"))
