"""Where a model binarises, and how to see what its binarizers' backwards get and give, from outside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from abste.errors import ConfigError
from abste.estimators import Binarizer
from abste.nn import BinaryActivation
from abste.nn.layers import BINARY_LAYERS


class Place(NamedTuple):
    """A module that binarises.

    Attributes:
        name: in the model, without what wrappers add.
        layer: a binary layer, or a :class:`~abste.nn.BinaryActivation` on its own.
        weights: the binarizer of the layer's weights, if it has one.
        activation: the binarisation of the layer's input, if there is one; the module itself where it is on its own.
    """

    name: str
    layer: Any
    weights: Binarizer | None
    activation: BinaryActivation | None

    @property
    def alone(self) -> bool:
        """Whether it is a BinaryActivation on its own."""
        return self.layer is self.activation


def unwrapped(model: nn.Module) -> nn.Module:
    """The model itself, without torch.compile, DistributedDataParallel and Lightning Fabric around it."""
    while True:
        # By the names of their parts: importing torch's compiler takes a second, and Fabric need not be installed.
        inner = model._modules.get("_orig_mod") or model._modules.get("_original_module")
        if isinstance(model, DistributedDataParallel):
            inner = model.module
        if inner is None:
            return model
        model = inner


def places(model: nn.Module, owner: str) -> list[Place]:
    """Where a model binarises, in the order of its modules, each once.

    Raises:
        ConfigError: it is no module, or binarises nowhere. ``owner`` begins the message.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{owner}: model must be a torch.nn.Module, got {type(model).__name__}.")
    found: list[Place] = []
    within: set[nn.Module] = set()
    for path, module in unwrapped(model).named_modules():
        # A compiled part of a model has a wrapper of its own.
        name = ".".join(part for part in path.split(".") if part != "_orig_mod")
        if isinstance(module, BINARY_LAYERS):
            if module.weight_binarizer is not None or module.activation is not None:
                found.append(Place(name, module, module.weight_binarizer, module.activation))
            within |= {module.activation} if module.activation is not None else set()
        elif isinstance(module, BinaryActivation) and module not in within:
            found.append(Place(name, module, None, module))
    if not found:
        raise ConfigError(f"{owner}: the model has no binary layer; convert it first with abste.convert.")
    return found


Observer = Callable[[Tensor, Tensor, Tensor], None]
"""Is called with the gradient with respect to sign(x), with x, and with the gradient with respect to x."""


class _Watch:
    """Stands in for the method ``name`` of one binarizer, and shows what goes through it."""

    def __init__(self, binarizer: Binarizer, name: str, observe: Observer, busy: list[Binarizer]) -> None:
        self.binarizer, self.name, self.observe, self.busy = binarizer, name, observe, busy
        self.original = getattr(binarizer, name)

    def __call__(self, grad: Tensor, x: Tensor) -> Any:
        if torch.compiler.is_compiling() or self.busy:
            return self.original(grad, x)
        self.busy.append(self.binarizer)  # one method may call the other, and so may the observer
        try:
            result = self.original(grad, x)
            with torch.no_grad():
                self.observe(grad, x, result[0] if self.name == "gradients" else result)
        finally:
            self.busy.pop()
        return result

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy of the model, or a saved one, has its own method there and is not watched.
        return getattr, (self.binarizer, self.name)


class Watch:
    """Shows every backward of some binarizers to their observers, between :meth:`start` and :meth:`stop`.

    The gradients themselves are not touched. Graphs that torch.compile has made do not come by here.

    Args:
        observers: each binarizer with its observer.
    """

    def __init__(self, observers: Iterable[tuple[Binarizer, Observer]]) -> None:
        self._watches: list[_Watch] = []
        for binarizer, observe in observers:
            busy: list[Binarizer] = []
            self._watches += [_Watch(binarizer, name, observe, busy) for name in ("backward", "gradients")]

    def start(self) -> None:
        """Begin to watch."""
        for watch in self._watches:
            watch.binarizer.__dict__[watch.name] = watch

    def stop(self) -> None:
        """Watch no more; without effect where nothing is watched."""
        for watch in self._watches:
            watch.binarizer.__dict__.pop(watch.name, None)

    def __enter__(self) -> None:
        self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()


def binarized(place: Place) -> tuple[Tensor, Tensor]:
    """Of a layer with binary weights: what its binarizer sees now, and the ±1 of it.

    They are those of an evaluation, so a random binarizer draws nothing.
    """
    seen: list[Any] = []
    assert place.weights is not None
    hook = place.weights.register_forward_hook(lambda _, inputs, output: seen.extend([inputs[0], output]))
    try:
        with evaluating(place.weights):
            place.layer.binary_weight()
    finally:
        hook.remove()
    return seen[0], seen[1]


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """The module in evaluation mode, afterwards as it was."""
    modes = [(each, each.training) for each in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for each, training in modes:
            each.training = training


def check_count(owner: str, name: str, value: object, least: int) -> int:
    """``value`` as an integer.

    Raises:
        ConfigError: it is none, or less than ``least``.
    """
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"{owner}: {name} must be an integer of at least {least}, got {value!r}.")
    return int(value)
