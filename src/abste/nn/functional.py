"""The one contraction under every binary layer, with a backward that keeps x and not its sign."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from abste.estimators import Binarizer
from abste.estimators.base import taps_for

_FEW_OUTPUTS = 16  # places per image up to which the gradient of a weight is a product of matrices, on a CPU


@dataclass(frozen=True)
class Convolution:
    """Geometry of a 1-d or 2-d convolution.

    ``border`` is padding done explicitly, with ``pad_value``, in the order of ``torch.nn.functional.pad``.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    border: tuple[int, ...] | None = None
    pad_value: float = 0.0

    def _padded(self, x: Tensor) -> Tensor:
        return x if self.border is None else F.pad(x, self.border, value=self.pad_value)

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sums: (N, out, ...)."""
        convolve = F.conv1d if x.dim() == 3 else F.conv2d
        return convolve(self._padded(x), weight, None, self.stride, self.padding, self.dilation, self.groups)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to x and weight, where needed."""
        grad_x = grad_weight = None
        by_product = need_weight and self._few_outputs(grad)
        if need_x or not by_product:
            grad_x, grad_weight, _ = torch.ops.aten.convolution_backward(
                grad,
                self._padded(x),
                weight,
                None,
                self.stride,
                self.padding,
                self.dilation,
                False,
                [0] * len(self.stride),
                self.groups,
                (need_x, need_weight and not by_product, False),
            )
        if by_product:
            grad_weight = self._weight_gradient(grad, x, weight.shape[2:])
        if grad_x is not None and self.border is not None:
            grad_x = F.pad(grad_x, [-side for side in self.border])
        return grad_x, grad_weight

    def _few_outputs(self, grad: Tensor) -> bool:
        """Whether oneDNN takes longer than :meth:`_weight_gradient`: see benchmarks/weight_gradient.py."""
        return grad.device.type == "cpu" and self.groups == 1 and 0 < math.prod(grad.shape[2:]) <= _FEW_OUTPUTS

    def _weight_gradient(self, grad: Tensor, x: Tensor, kernel: tuple[int, ...]) -> Tensor:
        """With respect to the weight, as a product of the gradient and what the window sees at each place."""
        sides = [side for padding in reversed(self.padding) for side in (padding, padding)]
        last = F.pad(self._padded(x), sides).movedim(1, -1).contiguous()
        images, *places, channel = last.stride()
        steps = [place * stride for place, stride in zip(places, self.stride, strict=True)]
        inside = [place * dilation for place, dilation in zip(places, self.dilation, strict=True)]
        size = (x.shape[0], *grad.shape[2:], *kernel, x.shape[1])
        seen = last.as_strided(size, (images, *steps, *inside, channel))
        rows = grad.movedim(1, -1).reshape(-1, grad.shape[1])
        product = rows.t() @ seen.reshape(rows.shape[0], math.prod(kernel) * x.shape[1])
        return product.view(grad.shape[1], *kernel, x.shape[1]).movedim(-1, 1)

    def per_channel(self, values: Tensor) -> Tensor:
        """A vector over output channels, shaped to multiply an output."""
        return values.view(-1, *([1] * len(self.stride)))


@dataclass(frozen=True)
class Product:
    """y = x W^T, as in ``torch.nn.Linear``, for x of any number of leading dimensions."""

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """The sums: (..., out)."""
        return F.linear(x, weight)

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool
    ) -> tuple[Tensor | None, Tensor | None]:
        """The gradients with respect to x and weight, where needed."""
        grad_weight = None
        if need_weight:
            grad_weight = grad.reshape(-1, weight.shape[0]).t() @ x.reshape(-1, weight.shape[1])
        return grad @ weight if need_x else None, grad_weight

    def per_channel(self, values: Tensor) -> Tensor:
        """A vector over output features, shaped to multiply an output."""
        return values


Contraction = Convolution | Product


def _per_filter(weight: Tensor, *factors: Tensor | None) -> Tensor:
    """The weight times the factors, each one number or one per filter; itself where all are None."""
    given = [factor.to(weight.dtype) for factor in factors if factor is not None]
    if not given:
        return weight
    factor = given[0] if len(given) == 1 else given[0] * given[1]
    return weight * factor.view(-1, *([1] * (weight.dim() - 1)))


def _binary(x: Tensor, inverse_rms: Tensor | None, binarizer: Binarizer, dtype: torch.dtype) -> Tensor:
    """±1. What is not the sign is taken at x / rms, as in BinaryActivation; the sign does not depend on that."""
    return binarizer.binarize(x if binarizer.is_sign or inverse_rms is None else x * inverse_rms.to(x.dtype), dtype)


class _Contract(torch.autograd.Function):
    """y = scale * contraction(binary value of x or x, weight).

    Two things plain autograd would not do: it keeps x alone and binarises it again in the backward (but for bits that
    were drawn, which it keeps), and it applies the scale to the small weight rather than to something large. In the
    forward it does that where x is in full precision; ±1 are summed first, which is exact.
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
        *taps: Tensor,
    ) -> Tensor:
        ctx.binarizer, ctx.op = binarizer, op
        if binarizer is None:
            ctx.save_for_backward(x, weight, scale, inverse_rms, None)
            return op.forward(x, _per_filter(weight, scale))
        bits = _binary(x, inverse_rms, binarizer, weight.dtype)
        ctx.save_for_backward(x, weight, scale, inverse_rms, bits if binarizer.stochastic else None)
        y = op.forward(bits, weight)
        return y if scale is None else y.mul_(op.per_channel(scale.to(y.dtype)))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, inverse_rms, bits = ctx.saved_tensors
        binarizer, op = ctx.binarizer, ctx.op
        need_x, need_weight, need_scale = ctx.needs_input_grad[:3]
        need_taps = any(ctx.needs_input_grad[6:])
        grad_taps: tuple[Tensor | None, ...] = (None,) * len(ctx.needs_input_grad[6:])

        # d binary(x / r) / dx is the slope at x / r, divided by r: on the weight that costs nothing.
        back = _per_filter(weight, scale, inverse_rms if need_x or need_taps else None)
        if bits is None:
            bits = x if binarizer is None else _binary(x, inverse_rms, binarizer, weight.dtype)
        grad_x, grad_weight = op.backward(grad, bits, back, need_x or need_taps, need_weight or need_scale)
        del bits  # its memory serves the estimator
        grad_scale = None
        if need_scale:
            wide = torch.promote_types(weight.dtype, torch.float32)
            grad_scale = (grad_weight.to(wide) * weight.to(wide)).flatten(1).sum(1).sum_to_size(scale.shape)
        grad_weight = _per_filter(grad_weight, scale) if need_weight else None
        if (need_x or need_taps) and binarizer is not None:
            seen = x if inverse_rms is None else x * inverse_rms.to(x.dtype)
            grad_x = grad_x.to(x.dtype)
            if need_taps:
                grad_x, *measured = binarizer.gradients(grad_x, seen)
                # What is learned wants the gradient of the binary value itself, without 1 / rms.
                grad_taps = tuple(g if inverse_rms is None else g / inverse_rms.to(g.dtype) for g in measured)
            else:
                grad_x = binarizer.backward(grad_x, seen)
        return grad_x if need_x else None, grad_weight, grad_scale, None, None, None, *grad_taps


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
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        weight = weight.to(torch.get_autocast_dtype(device))
    if binarizer is None:
        x = x.to(weight.dtype)
    taps = () if binarizer is None else taps_for(binarizer, x)
    return cast(Tensor, _Contract.apply(x, weight, scale, inverse_rms, binarizer, op, *taps))
