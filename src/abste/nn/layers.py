"""Binary layers: torch.nn's Conv1d, Conv2d and Linear with ±1 weights, ±1 inputs, or both."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.errors import ConfigError, nearest
from abste.estimators import Binarizer, Spec, resolve
from abste.estimators.base import fraction
from abste.nn.functional import Contraction, Convolution, Product, contract
from abste.nn.latents import EPS, LatentSpec, resolve_latents, standardize

Scale = Literal["channel", "tensor", "std", "learned"] | None
"""What multiplies the sums: see :class:`BinaryConv2d`."""
Center = Literal["mean", "learned"] | None
"""What is added to the weights: see :class:`BinaryConv2d`."""
PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

_SCALES = ("channel", "tensor", "std", "learned")
_CENTERS = ("mean", "learned")


class BinaryWeight(NamedTuple):
    """The weight a binary layer computes with, but for a centre (see :meth:`BinaryConv2d.binary_center`).

    Attributes:
        sign: ±1, of the shape and dtype of the latent weight.
        scale: float factor per output channel, shape (out,) or (1,), applied after the sum; None where there is none.
    """

    sign: Tensor
    scale: Tensor | None


class BinaryActivation(nn.Module):
    """Binarises activations: sign(x) forward, the estimator's slope backward.

    The slope is taken at x divided by a running root mean square of this layer's inputs, so that k and t of an
    estimator mean the same everywhere: dL/dx = dL/dsign(x) F'(x / rms) / rms. The RMS is a detached statistic: a plain
    average of the first training batches that turns into an exponential one. It changes neither sign(x) nor what is
    deployed; a binarizer whose forward is not sign(x), such as ``biper``, sees x / rms there too.

    Activation checkpointing gives the same gradients where a layer is called once before each backward. What it
    computes again takes the RMS as it is then: of several calls, all but the last get a slope at another one.

    Shape: any, unchanged. The input is floating-point; the output is ±1 in the same dtype.

    Args:
        estimator: a name, a table, or a binarizer, which is copied.
        normalize: divide by the running RMS; False takes the slope at x itself.
        momentum: of the exponential average, in [0, 1]; 0 keeps the plain average of all batches.

    Raises:
        ConfigError: an unknown estimator, or None; a momentum out of range; an input that is not floating-point.
    """

    mean_square: Tensor
    num_batches_tracked: Tensor

    def __init__(self, estimator: Spec = "ab_tanh", *, normalize: bool = True, momentum: float = 0.1) -> None:
        super().__init__()
        resolved = resolve(estimator, "activations")
        if resolved is None:
            raise ConfigError("BinaryActivation needs an estimator, got None.")
        self.estimator = resolved
        self.normalize = normalize
        self.momentum = fraction("BinaryActivation", "momentum", momentum)
        if normalize:
            self.register_buffer("mean_square", torch.ones(()))
            self.register_buffer("num_batches_tracked", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def inverse_rms(self, x: Tensor) -> Tensor | None:
        """1 / running RMS, a float32 scalar, or None without normalisation; in training x is counted first."""
        if not self.normalize:
            return None
        if self.training and x.numel() and not _recomputes():
            norm = torch.linalg.vector_norm(x.detach(), dtype=torch.promote_types(x.dtype, torch.float32))
            batch = norm.square() / x.numel()
            # What is not finite would stay for good, even where the loop leaves out that step, as GradScaler does.
            finite = batch.isfinite()
            self.num_batches_tracked.add_(finite)
            weight = (1.0 / self.num_batches_tracked.clamp(min=1)).clamp(min=self.momentum)
            held = self.mean_square.dtype
            batch = batch.clamp(max=torch.finfo(held).max).to(held)
            self.mean_square.lerp_(torch.where(finite, batch, self.mean_square), weight.to(held))
        # The limit is what float16 can hold: a layer that has seen nothing but zeros must not turn them into NaN.
        return (self.mean_square.float() + EPS).rsqrt().clamp(max=6e4)

    def reset_parameters(self) -> None:
        """Forget the inputs seen, and bring the estimator back to its start."""
        if self.normalize:
            self.mean_square.fill_(1)
            self.num_batches_tracked.zero_()
        _reset(self)

    def forward(self, input: Tensor) -> Tensor:
        """sign(input)."""
        _check_float(self, input)
        inverse = self.inverse_rms(input)
        if inverse is None:
            return self.estimator(input)
        x = input * inverse.to(input.dtype)
        if x.dtype == torch.float16 and self.estimator.is_sign:
            # A product that is too small for float16 keeps its sign: -0.0 would become +1.
            x = x - ((x == 0) & (input < 0)).to(x.dtype) * 2.0**-24
        return self.estimator(x)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return "" if self.normalize else "normalize=False"


class _BinaryLayer(nn.Module):
    """What the binary layers share; mixed in before the torch.nn layer whose latent weight they keep."""

    weight: Tensor
    weight_binarizer: Binarizer | None
    activation: BinaryActivation | None
    standardize: bool | nn.Module
    learned_scale: nn.Parameter | None
    learned_center: nn.Parameter | None

    def _binarize(
        self,
        weights: Spec,
        activations: Spec,
        *,
        standardize: LatentSpec,
        normalize: bool,
        scale: Scale,
        scale_gradient: bool,
        center: Center = None,
    ) -> None:
        """What makes a torch.nn layer binary, apart from its class."""
        if scale is not None and scale not in _SCALES:
            raise ConfigError(f"unknown scale {scale!r}; {nearest(scale, _SCALES)}")
        if center is not None and center not in _CENTERS:
            raise ConfigError(f"unknown center {center!r}; {nearest(center, _CENTERS)}")
        if not self.weight.is_floating_point():
            raise ConfigError(f"{type(self).__name__} needs a floating-point dtype, got {self.weight.dtype}.")
        self.weight_binarizer = resolve(weights, "weights")
        self.activation = None if activations is None else BinaryActivation(activations, normalize=normalize)
        self.standardize = resolve_latents(standardize)
        self.scale = scale if self.weight_binarizer is not None else None
        self.center = center if self.weight_binarizer is not None else None
        self.scale_gradient = scale_gradient
        self.learned_scale = self.learned_center = None
        if self.scale == "learned":
            self.learned_scale = nn.Parameter(self.weight.new_empty(self.weight.shape[0]))
        if self.center == "learned":
            self.learned_center = nn.Parameter(self.weight.new_empty(self.weight.shape[0]))
        self.reset_scale()
        self.to(self.weight.device)  # the state of the estimators

    @torch.no_grad()
    def reset_scale(self) -> None:
        """Set a learned scale to mean |latent| per output channel, and a learned centre to the mean: their starts."""
        if self.learned_scale is not None:
            self.learned_scale.copy_(self.weight.abs().flatten(1).mean(1))
        if self.learned_center is not None:
            self.learned_center.copy_(self.weight.flatten(1).mean(1))

    def reset_parameters(self) -> None:
        """Draw the latents anew, as torch.nn does, and bring all else back to its start, such as estimators."""
        super().reset_parameters()  # type: ignore[misc]  # of the torch.nn layer
        if hasattr(self, "weight_binarizer"):  # that layer's constructor is the first to call this
            self.reset_scale()
            _reset(self)

    def _measured(self) -> Tensor:
        """The latents that a scale or a centre is computed from."""
        return self.weight if self.scale_gradient else self.weight.detach()

    def _scale(self) -> Tensor | None:
        if self.scale is None or self.scale == "learned":
            return self.learned_scale
        latent = self._measured()
        if self.scale == "std":
            flat = latent.flatten(1).to(torch.promote_types(latent.dtype, torch.float32))
            return ((flat - flat.mean(1, keepdim=True)).square().mean(1) + EPS).sqrt()
        size = latent.abs()
        return size.flatten(1).mean(1) if self.scale == "channel" else size.mean().view(1)

    def _center(self) -> Tensor | None:
        return self._measured().flatten(1).mean(1) if self.center == "mean" else self.learned_center

    def _clamp_latents(self) -> None:
        # A raw latent beyond the clip gets no gradient and would never come back. Through .data, since a layer that
        # is called twice before the backward still needs the first call's weight, whose values this does not change.
        binarizer = self.weight_binarizer
        learns = self.training and self.weight.requires_grad
        if learns and binarizer is not None and self.standardize is False and binarizer.t < math.inf:
            self.weight.data.clamp_(-binarizer.t, binarizer.t)

    def _signs(self) -> Tensor:
        if self.weight_binarizer is None:
            return self.weight
        latent = self.weight
        if isinstance(self.standardize, nn.Module):
            latent = self.standardize(latent)
            if latent.shape != self.weight.shape:
                raise ConfigError(
                    f"{type(self).__name__}: {type(self.standardize).__name__} (standardize) turns latents of shape "
                    f"{tuple(self.weight.shape)} into {tuple(latent.shape)}; it must keep their shape."
                )
        elif self.standardize:
            latent = standardize(latent)
        return self.weight_binarizer(latent).to(self.weight.dtype)

    @torch.no_grad()
    def binary_weight(self) -> BinaryWeight:
        """What the layer computes with: ±1 and scale, detached. ``weight`` holds the latents instead.

        Raises:
            ConfigError: the layer's weights are in full precision.
        """
        if self.weight_binarizer is None:
            raise ConfigError(f"this {type(self).__name__} has full-precision weights (weights=None): read .weight.")
        scale = self._scale()
        return BinaryWeight(self._signs(), None if scale is None else scale.detach().clone())

    @torch.no_grad()
    def binary_center(self) -> Tensor | None:
        """The float that ``center`` adds to every weight of a filter, (out,), detached; None where there is none."""
        center = self._center()
        return None if center is None else center.detach().clone()

    def _contract(self, x: Tensor, op: Contraction, bias: Tensor | None, offset: Tensor | None) -> Tensor:
        if offset is not None and self.activation is None:
            raise ConfigError(f"{type(self).__name__}: an offset needs a layer that binarises its input (activations).")
        self._clamp_latents()
        inverse = None if self.activation is None else self.activation.inverse_rms(x)
        binarizer = None if self.activation is None else self.activation.estimator
        signs, scale, center = self._signs(), self._scale(), self._center()
        if center is None:
            y = contract(x, signs, op, scale, binarizer, inverse)
        else:
            y = _contract_centered(x, signs, op, scale, center, binarizer, inverse)
        if offset is not None:
            y = y + (offset * self._of_ones(x, signs, op, scale, center)).to(y.dtype)
        return y if bias is None else y + op.per_channel(bias.to(y.dtype))

    def _of_ones(
        self, x: Tensor, signs: Tensor, op: Contraction, scale: Tensor | None, center: Tensor | None
    ) -> Tensor:
        """What the layer, without its bias, gives for an input of ones of the shape of x: of one image."""
        column = [-1] + [1] * (signs.dim() - 1)
        kernel = signs.sum(1, keepdim=True)
        if scale is not None:
            kernel = kernel * scale.view(column)
        if center is not None:
            kernel = kernel + signs.shape[1] * center.view(column)
        if isinstance(op, Product):
            return kernel.squeeze(1)
        plane = torch.ones((1, 1, *x.shape[2:]), dtype=kernel.dtype, device=x.device)
        fill = 1.0 if op.pad_value else 0.0  # a border of ±1 is bits too, and zeros are zeros
        return Convolution(op.stride, op.padding, op.dilation, 1, op.border, fill).forward(plane, kernel)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        parts = [super().extra_repr(), f"scale={self.scale!r}"]
        if self.center is not None:
            parts.append(f"center={self.center!r}")
        if self.standardize is False:
            parts.append("standardize=False")
        if self.scale_gradient:
            parts.append("scale_gradient=True")
        return ", ".join(parts)


def _contract_centered(
    x: Tensor,
    signs: Tensor,
    op: Contraction,
    scale: Tensor | None,
    center: Tensor,
    binarizer: Binarizer | None,
    inverse: Tensor | None,
) -> Tensor:
    """contract(x, scale signs + center): the sum of x over the window is that of one more filter of +1 in each group.

    So ±1 are still summed first, and one backward through x serves both terms.
    """
    convolves = isinstance(op, Convolution)
    groups = op.groups if isinstance(op, Convolution) else 1
    rows = signs.unflatten(0, (groups, -1))
    weight = torch.cat([rows, torch.ones_like(rows[:, :1])], 1).flatten(0, 1)
    factor = None
    if scale is not None:
        each = scale.expand(len(signs)).unflatten(0, (groups, -1))
        factor = torch.cat([each, torch.ones_like(each[:, :1])], 1).flatten()
    y = contract(x, weight, op, factor, binarizer, inverse)
    channel = 1 if convolves else y.dim() - 1
    sums, window = y.unflatten(channel, (groups, -1)).split([rows.shape[1], 1], channel + 1)
    added = center.to(y.dtype).view(groups, -1, *[1] * (y.dim() - 2 if convolves else 0))
    return (sums + added * window).flatten(channel, channel + 1)


def _reset(module: nn.Module) -> None:
    """What is inside it, as if it were new."""
    for child in module.children():
        reset = getattr(child, "reset_parameters", None)
        if callable(reset):
            reset()
        else:
            _reset(child)


def _recomputes() -> bool:
    """Whether this forward is one of a backward, which does it once more: activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _check_float(layer: nn.Module, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        if isinstance(x, torch.fx.Proxy):
            raise ConfigError(
                f"torch.fx cannot trace into {type(layer).__name__}: make it a leaf, as in create_feature_extractor("
                "model, ..., tracer_kwargs={'leaf_modules': list(abste.nn.BINARY_LAYERS)})."
            )
        found = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ConfigError(f"{type(layer).__name__} needs a floating-point tensor as input, got {found}.")


class _BinaryConv(_BinaryLayer, nn.modules.conv._ConvNd):
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: Literal["same", "valid"] | int | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: Spec = "ab_tanh",
        activations: Spec = None,
        standardize: LatentSpec = True,
        normalize: bool = True,
        scale: Scale = "channel",
        scale_gradient: bool = False,
        center: Center = None,
        pad_value: float = 0,
    ) -> None:
        shape = (in_channels, out_channels, kernel_size, stride, padding, dilation, groups)
        arguments: tuple[Any, ...] = (*shape, bias, padding_mode, device, dtype)
        super().__init__(*arguments)
        self._binarize(
            weights,
            activations,
            standardize=standardize,
            normalize=normalize,
            scale=scale,
            scale_gradient=scale_gradient,
            center=center,
            pad_value=pad_value,
        )

    def _binarize(self, weights: Spec, activations: Spec, *, pad_value: float = 0, **options: Any) -> None:
        super()._binarize(weights, activations, **options)
        if pad_value not in (-1, 0, 1):
            raise ConfigError(f"{type(self).__name__}: pad_value must be 0, 1 or -1, got {pad_value!r}.")
        if pad_value and (activations is None or self.padding_mode != "zeros"):
            raise ConfigError(
                f"{type(self).__name__}: pad_value={pad_value} needs binarised activations and padding_mode='zeros'."
            )
        self.pad_value = float(pad_value)

    def _geometry(self) -> Convolution:
        padding, border = (0,) * len(self.stride), None
        if self.padding_mode == "zeros":  # else the input has been padded already
            if isinstance(self.padding, tuple) and not self.pad_value:
                padding = self.padding
            elif any(self._reversed_padding_repeated_twice):
                border = tuple(self._reversed_padding_repeated_twice)
        return Convolution(self.stride, padding, self.dilation, self.groups, border, self.pad_value)

    def forward(self, input: Tensor, offset: Tensor | None = None) -> Tensor:
        """Convolve. An ``offset``, one number, is added to the binarised input (see :class:`~abste.nn.AdaptiveSet`)."""
        x = input
        _check_float(self, x)
        spatial = len(self.stride)
        if x.dim() not in (spatial + 1, spatial + 2) or x.shape[-spatial - 1] != self.in_channels:
            raise ConfigError(
                f"{type(self).__name__} needs an input of shape ([N,] {self.in_channels}, "
                f"{'L' if spatial == 1 else 'H, W'}), got {tuple(x.shape)}."
            )
        single = x.dim() == spatial + 1
        if single:
            x = x.unsqueeze(0)
        if self.padding_mode != "zeros":
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        y = self._contract(x, self._geometry(), self.bias, offset)
        return y.squeeze(0) if single else y

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return super().extra_repr() + (f", pad_value={self.pad_value:g}" if self.pad_value else "")


