"""A full-precision branch that gives a binary layer's input more gradient during training, and nothing else."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.estimators.base import number
from abste.nn.layers import BINARY_LAYERS, BinaryConv1d, BinaryConv2d, BinaryLinear
from abste.nn.pieces import AdaptiveSet

_EPS = 1e-8


class _Balance(torch.autograd.Function):
    """x for the layer, x and the weight for the branch; backward, the branch's gradients are scaled to the layer's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eta: float) -> tuple[Tensor, Tensor, Tensor]:
        ctx.eta = eta
        return x.view_as(x), x.view_as(x), weight.view_as(weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, layer: Tensor, branch: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, None]:
        wide = torch.promote_types(layer.dtype, torch.float32)  # a sum of squares in half precision would overflow
        layer_norm, branch_norm = (torch.linalg.vector_norm(grad, dtype=wide) for grad in (layer, branch))
        factor = ctx.eta * layer_norm / (branch_norm + _EPS)
        return layer + factor.to(branch.dtype) * branch, factor.to(weight.dtype) * weight, None


class _Attach(torch.autograd.Function):
    """The layer's output; backward, the branch gets the same gradient."""

    @staticmethod
    def forward(ctx: Any, layer: Tensor, branch: Tensor) -> Tensor:
        ctx.dtype = branch.dtype
        return layer.clone()  # a view would not let an activation behind it work in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.to(ctx.dtype)


class GradientBranch(nn.Module):
    """SURGE's branch: a binary layer, and beside it a full-precision one that is only felt in the backward.

    out = f_b(x) - sg(lam f_a(x)) + lam f_a(x), where f_b is the layer, f_a(x) = W_a x in full precision (the geometry
    of the layer, no bias) and sg stops the gradient: the output is the layer's, bit for bit. Backward,

        dL/dx = g_b + lam g_a,   dL/dW_a = lam (that of W_a x),   lam = eta |g_b| / (|g_a| + 1e-8),

    with g_b and g_a the gradients that reach x through the layer and through the branch, and |.| their L2 norm over the
    batch. So the branch adds a gradient of the size eta |g_b|, which no clip of an estimator has cut.

    Costs another convolution in the forward and two in the backward; nothing outside training, where the branch is not
    run. Nor is it exported, and ``summary`` does not count it. A state dict without the key ``branch`` loads, and makes
    the branch a copy of the latents in it; and :func:`remove_branches` takes branches out of a trained model, whose
    names are then those of a model without.

    lam is the present backward's own, so that nothing is kept: with gradient accumulation each part has its own, and
    each process of a distributed run, too.

    Shape: as the layer's.

    Args:
        layer: a :class:`~abste.nn.BinaryConv1d`, ``BinaryConv2d`` or ``BinaryLinear``, or an
            :class:`~abste.nn.AdaptiveSet` around one. It becomes part of this module, under the name ``layer``.
        eta: share of the branch, not negative. Default 0.1: a tenth of the layer's own gradient; untuned.

    Raises:
        ConfigError: another module; eta that is no number, or negative.

    Source: SURGE, arXiv 2605.10989, accepted at ICML 2026. We have read its abstract alone; the formulas are from
    machine-written notes on the paper (a secondary source), and no code was found. That W_a starts as a copy of the
    latents is our reading of "full-precision copy", that its gradient is scaled as well follows from the formula, and
    the default of eta is our own.
    """

    def __init__(self, layer: BinaryConv1d | BinaryConv2d | BinaryLinear | AdaptiveSet, *, eta: float = 0.1) -> None:
        super().__init__()
        if not isinstance(layer, (*BINARY_LAYERS, AdaptiveSet)):
            raise ConfigError(
                "GradientBranch wraps a BinaryConv1d, BinaryConv2d, BinaryLinear or AdaptiveSet, got "
                f"{type(layer).__name__}."
            )
        self.eta = number("GradientBranch", "eta", eta)
        if not 0 <= self.eta <= 1e4:
            raise ConfigError(f"GradientBranch: eta must lie in [0, 1e4], got {eta}.")
        self.layer = layer
        self.branch = nn.Parameter(self._core().weight.detach().clone())
        self._lost = False  # whether a state that is being loaded lacks it
        self.register_load_state_dict_post_hook(_follow)

    def reset_parameters(self) -> None:
        """Draw the latents anew, and make the branch a copy of them.

        Where each module is reset in its turn, the layer must come first, as in ``model.apply``.
        """
        self._core().reset_parameters()
        if isinstance(self.layer, AdaptiveSet):
            self.layer.reset_parameters()
        self.reset_branch()

    @torch.no_grad()
    def reset_branch(self) -> None:
        """Make the branch a copy of the latents, as it is at its start."""
        self.branch.copy_(self._core().weight)

    def _core(self) -> BinaryConv1d | BinaryConv2d | BinaryLinear:
        return self.layer.layer if isinstance(self.layer, AdaptiveSet) else self.layer

    def forward(self, input: Tensor) -> Tensor:
        """The layer's output."""
        if not (self.training and torch.is_grad_enabled()):
            return cast(Tensor, self.layer(input))
        own, other, weight = _Balance.apply(input, self.branch, self.eta)
        core = self._core()
        side = F.linear(other, weight) if isinstance(core, nn.Linear) else core._conv_forward(other, weight, None)
        return cast(Tensor, _Attach.apply(self.layer(own), side))

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        lost: list[str] = []  # a state without the branch is complete: nothing outside training needs it
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, lost, unexpected_keys, error_msgs)
        missing_keys += [key for key in lost if key != f"{prefix}branch"]
        self._lost = bool(lost) and any(key.startswith(f"{prefix}layer.") for key in state_dict)

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return f"eta={self.eta:g}"


def _follow(branch: GradientBranch, _: Any) -> None:
    """Once the latents have been loaded: begin on them, as a new branch does."""
    if branch._lost:
        branch.reset_branch()


def remove_branches(model: nn.Module) -> nn.Module:
    """Put the layer of every :class:`GradientBranch` of a model in its place.

    The model computes the same as before in evaluation, and its state dict is that of a model without branches.

    Args:
        model: changed in place.

    Returns:
        The model; its layer, where it is such a branch itself.
    """
    if isinstance(model, GradientBranch):
        return model.layer
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, GradientBranch):
            model.set_submodule(name, module.layer)
    return model
