"""The one contraction under every binary layer, with a backward that keeps x and not its sign."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from abste.estimators import Binarizer, sign


@dataclass(frozen=True)
class Convolution:
    """Geometry of a 1-d or 2-d convolution; ``border`` is the explicit padding in the order of ``torch.nn.functional.pad``."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    border: tuple[int, ...] | None = None
    pad_value: float = 0.0

    def pad(self, x: Tensor) -> Tensor:
        return x if self.border is None else F.pad(x, self.border, value=self.pad_value)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        convolve = F.conv1d if x.dim() == 3 else F.conv2d
        return convolve(self.pad(x), weight, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad,
            self.pad(x),
            weight,
            None,
            self.stride,
            self.padding,
            self.dilation,
            False,
            [0] * len(self.stride),
            self.groups,
            (need_x, need_weight, False),
        )
        if need_x and self.border is not None:
            grad_x = F.pad(grad_x, [-side for side in self.border])
        return grad_x, grad_weight

    def per_channel(self, values: Tensor) -> Tensor:
        """A vector over output channels, shaped to multiply an output."""
        return values.view(-1, *([1] * len(self.stride)))


@dataclass(frozen=True)
class Product:
    """y = x W^T, as in ``torch.nn.Linear``, for x of any number of leading dimensions."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(x, weight)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        grad_weight = grad.flatten(0, -2).t() @ x.flatten(0, -2) if need_weight else None
        return grad @ weight if need_x else None, grad_weight

    def per_channel(self, values: Tensor) -> Tensor:
        return values


Contraction = Convolution | Product


class _Contract(torch.autograd.Function):
    """y = scale * contraction(sign(x) or x, weight).

    Two things plain autograd would not do: it keeps x alone and takes its sign again in the backward, and it applies
    the scale to the small weight there rather than to the large gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scale: Tensor | None,
        inverse_rms: Tensor | None,
        binarizer: Binarizer | None,
        op: Contraction,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, scale, inverse_rms)
        ctx.binarizer, ctx.op = binarizer, op
        y = op.forward(x if binarizer is None else sign(x, weight.dtype), weight)
        return y if scale is None else y.mul_(op.per_channel(scale.to(y.dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, inverse_rms = ctx.saved_tensors
        binarizer, op = ctx.binarizer, ctx.op
        need_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        factor: Tensor | None = None if scale is None else scale.to(weight.dtype)
        if inverse_rms is not None and need_x:
            # d sign(x / r) / dx is the slope at x / r, divided by r: on the weight that costs nothing.
            r = inverse_rms.to(weight.dtype)
            factor_x = r if factor is None else factor * r
        else:
            factor_x = factor
        back = weight if factor_x is None else weight * factor_x.view(-1, *([1] * (weight.dim() - 1)))
        signs = x if binarizer is None else sign(x, weight.dtype)
        grad_x, grad_weight = op.backward(grad, signs, back, need_x, need_weight or need_scale)
        grad_scale = None
        if need_scale:
            grad_scale = (grad_weight.float() * weight.float()).flatten(1).sum(1)  # type: ignore[union-attr]
            grad_scale = grad_scale.sum_to_size(scale.shape)
        if need_weight and factor is not None:
            grad_weight = grad_weight * factor.view(-1, *([1] * (weight.dim() - 1)))  # type: ignore[operator]
        if need_x and binarizer is not None:
            seen = x if inverse_rms is None else x * inverse_rms.to(x.dtype)
            grad_x = binarizer.backward(cast(Tensor, grad_x).to(x.dtype), seen)
        return grad_x, grad_weight if need_weight else None, grad_scale, None, None, None


def contract(
    x: Tensor,
    weight: Tensor,
    op: Contraction,
    scale: Tensor | None = None,
    binarizer: Binarizer | None = None,
    inverse_rms: Tensor | None = None,
) -> Tensor:
    """scale * contraction(x, weight), x being binarised on the way where a binarizer is given.

    Args:
        x: input of a convolution (N, C, ...) or of a linear layer (..., in).
        weight: its weight, usually ±1; float.
        op: which contraction.
        scale: (1,) or (out,), multiplies the sum per output channel.
        binarizer: of x; None leaves x in full precision.
        inverse_rms: scalar; the slope of the binarizer is taken at x times this.

    Returns:
        The output, in the dtype of autocast where that is on, else in the weight's.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    if binarizer is None:
        x = x.to(weight.dtype)
    return cast(Tensor, _Contract.apply(x, weight, scale, inverse_rms, binarizer, op))
