"""A plain network as a model of ONNX."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from abste.deploy.unpack import Plain

OPSET, IR_VERSION = 20, 9


def as_onnx(plain: Plain, batch: int) -> Any:
    """The model (an ``onnx.ModelProto``), of a fixed batch, which engines like best.

    Args:
        plain: without ``bits``, which ONNX does not have.
        batch: images.
    """
    constants = {name: numpy_helper.from_array(array, name) for name, array in plain.constants.items()}
    nodes = []
    for operation in plain.operations:
        names, attributes = list(operation.inputs), dict(operation.attributes)
        # What are attributes here are inputs there.
        for key, dtype in _AS_INPUTS.get(operation.kind, {}).items():
            name = f"{operation.output}_{key}"
            constants[name] = numpy_helper.from_array(np.array(attributes.pop(key), dtype), name)
            names.append(name)
        if operation.kind == "Concat":
            attributes["axis"] = 1
        nodes.append(helper.make_node(operation.kind, names, [operation.output], **attributes))
    inputs, outputs = (
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, (batch, *shape)) for name, shape in tensors.items()]
        for tensors in (plain.inputs, plain.outputs)
    )
    graph = helper.make_graph(nodes, "plain", inputs, outputs, list(constants.values()))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    model.ir_version = IR_VERSION
    onnx.checker.check_model(model)
    return model


_AS_INPUTS: dict[str, dict[str, Any]] = {
    "Clip": {"min": np.float32, "max": np.float32},
    "Pad": {"pads": np.int64, "value": np.float32},
    "Squeeze": {"axes": np.int64},
    "Unsqueeze": {"axes": np.int64},
}
