"""Pieces that methods add around a binary layer: learned shifts, activations, and the values that inputs take."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.estimators import Spec
from abste.estimators.base import number
from abste.nn.layers import BINARY_LAYERS, BinaryActivation, BinaryConv1d, BinaryConv2d, BinaryLinear


class ChannelShift(nn.Module):
    """A learned number per channel, added: x + shift_c.

    In front of a binary layer it moves the threshold of each channel: ``ChannelShift(64)`` and then
    ``BinaryConv2d(64, ..., activations="approx_sign")`` are ReActNet's RSign and convolution. A batch norm right before
    shifts as well; the piece is of use where the input comes from an addition or an activation.

    Shape: (N, C, ...), unchanged; with ``dim=-1`` (..., C).

    Args:
        channels: C.
        dim: where the channels are. Default 1.

    Raises:
        ConfigError: not a positive number of channels; an input with another number of them.

    Source: Liu et al., ReActNet, arXiv 2003.03488; the authors' code (liuzechun/ReActNet, class LearnableBias) starts
    at zero too.
    """

    def __init__(self, channels: int, *, dim: int = 1) -> None:
        super().__init__()
        _check_channels(self, channels)
        self.dim = dim
        self.shift = nn.Parameter(torch.zeros(channels))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to no shift."""
        self.shift.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Add."""
        return x + _per_channel(self, self.shift, x, self.dim)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.shift.numel()}" + (f", dim={self.dim}" if self.dim != 1 else "")


class RSign(nn.Module):
    """ReActNet's RSign: sign(x + shift_c), the shift being learned per channel.

    A :class:`ChannelShift` and then a :class:`~abste.nn.BinaryActivation`, for a layer that does not binarise its input
    itself. In front of one that does, ``ChannelShift`` alone gives the same, and less is kept for the backward.

    Shape: as in :class:`ChannelShift`; the output is ±1.

    Args:
        channels: C.
        estimator: of the sign. Default ApproxSign, the authors'.
        normalize, momentum: as in :class:`~abste.nn.BinaryActivation`. The authors take the slope at the input itself
            (``normalize=False``).
        dim: where the channels are. Default 1.

    Raises:
        ConfigError: an unknown estimator, or None; an input with another number of channels.

    Source: Liu et al., ReActNet, arXiv 2003.03488. The paper writes the threshold, sign(x - alpha_c); the authors' code
    adds, as we do. ``normalize`` is our own.
    """

    def __init__(
        self,
        channels: int,
        estimator: Spec = "approx_sign",
        *,
        normalize: bool = True,
        momentum: float = 0.1,
        dim: int = 1,
    ) -> None:
        super().__init__()
        self.before = ChannelShift(channels, dim=dim)
        self.activation = BinaryActivation(estimator, normalize=normalize, momentum=momentum)

    def forward(self, x: Tensor) -> Tensor:
        """sign(x + shift)."""
        y: Tensor = self.activation(self.before(x))
        return y


class RPReLU(nn.Sequential):
    """ReActNet's RPReLU: PReLU_c(x + before_c) + after_c, with the slope and both shifts learned per channel.

    Shape: (N, C, ...), unchanged.

    Args:
        channels: C.
        slope: of the negative side at the start. Default 0.25, that of :class:`torch.nn.PReLU`.

    Raises:
        ConfigError: not a positive number of channels; an input with another number of them.

    Source: Liu et al., ReActNet, arXiv 2003.03488. The paper subtracts the first shift; the authors' code adds it, as
    we do, and has the same starting values.
    """

    def __init__(self, channels: int, slope: float = 0.25) -> None:
        _check_channels(self, channels)
        super().__init__(
            OrderedDict(
                before=ChannelShift(channels),
                prelu=nn.PReLU(channels, number("RPReLU", "slope", slope)),
                after=ChannelShift(channels),
            )
        )


class Maxout(nn.Module):
    """AdaBin's activation: positive_c x where x >= 0, negative_c x elsewhere, both slopes learned per channel.

    Shape: (N, C, ...), unchanged.

    Args:
        channels: C.
        positive: slope at the start for x >= 0. Default 1.
        negative: slope at the start for x < 0. Default 0.25.

    Raises:
        ConfigError: not a positive number of channels; an input with another number of them.

    Source: Tu et al., AdaBin, arXiv 2208.08084; the authors' code (huawei-noah/Efficient-Computing,
    BinaryNetworks/AdaBin/cifar10/utils/binarylib.py), whose defaults these are.
    """

    def __init__(self, channels: int, positive: float = 1.0, negative: float = 0.25) -> None:
        super().__init__()
        _check_channels(self, channels)
        self.start = number("Maxout", "positive", positive), number("Maxout", "negative", negative)
        self.positive = nn.Parameter(torch.full((channels,), self.start[0]))
        self.negative = nn.Parameter(torch.full((channels,), self.start[1]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the slopes of the start."""
        for slopes, start in zip((self.positive, self.negative), self.start, strict=True):
            slopes.fill_(start)

    def forward(self, x: Tensor) -> Tensor:
        """Scale either side."""
        positive, negative = (_per_channel(self, slopes, x, 1) for slopes in (self.positive, self.negative))
        return positive * torch.relu(x) + negative * x.clamp(max=0)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"{self.positive.numel()}"


