"""ReSTE, the rectified straight-through estimator."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, clip_gradient, register


@register("reste")
class ReSTE(Estimator, Annealed):
    """Power function whose exponent falls over training.

    F(x) = sign(x) \\|x\\|^(1/o), F'(x) = (1/o) \\|x\\|^(1/o - 1) where m < \\|x\\| <= t. For \\|x\\| <= m, where that would
    diverge, F is the straight line to F(m), of slope m^(1/o - 1); for \\|x\\| > t the slope is zero. o rises from 1 to
    ``o_end`` as 1 + (1 - cos(pi p / 2)) (o_end - 1), p being the fraction of training done. Applied to weights and
    activations by its authors, on raw inputs.

    Args:
        o_end: final power. Default 3, the best of the paper's sweep.
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
        if not (self.o_end >= 1 and 0 < self.m < self.t):
            raise ConfigError(f"ReSTE: needs o_end >= 1 and 0 < m < t, got o_end={self.o_end}, m={self.m}, t={self.t}.")

    def exponent(self) -> Tensor:
        """The present 1/o, a float32 scalar."""
        return 1.0 / (1.0 + (1.0 - torch.cos(self.progress() * (torch.pi / 2))) * (self.o_end - 1.0))

    def surrogate(self, x: Tensor) -> Tensor:
        e = self.exponent().to(x.dtype)
        size = x.abs().clamp(max=self.t)
        curve = size.clamp(min=self.m).pow(e)
        line = size * self.m ** (e - 1.0)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype) * torch.where(size > self.m, curve, line)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        e = self.exponent()
        size = x.abs()
        slope = size.clamp(min=self.m).float().pow(e - 1.0) * torch.where(size > self.m, e, 1.0)
        return clip_gradient(grad, x, self.t) * slope.to(grad.dtype)
