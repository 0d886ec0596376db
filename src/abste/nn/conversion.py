"""Swap the layers of any torch model for binary ones, and say what happened to each."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from typing import Any, Literal, cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList
from torch.utils._pytree import tree_leaves

from abste.errors import ConfigError, ConversionError, nearest
from abste.estimators import Spec
from abste.estimators.base import build
from abste.nn._probe import LayerTrace, first_line, probe
from abste.nn.branch import GradientBranch
from abste.nn.latents import LatentSpec
from abste.nn.layers import BINARY_LAYERS, BinaryConv1d, BinaryConv2d, BinaryLinear, Center, Scale
from abste.nn.pieces import AdaptiveSet

_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Linear)
_COUNTERPARTS: dict[type[nn.Module], type[BinaryConv1d | BinaryConv2d | BinaryLinear]] = {
    nn.Conv1d: BinaryConv1d,
    nn.Conv2d: BinaryConv2d,
    nn.Linear: BinaryLinear,
}
_UNSIGNED = ("error", "keep_float", "weights_only", "batch_norm")
_NEVER_NEGATIVE = "its input is never negative"


@dataclass(frozen=True)
class LayerReport:
    """One row of a :class:`ConversionReport`.

    Attributes:
        name: the module's name in the model.
        kind: its class before conversion.
        binarized: whether it is binary now.
        reason: what was done, or why it stayed float.
        parameters: number of elements of its weight.
        binary_weights: whether these are binary; a layer may have binary inputs alone.
    """

    name: str
    kind: str
    binarized: bool
    reason: str
    parameters: int
    binary_weights: bool


@dataclass(frozen=True)
class ConversionReport:
    """Every module with a weight, binarised or not, and why. ``print`` it; iterate over ``layers``."""

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
        if not self.layers:
            return "full precision: nothing was binarised"
        rows = [("layer", "type", "weights", "", "")]
        for x in self.layers:
            rows.append((x.name, x.kind, f"{x.parameters:,}", "binary" if x.binarized else "float", x.reason))
        width = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{width[0]}}  {b:<{width[1]}}  {c:>{width[2]}}  {d:<{width[3]}}  {e}".rstrip()
            for a, b, c, d, e in rows
        ]
        binary = sum(x.parameters for x in self.layers if x.binary_weights)
        total = sum(x.parameters for x in self.layers)
        lines.append(
            f"{len(self.binarized)} of {len(self.layers)} layers binarised, "
            f"{binary:,} of {total:,} weights ({100 * binary / total:.1f} %)"
        )
        return "\n".join(lines)


def convert(
    model: nn.Module,
    *,
    weights: Spec = "ab_tanh",
    activations: Spec = None,
    example_input: Any,
    keep_float: str | Iterable[str] | Callable[[str, nn.Module], bool] = (),
    keep_first: bool = True,
    keep_last: bool = True,
    keep_projections: bool = True,
    keep_depthwise: bool = True,
    unsigned_inputs: Literal["error", "keep_float", "weights_only", "batch_norm"] = "error",
    standardize: LatentSpec = True,
    normalize: bool = True,
    scale: Scale = "channel",
    scale_gradient: bool = False,
    center: Center = None,
    pad_value: float = 0,
    adaptive_set: bool = False,
    gradient_branch: float | None = None,
) -> ConversionReport:
    """Make the Conv1d, Conv2d and Linear layers of ``model`` binary, in place, with the weights they have as latents.

    The layers stay the same objects with the same parameters, so an optimizer that has these, hooks, and references
    from elsewhere go on working.

    A forward with ``example_input``, in evaluation mode, finds the order of execution and the traps; it changes nothing
    in the model. Kept float are the first and the last layer by execution order; 1x1 projection shortcuts, which are
    1x1 convolutions whose output is added to a longer path from the same input; depthwise convolutions, whose filters
    read one channel each: a few weights, hardly any of the file; what ``keep_float`` names; and layers that can not be
    swapped safely: subclasses, which may have a forward of their own, parametrised or shared weights, layers whose
    weight is read without calling them (as in torch.nn.MultiheadAttention), and layers that the forward does not reach.

    Shifts and activations (:class:`~abste.nn.RSign`, :class:`~abste.nn.RPReLU`) are not put in: where they belong is
    for the network to say. Write them into it; the conversion leaves them alone.

    Args:
        model: any module that calls its layers, initialised, on a real device; not such a layer itself.
        weights: binarizer of the weights: a name, a table, an object (copied per layer), or None.
        activations: binarizer of the inputs, likewise; None leaves activations in full precision (W1A32).
        example_input: a tensor, or a tuple of the model's arguments, with a batch dimension. Where a float tensor is
            constant (as ``torch.zeros``), it only gives the shape and noise is used.
        keep_float: names of layers, or of modules that hold them, to leave float, with wildcards (``["head.*"]``), or
            a function (name, module) -> bool.
        keep_first: leave the first layer float.
        keep_last: leave the last layer float.
        keep_projections: leave 1x1 projection shortcuts float.
        keep_depthwise: leave depthwise convolutions float.
        unsigned_inputs: what to do with layers whose input is never negative, as after a ReLU, when activations are
            binarised: the sign would be a constant +1. ``"error"`` refuses; ``"keep_float"`` leaves those layers
            float; ``"weights_only"`` binarises only their weights; ``"batch_norm"`` puts a batch norm before them, so
            that a Sequential of ``norm`` and ``layer`` stands at their name.
        standardize, normalize, scale, scale_gradient, center, pad_value: as in :class:`~abste.nn.BinaryConv2d`.
            ``pad_value`` goes to the convolutions with zero padding.
        adaptive_set: put an :class:`~abste.nn.AdaptiveSet` around every layer whose input is binarised, so that this
            stands at its name.
        gradient_branch: eta of a :class:`~abste.nn.GradientBranch` around every layer; None for none. Around the set,
            where there are both.

    Returns:
        A report of every module with a weight.

    Raises:
        ConversionError: nothing to binarise; unsigned inputs; the model fails on ``example_input``, or once modules are
            put around layers; or it calls such a layer past them, by a reference other than its name.
        ConfigError: an unknown estimator or option. After either, the model is as it was.
    """
    options: dict[str, Any] = {
        "standardize": standardize,
        "normalize": normalize,
        "scale": scale,
        "scale_gradient": scale_gradient,
        "center": center,
    }

    def around(layer: nn.Module) -> nn.Module:
        if adaptive_set and layer.activation is not None:
            layer = AdaptiveSet(cast(BinaryConv2d, layer))
        if gradient_branch is not None:
            layer = GradientBranch(cast(BinaryConv2d, layer), eta=gradient_branch)
        return layer

    _check(model, weights, activations, unsigned_inputs, {**options, "pad_value": pad_value}, around)
    if adaptive_set and activations is None:
        raise ConfigError("convert: adaptive_set gives binarised inputs their two values, and needs activations.")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, _LAYERS) or _matrices(module):
            names.setdefault(module, []).append(name or "(model)")
    kept_by_user = _filter(keep_float, list(chain(*names.values())))
    traces = _run_probe(model, [m for m in names if isinstance(m, _LAYERS)], example_input)
    called = [trace for trace in traces.values() if trace.calls]
    first = min(called, key=lambda trace: trace.calls[0], default=None)
    last = max(called, key=lambda trace: trace.calls[-1], default=None)
    holders: dict[nn.Parameter, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            holders.setdefault(parameter, []).append(name or "(model)")

    as_asked, weights_only = _describe(weights, activations), _describe(weights, None)
    kept: dict[nn.Module, str] = {}
    plans: dict[nn.Module, tuple[Spec, str]] = {}  # binarizer of the input, and what the report says
    unsigned: list[nn.Module] = []
    for module, (name, *others) in names.items():
        trace = traces.get(id(module))
        reason = _reason_to_keep(module, name, trace, holders)
        if reason is None and trace is not None:
            if keep_first and trace is first:
                reason = "first layer"
            elif keep_last and trace is last:
                reason = "last layer"
            elif keep_projections and trace.projection:
                reason = "1x1 projection shortcut"
            elif any(kept_by_user(each, module) for each in (name, *others)):
                reason = "named by keep_float"
            elif keep_depthwise and (taps := _depthwise_taps(module)):
                reason = f"depthwise convolution: {taps} weights for a channel, little to gain and much to lose"
            elif activations is not None and not trace.signed:
                unsigned.append(module)
                if unsigned_inputs == "keep_float" or (unsigned_inputs == "weights_only" and weights is None):
                    reason = _NEVER_NEGATIVE
        if reason is not None:
            kept[module] = reason
        elif module not in unsigned:
            plans[module] = activations, as_asked
        elif unsigned_inputs == "weights_only":
            plans[module] = None, f"{weights_only}; {_NEVER_NEGATIVE}, so activations stay float"
        elif unsigned_inputs == "batch_norm":
            plans[module] = activations, f"{as_asked}; after a new batch norm"
    if unsigned and unsigned_inputs == "error":
        raise ConversionError(
            f"the input of {_some([names[m][0] for m in unsigned])} is never negative (after a ReLU, say), so its sign "
            "would be constant +1: reorder the model so that a batch norm or an addition comes right before, or choose "
            "unsigned_inputs='batch_norm', 'weights_only' or 'keep_float'."
        )
    if not plans:
        raise ConversionError(f"nothing to binarise: {_explain({names[m][0]: why for m, why in kept.items()})}.")
    norms = {m: _norm(m, names[m][0]) for m in unsigned if m in plans and unsigned_inputs == "batch_norm"}

    report = ConversionReport(
        tuple(
            LayerReport(
                all_names[0],
                type(module).__name__,
                module in plans or isinstance(module, BINARY_LAYERS),
                plans[module][1] if module in plans else kept[module],
                _size(module),
                weights is not None if module in plans else getattr(module, "weight_binarizer", None) is not None,
            )
            for module, all_names in names.items()
        )
    )
    before = {module: _state_of(module) for module in plans}
    for module, (own_activations, _) in plans.items():
        _make_binary(module, weights, own_activations, options, pad_value)
    wrapped: dict[nn.Module, nn.Module] = {}
    for module in plans:
        outer = around(module)
        if module in norms:
            outer = nn.Sequential(OrderedDict(norm=norms[module], layer=outer))
        if outer is not module:
            outer.train(module.training)
            wrapped[module] = outer
            for name in names[module]:
                model.set_submodule(name, outer)
    try:
        _check_wrapped(model, wrapped, names, example_input)
    except ConversionError:
        for module in wrapped:
            for name in names[module]:
                model.set_submodule(name, module)
        for module, (cls, attributes) in before.items():
            module.__class__ = cls
            module.__dict__.clear()
            module.__dict__.update(attributes)
        raise
    return report


def _state_of(module: nn.Module) -> tuple[type[nn.Module], dict[str, Any]]:
    """Class and attributes, to put back."""
    changed = ("_modules", "_parameters")
    return type(module), {key: copy(value) if key in changed else value for key, value in vars(module).items()}


def _check_wrapped(
    model: nn.Module, wrapped: dict[nn.Module, nn.Module], names: dict[nn.Module, list[str]], example_input: Any
) -> None:
    """Raise unless the model still runs, and every call of a layer goes through what is around it."""
    if not wrapped:
        return
    try:
        traces = _run_probe(model, [*wrapped, *wrapped.values()], example_input)
    except ConversionError as error:
        raise ConversionError(f"with modules put around layers (norms, adaptive sets, branches), {error}") from error
    for module, outer in wrapped.items():
        if len(traces[id(module)].calls) != len(traces[id(outer)].calls):
            raise ConversionError(
                f"{names[module][0]} is called through another reference than its name, past the "
                f"{type(outer).__name__} put around it: let the model call it by its name, or name it in keep_float."
            )


def _check(
    model: nn.Module,
    weights: Spec,
    activations: Spec,
    unsigned_inputs: str,
    options: dict[str, Any],
    around: Callable[[nn.Module], nn.Module],
) -> None:
    """Raise what can be known without running the model."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"convert: model must be a torch.nn.Module, got {type(model).__name__}.")
    if unsigned_inputs not in _UNSIGNED:
        raise ConfigError(f"unknown unsigned_inputs {unsigned_inputs!r}; {nearest(unsigned_inputs, _UNSIGNED)}")
    if weights is None and activations is None:
        raise ConfigError("convert: weights and activations are both None, so there is nothing to binarise.")
    around(BinaryConv2d(1, 1, 1, device="meta", weights=weights, activations=activations, **options))
    if isinstance(model, _LAYERS):
        raise ConversionError(
            f"the model is a single {type(model).__name__}: put it in a Sequential, or use abste.nn directly."
        )
    for tensor in chain(model.parameters(), model.buffers()):
        if is_lazy(tensor):
            raise ConversionError("the model has lazy layers without a shape yet: run it once, then convert.")
        if tensor.is_meta:
            raise ConversionError(
                "the model is on the meta device, where no forward can show what its layers do: move it with "
                "to_empty() and initialise it, then convert."
            )


