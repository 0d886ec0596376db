"""Muon: momentum, orthogonalised."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from abste.errors import ConfigError, nearest
from abste.optim.base import CheckedOptimizer, check_number

Normalize = Literal["tensor", "filter"] | None
"""What is brought to a fixed norm before a step: see :class:`Muon`."""

_NORMALIZE = ("tensor", "filter")
_QUINTIC = (3.4445, -4.7750, 2.0315)
_SMALLEST = 1e-18  # norm that is told from zero: its square is still a normal float32


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """A matrix with the singular vectors of ``matrix`` and singular values near 1, by Newton-Schulz iteration.

    X = matrix / \\|matrix\\|, then ``steps`` times X <- aX + (bA + cAA)X with A = XX^T: each singular value s becomes
    as + bs^3 + cs^5. The coefficients (a, b, c) = (3.4445, -4.7750, 2.0315) make the slope at zero large, so that small
    singular values grow fast, at the price of convergence: they end between 0.68 and 1.21. Those that start below 1.8 %
    of the norm end lower with 3 steps; with 5 it is 0.15 %.

    A factor of ``matrix`` that is a power of two changes no bit, another no more than rounding does. Zero gives zero,
    and norms below 1e-18 something between.

    Args:
        matrix: (rows, columns), floating point.
        steps: how often.

    Returns:
        (rows, columns), computed in bfloat16 on a GPU, where that is many times faster and the authors do the same;
        elsewhere in float32, since CPUs without bfloat16 instructions emulate it (float64 stays float64), and through
        A alone until the end, which for the filters of a 3x3 convolution is half the operations.

    Source: K. Jordan et al., Muon: An optimizer for hidden layers in neural networks, 2024 (kellerjordan.github.io),
    and KellerJordan/cifar10-airbench, airbench94_muon.py. They add 1e-7 to the norm, which takes small gradients for
    even smaller ones; here the norm counts as it is, from 1e-18 up. They round to bfloat16 before they divide by
    the norm, here it is the other way round.
    """
    wide = torch.promote_types(matrix.dtype, torch.float32)
    x = matrix.to(wide)
    x = x / torch.linalg.vector_norm(x).clamp(min=_SMALLEST)
    tall = x.shape[0] > x.shape[1]
    if tall:  # so that A is the smaller of the two it could be
        x = x.T
    a, b, c = _QUINTIC
    if matrix.device.type == "cuda":
        x = x.bfloat16()
        for _ in range(steps):
            gram = x @ x.T
            x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    else:
        # Every factor is a polynomial of A and all of them commute: (rows, rows) suffices until the end, at half the
        # cost for the filters of a 3x3 convolution. In bfloat16 that would lose the small singular values.
        gram, product = x @ x.T, None
        for step in range(steps):
            factor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
            factor.diagonal().add_(a)
            product = factor if product is None else factor @ product
            if step + 1 < steps:
                gram = factor @ gram @ factor
        x = x if product is None else product @ x
    return x.T if tall else x


class Muon(CheckedOptimizer):
    """Momentum orthogonalised by Newton-Schulz iteration: steps along every singular direction are equally long.

    B <- momentum B + g;  G = g + momentum B with ``nesterov``, else B;
    w <- w r / \\|w\\| with ``normalize``;  w <- (1 - lr weight_decay) w - lr orthogonalize(G),

    where w, g and G are matrices (out, rest): a convolution's filters are flattened to rows. The size of the gradient
    does not matter. With ``normalize`` the size of the weights does not either: r = sqrt(out) gives filters the mean
    square norm 1, and as an orthogonal (out, rest) has the norm sqrt(out) too where out <= rest, ``lr`` is then the
    length of a step relative to the weight.

    Made for the latents of binary layers and the filters of convolutions; vectors (norms, biases, scales) and, by the
    authors' advice, the first and the last layer belong to another optimizer, beside which :class:`Combined` puts it::

        latents, *rest = abste.nn.parameter_groups(model, 0.1, 5e-4, latent_lr=0.1)
        optimizer = Combined(Muon([latents]), torch.optim.SGD(rest, lr=0.1, momentum=0.9, nesterov=True))

    A recipe does this with ``optimizer.name = "muon"``.

    Args:
        params: tensors, or groups of them with options of their own; of at least two dimensions, floating point.
            A grouped convolution counts as one matrix (out, rest).
        lr: learning rate. Default 0.24, as in airbench for batches of 2000, where it falls linearly to 0.
        momentum: in [0, 1). Default 0.6, as in airbench, where a run has 200 steps. Longer runs take more: 0.95 in
            the authors' language models.
        nesterov: see above. Default True, as everywhere with these authors.
        steps: Newton-Schulz iterations. Default 3, as in airbench; 5 in language models. See :func:`orthogonalize`.
        normalize: before a step, scale each tensor to the norm sqrt(out) (``"tensor"``, as in airbench: the default),
            each filter to the norm 1 (``"filter"``), or nothing (None). The signs of standardised latents do not
            depend on it; a scale computed from them does, which a batch norm behind the layer undoes. It is wrong where
            the size of the weights matters to the loss: in layers without a norm behind them, and for raw latents
            (``standardize=False``), whose size the estimator sees.
        weight_decay: decoupled. Default 0: with ``normalize`` it does nothing but make steps longer, relative to the
            weight, by the factor 1 / (1 - lr weight_decay).

    Raises:
        ConfigError: an option out of range; a parameter of fewer than two dimensions, or not floating-point.

    Source: as :func:`orthogonalize`. Weights are normalised before the step, as there, so the trained ones are off the
    norm by one step. ``normalize="filter"`` is our own: standardised latents feel the size of each filter by itself.
    The authors' scaling of the step by sqrt(max(1, out / rest)), which is not in airbench, is left out.
    torch.optim.Muon does not serve: it is for 2-d parameters alone, does not normalise, computes in bfloat16 on CPUs
    too. Without ``normalize``, on matrices with out <= rest, both take the same steps.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = 0.24,
        momentum: float = 0.6,
        *,
        nesterov: bool = True,
        steps: int = 3,
        normalize: Normalize = "tensor",
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "nesterov": nesterov,
            "steps": steps,
            "normalize": normalize,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any]) -> None:
        check_number("Muon", "lr", group["lr"])
        check_number("Muon", "momentum", group["momentum"], 1)
        check_number("Muon", "weight_decay", group["weight_decay"])
        if group["nesterov"] and not group["momentum"]:
            raise ConfigError("Muon: nesterov needs a momentum above 0.")
        steps = group["steps"]
        if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 20:
            raise ConfigError(f"Muon: steps must be a whole number from 1 to 20, got {steps!r}.")
        if group["normalize"] is not None and group["normalize"] not in _NORMALIZE:
            raise ConfigError(
                f"Muon: unknown normalize {group['normalize']!r}; {nearest(group['normalize'], _NORMALIZE)}"
            )
        for parameter in group["params"]:
            if parameter.dim() < 2 or not parameter.is_floating_point():
                raise ConfigError(
                    f"Muon needs floating-point parameters of at least two dimensions, got {parameter.dtype} of shape "
                    f"{tuple(parameter.shape)}; give norms and biases to another optimizer, with abste.optim.Combined."
                )

    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average = state["momentum_buffer"]
        average.mul_(group["momentum"]).add_(gradient)
        direction = gradient.add(average, alpha=group["momentum"]) if group["nesterov"] else average
        update = orthogonalize(direction.flatten(1), group["steps"])
        if group["normalize"] is not None:
            _normalize(parameter, group["normalize"])
        if group["weight_decay"]:
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"])


def _normalize(weight: Tensor, what: str) -> None:
    """Scale a weight to the norm sqrt(out), or each filter to the norm 1, in place; zero stays zero."""
    over = tuple(range(1 if what == "filter" else 0, weight.dim()))
    target = 1.0 if what == "filter" else math.sqrt(weight.shape[0])
    wide = torch.promote_types(weight.dtype, torch.float32)
    norm = torch.linalg.vector_norm(weight, dim=over, keepdim=True, dtype=wide)
    weight.mul_((target / norm.clamp(min=_SMALLEST)).to(weight.dtype))
