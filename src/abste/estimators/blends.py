"""How AB-STE's blend weight a adapts: each way is one small object."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from abste.errors import ConfigError, nearest
from abste.estimators.base import Annealed

SHAPES = ("cosine", "linear")


class Blend(torch.nn.Module):
    """Gives the weight a of the non-linear part in F = (1 - a) x + a phi(x)."""

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor | float:
        """a in [0, 1]: a number where it never changes, else a scalar tensor of ``dtype`` on the module's device."""
        raise TypeError(f"{type(self).__name__} defines no weight.")


class Constant(Blend):
    """The same a throughout training.

    Args:
        a: in [0, 1]; 0 is STE, 1 the non-linear function alone.
    """

    def __init__(self, a: float) -> None:
        super().__init__()
        self.a = _fraction("a", a)

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor | float:
        return self.a

    def extra_repr(self) -> str:
        return f"a={self.a:g}"


class Progress(Blend, Annealed):
    """a moves from a_start to a_end with the fraction of training done, p.

    Args:
        a_start: a at the start, in [0, 1].
        a_end: a at the end, in [0, 1].
        shape: ``"cosine"``, 1 - cos(pi p / 2), slow at first, as ReSTE's authors anneal; or ``"linear"``, p.
    """

    def __init__(self, a_start: float = 0.0, a_end: float = 0.9, shape: str = "cosine") -> None:
        super().__init__()
        self.a_start, self.a_end = _fraction("a_start", a_start), _fraction("a_end", a_end)
        if shape not in SHAPES:
            raise ConfigError(f"unknown blend shape {shape!r}; {nearest(shape, SHAPES)}")
        self.shape = shape

    def weight(self, dtype: torch.dtype = torch.float32) -> Tensor | float:
        p = self.progress()
        if self.shape == "cosine":
            p = 1.0 - torch.cos(p * (torch.pi / 2))
        return (self.a_start + (self.a_end - self.a_start) * p).to(dtype)

    def extra_repr(self) -> str:
        return f"a_start={self.a_start:g}, a_end={self.a_end:g}, shape={self.shape!r}"


BLENDS: dict[str, type[Blend]] = {"constant": Constant, "progress": Progress}


def make_blend(name: Any, a_start: float, a_end: float) -> Blend:
    """The blend called ``name``: ``"constant"`` holds a_end, ``"progress"`` goes from a_start to a_end."""
    if name == "constant":
        return Constant(a_end)
    if name == "progress":
        return Progress(a_start, a_end)
    raise ConfigError(f"unknown blend {name!r}; {nearest(name, BLENDS)}")


def _fraction(name: str, value: float) -> float:
    if not 0 <= value <= 1:
        raise ConfigError(f"the blend's {name} must lie in [0, 1], got {value}.")
    return float(value)