class BinaryConv1d(_BinaryConv, nn.Conv1d):
    """1-d convolution with binary weights, binary inputs, or both.

    Shape: (N, C, L) or (C, L), as in :class:`torch.nn.Conv1d`.

    Args:
        in_channels ... dtype: as in :class:`torch.nn.Conv1d`.
        weights, activations: binarizers of the weights and of the input; None is full precision.
        standardize, normalize, scale, scale_gradient, center, pad_value: see :class:`BinaryConv2d`.

    Raises:
        ConfigError: an unknown estimator or option; an input of the wrong shape or dtype.
    """


class BinaryConv2d(_BinaryConv, nn.Conv2d):
    """2-d convolution with binary weights, binary inputs, or both.

    y = scale * conv(sign(x), sign(w)) + bias, where w is the standardised latent weight. The state_dict holds the
    latents, under the names of :class:`torch.nn.Conv2d`; :meth:`binary_weight` gives the ±1.

    Shape: (N, C, H, W) or (C, H, W), as in :class:`torch.nn.Conv2d`.

    Args:
        in_channels ... dtype: as in :class:`torch.nn.Conv2d`. A bias is added after the scale, in full precision.
        weights: binarizer of the weights: a name, a table, an object (copied), or None for full precision.
        activations: binarizer of the input, likewise. None leaves the input alone (W1A32).
        standardize: what happens to the latent weight before its binarizer. True removes each filter's mean and RMS
            (see :func:`~abste.nn.standardize`), which gives estimators an input of known scale. False takes the raw
            latents, and in training clamps them to ±t of a clipped estimator, or they would die (not those that a
            parametrisation of torch computes). ``"recu"``, or a table with that name and arguments, is
            :class:`~abste.nn.ReCU`. Any other module that keeps the shape will do; it is copied.
        normalize: take the slope of ``activations`` at the input divided by its running RMS (see
            :class:`BinaryActivation`); False takes it at the input itself.
        scale: ``"channel"``, the mean of |latent| per output channel; ``"tensor"``, over the whole tensor; ``"std"``,
            the standard deviation of the latents of an output channel; ``"learned"``, a parameter per output channel
            that starts as the first; or None. Applied after the sum. It is that of the latents in ``weight``, whatever
            ``standardize`` makes of them.
        scale_gradient: let gradient reach the latents also through a scale and a centre that are computed from them.
        center: what is added to scale * sign(w), so that the two values of a filter are center ± scale: ``"mean"``,
            that of its latents; ``"learned"``, a parameter per output channel that starts as it; or None (default): the
            values lie around zero. Costs the sum of the input over each window, which is one more binary filter for
            each group; exports hold it so. Where the fan-in is 1, the mean is the latent itself, and nothing binary is
            left. AdaBin (arXiv 2208.08084; huawei-noah/Efficient-Computing, BinaryNetworks/AdaBin) has
            ``scale="std", scale_gradient=True, center="mean"`` for weights.
        pad_value: 0, 1 or -1: what zero padding adds to the binarised input. 0 is added after sign, so it stays 0.
            ±1 keeps the input one bit wide, and needs ``activations``.

    Raises:
        ConfigError: an unknown estimator or option; an input of the wrong shape or dtype.
    """


