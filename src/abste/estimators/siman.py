"""SiMaN's sign-to-magnitude, for weights."""

from __future__ import annotations

import torch
from torch import Tensor

from abste.estimators.base import Estimator, filters, register


@register("siman")
class SiMaN(Estimator):
    """Binarises by magnitude: +1 for the larger half of each filter's |x|, -1 for the rest, whatever their signs.

    The binary value is +1 where |x| > m, else -1, m being the median of |x| over the filter (the first dimension counts
    filters; of an even number of weights the lower of the two in the middle). Half of the weights are +1, less one in
    an odd number, and less where several equal the median.

    F(x) = |x| - m; F'(x) = sign(x), and 0 at 0. m counts as a constant. Not monotone: the slope is negative for
    negative x, where a larger x is a smaller magnitude.

    Schedule: none. Clip: none. Its authors apply it to weights, standardised per filter, with learned scales
    (``scale="learned"``); activations, for which they have :class:`~abste.estimators.ApproxSign` (standardised per
    sample), are refused: what is large has no filter there, and would be no plain bit.

    Source: Lin et al., SiMaN, arXiv 2102.07981; formula as in the authors' code (lmbxmu/SiMaN,
    cifar/modules/binarized_modules.py and imagenet/modules/binarized_modules.py). The former takes exactly half of the
    filter, by sorting, where equal magnitudes fall either way, and so does the latter by default; its other option is
    the median, as here. Their code also clamps the latents to percentiles (0 and 100 by default, which is none) and
    keeps the binary weights as state. Where a filter has a single weight we take the median over all.
    """

    odd = False
    monotone = False
    plain_bits = False
    roles = ("weights",)

    def excess(self, x: Tensor) -> Tensor:
        """|x| - m."""
        size = filters(x).abs()
        if size.numel():  # not torch.median, which is not deterministic on every device
            ordered = size.detach().sort(1).values
            size = size - ordered[:, (size.shape[1] - 1) // 2].unsqueeze(1)
        return size.view(x.shape)

    def binarize(self, x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        above = torch.gt(self.excess(x.detach()), 0)
        return above.to(x.dtype if dtype is None else dtype).mul_(2).sub_(1)

    def surrogate(self, x: Tensor) -> Tensor:
        return self.excess(x)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        return grad * torch.sign(x)
