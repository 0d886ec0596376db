"""Progressive image size: small images first, which cost less, then larger ones up to the full size."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.errors import ConfigError
from abste.train.recipe import Recipe

Size = tuple[int, int]


def image_size(recipe: Recipe, epoch: int) -> Size:
    """Height and width of the training images of an epoch (from 0): a function of these two alone."""
    _, height, width = recipe.data.image_shape
    begun = [size for part, size in recipe.train.image_sizes or () if part <= epoch / recipe.train.epochs]
    return (begun[-1], max(1, round(width * begun[-1] / height))) if begun else (height, width)


def image_sizes(recipe: Recipe) -> dict[Size, int]:
    """The sizes of a run, in their order, and the epochs of each."""
    epochs: dict[Size, int] = {}
    for epoch in range(recipe.train.epochs):
        size = image_size(recipe, epoch)
        epochs[size] = epochs.get(size, 0) + 1
    return epochs


def resized(images: Tensor, size: Size) -> Tensor:
    """Images (N, C, H, W) of another size, in the memory format they came in: bilinear, averaging what falls together.

    The filter widens with the factor (antialias), so that every pixel counts: for a half it is close to the mean of two
    by two. Images that have the size are given back as they are.
    """
    if images.shape[2:] == size:
        return images
    last = images.is_contiguous(memory_format=torch.channels_last)
    smaller = F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)
    return smaller.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def check_sizes(module: nn.Module, recipe: Recipe) -> None:
    """See that the network can be trained at every size, by one forward with each; the network stays as it is.

    Raises:
        ConfigError: it fails on a size, or a layer with a stride has less than one stride of pixels left.
    """
    if recipe.train.image_sizes is None:
        return
    lost: list[str] = []

    def watch(name: str) -> Any:
        def look(layer: Any, inputs: tuple[Any, ...]) -> None:
            sides = inputs[0].shape[2:] if inputs and isinstance(inputs[0], Tensor) else ()
            strides = (layer.stride,) * len(sides) if isinstance(layer.stride, int) else layer.stride
            if any(stride > side for side, stride in zip(sides, strides, strict=False)):
                lost.append(name)

        return look

    hooks = [
        layer.register_forward_pre_hook(watch(name))
        for name, layer in module.named_modules()
        if isinstance(getattr(layer, "stride", None), int | tuple)
    ]
    training = module.training
    module.eval()
    try:
        for size in image_sizes(recipe):
            try:
                with torch.no_grad():
                    module(torch.zeros(2, recipe.data.image_shape[0], *size))
            except Exception as error:  # the network's own code: anything may come out of it
                first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise _cannot(recipe, size, f"fails on them: {first}") from error
            if lost:
                raise _cannot(recipe, size, f"has nothing left for the stride of '{lost[0]}'")
    finally:
        for hook in hooks:
            hook.remove()
        module.train(training)


def _cannot(recipe: Recipe, size: Size, why: str) -> ConfigError:
    return ConfigError(
        f"train.image_sizes has images of {size[0]}x{size[1]} pixels, but the network '{recipe.model.name}' {why}; "
        "begin with larger ones, or leave train.image_sizes out."
    )
