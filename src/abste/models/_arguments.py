"""Checks of what networks are given."""

from __future__ import annotations

from torch import Tensor

from abste.errors import ConfigError


def check_count(name: str, count: object, what: str) -> None:
    """Raise ConfigError unless the argument `name` of the network `what` is a positive integer."""
    if not isinstance(count, int) or isinstance(count, bool) or count < 1:
        raise ConfigError(f"{name} of {what} must be a positive integer, not {count!r}.")


def check_images(x: Tensor, in_channels: int) -> None:
    """Raise ConfigError unless x is a floating-point batch of images of that many channels."""
    if x.ndim != 4 or x.shape[1] != in_channels or not x.is_floating_point():
        raise ConfigError(
            f"this network takes a floating-point batch of shape (N, {in_channels}, H, W), "
            f"not {x.dtype} of shape {tuple(x.shape)}."
        )
