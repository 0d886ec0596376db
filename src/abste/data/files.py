"""What a data set of files is: images that are read when they are wanted."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from torch import Tensor

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""What an image's name ends with, in small or capital letters: as in torchvision's ImageFolder."""

TRAIN = "train"
TESTS = ("val", "test")
"""Names of the split to evaluate on; where both are there, the first."""


class Names:
    """Strings end to end in one piece of memory: a million of them are shared with workers, not copied by them."""

    def __init__(self, names: Iterable[str]) -> None:
        parts = [name.encode("utf-8", "surrogateescape") for name in names]
        self.text = b"".join(parts)
        self.ends = np.cumsum([len(part) for part in parts], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:
        start = self.ends[index - 1] if index else 0
        return self.text[start : self.ends[index]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[index] for index in range(len(self)))


class Source(Protocol):
    """Where the bytes of images come from, by number."""

    root: Path

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The image's place, relative to `root`, with slashes."""

    def size(self, index: int) -> int:
        """Bytes of its file; OSError where that is not there."""

    def read(self, index: int) -> bytes:
        """The image's file; OSError where it cannot be read."""


@dataclass(frozen=True)
class ImageFiles:
    """Labelled images of any size, read when they are wanted.

    Args:
        source: where their bytes come from.
        indices: int64, shape (N,), the number of each image in `source`.
        labels: int64, shape (N,), each an index into `classes`.
        classes: the class names.
        mean, std: per channel, of pixels divided by 255, for normalisation; three values for RGB, one for grey.
        name: the data set's name, for messages and records.
    """

    source: Source
    indices: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def channels(self) -> int:
        """3 for RGB, 1 for grey."""
        return len(self.mean)

    def select(self, indices: Tensor) -> ImageFiles:
        """The images at `indices` (int64, shape (M,)), in that order."""
        return replace(self, indices=self.indices[indices], labels=self.labels[indices])

    def path(self, index: int) -> str:
        """Where image `index` lies; what is behind a tar file is its name in there."""
        return str(self.source.root / self.source.name(int(self.indices[index])))

    def read(self, index: int) -> bytes:
        """The file of image `index`.

        Raises:
            OSError: it cannot be read.
        """
        return self.source.read(int(self.indices[index]))

    def fingerprint(self) -> str:
        """SHA-256 of class names, file names and labels in order; the pixels are not read."""
        digest = hashlib.sha256("\n".join(self.classes).encode("utf-8", "surrogateescape"))
        for index, label in zip(self.indices.tolist(), self.labels.tolist(), strict=True):
            digest.update(f"\n{label} {self.source.name(index)}".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


class FileSplits(NamedTuple):
    """The splits of a data set of files; `test` is None where there is only one."""

    train: ImageFiles
    test: ImageFiles | None


class Listing(NamedTuple):
    """What was found in one split."""

    where: Path
    source: Source
    classes: tuple[str, ...]
    labels: Tensor
