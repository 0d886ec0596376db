"""The magnitude-aware sign of Bi-Real Net, for weights."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.estimators.base import Estimator, clip_gradient, filters, register


@register("magnitude_aware_sign")
class MagnitudeAwareSign(Estimator):
    """Clipped STE whose slope is the mean magnitude of the filter.

    F(x) = alpha clip(x, -t, t); F'(x) = alpha where |x| <= t, else 0. alpha is the mean of |x| over each filter (the
    first dimension counts them), as it is in this backward; in F it counts as a constant.

    Schedule: none. Clip: t. Its authors apply it to weights, and so does this: activations, for which they have
    :class:`~abste.estimators.ApproxSign`, have no filters.

    It belongs to a layer whose forward is ±1 alone (``scale=None``), with raw latents (``standardize=False``); those of
    standardised latents have about the same alpha everywhere. Under ``scale="channel"`` the layer itself multiplies
    the gradient by mean |latent|, once: there ``STE(t=1)`` is the magnitude-aware sign of the paper and of larq, whose
    binary weights are ±alpha, and this would multiply twice.

    Args:
        t: clip. Default 3 for weights, as for :class:`~abste.estimators.STE`, for standardised latents; larq's is 1,
            for raw ones.

    Source: Liu et al., Bi-Real Net, arXiv 1808.00278, section 3.3; formula as in larq (larq/quantizers.py,
    magnitude_aware_sign), whose filters are counted by the last dimension. The authors' code for PyTorch
    (liuzechun/Bi-Real-net) scales the forward by alpha but not the gradient, other than the paper. Where a filter has
    a single weight we take the mean over all, as for standardised latents; alpha counts as 6e4 at most, for float16.
    """

    roles = ("weights",)
    defaults = {"t": {"weights": 3.0}}

    def __init__(self, t: float | None = None) -> None:
        super().__init__(t=t)

    def _scaled(self, y: Tensor, x: Tensor) -> Tensor:
        rows = filters(x.detach())
        alpha = rows.abs().mean(1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32)).clamp(max=6e4)
        return (y.reshape(rows.shape) * alpha.to(y.dtype)).view(x.shape)

    def surrogate(self, x: Tensor) -> Tensor:
        return self._scaled(x.clamp(-self.t, self.t), x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return self._scaled(clip_gradient(grad, x, self.t), x)
