"""The straight-through estimators: clipped, which is what "STE" means here, and the identity."""

from __future__ import annotations

from torch import Tensor

from abste.estimators.base import Estimator, clip_gradient, register


@register("ste")
class STE(Estimator):
    """Clipped straight-through estimator (hard tanh).

    F(x) = clip(x, -t, t); F'(x) = 1 where |x| <= t, else 0.

    Schedule: none. Applied to weights and activations.

    Args:
        t: clip. Default 3 for weights and 1.5 for activations, as for AB-STE, so that the two differ by the blend
            alone. BinaryNet's t is 1, larq's QuickNet 1.25, ReSTE's 1.5: all for raw inputs.

    Source: Hubara et al., Binarized Neural Networks, arXiv 1602.02830, section 1.3. The clip at any t is our
    generalisation.
    """

    defaults = {"t": {"weights": 3.0, "activations": 1.5}}

    def __init__(self, t: float | None = None) -> None:
        super().__init__(t=t)

    def surrogate(self, x: Tensor) -> Tensor:
        return x.clamp(-self.t, self.t)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return clip_gradient(grad, x, self.t)


@register("identity_ste")
class IdentitySTE(Estimator):
    """Unclipped straight-through estimator.

    F(x) = x; F'(x) = 1.

    Schedule: none. Clip: none. Its authors apply it to weights only.

    Source: Courbariaux et al., BinaryConnect, arXiv 1511.00363, section 2.3. BinaryConnect also clips the latent
    weights to [-1, 1] after each update; that belongs to the layer, not to the estimator, and is not done for it.
    """

    def surrogate(self, x: Tensor) -> Tensor:
        return x

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad
