"""Swap the layers of any torch model for binary ones, and say what happened to each."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from abste.errors import ConfigError, ConversionError, nearest
from abste.estimators import Binarizer, resolve
from abste.nn._probe import LayerTrace, probe
from abste.nn.layers import BINARY_LAYERS, BinaryConv1d, BinaryConv2d, BinaryLinear

_COUNTERPARTS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Linear: BinaryLinear,
}
_NORMS: dict[type[nn.Module], Callable[..., nn.Module]] = {
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
}
UNSIGNED = ("error", "keep_float", "weights_only", "batch_norm")


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`ConversionReport`.

    Attributes:
        name: the module's name in the model.
        kind: its class before conversion.
        binarized: whether it is binary now.
        reason: what was done, or why it stayed float.
        parameters: number of elements of its weight.
    """

    name: str
    kind: str
    binarized: bool
    reason: str
    parameters: int


@dataclass(frozen=True)
class ConversionReport:
    """Every layer with a weight, binarised or not, and why. ``print`` it; iterate over ``layers``."""

    layers: tuple[LayerReport, ...]

    @property
    def binarized(self) -> list[str]:
        """Names of the layers that are binary now."""
        return [layer.name for layer in self.layers if layer.binarized]

    @property
    def kept_float(self) -> dict[str, str]:
        """Names of the layers that stayed float, with the reason."""
        return {layer.name: layer.reason for layer in self.layers if not layer.binarized}

    def __str__(self) -> str:
        rows = [("layer", "type", "weights", "", "")]
        rows += [
            (x.name, x.kind, f"{x.parameters:,}", "binary" if x.binarized else "float", x.reason) for x in self.layers
        ]
        width = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{width[0]}}  {b:<{width[1]}}  {c:>{width[2]}}  {d:<{width[3]}}  {e}".rstrip() for a, b, c, d, e in rows
        ]
        binary = sum(x.parameters for x in self.layers if x.binarized)
        total = sum(x.parameters for x in self.layers)
        lines.append(
            f"{len(self.binarized)} of {len(self.layers)} layers binarised, "
            f"{binary:,} of {total:,} weights ({100 * binary / total:.1f} %)"
        )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    weights: Any = "ab_tanh",
    activations: Any = None,
    example_input: Any,
    keep_float: Iterable[str] | Callable[[str, nn.Module], bool] = (),
    keep_first: bool = True,
    keep_last: bool = True,
    keep_projections: bool = True,
    unsigned_inputs: Literal["error", "keep_float", "weights_only", "batch_norm"] = "error",
    standardize: bool = True,
    normalize: bool = True,
    scale: Literal["channel", "tensor", "learned"] | None = "channel",
    scale_gradient: bool = False,
    pad_value: float = 0,
) -> ConversionReport:
    """Replace the Conv1d, Conv2d and Linear layers of ``model``, in place, by binary ones with the same weights.

    A forward with ``example_input`` finds the order of execution and the traps: it changes nothing in the model. Kept
    float are the first and the last layer by execution order; 1x1 projection shortcuts, which are 1x1 convolutions
    whose output is added to a longer path from the same input; what ``keep_float`` names; and layers that can not be
    swapped safely: subclasses with a forward of their own, parametrised or shared weights, layers whose weight is
    read without calling them (as in torch.nn.MultiheadAttention), and layers that the forward does not reach.

    Args:
        model: any module that calls its layers; it must not be such a layer itself.
        weights: binarizer of the weights: a name, a table, an object (copied per layer), or None.
        activations: binarizer of the inputs, likewise; None leaves activations in full precision (W1A32).
        example_input: a tensor, or a tuple of the model's arguments, with a batch dimension. Where a float tensor is
            constant (as ``torch.zeros``), it only gives the shape and noise is used.
        keep_float: names to leave float, with wildcards (``["head.*"]``), or a function (name, module) -> bool.
        keep_first: leave the first layer float.
        keep_last: leave the last layer float.
        keep_projections: leave 1x1 projection shortcuts float.
        unsigned_inputs: what to do with layers whose input is never negative, as after a ReLU, when activations are
            binarised: the sign would be a constant +1. ``"error"`` refuses; ``"keep_float"`` leaves those layers
            float; ``"weights_only"`` binarises only their weights; ``"batch_norm"`` puts a batch norm before them, so
            that the new module is a Sequential of ``norm`` and ``layer``.
        standardize, normalize, scale, scale_gradient, pad_value: as in :class:`~abste.nn.BinaryConv2d`. ``pad_value``
            goes to the convolutions.

    Returns:
        A report of every layer with a weight.

    Raises:
        ConversionError: nothing to binarise; unsigned inputs; the model fails on ``example_input``. The model is then
            as it was.
        ConfigError: an unknown estimator or option.
    """
    if unsigned_inputs not in UNSIGNED:
        raise ConfigError(f"unknown unsigned_inputs {unsigned_inputs!r}; {nearest(unsigned_inputs, UNSIGNED)}")
    if weights is None and activations is None:
        raise ConfigError("convert: weights and activations are both None, so there is nothing to binarise.")
    for spec, role in ((weights, "weights"), (activations, "activations")):
        resolve(spec, role)  # type: ignore[arg-type]
    kept_by_user = _filter(keep_float)
    layers = {name: m for name, m in model.named_modules() if _has_weight(m)}
    if "" in layers:
        raise ConversionError(
            f"the model is a single {type(model).__name__}: put it in a Sequential, or use abste.nn directly."
        )
    if any(isinstance(p, nn.parameter.UninitializedParameter) for p in model.parameters()):
        raise ConversionError("the model has lazy layers without a shape yet: run it once, then convert.")
    candidates = [m for m in layers.values() if isinstance(m, tuple(_COUNTERPARTS)) and not _is_binary(m)]
    traces = _run_probe(model, candidates, example_input)
    order = {id(m): traces[id(m)].calls for m in candidates if traces[id(m)].calls}
    first = min(order, key=lambda i: order[i][0], default=None)
    last = max(order, key=lambda i: order[i][-1], default=None)
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)

    decisions: dict[str, str | None] = {}
    for name, module in layers.items():
        decisions[name] = _reason_to_keep(name, module, traces.get(id(module)), owners)
        if decisions[name] is None:
            if keep_first and id(module) == first:
                decisions[name] = "first layer"
            elif keep_last and id(module) == last:
                decisions[name] = "last layer"
            elif keep_projections and traces[id(module)].projection:
                decisions[name] = "1x1 projection shortcut"
            elif kept_by_user(name, module):
                decisions[name] = "named by keep_float"
    chosen = [name for name, reason in decisions.items() if reason is None]
    unsigned = [n for n in chosen if activations is not None and traces[id(layers[n])].least_input >= 0]
    if unsigned and unsigned_inputs == "error":
        raise ConversionError(
            f"the input of {_some(unsigned)} is never negative (after a ReLU, say), so its sign would be constant +1: "
            "reorder the model so that a batch norm or an addition comes right before, or choose "
            "unsigned_inputs='batch_norm', 'weights_only' or 'keep_float'."
        )
    if unsigned_inputs == "keep_float":
        for name in unsigned:
            decisions[name] = "its input is never negative"
        chosen = [name for name in chosen if name not in unsigned]
    if not chosen:
        raise ConversionError(f"nothing to binarise: {_explain(decisions)}.")

    options: dict[str, Any] = {
        "standardize": standardize,
        "normalize": normalize,
        "scale": scale,
        "scale_gradient": scale_gradient,
    }
    replacements: dict[str, tuple[nn.Module, str]] = {}
    for name in chosen:
        own = activations
        note = ""
        if name in unsigned and unsigned_inputs == "weights_only":
            own, note = None, "; its input is never negative, so activations stay float"
            if weights is None:
                decisions[name] = "its input is never negative"
                continue
        layer = _binary(layers[name], weights, own, pad_value, options)
        what = _describe(weights, own) + note
        if name in unsigned and unsigned_inputs == "batch_norm":
            layer, what = _with_norm(layers[name], layer, name), what + "; after a new batch norm"
        replacements[name] = (layer, what)
    if not replacements:
        raise ConversionError(f"nothing to binarise: {_explain(decisions)}.")
    report = ConversionReport(
        tuple(
            LayerReport(
                name,
                type(module).__name__,
                name in replacements or _is_binary(module),
                replacements[name][1] if name in replacements else str(decisions[name]),
                module.weight.numel(),  # type: ignore[union-attr,operator]
            )
            for name, module in layers.items()
        )
    )
    for name, (replacement, _) in replacements.items():
        model.set_submodule(name, replacement)
    return report