class BinaryLinear(_BinaryLayer, nn.Linear):
    """Linear layer with binary weights, binary inputs, or both.

    Shape: (..., in_features) to (..., out_features), as in :class:`torch.nn.Linear`.

    Args:
        in_features ... dtype: as in :class:`torch.nn.Linear`.
        weights, activations: binarizers of the weights and of the input; None is full precision.
        standardize, normalize, scale, scale_gradient, center: see :class:`BinaryConv2d`.

    Raises:
        ConfigError: an unknown estimator or option; an input of the wrong shape or dtype.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        weights: Spec = "ab_tanh",
        activations: Spec = None,
        standardize: LatentSpec = True,
        normalize: bool = True,
        scale: Scale = "channel",
        scale_gradient: bool = False,
        center: Center = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype)
        self._binarize(
            weights,
            activations,
            standardize=standardize,
            normalize=normalize,
            scale=scale,
            scale_gradient=scale_gradient,
            center=center,
        )

    def forward(self, input: Tensor, offset: Tensor | None = None) -> Tensor:
        """Multiply. An ``offset``, one number, is added to the binarised input (see :class:`~abste.nn.AdaptiveSet`)."""
        _check_float(self, input)
        if input.dim() == 0 or input.shape[-1] != self.in_features:
            raise ConfigError(
                f"BinaryLinear needs an input of shape (..., {self.in_features}), got {tuple(input.shape)}."
            )
        return self._contract(input, Product(), self.bias, offset)


BINARY_LAYERS = (BinaryConv1d, BinaryConv2d, BinaryLinear)
"""The layers with binary weights, binary inputs, or both, for isinstance."""
