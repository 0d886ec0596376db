"""Parameter groups for optimizers, and batch-norm recalibration."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.nn.layers import BINARY_LAYERS


def latent_weights(model: nn.Module) -> list[nn.Parameter]:
    """The latent weights of a model's binary layers, in order, each once."""
    latents = [m.weight for m in model.modules() if isinstance(m, BINARY_LAYERS) and m.weight_binarizer is not None]
    return list({id(p): p for p in latents}.values())


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
        ConfigError: a negative rate, or a model without trainable parameters.
    """
    rates = {"lr": lr, "weight_decay": weight_decay, "latent_lr": latent_lr, "latent_weight_decay": latent_weight_decay}
    for key, value in rates.items():
        if value is not None and not value >= 0:
            raise ConfigError(f"parameter_groups: {key} must not be negative, got {value}.")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ConfigError("parameter_groups: the model has no parameter that requires a gradient.")
    latent = {id(parameter) for parameter in latent_weights(model)}
    groups = [
        {
            "name": "latents",
            "params": [p for p in trainable if id(p) in latent],
            "lr": lr if latent_lr is None else latent_lr,
            "weight_decay": weight_decay if latent_weight_decay is None else latent_weight_decay,
        },
        {
            "name": "weights",
            "params": [p for p in trainable if id(p) not in latent and p.dim() >= 2],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "norms_biases",
            "params": [p for p in trainable if id(p) not in latent and p.dim() < 2],
            "lr": lr,
            "weight_decay": 0.0,
        },
    ]
    return [group for group in groups if group["params"]]


@torch.no_grad()
def recalibrate_batch_norm(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Measure the batch-norm statistics of a model afresh, in place: cumulative averages, in float32.

    Needed after weight averaging, since averaged latents have other signs than those the statistics were taken with.
    The rest of the model runs as in evaluation; training modes are restored.

    Args:
        model: any model. Without batch norm nothing happens.
        batches: inputs of the model, already on its device.

    Returns:
        The number of batches used.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    modes = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms}
    count = 0
    try:
        model.eval()
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative
            norm.train()
        if norms:
            for batch in batches:
                device = batch.device.type
                with torch.autocast(device, enabled=False):
                    model(batch.float() if batch.is_floating_point() else batch)
                count += 1
    finally:
        for norm in norms:
            norm.momentum = momenta[norm]
        for module, mode in modes.items():
            module.training = mode
    return count
