"""AB-Tanh-STE and AB-ArcTan-STE: adaptive blends of a line and a saturating function."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import (
    Annealed,
    Estimator,
    Role,
    clip_gradient,
    fraction,
    number,
    register,
    tanh_backward,
)
from abste.estimators.blends import Blend, make_blend


class AdaptiveBlend(Estimator):
    """Common part of the two AB-STE estimators, :class:`ABTanh` and :class:`ABArcTan`, which document it.

    F(x) = (1 - a) x + a phi(x); F'(x) = (1 - a) + a phi'(x) where |x| <= t, else 0. A subclass gives phi.
    """

    k: float
    k_start: float | None = None
    a_start: float
    a_end: float
    blend: Blend

    def __init__(
        self,
        k: float | None = None,
        t: float | None = None,
        blend: str | Mapping[str, Any] | Blend = "progress",
        a_start: float | None = None,
        a_end: float | None = None,
        normalized: bool = True,
        k_start: float | None = None,
    ) -> None:
        super().__init__(k=k, t=t, a_start=a_start, a_end=a_end)
        # State of its own, and only where k moves: a constant one costs nothing and adds nothing to the state dict.
        self.rise = None if k_start is None else Annealed()
        if k_start is not None:
            self.k_start = number(type(self).__name__, "k_start", k_start)
            self.check()
        if not isinstance(normalized, bool):
            raise ConfigError(f"{type(self).__name__}: normalized must be true or false, got {normalized!r}.")
        self.normalized = normalized
        self._blend_spec = None if isinstance(blend, Blend) else blend
        self.blend = blend if isinstance(blend, Blend) else make_blend(blend, self.a_start, self.a_end)

    def set_role(self, role: Role) -> None:
        super().set_role(role)
        if self._blend_spec is not None:
            state = self.blend.state_dict()
            self.blend = make_blend(self._blend_spec, self.a_start, self.a_end)
            self.blend.load_state_dict(state)

    def check(self) -> None:
        super().check()
        if not 1e-6 <= self.k <= 1e4:  # beyond, float32 rounds phi to a line, and float16 overflows
            raise ConfigError(f"{type(self).__name__}: k must lie in [1e-6, 1e4], got {self.k}.")
        if self.k_start is not None and not 1e-6 <= self.k_start <= self.k:
            raise ConfigError(f"{type(self).__name__}: k_start must lie in [1e-6, k = {self.k:g}], got {self.k_start}.")
        for name in ("a_start", "a_end"):
            fraction(type(self).__name__, name, getattr(self, name))

    def sharpness(self, x: Tensor) -> Tensor | float:
        """The present k: a number where it is constant, else a scalar in the precision of x, at least float32."""
        if self.rise is None or self.k_start is None:
            return self.k
        return self.rise.between(self.k_start, self.k).to(torch.promote_types(x.dtype, torch.float32))

    @abstractmethod
    def phi(self, x: Tensor) -> Tensor:
        """The non-linear part."""

    @abstractmethod
    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        """grad * phi'(x), as a new tensor."""

    def surrogate(self, x: Tensor) -> Tensor:
        y = x.clamp(-self.t, self.t)
        a = self.blend.weight(y)
        return torch.lerp(y, self.phi(y), a.to(x.dtype) if isinstance(a, Tensor) else a)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        inside = clip_gradient(grad, x, self.t)
        return self._blended(inside, self.phi_backward(inside, x), x)

    def taps(self) -> tuple[Tensor, ...]:
        return self.blend.taps()

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        inside = clip_gradient(grad, x, self.t)
        bent = self.phi_backward(inside, x)

        def gap() -> Tensor:
            y = x.clamp(-self.t, self.t)
            return self.phi(y) - y

        measured = self.blend.gradients(inside, bent, gap)  # before bent is overwritten
        return self._blended(inside, bent, x), *measured

    def _blended(self, inside: Tensor, bent: Tensor, x: Tensor) -> Tensor:
        # In half precision 1 - a is to be rounded, not a: at the end of training it is the small one.
        line = 1.0 - self.blend.weight(x)
        return bent.lerp_(inside, line.to(bent.dtype) if isinstance(line, Tensor) else line)

    def extra_repr(self) -> str:
        k = f"{self.k:g}" if self.k_start is None else f"{self.k_start:g}..{self.k:g}"
        return f"k={k}, t={self.t:g}" + ("" if self.normalized else ", normalized=False")


