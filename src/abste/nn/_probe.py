"""A probe forward: watch what a model does with its layers, without leaving a trace in it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

_ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.add_.Tensor)


@dataclass
class LayerTrace:
    """What one layer did in the probe."""

    module: nn.Module
    calls: list[int] = field(default_factory=list)  # positions in the order of execution
    signed: bool = False  # an input of it had a negative element
    read_outside: bool = False  # its weight was read while its forward was not running
    projection: bool = False  # a 1x1 convolution whose output is added to a longer path from the same input
    running: int = 0

    @property
    def pointwise(self) -> bool:
        """Whether it is a 1x1 convolution."""
        kernel = getattr(self.module, "kernel_size", None)
        return isinstance(kernel, tuple) and set(kernel) == {1}


@dataclass(frozen=True)
class _Origin:
    """Where data comes from, as sets of steps: bit i of a number stands for step i.

    A step is the call of a layer or an input of the model.
    """

    upstream: int = 0  # every step that the data depends on
    latest: int = 0  # those of them that it reaches through no further layer

    def __or__(self, other: _Origin) -> _Origin:
        return _Origin(self.upstream | other.upstream, self.latest | other.latest)


class _DataFlow(TorchDispatchMode):
    """Follows data from layer to layer, finds projection shortcuts at the additions, and who reads a weight.

    Data is known by its storage, so that views and in-place operations need no care. The references are weak: they
    free the memory, and yet no later storage can be taken for an earlier one.
    """

    def __init__(self, traces: list[LayerTrace]) -> None:
        super().__init__()
        self.origins: dict[StorageWeakRef, _Origin] = {}
        self.readers: dict[StorageWeakRef, list[LayerTrace]] = {}
        self.steps: list[LayerTrace | None] = []
        self.sources: list[int] = []  # upstream of each step
        self.running = 0
        for trace in traces:
            for storage in _storages(trace.module._parameters.get("weight")):
                self.readers.setdefault(storage, []).append(trace)

    def step(self, trace: LayerTrace | None, value: Any, source: int = 0) -> None:
        """Count a step, from which ``value`` comes."""
        bit = 1 << len(self.steps)
        self.steps.append(trace)
        self.sources.append(source)
        self.mark(value, _Origin(source | bit, bit))

    def origin(self, value: Any) -> _Origin:
        found = _Origin()
        for storage in _storages(value):
            found |= self.origins.get(storage, _Origin())
        return found

    def mark(self, value: Any, origin: _Origin) -> None:
        for storage in _storages(value):
            self.origins[storage] = origin

    def call(self, trace: LayerTrace, arguments: Any, forward: Callable[[], Any]) -> Any:
        """Run a layer's forward as one step."""
        source = self.origin(arguments).upstream
        trace.calls.append(len(self.steps))
        trace.running += 1
        self.running += 1
        try:
            output = forward()
        finally:
            trace.running -= 1
            self.running -= 1
        self.step(trace, output, source)
        return output

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            owners = self.readers.get(storage, [])
            if not any(trace.running for trace in owners):
                for trace in owners:
                    trace.read_outside = True
        source = self.origin((args, kwargs))
        if func in _ADDITIONS and not self.running:
            one, other = self.origin(args[0]), self.origin(args[1])
            self._add(one, other)
            self._add(other, one)
        output = func(*args, **(kwargs or {}))
        if not self.running:
            self.mark(output, source)
        return output

    def _add(self, side: _Origin, other: _Origin) -> None:
        for number in _bits(side.latest):
            trace, source = self.steps[number], self.sources[number]
            if trace is None or not trace.pointwise or source & ~other.upstream or other.upstream >> number & 1:
                continue
            longer = [self.steps[i] for i in _bits(other.upstream & ~source)]
            if len(longer) > 1 or any(step is not None and not step.pointwise for step in longer):
                trace.projection = True


def _bits(number: int) -> list[int]:
    return [i for i in range(number.bit_length()) if number >> i & 1]


