"""What binary layers become before torch.export, so that nothing needs to be guessed in its graph."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from abste.errors import ConversionError
from abste.nn.layers import BINARY_LAYERS, BinaryActivation
from abste.nn.pieces import AdaptiveSet


@torch.library.custom_op("abste::sign", mutates_args=())
def _sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@_sign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("abste::binary_sums", mutates_args=())
def _binary_sums(
    x: Tensor,
    signs: Tensor,
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
) -> Tensor:
    """The sums of a layer with ±1 weights: a linear layer where ``stride`` is empty, else a convolution.

    ``border`` is in the order of ``torch.nn.functional.pad``.
    """
    if not stride:
        return F.linear(x, signs)
    convolve = F.conv1d if len(stride) == 1 else F.conv2d
    return convolve(F.pad(x, list(border), value=pad_value), signs, None, stride, 0, dilation, groups)


@_binary_sums.register_fake
def _(
    x: Tensor,
    signs: Tensor,
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
) -> Tensor:
    if not stride:
        return x.new_empty(*x.shape[:-1], signs.shape[0])
    sides = []
    for i, size in enumerate(x.shape[2:]):
        before, after = border[2 * (len(stride) - 1 - i) :][:2]
        sides.append((size + before + after - dilation[i] * (signs.shape[2 + i] - 1) - 1) // stride[i] + 1)
    return x.new_empty(x.shape[0], signs.shape[0], *sides)


class _Sign(nn.Module):
    def forward(self, input: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.abste.sign(input))


class _Layer(nn.Module):
    """A binary layer with its signs instead of its latents."""

    signs: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        binary = layer.weight_binarizer is not None
        signs, scale = layer.binary_weight() if binary else (layer.weight.detach(), None)
        convolves = not isinstance(layer, nn.Linear)
        trailing = [1] * (layer.weight.dim() - 2)
        self.register_buffer("signs", signs.detach().float())
        self.register_buffer("scale", None if scale is None else scale.float().reshape(-1, *trailing))
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().reshape(-1, *trailing))
        self.binary, self.binarizes = binary, layer.activation is not None
        self.stride = list(layer.stride) if convolves else []
        self.dilation = list(layer.dilation) if convolves else []
        self.border = list(layer._reversed_padding_repeated_twice) if convolves else []
        self.groups = layer.groups if convolves else 1
        self.pad_value = int(layer.pad_value) if convolves else 0
        center = layer.binary_center()
        self.window = None if center is None else _Window(self, center)

    def forward(self, input: Tensor) -> Tensor:
        x = torch.ops.abste.sign(input) if self.binarizes else input
        if self.binary:
            y = torch.ops.abste.binary_sums(
                x, self.signs, self.stride, self.border, self.dilation, self.groups, self.pad_value
            )
        elif self.stride:
            convolve = F.conv1d if len(self.stride) == 1 else F.conv2d
            padded = F.pad(x, self.border, value=self.pad_value)
            y = convolve(padded, self.signs, None, self.stride, 0, self.dilation, self.groups)
        else:
            y = F.linear(x, self.signs)
        if self.scale is not None:
            y = y * self.scale
        if self.window is not None:
            y = y + self.window(x)
        return cast(Tensor, y if self.bias is None else y + self.bias)


class _Window(nn.Module):
    """What the centres of a layer's filters add: the sum of its input over each window, times the centre.

    A filter of +1 for each group, then a 1x1 convolution with factors of 1, which half precision holds exactly, to give
    every channel its group's sum.
    """

    signs: Tensor
    ones: Tensor
    center: Tensor

    def __init__(self, layer: _Layer, center: Tensor) -> None:
        super().__init__()
        shape = layer.signs.shape
        self.register_buffer("signs", torch.ones(layer.groups, *shape[1:]))
        self.register_buffer("ones", torch.ones(shape[0], 1, *[1] * (len(shape) - 2)))
        self.register_buffer("center", center.float().reshape(-1, *[1] * (len(shape) - 2)))
        self.geometry = layer.stride, layer.border, layer.dilation, layer.groups, layer.pad_value

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.ops.abste.binary_sums(x, self.signs, *self.geometry)
        if self.ones.dim() == 2:
            return F.linear(sums, self.ones) * self.center
        convolve = F.conv1d if self.ones.dim() == 3 else F.conv2d
        return convolve(sums, self.ones, groups=self.geometry[3]) * self.center


class _Set(nn.Module):
    """An AdaptiveSet; its layer is replaced as any other is."""

    scale: Tensor
    center: Tensor
    bias: Tensor | None

    def __init__(self, adaptive: AdaptiveSet) -> None:
        super().__init__()
        self.layer = adaptive.layer
        self.register_buffer("scale", adaptive.scale.detach().float())
        self.register_buffer("center", adaptive.center.detach().float())
        twin = _Layer(adaptive.layer)
        # The layer adds its bias, to what is scaled after that.
        self.register_buffer("bias", None if twin.bias is None else (1 - self.scale) * twin.bias)
        self.border = _Border(twin, self.scale * self.center)

    def forward(self, input: Tensor) -> Tensor:
        z = (input - self.center) / self.scale
        y = self.border(z, self.layer(z) * self.scale)
        return cast(Tensor, y if self.bias is None else y + self.bias)


class _Border(nn.Module):
    """Adds ``factor`` times what a layer gives for ones: a constant, but where zero padding enters its windows.

    There it is a convolution of ones, whose sums of signs half precision holds exactly up to 2048 channels. What
    centres add to that is how many numbers of a window are not padding.
    """

    constant: Tensor | None
    bits: Tensor
    sums: Tensor
    scale: Tensor
    tap: Tensor
    spread: Tensor
    center: Tensor | None

    def __init__(self, layer: _Layer, factor: Tensor) -> None:
        super().__init__()
        trailing = [1] * (layer.signs.dim() - 2)
        sums = layer.signs.sum(1, keepdim=True)
        scale = factor * (torch.ones(1, *trailing) if layer.scale is None else layer.scale)
        center = None if layer.window is None else factor * layer.signs.shape[1] * layer.window.center
        self.geometry = layer.stride, layer.border, layer.dilation
        if layer.pad_value or not any(layer.border):
            constant = scale * sums.flatten(1).sum(1).view(-1, *trailing)
            if center is not None:
                constant = constant + center * math.prod(sums.shape[2:])
            self.register_buffer("constant", constant)
            return
        self.register_buffer("constant", None)
        self.register_buffer("bits", torch.ones(1, layer.groups * layer.signs.shape[1], *trailing))
        self.register_buffer("sums", sums)
        self.register_buffer("scale", scale)
        self.register_buffer("tap", torch.ones(1, 1, *sums.shape[2:]))
        self.register_buffer("spread", torch.ones(len(sums), 1, *trailing))
        self.register_buffer("center", center)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.constant is not None:
            return y + self.constant
        dims = self.bits.dim() - 2
        convolve = F.conv1d if dims == 1 else F.conv2d
        stride, border, dilation = self.geometry
        # A plane of ones for each image, by way of a sum that is finite whatever z is.
        signs = torch.ops.abste.sign(z)
        plane = torch.ops.abste.binary_sums(signs, self.bits, [1] * dims, [0] * 2 * dims, [1] * dims, 1, 0) * 0 + 1
        y = y + convolve(F.pad(plane, border), self.sums, None, stride, 0, dilation) * self.scale
        if self.center is None:
            return y
        count = torch.ops.abste.binary_sums(plane, self.tap, stride, border, dilation, 1, 0)
        return y + convolve(count, self.spread) * self.center


TWINNED = (*BINARY_LAYERS, BinaryActivation, AdaptiveSet)
"""What gets a twin. Its hooks do not: most observe, and would see another module."""


def _twin(module: nn.Module) -> nn.Module:
    if isinstance(module, BinaryActivation):
        return _Sign()
    return _Set(module) if isinstance(module, AdaptiveSet) else _Layer(module)


def float_copy(model: nn.Module) -> nn.Module:
    """A copy in eval mode and float32, on the CPU.

    Raises:
        ConversionError: the model has a tensor that was computed from parameters and can not be copied, as the hooks of
            ``weight_norm``, ``spectral_norm`` and ``prune`` of earlier versions of torch leave it.
    """
    try:
        return copy.deepcopy(model).eval().float().cpu()
    except RuntimeError as error:
        for name, module in model.named_modules():
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and value.grad_fn is not None:
                    raise ConversionError(
                        f"{f'{name}.{key}' if name else key} is computed from other parameters by a hook, or was kept "
                        f"from an earlier call, and cannot be copied; {hook_remedy(module, key) or 'remove it'} first."
                    ) from error
        raise ConversionError(f"the model cannot be copied: {' '.join(str(error).split())}") from error


_REMOVERS = {
    "WeightNorm": "torch.nn.utils.remove_weight_norm(module, '{}')",
    "SpectralNorm": "torch.nn.utils.remove_spectral_norm(module, '{}')",
    "BasePruningMethod": "torch.nn.utils.prune.remove(module, '{}')",
}
"""What undoes each kind of hook of torch that computes a parameter anew in each call."""


def hook_remedy(module: nn.Module, key: str) -> str | None:
    """How to be rid of the hook that computes this parameter of a module; None where there is no such hook."""
    for hook in module._forward_pre_hooks.values():
        remover = _remover(hook)
        if remover and key in (getattr(hook, "name", None), getattr(hook, "_tensor_name", None)):
            return f"call {remover.format(key)}"
    return None


def _remover(hook: Any) -> str | None:
    return next((_REMOVERS[base.__name__] for base in type(hook).__mro__ if base.__name__ in _REMOVERS), None)


class _Half(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.half().float()


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round the weights of a model's float convolutions and linear layers to half precision, where they fit, in place.

    Raises:
        ConversionError: a hook computes a weight anew in each call.
    """
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            binary = isinstance(module, BINARY_LAYERS) and module.weight_binarizer is not None
            if not binary and module.weight.abs().max() < 65504:
                if remedy := hook_remedy(module, "weight"):
                    raise ConversionError(
                        f"{name or 'the model'}: its weight is computed by a hook in each call, and cannot be rounded "
                        f"to half precision; {remedy} first."
                    )
                if parametrize.is_parametrized(module, "weight"):
                    # One more, behind the others: to remove these would take them from the model's other copies, too.
                    parametrize.register_parametrization(module, "weight", _Half(), unsafe=True)
                else:
                    module.weight.copy_(_Half()(module.weight))


