"""The base of every estimator: sign, binarizers, annealing state and the registry of names."""

from __future__ import annotations

import copy
import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from abste.errors import ConfigError, nearest

Role = Literal["weights", "activations"]
SHAPES = ("cosine", "linear")


def sign(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """+1 where ``x >= 0``, else -1: so 0 and -0.0 give +1 and NaN gives -1.

    Args:
        x: any shape, floating point.
        dtype: of the result; default that of ``x``.

    Returns:
        A new tensor of the shape of ``x`` that holds nothing but ±1.
    """
    # A comparison with a floating-point result is vectorised on CPU; torch.where between scalars is not, nor is a
    # comparison that converts as well.
    x = x.detach()
    y = torch.ge(x, 0, out=torch.empty_like(x)).mul_(2).sub_(1)
    return y if dtype is None else y.to(dtype)


def clip_gradient(grad: Tensor, x: Tensor, t: float) -> Tensor:
    """``grad`` where |x| <= t and zero elsewhere: a new tensor, or ``grad`` itself if t is infinite.

    Where x is NaN it is either, depending on the place in memory: to ask would take another pass over x.

    Args:
        grad: gradient, of the shape and dtype of ``x``.
        x: any shape, floating point.
        t: clip, positive. It counts as rounded to float32 (float64 if ``x`` is).
    """
    if t >= torch.finfo(torch.float32).max:
        return grad
    # One fused pass, but it excludes its limits: they are the next number above t, in the precision it compares in
    # (float32 for half precision too).
    digits = 53 if x.dtype == torch.float64 else 24
    mantissa, exponent = math.frexp(t)
    limit = math.ldexp(round(mantissa * 2**digits) + 1, exponent - digits)
    if x.device.type == "cpu" and torch.compiler.is_compiling():
        # What tells the outside must depend on grad. Otherwise torch.compile finds it in the forward, where it takes
        # fewer bytes than x, and keeps it as a mask, which its code for CPUs handles byte by byte: STE's step would
        # take twice as long. No NaN is above the limit, so what is infinite in grad is passed on, outside as well.
        wide = torch.promote_types(x.dtype, torch.float32)
        outside = x.to(wide).abs() + 0.0 * grad.to(wide) >= limit
        return grad.masked_fill(outside, 0.0)
    return torch.ops.aten.hardtanh_backward(grad, x, -limit, limit)


def tanh_backward(grad: Tensor, x: Tensor, s: Tensor | float, factor: Tensor | float) -> Tensor:
    """``grad`` * factor * (1 - tanh(s x)^2), a new tensor.

    Args:
        grad: gradient, of the shape and dtype of ``x``.
        x: any shape, floating point.
        s, factor: numbers, or scalar tensors.
    """
    if x.dtype == torch.float16:  # whose range is too narrow for what comes between
        return tanh_backward(grad.float(), x.float(), s, factor).to(x.dtype)
    # 1 - tanh(z)^2 = 4 p (1 - p) with p = sigmoid(-2|z|): much faster than tanh on CPU, and it keeps its relative
    # precision in the tails, in bfloat16 too.
    p = x.abs().mul_(-2.0 * s).sigmoid_()
    return torch.ops.aten.sigmoid_backward.grad_input(grad, p, grad_input=p).mul_(4.0 * factor)


def filters(x: Tensor) -> Tensor:
    """x as one row per filter, which the first dimension counts.

    It is a single row if x has fewer than two dimensions, and if each filter would hold a single number.
    """
    rows = x.flatten(1) if x.dim() > 1 else x.reshape(1, -1)
    return rows.reshape(1, -1) if rows.shape[1] == 1 else rows


def number(owner: str, name: str, value: object) -> float:
    """``value`` as a float.

    Raises:
        ConfigError: it is no number, or NaN.
    """
    if not isinstance(value, bool) and isinstance(value, Real):
        try:
            result = float(value)
        except OverflowError:  # an integer of hundreds of digits
            result = math.nan
        if not math.isnan(result):
            return result
    raise ConfigError(f"{owner}: {name} must be a number, got {value!r}.")


def fraction(owner: str, name: str, value: object) -> float:
    """``value`` as a float in [0, 1].

    Raises:
        ConfigError: it is no number, or lies outside.
    """
    result = number(owner, name, value)
    if not 0 <= result <= 1:
        raise ConfigError(f"{owner}: {name} must lie in [0, 1], got {value!r}.")
    return result


class _Binarize(torch.autograd.Function):
    """Forward and backward are the binarizer's own. The backward sees x and nothing else."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, binarizer: Binarizer, *taps: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.binarizer = binarizer
        return binarizer.binarize(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        if not any(ctx.needs_input_grad[2:]):
            return ctx.binarizer.backward(grad, x), None, *(None for _ in ctx.needs_input_grad[2:])
        grad_x, *grads = ctx.binarizer.gradients(grad, x)
        return grad_x, None, *grads


class Binarizer(nn.Module, ABC):
    """Maps a tensor to ±1 and has its own backward.

    A subclass implements :meth:`backward` and declares, as class attributes, what holds for it (an object may declare
    otherwise, where that depends on its arguments). The property tests read these declarations. A numeric argument is
    declared in ``defaults``, passed on by the constructor, and becomes an attribute.

    Attributes:
        name: the name in the registry.
        odd: the slope is an even function of x.
        monotone: the slope is never negative.
        has_surrogate: there is an F whose derivative is the slope (see :class:`Estimator`).
        linear: the backward is linear in the gradient: it multiplies by a slope. Else its slope at x is that for a
            positive gradient.
        plain_bits: in evaluation the binary value is exactly sign(x), so activations lower to bits.
        stochastic: in training the binary value is drawn anew at every call.
        roles: what it may binarise.
        defaults: for each numeric argument its default in each of its roles. None as an argument stands for it.
        t: the clip; the slope is zero where |x| > t. Infinite where there is none.

    Raises:
        ConfigError: an argument that is unknown, no number, or out of range.
    """

    name: ClassVar[str]
    odd: bool = True
    monotone: bool = True
    has_surrogate: ClassVar[bool] = False
    linear: ClassVar[bool] = True
    plain_bits: bool = True
    stochastic: bool = False
    roles: tuple[Role, ...] = ("weights", "activations")
    defaults: ClassVar[Mapping[str, Mapping[Role, float]]] = {}

    t: float = math.inf

    def __init__(self, **given: float | None) -> None:
        super().__init__()
        owner = type(self).__name__
        for name, value in given.items():
            if name not in self.defaults:
                raise ConfigError(_no_argument(owner, name, self.defaults))
            default = self.defaults[name][self.roles[0]]
            setattr(self, name, default if value is None else number(owner, name, value))
        self._by_role = frozenset(name for name, value in given.items() if value is None)
        self.check()

    def set_role(self, role: Role) -> None:
        """Give every argument that was left at None its default for ``role``. A layer calls this on its copy.

        Raises:
            ConfigError: ``role`` is none of ``roles``, or an argument is out of range there.
        """
        if role not in self.roles:
            raise ConfigError(f"{type(self).__name__} is for {self.roles[0]}, and cannot binarise {role}.")
        for name in self._by_role:
            setattr(self, name, self.defaults[name][role])
        self.check()

    def check(self) -> None:
        """Raise :class:`~abste.errors.ConfigError` where an argument is out of range."""
        if not self.t > 0:
            raise ConfigError(f"{type(self).__name__}: t must be positive, got {self.t}.")

    def forward(self, x: Tensor) -> Tensor:
        """:meth:`binarize`: same shape and dtype as x, values ±1. The gradient is :meth:`backward`'s."""
        if not x.is_floating_point():
            raise ConfigError(f"{type(self).__name__} needs a floating-point input, got {x.dtype}.")
        return cast(Tensor, _Binarize.apply(x, self, *taps_for(self, x)))

    @property
    def title(self) -> str:
        """What reports call it: its name, and that of an estimator that it is made from."""
        return getattr(self, "name", type(self).__name__)  # one that is not registered has no name

    @property
    def is_sign(self) -> bool:
        """Whether the binary value is sign(x) in training, too."""
        return self.plain_bits and not self.stochastic

    def binarize(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """±1, a new tensor of the shape of x: sign(x), unless a subclass has another forward.

        Where x is normalised for the slope, a forward of another kind gets it normalised as well.

        Args:
            x: any shape, floating point.
            dtype: of the result; default that of ``x``.
        """
        return sign(x, dtype)

    @abstractmethod
    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """The gradient with respect to x, given that with respect to the binary value; of the shape and dtype of x.

        Neither argument may be changed in place; the result may be ``grad`` itself.
        """

    def taps(self) -> tuple[Tensor, ...]:
        """Leaf tensors that get a gradient of their own: what is learned, or where the backward leaves measurements.

        The binary value does not depend on them. Empty for most binarizers.
        """
        return ()

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        """:meth:`backward`, then a gradient for each of :meth:`taps`, linear in ``grad`` for what is learned."""
        return (self.backward(grad, x),)

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name):g}" for name in self.defaults)


