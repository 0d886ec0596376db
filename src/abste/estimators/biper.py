"""BiPer, binarisation by a periodic function."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Estimator, register, sign


@register("biper")
class BiPer(Estimator):
    """Square wave forward, sine backward: the binary value is sign(sin(omega x)), not sign(x).

    F(x) = sin(omega x); F'(x) = omega cos(omega x). Not monotone: along x the binary value flips every pi / omega, and
    the slope is negative half of the time.

    Schedule: none. Clip: none. Its authors apply it to weights, raw, of standard deviation well below 1 / omega;
    activations have :class:`~abste.estimators.ApproxSign`. This is the second of their two stages: the first trains
    with sin(omega w) itself in the forward and gives the second its initial weights. That stage and their regulariser,
    the mean of sin(omega w)^2, belong to the training and are left out here.

    Args:
        omega: angular frequency, in [1e-6, 1e4]. Default 20 for weights, as in the authors' scripts for CIFAR-10 and
            ImageNet (the option itself has 30), for raw latents (``standardize=False``): standardised ones it would
            cut into stripes of a sixth of their standard deviation, and about 1 is in proportion there. Default 1 for
            activations, which it sees at unit RMS: our own, since its authors do not apply it there. Binary
            activations of this kind are no plain bits, and a network with them cannot be packed.

    Source: Vargas et al., BiPer, arXiv 2404.01278; formula and defaults are those of the authors' code (edmav4/BiPer,
    cifar10/modules/binarized_modules.py, run_stg1.sh). Where |omega x| > 1e6 we hold it there, since float32 has no
    meaningful sine.
    """

    monotone = False
    plain_bits = False
    defaults = {"omega": {"weights": 20.0, "activations": 1.0}}
    omega: float

    def __init__(self, omega: float | None = None) -> None:
        super().__init__(omega=omega)

    def check(self) -> None:
        super().check()
        if not 1e-6 <= self.omega <= 1e4:  # a slope that float16 can hold
            raise ConfigError(f"BiPer: omega must lie in [1e-6, 1e4], got {self.omega}.")

    def phase(self, x: Tensor) -> Tensor:
        """omega x, in float32 or better: half precision would round it by as much as a period."""
        return (x.to(torch.promote_types(x.dtype, torch.float32)) * self.omega).clamp(-1e6, 1e6)

    def binarize(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        return sign(torch.sin(self.phase(x.detach())), x.dtype if dtype is None else dtype)

    def surrogate(self, x: Tensor) -> Tensor:
        return torch.sin(self.phase(x)).to(x.dtype)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad * (torch.cos(self.phase(x)) * self.omega).to(grad.dtype)
