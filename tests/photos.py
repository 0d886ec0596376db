"""Small image files for tests. Each has a colour of its own, so that pixels tell which image they are of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog", "eel")


def noise(seed: int, height: int = 24, width: int = 30) -> Image.Image:
    """Smooth noise, which scaling and cropping change everywhere."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def plain(number: int, height: int = 12, width: int = 12) -> Image.Image:
    """One colour, another for each number up to 1,000."""
    colour = (number % 10 * 25, number // 10 % 10 * 25, number // 100 * 25)
    return Image.new("RGB", (width, height), colour)


def number_of(pixels: np.ndarray) -> int:
    """The number of a plain image, from any of its pixels (3,)."""
    digits = np.rint(np.asarray(pixels) / 25).astype(int)
    return int(digits[0] + 10 * digits[1] + 100 * digits[2])


def make_folder(
    root: Path, images: Mapping[str, int], classes: Sequence[str] = CLASSES, kind: str = "noise", suffix: str = ".jpg"
) -> Path:
    """``root/SPLIT/CLASS/N.suffix`` with so many images per class in each split; split '' for ``root/CLASS``."""
    number = 0
    for split, count in images.items():
        for name in classes:
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                image = plain(number) if kind == "plain" else noise(number, 20 + number % 7, 24 + number % 5)
                image.save(folder / f"{split}{i:03}{suffix}")
                number += 1
    return root