def taps_for(binarizer: Binarizer, x: Tensor) -> tuple[Tensor, ...]:
    """:meth:`Binarizer.taps` for a forward with x.

    Measurements, which are no parameters, are left out where x needs no gradient: a frozen network builds no graph.
    """
    taps = binarizer.taps()
    return taps if x.requires_grad else tuple(t if isinstance(t, nn.Parameter) else t.detach() for t in taps)


class Estimator(Binarizer):
    """A binarizer whose backward multiplies by the slope F' of a surrogate F of sign.

    dL/dx = dL/dsign(x) * F'(x). A subclass implements :meth:`backward` (for speed, as one fused expression) and
    :meth:`surrogate`; :meth:`slope` follows from the first, and the tests hold the two against each other.
    """

    has_surrogate = True

    @abstractmethod
    def surrogate(self, x: Tensor) -> Tensor:
        """F(x), written with differentiable torch operations; constant beyond ±t. Same shape and dtype as x.

        What F takes from x as a whole, such as a mean, counts as a constant.
        """

    def slope(self, x: Tensor) -> Tensor:
        """F'(x): same shape and dtype as x, zero where |x| > t."""
        return self.backward(torch.ones_like(x), x)


def fraction_done(annealing: Tensor) -> Tensor:
    """The fraction of training done, float32 (...) in [0, 1], for states of :class:`Annealed`, (..., 2)."""
    step, total = annealing.float().unbind(-1)
    return (step / total).clamp(0.0, 1.0)