def _matrices(module: nn.Module) -> dict[str, Tensor]:
    """The parameters of its own that are weights rather than biases, norms or other vectors."""
    if isinstance(module, ParametrizationList | GradientBranch):
        return {}  # counted with the layer it belongs to, or not at all
    own = module._parameters.items()
    return {name: p for name, p in own if p is not None and sum(size > 1 for size in p.shape) >= 2}


def _depthwise_taps(module: nn.Module) -> int:
    """Weights of each filter of a depthwise convolution; 0 for another layer."""
    if isinstance(module, nn.Conv1d | nn.Conv2d) and 1 < module.groups == module.in_channels:
        return math.prod(module.kernel_size)
    return 0


def _size(module: nn.Module) -> int:
    if isinstance(module, _LAYERS):
        return int(module.weight.numel())
    return sum(p.numel() for p in _matrices(module).values())


def _filter(keep_float: Any, names: list[str]) -> Callable[[str, nn.Module], bool]:
    if callable(keep_float):
        return keep_float
    patterns = [keep_float] if isinstance(keep_float, str) else keep_float
    if isinstance(patterns, Iterable):
        patterns = list(patterns)
    if not isinstance(patterns, list) or not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(
            f"convert: keep_float must be names or a function (name, module) -> bool, got {keep_float!r}."
        )

    def named(name: str, pattern: str) -> bool:
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")

    for pattern in patterns:
        if not any(named(name, pattern) for name in names):
            raise ConfigError(f"convert: no layer is named {pattern!r} (keep_float); {nearest(pattern, names)}")
    return lambda name, _: any(named(name, pattern) for pattern in patterns)


def _run_probe(model: nn.Module, layers: list[nn.Module], example_input: Any) -> dict[int, LayerTrace]:
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    tensors = [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]
    if not tensors:
        raise ConfigError(
            f"convert: example_input must be a tensor or a tuple with one, got {type(example_input).__name__}."
        )
    try:
        return probe(model, layers, arguments)
    except Exception as error:  # the model's own code: anything may come out of it
        shapes = ", ".join(str(tuple(t.shape)) for t in tensors)
        raise ConversionError(f"the model fails on example_input of shape {shapes}: {first_line(error)}") from error


def _reason_to_keep(
    module: nn.Module, name: str, trace: LayerTrace | None, holders: dict[nn.Parameter, list[str]]
) -> str | None:
    if isinstance(module, BINARY_LAYERS):
        return "binary already"
    if trace is None:
        others = [key for key in _matrices(module) if key != "weight"]
        if others:
            return f"{', '.join(others)}: of no Conv or Linear layer, but of the {type(module).__name__} itself"
        return f"no binary counterpart of {type(module).__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is parametrised"
    shared = [other for other in holders[weight] if other != name]
    if shared:
        return f"its weight is shared with {shared[0]}"
    if trace.read_outside:
        return "its weight is read without calling it, so a swap would have no effect or a wrong one"
    if type(module) not in _COUNTERPARTS:
        base = next(cls for cls in type(module).__mro__ if cls in _COUNTERPARTS)
        return f"a subclass of {base.__name__}, which may have a forward of its own"
    if not trace.calls:
        return "not reached by the forward on example_input"
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    return None