class AdaptiveSet(nn.Module):
    """A binary layer whose inputs take two learned values instead of ±1: scale (±1 + center).

    With z = (x - center) / scale, the layer sees scale (sign(z) + center), and zero padding adds zeros to that. Both
    numbers are one for the whole layer and learned. The gradient of x is that of the layer at z: dL/dsign(z) F'(z),
    whatever scale; those of scale and center go through z and through the two values.

    The layer stays a layer of bits. conv(scale (s + center), w) = scale conv(s, w) + scale center conv(1, w), and
    conv(1, w) depends on the weight alone, and on the position only near the border of a zero-padded input. An export
    holds it as one number per channel; with zero padding as a float convolution of a plane of ones, which may cost as
    much again as the layer, and 4 bytes for each output channel and tap. ``pad_value=1`` or -1 of the layer pads with
    one of the two values instead, which costs nothing (its authors pad with zeros).

    Shape: as the layer's.

    Args:
        layer: a :class:`~abste.nn.BinaryConv1d`, ``BinaryConv2d`` or ``BinaryLinear`` with ``activations``, whose
            estimator the set uses. It becomes part of this module, under the name ``layer``.
        scale: half the distance of the two values at the start, not zero. Default 1.
        center: their centre, in units of ``scale``, at the start. Default 0: so it begins as the plain layer.

    Raises:
        ConfigError: another module, or a layer without ``activations``; a scale of zero.

    Source: Tu et al., AdaBin, arXiv 2208.08084, activations; their weights are
    ``BinaryConv2d(..., scale="std", scale_gradient=True, center="mean")``. Formula and starting values are those of the
    authors' code (huawei-noah/Efficient-Computing, BinaryNetworks/AdaBin/cifar10/utils/binarylib.py), which multiplies
    the centre by the scale; the abstract's "center position" of the two values would be center alone, and from the
    paper's text we know no more. The authors use ApproxSign at z itself (``normalize=False``). Nothing keeps scale from
    zero, there and here.
    """

    def __init__(
        self, layer: BinaryConv1d | BinaryConv2d | BinaryLinear, *, scale: float = 1.0, center: float = 0.0
    ) -> None:
        super().__init__()
        if not isinstance(layer, BINARY_LAYERS):
            raise ConfigError(
                f"AdaptiveSet wraps a BinaryConv1d, BinaryConv2d or BinaryLinear, got {type(layer).__name__}."
            )
        if layer.activation is None:
            raise ConfigError("AdaptiveSet needs a layer that binarises its input: give it activations.")
        scale, center = number("AdaptiveSet", "scale", scale), number("AdaptiveSet", "center", center)
        if scale == 0:
            raise ConfigError("AdaptiveSet: scale must not be 0, or the two values would be one.")
        self.layer = layer
        self.start = scale, center
        self.scale = nn.Parameter(layer.weight.new_full((), scale))
        self.center = nn.Parameter(layer.weight.new_full((), center))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Back to the two values of the start; the layer has its own."""
        for value, start in zip((self.scale, self.center), self.start, strict=True):
            value.fill_(start)

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output for inputs of two values."""
        y: Tensor = self.layer((input - self.center) / self.scale, self.center)
        scale = self.scale.to(y.dtype)
        y = y * scale
        bias = self.layer.bias
        if bias is None:
            return y
        # The layer has added it already, to what has just been scaled.
        trailing = [] if isinstance(self.layer, nn.Linear) else [1] * (self.layer.weight.dim() - 2)
        return y + (1 - scale) * bias.to(y.dtype).view(-1, *trailing)


def _check_channels(module: nn.Module, channels: object) -> None:
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ConfigError(f"{type(module).__name__}: channels must be a positive whole number, got {channels!r}.")


def _per_channel(module: nn.Module, values: Tensor, x: Tensor, dim: int) -> Tensor:
    """One number per channel, shaped to meet x, in its dtype: under autocast x stays as narrow as it is."""
    if not -x.dim() <= dim < x.dim() or x.shape[dim] != values.numel():
        raise ConfigError(
            f"{type(module).__name__} needs an input with {values.numel()} channels in dimension {dim}, "
            f"got shape {tuple(x.shape)}."
        )
    return values.to(x.dtype).view(-1, *[1] * (x.dim() - 1 - dim % x.dim()))
