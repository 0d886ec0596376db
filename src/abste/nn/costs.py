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
from abste.nn.branch import GradientBranch
from abste.nn.layers import BINARY_LAYERS
from abste.nn.parameters import _latents
from abste.nn.pieces import AdaptiveSet

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
        float_parameters: all other parameters; but not the branch of a GradientBranch, which only training needs.
        packed_bytes: to store it with 1-bit weights: their bits in whole bytes, and 4 bytes for each float parameter,
            scale, centre and batch-norm statistic; and what else the file holds for centres (a filter of +1 for each
            group, a factor of 1 for each output channel) and for the zero padding of an AdaptiveSet.
        float_bytes: to store the same layer at 4 bytes an element, without scales and centres.
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
    macs: dict[nn.Module, tuple[int, int]] = {}

    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = tree_leaves((args, kwargs))
        if isinstance(output, Tensor) and given:  # a parametrization computes a weight from nothing
            shapes.setdefault(module, tuple(output.shape[1:]))
            before = macs.get(module, (0, 0))
            found = _macs_by_width(module, given[0], output)
            macs[module] = before[0] + found[0], before[1] + found[1]

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
    seen: set[Tensor] = set()
    rows = [_cost(name or "(model)", m, shapes.get(m, ()), macs.get(m, (0, 0)), seen) for name, m in owners.items()]
    return Summary(tuple(rows), size)


def _counts(module: nn.Module) -> bool:
    if isinstance(module, GradientBranch):
        return False
    owns = any(parameter is not None for parameter in module._parameters.values())
    return owns or isinstance(module, nn.Linear | _ConvNd | _BatchNorm)


def _cost(name: str, module: nn.Module, shape: tuple[int, ...], macs: tuple[int, int], seen: set[Tensor]) -> LayerCost:
    binary = module if isinstance(module, BINARY_LAYERS) and module.weight_binarizer is not None else None
    bits = ones = floats = scales = 0
    latents = _latents(binary) if binary is not None else []
    of_latents = set(latents)
    for parameter in dict.fromkeys((*module._parameters.values(), *latents)):  # a parametrization holds its own
        if parameter is None or parameter in seen:  # a shared one is stored once
            continue
        seen.add(parameter)
        if parameter in of_latents and binary is not None:
            bits = parameter.numel()
            channels = parameter.shape[0]
            scales = {"channel": channels, "std": channels, "tensor": 1}.get(binary.scale or "", 0)
            if binary.center is not None:
                ones = parameter[0].numel() * getattr(binary, "groups", 1)
                scales += channels * (2 if binary.center == "mean" else 1)
        else:
            floats += parameter.numel()
    if isinstance(module, AdaptiveSet) and (taps := _border(module)):
        channels, centered = module.layer.weight.shape[0], module.layer.center is not None
        ones += module.layer.weight.shape[1] * getattr(module.layer, "groups", 1) + centered * taps
        scales += channels * (taps + 1 + 2 * centered)
    statistics = 0
    if isinstance(module, _BatchNorm) and module.running_mean is not None:
        statistics = 2 * module.running_mean.numel()
    learned = 0
    if binary is not None:
        learned = sum(p.numel() for p in (binary.learned_scale, binary.learned_center) if p is not None)
    return LayerCost(
        name=name,
        kind=type(module).__name__,
        output_shape=shape,
        binary_parameters=bits,
        float_parameters=floats,
        packed_bytes=math.ceil(bits / 8) + math.ceil(ones / 8) + 4 * (floats + scales + statistics),
        float_bytes=4 * (bits + floats - learned + statistics),
        binary_macs=macs[0],
        float_macs=macs[1],
    )


def _border(adaptive: AdaptiveSet) -> int:
    """Taps of the convolution of ones that an export needs where zero padding enters the windows of a set; else 0."""
    layer = adaptive.layer
    if isinstance(layer, nn.Linear) or layer.pad_value or layer.padding_mode != "zeros":
        return 0
    return math.prod(layer.kernel_size) if any(layer._reversed_padding_repeated_twice) else 0


def _macs_by_width(module: nn.Module, x: Tensor, output: Tensor) -> tuple[int, int]:
    """MACs of two binary operands, and the others."""
    if isinstance(module, AdaptiveSet):
        taps, positions = _border(module), output.numel() // module.layer.weight.shape[0]
        if not taps:
            return 0, 0
        counted = positions * taps + output.numel() if module.layer.center is not None else 0
        return x.numel(), output.numel() * taps + counted
    count = _macs(module, x, output)
    if not isinstance(module, BINARY_LAYERS) or module.weight_binarizer is None:
        return 0, count
    spread = 0
    if module.center is not None:  # the sums over windows, once for each group, and from there to every channel
        count += count // module.weight.shape[0] * getattr(module, "groups", 1)
        spread = output.numel()
    return (count, spread) if module.activation is not None else (0, count + spread)


def _macs(module: nn.Module, x: Tensor, output: Tensor) -> int:
    if isinstance(module, nn.Linear):
        return output.numel() * module.in_features
    if isinstance(module, _ConvNd):
        # Each input element of a transposed convolution is spread over outputs; else each output gathers inputs.
        elements, channels = (x, module.out_channels) if module.transposed else (output, module.in_channels)
        return elements.numel() * (channels // module.groups) * math.prod(module.kernel_size)
    return 0
