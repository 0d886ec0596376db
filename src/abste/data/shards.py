"""Shards: tar files of images and labels, as WebDataset has them, read at random.

The format is WebDataset's, the reader is not. Its own reads shards from front to back, so that the order depends on the
number of workers and an epoch cannot be entered in the middle (its authors' answer is to resample). An index of where
each image lies in its tar file makes a shard as accessible as a folder, with any order and an exact resume, and needs
Python's tarfile alone, once.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from abste.data.files import EXTENSIONS, TESTS, TRAIN, FileSplits, ImageFiles, Listing, Names
from abste.errors import ConfigError, DataError

CLASSES = "classes.txt"
INDEX = ".abste-index.npz"
_OPEN_SHARDS = 64
_LONGEST_LABEL = 1000  # bytes; what is longer is no label

Array = np.ndarray[Any, np.dtype[Any]]


class _Index(NamedTuple):
    """Where the images of a split lie, and what their labels say."""

    shard: Array
    """int64, which of the shards."""
    offset: Array
    """int64, bytes."""
    size: Array
    """int64, bytes."""
    names: Names
    labels: Names


class Shards:
    """Images in uncompressed tar files."""

    def __init__(self, root: Path, shards: Sequence[str], index: _Index) -> None:
        self.root = root
        self._shards, self._index = list(shards), index
        self._open: OrderedDict[int, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._index.size)

    def name(self, index: int) -> str:
        return f"{self._shards[self._index.shard[index]]}/{self._index.names[index]}"

    def size(self, index: int) -> int:
        return int(self._index.size[index])

    def read(self, index: int) -> bytes:
        size = self.size(index)
        data = os.pread(self._descriptor(int(self._index.shard[index])), size, int(self._index.offset[index]))
        if len(data) != size:
            raise OSError("the shard has become shorter")
        return data

    def _descriptor(self, shard: int) -> int:
        """The open file of a shard; those used last stay open, since a process may open a thousand files or so."""
        if shard not in self._open:
            if len(self._open) >= _OPEN_SHARDS:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.root / self._shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        self._open.move_to_end(shard)
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # another process opens files of its own

    def __del__(self) -> None:
        for descriptor in self.__dict__.get("_open", {}).values():
            with contextlib.suppress(OSError):
                os.close(descriptor)


def find_shards(root: Path, split: str, layout: str) -> Listing:
    """The images of a split of shards; split is '' where there are none.

    Reading the headers of many large shards takes a while, so the index is kept beside them where that can be written,
    and used as long as names, sizes and times of the shards are the same.

    Raises:
        DataError: there are no shards, one is damaged, or an image has no label, or two.
        OSError: the folder cannot be read.
    """
    where = root / split
    shards = sorted(name for name in os.listdir(where) if name.endswith(".tar") and not name.startswith("."))
    if not shards:
        raise DataError(f"{where} holds no shards; the data set needs {layout}.")
    stamps = [[name, stat.st_size, stat.st_mtime_ns] for name in shards for stat in [(where / name).stat()]]
    index = _read_index(where / INDEX, stamps)
    if index is None:
        index = _scan(where, shards)
        _write_index(where / INDEX, stamps, index)
    classes, labels = _classes(root, index, where)
    source = Shards(root, [f"{split}/{name}" if split else name for name in shards], index)
    return Listing(where, source, classes, torch.from_numpy(labels))


def _scan(where: Path, shards: list[str]) -> _Index:
    rows: list[tuple[int, int, int, str, str]] = []
    for number, name in enumerate(shards):
        path = where / name
        images: dict[str, tuple[int, int, str]] = {}
        labels: dict[str, str] = {}
        dotted: dict[str, str] = {}
        try:
            with tarfile.open(path, "r:") as shard:
                if not _ends(path):  # tarfile would take what is cut off between two images for whole
                    raise tarfile.ReadError("it lacks its end")
                for member in shard:
                    folder, _, file = member.name.rpartition("/")
                    if not member.isfile() or file.startswith("."):
                        continue
                    stem, _, extension = file.partition(".")
                    key, extension = f"{folder}/{stem}".lstrip("/"), f".{extension.lower()}"
                    if extension in EXTENSIONS:
                        if key in images:
                            raise DataError(f"Shard {path} has two images of the key '{key}'; keys must differ.")
                        images[key] = member.offset_data, member.size, member.name
                    elif extension == ".cls":
                        if key in labels:
                            raise DataError(f"Shard {path} has two labels of the key '{key}'; keys must differ.")
                        labels[key] = _label(shard, member)
                    elif extension.endswith(".cls"):
                        dotted[key] = member.name
        except (tarfile.TarError, EOFError) as error:
            raise DataError(
                f"Shard {path} is damaged, compressed or no tar file ({str(error) or 'it ends early'}); "
                "copy or pack it anew."
            ) from error
        for key in dotted:
            if key not in labels:
                raise DataError(
                    f"Shard {path} has the label '{dotted[key]}', but keys end at the first dot of a name: rename it "
                    "and its image, or pack them with write_shards."
                )
        for key in images:
            if key not in labels:
                raise DataError(f"Shard {path} has the image '{images[key][2]}' without a label; add '{key}.cls'.")
        for key in labels:
            if key not in images:
                raise DataError(f"Shard {path} has the label '{key}.cls' without an image; add '{key}.jpg'.")
        rows += [(number, offset, size, name, labels[key]) for key, (offset, size, name) in images.items()]
    if not rows:
        raise DataError(f"The shards in {where} hold no images; they need KEY.jpg beside KEY.cls.")
    shard_of, offset, size, names, texts = zip(*rows, strict=True)
    return _Index(np.array(shard_of), np.array(offset), np.array(size), Names(names), Names(texts))


def _ends(path: Path) -> bool:
    """Whether a tar file has the two empty blocks that close it."""
    with open(path, "rb") as file:
        file.seek(-min(1024, path.stat().st_size), os.SEEK_END)
        return file.read() == bytes(1024)


def _label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    file = shard.extractfile(member) if member.size <= _LONGEST_LABEL else None
    text = "" if file is None else file.read().decode("utf-8", "replace").strip()
    if not text:
        raise DataError(f"The label '{member.name}' of shard {shard.name!s} is empty or too long; give a class.")
    return text


def _classes(root: Path, index: _Index, where: Path) -> tuple[tuple[str, ...], Array]:
    """The class names, and the label of each image as their number."""
    said = sorted(set(index.labels))
    numeric = all(text.isdecimal() for text in said)
    file = root / CLASSES
    if file.exists():
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError as error:
            raise DataError(f"{file} is no text in UTF-8; give one class name a line.") from error
        classes = tuple(line.strip() for line in lines if line.strip())
        twice = [name for name in classes if classes.count(name) > 1]
        if twice:
            raise DataError(f"{file} has the class '{twice[0]}' twice; each name stands for one number.")
    elif numeric:
        if (largest := max(map(int, said))) >= len(index.size):  # so some class must be empty
            raise DataError(f"A label in {where} says {largest}, but there are {len(index.size)} images; correct it.")
        classes = tuple(map(str, range(largest + 1)))
    else:
        classes = tuple(said)
    if numeric:
        numbers = {text: int(text) for text in said if int(text) < len(classes)}
    else:
        numbers = {name: number for number, name in enumerate(classes)}
    for text in said:
        if text not in numbers:
            raise DataError(
                f"A label in {where} says '{text}', but {file} names {len(classes)} classes; correct one or the other."
            )
    return classes, np.array([numbers[text] for text in index.labels], dtype=np.int64)


def _read_index(path: Path, stamps: list[list[Any]]) -> _Index | None:
    """The index that was kept, if it is that of these shards."""
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as kept:
            if json.loads(str(kept["stamps"])) != stamps:
                return None
            names, labels = (_unpacked(kept[f"{what}_text"], kept[f"{what}_ends"]) for what in ("names", "labels"))
            return _Index(kept["shard"], kept["offset"], kept["size"], names, labels)
    except Exception:  # NumPy and zipfile have many words for what is no longer whole
        return None  # none, or damaged: it is made again


def _write_index(path: Path, stamps: list[list[Any]], index: _Index) -> None:
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    with contextlib.suppress(OSError):  # a folder that cannot be written: the index is made again each time
        try:
            with open(temporary, "wb") as file:
                np.savez(
                    file,
                    stamps=np.array(json.dumps(stamps)),
                    shard=index.shard,
                    offset=index.offset,
                    size=index.size,
                    names_text=np.frombuffer(index.names.text, np.uint8),
                    names_ends=index.names.ends,
                    labels_text=np.frombuffer(index.labels.text, np.uint8),
                    labels_ends=index.labels.ends,
                )
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def _unpacked(text: Array, ends: Array) -> Names:
    names = Names(())
    names.text, names.ends = text.tobytes(), ends
    return names


def write_shards(splits: FileSplits, root: str | Path, *, images: int = 1000) -> None:
    """Pack a data set of files, as they are and in their order, into shards that `open_files` reads.

    Args:
        splits: what :func:`abste.data.open_files` found.
        root: where ``train``, ``val`` and ``classes.txt`` go, or all shards where there is one split; new or empty.
        images: how many go into a shard.

    Raises:
        ConfigError: fewer than one image in a shard.
        DataError: the folder is not empty, or cannot be written, or an image cannot be read, or a class has a name that
            does not survive in a line of text.
    """
    if images < 1:
        raise ConfigError(f"A shard of {images} images holds nothing; give 1 or more.")
    for name in splits.train.classes:
        if name.strip() != name or name.splitlines() != [name]:
            raise DataError(
                f"The class {name!r} has a line break, or space at an end, which {CLASSES} cannot hold; rename it."
            )
    root = Path(root)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if any(root.iterdir()):
            raise DataError(f"{root} is not empty; give another folder for the shards.")
        parts = {"": splits.train} if splits.test is None else {TRAIN: splits.train, TESTS[0]: splits.test}
        for split, data in parts.items():
            (root / split).mkdir(exist_ok=True)
            for number, start in enumerate(range(0, len(data), images)):
                _write_shard(data, range(start, min(start + images, len(data))), root / split / f"{number:06}.tar")
        # Last: what was interrupted before it is no data set.
        (root / CLASSES).write_text("".join(f"{name}\n" for name in splits.train.classes), encoding="utf-8")
    except OSError as error:
        raise DataError(f"Cannot write shards into {root}: {error.strerror or error}.") from error


def _write_shard(data: ImageFiles, numbers: range, path: Path) -> None:
    with tarfile.open(path, "w") as shard:
        for number in numbers:
            try:
                image = data.read(number)
            except OSError as error:
                raise DataError(f"Cannot read {data.path(number)}: {error.strerror or error}.") from error
            suffix = Path(data.path(number)).suffix.lower()
            for extension, content in ((suffix, image), (".cls", str(int(data.labels[number])).encode())):
                member = tarfile.TarInfo(f"{number:08}{extension}")
                member.size = len(content)
                shard.addfile(member, io.BytesIO(content))
