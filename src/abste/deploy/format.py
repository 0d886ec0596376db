"""Writes and reads .abste files, which docs/format.md defines.

Needs numpy alone, and shares nothing with the reader in C.
"""

from __future__ import annotations

import json
import struct
import zlib
from typing import Any

import numpy as np

from abste.deploy.graph import WITH_A, WITH_VALUE, Array, Graph, Kind, Node, Op, Step, StepKind, Value
from abste.errors import ConversionError, FormatError

MAGIC = b"\x89ABSTE\r\n"
MAJOR, MINOR = 1, 0
NONE = 0xFFFFFFFF
ALIGNMENT = 64

_HEADER = struct.Struct("<8sHH13I")
_VALUE = struct.Struct("<BBBx5I8x")
_NODE = struct.Struct("<BBh7I10H2I2If24x")
_STEP = struct.Struct("<B3x3I2f8x")
_BLOB = struct.Struct("<4I")
_CHECKSUM_AT = 16

F32, F16, BITS, I32, TEXT = range(5)
_DTYPES: dict[int, np.dtype[Any]] = {
    F32: np.dtype("<f4"),
    F16: np.dtype("<f2"),
    I32: np.dtype("<i4"),
    TEXT: np.dtype("u1"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
# An unknown kind, a shape that does not fit, metadata that is no JSON.
_MALFORMED = (ValueError, IndexError, TypeError, KeyError, RecursionError)


def _up(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


class _Tables:
    """Strings and blobs as they are collected; what is equal is stored once."""

    def __init__(self) -> None:
        self.text = bytearray(b"\0")
        self.offsets = {"": 0}
        self.blobs: dict[tuple[int, int, bytes], int] = {}

    def string(self, text: str) -> int:
        if text not in self.offsets:
            self.offsets[text] = len(self.text)
            self.text += text.replace("\0", "").encode() + b"\0"
        return self.offsets[text]

    def blob(self, code: int, count: int, data: bytes) -> int:
        return self.blobs.setdefault((code, count, data), len(self.blobs))

    def array(self, array: Array) -> int:
        dtype = array.dtype.newbyteorder("<")
        return self.blob(_CODES[dtype], array.size, np.ascontiguousarray(array, dtype).tobytes())

    def signs(self, array: Array) -> int:
        return self.blob(BITS, array.size, np.packbits(array.ravel(), bitorder="little").tobytes())


def write(graph: Graph) -> bytes:
    """The file of a graph, whose memory has been planned.

    Raises:
        ConversionError: it is larger than 4 GiB, or than the format's counts allow.
    """
    tables = _Tables()
    values = b"".join(_packed_value(value, tables) for value in graph.values)
    nodes, steps, first = [], [], 0
    for node in graph.nodes:
        try:
            nodes.append(_packed_node(node, first, tables))
        except struct.error:
            raise ConversionError(
                f"{node.name or node.op.name.lower()}: its kernel, stride, dilation or padding is too large for an "
                ".abste file (65535)."
            ) from None
        steps += [_packed_step(step, tables) for step in node.steps]
        first += len(node.steps)
    normalization, classes, metadata = NONE, NONE, NONE
    if graph.normalization is not None:
        normalization = tables.array(np.asarray(graph.normalization, np.float32))
    if graph.classes:
        text = b"".join(name.replace("\0", "").encode() + b"\0" for name in graph.classes)
        classes = tables.blob(TEXT, len(text), text)
    if graph.metadata is not None:
        text = json.dumps(graph.metadata, ensure_ascii=False, separators=(",", ":")).encode()
        metadata = tables.blob(TEXT, len(text), text)

    parts = [values, b"".join(nodes), b"".join(steps)]
    at = _HEADER.size + sum(_up(len(part)) for part in parts)
    at += _up(_BLOB.size * len(tables.blobs)) + _up(len(tables.text))
    table, datas = [], []
    for code, count, data in tables.blobs:
        if at >= NONE:
            break
        table.append(_BLOB.pack(at, len(data), code, count))
        datas.append(data)
        at += _up(len(data))
    counts = (len(graph.values), len(graph.nodes), first, len(tables.blobs))
    limits = (4096, 4096, 16384, 16384)
    if at >= NONE or graph.arena_bytes >= NONE or any(map(int.__gt__, counts, limits)):
        raise ConversionError("the network is too large for an .abste file (4 GiB, 4096 nodes).")
    header = (MAGIC, MAJOR, MINOR, at, 0, graph.arena_bytes, *counts, len(tables.text), graph.input_count)
    parts = [_HEADER.pack(*header, normalization, classes, metadata, 0), *parts, b"".join(table), bytes(tables.text)]
    file = bytearray(b"".join(part.ljust(_up(len(part)), b"\0") for part in (*parts, *datas)))
    struct.pack_into("<I", file, _CHECKSUM_AT, zlib.crc32(file))
    return bytes(file)


def _index(value: int | None) -> int:
    return NONE if value is None else value


def _packed_value(value: Value, tables: _Tables) -> bytes:
    if value.offset is None:
        raise ConversionError("the memory of this graph has not been planned.")
    return _VALUE.pack(value.kind, value.output, value.rank, *value.shape, value.offset, tables.string(value.name))


def _packed_node(node: Node, first_step: int, tables: _Tables) -> bytes:
    weight = NONE
    if node.weight is not None:
        weight = tables.array(node.weight) if node.op is Op.CONV else tables.signs(node.weight)
    inputs = (*node.inputs, NONE)[:2]
    return _NODE.pack(
        node.op,
        node.count_padding,
        node.pad_value,
        tables.string(node.name),
        *inputs,
        _index(node.out),
        _index(node.bits),
        weight,
        node.groups,
        *node.kernel,
        *node.stride,
        *node.dilation,
        *node.padding,
        *node.pad_channels,
        first_step,
        len(node.steps),
        node.fill,
    )


def _packed_step(step: Step, tables: _Tables) -> bytes:
    a = _index(step.value) if step.a is None else tables.array(step.a)
    b = NONE if step.b is None else tables.array(step.b)
    return _STEP.pack(step.kind, tables.string(step.name), a, b, step.p, step.q)


class _Reader:
    """A file that is being read; every access is checked."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        if len(data) < _HEADER.size or bytes(data[: len(MAGIC)]) != MAGIC:
            raise FormatError("this is not an .abste file.")
        (_, major, minor, size, checksum, *rest) = _HEADER.unpack_from(data)
        if (major, minor) > (MAJOR, MINOR) or major != MAJOR:
            raise FormatError(f"this .abste file is of version {major}.{minor}; this abste reads {MAJOR}.{MINOR}.")
        if size != len(data):
            raise FormatError(f"this .abste file should have {size} bytes and has {len(data)}: it is not whole.")
        head = bytearray(data[: _HEADER.size])
        head[_CHECKSUM_AT : _CHECKSUM_AT + 4] = bytes(4)
        if zlib.crc32(data[_HEADER.size :], zlib.crc32(head)) != checksum:
            raise FormatError("this .abste file is damaged: its checksum does not match.")
        self.arena_bytes, *counts, self.string_bytes, self.input_count = rest[:7]
        self.optional, reserved = rest[7:10], rest[10]
        limits = (4096, 4096, 16384, 16384)
        if any(map(int.__gt__, counts, limits)) or not 1 <= self.input_count <= counts[0] or reserved:
            raise FormatError("this .abste file has an impossible header.")
        self.sections, at = [], _HEADER.size
        for record, count in zip((_VALUE, _NODE, _STEP, _BLOB), counts, strict=True):
            self.sections.append((record, at, count))
            at += _up(record.size * count)
        self.strings_at, at = at, at + _up(self.string_bytes)
        if at > size or self.string_bytes < 1 or data[self.strings_at + self.string_bytes - 1] != 0:
            raise FormatError("this .abste file has sections that lie outside it.")
        self.table: list[tuple[int, int, int, int]] = []
        for offset, count_bytes, code, count in self.records(3):
            wanted = -(-count // 8) if code == BITS else count * _DTYPES[code].itemsize if code in _DTYPES else -1
            if offset != at or count_bytes != wanted or at + count_bytes > size:
                raise FormatError(f"blob {len(self.table)} of this .abste file is malformed.")
            self.table.append((offset, count_bytes, code, count))
            at += _up(count_bytes)
        if at != size:
            raise FormatError("this .abste file has bytes that belong to nothing.")

    def records(self, section: int) -> list[tuple[Any, ...]]:
        record, at, count = self.sections[section]
        return list(record.iter_unpack(self.data[at : at + record.size * count]))

    def string(self, offset: int) -> str:
        if offset >= self.string_bytes:
            raise FormatError("a name of this .abste file lies outside its strings.")
        text = bytes(self.data[self.strings_at + offset : self.strings_at + self.string_bytes])
        return text[: text.index(0)].decode(errors="replace")

    def blob(self, index: int, *codes: int) -> Array | None:
        """The content of a blob of one of these types; bits as booleans. None for no blob."""
        if index == NONE:
            return None
        if index >= len(self.table) or self.table[index][2] not in codes:
            raise FormatError("this .abste file refers to a blob that does not exist or is of another type.")
        offset, count_bytes, code, count = self.table[index]
        raw: Array = np.frombuffer(self.data[offset : offset + count_bytes], _DTYPES.get(code, np.dtype("u1")))
        return np.unpackbits(raw, count=count, bitorder="little").astype(bool) if code == BITS else raw


def read(data: bytes | memoryview) -> Graph:
    """The graph of a file. Its arrays are views of ``data``, but for bits, which are unpacked.

    Raises:
        FormatError: it is no .abste file, damaged, malformed, or of a newer version.
    """
    reader = _Reader(memoryview(data))
    try:
        values = [_read_value(fields, reader) for fields in reader.records(0)]
        steps = [_read_step(fields, reader) for fields in reader.records(2)]
        nodes = [_read_node(fields, values, steps, reader) for fields in reader.records(1)]
        normalization = reader.blob(reader.optional[0], F32)
        classes, metadata = (reader.blob(index, TEXT) for index in reader.optional[1:])
        names = None if classes is None else tuple(classes.tobytes().decode(errors="replace").split("\0")[:-1])
        graph = Graph(
            values,
            nodes,
            reader.input_count,
            None if normalization is None else normalization.reshape(2, -1),
            names,
            None if metadata is None else json.loads(metadata.tobytes()),
            reader.arena_bytes,
        )
    except FormatError:
        raise
    except _MALFORMED as error:
        raise FormatError(f"this .abste file is malformed ({error}).") from error
    if sum(len(node.steps) for node in nodes) != len(steps):
        raise FormatError("this .abste file has steps that belong to no node.")
    return graph


def _read_value(fields: tuple[int, ...], reader: _Reader) -> Value:
    kind, flags, rank, h, w, c, offset, name = fields
    if not 1 <= rank <= 3:
        raise FormatError(f"a value of this .abste file has rank {rank}; it must be 1, 2 or 3.")
    return Value((h, w, c), Kind(kind), rank, reader.string(name), bool(flags & 1), offset)


def _read_step(fields: tuple[Any, ...], reader: _Reader) -> Step:
    kind, name, a, b, p, q = fields
    step = Step(StepKind(kind), reader.string(name), p=p, q=q)
    if step.kind in WITH_VALUE:
        step.value = a
    elif step.kind in WITH_A:
        step.a = reader.blob(a, I32 if step.kind is StepKind.THRESHOLD else F32)
        if step.kind is StepKind.THRESHOLD and step.a is not None:
            step.a = step.a.reshape(-1, 2)
        step.b = reader.blob(b, F32)
    return step


def _read_node(fields: tuple[Any, ...], values: list[Value], steps: list[Step], reader: _Reader) -> Node:
    op, flags, pad_value, name, in0, in1, out, bits, weight, groups, *rest = fields
    kernel, stride, dilation, padding = tuple(rest[:2]), tuple(rest[2:4]), tuple(rest[4:6]), tuple(rest[6:10])
    pad_channels, (first, count), fill = tuple(rest[10:12]), rest[12:14], rest[14]
    node = Node(
        Op(op),
        (in0,) if in1 == NONE else (in0, in1),
        None if out == NONE else out,
        None if bits == NONE else bits,
        reader.string(name),
        None,
        kernel,
        stride,
        dilation,
        padding,
        pad_channels,
        groups,
        pad_value,
        fill,
        bool(flags & 1),
        steps[first : first + count],
    )
    if any(index >= len(values) for index in (*node.read(), *node.written())):
        raise FormatError("this .abste file refers to a value that does not exist.")
    array = reader.blob(weight, *((F32, F16) if node.op is Op.CONV else (BITS,)))
    if array is not None:
        if groups < 1:
            raise FormatError(f"a node of this .abste file has {groups} groups; it must have at least 1.")
        inputs, outputs = values[in0].shape[2] // groups, values[node.written()[0]].shape[2]
        shape = (*kernel, inputs, outputs) if node.op is Op.CONV else (outputs, *kernel, inputs)
        node.weight = array.reshape(shape)
    return node