def _has_weight(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return (weight is not None and weight.dim() >= 2) or isinstance(module, tuple(_COUNTERPARTS))


def _is_binary(module: nn.Module) -> bool:
    return isinstance(module, BINARY_LAYERS)


def _filter(keep_float: Any) -> Callable[[str, nn.Module], bool]:
    if callable(keep_float):
        return keep_float  # type: ignore[no-any-return]
    patterns = [keep_float] if isinstance(keep_float, str) else list(keep_float)
    return lambda name, module: any(fnmatchcase(name, pattern) for pattern in patterns)


def _run_probe(model: nn.Module, candidates: list[nn.Module], example_input: Any) -> dict[int, LayerTrace]:
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(argument, Tensor) for argument in arguments):
        raise ConfigError(
            f"convert: example_input must be a tensor or a tuple with one, got {type(example_input).__name__}."
        )
    try:
        return probe(model, candidates, arguments)
    except Exception as error:  # the model's own code: anything may come out of it
        shapes = ", ".join(str(tuple(a.shape)) for a in arguments if isinstance(a, Tensor))
        message = str(error).strip().split("\n")[0]
        raise ConversionError(f"the model fails on example_input of shape {shapes}: {message}") from error


def _reason_to_keep(
    name: str, module: nn.Module, trace: LayerTrace | None, owners: dict[int, list[str]]
) -> str | None:
    if _is_binary(module):
        return "binary already"
    if trace is None:
        return f"no binary counterpart of {type(module).__name__}"
    if nn.utils.parametrize.is_parametrized(module) or hasattr(module, "weight_g"):
        return "its weight is parametrised"
    if trace.read_outside:
        return "its weight is read without calling it, so a swap would have no effect or a wrong one"
    if type(module) not in _COUNTERPARTS:
        return f"subclass of {type(module).__mro__[1].__name__} with a forward of its own"
    if not trace.calls:
        return "not reached by the forward on example_input"
    shared = [other for other in owners[id(module.weight)] if other != name]
    if shared:
        return f"its weight is shared with {shared[0]}"
    return None


