from __future__ import annotations

import json
import multiprocessing
import socket
import sys
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch

from abste.data import ImageData, Splits, describe, sets
from abste.train import Recipe, load_recipe

sys.path.insert(0, str(Path(__file__).parent))  # for the processes below, which import abste_child by name
import abste_child

TINY = ["train.threads=1", "train.epochs=3", "model.kwargs.width=4", "train.log_every=5"]


@pytest.fixture(scope="session")
def tiny() -> Callable[..., Recipe]:
    """A recipe that trains in a second: ``tiny("optimizer.lr=1")``."""

    def make(*overrides: str) -> Recipe:
        return load_recipe("digits-resnet8-w1a32", [*TINY, *overrides])

    return make


def metrics(run: Path) -> list[dict[str, Any]]:
    """metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "samples_per_second"} for line in lines]


@pytest.fixture(scope="session")
def outcome() -> Callable[[Path], Any]:
    """All that a run computed, for comparing runs: weights bit for bit, metrics, results."""

    def read(run: Path) -> Any:
        summary = json.loads((run / "summary.json").read_text())
        weights = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
        return weights, metrics(run), summary.get("test"), summary.get("averaged")

    return read


@pytest.fixture
def made_cifar10(monkeypatch: pytest.MonkeyPatch) -> Splits:
    """What the data set "cifar10" is in this test: 80 images to train on and 20 to test on, made up."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 3, 32, 32), dtype=torch.uint8, generator=generator)
    description = describe("cifar10")
    assert description is not None
    whole = ImageData(pixels, torch.arange(100) % 10, *description, name="cifar10")
    made = Splits(whole.select(torch.arange(80)), whole.select(torch.arange(80, 100)))
    monkeypatch.setitem(sets._LOADERS, "cifar10", lambda root, download: made)
    return made


class Child:
    """``abste ARGUMENTS`` in a process forked from one that has imported torch: starting takes no seconds."""

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["abste_child", "abste.train.loop", "abste.nn", "torch.utils.tensorboard", "sklearn.datasets", "torchvision"]
    )

    def __init__(self, log: Path, *arguments: str, **options: Any) -> None:
        self.log = log
        self.process: BaseProcess = self.context.Process(
            target=abste_child.run, args=(list(map(str, arguments)), str(log)), kwargs=options
        )
        self.process.start()

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    @property
    def output(self) -> str:
        return self.log.read_text() if self.log.exists() else ""

    def wait(self, seconds: float = 60) -> int:
        """Exit status; minus the signal's number after a signal."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"still running after {seconds} s:\n{self.output}"
        return self.process.exitcode


@pytest.fixture
def abste(tmp_path: Path) -> Any:
    """Start ``abste ARGUMENTS``: ``abste("train", ...)`` gives a Child."""
    children: list[Child] = []

    def start(*arguments: str, **options: Any) -> Child:
        child = Child(tmp_path / f"log{len(children)}", *arguments, **options)
        children.append(child)
        return child

    yield start
    for child in children:
        if child.process.is_alive():
            child.process.kill()
        child.process.join()


@pytest.fixture
def pair(abste: Any) -> Any:
    """Start a run on two processes, with the environment that torchrun gives them."""

    def start(*arguments: Any) -> list[Any]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        common = {
            "TORCHELASTIC_RUN_ID": "test",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
        }
        return [
            abste("train", *arguments, environment=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]

    return start
