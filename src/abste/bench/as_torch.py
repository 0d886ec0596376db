"""A plain network as a torch module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.deploy.unpack import Operation, Plain


class PlainModule(nn.Module):
    """Runs a plain network with torch's operations; its constants are buffers, so that ``to`` takes them along.

    Shapes: one tensor (N, ...) per input -> a tensor, or a tuple where there are several outputs.
    """

    def __init__(self, plain: Plain) -> None:
        super().__init__()
        self.names = list(plain.inputs)
        self.results = list(plain.outputs)
        self.operations = plain.operations
        for name, array in plain.constants.items():
            self.register_buffer(name, torch.from_numpy(array.copy()))

    def forward(self, *inputs: Tensor) -> Any:
        """Every operation, one by one."""
        tensors: dict[str, Any] = {**self._buffers, **dict(zip(self.names, inputs, strict=True))}
        for operation in self.operations:
            arguments = [tensors[name] for name in operation.inputs]
            tensors[operation.output] = _FUNCTIONS[operation.kind](operation.attributes, *arguments)
        found = tuple(tensors[name] for name in self.results)
        return found[0] if len(found) == 1 else found


def as_torch(plain: Plain) -> PlainModule:
    """The module, in eval mode.

    Args:
        plain: without ``bits``, which torch does not have.
    """
    _known(plain.operations)
    return PlainModule(plain).eval()


def _known(operations: list[Operation]) -> None:
    unknown = {operation.kind for operation in operations} - set(_FUNCTIONS)
    if unknown:
        raise ValueError(f"torch has no {', '.join(sorted(unknown))}")


def _conv(a: dict[str, Any], x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    top, left, bottom, right = a["pads"]
    padding = [top, left]
    if (top, left) != (bottom, right):
        x, padding = F.pad(x, (left, right, top, bottom)), [0, 0]
    return F.conv2d(x, weight, bias, a["strides"], padding, a["dilations"], a["group"])


def _pad(a: dict[str, Any], x: Tensor) -> Tensor:
    half = len(a["pads"]) // 2
    pairs = zip(reversed(a["pads"][:half]), reversed(a["pads"][half:]), strict=True)
    return F.pad(x, [side for pair in pairs for side in pair], value=a["value"])


def _max_pool(a: dict[str, Any], x: Tensor) -> Tensor:
    if a["kernel_shape"] == [1, 1] and not any(a["pads"]):
        return x[:, :, :: a["strides"][0], :: a["strides"][1]]
    return F.max_pool2d(x, a["kernel_shape"], a["strides"], a["pads"][:2], a["dilations"])


def _unsqueeze(a: dict[str, Any], x: Tensor) -> Tensor:
    for axis in a["axes"]:
        x = x.unsqueeze(axis)
    return x


_FUNCTIONS: dict[str, Callable[..., Tensor]] = {
    "Add": lambda a, x, y: x + y,
    "AveragePool": lambda a, x: F.avg_pool2d(x, a["kernel_shape"], a["strides"]),
    "Clip": lambda a, x: x.clamp(a["min"], a["max"]),
    "Concat": lambda a, *x: torch.cat(x, 1),
    "Conv": _conv,
    "Flatten": lambda a, x: x.flatten(1),
    "Gelu": lambda a, x: F.gelu(x, approximate=a["approximate"]),
    "Gemm": lambda a, x, weight, bias=None: F.linear(x, weight, bias),
    "GreaterOrEqual": lambda a, x, y: x >= y,
    "HardSigmoid": lambda a, x: F.hardsigmoid(x),
    "HardSwish": lambda a, x: F.hardswish(x),
    "Identity": lambda a, x: x,
    "MaxPool": _max_pool,
    "Mul": lambda a, x, y: x * y,
    "PRelu": lambda a, x, slope: torch.where(x < 0, x * slope, x),
    "Pad": _pad,
    "Relu": lambda a, x: F.relu(x),
    "Sigmoid": lambda a, x: x.sigmoid(),
    "Squeeze": lambda a, x: x.squeeze(a["axes"][0]),
    "Tanh": lambda a, x: x.tanh(),
    "Unsqueeze": _unsqueeze,
    "Where": lambda a, condition, x, y: torch.where(condition, x, y),
}
