"""Data sets: each split is one uint8 tensor that fits in memory, with labels, class names and pixel statistics."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor

from abste.errors import ConfigError, DataError, nearest


class DataSet(Protocol):
    """What every data set has, be it a tensor (`ImageData`) or files (`abste.data.ImageFiles`)."""

    @property
    def labels(self) -> Tensor:
        """int64, shape (N,), each an index into `classes`."""

    @property
    def classes(self) -> tuple[str, ...]:
        """The class names."""

    @property
    def mean(self) -> tuple[float, ...]:
        """Per-channel mean of pixels divided by 255, for normalisation."""

    @property
    def std(self) -> tuple[float, ...]:
        """Per-channel standard deviation of pixels divided by 255, for normalisation."""

    @property
    def name(self) -> str:
        """For messages and records."""

    def __len__(self) -> int:
        """How many images there are."""

    def select(self, indices: Tensor) -> Self:
        """The images at `indices` (int64, shape (M,)), in that order."""


D = TypeVar("D", bound=DataSet)


@dataclass(frozen=True)
class ImageData:
    """Labelled images of one size, held as one tensor.

    Args:
        images: uint8, shape (N, C, H, W), pixels 0..255.
        labels: int64, shape (N,), each an index into `classes`.
        classes: the class names.
        mean: per-channel mean of the training pixels divided by 255.
        std: per-channel standard deviation of the training pixels divided by 255, each positive.
        name: the data set's name, for messages and records.

    Raises:
        DataError: where shapes, dtypes or labels do not fit together.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
            raise DataError(
                f"The images of data set '{self.name}' are {images.dtype} of shape {tuple(images.shape)}; "
                "give a non-empty torch.uint8 tensor of shape (N, C, H, W)."
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(
                f"The labels of data set '{self.name}' are {labels.dtype} of shape {tuple(labels.shape)}; "
                f"give torch.int64 of shape ({len(images)},), one label per image."
            )
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= len(self.classes):
            raise DataError(
                f"The labels of data set '{self.name}' run from {low} to {high}, but it names {len(self.classes)} "
                f"classes; give labels from 0 to {len(self.classes) - 1}."
            )
        channels = images.shape[1]
        if len(self.mean) != channels or len(self.std) != channels or not all(value > 0 for value in self.std):
            raise DataError(
                f"The mean and std of data set '{self.name}' do not fit its {channels} channel(s); "
                "give one mean and one positive std per channel."
            )

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> ImageData:
        """The images at `indices` (int64, shape (M,)), in that order, as a copy."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])


class Splits(NamedTuple):
    """The two published splits of a data set."""

    train: ImageData
    test: ImageData


def available() -> list[str]:
    """The names that `load` knows."""
    return sorted(_LOADERS)


def load(name: str, root: str | Path | None = None, download: bool = True, statistics: str = "dataset") -> Splits:
    """Load a data set into memory.

    - `cifar10`: 50,000 training and 10,000 test photos, 3x32x32, ten classes (Krizhevsky, "Learning Multiple Layers of
      Features from Tiny Images", 2009), through torchvision. Files are read only after their published MD5s match.
    - `digits`: 1,797 handwritten digits, 1x8x8, from scikit-learn, so nothing is downloaded. Pixels 0..16 are scaled to
      0..255. It has no published split: ours is fixed, and takes every fifth image of each class for the test.

    Args:
        name: one of `available()`.
        root: for `cifar10`, the folder that holds `cifar-10-batches-py/`, or that folder itself; `digits` ignores it.
            It may be read-only where the data is already there.
        download: fetch the data into `root` where it is missing. Files that are already there are never replaced.
        statistics: what `mean` and `std` are: "dataset", those of the training pixels; or "imagenet", ImageNet's as
            torchvision's networks have them, with which much code normalises CIFAR-10 too.

    Raises:
        ConfigError: the name or the statistics are unknown, or the statistics are those of other channels.
        DataError: the data is missing, truncated or foreign, or could not be downloaded, or a package is missing.
    """
    if name not in _LOADERS:
        raise ConfigError(f"There is no data set named {name!r}; {nearest(name, _LOADERS)}")
    _check_statistics(statistics)  # before anything is downloaded
    splits = _LOADERS[name](None if root is None else Path(root).expanduser(), download)
    mean, std = _chosen(statistics, name, splits.train.mean, splits.train.std)
    return Splits(*(replace(split, mean=mean, std=std) for split in splits))


class Description(NamedTuple):
    """What a data set is, without its images: see `ImageData`."""

    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]


def describe(name: str, statistics: str = "dataset") -> Description | None:
    """Class names and pixel statistics of a data set, from no file; None where the name is unknown.

    Raises:
        ConfigError: see `load`.
    """
    _check_statistics(statistics)
    if name == "cifar10":
        return Description(_CIFAR10_CLASSES, *_chosen(statistics, name, _CIFAR10_MEAN, _CIFAR10_STD))
    if name == "digits":
        train = load(name, statistics=statistics).train
        return Description(train.classes, train.mean, train.std)
    return None


_Statistics = tuple[tuple[float, ...], tuple[float, ...]]
IMAGENET: _Statistics = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's pixels divided by 255, as torchvision's networks have them."""
_STATISTICS: dict[str, _Statistics | None] = {
    "dataset": None,
    "imagenet": IMAGENET,
}


def _check_statistics(statistics: str) -> None:
    if statistics not in _STATISTICS:
        raise ConfigError(f"There are no statistics named {statistics!r}; {nearest(statistics, _STATISTICS)}")


def _chosen(statistics: str, name: str, mean: tuple[float, ...], std: tuple[float, ...]) -> _Statistics:
    """Mean and std to normalise with; those given are the data set's own."""
    chosen = _STATISTICS[statistics] or (mean, std)
    if len(chosen[0]) != len(mean):
        raise ConfigError(
            f"The statistics {statistics!r} are those of {len(chosen[0])} channels, and data set '{name}' has "
            f"{len(mean)}; leave statistics at 'dataset'."
        )
    return chosen


def hold_out(train: D, count: int, seed: int) -> tuple[D, D]:
    """Split `count` images off a training set, for choosing hyperparameters without looking at the test set.

    Each class gives its share of `count`, rounded by largest remainder; which of its images go is drawn from `seed`.
    Both parts keep the order of `train`.

    Returns:
        (rest, validation), with `len(train) - count` and `count` images.

    Raises:
        ConfigError: `count` is not between 1 and `len(train) - 1`, or `seed` is negative.
    """
    total = len(train)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 < count < total:
        raise ConfigError(
            f"Cannot hold out {count!r} of the {total} training images of '{train.name}'; give 1 to {total - 1}."
        )
    rng = np.random.default_rng(check_seed(seed))
    labels = train.labels.cpu().numpy()
    sizes = np.bincount(labels, minlength=len(train.classes))
    # Integers throughout: a share that is exact must not lose an image to float rounding.
    quota, remainder = np.divmod(sizes * count, total)
    quota[np.argsort(-remainder, kind="stable")[: count - quota.sum()]] += 1
    held = np.zeros(total, dtype=bool)
    for label, take in enumerate(quota):
        held[rng.permutation(np.flatnonzero(labels == label))[:take]] = True
    return train.select(torch.from_numpy(np.flatnonzero(~held))), train.select(torch.from_numpy(np.flatnonzero(held)))


def check_seed(seed: int) -> int:
    """`seed` itself, or ConfigError where it is no integer >= 0."""
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise ConfigError(f"The seed is {seed!r}; give an integer that is not negative.")
    return seed


def _missing_package(package: str, name: str) -> DataError:
    return DataError(f"Data set '{name}' needs the package {package}; install it with: pip install 'abste[train]'")


def _digits(root: Path | None, download: bool) -> Splits:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise _missing_package("scikit-learn", "digits") from error
    source: Any = load_digits()
    images = torch.from_numpy(np.rint(source.images * (255 / 16)).astype(np.uint8)).unsqueeze(1)
    labels = torch.from_numpy(source.target.astype(np.int64))
    # By position and not by chance, so that the split is the same with every version of every random generator.
    in_test = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        in_test[torch.nonzero(labels == label).squeeze(1)[4::5]] = True
    pixels = images[~in_test].double() / 255
    data = ImageData(
        images,
        labels,
        classes=tuple(str(label) for label in range(10)),
        mean=(round(float(pixels.mean()), 5),),
        std=(round(float(pixels.std(correction=0)), 5),),
        name="digits",
    )
    return Splits(data.select(torch.nonzero(~in_test).squeeze(1)), data.select(torch.nonzero(in_test).squeeze(1)))


_CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_CIFAR10_MEAN = (0.49140, 0.48216, 0.44653)
_CIFAR10_STD = (0.24703, 0.24349, 0.26159)


def _cifar10(root: Path | None, download: bool) -> Splits:
    try:
        from torchvision.datasets import CIFAR10
    except ImportError as error:
        raise _missing_package("torchvision", "cifar10") from error
    if root is None:
        raise DataError(
            "Data set 'cifar10' needs a folder; give the one that holds cifar-10-batches-py, or one to download into."
        )
    md5s = dict([*CIFAR10.train_list, *CIFAR10.test_list, [CIFAR10.meta["filename"], CIFAR10.meta["md5"]]])
    try:
        if root.exists() and not root.is_dir():
            raise DataError(f"{root} is a file; give the folder that holds {CIFAR10.base_folder}.")
        if root.name == CIFAR10.base_folder or any((root / file).exists() for file in md5s):
            folder = root
        else:
            folder = root / CIFAR10.base_folder
            if not folder.exists():
                if not download:
                    raise DataError(
                        f"There is no CIFAR-10 in {root}: it holds no folder {CIFAR10.base_folder}; "
                        "give the folder that does, or allow the download."
                    )
                _download_cifar10(CIFAR10, folder)

        # The files lie in the folder given, whatever its name.
        in_folder = type("CIFAR10InFolder", (CIFAR10,), {"base_folder": ""})
        try:
            # torchvision compares every file's MD5 before it opens the first pickle.
            return Splits(*(_from_torchvision(in_folder(folder, train=train)) for train in (True, False)))
        except RuntimeError as error:
            raise _wrong_file(folder, md5s) from error
    except OSError as error:
        raise DataError(
            f"Cannot read CIFAR-10 in {root}: {error.strerror or error}; check the path and its permissions."
        ) from error


def _from_torchvision(source: Any) -> ImageData:
    return ImageData(
        torch.from_numpy(source.data).permute(0, 3, 1, 2).contiguous(),
        torch.tensor(source.targets, dtype=torch.int64),
        tuple(source.classes),
        _CIFAR10_MEAN,
        _CIFAR10_STD,
        "cifar10",
    )


def _wrong_file(folder: Path, md5s: dict[str, str]) -> DataError:
    """The error that names the first missing or wrong file, as torchvision's does not."""
    from torchvision.datasets.utils import check_integrity

    again = f"remove the folder {folder} and run again to download the data set."
    for file, md5 in md5s.items():
        path = folder / file
        if not path.exists():
            return DataError(f"The CIFAR-10 file {path} is missing; copy it there, or {again}")
        if not check_integrity(path, md5):
            return DataError(f"The file {path} is truncated or not the one of CIFAR-10 (its MD5 is not {md5}); {again}")
    return DataError(f"The files of CIFAR-10 in {folder} cannot be read; {again}")


def _download_cifar10(dataset: Any, folder: Path) -> None:
    """Download and unpack beside `folder`, then rename: `folder` is complete whenever it exists."""
    root = folder.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".cifar10-", dir=root) as scratch:
            dataset(scratch, download=True)
            try:
                (Path(scratch) / dataset.base_folder).rename(folder)
            except OSError:
                if not folder.exists():  # where it does, another process was faster
                    raise
    # Besides OSError and RuntimeError (wrong MD5), http.client raises exceptions of its own for broken transfers.
    except Exception as error:
        reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
        raise DataError(
            f"Could not download CIFAR-10 into {root}: {reason}; try again, or download {dataset.url} by hand, "
            f"unpack it, and give the folder that then holds {dataset.base_folder}."
        ) from error


_LOADERS: dict[str, Callable[[Path | None, bool], Splits]] = {"cifar10": _cifar10, "digits": _digits}
