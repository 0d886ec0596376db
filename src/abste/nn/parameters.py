"""Parameter groups for optimizers, and batch-norm recalibration."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize

from abste.errors import ConfigError
from abste.estimators import IdentitySTE
from abste.nn.layers import BINARY_LAYERS, BinaryConv1d, BinaryConv2d, BinaryLinear


def latent_weights(model: nn.Module) -> list[Tensor]:
    """The latent weights of a model's binary layers, in order, each once."""
    layers = [m for m in model.modules() if isinstance(m, BINARY_LAYERS) and m.weight_binarizer is not None]
    return list(dict.fromkeys(latent for layer in layers for latent in _latents(layer)))


def _latents(layer: BinaryConv1d | BinaryConv2d | BinaryLinear) -> list[Tensor]:
    """A layer's weight; where something computes it (parametrizations, pruning, norms), what it is computed from."""
    if parametrize.is_parametrized(layer, "weight"):
        originals = cast(nn.ModuleDict, layer.parametrizations)["weight"].parameters()
        return [original for original in originals if original.shape == layer.weight.shape]
    # The names of pruning and spectral norm, and of weight norm.
    return [cast(Tensor, getattr(layer, "weight_orig", getattr(layer, "weight_v", layer.weight)))]


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    latent_lr: float | None = None,
    latent_weight_decay: float | None = None,
    filters: bool = False,
    flips: bool = False,
    decay_norms: bool = False,
) -> list[dict[str, Any]]:
    """Split a model's parameters into latents, other weights, and norms and biases, for any torch optimizer.

    Args:
        model: converted or not.
        lr: learning rate of every group.
        weight_decay: of latents and other weights. Norms, biases and learned scales (all parameters of fewer than two
            dimensions) get none, unless ``decay_norms``.
        latent_lr: learning rate of the latents; default ``lr``.
        latent_weight_decay: weight decay of the latents; default ``weight_decay``. On standardised latents, whose
            size does not matter to the output, it sets the effective step size rather than shrink anything.
        filters: give the weights of three or more dimensions, those of convolutions in full precision, a group of
            their own, with the rates of the other weights, for optimizers such as :class:`abste.optim.Muon`.
        flips: the latents are for an optimizer that flips signs, :class:`abste.optim.Bop`, which makes them ±1. Their
            group, which comes first, then has no lr and no weight_decay, and their layers are checked.
        decay_norms: norms, biases and learned scales get ``weight_decay`` too, as they do where an optimizer is given
            ``model.parameters()``: in most code that published results come from.

    Returns:
        Groups with keys params, lr, weight_decay and name (``"latents"``, ``"filters"``, ``"weights"``,
        ``"norms_biases"``); empty ones are left out. Parameters that need no gradient are in none.

    Raises:
        ConfigError: a negative or missing rate; a model without trainable parameters; or with ``flips``, one without
            trainable latents, or a binary layer that does not take its weights as they are.
    """
    rates: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "latent_lr": latent_lr,
        "latent_weight_decay": latent_weight_decay,
    }
    for key, value in rates.items():
        if value is not None and not (isinstance(value, Real) and float(value) >= 0):
            raise ConfigError(f"parameter_groups: {key} must be a number and not negative, got {value!r}.")
    # Numbers of Python, since those of NumPy in a checkpoint are what torch.load refuses.
    lr, weight_decay = float(lr), float(weight_decay)
    latent_lr = lr if latent_lr is None else float(latent_lr)
    latent_weight_decay = weight_decay if latent_weight_decay is None else float(latent_weight_decay)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("parameter_groups: the model has no parameter that requires a gradient.")
    latents = set(latent_weights(model))
    others = [parameter for parameter in trainable if parameter not in latents]
    first_of_filters = 3 if filters else math.inf
    groups: list[dict[str, Any]] = [
        {
            "name": "latents",
            "params": [parameter for parameter in trainable if parameter in latents],
            "lr": latent_lr,
            "weight_decay": latent_weight_decay,
        },
        {
            "name": "filters",
            "params": [parameter for parameter in others if parameter.dim() >= first_of_filters],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "weights",
            "params": [parameter for parameter in others if 2 <= parameter.dim() < first_of_filters],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "norms_biases",
            "params": [parameter for parameter in others if parameter.dim() < 2],
            "lr": lr,
            "weight_decay": weight_decay if decay_norms else 0.0,
        },
    ]
    if flips:
        _check_flips(model, groups[0]["params"])
        groups[0] = {"name": "latents", "params": groups[0]["params"]}
    return [group for group in groups if group["params"]]


def _check_flips(model: nn.Module, latents: list[Tensor]) -> None:
    """Raise unless there are latents and their layers compute the same with ±1 in their place, and learn from it."""
    if not latents:
        raise ConfigError(
            "parameter_groups: the model has no trainable binary weight that could flip; binarise its weights."
        )
    for name, layer in model.named_modules():
        if not isinstance(layer, BINARY_LAYERS) or layer.weight_binarizer is None:
            continue
        if layer.standardize is not False:
            # The mean of ±1 moves their signs, and the gradient loses its parts along 1 and along the weights.
            problem = "standardises its weights, which must stay ±1; convert with standardize = false"
        elif layer.scale not in (None, "learned"):
            problem = f"takes its scale {layer.scale!r} from its weights, but they are ±1; use 'none' or 'learned'"
        elif layer.center == "mean":
            problem = "takes its center from its weights, but they are ±1; use 'learned' or leave it out"
        elif not isinstance(layer.weight_binarizer, IdentitySTE):
            # At ±1 the slope of another is one number for all weights: nothing, or a change of the threshold.
            problem = (
                f"has the estimator '{layer.weight_binarizer.name}' on weights of ±1, where its slope is a constant; "
                "use 'identity_ste'"
            )
        else:
            continue
        raise ConfigError(f"weights that flip instead of following latents: layer '{name}' {problem}.")


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor | Sequence[Tensor]]) -> int:
    """Measure the batch-norm statistics of a model afresh, in place: cumulative averages, in the model's own precision.

    Needed after weight averaging, since averaged latents have other signs than those the statistics were taken with.
    The rest of the model runs as in evaluation; training modes and momenta are restored. The statistics become the
    plain averages over the batches of each batch's mean and unbiased variance.

    Args:
        model: any model. Without batch norm nothing happens.
        batches: inputs of the model, already on its device; at least one. Of tuples, such as a DataLoader's (inputs,
            labels), the first is taken.

    Returns:
        The number of batches used.

    Raises:
        ConfigError: no batch. The statistics are then as before, as they are if the model fails.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    if not norms:
        return 0
    modes = {module: module.training for module in model.modules()}
    before = [(norm, norm.momentum, {key: b.clone() for key, b in norm.named_buffers(recurse=False)}) for norm in norms]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    count = 0
    finished = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
            norm.train()
        for found in batches:
            batch = found if isinstance(found, Tensor) else found[0]
            with torch.autocast(batch.device.type, enabled=False):
                model(batch.to(dtype) if batch.is_floating_point() else batch)
            count += 1
        if not count:
            raise ConfigError("recalibrate_batch_norm: there is no batch to measure the statistics with.")
        finished = True
    finally:
        for norm, momentum, statistics in before:
            norm.momentum = momentum
            for key, buffer in norm.named_buffers(recurse=False) if not finished else ():
                buffer.copy_(statistics[key])
        for module, mode in modes.items():
            module.training = mode
    return count
