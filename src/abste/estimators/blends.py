"""How AB-STE's blend weight a adapts: each way is one small object."""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from abste.errors import ConfigError, nearest
from abste.estimators.base import SHAPES, Annealed, curve, fraction, fraction_done, number


class Blend(nn.Module, ABC):
    """Gives the weight a of the non-linear part in F = (1 - a) x + a phi(x)."""

    @abstractmethod
    def weight(self, x: Tensor) -> Tensor | float:
        """a in [0, 1]: a number where it never changes, a float32 scalar, or one number for each of x."""

    def taps(self) -> tuple[Tensor, ...]:
        """See :meth:`Binarizer.taps`."""
        return ()

    def gradients(self, inside: Tensor, bent: Tensor, gap: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        """The gradient of each tap.

        Args:
            inside: the gradient with respect to sign(x), zero beyond the clip.
            bent: the same times phi'(x).
            gap: gives phi(x) - x, which is dF/da.
        """
        return ()


class Constant(Blend):
    """The same a throughout training.

    Args:
        a: in [0, 1]; 0 is STE, 1 the non-linear function alone.

    Raises:
        ConfigError: a is no number, or lies outside.
    """

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = fraction("Constant", "a", a)

    def weight(self, x: Tensor) -> float:
        return self.a

    def extra_repr(self) -> str:
        return f"a={self.a:g}"


class Progress(Blend, Annealed):
    """a moves from a_start to a_end with the fraction of training done, p.

    a = a_start + (a_end - a_start) b(p), b being 1 - cos(pi p / 2) or p. The schedule of ReSTE's power is the first.

    Args:
        a_start: a at the start, in [0, 1].
        a_end: a at the end, in [0, 1].
        shape: ``"cosine"``, 1 - cos(pi p / 2), slow at first; or ``"linear"``, p.

    Raises:
        ConfigError: an unknown shape, or an a that is no number or lies outside.
    """

    def __init__(self, a_start: float = 0.0, a_end: float = 0.9, shape: str = "cosine") -> None:
        super().__init__()
        self.a_start = fraction("Progress", "a_start", a_start)
        self.a_end = fraction("Progress", "a_end", a_end)
        if shape not in SHAPES:
            raise ConfigError(f"unknown blend shape {shape!r}; {nearest(shape, SHAPES)}")
        self.shape = shape

    def weight(self, x: Tensor) -> Tensor:
        return self.between(self.a_start, self.a_end, self.shape)

    def extra_repr(self) -> str:
        return f"a_start={self.a_start:g}, a_end={self.a_end:g}, shape={self.shape!r}"


class Gate(Blend):
    """a falls with |x|: a(x) = a_max exp(-|x| / width), so that phi counts near zero and the line in the tails.

    F' = (1 - a(x)) + a(x) phi'(x): a counts as a constant, so F' is not the derivative of F as a function of x alone.

    Args:
        a_max: a at zero, in [0, 1]. Default 0.9, where :class:`Progress` ends.
        width: where a has fallen to a_max / e, in [1e-3, 1e4], in the units of x. Default 1: inputs have unit RMS.

    Raises:
        ConfigError: a number out of range.
    """

    def __init__(self, a_max: float = 0.9, width: float = 1.0) -> None:
        super().__init__()
        self.a_max = fraction("Gate", "a_max", a_max)
        self.width = number("Gate", "width", width)
        if not 1e-3 <= self.width <= 1e4:
            raise ConfigError(f"Gate: width must lie in [1e-3, 1e4], got {width}.")

    def weight(self, x: Tensor) -> Tensor:
        return x.detach().abs().mul_(-1.0 / self.width).exp_().mul_(self.a_max)

    def extra_repr(self) -> str:
        return f"a_max={self.a_max:g}, width={self.width:g}"


class Learned(Blend):
    """a = sigmoid(theta), theta being a parameter of each layer.

    dL/da is the sum of dL/dsign(x) (phi(x) - x) inside the clip: what F would pass on if it were the forward. (The
    forward is sign(x), which does not depend on a.)

    Args:
        a: where it starts, between 0 and 1. Default 0.5, where theta is 0 and moves it the most.

    Raises:
        ConfigError: a is no number between them.
    """

    def __init__(self, a: float = 0.5) -> None:
        super().__init__()
        start = fraction("Learned", "a", a)
        if not 0 < start < 1:
            raise ConfigError(f"Learned: a must lie between 0 and 1, got {a}: at an end it would never move.")
        self.start = start
        self.theta = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to where a starts."""
        self.theta.fill_(math.log(self.start / (1 - self.start)))

    def weight(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.theta.detach().float())

    def taps(self) -> tuple[Tensor, ...]:
        return (self.theta,)

    def gradients(self, inside: Tensor, bent: Tensor, gap: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        wide = torch.promote_types(inside.dtype, torch.float32)
        a = torch.sigmoid(self.theta.detach().float())
        total = (inside.to(wide) * gap().to(wide)).sum()
        return ((total * (a * (1 - a))).to(self.theta.dtype),)


SAMPLE = 2**16
"""Numbers of a tensor that moments are taken of: more would cost time, and these give them to a per cent."""


class Equilibrium(Blend, Annealed):
    """a as large as a budget on the instability of the gradient allows, for each layer, in closed form.

    With A = |g| inside the clip and B = A phi'(x), the blended gradient has size (1 - a) A + a B. Its squared
    coefficient of variation may be rho times that of STE's, A: a is the largest number in [0, 1] at which it is. With
    means m, variances v and the covariance c, and kappa = rho vA / mA^2, that is where

        [(vA - 2 c + vB) - kappa (mB - mA)^2] a^2 + 2 [(c - vA) - kappa mA (mB - mA)] a + (1 - rho) vA = 0,

    or 1 where the budget is never spent. The moments are those of the estimator's own backward: of up to 65,536
    numbers a layer, evenly spaced; summed over micro-batches and, where torch.distributed is initialised, over all
    processes; in units of mA, since the gradient shrinks over training; smoothed; and a moves by ``slew`` a step at
    most. :class:`~abste.estimators.EstimatorSchedule` moves it on, and has to step in all processes. Nothing is
    measured where the input needs no gradient, nor by ``backward(inputs=...)`` and ``torch.autograd.grad``: only by a
    plain ``backward()``.

    Our own contribution, not the paper's.

    Args:
        rho_start: budget at the start of training, in [1, 1e6]. Default 1: that of STE, where a is 0.
        rho_end: budget at its end, likewise. Default 2: for Gaussian inputs and gradients a comes to 0.69 with
            :class:`ABTanh`'s defaults for weights, to 0.84 with those for activations. Neither has been tuned.
        shape: how rho moves from one to the other: ``"cosine"`` (default) or ``"linear"``, as in :class:`Progress`.
        smoothing: of the moments, the share of the past in [0, 1). Default 0.9: some ten steps.
        slew: largest change of a in a step, in (0, 1]. Default 0.02: from 0 to 1 in fifty steps.
        budget: ``"variation"`` (default), as above, or ``"variance"``: v of the blended gradient is at most rho vA, in
            which the size of the gradient counts.

    Raises:
        ConfigError: a number out of range, an unknown shape or budget.
    """

    state: Tensor
    BUDGETS = ("variation", "variance")

    def __init__(
        self,
        rho_start: float = 1.0,
        rho_end: float = 2.0,
        shape: str = "cosine",
        smoothing: float = 0.9,
        slew: float = 0.02,
        budget: str = "variation",
    ) -> None:
        super().__init__()
        self.rho_start, self.rho_end = (number("Equilibrium", "rho", rho) for rho in (rho_start, rho_end))
        if not (1 <= self.rho_start <= 1e6 and 1 <= self.rho_end <= 1e6):
            raise ConfigError(f"Equilibrium: rho must lie in [1, 1e6], got {rho_start} and {rho_end}.")
        self.smoothing, self.slew = fraction("Equilibrium", "smoothing", smoothing), number("Equilibrium", "slew", slew)
        if self.smoothing == 1 or not 0 < self.slew <= 1:
            raise ConfigError(
                f"Equilibrium: needs smoothing in [0, 1) and slew in (0, 1], got smoothing={smoothing}, slew={slew}."
            )
        for what, value, known in (("shape", shape, SHAPES), ("budget", budget, self.BUDGETS)):
            if value not in known:
                raise ConfigError(f"unknown {what} of an equilibrium {value!r}; {nearest(value, known)}")
        self.shape, self.budget = shape, budget
        # The bits of float32 numbers, which neither half() nor averaging rounds: a, mB, vA, c, vB, measurements.
        self.register_buffer("state", torch.zeros(6, dtype=torch.int32))
        self._tap = torch.zeros(6, requires_grad=True)

    def _apply(self, fn: Any, recurse: bool = True) -> Equilibrium:
        super()._apply(fn, recurse)
        self._tap = torch.zeros(6, device=self.state.device, requires_grad=True)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if self._tap.device != self.state.device:  # the state was assigned to a module on the meta device
            self._tap = torch.zeros(6, device=self.state.device, requires_grad=True)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.state.zero_()

    def weight(self, x: Tensor) -> Tensor:
        return self.state.view(torch.float32)[0]

    def rho(self) -> Tensor:
        """The present budget, a float32 scalar."""
        return self._budgets([self])[0]

    def taps(self) -> tuple[Tensor, ...]:
        return (self._tap,) if self.training else ()

    def gradients(self, inside: Tensor, bent: Tensor, gap: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        a, b = (part.float().abs() for part in sampled(SAMPLE, inside, bent))
        count = torch.full((), float(a.numel()), device=a.device)
        return (torch.stack([count, a.sum(), b.sum(), a.dot(a), a.dot(b), b.dot(b)]),)

    @staticmethod
    @torch.no_grad()
    def settle(blends: Sequence[Equilibrium]) -> None:
        """Take what the backward has measured since the last time, and move each a towards its equilibrium."""
        if not blends:
            return
        taps = [blend._tap for blend in blends]
        sums = torch.stack([torch.zeros_like(tap) if tap.grad is None else tap.grad for tap in taps])
        for tap in taps:
            tap.grad = None
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(sums)
        wide = torch.float32 if sums.device.type == "mps" else torch.float64  # Apple's GPUs have no float64
        n, a1, b1, aa, ab, bb = sums.to(wide).unbind(1)
        mean = a1 / n
        unit = mean * mean
        mb = b1 / a1
        va, c, vb = aa / n / unit - 1, ab / n / unit - mb, bb / n / unit - mb * mb
        measured = torch.stack([mb, va, c, vb], 1)
        good = measured.isfinite().all(1) & (a1 > 0)

        state = torch.stack([blend.state.view(torch.float32) for blend in blends]).to(wide)
        past = torch.tensor([blend.smoothing for blend in blends], dtype=state.dtype, device=state.device)
        count = state[:, 5] + good
        share = torch.maximum(1 - past, 1 / count.clamp(min=1)).unsqueeze(1)
        moments = torch.where(good.unsqueeze(1), state[:, 1:5] + share * (measured - state[:, 1:5]), state[:, 1:5])
        rho = Equilibrium._budgets(blends).to(wide)
        free = torch.tensor([blend.budget == "variance" for blend in blends], device=state.device)
        target = equilibrium(moments[:, 0], moments[:, 1], moments[:, 2], moments[:, 3], rho, free)
        slew = torch.tensor([blend.slew for blend in blends], dtype=state.dtype, device=state.device)
        a = torch.where(count > 0, torch.clamp(target, state[:, 0] - slew, state[:, 0] + slew), state[:, 0])
        new = torch.cat([a.unsqueeze(1), moments, count.unsqueeze(1)], 1).float()
        for blend, numbers in zip(blends, new, strict=True):
            blend.state.copy_(numbers.view(torch.int32))

    @staticmethod
    def _budgets(blends: Sequence[Equilibrium]) -> Tensor:
        """:meth:`rho` of each, in a few operations for all, since every step needs them."""
        p = fraction_done(torch.stack([blend.annealing for blend in blends]))
        start = torch.tensor([blend.rho_start for blend in blends], device=p.device)
        end = torch.tensor([blend.rho_end for blend in blends], device=p.device)
        cosine = torch.tensor([blend.shape == "cosine" for blend in blends], device=p.device)
        return start + (end - start) * torch.where(cosine, curve(p, "cosine"), curve(p, "linear"))

    def extra_repr(self) -> str:
        return f"rho_start={self.rho_start:g}, rho_end={self.rho_end:g}, budget={self.budget!r}"


def equilibrium(mb: Tensor, va: Tensor, c: Tensor, vb: Tensor, rho: Tensor, variance: Tensor) -> Tensor:
    """The largest a in [0, 1] within the budget: see :class:`Equilibrium`. All of one shape, in units of mA.

    Args:
        mb, va, c, vb: mean of B, variance of A, covariance, variance of B.
        rho: budget, at least 1.
        variance: whether the budget is on the variance rather than on the coefficient of variation.
    """
    kappa = torch.where(variance, 0.0, rho * va)
    q2 = va - 2 * c + vb - kappa * (mb - 1).square()
    q1 = 2 * (c - va - kappa * (mb - 1))
    q0 = (1 - rho) * va
    root = (q1.square() - 4 * q2 * q0).clamp(min=0).sqrt()
    # The polynomial is at most 0 at a = 0; where it is positive at 1 it crosses zero once between. Of the two ways to
    # write that root the one is taken that subtracts nothing.
    crossing = torch.where(q1 < 0, (root - q1) / (2 * q2), -2 * q0 / (q1 + root))
    return torch.where(q2 + q1 + q0 <= 0, 1.0, crossing.nan_to_num(1.0).clamp(0.0, 1.0))


def sampled(size: int | None, *tensors: Tensor) -> tuple[Tensor, ...]:
    """About ``size`` numbers of each of some tensors: at the same places, evenly spaced in memory.

    Args:
        size: how many, or None for all.
        tensors: of one shape.

    Returns:
        Vectors of one length.
    """
    # One layout for all, that of the first: numbers of different places are not to be paired.
    first = tensors[0]
    if first.dim() == 4 and first.is_contiguous(memory_format=torch.channels_last):
        tensors = tuple(tensor.permute(0, 2, 3, 1) for tensor in tensors)
    total = first.numel()
    step = 1 if size is None else max(1, total // size)
    # A step that shares a factor with the number of channels or columns would see some of them only.
    while math.gcd(step, total) != 1 and step < total:
        step += 1
    return tuple(tensor.reshape(-1)[::step] for tensor in tensors)


BLENDS: dict[str, type[Blend]] = {
    "constant": Constant,
    "equilibrium": Equilibrium,
    "gate": Gate,
    "learned": Learned,
    "progress": Progress,
}


def make_blend(spec: object, a_start: float, a_end: float) -> Blend:
    """The blend that a name or a table with a name and arguments stands for.

    What a table leaves out follows from a_start and a_end where the blend has something like it: ``"constant"`` holds
    a_end, ``"progress"`` goes from a_start to a_end, ``"gate"`` has its largest a at a_end.

    Raises:
        ConfigError: an unknown name or argument.
    """
    arguments: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {"name": spec}
    name = arguments.pop("name", None)
    if not isinstance(name, str) or name not in BLENDS:
        raise ConfigError(f"unknown blend {name!r}; {nearest(name, BLENDS)}")
    cls = BLENDS[name]
    known = list(inspect.signature(cls).parameters)
    for key in arguments:
        if key not in known:
            raise ConfigError(f"blend {name!r} takes no argument {key!r}; {nearest(key, known)}")
    given = {"constant": {"a": a_end}, "progress": {"a_start": a_start, "a_end": a_end}, "gate": {"a_max": a_end}}
    return cls(**{**given.get(name, {}), **arguments})
