"""From an image file to an image of one size, by transforms of torchvision; chance is drawn from a given seed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from abste.data.batches import FLIPS
from abste.errors import ConfigError, nearest

View = Callable[[Any], Any]
"""Takes a PIL image and gives one."""


@dataclass(frozen=True)
class Views:
    """How images of any size become images of one size. All steps are those of ``torchvision.transforms.v2``.

    In training: RandomResizedCrop, flip, ColorJitter, RandAugment, in this order, and MixUp or CutMix on the batch. In
    evaluation: Resize, so that the shorter side is `resize`, and CenterCrop. Images are scaled bilinearly, by Pillow.

    Args:
        size: height and width in pixels.
        resize: the shorter side in evaluation; by default 8/7 of the larger of `size`, as 256 is of 224.
        scale: the smallest and largest part of an image's area that a training crop has.
        ratio: the smallest and largest width of a training crop, in heights.
        flip: see :class:`abste.data.Augment`.
        color_jitter: brightness, contrast, saturation and hue, or the first three; None for none.
        rand_augment: number of operations and their magnitude (0 to 30); None for none.
        mixup: alpha of the Beta distribution that images of a batch are mixed with; None for none.
        cutmix: alpha likewise, for pasting a part of one image into another. With both, each batch gets either.

    Raises:
        ConfigError: a value out of range.
    """

    size: tuple[int, int]
    resize: int | None = None
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: str = "none"
    color_jitter: tuple[float, ...] | None = None
    rand_augment: tuple[int, int] | None = None
    mixup: float | None = None
    cutmix: float | None = None

    def __post_init__(self) -> None:
        if len(self.size) != 2 or min(self.size) < 1:
            raise ConfigError(f"size is {self.size}; give height and width in pixels.")
        if self.resize is not None and self.resize < max(self.size):
            raise ConfigError(f"resize is {self.resize}; give at least {max(self.size)}, the longer side of the crop.")
        for name, pair in (("scale", self.scale), ("ratio", self.ratio)):
            if len(pair) != 2 or not 0 < pair[0] <= pair[1]:
                raise ConfigError(f"{name} is {list(pair)}; give the smallest and the largest, both above 0.")
        if self.flip not in FLIPS:
            raise ConfigError(f"There is no flip named {self.flip!r}; {nearest(self.flip, FLIPS)}")
        jitter = self.color_jitter
        if jitter is not None and (
            len(jitter) not in (3, 4) or min(jitter) < 0 or (len(jitter) == 4 and jitter[3] > 0.5)
        ):
            raise ConfigError(
                f"color_jitter is {list(jitter)}; give brightness, contrast and saturation, each 0 or more, "
                "and if wanted hue, at most 0.5."
            )
        if self.rand_augment is not None and (
            len(self.rand_augment) != 2 or self.rand_augment[0] < 1 or not 0 <= self.rand_augment[1] <= 30
        ):
            raise ConfigError(
                f"rand_augment is {list(self.rand_augment)}; give a number of operations, 1 or more, "
                "and a magnitude from 0 to 30."
            )
        for name, alpha in (("mixup", self.mixup), ("cutmix", self.cutmix)):
            if alpha is not None and not alpha > 0:
                raise ConfigError(f"{name} is {alpha}; give an alpha above 0.")

    @property
    def shorter_side(self) -> int:
        """`resize`, or what stands for it."""
        return default_resize(self.size) if self.resize is None else self.resize

    def training(self) -> View:
        """One image as a training epoch shows it, but for the flip "alternating"; draws from torch's generator."""
        from torchvision.transforms import v2

        steps: list[Any] = [v2.RandomResizedCrop(list(self.size), scale=self.scale, ratio=self.ratio)]
        if self.flip == "random":
            steps.append(v2.RandomHorizontalFlip())
        if self.color_jitter is not None:
            steps.append(v2.ColorJitter(*self.color_jitter))
        if self.rand_augment is not None:
            operations, magnitude = self.rand_augment
            steps.append(v2.RandAugment(operations, magnitude, num_magnitude_bins=31))
        view: View = v2.Compose(steps) if len(steps) > 1 else steps[0]
        return view

    def evaluation(self) -> View:
        """One image as evaluation shows it."""
        from torchvision.transforms import v2

        view: View = v2.Compose([v2.Resize(self.shorter_side), v2.CenterCrop(list(self.size))])
        return view

    def mixing(self, classes: int) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Mixes a batch; draws from torch's generator. Labels (B,) become float32 (B, classes)."""
        from torchvision.transforms import v2

        ways: list[Any] = []
        if self.mixup is not None:
            ways.append(v2.MixUp(alpha=self.mixup, num_classes=classes))
        if self.cutmix is not None:
            ways.append(v2.CutMix(alpha=self.cutmix, num_classes=classes))
        if not ways:
            return None
        return ways[0] if len(ways) == 1 else v2.RandomChoice(ways)


def default_resize(size: Sequence[int]) -> int:
    """The shorter side in evaluation for a crop of `size` (height and width)."""
    return round(max(size) * 8 / 7)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's CPU generator starts from `seed` in here, and goes on as before behind it."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)
