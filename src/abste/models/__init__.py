"""The networks of the papers, in full precision: `abste.convert` binarises them.

Examples:
    >>> available()[:3]
    ['imagenet_resnet18', 'imagenet_resnet18_bireal', 'imagenet_resnet34']
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import nn

from abste.errors import ConfigError, nearest
from abste.models.quicknet import QuickNet, quicknet, quicknet_large, quicknet_small
from abste.models.reactnet import ReActNet, reactnet_a
from abste.models.resnet import (
    BiRealNet,
    CifarResNet,
    ImageNetResNet,
    imagenet_resnet18,
    imagenet_resnet18_bireal,
    imagenet_resnet34,
    imagenet_resnet34_bireal,
    react_resnet18,
    resnet8,
    resnet8_bireal,
    resnet18,
    resnet18_bireal,
    resnet20,
    resnet20_bireal,
)
from abste.models.vgg import VGGSmall, vgg_small

__all__ = [
    "BiRealNet",
    "CifarResNet",
    "ImageNetResNet",
    "QuickNet",
    "ReActNet",
    "VGGSmall",
    "available",
    "check",
    "create",
    "imagenet_resnet18",
    "imagenet_resnet18_bireal",
    "imagenet_resnet34",
    "imagenet_resnet34_bireal",
    "quicknet",
    "quicknet_large",
    "quicknet_small",
    "react_resnet18",
    "reactnet_a",
    "resnet8",
    "resnet8_bireal",
    "resnet18",
    "resnet18_bireal",
    "resnet20",
    "resnet20_bireal",
    "vgg_small",
]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    builder.__name__: builder
    for builder in (
        imagenet_resnet18,
        imagenet_resnet18_bireal,
        imagenet_resnet34,
        imagenet_resnet34_bireal,
        quicknet,
        quicknet_large,
        quicknet_small,
        react_resnet18,
        reactnet_a,
        resnet18,
        resnet18_bireal,
        resnet20,
        resnet20_bireal,
        resnet8,
        resnet8_bireal,
        vgg_small,
    )
}


def available() -> list[str]:
    """The names that `create` knows, sorted."""
    return sorted(_MODELS)


def create(name: str, **kwargs: object) -> nn.Module:
    """Build the network called `name` with the keyword arguments of its builder.

    Args:
        name: one of `available()`.
        **kwargs: what the builder of that name takes, such as `num_classes`, `in_channels` and `width`.

    Raises:
        ConfigError: the name or an argument is unknown, or an argument has an impossible value.
    """
    check(name, *kwargs)
    return _MODELS[name](**kwargs)


def check(name: str, *arguments: str) -> None:
    """Whether there is a network called `name` that takes these arguments.

    Raises:
        ConfigError: there is none, or it takes others.
    """
    builder = _MODELS.get(name)
    if builder is None:
        raise ConfigError(f"unknown model {name!r}: {nearest(name, _MODELS)}")
    known = inspect.signature(builder).parameters
    for key in arguments:
        if key not in known:
            raise ConfigError(f"model {name!r} takes no argument {key!r}: {nearest(key, known)}")
