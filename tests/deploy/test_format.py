from __future__ import annotations

import contextlib
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.errors import ConversionError, FormatError


def network(float16: bool = False) -> Graph:
    """A float convolution, a binary one of its signs, and one with float inputs; most kinds of blobs."""
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(3, 3, 3, 12)).astype(np.float16 if float16 else np.float32)
    values = [
        Value((6, 5, 3), name="image", offset=0),
        Value((6, 5, 12), name="stem", offset=384),
        Value((6, 5, 12), Kind.BITS, name="signs", offset=1856),
        Value((6, 5, 7), Kind.BITS, offset=1984),
        Value((1, 1, 4), rank=1, name="logits", output=True, offset=0),
    ]
    bounds = np.stack([rng.integers(-50, 50, 7), rng.choice([-1, 1], 7)], 1).astype(np.int32)
    affine = Step(StepKind.AFFINE, "bn", np.ones(12, np.float32), np.zeros(12, np.float32))
    nodes = [
        Node(Op.CONV, (0,), 1, 2, "stem", weight, (3, 3), padding=(1, 1, 1, 1), steps=[Step(StepKind.RELU), affine]),
        Node(
            Op.XNOR,
            (2,),
            None,
            3,
            "é.conv",
            rng.random((7, 3, 3, 6)) < 0.5,
            (3, 3),
            dilation=(1, 1),
            padding=(1, 1, 1, 1),
            groups=1,
            pad_value=-1,
            steps=[Step(StepKind.THRESHOLD, "bn2", bounds)],
        ),
        Node(
            Op.SIGN_CONV,
            (1,),
            4,
            None,
            "fc",
            rng.random((4, 6, 5, 12)) < 0.5,
            (6, 5),
            steps=[Step(StepKind.CLAMP, p=-1, q=2)],
        ),
    ]
    nodes[1].weight = rng.random((7, 3, 3, 12)) < 0.5
    mean_std = np.array([[0.5] * 3, [0.25] * 3], np.float32)
    return Graph(values, nodes, 1, mean_std, ("cat", "dog", "bär", ""), {"name": "test", "n": [1, 2]}, 2112)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray) or isinstance(b, np.ndarray):
        return a is not None and b is not None and a.dtype == b.dtype and np.array_equal(a, b)
    if hasattr(a, "__dataclass_fields__"):
        return all(same(getattr(a, name), getattr(b, name)) for name in a.__dataclass_fields__)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


@pytest.mark.parametrize("float16", [False, True])
def test_what_is_written_is_read(float16: bool) -> None:
    graph = network(float16)
    file = abste_format.write(graph)
    assert len(file) % 64 == 0 and file[:8] == b"\x89ABSTE\r\n"
    assert same(abste_format.read(file), graph)
    assert abste_format.write(abste_format.read(file)) == file


def test_one_bit_costs_one_bit() -> None:
    graph = network()
    before = len(abste_format.write(graph))
    node = graph.nodes[2]
    node.weight = np.concatenate([node.weight] * 4, 0)  # type: ignore[list-item]
    graph.values[4].shape = (1, 1, 16)
    grown = len(abste_format.write(graph)) - before
    assert abs(grown - 3 * 4 * 6 * 5 * 12 / 8) < 64


def test_equal_blobs_are_stored_once() -> None:
    graph = network()
    once = len(abste_format.write(graph))
    graph.nodes[0].steps.append(Step(StepKind.AFFINE, "again", np.ones(12, np.float32), np.zeros(12, np.float32)))
    assert len(abste_format.write(graph)) - once <= 64  # the step itself, and none of its blobs


def test_signs_of_the_layout() -> None:
    """Element i of a bits blob is bit i mod 8 of byte i / 8; rows are not padded."""
    graph = network()
    weight = graph.nodes[1].weight
    assert weight is not None
    file = abste_format.write(graph)
    assert np.packbits(weight.ravel(), bitorder="little").tobytes() in file


def test_unplanned_memory_is_refused() -> None:
    graph = network()
    graph.values[1].offset = None
    with pytest.raises(ConversionError, match="not been planned"):
        abste_format.write(graph)


def repaired(file: bytes) -> bytes:
    changed = bytearray(file)
    changed[16:20] = bytes(4)
    struct.pack_into("<I", changed, 16, zlib.crc32(changed))
    return bytes(changed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: b"", "not an .abste file"),
        (lambda file: b"PK\x03\x04" + file[4:], "not an .abste file"),
        (lambda file: file[:-64], "it is not whole"),
        (lambda file: file + bytes(64), "it is not whole"),
        (lambda file: file[:-1] + b"\x01", "damaged"),
        (lambda file: repaired(file[:8] + b"\x02\x00" + file[10:]), "version 2.0"),
        (lambda file: repaired(file[:10] + b"\x01\x00" + file[12:]), "version 1.1"),
        (lambda file: repaired(file[:28] + b"\xff\xff\x00\x00" + file[32:]), "impossible header"),
        (lambda file: repaired(file[:44] + bytes(4) + file[48:]), "impossible header"),
        (lambda file: repaired(file[:36] + b"\x00\x01\x00\x00" + file[40:]), "malformed|outside"),
    ],
)
def test_wrong_files(change: Any, message: str) -> None:
    with pytest.raises(FormatError, match=message):
        abste_format.read(change(abste_format.write(network())))


def test_a_layer_without_groups_is_malformed() -> None:
    graph = network()
    graph.nodes[1].groups = 0
    with pytest.raises(FormatError, match=r"a node of this .abste file has 0 groups; it must have at least 1\."):
        abste_format.read(abste_format.write(graph))


def test_a_window_beyond_the_format_is_refused() -> None:
    graph = network()
    graph.nodes[1].stride = (1, 70000)
    with pytest.raises(ConversionError, match=r"stride, dilation or padding is too large for an .abste file"):
        abste_format.write(graph)


@given(st.data())
def test_damage_raises_nothing_but_format_errors(data: st.DataObject) -> None:
    file = bytearray(abste_format.write(network()))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(file) - 1))
        file[at] = data.draw(st.integers(0, 255))
    with contextlib.suppress(FormatError):  # and nothing else
        abste_format.read(repaired(bytes(file)))