def with_twins(model: nn.Module) -> nn.Module:
    """A copy whose binary layers hold signs instead of latents, in eval mode and float32.

    Raises:
        ConversionError: the model cannot be copied, or has a binary layer that cannot be packed.
    """
    model = float_copy(model)
    made: dict[int, nn.Module] = {}
    owned = {layer.activation for layer in model.modules() if isinstance(layer, BINARY_LAYERS)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, TWINNED) or module in owned:
            continue
        ours = next(base for base in type(module).__mro__ if base in TWINNED)
        if type(module).forward is not ours.forward:
            raise ConversionError(
                f"{name or 'the model'}: {type(module).__name__} has a forward of its own and cannot be packed; use "
                f"{ours.__name__} itself, and do the rest in a module around it."
            )
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise ConversionError(
                f"{name or 'the model'}: a binary layer with padding_mode={module.padding_mode!r} cannot be packed; "
                "use 'zeros', and pad_value=1 or -1 for inputs that stay one bit wide."
            )
        activation: Any = module if isinstance(module, BinaryActivation) else getattr(module, "activation", None)
        if activation is not None and not activation.estimator.plain_bits:
            raise ConversionError(
                f"{name or 'the model'}: {type(activation.estimator).__name__} is not plain sign(x) at inference "
                "(plain_bits = False), and cannot be packed."
            )
        if id(module) not in made:
            made[id(module)] = _twin(module)
        if not name:
            model = made[id(module)]
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return model
