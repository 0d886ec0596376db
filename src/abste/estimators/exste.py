"""ExSTE, the exponential straight-through estimator of BEANet."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, clip_gradient, register, sign


@register("exste")
class ExSTE(Estimator, Annealed):
    """Saturating exponential through (1, 1) and (-1, -1), from a line to a step over training.

    F(x) = sign(x) (1 - exp(-o |x|)) / (1 - exp(-o)); F'(x) = o exp(-o |x|) / (1 - exp(-o)) where |x| <= t, else 0 (and
    F is constant there). As o goes to 0 this is STE clipped at t.

    Schedule: o rises from ``o_start`` to ``o_end`` evenly in its logarithm. Its authors train W1A1 networks with it;
    that it is applied to weights and activations alike, both raw, is our reading.

    Args:
        o_start: o at the start, at least 1e-4. Default 0.01 for weights and activations, as in the manuscript: STE but
            for half a per cent.
        o_end: o at the end, at most 1e4. Default 10^0.8 = 6.31 for weights and activations, as in the manuscript.
        t: clip. Default 1.5 for weights and activations, as in the manuscript.

    Source: the BEANet manuscript, found on GitHub and as far as we know not published; it gives formula, clip and
    o = 10^(2.8 p - 2), p being the fraction of training done. We have seen no code of its authors.
    """

    defaults = {
        "o_start": {"weights": 0.01, "activations": 0.01},
        "o_end": {"weights": 10**0.8, "activations": 10**0.8},
        "t": {"weights": 1.5, "activations": 1.5},
    }
    o_start: float
    o_end: float

    def __init__(self, o_start: float | None = None, o_end: float | None = None, t: float | None = None) -> None:
        super().__init__(o_start=o_start, o_end=o_end, t=t)

    def check(self) -> None:
        super().check()
        if not 1e-4 <= self.o_start <= self.o_end <= 1e4:  # a slope that float16 can hold
            raise ConfigError(
                f"ExSTE: needs 1e-4 <= o_start <= o_end <= 1e4, got o_start={self.o_start} and o_end={self.o_end}."
            )

    def decay(self) -> Tensor:
        """The present o, a float32 scalar."""
        return self.between_logs(self.o_start, self.o_end)

    def surrogate(self, x: Tensor) -> Tensor:
        o = self.decay().to(x.dtype)
        y = x.clamp(-self.t, self.t)
        return sign(y) * torch.expm1(-o * (y * sign(y))) / torch.expm1(-o)  # |y|, but with a derivative at 0

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        o = self.decay()
        # Half precision would round the exponent.
        size = x.abs().to(torch.promote_types(x.dtype, torch.float32))
        slope = torch.exp(size * -o) * (-o / torch.expm1(-o))
        return clip_gradient(grad, x, self.t) * slope.to(grad.dtype)
