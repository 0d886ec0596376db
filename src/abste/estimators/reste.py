"""ReSTE, the rectified straight-through estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, clip_gradient, register, sign


@register("reste")
class ReSTE(Estimator, Annealed):
    """Power function whose exponent falls over training.

    F(x) = sign(x) |x|^(1/o); F'(x) = (1/o) |x|^(1/o - 1) where m < |x| <= t. Where |x| <= m, that would diverge: there
    F is the straight line from 0 to F(m), and F' its slope m^(1/o - 1). Where |x| > t, F' is zero.

    Schedule: o = 1 + (o_end - 1) (1 - cos(pi p / 2)), p being the fraction of training done. Its authors apply it to
    weights and activations, both raw.

    Args:
        o_end: final power, at least 1. Default 3, the best of the paper's sweep.
        t: clip. Default 1.5, as in the paper.
        m: where the straight line ends. Default 0.1, as in the paper.

    Source: Wu et al., Estimator Meets Equilibrium Perspective, arXiv 2308.06689, equations 9 to 12. The paper reports
    a linear schedule of o; the authors' code has the cosine, which we follow. The code changes o once an epoch, we at
    every step.
    """

    defaults = {
        "o_end": {"weights": 3.0, "activations": 3.0},
        "t": {"weights": 1.5, "activations": 1.5},
        "m": {"weights": 0.1, "activations": 0.1},
    }
    o_end: float
    m: float

    def __init__(self, o_end: float | None = None, t: float | None = None, m: float | None = None) -> None:
        super().__init__(o_end=o_end, t=t, m=m)

    def check(self) -> None:
        super().check()
        if not (1 <= self.o_end <= 1e4 and 1e-4 <= self.m < self.t):  # a slope that float16 can hold
            raise ConfigError(
                f"ReSTE: needs 1 <= o_end <= 1e4 and 1e-4 <= m < t, got o_end={self.o_end}, m={self.m} and t={self.t}."
            )

    def exponent(self) -> Tensor:
        """The present 1/o, a float32 scalar."""
        return 1.0 / self.between(1.0, self.o_end)

    def surrogate(self, x: Tensor) -> Tensor:
        e = self.exponent().to(x.dtype)
        y = x.clamp(-self.t, self.t)
        curve = sign(x) * y.abs().clamp(min=self.m).pow(e)
        return torch.where(y.abs() > self.m, curve, y * self.m ** (e - 1.0))

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        e = self.exponent()
        # Half precision would round m, and the slope jumps there.
        size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
        slope = size.clamp(min=self.m).pow(e - 1.0) * torch.where(size > self.m, e, 1.0)
        return clip_gradient(grad, x, self.t) * slope.to(grad.dtype)
