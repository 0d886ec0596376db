"""Runs a graph in numpy, exactly as docs/format.md says: the same bits as the C runtime, from other code.

It is slow, and reads well: what a kernel must compute is here in a few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

import numpy as np

from abste.deploy import steps
from abste.deploy.graph import Array, Graph, Node, Op, StepKind
from abste.runtime.network import Int8


@dataclass
class Result:
    """What a run computed.

    Attributes:
        values: for each value of the graph its tensor (..., h, w, c): float32, or for bits bool, True for +1.
        points: for each node what it computed on the way, (..., h, w, c): first its sums (int32 of `xnor`, else
            float32), then what stands after each step (float32).
    """

    values: list[Array]
    points: list[list[Array]] = field(default_factory=list)


def run(graph: Graph, inputs: Sequence[Array], int8: Int8 | None = None) -> Result:
    """Run a graph.

    Args:
        graph: what to run.
        inputs: float32 (..., h, w, c) for each input; leading dimensions, such as a batch, pass through.
        int8: layers that compute with integers of eight bits, as in :func:`abste.runtime.load`.

    Returns:
        All values, and what each node computed on the way.
    """
    values: list[Array | None] = [None] * len(graph.values)
    values[: len(inputs)] = [np.asarray(x, np.float32) for x in inputs]
    result = Result(cast("list[Array]", values))
    for node in graph.nodes:
        written = graph.values[node.written()[0]]
        read = [cast(Array, values[index]) for index in node.inputs]
        if _is_int8(node, len(inputs), int8):
            v = _eight_bits(node, read[0], written.shape)
        else:
            v = _sums(node, read, written.shape)
        points = [v]
        if node.op is Op.XNOR and not (node.steps and node.steps[0].kind is StepKind.THRESHOLD):
            v = v.astype(np.float32)
        for step in node.steps:
            if step.kind is StepKind.THRESHOLD:
                v = steps.threshold(step, v)
            else:
                v = steps.apply(step, v, None if step.value is None else values[step.value])
            points.append(v)
        if node.out is not None:
            values[node.out] = v
        if node.bits is not None:
            values[node.bits] = v >= 0
        result.points.append(points)
    return result


def _sums(node: Node, inputs: list[Array], shape: tuple[int, int, int]) -> Array:
    x = inputs[0]
    if node.op is Op.IDENTITY:
        return x
    if node.op is Op.CONCAT:
        return np.concatenate(inputs, -1)
    if node.op is Op.FLATTEN:
        return np.moveaxis(x, -1, -3).reshape(*x.shape[:-3], 1, 1, -1)
    if node.op is Op.PAD:
        (top, left, bottom, right), channels = node.padding, node.pad_channels
        widths = [(0, 0)] * (x.ndim - 3) + [(top, bottom), (left, right), channels]
        return np.pad(x, widths, constant_values=np.float32(node.fill))
    if node.op in (Op.MAX_POOL, Op.AVERAGE_POOL):
        return _pooled(node, x, shape)
    return _convolved(node, x, shape)


def _taps(node: Node, x: Array, shape: tuple[int, int, int]) -> list[tuple[int, int, Array, Array]]:
    """For each tap of the kernel (i, j): what lies under it at every output pixel, and where that is inside."""
    top, left, _, _ = node.padding
    rows = np.arange(shape[0]) * node.stride[0] - top
    columns = np.arange(shape[1]) * node.stride[1] - left
    taps = []
    for i in range(node.kernel[0]):
        r = rows + i * node.dilation[0]
        inside_r = (r >= 0) & (r < x.shape[-3])
        for j in range(node.kernel[1]):
            s = columns + j * node.dilation[1]
            inside = inside_r[:, None] & ((s >= 0) & (s < x.shape[-2]))[None, :]
            r_in, s_in = np.clip(r, 0, x.shape[-3] - 1), np.clip(s, 0, x.shape[-2] - 1)
            taps.append((i, j, x[..., r_in[:, None], s_in[None, :], :], inside[..., None]))
    return taps


def _convolved(node: Node, x: Array, shape: tuple[int, int, int]) -> Array:
    weight = node.weight
    assert weight is not None
    if node.op is Op.CONV:
        factors = weight.astype(np.float32)
    else:  # (c, kh, kw, k) to (kh, kw, k, c)
        factors = np.where(np.moveaxis(weight, 0, -1), 1, -1).astype(np.int32 if node.op is Op.XNOR else np.float32)
    if node.op is Op.XNOR:
        x = np.where(x, np.int32(1), np.int32(-1))
    per_group, c = factors.shape[2], shape[2]
    first = (np.arange(c) // (c // node.groups)) * per_group  # the first input channel of each output's group
    total = np.zeros((*x.shape[:-3], *shape), x.dtype)
    taps = _taps(node, x, shape)
    with np.errstate(all="ignore"):
        if node.op is Op.SIGN_CONV:
            return _signed(node, taps, factors, first, total)
        for i, j, under, inside in taps:
            for k in range(per_group):
                added = total + under[..., first + k] * factors[i, j, k]
                if node.op is Op.XNOR and node.pad_value:
                    outside = total + np.int32(node.pad_value) * factors[i, j, k]
                else:
                    outside = total
                total = np.where(inside, added, outside)
    return total


def _is_int8(node: Node, input_count: int, int8: Int8 | None) -> bool:
    if int8 is None or node.op not in (Op.CONV, Op.SIGN_CONV) or node.groups != 1:
        return False
    assert node.weight is not None
    kind = "binary" if node.op is Op.SIGN_CONV else "stem" if node.inputs[0] < input_count else "float"
    sides = max((node.kernel[1] - 1) * node.dilation[1], node.padding[1], node.padding[3])
    taken = int8 in ("all", kind) or (int8, kind) == ("float", "stem")
    return taken and node.weight.size // node.weight.shape[-1 if node.op is Op.CONV else 0] <= 2**17 and sides < 64


def _quantized(x: Array, most: Array) -> Array:
    """(x * (127 / most)) rounded to nearest even, within [-127, 127], NaN giving 0."""
    with np.errstate(all="ignore"):
        return np.rint(np.nan_to_num(np.clip(x * (np.float32(127) / most), -127, 127), nan=0.0)).astype(np.int64)


def _eight_bits(node: Node, x: Array, shape: tuple[int, int, int]) -> Array:
    """The sums as integers, in any order, then the scales: of the image, and of an output channel."""
    weight = node.weight
    assert weight is not None
    most = np.nanmax(np.abs(np.where(np.isnan(x), 0, x)), (-3, -2, -1), keepdims=True).astype(np.float32)
    scale = most / np.float32(127)
    if node.op is Op.CONV:
        floats = weight.astype(np.float32)
        largest = np.abs(np.where(np.isnan(floats), 0, floats)).max((0, 1, 2))
        factors = _quantized(floats, largest)
        scale = scale * (largest / np.float32(127))
    else:
        factors = np.where(np.moveaxis(weight, 0, -1), 1, -1)
    q = _quantized(x, most)
    total = np.zeros((*x.shape[:-3], *shape), np.int64)
    for i, j, under, inside in _taps(node, q, shape):
        total += np.where(inside, under @ factors[i, j], 0)
    with np.errstate(all="ignore"):
        return total.astype(np.int32).astype(np.float32) * scale


def _signed(node: Node, taps: list[tuple[int, int, Array, Array]], factors: Array, first: Array, total: Array) -> Array:
    """Row by row, channels in blocks of 32, tap by tap, channels by fours."""
    per_group = factors.shape[2]
    for row in range(node.kernel[0]):
        for block in range(0, per_group, 32):
            for i, j, under, inside in taps:
                for k in range(block, min(block + 32, per_group), 4) if i == row else ():
                    four = [
                        under[..., first + n] * factors[i, j, n] if n < per_group else np.float32(0)
                        for n in range(k, k + 4)
                    ]
                    total = np.where(inside, total + ((four[0] + four[1]) + (four[2] + four[3])), total)
    return total


def _pooled(node: Node, x: Array, shape: tuple[int, int, int]) -> Array:
    taps = _taps(node, x, shape)
    if node.op is Op.MAX_POOL:
        most = np.full((*x.shape[:-3], *shape), -np.inf, np.float32)
        for _, _, under, inside in taps:
            most = np.where(inside & ((under > most) | np.isnan(under)) & ~np.isnan(most), under, most)
        return most
    total = np.zeros((*x.shape[:-3], *shape), np.float32)
    for _, _, under, inside in taps:
        total = np.where(inside, total + under, total)
    (top, left, bottom, right), (kh, kw) = node.padding, node.kernel
    starts = (np.arange(shape[0]) * node.stride[0] - top, np.arange(shape[1]) * node.stride[1] - left)
    extents = []
    for start, size, before_end, kernel in zip(starts, x.shape[-3:-1], (bottom, right), (kh, kw), strict=True):
        if node.count_padding:
            extents.append(np.minimum(start + kernel, size + before_end) - start)
        else:
            extents.append(np.minimum(start + kernel, size) - np.maximum(start, 0))
    divisor = (extents[0][:, None] * extents[1][None, :])[..., None].astype(np.float32)
    with np.errstate(all="ignore"):
        return cast(Array, total / divisor)
