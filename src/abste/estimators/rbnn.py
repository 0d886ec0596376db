"""The training-aware approximation of RBNN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, register

_ROOT = math.sqrt(2.0)


@register("rbnn")
class RBNN(Estimator, Annealed):
    """Piecewise quadratic surrogate that narrows over training.

    F(x) = k (sqrt(2) s x - sign(x) s^2 x^2 / 2) where |x| < sqrt(2) / s, else k sign(x);
    F'(x) = k max(sqrt(2) s - s^2 |x|, 0), with k = max(1/s, 1). (RBNN calls the sharpness t; here t is always the
    clip.) At s = sqrt(2) this is ApproxSign.

    Schedule: s rises from ``s_min`` to ``s_max`` evenly in its logarithm, but counts as ``s_floor`` where it is below
    that. Clip: none besides the reach sqrt(2) / s, which the schedule moves: 141 at the start and 0.14 at the end for
    weights. Its authors apply it to weights (standardised per filter, then rotated) and activations (standardised per
    sample); the rotation belongs to the layer and is left out here.

    Args:
        s_min: sharpness at the start of the schedule, at least 1e-4. Default 0.01 for weights and activations.
        s_max: sharpness at its end, at most 1e4. Default 10 for weights and activations.
        s_floor: least sharpness, from 0 to s_max. Default 0 for weights, which is none; 1 for activations, which holds
            their s at 1 (and k with it) for the first two thirds of training.

    Source: Lin et al., RBNN, arXiv 2009.13055, gradient approximation. Formula, schedule and defaults are those of the
    authors' code (lmbxmu/RBNN, cifar/modules/binarized_modules.py, main.py, run.sh); of the paper we know no more than
    that its exponent goes the same way, with the logarithms -2 and 1 as bounds. The code changes s once an epoch, we
    at every step.
    """

    defaults = {
        "s_min": {"weights": 0.01, "activations": 0.01},
        "s_max": {"weights": 10.0, "activations": 10.0},
        "s_floor": {"weights": 0.0, "activations": 1.0},
    }
    s_min: float
    s_max: float
    s_floor: float

    def __init__(self, s_min: float | None = None, s_max: float | None = None, s_floor: float | None = None) -> None:
        super().__init__(s_min=s_min, s_max=s_max, s_floor=s_floor)

    def check(self) -> None:
        super().check()
        if not (1e-4 <= self.s_min <= self.s_max <= 1e4 and 0 <= self.s_floor <= self.s_max):  # for float16
            raise ConfigError(
                "RBNN: needs 1e-4 <= s_min <= s_max <= 1e4 and 0 <= s_floor <= s_max, "
                f"got s_min={self.s_min}, s_max={self.s_max} and s_floor={self.s_floor}."
            )

    def sharpness(self) -> Tensor:
        """The present s, a float32 scalar."""
        return self.between_logs(self.s_min, self.s_max).clamp(min=self.s_floor)

    def surrogate(self, x: Tensor) -> Tensor:
        s = self.sharpness().to(x.dtype)
        z = (s * x).clamp(-_ROOT, _ROOT)
        return (1.0 / s).clamp(min=1.0) * z * (_ROOT - 0.5 * z.abs())

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        # Near the end of its reach half precision would leave the slope no correct digit. k s is max(s, 1).
        s = self.sharpness()
        z = x.abs().to(torch.promote_types(x.dtype, torch.float32)) * s
        return grad * ((_ROOT - z).clamp_(min=0.0) * s.clamp(min=1.0)).to(grad.dtype)
