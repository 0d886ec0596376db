"""Finds the images of a data set of files: a folder per class, or shards (tar files)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from abste.data.files import EXTENSIONS, TESTS, TRAIN, FileSplits, ImageFiles, Listing, Names
from abste.data.sets import IMAGENET
from abste.data.shards import find_shards
from abste.errors import ConfigError, DataError, nearest

# Of ImageNet's training images, as everywhere in the literature; for grey, their means over the channels.
_MEAN = {3: IMAGENET[0], 1: (0.449,)}
_STD = {3: IMAGENET[1], 1: (0.226,)}


def open_files(
    name: str,
    root: str | Path | None,
    *,
    channels: int = 3,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> FileSplits:
    """Find the images of a data set of files, without reading them.

    - `folder`: ``root/train/CLASS/*.jpg`` and ``root/val`` (or ``test``) likewise, as torchvision's ImageFolder has it,
      in its order; or ``root/CLASS/*.jpg`` alone, which is all training set. Images may lie deeper; names that begin
      with a dot are passed over.
    - `shards`: ``root/train/*.tar`` and ``root/val`` (or ``test``) likewise, or ``root/*.tar`` alone. A shard holds
      ``KEY.jpg`` beside ``KEY.cls``, which has the class as a number, or as a name out of ``root/classes.txt``: one
      name a line, in the order of the numbers. Where that file is missing, classes are called by what the labels say.

    Args:
        name: "folder" or "shards".
        root: the folder.
        channels: 3 for RGB, 1 for grey.
        mean, std: of pixels divided by 255, per channel; by default those of ImageNet.

    Raises:
        ConfigError: another name or number of channels; as many means or deviations as channels are wanted.
        DataError: folder, split, class, label or images are missing, or something is there twice.
    """
    if name not in FILE_SETS:
        raise ConfigError(f"There is no data set of files named {name!r}; {nearest(name, FILE_SETS)}")
    if channels not in _MEAN:
        raise ConfigError(f"Images are read with 3 channels (RGB) or 1 (grey), not {channels}.")
    mean, std = mean or _MEAN[channels], std or _STD[channels]
    if len(mean) != channels or len(std) != channels or not all(value > 0 for value in std):
        raise ConfigError(f"Normalisation of {channels} channel(s) needs as many means, and as many positive stds.")
    find, shape = FILE_SETS[name]
    layout = f"{shape.format('train/')} and {shape.format('val/')}, or {shape.format('')} alone"
    if root is None:
        raise DataError(f"Data set '{name}' needs a folder; give one with {layout}.")
    folder = Path(root).expanduser()
    try:
        if not folder.is_dir():
            what = f"{folder} is a file" if folder.exists() else f"There is no folder {folder}"
            raise DataError(f"{what}; give a folder with {layout}.")
        _check_split_names(folder)
        tests = [test for test in TESTS if (folder / test).is_dir()]
        if not (folder / TRAIN).is_dir():
            if tests:
                raise DataError(f"{folder} has a split '{tests[0]}' but no '{TRAIN}'; it needs {layout}.")
            splits = [find(folder, "", layout)]
        else:
            splits = [find(folder, split, layout) for split in (TRAIN, *tests[:1])]
    except OSError as error:
        raise DataError(f"Cannot read {error.filename or folder}: {error.strerror or error}.") from error
    _check_classes(splits)
    if len(splits) == 2:
        _check_apart(*splits)
    train, *test = (
        ImageFiles(s.source, torch.arange(len(s.labels)), s.labels, s.classes, tuple(mean), tuple(std), name)
        for s in splits
    )
    return FileSplits(train, test[0] if test else None)


_OTHER_NAMES = {"training": TRAIN, "valid": "val", "validation": "val", "testing": "test"}


def _check_split_names(folder: Path) -> None:
    """No split goes by another name, which would make a class of it, or pass it over."""
    for name in sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()):
        meant = _OTHER_NAMES.get(name.lower(), name.lower())
        if meant == name or meant not in (TRAIN, *TESTS):
            continue
        # A class may well be called so, but it holds images, and not folders or shards.
        if any(_visible(e.name for e in os.scandir(folder / name) if e.is_dir() or e.name.endswith(".tar"))):
            raise DataError(f"{folder} has the folder '{name}' where a split is called '{meant}'; rename it so.")


def _check_classes(splits: list[Listing]) -> None:
    """Each class has images in each split, and there are two classes at least."""
    train = splits[0]
    for split, other in zip(splits, reversed(splits), strict=True):
        for name in split.classes:
            if name not in other.classes:
                raise DataError(
                    f"Class '{name}' is in {split.where} but not in {other.where}; both splits need the same classes."
                )
    for split in splits:
        counts = torch.bincount(split.labels, minlength=len(train.classes)).tolist()
        for name, count in zip(train.classes, counts, strict=True):
            if not count:
                raise DataError(
                    f"Class '{name}' has no images in {split.where} (files named {', '.join(EXTENSIONS)}); "
                    "add some, or remove the class."
                )
    for name in train.classes:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"The class {name!r} in {train.where} is no name in UTF-8; rename its folder.") from None
    if len(train.classes) < 2:
        raise DataError(f"{train.where} has images of one class alone, '{train.classes[0]}'; give at least two.")


def _check_apart(train: Listing, test: Listing) -> None:
    """No image of the test split is in the training set under the same name: copied folders, shards or classes."""

    def plain(split: Listing, index: int) -> str:
        return split.source.name(index).partition("/")[2]

    named = {plain(test, index): index for index in range(len(test.source))}
    twice = []
    for index in range(len(train.source)):
        other = named.get(plain(train, index))
        try:
            if (
                other is not None
                and train.source.size(index) == test.source.size(other)
                and train.source.read(index) == test.source.read(other)
            ):
                twice.append(train.source.name(index))
        except OSError:
            continue  # it is told when it is wanted
    if twice:
        more = f" (and {len(twice) - 1} more)" if len(twice) > 1 else ""
        raise DataError(
            f"The image {train.source.root / twice[0]}{more} is in {test.where} too; "
            "remove one of them, or accuracy would say nothing."
        )


def _find_folder(root: Path, split: str, layout: str) -> Listing:
    """The images of a split of a folder; split is '' where there are none."""
    where = root / split
    classes = _visible(entry.name for entry in os.scandir(where) if entry.is_dir())
    if not classes:
        raise DataError(f"{where} holds no folders of classes; the data set needs {layout}.")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = list(_images(os.path.join(where, name)))
        paths += found
        labels += [label] * len(found)
    source = Folder(root, (os.path.relpath(path, root) for path in paths))
    return Listing(where, source, tuple(classes), torch.tensor(labels, dtype=torch.int64))


def _images(folder: str) -> Iterator[str]:
    """The paths of the images in a folder and those below it, in ImageFolder's order."""

    def stop(error: OSError) -> None:
        raise error

    found: list[tuple[str, list[str]]] = []
    above: dict[str, list[tuple[int, int]]] = {}  # each folder and those that it lies in
    for inner, folders, files in os.walk(folder, followlinks=True, onerror=stop):
        stat = os.stat(inner)
        this, outer = (stat.st_dev, stat.st_ino), above.get(os.path.dirname(inner), [])
        if this in outer:
            raise DataError(f"{inner} is reached by a link from within itself, so its images have no end; remove it.")
        above[inner] = [*outer, this]
        folders[:] = _visible(folders)
        found.append((inner, _visible(files)))
    for inner, files in sorted(found):
        yield from (os.path.join(inner, file) for file in files if file.lower().endswith(EXTENSIONS))


def _visible(names: Iterable[str]) -> list[str]:
    """Sorted, without what desktops and archivers leave behind."""
    return sorted(name for name in names if not name.startswith(".") and name != "__MACOSX")


class Folder:
    """Image files in a folder."""

    def __init__(self, root: Path, names: Iterable[str]) -> None:
        self.root = root
        self._names = Names(names)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def size(self, index: int) -> int:
        return (self.root / self._names[index]).stat().st_size

    def read(self, index: int) -> bytes:
        with open(os.path.join(self.root, self._names[index]), "rb") as file:
            return file.read()


Finder = Callable[[Path, str, str], Listing]

FILE_SETS: dict[str, tuple[Finder, str]] = {
    "folder": (_find_folder, "{}CLASS/*.jpg"),
    "shards": (find_shards, "{}*.tar (KEY.jpg beside KEY.cls)"),
}
"""The names that `open_files` knows; what finds the images of a split, and where it wants them, '{}' for the split."""
