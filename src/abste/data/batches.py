"""Batches of a data set, augmented on the device in whole-batch tensor operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from abste.data.sets import DataSet, ImageData, check_seed
from abste.errors import ConfigError, nearest

FLIPS = ("none", "random", "alternating")
FILLS = ("reflect", "zero")


@dataclass(frozen=True)
class Augment:
    """How training images are varied. The default varies nothing.

    Args:
        crop_padding: pixels of padding on every side, out of which a crop of the original size is taken at a uniformly
            random place; 0 for no crop.
        crop_fill: what that padding is: "reflect", the image mirrored at its border; or "zero", black, as in
            torchvision's `RandomCrop(size, padding=...)`: pixels of 0 that are normalised with the others.
        flip: mirror left-right "none", "random" (each image with probability 1/2 in each epoch) or "alternating" (a
            coin per image decides whether it is mirrored in the even or in the odd epochs, so that two successive
            epochs show both; Jordan, "94% on CIFAR-10 in 3.29 Seconds on a Single GPU", 2024).
        cutout: side in pixels of a square set to the mean, its centre uniform over the image, so that it may reach
            beyond the border (DeVries and Taylor, "Improved Regularization of Convolutional Neural Networks with
            Cutout", 2017); 0 for none.

    Raises:
        ConfigError: a negative size, an unknown flip or an unknown fill.
    """

    crop_padding: int = 0
    flip: str = "none"
    cutout: int = 0
    crop_fill: str = "reflect"

    def __post_init__(self) -> None:
        for field, value in (("crop_padding", self.crop_padding), ("cutout", self.cutout)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ConfigError(f"{field} is {value!r}; give a number of pixels, 0 or more.")
        if self.flip not in FLIPS:
            raise ConfigError(f"There is no flip named {self.flip!r}; {nearest(self.flip, FLIPS)}")
        if self.crop_fill not in FILLS:
            raise ConfigError(f"There is no crop_fill named {self.crop_fill!r}; {nearest(self.crop_fill, FILLS)}")


class _Plan(NamedTuple):
    """Everything random about one epoch, by position in it; each tensor has shape (N,)."""

    order: Tensor
    crop_y: Tensor
    crop_x: Tensor
    mirror: Tensor
    cutout_y: Tensor
    cutout_x: Tensor


class BatchSource(ABC):
    """What training and evaluation read: batches of (images, labels) of one process, epoch by epoch.

    In training every epoch has an order of its own and leaves out the last, incomplete batch; in evaluation images come
    once each, in the order of the data. A batch depends on the seed, the epoch and its number alone, so an epoch can be
    entered at any step.

    Args:
        data: the images.
        batch_size: images per batch and process.
        seed: an integer that is not negative.
        device: where batches are yielded.
        dtype: floating-point type of the yielded images; normalisation is computed in float32 whatever it is.
        channels_last: yield images in the memory format `torch.channels_last`.
        rank, world_size: this process's number and how many there are. Step i takes `world_size * batch_size` images,
            and each rank its share of them. In evaluation the last step may leave ranks fewer images or none, and a
            rank with none has one batch less.
        train: whether to shuffle, augment and leave out the incomplete batch.

    Attributes:
        unreadable: the images that were left out because they cannot be read, by name, and why.

    Raises:
        ConfigError: a value out of range, or one that does not fit the data.
    """

    def __init__(
        self,
        data: DataSet,
        batch_size: int,
        *,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        train: bool,
    ) -> None:
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size!r}; give an integer of 1 or more.")
        if world_size < 1 or not 0 <= rank < world_size:
            raise ConfigError(f"rank is {rank} of world_size {world_size}; give a rank from 0 to world_size - 1.")
        if train and batch_size * world_size > len(data):
            processes = f" on each of {world_size} processes" if world_size > 1 else ""
            raise ConfigError(
                f"batch_size {batch_size}{processes} is more than the {len(data)} training images of '{data.name}'; "
                f"give at most {len(data) // world_size}."
            )
        if not dtype.is_floating_point:
            raise ConfigError(f"Images cannot be normalised to {dtype}; give a floating-point dtype.")
        self.count = len(data)
        self.batch_size = batch_size
        self.seed = check_seed(seed)
        self.device = torch.device(device)
        self.dtype = dtype
        self.channels_last = channels_last
        self.rank = rank
        self.world_size = world_size
        self.train = train
        self.unreadable: dict[str, str] = {}
        self._mean, self._std = data.mean, data.std
        self._scale: tuple[Tensor, Tensor] | None = None

    def __len__(self) -> int:
        """Batches per epoch of this rank: in training the optimizer steps, the same on every rank."""
        step, total = self.batch_size * self.world_size, self.count
        if self.train:
            return total // step
        return max(0, -(-(total - self.rank * self.batch_size) // step))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of an epoch, from number `start` on: those an uninterrupted epoch yields from there.

        Labels are int64 (B,), or float32 (B, classes) where images are mixed.

        Raises:
            ConfigError: `epoch` is negative, or `start` is not between 0 and `len(self)`.
            DataError: an image cannot be read.
        """
        if epoch < 0:
            raise ConfigError(f"epoch is {epoch}; epochs count from 0.")
        if not 0 <= start <= len(self):
            raise ConfigError(f"Cannot start an epoch of {len(self)} batches at batch {start}.")
        return self._batches(epoch, start)

    def close(self) -> None:
        """Free what one epoch keeps for the next, such as processes; a next one starts it again."""
        return

    @abstractmethod
    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of :meth:`epoch`, whose arguments are checked."""

    def _generator(self, *stream: int) -> torch.Generator:
        """A CPU generator for one use of the seed."""
        return torch.Generator().manual_seed(stream_seed(self.seed, *stream))

    def _normalise(self, images: Tensor, hidden: Tensor | None = None) -> Tensor:
        """uint8 (B, H, W, C) to the yielded (B, C, H, W), with 0, the mean, where `hidden` (B, H, W*C)."""
        _, height, width, channels = images.shape
        if self._scale is None:
            # One factor and one offset per value of an image, and not per channel: the fused multiply-add then runs
            # along whole rows of memory instead of three values at a time.
            std = torch.tensor(self._std, dtype=torch.float64)
            factor = (1 / (255 * std)).float().repeat(height * width)
            offset = (-torch.tensor(self._mean, dtype=torch.float64) / std).float().repeat(height * width)
            self._scale = factor.to(self.device), offset.to(self.device)
        factor, offset = self._scale
        values = torch.addcmul(offset, images.flatten(1).float(), factor).to(self.dtype)
        if hidden is not None:
            values.masked_fill_(hidden.flatten(1), 0)
        values = values.view(-1, height, width, channels).permute(0, 3, 1, 2)
        return values if self.channels_last else values.contiguous()


def share(step: int, batch_size: int, rank: int, world_size: int) -> slice:
    """The positions in an epoch of the batch that a rank gets at a step; the last may reach beyond the end."""
    first = (step * world_size + rank) * batch_size
    return slice(first, first + batch_size)


def stream_seed(seed: int, *stream: int) -> int:
    """The seed of one use of `seed`; SeedSequence keeps nearby seeds and streams independent."""
    return int(np.random.SeedSequence(seed, spawn_key=stream).generate_state(1, np.uint64)[0])


class Batches(BatchSource):
    """Batches of (images, labels) on a device: images (B, C, H, W) normalised to (x/255 - mean)/std, labels int64 (B,).

    A copy of the images, padded for the crop, is kept on the device as uint8. All that is random about an epoch is
    drawn from one CPU generator seeded from (seed, epoch), so a batch is the same on any device.

    Args:
        data: the images.
        batch_size, seed, device, dtype, channels_last, rank, world_size, train: see :class:`BatchSource`.
        augment: how to vary the images; None in evaluation.

    Raises:
        ConfigError: a value out of range, or one that does not fit the data.
    """

    def __init__(
        self,
        data: ImageData,
        batch_size: int,
        *,
        augment: Augment | None,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        train: bool,
    ) -> None:
        super().__init__(
            data,
            batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
            train=train,
        )
        augment = augment or Augment()
        channels, height, width = data.images.shape[1:]
        if not train and augment != Augment():
            raise ConfigError("Evaluation shows images as they are; give augment=None, or train=True.")
        if augment.crop_fill == "reflect" and augment.crop_padding >= min(height, width):
            raise ConfigError(
                f"crop_padding {augment.crop_padding} reflects more than the {height}x{width} pixels of '{data.name}'; "
                f"give at most {min(height, width) - 1}, or crop_fill='zero'."
            )
        if augment.cutout > min(height, width):
            raise ConfigError(
                f"cutout {augment.cutout} is larger than the {height}x{width} images of '{data.name}'; "
                f"give at most {min(height, width)}."
            )

        self.data = data
        self.augment = augment

        self._labels = data.labels.to(self.device)
        self._crops = self._crop_view(data.images.to(self.device), augment.crop_padding, augment.crop_fill)
        self._pixels = (width, channels)  # of a row
        self._row = torch.arange(height, device=self.device)
        self._column = torch.arange(width, device=self.device).repeat_interleave(channels)
        coin = self._generator(0)
        self._coin = torch.rand(len(data), generator=coin) < 0.5  # by image; read by flip="alternating" only

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self._plan(epoch) if self.train else None
        for step in range(start, len(self)):
            part = share(step, self.batch_size, self.rank, self.world_size)
            if plan is None:
                yield self._normalise(self._crops[part, 0, 0].unflatten(2, self._pixels)), self._labels[part]
            else:
                now = _Plan(*(values[part] for values in plan))
                yield self._augmented(now), self._labels[now.order]

    def _plan(self, epoch: int) -> _Plan:
        generator = self._generator(1, epoch)
        total, (height, width), augment = len(self.data), self.data.images.shape[2:], self.augment
        order = torch.randperm(total, generator=generator)
        # All five are always drawn, so that one augmentation changes nothing about the others.
        uniform = torch.rand(5, total, dtype=torch.float64, generator=generator)
        places = 2 * augment.crop_padding + 1
        crop_y, crop_x, cutout_y, cutout_x = (
            (row * size).long() for row, size in zip(uniform[:4], (places, places, height, width), strict=True)
        )
        mirror = self._coin[order] ^ bool(epoch % 2) if augment.flip == "alternating" else uniform[4] < 0.5
        plan = _Plan(order, crop_y, crop_x, mirror, cutout_y, cutout_x)
        return _Plan(*(values.to(self.device) for values in plan))

    @staticmethod
    def _crop_view(images: Tensor, padding: int, fill: str) -> Tensor:
        """All crops of all images as a view, (N, 2p+1, 2p+1, H, W*C), of one padded uint8 copy in NHWC order.

        With channels innermost a crop's row is one contiguous run of W*C bytes, and channels_last comes for free.
        """
        channels, height, width = images.shape[1:]

        def reflected(size: int) -> Tensor:  # torch pads no uint8 by reflection
            place = torch.arange(-padding, size + padding, device=images.device).abs()
            return torch.minimum(place, 2 * (size - 1) - place)

        padded = images.permute(0, 2, 3, 1)
        if padding and fill == "zero":
            padded = F.pad(padded, (0, 0, padding, padding, padding, padding))
        elif padding:
            padded = padded[:, reflected(height).unsqueeze(1), reflected(width)]
        return padded.contiguous().flatten(2).unfold(1, height, 1).unfold(2, width * channels, channels)

    def _augmented(self, plan: _Plan) -> Tensor:
        images = self._crops[plan.order, plan.crop_y, plan.crop_x].unflatten(2, self._pixels)  # contiguous
        if self.augment.flip != "none":
            images = torch.where(plan.mirror.view(-1, 1, 1, 1), images.flip(2), images)
        hidden = None
        if side := self.augment.cutout:
            top, left = (plan.cutout_y - side // 2).unsqueeze(1), (plan.cutout_x - side // 2).unsqueeze(1)
            in_rows = (self._row >= top) & (self._row < top + side)
            in_columns = (self._column >= left) & (self._column < left + side)
            hidden = in_rows.unsqueeze(2) & in_columns.unsqueeze(1)
        return self._normalise(images, hidden)