def _binary(module: nn.Module, weights: Any, activations: Any, pad_value: float, options: dict[str, Any]) -> nn.Module:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    shared: dict[str, Any] = {"bias": module.bias is not None, "device": weight.device, "dtype": weight.dtype}
    shared |= {"weights": weights, "activations": activations, **options}
    layer: nn.Module
    with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):  # for the weights it throws away
        if isinstance(module, nn.Linear):
            layer = BinaryLinear(module.in_features, module.out_features, **shared)
        else:
            assert isinstance(module, nn.Conv1d | nn.Conv2d)
            layer = _COUNTERPARTS[type(module)](
                module.in_channels,
                module.out_channels,
                module.kernel_size,
                stride=module.stride,
                padding=module.padding,
                dilation=module.dilation,
                groups=module.groups,
                padding_mode=module.padding_mode,
                pad_value=pad_value if activations is not None and module.padding_mode == "zeros" else 0,
                **shared,
            )
    layer.weight, layer.bias = weight, module.bias  # the parameters themselves, so an optimizer that has them goes on
    layer.reset_scale()  # type: ignore[operator]
    return layer.train(module.training)


def _describe(weights: Any, activations: Any) -> str:
    names = []
    for spec, letter in ((weights, "W"), (activations, "A")):
        if spec is None:
            names.append(f"{letter}32")
        else:
            name = spec if isinstance(spec, str) else spec.name if isinstance(spec, Binarizer) else spec["name"]
            names.append(f"{letter}1 {name}")
    return ", ".join(names)


def _with_norm(module: nn.Module, layer: nn.Module, name: str) -> nn.Module:
    norm_class = _NORMS.get(type(module))
    if norm_class is None:
        raise ConversionError(
            f"unsigned_inputs='batch_norm' can not be applied to {name}, a {type(module).__name__} whose input may "
            "have more than two dimensions: choose 'weights_only' or 'keep_float'."
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    norm = norm_class(module.in_channels, device=weight.device, dtype=weight.dtype)
    return nn.Sequential(OrderedDict(norm=norm, layer=layer)).train(module.training)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _explain(decisions: dict[str, str | None]) -> str:
    if not decisions:
        return "the model has no convolution or linear layer"
    name, reason = next(iter(decisions.items()))
    return f"all {len(decisions)} layers stay float ({name}: {reason})"