def _of(function: str, k: Tensor | float) -> Any:
    """tanh or atan of a number, or of a tensor."""
    return getattr(k, function)() if isinstance(k, Tensor) else getattr(math, function)(k)


@register("ab_tanh")
class ABTanh(AdaptiveBlend):
    """AB-Tanh-STE: the adaptive blend of a line and a tanh.

    F(x) = (1 - a) x + a phi(x), phi(x) = tanh(k x) / tanh(k);
    F'(x) = (1 - a) + a k (1 - tanh(k x)^2) / tanh(k) where |x| <= t, else 0 (and F is constant there).

    At a = 0 this is STE clipped at t. The linear part keeps the slope at 1 - a or more everywhere inside the clip
    (stability); phi brings F closer to sign (a smaller estimating error).

    Schedule: a rises from a_start to a_end as a_start + (a_end - a_start) (1 - cos(pi p / 2)), p being the fraction of
    training done, unless ``blend`` says otherwise. k is constant, or rises from k_start to k along the same cosine.

    Applied to weights and activations. The abstract of the paper reports networks with binarised parameters and says
    nothing of activations.

    Args:
        k: sharpness of phi. Default 2 for weights and activations: sharp enough to differ from the line (phi's slope
            at 0 is 2.07), and wide enough that standardised inputs do not all saturate.
        t: clip. Default 3 for weights: latents are standardised, so about 0.3 % of a Gaussian's lie beyond and the
            clip only guards against outliers, where a tighter one would freeze the largest weights. Default 1.5 for
            activations, taken after division by their running RMS: there the clip matters first; without it the
            linear floor passes gradient to units whose sign can not change, and accuracy falls by many points.
        blend: how a adapts: ``"progress"`` (default), ``"constant"`` (a = a_end throughout), ``"gate"``,
            ``"learned"``, ``"equilibrium"``, a table of such a name and arguments, or a
            :class:`~abste.estimators.Blend`, which overrides a_start and a_end.
        a_start: blend at the start, in [0, 1]. Default 0 for weights and activations: training starts as STE, whose
            gradient is the most stable.
        a_end: blend at the end, in [0, 1]. Default 0.9 for weights and activations: close to phi alone, whose
            estimating error is the smallest, but with a tenth of the line left as a floor under the slope.
        normalized: phi passes through (1, 1), so F is never further from sign than x is (if t >= 1); if False,
            phi(x) is tanh(k x), which saturates at ±1.
        k_start: sharpness at the start, in [1e-6, k], of a k that rises: k_start + (k - k_start) (1 - cos(pi p / 2)).
            Default None: k is constant, so that a alone says how far F is from the line.

    The defaults come from one-seed pilots, not from a ranking.

    Raises:
        ConfigError: an argument out of range or of the wrong type; an unknown blend.

    Source: Gupta and Kumar, AB-STE, ECML-PKDD 2025, doi 10.1007/978-3-032-06066-2_8. The full text is not public:
    abstract and title give the ingredients (a linear part, tanh, an adaptive blend); the convex form, the
    normalisation, the schedule, the clip and every default are our own reading, a candidate for what the paper means.
    """

    defaults = {
        "k": {"weights": 2.0, "activations": 2.0},
        "t": {"weights": 3.0, "activations": 1.5},
        "a_start": {"weights": 0.0, "activations": 0.0},
        "a_end": {"weights": 0.9, "activations": 0.9},
    }

    def phi(self, x: Tensor) -> Tensor:
        k = self.sharpness(x)
        return torch.tanh(k * x) / (_of("tanh", k) if self.normalized else 1.0)

    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        k = self.sharpness(x)
        return tanh_backward(grad, x, k, k / (_of("tanh", k) if self.normalized else 1.0))


