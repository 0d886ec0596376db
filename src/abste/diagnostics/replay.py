"""Compiled parts of a model: a step of theirs once more, eagerly, without a trace.

Nothing can be watched inside a graph that torch.compile has made, and anything that changes it costs a compilation. So
the inputs of the compiled part and the gradient that comes back to its outputs are noted; with them its forward and
backward can be repeated, whatever the loss was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from abste.diagnostics.watch import unwrapped


def compiled_parts(model: nn.Module) -> list[nn.Module]:
    """The outermost modules of a model that are compiled, by ``torch.compile(module)`` or ``module.compile()``."""
    found: dict[nn.Module, None] = {}

    def search(module: nn.Module) -> None:
        if "_orig_mod" in module._modules or module._compiled_call_impl is not None:
            found[module] = None
        else:
            for child in module.children():
                search(child)

    search(model)
    return list(found)


class _Call:
    """One call of a compiled part: what it takes to repeat it."""

    def __init__(self, module: nn.Module, device: torch.device, args: Any, kwargs: Any) -> None:
        def detached(x: Tensor) -> Tensor:
            return x.detach().requires_grad_(x.requires_grad)

        self.inputs = tree_map_only(Tensor, detached, (args, kwargs))
        # A forward in training moves statistics; the repetition has to start from the same ones.
        self.buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
        enabled = torch.is_autocast_enabled(device.type)
        self.autocast = (device.type, torch.get_autocast_dtype(device.type), enabled)
        self.gradients: dict[int, Tensor] = {}
        self.mark: object = None

    def note(self, outputs: Any) -> None:
        """Take the gradients of the outputs as they come."""
        for index, output in enumerate(tree_leaves(outputs)):
            if isinstance(output, Tensor) and output.requires_grad:
                output.register_hook(lambda grad, index=index: self._add(index, grad))

    def _add(self, index: int, grad: Tensor) -> None:
        self.gradients[index] = self.gradients[index] + grad if index in self.gradients else grad.detach()


class Replay:
    """Notes the calls of one compiled part between :meth:`start` and :meth:`stop`, and repeats them.

    Args:
        part: from :func:`compiled_parts`.
        mark: calls are repeated only while this gives what it gave when they were made.
    """

    def __init__(self, part: nn.Module, mark: Callable[[], object] = lambda: None) -> None:
        self.part = part
        self.mark = mark
        self.module = unwrapped(part)
        self.calls: list[_Call] = []
        self.running: list[_Call | None] = []
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        """Begin to note calls."""
        compiled = self.part._compiled_call_impl
        if compiled is None:
            before = self.part.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.part.register_forward_hook(self._after)
            self._undo = [before.remove, after.remove]
            return

        # Hooks of a module that is compiled in place would be compiled with it.
        def call(*args: Any, **kwargs: Any) -> Any:
            self._before(self.part, args, kwargs)
            outputs = compiled(*args, **kwargs)
            self._after(self.part, args, outputs)
            return outputs

        self.part._compiled_call_impl = call
        self._undo = [lambda: setattr(self.part, "_compiled_call_impl", compiled)]

    def _before(self, _: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.is_grad_enabled():
            self.running.append(None)
            return
        tensors = [x for x in [*self.module.parameters(), *tree_leaves((args, kwargs))] if isinstance(x, Tensor)]
        self.running.append(_Call(self.module, tensors[0].device, args, kwargs))

    def _after(self, _: nn.Module, __: Any, outputs: Any) -> None:
        call = self.running.pop()
        if call is not None:
            call.note(outputs)
            call.mark = self.mark()
            self.calls.append(call)

    def stop(self) -> None:
        """Note no more calls."""
        for undo in self._undo:
            undo()
        self._undo = []
        self.running = []

    def run(self) -> None:
        """Repeat forward and backward of the calls that a backward came back to, and forget all calls.

        Buffers, ``.grad`` and random numbers are as before; what watches the binarizers sees the backward.
        """
        calls, self.calls = self.calls, []
        for call in calls:
            if call.gradients and call.mark == self.mark():
                with _untouched(self.module, call.buffers):
                    self._repeat(call)

    def _repeat(self, call: _Call) -> None:
        args, kwargs = call.inputs
        device, dtype, enabled = call.autocast
        with torch.enable_grad(), torch.compiler.set_stance("force_eager"):
            with torch.autocast(device, dtype=dtype, enabled=enabled):
                outputs = tree_leaves(self.module(*args, **kwargs))
            pairs = [(outputs[index], grad) for index, grad in call.gradients.items()]
            leaves = [x for x in [*self.module.parameters(), *tree_leaves(call.inputs)] if isinstance(x, Tensor)]
            wanted = [x for x in leaves if x.requires_grad]
            # Not backward(): that would add to .grad, and set off the communication of distributed training.
            torch.autograd.grad([x for x, _ in pairs], wanted, [grad for _, grad in pairs], allow_unused=True)


@contextmanager
def _untouched(module: nn.Module, buffers: list[tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Buffers as they are given; afterwards as they were, random numbers too."""
    now = [(buffer, buffer.clone()) for buffer in module.buffers()]
    cuda = sorted({p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=cuda):
            _restore(buffers)
            yield
    finally:
        _restore(now)


@torch.no_grad()
def _restore(buffers: list[tuple[Tensor, Tensor]]) -> None:
    for buffer, values in buffers:
        buffer.copy_(values)
