"""SwishSign, the sign of BNN+."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Estimator, register


@register("swish_sign")
class SwishSign(Estimator):
    """SignSwish: twice the derivative of the swish function, less one. It overshoots ±1.

    F(x) = 2 g (1 + beta x (1 - g)) - 1, g being the logistic function at beta x;
    F'(x) = beta (2 - beta x tanh(beta x / 2)) / (1 + cosh(beta x)), which is beta at 0.

    Not monotone: the slope is negative where |beta x| > 2.3994, least (-0.0738 beta) at |beta x| = 3.4358, and F
    reaches its extremes, ±1.1997, where it is zero.

    Schedule: none. Clip: none. Its authors apply it to weights and activations, with a regulariser that draws the
    latents to ±a learned scale; that is a part of the loss and left out here.

    Args:
        beta: sharpness, in [1e-6, 1e4]. Default 5 for weights and activations, as in larq, for want of another
            documented value; at that the slope changes its sign at |x| = 0.48.

    Source: Darabi et al., BNN+ (later: Regularized Binary Network Training), arXiv 1812.11800, whose code is not
    public: F' is that of larq's SwishSign, and it is the derivative of F, as a test derives.
    """

    monotone = False
    defaults = {"beta": {"weights": 5.0, "activations": 5.0}}
    beta: float

    def __init__(self, beta: float | None = None) -> None:
        super().__init__(beta=beta)

    def check(self) -> None:
        super().check()
        if not 1e-6 <= self.beta <= 1e4:  # a slope that float16 can hold
            raise ConfigError(f"SwishSign: beta must lie in [1e-6, 1e4], got {self.beta}.")

    def surrogate(self, x: Tensor) -> Tensor:
        # With T = tanh(beta x / 2), g = (1 + T) / 2. Beyond the limit T is ±1, and zero must not meet infinity.
        z = (0.5 * self.beta * x).clamp(-500.0, 500.0)
        return torch.tanh(z) + z * (1.0 - torch.tanh(z).square())

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        # 1 / (1 + cosh(z)) = 2 p (1 - p) and tanh(z / 2) = 1 - 2 p with p = sigmoid(-z): nothing overflows. Where the
        # slope changes its sign half precision would have no correct digit.
        z = x.abs().to(torch.promote_types(x.dtype, torch.float32)).mul_(self.beta).clamp_(max=1e3)
        p = torch.sigmoid(-z)
        slope = 2.0 * self.beta * p * (1.0 - p) * (2.0 - z * (1.0 - 2.0 * p))
        return grad * slope.to(grad.dtype)
