"""Stochastic binarisation, of BinaryConnect and BinaryNet."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.estimators.base import Estimator, clip_gradient, register, sign


@register("stochastic_sign")
class StochasticSign(Estimator):
    """In training +1 with probability clip((x + 1) / 2, 0, 1), else -1; in evaluation sign(x).

    F(x) = clip(x, -t, t); F'(x) = 1 where |x| <= t, else 0. At t = 1, F is the expectation of the binary value, so
    that the gradient is that of the expectation.

    Schedule: none. Applied to weights, anew at every forward pass, by the authors of BinaryConnect, and to activations
    in training by those of BinaryNet, in some of their experiments. A layer that binarises activations keeps the drawn
    bits for the backward, in its own dtype.

    Args:
        t: clip. Default 1 for weights and activations: beyond, the binary value is no longer random. With raw latents
            (``standardize=False``) the layer then clamps them to ±1, as BinaryConnect does. Infinity gives
            BinaryConnect's own backward, the identity. Activations are drawn at unit RMS unless the layer has
            ``normalize=False``, as BinaryNet has.

    The random numbers come from torch's global generator. They are float32 for half precision too, so that the
    probability is right to 2^-24.

    Source: Courbariaux et al., BinaryConnect, arXiv 1511.00363, sections 2.2 to 2.4 (identity, latents clipped);
    Hubara et al., Binarized Neural Networks, arXiv 1602.02830, sections 1.1 and 1.3 (slope clipped at 1). The
    clip at any t is our generalisation.
    """

    stochastic = True
    defaults = {"t": {"weights": 1.0, "activations": 1.0}}

    def __init__(self, t: float | None = None) -> None:
        super().__init__(t=t)

    def binarize(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not self.training:
            return sign(x, dtype)
        # With u in [0, 1), x > 2 u - 1 always holds at 1 and never at -1.
        x = x.detach()
        threshold = torch.rand_like(x, dtype=torch.promote_types(x.dtype, torch.float32)).mul_(2).sub_(1)
        return torch.gt(x, threshold).to(x.dtype if dtype is None else dtype).mul_(2).sub_(1)

    def surrogate(self, x: Tensor) -> Tensor:
        return x.clamp(-self.t, self.t)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return clip_gradient(grad, x, self.t)
