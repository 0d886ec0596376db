"""A probe forward: watch what a model does with its layers, without leaving a trace in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

_ADDITIONS = {torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor}


@dataclass
class LayerTrace:
    """What one layer did in the probe."""

    module: nn.Module
    calls: list[int] = field(default_factory=list)  # positions in the order of execution
    least_input: float = float("inf")
    read_outside: bool = False  # its weight was read while its forward was not running
    projection: bool = False  # a 1x1 convolution whose output is added to a longer path from the same input
    inside: int = 0


@dataclass
class _Origin:
    """Where a tensor comes from: all layer calls upstream, and those that reach it through no further layer."""

    upstream: frozenset[int]
    latest: frozenset[int]


_NOWHERE = _Origin(frozenset(), frozenset())


class _DataFlow(TorchDispatchMode):
    """Follows tensors from layer to layer and finds projection shortcuts at the additions."""

    def __init__(self) -> None:
        super().__init__()
        self.origins: dict[int, _Origin] = {}
        self.alive: list[Tensor] = []  # an id is only a name while its tensor lives
        self.callers: list[LayerTrace] = []
        self.inputs: list[frozenset[int]] = []
        self.muted = 0

    def origin(self, value: Any) -> _Origin:
        found = [self.origins.get(id(t), _NOWHERE) for t in tree_flatten(value)[0] if isinstance(t, Tensor)]
        return _Origin(
            frozenset().union(*(o.upstream for o in found)), frozenset().union(*(o.latest for o in found))
        )

    def mark(self, value: Any, origin: _Origin) -> None:
        for t in tree_flatten(value)[0]:
            if isinstance(t, Tensor):
                self.origins[id(t)] = origin
                self.alive.append(t)

    def call(self, trace: LayerTrace, arguments: Any, run: Callable[[], Any]) -> Any:
        """Run a layer's forward as one step."""
        source = self.origin(arguments)
        number = len(self.callers)
        trace.calls.append(number)
        self.callers.append(trace)
        self.inputs.append(source.upstream)
        self.muted += 1
        try:
            output = run()
        finally:
            self.muted -= 1
        self.mark(output, _Origin(source.upstream | {number}, frozenset({number})))
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if self.muted:
            return output
        if func in _ADDITIONS and isinstance(args[1], Tensor):
            first, second = self.origin(args[0]), self.origin(args[1])
            self._addition(first, second)
            self._addition(second, first)
        self.mark(output, self.origin((args, kwargs)))
        return output

    def _addition(self, side: _Origin, other: _Origin) -> None:
        for number in side.latest:
            trace = self.callers[number]
            kernel = getattr(trace.module, "kernel_size", None)
            if not isinstance(kernel, tuple) or set(kernel) != {1}:
                continue
            longer = other.upstream - self.inputs[number] - {number}
            if self.inputs[number] <= other.upstream and longer and number not in other.upstream:
                trace.projection = True


def _is_fresh(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.num_batches_tracked is not None and not module.num_batches_tracked


def _sampling(cls: type[nn.Module]) -> type[nn.Module]:
    """A batch norm that has not been trained, normalising with the batch: its initial statistics centre nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.numel() <= x.shape[1]:  # one value per channel has no variance
            return cls.forward(self, x)  # type: ignore[no-any-return]
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    return type(cls.__name__, (cls,), {"forward": forward})


def _watching(cls: type[nn.Module], traces: dict[int, LayerTrace], flow: _DataFlow) -> type[nn.Module]:
    """A subclass that reports calls and reads of the weight. No hooks: torch's fused paths step aside for those."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        trace = traces[id(self)]
        first = next((a for a in args if isinstance(a, Tensor)), None)
        if first is not None and first.is_floating_point() and first.numel():
            trace.least_input = min(trace.least_input, float(first.detach().min()))
        trace.inside += 1
        try:
            return flow.call(trace, (args, kwargs), lambda: cls.forward(self, *args, **kwargs))
        finally:
            trace.inside -= 1

    def __getattr__(self: nn.Module, name: str) -> Any:  # noqa: N807
        if name == "weight" and not traces[id(self)].inside:
            traces[id(self)].read_outside = True
        return cls.__getattr__(self, name)

    return type(cls.__name__, (cls,), {"forward": forward, "__getattr__": __getattr__})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the modes and random states from before."""
    modes = {module: module.training for module in model.modules()}
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


def probe_input(example: Any) -> Any:
    """``example`` with standard normal noise in place of floating-point tensors that are constant, as zeros are.

    Those give only a shape; what a network does with them says nothing about the signs inside.
    """

    def informative(t: Tensor) -> Tensor:
        if not t.is_floating_point() or t.numel() == 0 or bool((t != t.flatten()[0]).any()):
            return t
        generator = torch.Generator().manual_seed(0)
        return torch.randn(t.shape, generator=generator).to(t)

    return tree_map_only(Tensor, informative, example)


def probe(model: nn.Module, layers: list[nn.Module], example: tuple[Any, ...]) -> dict[int, LayerTrace]:
    """Run ``model`` on ``example`` and report, by id, what each of ``layers`` did.

    It runs twice, without and with gradients, since some modules take other paths then (torch's transformer layers
    read the weights of their linear layers in inference). Parameters, buffers, modes and random states stay as they
    were.
    """
    traces = {id(layer): LayerTrace(layer) for layer in layers}
    norms = [m for m in model.modules() if _is_fresh(m)]
    classes = {module: type(module) for module in (*layers, *norms)}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    inputs = probe_input(example)
    try:
        with untouched(model):
            for gradients in (False, True):
                flow = _DataFlow()
                for trace in traces.values():
                    trace.calls.clear()
                for layer in layers:
                    layer.__class__ = _watching(classes[layer], traces, flow)
                for norm in norms:
                    norm.__class__ = _sampling(classes[norm])
                try:
                    with torch.set_grad_enabled(gradients), flow:
                        model(*inputs)
                finally:
                    for module, cls in classes.items():
                        module.__class__ = cls
    finally:
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)
    return traces
