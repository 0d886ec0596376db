"""ApproxSign of Bi-Real Net."""

from __future__ import annotations

from torch import Tensor

from abste.estimators.base import Estimator, register


@register("approx_sign")
class ApproxSign(Estimator):
    """Piecewise quadratic surrogate of sign.

    F(x) = x (2 - |x|) where |x| < 1, else sign(x); F'(x) = max(2 - 2|x|, 0).

    Schedule: none. Clip: t = 1, where the slope reaches zero. Its authors apply it to activations only; on weights it
    loses to STE at short budgets.

    Source: Liu et al., Bi-Real Net, arXiv 1808.00278, equations 5 and 6.
    """

    t = 1.0

    def surrogate(self, x: Tensor) -> Tensor:
        y = x.clamp(-1.0, 1.0)
        return y * (2.0 - y.abs())

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return x.abs().mul_(-2.0).add_(2.0).clamp_(min=0.0).mul_(grad)
