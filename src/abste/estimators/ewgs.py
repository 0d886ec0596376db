"""EWGS, element-wise gradient scaling."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Binarizer, clip_gradient, register


@register("ewgs")
class EWGS(Binarizer):
    """Clipped STE that scales each gradient by how far x is from its binary value, and on which side.

    No F(x) = ... exists, since the backward is not linear in the gradient g: dL/dx = g F'(x) with
    F'(x) = 1 + delta sign(g) (x / t - sign(x)) / 2 where |x| <= t, else 0 (the slope is that for a positive g). A
    step that brings x nearer to its binary value is made larger, one that takes it towards zero smaller: with [-t, t]
    mapped to [0, 1] and x rounded there, half the bracket is the rounding error.

    Schedule: none here; the authors' other variant measures delta every ten epochs from a Hessian trace (3 batches,
    trace / (3 std(g)), not below 0), which takes a second backward and belongs to the training. Its authors apply it to
    weights and activations; binary activations are 0 and 1 in their networks.

    Args:
        delta: strength, in [0, 2], so that no gradient changes its sign; 0 is STE clipped at t. Default 0.001 for
            weights and activations, that of the authors' W1A1 script with fixed delta.
        t: clip, finite; the interval that is mapped to [0, 1]. Default 3 for weights, three standard deviations, where
            the authors' interval starts; it is learned from there, ours stays. Default 1.5 for activations, as for
            :class:`~abste.estimators.STE`: the authors' interval is that of rectified, not of signed values.

    Source: Lee et al., EWGS, arXiv 2104.00903; the formula is that of the authors' code (cvlab-yonsei/EWGS,
    CIFAR10/custom_modules.py, run.sh). The fixed interval and ±1 for activations are our own reading.
    """

    linear = False
    odd = False
    defaults = {"delta": {"weights": 0.001, "activations": 0.001}, "t": {"weights": 3.0, "activations": 1.5}}
    delta: float

    def __init__(self, delta: float | None = None, t: float | None = None) -> None:
        super().__init__(delta=delta, t=t)

    def check(self) -> None:
        super().check()
        if not (0 <= self.delta <= 2 and self.t <= 1e4):
            raise ConfigError(f"EWGS: needs 0 <= delta <= 2 and t <= 1e4, got delta={self.delta} and t={self.t}.")

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-self.t, self.t)
        error = wide / self.t - torch.where(wide >= 0, 1.0, -1.0)
        scale = 1.0 + (0.5 * self.delta) * torch.sign(grad) * error
        return clip_gradient(grad, x, self.t) * scale.to(grad.dtype)
