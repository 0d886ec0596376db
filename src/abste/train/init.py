"""Warm starts: a network that begins with the weights of another run.

Parameters and buffers are matched by name and shape, and names are those of the network as it was before ``convert``
put modules around its layers. So a float network starts its binary sibling, with its weights as latents; a network with
binary activations alone starts one with both; and a run goes on under another recipe.

Latents keep the size they come with. Under SGD and Adam standardised ones have an effective step of lr / RMS^2, so what
counts is that the size is one that training leads to, and that of a float network trained by the same recipe is. Muon
with a norm (``muon_normalize``) sets the size itself before each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.estimators import Annealed, Binarizer
from abste.nn import AdaptiveSet, GradientBranch, latent_weights
from abste.nn.layers import BINARY_LAYERS
from abste.train.recipe import Recipe
from abste.train.run import open_source

LEAST_SHARE = 0.1
"""Of a network's parameters: with less in common, a start is refused."""


@dataclass(frozen=True)
class Transfer:
    """What :func:`transfer` did.

    Attributes:
        taken: names of the network that were filled.
        new: names that were not, parameters first: they stay as initialised (a learned scale: as it begins on the new
            latents).
        left: names of the source that found no place.
        share: part of the network's parameters, counted by element, that was filled.
        latent_size: RMS of a layer's new latents by that of its fresh ones, the median over layers; None without any.
    """

    taken: list[str]
    new: list[str]
    left: list[str]
    share: float
    latent_size: float | None

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} of {len(self.taken) + len(self.new)} tensors ({self.share:.1%} of the parameters)"]
        if self.new:
            parts.append(f"new: {_some(self.new)}")
        if self.left:
            parts.append(f"not taken over: {_some(self.left)}")
        if self.latent_size is not None:
            parts.append(f"latents {self.latent_size:.2f} times as large as fresh ones")
        return "; ".join(parts)


def start_from_run(module: nn.Module, recipe: Recipe) -> dict[str, Any] | None:
    """Fill a fresh network as ``init`` of its recipe says.

    Returns:
        What to keep about it: ``source``, ``file``, ``sha256``, ``name`` and ``epochs`` of its recipe, and ``report``,
        one line; None without ``init``.

    Raises:
        RunError, CheckpointError: there is no such run, or it has no weights, or they are damaged.
        ConfigError: it has (almost) nothing in common with the network, or was trained on images held out here.
    """
    if recipe.init is None:
        return None
    source = open_source("init", recipe.init, recipe)
    what = transfer(module, source.model)
    if what.share < LEAST_SHARE:
        raise ConfigError(
            f"init = '{recipe.init}': its network ({source.recipe.model.name}) has only {what.share:.1%} of the "
            f"parameters of this one ({recipe.model.name}) by name and shape; start from a run of the same network."
        )
    return {
        "source": recipe.init,
        "file": source.file.name,
        "sha256": source.sha256,
        "name": source.recipe.name,
        "epochs": source.recipe.train.epochs,
        "report": f"started from {recipe.init} ({source.file.name}, sha256 {source.sha256[:12]}): {what}",
    }


@torch.no_grad()
def transfer(module: nn.Module, source: nn.Module) -> Transfer:
    """Fill the parameters and buffers of ``module`` from those of ``source``, by name and shape, in place.

    The state of estimators and of transforms of the latents is not taken over: they anneal anew. Learned scales and
    centres and gradient branches that the source lacks begin on the new latents, as ``convert`` would have begun them.
    """
    wanted, found = _plain_state(module), _plain_state(source)
    matched = [name for name, tensor in wanted.items() if name in found and _alike(tensor, found[name])]
    latents = latent_weights(module)
    fresh = [_rms(latent) for latent in latents]
    _copy(wanted, found, matched)
    for layer in module.modules():
        if isinstance(layer, BINARY_LAYERS):
            layer.reset_scale()
        elif isinstance(layer, GradientBranch):
            layer.reset_branch()
    _copy(wanted, found, matched)  # those of them that the source has

    sizes = [_rms(latent) / before for latent, before in zip(latents, fresh, strict=True) if before > 0]
    trained = {id(parameter) for parameter in module.parameters()}
    elements = {name: tensor.numel() for name, tensor in wanted.items() if id(tensor) in trained}
    return Transfer(
        taken=matched,
        new=sorted((name for name in wanted if name not in matched), key=lambda name: name not in elements),
        left=[name for name in found if name not in matched],
        share=sum(elements.get(name, 0) for name in matched) / max(sum(elements.values()), 1),
        latent_size=median(sizes) if sizes else None,
    )


def _plain_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers but for those of estimators, under the names they had before ``convert``."""
    around, annealed = [], []
    for name, inner in module.named_modules():
        if isinstance(inner, AdaptiveSet | GradientBranch) or list(dict(inner.named_children())) == ["norm", "layer"]:
            around.append(f"{name}.layer.")
        if isinstance(inner, Binarizer | Annealed):
            annealed.append(f"{name}.")
    state: dict[str, Tensor] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        if name.startswith(tuple(annealed)):
            continue
        for prefix in sorted(around, key=len, reverse=True):  # from within
            if name.startswith(prefix):
                name = prefix.removesuffix("layer.") + name.removeprefix(prefix)
        state[name] = tensor
    return state


def _alike(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.is_floating_point() == b.is_floating_point()


def _copy(to: dict[str, Tensor], source: dict[str, Tensor], names: list[str]) -> None:
    for name in names:
        to[name].copy_(source[name])


def _rms(tensor: Tensor) -> float:
    return float(tensor.float().square().mean().sqrt())


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