def _make_binary(
    module: nn.Module, weights: Spec, activations: Spec, options: dict[str, Any], pad_value: float
) -> None:
    if isinstance(module, nn.Conv1d | nn.Conv2d) and module.padding_mode == "zeros" and activations is not None:
        options = {**options, "pad_value": pad_value}
    module.__class__ = _COUNTERPARTS[type(module)]
    assert isinstance(module, BINARY_LAYERS)
    module._binarize(weights, activations, **options)
    module.train(module.training)  # the new submodules


def _describe(weights: Spec, activations: Spec) -> str:
    names = []
    for spec, letter in ((weights, "W"), (activations, "A")):
        binarizer = build(spec, letter)
        names.append(f"{letter}32" if binarizer is None else f"{letter}1 {binarizer.title}")
    return ", ".join(names)


def _norm(module: nn.Module, name: str) -> nn.Module:
    """A batch norm for the input of a layer."""
    if not isinstance(module, nn.Conv1d | nn.Conv2d):
        raise ConversionError(
            f"unsigned_inputs='batch_norm' can not be applied to {name}, a {type(module).__name__} whose input may "
            "have more than two dimensions: choose 'weights_only' or 'keep_float'."
        )
    norm = nn.BatchNorm1d if isinstance(module, nn.Conv1d) else nn.BatchNorm2d
    return norm(module.in_channels, device=module.weight.device, dtype=module.weight.dtype)


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _explain(kept: dict[str, str]) -> str:
    if not kept:
        return "the model has no convolution or linear layer"
    shown = [f"{name}: {reason}" for name, reason in list(kept.items())[:3]]
    return f"every layer stays as it is ({'; '.join(shown)}{'; ...' if len(kept) > 3 else ''})"
