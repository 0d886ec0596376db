"""The shape-removed control: another estimator with nothing left of its slope but the mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Binarizer, Estimator, Role, build, clip_gradient, register


@register("shape_removed")
class ShapeRemoved(Estimator):
    """The control that goes with every claim for an estimator: same clip, same mean slope, no shape.

    F(x) = m clip(x, -t, t); F'(x) = m where |x| <= t, else 0. t is the clip of the estimator ``of`` which it stands in
    for, and m the mean of that estimator's slope over the numbers of x inside the clip: of this layer, in this
    backward pass; in F it counts as a constant. Without any such number the slope is zero.

    What ``of`` gains over this it gains by the shape of its slope, and not by the size of the steps that its slope
    makes of the same gradients, nor by its clip. Where gradient and x are uncorrelated, both pass on the same
    gradient in the mean.

    Schedule: that of ``of``, which is annealed, learns and measures as if it were in use. Clip: that of ``of``. The
    binary value is that of ``of``, too. Applied to weights and activations, wherever ``of`` is. In distributed
    training each process takes the mean of its own part.

    Args:
        of: the estimator, a name, a table or an object (copied). Default ``"ab_tanh"``, about which the claims of
            this library are. The slope of one that is not linear in the gradient is that for a positive gradient.

    Raises:
        ConfigError: ``of`` is None or stands for no estimator.

    Source: our own, after Schoenbauer et al., arXiv 2405.05171, who show that for small learning rates weight
    estimators equal STE at another learning rate: a control that keeps the step size tells the two apart.
    """

    of: Binarizer

    def __init__(self, of: str | Mapping[str, Any] | Binarizer = "ab_tanh") -> None:
        super().__init__()
        inner = build(of, "ShapeRemoved: of")
        if inner is None:
            raise ConfigError("ShapeRemoved: of must be the estimator to compare with, got None.")
        self.of = inner
        self._follow()

    def _follow(self) -> None:
        for name in ("t", "odd", "monotone", "plain_bits", "stochastic", "roles"):
            setattr(self, name, getattr(self.of, name))

    def set_role(self, role: Role) -> None:
        self.of.set_role(role)
        self._follow()

    @property
    def title(self) -> str:
        return f"{self.name} of {self.of.title}"

    def binarize(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return self.of.binarize(x, dtype)

    def mean_slope(self, x: Tensor) -> Tensor:
        """m, a scalar: float32, or float64 if x is."""
        ones = torch.ones_like(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        # Beyond the clip both are zero.
        count = clip_gradient(ones, x, self.t).sum(dtype=wide).clamp(min=1.0)
        return self.of.backward(ones, x).sum(dtype=wide) / count

    def surrogate(self, x: Tensor) -> Tensor:
        return x.clamp(-self.t, self.t) * self.mean_slope(x.detach()).to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return clip_gradient(grad, x, self.t) * self.mean_slope(x).to(grad.dtype)

    def taps(self) -> tuple[Tensor, ...]:
        return self.of.taps()

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        return self.backward(grad, x), *self.of.gradients(grad, x)[1:]
