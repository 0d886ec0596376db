"""DSQ, differentiable soft quantization, at one bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.estimators.base import Estimator, clip_gradient, register, tanh_backward


@register("dsq")
class DSQ(Estimator):
    """Tanh through (t, 1) and (-t, -1) whose sharpness each layer learns.

    F(x) = tanh(k x) / (1 - alpha), k = ln(2 / alpha - 1) / (2 t); F'(x) = k (1 - tanh(k x)^2) / (1 - alpha) where
    |x| <= t, else 0 (and F is constant there). tanh(k t) is 1 - alpha. As alpha goes to 1, F becomes the line x / t,
    whose slope is that of STE divided by t; as it goes to 0, sign(x).

    alpha = sigmoid(theta), theta being a parameter of each layer. dL/dalpha is the sum of dL/dsign(x) dF/dalpha inside
    the clip: what F would pass on if it were the forward. (The forward is sign(x), which does not depend on alpha.)

    Schedule: none; alpha is learned. Clip: t. Its authors apply it to weights and activations.

    Args:
        alpha: where it starts, between 0 and 1. Default 0.2 for weights and activations, as in the port.
        t: clip, in [1e-3, 1e4]; the quantised interval is [-t, t]. Default 3 for weights and 1.5 for activations, as
            for :class:`~abste.estimators.STE`.

    Source: Gong et al., DSQ, arXiv 1908.05033. Its authors published no code for training; formulas and the start of
    alpha are those of an unofficial port (ricky40403/DSQ, DSQConv.py), which learns alpha itself, held below 2, and
    starts with an interval that clips nothing. At one bit there is one interval, [l, u]. The paper learns l and u,
    between which its quantised values lie; ours are ±1, and our inputs have a known scale, so that we hold the two at
    -t and t. theta is our own: alpha can not leave its range. k t is held in [0.02, 50], so that float32 can tell F
    from the line. The paper's penalty on alpha belongs to the loss and is left out.
    """

    defaults = {"alpha": {"weights": 0.2, "activations": 0.2}, "t": {"weights": 3.0, "activations": 1.5}}
    alpha: float

    def __init__(self, alpha: float | None = None, t: float | None = None) -> None:
        super().__init__(alpha=alpha, t=t)
        self.theta = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to where alpha starts."""
        self.theta.fill_(math.log(self.alpha / (1.0 - self.alpha)))

    def check(self) -> None:
        super().check()
        if not (0 < self.alpha < 1 and 1e-3 <= self.t <= 1e4):  # a slope that float16 can hold
            raise ConfigError(f"DSQ: needs 0 < alpha < 1 and 1e-3 <= t <= 1e4, got alpha={self.alpha} and t={self.t}.")

    def reach(self) -> Tensor:
        """The present k t, a float32 scalar."""
        return (0.5 * torch.log1p(2.0 * torch.exp(-self.theta.float()))).clamp(0.02, 50.0)

    def surrogate(self, x: Tensor) -> Tensor:
        reach = self.reach().to(x.dtype)
        return torch.tanh(x.clamp(-self.t, self.t) * (reach / self.t)) / torch.tanh(reach)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        reach = self.reach().detach()
        k = reach / self.t
        return tanh_backward(clip_gradient(grad, x, self.t), x, k, k / torch.tanh(reach))

    def taps(self) -> tuple[Tensor, ...]:
        return (self.theta,)

    def gradients(self, grad: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        wide = torch.promote_types(x.dtype, torch.float32)
        reach, alpha = self.reach().detach().to(wide), torch.sigmoid(self.theta.detach().to(wide))
        u = x.to(wide).clamp(-self.t, self.t) / self.t
        inner, outer = torch.tanh(reach * u), torch.tanh(reach)
        by_reach = (u * (1.0 - inner.square()) - (inner / outer) * (1.0 - outer.square())) / outer
        total = (clip_gradient(grad, x, self.t).to(wide) * by_reach).sum()
        return self.backward(grad, x), (total * (alpha - 1.0) / (2.0 - alpha)).to(self.theta.dtype)
