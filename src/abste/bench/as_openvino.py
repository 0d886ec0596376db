"""A plain network as a model of OpenVINO: the only other engine for x86 that still runs binary convolutions as bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
from openvino import opset1, opset14

from abste.deploy.unpack import Plain


def as_openvino(plain: Plain, batch: int) -> Any:
    """The model (an ``openvino.Model``) of a network unpacked with ``signs="bits"``.

    Bits stay bits in it from layer to layer only in this form: FakeQuantize with two levels, 0 and 1, and input_low
    equal to input_high, then BinaryConvolution with a constant of type u1. With levels -1 and +1 the plugin silently
    takes a slow path that is wrong, and so it is where input channels are no multiple of 8.
    """
    parameters = [opset14.parameter([batch, *shape], np.float32, name) for name, shape in plain.inputs.items()]
    tensors: dict[str, Any] = dict(zip(plain.inputs, parameters, strict=True))
    for name, array in plain.constants.items():
        tensors[name] = _bits(array) if array.dtype == bool else opset14.constant(array)
    for operation in plain.operations:
        build = _BUILDERS[operation.kind]
        tensors[operation.output] = build(operation.attributes, *(tensors[name] for name in operation.inputs))
    return ov.Model([opset14.result(tensors[name]) for name in plain.outputs], parameters)


def _bits(signs: Any) -> Any:
    """The first weight is the lowest bit of the first byte."""
    packed = np.packbits(signs.ravel(), bitorder="little")
    return ov.op.Constant(ov.Tensor(packed, ov.Shape(signs.shape), ov.Type.u1), shared_memory=False)


def _binarize(a: dict[str, Any], x: Any) -> Any:
    zero, one = (opset14.constant(np.full((1, 1, 1, 1), number, np.float32)) for number in (0, 1))
    return opset14.fake_quantize(x, zero, zero, zero, one, 2)


def _binary_convolution(a: dict[str, Any], x: Any, weight: Any) -> Any:
    pads, pad_value = a["pads"], float(a["pad_value"])
    return opset1.binary_convolution(
        x, weight, a["strides"], pads[:2], pads[2:], a["dilations"], "xnor-popcount", pad_value
    )


def _conv(a: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    geometry = a["strides"], a["pads"][:2], a["pads"][2:], a["dilations"]
    if a["group"] == 1:
        y = opset14.convolution(x, weight, *geometry)
    else:
        outputs, *rest = weight.get_output_shape(0)
        grouped = opset14.constant(np.array([a["group"], outputs // a["group"], *rest], np.int64))
        y = opset14.group_convolution(x, opset14.reshape(weight, grouped, False), *geometry)
    if bias is None:
        return y
    shape = opset14.constant(np.array([1, -1, 1, 1], np.int64))
    return opset14.add(y, opset14.reshape(bias, shape, False))


def _gemm(a: dict[str, Any], x: Any, weight: Any, bias: Any = None) -> Any:
    y = opset14.matmul(x, weight, False, True)
    return y if bias is None else opset14.add(y, bias)


def _pad(a: dict[str, Any], x: Any) -> Any:
    half = len(a["pads"]) // 2
    before, after = (opset14.constant(np.array(part, np.int64)) for part in (a["pads"][:half], a["pads"][half:]))
    return opset14.pad(x, before, after, "constant", opset14.constant(np.float32(a["value"])))


def _max_pool(a: dict[str, Any], x: Any) -> Any:
    pads = a["pads"]
    return opset14.max_pool(x, a["strides"], a["dilations"], pads[:2], pads[2:], a["kernel_shape"]).output(0)


def _axes(a: dict[str, Any]) -> Any:
    return opset14.constant(np.array(a["axes"], np.int64))


def _flatten(a: dict[str, Any], x: Any) -> Any:
    return opset14.reshape(x, opset14.constant(np.array([0, -1], np.int64)), True)


_BUILDERS: dict[str, Callable[..., Any]] = {
    "Add": lambda a, x, y: opset14.add(x, y),
    "AveragePool": lambda a, x: opset14.avg_pool(x, a["strides"], [0, 0], [0, 0], a["kernel_shape"], True),
    "Binarize": _binarize,
    "BinaryConvolution": _binary_convolution,
    "Clip": lambda a, x: opset14.clamp(x, a["min"], a["max"]),
    "Concat": lambda a, *x: opset14.concat(list(x), 1),
    "Conv": _conv,
    "Flatten": _flatten,
    "Gelu": lambda a, x: opset14.gelu(x, "erf" if a["approximate"] == "none" else "tanh"),
    "Gemm": _gemm,
    "GreaterOrEqual": lambda a, x, y: opset14.greater_equal(x, y),
    "HardSigmoid": lambda a, x: opset14.hard_sigmoid(x, np.float32(a["alpha"]), np.float32(a["beta"])),
    "HardSwish": lambda a, x: opset14.hswish(x),
    "Identity": lambda a, x: x,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: opset14.multiply(x, y),
    "PRelu": lambda a, x, slope: opset14.prelu(x, slope),
    "Pad": _pad,
    "Relu": lambda a, x: opset14.relu(x),
    "Sigmoid": lambda a, x: opset14.sigmoid(x),
    "Squeeze": lambda a, x: opset14.squeeze(x, _axes(a)),
    "Tanh": lambda a, x: opset14.tanh(x),
    "Unsqueeze": lambda a, x: opset14.unsqueeze(x, _axes(a)),
    "Where": lambda a, condition, x, y: opset14.select(condition, x, y),
}
