"""Bop: binary weights without latents, flipped where the gradient insists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from abste.errors import ConfigError
from abste.estimators import sign
from abste.optim.base import CheckedOptimizer, check_number


class Bop(CheckedOptimizer):
    """Binary optimizer: weights are ±1 themselves, and flip where an average of their gradient is large enough.

    m <- (1 - gamma) m + gamma g;  w <- -w where \\|m\\| > threshold and sign(m) = sign(w), else w.

    A weight that has just flipped has an m that agrees with it, and stays until the average has changed its sign and
    exceeds the threshold on the other side: that is the hysteresis which latents have by their size.

    The layers must take the weights as they are: identity for the estimator, no standardisation, no scale computed
    from weights (it would be 1; None or a learned one will do). Their ``weight`` then holds the ±1, where latents are
    otherwise, and everything else (checkpoints, averaging, export) is as ever::

        abste.convert(model, weights="identity_ste", standardize=False, scale=None, example_input=x)
        latents, *rest = abste.nn.parameter_groups(model, 0.01, flips=True)  # checks the layers
        optimizer = Combined(Bop([latents]), torch.optim.Adam(rest))

    A recipe does this with ``optimizer.name = "bop"``. The model's weights become ±1 when Bop is made (0 becomes +1):
    load others before.

    gamma plays the part of the learning rate, and ``param_groups`` hold it under that name, "lr": what schedules
    learning rates schedules gamma. The authors let it fall, by 0.1 every 100 of 500 epochs, or linearly to 1 %; under a
    recipe's schedule it rises and falls by the same factor as the learning rate of the other parameters. The threshold
    is constant. At gamma = 0 no weight flips any more.

    Args:
        params: the binary weights, or groups of them with gamma and threshold of their own; float32 or float64, since
            an average with a small gamma stands still in half precision.
        gamma: adaptivity rate, in [0, 1). Default 1e-4.
        threshold: at least 0. Default 1e-8. It is compared with a mean of gradients, so it depends on the size of the
            loss and of the network. Both defaults are the authors' for CIFAR-10, 500 epochs with batches of 50; for
            100 epochs with batches of 100 they take 1e-3 and 1e-6.

    Raises:
        ConfigError: an option out of range; a group with a learning rate; weights of another dtype.

    Source: Helwegen et al., Latent Weights Do Not Exist, arXiv 1906.02107, algorithm 1; the authors'
    plumerai/rethinking-bnn-optimization, optimizers.py, computes the same but for m w = threshold exactly, where it
    sets the weight to +1. There all but the binary weights go to Adam, with 0.01 or 2.5e-3.
    """

    def __init__(self, params: ParamsT, gamma: float = 1e-4, threshold: float = 1e-8) -> None:
        super().__init__(params, {"lr": gamma, "threshold": threshold})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group, add it and set its weights to their signs.

        Raises:
            ConfigError: see the class; nothing is then changed.
        """
        group = {**param_group}
        if "lr" in group:
            raise ConfigError("Bop has no learning rate: leave 'lr' out of its groups, and give gamma.")
        if "gamma" in group:
            group["lr"] = group.pop("gamma")
        super().add_param_group(group)
        with torch.no_grad():
            for weight in self.param_groups[-1]["params"]:
                weight.copy_(sign(weight))

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("Bop", "gamma", group["lr"], 1)
        check_number("Bop", "threshold", group["threshold"])
        for weight in group["params"]:
            if weight.dtype not in (torch.float32, torch.float64):
                raise ConfigError(f"Bop needs weights in float32 or float64, got {weight.dtype}.")

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "gradient_average" not in state:
            state["gradient_average"] = torch.zeros_like(parameter)
        average = state["gradient_average"].lerp_(gradient, group["lr"])
        parameter.copy_(torch.where(parameter * average > group["threshold"], -parameter, parameter))
