"""Binarizers whose forward is not sign(x)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, cast

from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Estimator, Role, _Binarize


class _BinarizeOwn(_Binarize):
    """Forward the binarizer's own; backward likewise."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, binarizer: OwnForward) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        ctx.binarizer = binarizer
        return binarizer.binarize(x)


class OwnForward(Estimator):
    """An estimator that maps to ±1 in a way of its own; a subclass gives :meth:`binarize`.

    For weights alone: a binary layer takes the sign of its input by itself, so that another forward would be ignored
    there without notice.
    """

    @abstractmethod
    def binarize(self, x: Tensor) -> Tensor:
        """±1, a new tensor of the shape and dtype of x."""

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ConfigError(f"{type(self).__name__} needs a floating-point input, got {x.dtype}.")
        return cast(Tensor, _BinarizeOwn.apply(x, self))

    def set_role(self, role: Role) -> None:
        if role != "weights":
            raise ConfigError(f"{type(self).__name__} is for weights, and cannot binarise activations.")
        super().set_role(role)
