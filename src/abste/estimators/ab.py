"""AB-Tanh-STE and AB-ArcTan-STE: adaptive blends of a line and a saturating function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Estimator, Role, clip_gradient, register
from abste.estimators.blends import Blend, make_blend


class AdaptiveBlend(Estimator):
    """Common part of the two AB-STE estimators.

    F(x) = (1 - a) x + a phi(x), F'(x) = (1 - a) + a phi'(x), both for \\|x\\| <= t; beyond, F is constant and F' zero.
    At a = 0 this is STE clipped at t. The linear part keeps the slope at 1 - a or more everywhere inside the clip
    (stability); phi brings F closer to sign (a smaller estimating error).

    Args:
        k: sharpness of phi. Defaults are given in the subclasses.
        t: clip. Default 3 for weights: latents are standardised, so about 0.3 % of a Gaussian's lie beyond and the
            clip only guards against outliers, where a tighter one would freeze the largest weights. Default 1.5 for
            activations, taken after division by their running RMS: there the clip matters first; without it the
            linear floor passes gradient to units whose sign can not change, and accuracy falls by many points.
        blend: how a adapts: ``"progress"`` (default), ``"constant"`` (a = a_end throughout), or a
            :class:`~abste.estimators.blends.Blend`, which overrides a_start and a_end.
        a_start: blend at the start. Default 0 for weights and activations: training starts as STE, whose gradient
            is the most stable.
        a_end: blend at the end. Default 0.9 for weights and activations: close to phi alone, whose estimating error
            is the smallest, but with a tenth of the line left as a floor under the slope.
        normalized: phi passes through (1, 1) if True, so F is never further from sign than x is; if False it is the
            un-normalised function that saturates at ±1.

    The defaults come from one-seed pilots, not from a ranking.

    Source: Gupta and Kumar, AB-STE, ECML-PKDD 2025, doi 10.1007/978-3-032-06066-2_8. The full text is not public:
    abstract and title give the ingredients (a linear part, tanh or arctan, an adaptive blend); the convex form, the
    normalisation, the schedule and the clip are our reconstruction.
    """

    k: float
    a_start: float
    a_end: float

    def __init__(
        self,
        k: float | None = None,
        t: float | None = None,
        blend: str | Blend = "progress",
        a_start: float | None = None,
        a_end: float | None = None,
        normalized: bool = True,
    ) -> None:
        super().__init__(k=k, t=t, a_start=a_start, a_end=a_end)
        self.normalized = bool(normalized)
        self._blend_name = None if isinstance(blend, Blend) else blend
        self.blend = blend if isinstance(blend, Blend) else make_blend(blend, self.a_start, self.a_end)

    def set_role(self, role: Role) -> None:
        super().set_role(role)
        if self._blend_name is not None:
            self.blend = make_blend(self._blend_name, self.a_start, self.a_end)

    def check(self) -> None:
        super().check()
        if not 0 < self.k < math.inf:
            raise ConfigError(f"{type(self).__name__}: k must be positive, got {self.k}.")

    def phi(self, x: Tensor) -> Tensor:
        """The non-linear part."""
        raise TypeError(f"{type(self).__name__} defines no phi.")

    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad * phi'(x), as a new tensor."""
        raise TypeError(f"{type(self).__name__} defines no phi_backward.")

    def surrogate(self, x: Tensor) -> Tensor:
        y = x.clamp(-self.t, self.t)
        return torch.lerp(y, self.phi(y), self.blend.weight(x.dtype))

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        inside = clip_gradient(grad, x, self.t)
        return self.phi_backward(inside, x).lerp_(inside, 1.0 - self.blend.weight(grad.dtype))

    def extra_repr(self) -> str:
        return f"k={self.k:g}, t={self.t:g}" + ("" if self.normalized else ", normalized=False")


@register("ab_tanh")
class ABTanh(AdaptiveBlend):
    """AB-Tanh-STE.

    phi(x) = tanh(k x) / tanh(k), or tanh(k x) with ``normalized=False``. k defaults to 2 for weights and activations:
    sharp enough to differ from the line (slope 2.07 at 0), and wide enough that standardised inputs do not all
    saturate.
    """

    __doc__ += (AdaptiveBlend.__doc__ or "").split("\n", 1)[1]
    defaults = {
        "k": {"weights": 2.0, "activations": 2.0},
        "t": {"weights": 3.0, "activations": 1.5},
        "a_start": {"weights": 0.0, "activations": 0.0},
        "a_end": {"weights": 0.9, "activations": 0.9},
    }

    def phi(self, x: Tensor) -> Tensor:
        return torch.tanh(self.k * x) / (math.tanh(self.k) if self.normalized else 1.0)

    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        # 1 - tanh(z)^2 = 4 p (1 - p) with p = sigmoid(-2|z|): much faster than tanh on CPU, and it keeps its relative
        # precision in the tails, also in half precision.
        p = x.abs().mul_(-2.0 * self.k).sigmoid_()
        factor = 4.0 * self.k / (math.tanh(self.k) if self.normalized else 1.0)
        return torch.ops.aten.sigmoid_backward.grad_input(grad, p, grad_input=p).mul_(factor)


@register("ab_arctan")
class ABArcTan(AdaptiveBlend):
    """AB-ArcTan-STE.

    phi(x) = atan(k x) / atan(k), or (2/pi) atan(pi k x / 2) with ``normalized=False``. k defaults to 2.5 for weights
    and activations, which gives about the slope at 0 (2.10) that AB-Tanh has at its k of 2.
    """

    __doc__ += (AdaptiveBlend.__doc__ or "").split("\n", 1)[1]
    defaults = {
        "k": {"weights": 2.5, "activations": 2.5},
        "t": {"weights": 3.0, "activations": 1.5},
        "a_start": {"weights": 0.0, "activations": 0.0},
        "a_end": {"weights": 0.9, "activations": 0.9},
    }

    def phi(self, x: Tensor) -> Tensor:
        if self.normalized:
            return torch.atan(self.k * x) / math.atan(self.k)
        return torch.atan((math.pi / 2) * self.k * x) * (2 / math.pi)

    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        inner, outer = (self.k, math.atan(self.k)) if self.normalized else (math.pi / 2 * self.k, 1.0)
        # Dividing the numerator and the denominator by k / outer saves a pass; the clip keeps x small enough for
        # half precision wherever grad is not zero.
        denominator = x.square().mul_(inner * inner * outer / self.k).add_(outer / self.k)
        return torch.div(grad, denominator, out=denominator)
