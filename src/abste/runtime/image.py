"""Classifies image files with a packed network. Needs Pillow: pip install 'abste[image]'."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from abste._decode import Unreadable, decode
from abste.errors import ConfigError, DataError, FormatError
from abste.runtime.network import Network

Array = np.ndarray[Any, np.dtype[Any]]


def read_image(path: str | os.PathLike[str], shape: tuple[int, ...], resize: int | None = None) -> Array:
    """An image file as pixels between 0 and 1, scaled and cropped about its centre.

    Args:
        path: of any format that Pillow reads.
        shape: (C, H, W), C being 1 (grey) or 3 (RGB).
        resize: scale so that the shorter side has so many pixels, as torchvision's Resize does; by default as few as
            cover the crop. No less than H and W.

    Returns:
        (C, H, W) float32.

    Raises:
        DataError: the file is missing, no image, too large, or has more than eight bits per channel.
        ConfigError: Pillow is missing.
        FormatError: the network does not take images.
    """
    return np.asarray(_pixels(path, shape, resize), np.float32) / 255


def _pixels(path: str | os.PathLike[str], shape: tuple[int, ...], resize: int | None) -> Array:
    """See :func:`read_image`; (C, H, W) uint8."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise ConfigError("reading images needs Pillow; install it with: pip install 'abste[image]'") from error
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise FormatError(f"this network takes inputs of shape {shape}, not images.")
    try:
        upright = decode(path, shape[0])
    except Unreadable as error:
        raise DataError(f"cannot read {os.fspath(path)}: {error}.") from error
    height, width = shape[1:]
    if resize is None:
        fitted = ImageOps.fit(upright, (width, height), Image.Resampling.BILINEAR)
    else:
        shorter = min(upright.size)
        size = tuple(resize * side // shorter for side in upright.size)
        left, top = (round((have - want) / 2) for have, want in zip(size, (width, height), strict=True))
        scaled = upright.resize((size[0], size[1]), Image.Resampling.BILINEAR)
        fitted = scaled.crop((left, top, left + width, top + height))
    pixels = np.asarray(fitted).reshape(height, width, shape[0])
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _normalised(pixels: Array, mean: Array, std: Array) -> Array:
    """(C, H, W) uint8 to float32, with the bits that training's evaluation has, since binary activations make much of
    the last one: one fused multiply-add of float32, which float64 holds, as `abste.data.BatchSource` computes it.
    """
    # The decimals that training had, of which the file has the nearest float32.
    mean, std = (np.array([float(f"{value:.7g}") for value in values])[:, None, None] for values in (mean, std))
    factor, offset = (1 / (255 * std)).astype(np.float32), (-mean / std).astype(np.float32)
    return (pixels * factor.astype(np.float64) + offset).astype(np.float32)


def classify(network: Network, path: str | os.PathLike[str]) -> list[tuple[str, float]]:
    """The classes of an image file, with their probabilities (softmax of the logits), most likely first.

    Raises:
        DataError, ConfigError: see :func:`read_image`.
        FormatError: the network has several inputs or outputs, or gives no logits.
    """
    if len(network.inputs) != 1 or len(network.outputs) != 1 or len(network.outputs[0].shape) != 1:
        raise FormatError("this network is no image classifier: it must have one input and one vector of logits.")
    shape = network.inputs[0].shape
    resize = network.metadata.get("resize")
    fits = isinstance(resize, int) and max(shape) <= resize <= 1 << 14
    pixels = _pixels(path, shape, resize if fits else None)
    if network.normalization is None:
        image = np.asarray(pixels, np.float32) / 255
    else:
        image = _normalised(pixels, *network.normalization)
    logits = network(image[None])[0].astype(np.float64)
    odds = np.exp(logits - logits.max())
    probabilities = odds / odds.sum()
    names = network.classes or ()
    order = np.argsort(-probabilities, kind="stable")
    return [(names[i] if i < len(names) else f"class {i}", float(probabilities[i])) for i in order]