@register("ab_arctan")
class ABArcTan(AdaptiveBlend):
    """AB-ArcTan-STE: the adaptive blend of a line and an arctan.

    F(x) = (1 - a) x + a phi(x), phi(x) = atan(k x) / atan(k);
    F'(x) = (1 - a) + a k / (atan(k) (1 + (k x)^2)) where |x| <= t, else 0 (and F is constant there).

    At a = 0 this is STE clipped at t. The linear part keeps the slope at 1 - a or more everywhere inside the clip
    (stability); phi brings F closer to sign (a smaller estimating error).

    Schedule: a rises from a_start to a_end as a_start + (a_end - a_start) (1 - cos(pi p / 2)), p being the fraction of
    training done, unless ``blend`` says otherwise. k is constant, or rises from k_start to k along the same cosine.

    Applied to weights and activations. The abstract of the paper reports networks with binarised parameters and says
    nothing of activations.

    Args:
        k: sharpness of phi. Default 2.5 for weights and activations, which gives phi about the slope at 0 (2.10) that
            :class:`ABTanh`'s has at its default of 2.
        t: clip. Default 3 for weights and 1.5 for activations, for the reasons given in :class:`ABTanh`.
        blend: how a adapts: ``"progress"`` (default), ``"constant"`` (a = a_end throughout), ``"gate"``,
            ``"learned"``, ``"equilibrium"``, a table of such a name and arguments, or a
            :class:`~abste.estimators.Blend`, which overrides a_start and a_end.
        a_start: blend at the start, in [0, 1]. Default 0 for weights and activations, as in :class:`ABTanh`.
        a_end: blend at the end, in [0, 1]. Default 0.9 for weights and activations, as in :class:`ABTanh`.
        normalized: phi passes through (1, 1), so F is never further from sign than x is (if t >= 1); if False,
            phi(x) is (2 / pi) atan(pi k x / 2), which saturates at ±1 and whose slope is k / (1 + (pi k x / 2)^2).
        k_start: sharpness at the start, in [1e-6, k]; default None, k is constant. As in :class:`ABTanh`.

    Raises:
        ConfigError: an argument out of range or of the wrong type; an unknown blend.

    Source: Gupta and Kumar, AB-STE, ECML-PKDD 2025, doi 10.1007/978-3-032-06066-2_8. The full text is not public:
    abstract and title give the ingredients (a linear part, arctan, an adaptive blend); the convex form, the
    normalisation, the schedule, the clip and every default are our own reading, a candidate for what the paper means.
    """

    defaults = {
        "k": {"weights": 2.5, "activations": 2.5},
        "t": {"weights": 3.0, "activations": 1.5},
        "a_start": {"weights": 0.0, "activations": 0.0},
        "a_end": {"weights": 0.9, "activations": 0.9},
    }

    def phi(self, x: Tensor) -> Tensor:
        k = self.sharpness(x)
        if self.normalized:
            return torch.atan(k * x) / _of("atan", k)
        return torch.atan((math.pi / 2) * k * x) * (2 / math.pi)

    def phi_backward(self, grad: Tensor, x: Tensor) -> Tensor:
        k = self.sharpness(x)
        inner, outer = (k, _of("atan", k)) if self.normalized else (math.pi / 2 * k, 1.0)
        # Dividing the numerator and the denominator by k / outer saves a pass; the clip keeps x small enough for
        # half precision wherever grad is not zero.
        denominator = x.square().mul_(inner * inner * outer / k).add_(outer / k)
        return torch.div(grad, denominator, out=denominator)
