"""SigmoidSign, the activation estimator of A&B BNN."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Estimator, register


@register("sigmoid_sign")
class SigmoidSign(Estimator):
    """Logistic function, stretched to ±1.

    F(x) = 2 g - 1, g being the logistic function at k x; F'(x) = 2 k g (1 - g), which is k / 2 at 0. (The same as
    tanh(k x / 2): EDE at a sharpness held at k / 2 >= 1.)

    Schedule: none. Clip: none. Its authors apply it to activations only, raw; their weights have a clipped STE
    (``STE(t=1)``).

    Args:
        k: sharpness, in [1e-6, 1e4]. Default 3 for activations, that of the authors' code, and for weights too, for
            which there is no other.

    Source: Ma et al., A&B BNN, arXiv 2403.03739, whose public code (Ruichen0424/AB-BNN, Network/BNN.py) we follow.
    """

    defaults = {"k": {"weights": 3.0, "activations": 3.0}}
    k: float

    def __init__(self, k: float | None = None) -> None:
        super().__init__(k=k)

    def check(self) -> None:
        super().check()
        if not 1e-6 <= self.k <= 1e4:  # a slope that float16 can hold
            raise ConfigError(f"SigmoidSign: k must lie in [1e-6, 1e4], got {self.k}.")

    def surrogate(self, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.k * x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        # g (1 - g) is even: taken at -|x|, it keeps its relative precision in both tails. Half precision would round
        # the exponent.
        g = x.abs().to(torch.promote_types(x.dtype, torch.float32)).mul_(-self.k).sigmoid_()
        return grad * (g * (1.0 - g) * (2.0 * self.k)).to(grad.dtype)
