"""Parameter groups for optimizers, and batch-norm recalibration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from abste.errors import ConfigError
from abste.nn.layers import BINARY_LAYERS


def latent_weights(model: nn.Module) -> list[Tensor]:
    """The latent weights of a model's binary layers, in order, each once."""
    latents = [m.weight for m in model.modules() if isinstance(m, BINARY_LAYERS) and m.weight_binarizer is not None]
    return list(dict.fromkeys(latents))


def parameter_groups(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.0,
    *,
    latent_lr: float | None = None,
    latent_weight_decay: float | None = None,
) -> list[dict[str, Any]]:
    """Split a model's parameters into latents, other weights, and norms and biases, for any torch optimizer.

    Args:
        model: converted or not.
        lr: learning rate of every group.
        weight_decay: of latents and other weights. Norms, biases and learned scales (all parameters of fewer than two
            dimensions) get none.
        latent_lr: learning rate of the latents; default ``lr``.
        latent_weight_decay: weight decay of the latents; default ``weight_decay``. On standardised latents, whose
            size does not matter to the output, it sets the effective step size rather than shrink anything.

    Returns:
        Groups with keys params, lr, weight_decay and name (``"latents"``, ``"weights"``, ``"norms_biases"``); empty
        ones are left out. Parameters that need no gradient are in none.

    Raises:
        ConfigError: a negative or missing rate, or a model without trainable parameters.
    """
    rates: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "latent_lr": latent_lr,
        "latent_weight_decay": latent_weight_decay,
    }
    for key, value in rates.items():
        if value is not None and not (isinstance(value, int | float) and value >= 0):
            raise ConfigError(f"parameter_groups: {key} must be a number and not negative, got {value!r}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("parameter_groups: the model has no parameter that requires a gradient.")
    latents = set(latent_weights(model))
    others = [parameter for parameter in trainable if parameter not in latents]
    groups: list[dict[str, Any]] = [
        {
            "name": "latents",
            "params": [parameter for parameter in trainable if parameter in latents],
            "lr": lr if latent_lr is None else latent_lr,
            "weight_decay": weight_decay if latent_weight_decay is None else latent_weight_decay,
        },
        {
            "name": "weights",
            "params": [parameter for parameter in others if parameter.dim() >= 2],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "norms_biases",
            "params": [parameter for parameter in others if parameter.dim() < 2],
            "lr": lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the batch-norm statistics of a model afresh, in place: cumulative averages, in float32.

    Needed after weight averaging, since averaged latents have other signs than those the statistics were taken with.
    The rest of the model runs as in evaluation; training modes and momenta are restored. The statistics become the
    plain averages over the batches of each batch's mean and unbiased variance.

    Args:
        model: any model. Without batch norm nothing happens.
        batches: inputs of the model, already on its device; at least one.

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
    count = 0
    finished = False
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
            norm.train()
        for batch in batches:
            with torch.autocast(batch.device.type, enabled=False):
                model(batch.float() if batch.is_floating_point() else batch)
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