def curve(p: Tensor, shape: str) -> Tensor:
    """b(p) of :meth:`Annealed.between`, for fractions of training of any shape."""
    return 1.0 - torch.cos(p * (torch.pi / 2)) if shape == "cosine" else p


class Annealed(nn.Module):
    """State of something that changes over training, as the fraction of training done.

    The state is two integers (step, total steps) in a buffer: it is saved with the module, copied whole by DDP and by
    weight averaging, left alone by ``.half()`` and ``.bfloat16()``, and changed in place without a device
    synchronisation or a recompilation. :class:`~abste.estimators.EstimatorSchedule` sets it.

    ``torch.optim.swa_utils.AveragedModel`` copies buffers by default. With ``use_buffers=True`` it averages them
    instead, this one as any other integer (such as the batch count of batch norm): sign(x) does not depend on it, and
    a schedule on the averaged model sets it anew.
    """

    annealing: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("annealing", torch.tensor([0, 1]))

    def reset_parameters(self) -> None:
        """Back to the start of training; what a module on the meta device needs once it has memory."""
        self.annealing.copy_(torch.tensor([0, 1]))

    def progress(self) -> Tensor:
        """The fraction of training done, float32 scalar in [0, 1], on the module's device."""
        return fraction_done(self.annealing)

    def between(self, start: float, end: float, shape: str = "cosine") -> Tensor:
        """start + (end - start) b(p), a float32 scalar; b(p) is 1 - cos(pi p / 2), slow at first, or p (``"linear"``).

        The first is how ReSTE's power moves.
        """
        return start + (end - start) * curve(self.progress(), shape)

    def between_logs(self, start: float, end: float) -> Tensor:
        """From start to end, both positive, evenly in the logarithm: a float32 scalar."""
        return (math.log(start) + (math.log(end) - math.log(start)) * self.progress()).exp()

    @torch.no_grad()
    def set_progress(self, step: int, total_steps: int) -> None:
        """Say how far training is. Not past its end: a later step counts as the last."""
        self.annealing[0].fill_(min(step, total_steps))
        self.annealing[1].fill_(total_steps)