def _storages(value: Any) -> list[StorageWeakRef]:
    found = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            try:
                found.append(StorageWeakRef(leaf.untyped_storage()))
            except NotImplementedError:  # a sparse tensor has no storage of its own
                continue
    return found


def _is_fresh(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.num_batches_tracked is not None and not module.num_batches_tracked


def _sampling(cls: type[nn.Module]) -> type[nn.Module]:
    """A batch norm that has not been trained, normalising with the batch: its initial statistics centre nothing."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if x.dim() < 2 or x.numel() <= x.shape[1]:  # one value per channel has no variance
            return cls.forward(self, x)
        return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    return type(cls.__name__, (cls,), {"forward": forward})


def _watching(cls: type[nn.Module], trace: LayerTrace, flow: _DataFlow) -> type[nn.Module]:
    """A subclass that reports calls. Not a hook: torch's fused paths, which read weights, step aside for hooks."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        x = next((leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        if x is not None and not x.is_complex():
            trace.signed = trace.signed or bool((x.detach() < 0).any())
        return flow.call(trace, (args, kwargs), lambda: cls.forward(self, *args, **kwargs))

    return type(cls.__name__, (cls,), {"forward": forward})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and afterwards the modes, buffers and random states from before."""
    modes = {module: module.training for module in model.modules()}
    registered = {module: dict(module._buffers) for module in model.modules() if module._buffers}
    contents = [(b, b._version, b.clone()) for b in model.buffers() if not b.is_inference()]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        model.eval()
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode
            for module, buffers in registered.items():
                module._buffers.update(buffers)
            with torch.no_grad():
                for buffer, version, before in contents:
                    if buffer._version != version:
                        buffer.copy_(before)


def _eagerly() -> AbstractContextManager[Any]:
    """Compiled submodules run as they are written. Without them, spare the user the slow import of the compiler."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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


def first_line(error: Exception) -> str:
    """What an error of the model's own code says, in one line."""
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def probe(model: nn.Module, layers: list[nn.Module], example: tuple[Any, ...]) -> dict[int, LayerTrace]:
    """Run ``model`` on ``example`` and report, by id, what each of ``layers`` did.

    It runs twice, without and with gradients, since some modules take other paths then (torch's transformer layers
    read the weights of their linear layers in inference). Parameters, buffers, modes and random states stay as they
    were.
    """
    traces = {id(layer): LayerTrace(layer) for layer in layers}
    norms = [module for module in model.modules() if _is_fresh(module)]
    classes = {module: type(module) for module in (*layers, *norms)}
    inputs = probe_input(example)
    with untouched(model), _eagerly():
        for gradients in (False, True):
            flow = _DataFlow(list(traces.values()))
            # A first operation in place is not felt outside; and a tensor that is given twice stays one.
            copies = {leaf: leaf.clone() for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)}
            given = tree_map_only(Tensor, copies.__getitem__, inputs)
            for leaf in tree_leaves(given):
                flow.step(None, leaf)
            for trace in traces.values():
                trace.calls.clear()
                trace.module.__class__ = _watching(classes[trace.module], trace, flow)
            for norm in norms:
                norm.__class__ = _sampling(classes[norm])
            try:
                with torch.set_grad_enabled(gradients), flow:
                    model(*given)
            finally:
                for module, cls in classes.items():
                    module.__class__ = cls
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _has_fast_path(module):
            for linear in (module.linear1, module.linear2):
                if id(linear) in traces:
                    traces[id(linear)].read_outside = True
    return traces


def _has_fast_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether its forward can read the weights of its linear layers, some day, if not for this example.

    What may change from call to call is left out: modes, hooks, autocast, and the number of dimensions.
    """
    attention = layer.self_attn
    return (
        type(layer).forward is nn.TransformerEncoderLayer.forward
        and attention.batch_first
        and attention.in_proj_bias is not None
        and attention._qkv_same_embed_dim
        and bool(layer.activation_relu_or_gelu)
        and layer.norm1.eps == layer.norm2.eps
        and attention.num_heads % 2 == 0
    )
