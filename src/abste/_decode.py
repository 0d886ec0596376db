"""Decodes image files as training, evaluation and `abste predict` see them. Needs Pillow, not torch."""

from __future__ import annotations

import os
import warnings
from typing import Any, BinaryIO


class Unreadable(Exception):
    """What is wrong with an image, in words."""


def decode(file: str | os.PathLike[str] | BinaryIO, channels: int) -> Any:
    """An image file as an upright PIL image of 3 channels (RGB) or 1 (grey), eight bits each.

    Raises:
        Unreadable: it cannot be opened, is no image that Pillow reads, is truncated or too large, or has more than
            eight bits.
    """
    from PIL import ExifTags, Image, ImageOps

    try:
        # Warnings are of odd metadata, or of a size that Pillow takes nevertheless.
        with warnings.catch_warnings(action="ignore"), Image.open(file) as opened:
            image: Any = opened
            image.load()
            if image.mode.startswith(("I", "F")):  # Pillow would make all above 255 white
                raise Unreadable("it has more than eight bits per channel")
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                image = ImageOps.exif_transpose(image)
            mode = "RGB" if channels == 3 else "L"
            return image if image.mode == mode else image.convert(mode)
    except Unreadable:
        raise
    except Exception as error:  # Pillow's readers of damaged files raise whatever their parsing comes to
        if isinstance(error, OSError) and error.errno is not None:
            reason = error.strerror
        elif isinstance(error, Image.DecompressionBombError):
            reason = f"it has more than the {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels that Pillow takes"
        elif "truncated" in str(error).lower():
            reason = "it is truncated"
        else:
            reason = "it is damaged, or no image that Pillow reads"
        raise Unreadable(reason) from error
