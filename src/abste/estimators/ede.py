"""EDE, the error decay estimator of IR-Net."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, register


@register("ede")
class EDE(Estimator, Annealed):
    """Tanh whose sharpness rises over training.

    F(x) = k tanh(s x); F'(x) = k s (1 - tanh(s x)^2), with k = max(1/s, 1). (IR-Net calls the sharpness t; here t is
    always the clip.)

    Schedule: s rises from ``s_min`` to ``s_max`` evenly in its logarithm. Clip: none. Its authors apply it to weights
    (standardised) and activations.

    Args:
        s_min: sharpness at the start. Default 0.1, the paper's value and that of the authors' code for W1A32; their
            code for ResNet-20 W1A1 uses 0.001.
        s_max: sharpness at the end. Default 10.

    Source: Qin et al., IR-Net, arXiv 1909.10788, equations 11 to 13. Their code changes s once an epoch, we at every
    step.
    """

    defaults = {"s_min": {"weights": 0.1, "activations": 0.1}, "s_max": {"weights": 10.0, "activations": 10.0}}
    s_min: float
    s_max: float

    def __init__(self, s_min: float | None = None, s_max: float | None = None) -> None:
        super().__init__(s_min=s_min, s_max=s_max)

    def check(self) -> None:
        super().check()
        if not 1e-6 <= self.s_min <= self.s_max <= 1e4:  # a slope that float16 can hold
            raise ConfigError(
                f"EDE: needs 1e-6 <= s_min <= s_max <= 1e4, got s_min={self.s_min} and s_max={self.s_max}."
            )

    def sharpness(self) -> Tensor:
        """The present s, a float32 scalar."""
        low, high = math.log(self.s_min), math.log(self.s_max)
        return (low + (high - low) * self.progress()).exp()

    def surrogate(self, x: Tensor) -> Tensor:
        s = self.sharpness().to(x.dtype)
        return (1.0 / s).clamp(min=1.0) * torch.tanh(s * x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        s = self.sharpness()
        # 1 - tanh(z)^2 = 4 p (1 - p) with p = sigmoid(-2|z|), which keeps its relative precision in the tails.
        p = x.abs().mul_(-2.0 * s).sigmoid_()
        return torch.ops.aten.sigmoid_backward(grad, p) * (4.0 * s.clamp(min=1.0)).to(grad.dtype)
