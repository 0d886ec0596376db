"""How AB-STE's blend weight a adapts: each way is one small object."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from abste.errors import ConfigError, nearest
from abste.estimators.base import Annealed, fraction

BLENDS = ("constant", "progress")
SHAPES = ("cosine", "linear")


class Blend(nn.Module, ABC):
    """Gives the weight a of the non-linear part in F = (1 - a) x + a phi(x)."""

    @abstractmethod
    def weight(self) -> Tensor | float:
        """a in [0, 1]: a number where it never changes, else a float32 scalar on the module's device."""


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

    def weight(self) -> float:
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

    def weight(self) -> Tensor:
        p = self.progress()
        if self.shape == "cosine":
            p = 1.0 - torch.cos(p * (torch.pi / 2))
        return self.a_start + (self.a_end - self.a_start) * p

    def extra_repr(self) -> str:
        return f"a_start={self.a_start:g}, a_end={self.a_end:g}, shape={self.shape!r}"


def make_blend(name: object, a_start: float, a_end: float) -> Blend:
    """The blend called ``name``: ``"constant"`` holds a_end, ``"progress"`` goes from a_start to a_end."""
    if name == "constant":
        return Constant(a_end)
    if name == "progress":
        return Progress(a_start, a_end)
    raise ConfigError(f"unknown blend {name!r}; {nearest(name, BLENDS)}")
