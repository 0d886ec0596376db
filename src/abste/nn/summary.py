"""What a model costs, layer by layer: parameters and multiply-accumulates by width, and bytes packed and float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_leaves

from abste.errors import ConfigError
from abste.nn._probe import first_line, untouched
from abste.nn.layers import BINARY_LAYERS

_COLUMNS = {
    "binary_parameters": "1-bit par.",
    "float_parameters": "32-bit par.",
    "packed_bytes": "packed B",
    "float_bytes": "float B",
    "binary_macs": "1-bit MACs",
    "float_macs": "32-bit MACs",
}


@dataclass(frozen=True)
class LayerCost:
    """Cost of one module's own parameters and of its multiply-accumulates (MACs) in one forward.

    Attributes:
        name, kind: of the module.
        output_shape: of its first call, without the batch dimension; empty where it was not called.
        binary_parameters: weights that deploy as one bit.
        float_parameters: all other parameters.
        packed_bytes: to store it with 1-bit weights: their bits in whole bytes, and 4 bytes for each float parameter,
            scale and batch-norm statistic.
        float_bytes: to store the same layer at 4 bytes an element, without scales.
        binary_macs: MACs of two binary operands (XNOR and popcount), for the whole batch.
        float_macs: MACs with a float operand, W1A32 among them.
    """

    name: str
    kind: str
    output_shape: tuple[int, ...]
    binary_parameters: int
    float_parameters: int
    packed_bytes: int
    float_bytes: int
    binary_macs: int
    float_macs: int


@dataclass(frozen=True)
class Summary:
    """Costs of a model; ``print`` it. Totals are properties."""

    layers: tuple[LayerCost, ...]
    input_size: tuple[int, ...]

    def _sum(self, key: str) -> int:
        return sum(getattr(layer, key) for layer in self.layers)

    @property
    def binary_parameters(self) -> int:
        """Weights that deploy as one bit."""
        return self._sum("binary_parameters")

    @property
    def float_parameters(self) -> int:
        """All other parameters."""
        return self._sum("float_parameters")

    @property
    def packed_bytes(self) -> int:
        """Bytes of the model with 1-bit weights."""
        return self._sum("packed_bytes")

    @property
    def float_bytes(self) -> int:
        """Bytes of the same model in float32."""
        return self._sum("float_bytes")

    @property
    def binary_macs(self) -> int:
        """MACs of two binary operands."""
        return self._sum("binary_macs")

    @property
    def float_macs(self) -> int:
        """MACs with a float operand."""
        return self._sum("float_macs")

    @property
    def total_macs(self) -> int:
        """All MACs of one forward of ``input_size``."""
        return self.binary_macs + self.float_macs

    @property
    def compression(self) -> float:
        """float_bytes / packed_bytes."""
        return self.float_bytes / max(self.packed_bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Layers and totals as plain numbers, for JSON."""
        return {
            "input_size": list(self.input_size),
            "totals": {key: self._sum(key) for key in _COLUMNS} | {"compression": self.compression},
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        rows = [("layer", "type", "output", *_COLUMNS.values())]
        for x in self.layers:
            numbers = [f"{getattr(x, key):,}" if getattr(x, key) else "-" for key in _COLUMNS]
            rows.append((x.name, x.kind, "x".join(map(str, x.output_shape)) or "-", *numbers))
        rows.append(("total", "", "", *(f"{self._sum(key):,}" for key in _COLUMNS)))
        width = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = []
        for row in rows:
            cells = [f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, width, strict=True))]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(len, lines))
        head, *body, total = lines
        size = (
            f"input {'x'.join(map(str, self.input_size))}; packed {self.packed_bytes / 1e3:,.1f} kB, "
            f"float32 {self.float_bytes / 1e3:,.1f} kB: {self.compression:.1f} times smaller"
        )
        return "\n".join([head, rule, *body, rule, total, size])


def summary(model: nn.Module, input_size: Sequence[int], *, dtype: torch.dtype | None = None) -> Summary:
    """Count parameters, bytes and MACs of a model, converted or not.

    One forward in evaluation mode, without gradients, finds shapes and MACs; the model is left as it was. MACs are
    counted for convolutions and linear layers that are called; a W1A32 layer's are 32-bit MACs, since one operand is.

    Args:
        model: any module.
        input_size: shape of the input with its batch dimension, such as ``(1, 3, 32, 32)``.
        dtype: of the input; default that of the model's first floating-point parameter.

    Raises:
        ConfigError: not a shape, or the model fails on an input of that shape.
    """
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(f"summary: input_size must be a shape such as (1, 3, 32, 32), got {input_size!r}.")
    owners = {name: module for name, module in model.named_modules() if _counts(module)}
    shapes: dict[nn.Module, tuple[int, ...]] = {}
    macs: dict[nn.Module, int] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(module, tuple(output.shape[1:]))
            macs[module] = macs.get(module, 0) + _macs(module, tree_leaves((args, kwargs))[0], output)

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in owners.values()]
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with torch.no_grad(), untouched(model):
            model(torch.zeros(size, dtype=dtype or like.dtype, device=like.device))
    except Exception as error:  # the model's own code
        raise ConfigError(f"summary: the model fails on an input of shape {size}: {first_line(error)}") from error
    finally:
        for hook in hooks:
            hook.remove()
    seen: set[nn.Parameter] = set()
    return Summary(
        tuple(_cost(name or "(model)", m, shapes.get(m, ()), macs.get(m, 0), seen) for name, m in owners.items()), size
    )


def _counts(module: nn.Module) -> bool:
    owns = any(parameter is not None for parameter in module._parameters.values())
    return owns or isinstance(module, nn.Linear | _ConvNd | _BatchNorm)


def _cost(name: str, module: nn.Module, shape: tuple[int, ...], macs: int, seen: set[nn.Parameter]) -> LayerCost:
    binary = module if isinstance(module, BINARY_LAYERS) and module.weight_binarizer is not None else None
    bits = floats = scales = 0
    for key, parameter in module._parameters.items():
        if parameter is None or parameter in seen:  # a shared one is stored once
            continue
        seen.add(parameter)
        if key == "weight" and binary is not None:
            bits = parameter.numel()
            scales = {"channel": parameter.shape[0], "tensor": 1}.get(binary.scale or "", 0)
        else:
            floats += parameter.numel()
    statistics = 0
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        statistics = 2 * module.running_mean.numel()
    learned = binary.learned_scale.numel() if binary is not None and binary.learned_scale is not None else 0
    xnor = binary is not None and binary.activation is not None
    return LayerCost(
        name=name,
        kind=type(module).__name__,
        output_shape=shape,
        binary_parameters=bits,
        float_parameters=floats,
        packed_bytes=math.ceil(bits / 8) + 4 * (floats + scales + statistics),
        float_bytes=4 * (bits + floats - learned + statistics),
        binary_macs=macs if xnor else 0,
        float_macs=0 if xnor else macs,
    )


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, _ConvNd):
        # Each input element of a transposed convolution is spread over outputs; else each output gathers inputs.
        elements, channels = (x, module.out_channels) if module.transposed else (output, module.in_channels)
        return elements.numel() * (channels // module.groups) * math.prod(module.kernel_size)
    return 0
