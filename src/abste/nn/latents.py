"""What happens to a latent weight before its binarizer: standardised by default, or a module of one's own."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.errors import ConfigError, nearest
from abste.estimators import Annealed
from abste.estimators.base import number

EPS = 1e-10

LatentSpec = bool | str | Mapping[str, Any] | nn.Module
"""What ``standardize`` of a layer accepts: True, False, a name, a table with a name, or a module."""


def standardize(weight: Tensor) -> Tensor:
    """The latent weight with each filter's mean and RMS removed, in float32; gradients go through both.

    Where the fan-in is 1 there is no mean to remove, and an RMS per filter would leave nothing but the sign (and a
    gradient of zero): the RMS of the whole tensor takes its place.

    Args:
        weight: (out, ...).

    Returns:
        Same shape, float32 (float64 stays float64); each filter has mean 0 and RMS 1.
    """
    wide = weight if weight.dtype == torch.float64 else weight.float()
    flat = wide.flatten(1)
    if flat.shape[1] == 1:
        return wide / (wide.square().mean() + EPS).sqrt()
    return F.layer_norm(flat, flat.shape[1:], eps=EPS).view_as(wide)


class Standardize(nn.Module):
    """:func:`standardize` as a module, to build others of, such as ``nn.Sequential(Standardize(), MyClamp())``.

    A layer's ``standardize=True`` is the same without a module.

    Shape: (out, ...), unchanged.
    """

    def forward(self, weight: Tensor) -> Tensor:
        """See :func:`standardize`."""
        return standardize(weight)


class ReCU(Annealed):
    """The rectified clamp unit: standardised latents, clamped to a range that widens over training.

    w1 = rms * standardize(w); Q = -mean|w1| ln(2 - 2 tau), the mean over the whole weight; the result is w1 clamped to
    [-Q, Q]. The gradient goes through the mean and RMS that standardising takes away, is zero for a clamped latent, and
    does not go through Q. Were the weights Laplacian, Q would be their tau-quantile: the few beyond it, which their
    distance from zero keeps from ever changing sign ("dead weights"), count as being at Q.

    Schedule: tau = tau_start + (tau_end - tau_start) (e^p - 1) / (e - 1) with p the fraction of training done, which
    :class:`~abste.estimators.EstimatorSchedule` moves. For Gaussian weights Q rises from 0.96 rms to 3.1 rms.

    sign(w1) does not depend on the clamp: what is deployed is the same with and without it. It goes with any estimator;
    its authors take the unclipped identity (``"identity_ste"``), learned scales (``scale="learned"``) and ApproxSign
    for activations divided by their standard deviation.

    Shape: (out, ...), unchanged; the result is float32 (float64 for float64).

    Args:
        tau_start: at the start of training. Default 0.85.
        tau_end: at its end. Default 0.99. Both lie between 0.5, where Q is 0, and 1, where it is infinite.
        rms: of the standardised latents, positive. Default 1, so that k and t of an estimator mean what they do
            elsewhere. The authors' code has 2 sqrt(2); under the identity that is a learning rate of the latents 2.8
            times as large, and nothing else.

    Raises:
        ConfigError: an argument that is no number or out of range.

    Source: Xu et al., ReCU, arXiv 2103.12369. Formula, schedule and defaults are those of the authors' code
    (z-hXu/ReCU, imagenet/modules/binarized_modules.py, cifar/main.py): of the paper we have read no more than the
    abstract. Their code changes tau once an epoch, we at every step; it takes the unbiased variance plus 1e-5, we the
    mean square plus 1e-10. The default of rms is our own.
    """

    def __init__(self, tau_start: float = 0.85, tau_end: float = 0.99, rms: float = 1.0) -> None:
        super().__init__()
        self.tau_start, self.tau_end = (number("ReCU", "tau", tau) for tau in (tau_start, tau_end))
        self.rms = number("ReCU", "rms", rms)
        if not 0.5 < self.tau_start <= self.tau_end < 1:
            raise ConfigError(f"ReCU: needs 0.5 < tau_start <= tau_end < 1, got {tau_start} and {tau_end}.")
        if not 0 < self.rms <= 1e4:
            raise ConfigError(f"ReCU: rms must be positive and at most 1e4, got {rms}.")

    def tau(self) -> Tensor:
        """The present tau, a float32 scalar."""
        return self.tau_start + (self.tau_end - self.tau_start) * torch.expm1(self.progress()) / math.expm1(1.0)

    def forward(self, weight: Tensor) -> Tensor:
        """Standardise and clamp."""
        latent = standardize(weight)
        if self.rms != 1:
            latent = latent * self.rms
        limit = latent.detach().abs().mean() * -torch.log(2.0 - 2.0 * self.tau()).to(latent.dtype)
        return torch.clamp(latent, -limit, limit)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"tau_start={self.tau_start:g}, tau_end={self.tau_end:g}, rms={self.rms:g}"


_NAMES: dict[str, Callable[..., nn.Module]] = {"recu": ReCU, "standardize": Standardize}


def resolve_latents(spec: LatentSpec) -> bool | nn.Module:
    """True (standardise), False (leave raw), or a module of its own for one layer.

    Args:
        spec: see :class:`~abste.nn.BinaryConv2d`. A module is copied.

    Raises:
        ConfigError: an unknown name or argument, or something else altogether.
    """
    if isinstance(spec, bool):
        return spec
    if isinstance(spec, nn.Module):
        return copy.deepcopy(spec)
    arguments: dict[str, Any] = {"name": spec} if isinstance(spec, str) else {}
    if isinstance(spec, Mapping):
        arguments = dict(spec)
        if "name" not in arguments:
            raise ConfigError(f"a table for standardize needs a name, got {arguments}.")
    if not arguments:
        what = f"the class {spec.__name__}" if isinstance(spec, type) else repr(spec)
        raise ConfigError(f"standardize must be True, False, a name, a table or a torch.nn.Module object, got {what}.")
    name = arguments.pop("name")
    if not isinstance(name, str) or name not in _NAMES:
        raise ConfigError(f"unknown transform of the latent weights {name!r} (standardize); {nearest(name, _NAMES)}")
    made = _NAMES[name]
    known = [] if made is Standardize else list(inspect.signature(made).parameters)
    for key in arguments:
        if key not in known:
            hint = nearest(key, known) if known else "it has none."
            raise ConfigError(f"standardize {name!r} takes no argument {key!r}; {hint}")
    return made(**arguments)
