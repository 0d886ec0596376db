"""Trained packed networks that come with abste; each file says of itself where it comes from. Needs numpy alone.

>>> available()
['cifar10-resnet20-w1a1', 'cifar10-resnet20-w1a32']

``abste.load("zoo:cifar10-resnet20-w1a1")`` loads one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from abste.errors import ConfigError, nearest

PREFIX = "zoo:"
"""What a name begins with where a path could stand too."""

_FOLDER = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Entry:
    """What a network of the zoo says of itself.

    Attributes:
        name: what stands behind ``zoo:``; also the name of the run in results/, whose summary has the whole record.
        description: one line.
        accuracy: top-1 on the test set, 0 to 1, of the trained network in float32, after its last epoch: a single run.
        dataset: what it was trained and tested on.
        epochs, seed: of the run.
        commit: of the code that trained it.
        file_bytes: size of the file.
    """

    name: str
    description: str
    accuracy: float
    dataset: str
    epochs: int
    seed: int
    commit: str
    file_bytes: int


def available() -> list[str]:
    """The names of the networks, sorted."""
    return sorted(path.stem for path in _FOLDER.glob("*.abste"))


def resolve(path: str | os.PathLike[str]) -> Path:
    """The file of a network: ``"zoo:NAME"`` is one of ours, everything else is a path.

    Raises:
        ConfigError: there is no network of that name in the zoo.
    """
    text = os.fspath(path)
    if not text.startswith(PREFIX):
        return Path(path)
    name = text.removeprefix(PREFIX)
    known = available()
    if name not in known:
        raise ConfigError(f"there is no network {name!r} in the zoo; {nearest(name, known)}")
    return _FOLDER / f"{name}.abste"


def entries() -> list[Entry]:
    """What is known of each network, in the order of `available`."""
    from abste.deploy import format as abste_format

    found = []
    for name in available():
        data = resolve(PREFIX + name).read_bytes()
        facts = abste_format.read(data).metadata or {}
        found.append(
            Entry(
                name,
                facts["description"],
                facts["accuracy"],
                facts["dataset"],
                facts["epochs"],
                facts["seed"],
                facts["commit"],
                len(data),
            )
        )
    return found
