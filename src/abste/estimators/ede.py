"""EDE, the error decay estimator of IR-Net."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, clip_gradient, fraction, register, tanh_backward


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
        return self.between_logs(self.s_min, self.s_max)

    def surrogate(self, x: Tensor) -> Tensor:
        s = self.sharpness().to(x.dtype)
        return (1.0 / s).clamp(min=1.0) * torch.tanh(s * x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        s = self.sharpness()
        return tanh_backward(grad, x, s, s.clamp(min=1.0))


@register("ede_floor")
class EDEFloor(EDE):
    """EDE with a line under it: a blend of a line and a tanh in which the tanh sharpens, rather than the blend moves.

    F(x) = floor x + (1 - floor) k tanh(s x); F'(x) = floor + (1 - floor) k s (1 - tanh(s x)^2) where |x| <= t, else 0
    (and F is constant there), with k = max(1/s, 1).

    Schedule: s as in :class:`EDE`; floor is constant. The line keeps the slope at ``floor`` or more inside the clip,
    where EDE's tails vanish as s rises.

    Applied to weights and activations, as EDE is.

    Args:
        floor: share of the line, in [0, 1]; 0 is EDE clipped at t. Default 0.1 for weights and activations: what
            :class:`ABTanh` keeps of its line at the end.
        t: clip. Default 3 for weights and 1.5 for activations, for the reasons given in :class:`ABTanh`.
        s_min: sharpness at the start. Default 0.1, as in :class:`EDE`.
        s_max: sharpness at the end. Default 10.

    Source: a second candidate for what Gupta and Kumar, AB-STE, ECML-PKDD 2025, may mean, whose full text is not
    public: their tanh is that of EDE (Qin et al., IR-Net, arXiv 1909.10788, equations 11 to 13), and this repairs its
    tails. The form, the floor and the clip are our own reading.
    """

    defaults = {
        "floor": {"weights": 0.1, "activations": 0.1},
        "t": {"weights": 3.0, "activations": 1.5},
        **EDE.defaults,
    }
    floor: float

    def __init__(
        self,
        floor: float | None = None,
        t: float | None = None,
        s_min: float | None = None,
        s_max: float | None = None,
    ) -> None:
        super(EDE, self).__init__(floor=floor, t=t, s_min=s_min, s_max=s_max)

    def check(self) -> None:
        super().check()
        fraction("EDEFloor", "floor", self.floor)

    def surrogate(self, x: Tensor) -> Tensor:
        y = x.clamp(-self.t, self.t)
        return self.floor * y + (1.0 - self.floor) * super().surrogate(y)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        inside = clip_gradient(grad, x, self.t)
        return super().backward(inside, x).lerp_(inside, self.floor)