Spec = str | Mapping[str, Any] | Binarizer | None
"""What a slot of a layer accepts: a name, a table with a name, an object, or None for full precision."""

B = TypeVar("B", bound=type[Binarizer])
_REGISTRY: dict[str, type[Binarizer]] = {}


def register(name: str) -> Callable[[B], B]:
    """Class decorator: make a binarizer known by ``name`` wherever one is accepted."""

    def add(cls: B) -> B:
        if name in _REGISTRY:
            raise ConfigError(f"an estimator named {name!r} is registered already.")
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


def available() -> list[str]:
    """The names of all registered estimators, sorted."""
    return sorted(_REGISTRY)


def get(name: str) -> type[Binarizer]:
    """The class registered under ``name``.

    Raises:
        ConfigError: no such name; the message gives the nearest ones.
    """
    if not isinstance(name, str) or name not in _REGISTRY:
        raise ConfigError(f"unknown estimator {name!r}; {nearest(name, _REGISTRY)}")
    return _REGISTRY[name]


def resolve(spec: Spec, role: Role) -> Binarizer | None:
    """The binarizer that ``spec`` stands for, as a new object for one layer.

    Args:
        spec: None (full precision), a name, a table with a ``name`` and the arguments of its class, or a binarizer,
            which is copied.
        role: whether it is for ``"weights"`` or ``"activations"``, which decides the defaults.

    Raises:
        ConfigError: an unknown name or argument, or something else altogether.
    """
    binarizer = build(spec, role)
    if binarizer is not None:
        binarizer.set_role(role)
    return binarizer


def build(spec: Spec, what: str) -> Binarizer | None:
    """What ``spec`` stands for, as a new object that has no role yet.

    Args:
        spec: as in :func:`resolve`.
        what: names the argument in errors.
    """
    if spec is None:
        return None
    if isinstance(spec, Binarizer):
        binarizer = copy.deepcopy(spec)
    elif isinstance(spec, str):
        binarizer = get(spec)()
    elif isinstance(spec, Mapping):
        arguments = dict(spec)
        if "name" not in arguments:
            raise ConfigError(f"an estimator's table needs a name, got {arguments}.")
        cls = get(arguments.pop("name"))
        known = [name for name, p in inspect.signature(cls).parameters.items() if p.kind is not p.VAR_KEYWORD]
        for name in arguments:
            if name not in known:
                raise ConfigError(_no_argument(f"estimator {cls.name!r}", name, known))
        binarizer = cls(**arguments)
    else:
        raise ConfigError(f"{what} must be a name, a table, a Binarizer object or None, got {_kind(spec)}.")
    return binarizer


def _no_argument(owner: str, name: object, known: Mapping[str, Any] | list[str]) -> str:
    return f"{owner} takes no argument {name!r}" + (f"; {nearest(name, known)}" if known else ", nor any other.")


def _kind(value: object) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else type(value).__name__
