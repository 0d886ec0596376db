"""What a model costs, layer by layer: parameters and multiply-accumulates by width, and bytes packed and float."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.nn._probe import untouched
from abste.nn.layers import BINARY_LAYERS


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
        totals = {f.name: self._sum(f.name) for f in fields(LayerCost) if f.type == "int"}
        return {
            "input_size": list(self.input_size),
            "totals": {**totals, "compression": self.compression},
            "layers": [asdict(layer) for layer in self.layers],
        }

    def __str__(self) -> str:
        head = ("layer", "type", "output", "1-bit par.", "32-bit par.", "packed B", "float B", "1-bit MACs", "32-bit MACs")
        rows = [head]
        for x in self.layers:
            shape = "x".join(map(str, x.output_shape)) or "-"
            numbers = (
                x.binary_parameters,
                x.float_parameters,
                x.packed_bytes,
                x.float_bytes,
                x.binary_macs,
                x.float_macs,
            )
            rows.append((x.name, x.kind, shape, *(f"{n:,}" if n else "-" for n in numbers)))
        totals = (
            self.binary_parameters,
            self.float_parameters,
            self.packed_bytes,
            self.float_bytes,
            self.binary_macs,
            self.float_macs,
        )
        rows.append(("total", "", "", *(f"{n:,}" for n in totals)))
        width = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for row in rows:
            cells = [f"{c:<{w}}" if i < 3 else f"{c:>{w}}" for i, (c, w) in enumerate(zip(row, width, strict=True))]
            lines.append("  ".join(cells).rstrip())
        rule = "-" * max(map(len, lines))
        lines[1:1] = [rule]
        lines[-1:-1] = [rule]
        lines.append(
            f"input {'x'.join(map(str, self.input_size))}; packed {self.packed_bytes / 1e3:,.1f} kB, "
            f"float32 {self.float_bytes / 1e3:,.1f} kB: {self.compression:.1f} times smaller"
        )
        return "\n".join(lines)


def summary(model: nn.Module, input_size: Sequence[int] | Any, *, dtype: torch.dtype = torch.float32) -> Summary:
    """Count parameters, bytes and MACs of a model, converted or not.

    One forward in evaluation mode, without gradients, finds shapes and MACs; the model is left as it was. MACs are
    counted for convolutions and linear layers that are called; a W1A32 layer's are 32-bit MACs, since one operand is.

    Args:
        model: any module.
        input_size: shape of the input with its batch dimension, such as ``(1, 3, 32, 32)``.
        dtype: of the input.

    Raises:
        ConfigError: not a shape, or the model fails on an input of that shape.
    """
    size = tuple(input_size) if isinstance(input_size, Sequence) else ()
    if not size or not all(isinstance(n, int) and n > 0 for n in size):
        raise ConfigError(f"summary: input_size must be a shape such as (1, 3, 32, 32), got {input_size!r}.")
    shapes: dict[int, list[torch.Size]] = {}

    def note(module: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            shapes.setdefault(id(module), []).append(output.shape)

    owners = {name: m for name, m in model.named_modules() if _owns(m)}
    hooks = [module.register_forward_hook(note) for module in owners.values()]
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        with torch.no_grad(), untouched(model):
            model(torch.zeros(size, dtype=dtype, device=device))
    except Exception as error:  # the model's own code
        message = str(error).strip().split("\n")[0]
        raise ConfigError(f"summary: the model fails on an input of shape {size}: {message}") from error
    finally:
        for hook in hooks:
            hook.remove()
    seen: set[int] = set()
    return Summary(tuple(_cost(n or "(model)", m, shapes.get(id(m), []), seen) for n, m in owners.items()), size)


def _owns(module: nn.Module) -> bool:
    return any(True for _ in module.parameters(recurse=False)) or isinstance(module, nn.modules.batchnorm._BatchNorm)


def _cost(name: str, module: nn.Module, shapes: list[torch.Size], seen: set[int]) -> LayerCost:
    binary_layer = module if isinstance(module, BINARY_LAYERS) else None
    bits = floats = 0
    for key, parameter in module.named_parameters(recurse=False):
        if id(parameter) in seen:  # shared: stored once
            continue
        seen.add(id(parameter))
        if key == "weight" and binary_layer is not None and binary_layer.weight_binarizer is not None:
            bits += parameter.numel()
        else:
            floats += parameter.numel()
    extra = 0
    if binary_layer is not None and bits:
        extra = {"channel": binary_layer.weight.shape[0], "tensor": 1}.get(binary_layer.scale or "", 0)
    statistics = 0
    if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
        statistics = 2 * module.running_mean.numel()
    learned = module.learned_scale.numel() if binary_layer is not None and binary_layer.learned_scale is not None else 0  # type: ignore[union-attr]
    macs = sum(_macs(module, shape) for shape in shapes)
    both = binary_layer is not None and binary_layer.weight_binarizer is not None and binary_layer.activation is not None
    return LayerCost(
        name=name,
        kind=type(module).__name__,
        output_shape=tuple(shapes[0][1:]) if shapes else (),
        binary_parameters=bits,
        float_parameters=floats,
        packed_bytes=math.ceil(bits / 8) + 4 * (floats + extra + statistics),
        float_bytes=4 * (bits + floats + statistics - learned),
        binary_macs=macs if both else 0,
        float_macs=0 if both else macs,
    )


def _macs(module: nn.Module, output: torch.Size) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
        return output.numel() * (module.in_channels // module.groups) * math.prod(module.kernel_size)
    return 0
