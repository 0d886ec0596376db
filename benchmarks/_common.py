"""What the benchmarks of training share: the networks they compare, and what they say about where they ran."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn

import abste
import abste.models
from abste.bench.report import processor
from abste.train import load_recipe

# Each binary network and the same network in full precision.
NETWORKS: dict[str, tuple[str, dict[str, str] | None]] = {
    "W1A32": ("resnet20", {"weights": "ab_tanh"}),
    "W1A32's float twin": ("resnet20", None),
    "W1A1": ("resnet20_bireal", {"weights": "ab_tanh", "activations": "ab_tanh"}),
    "W1A1's float twin": ("resnet20_bireal", None),
}


def twin(name: str) -> str:
    """The float network that a binary one is compared with."""
    return f"{name}'s float twin"


def training_step(
    name: str,
    batch_size: int,
    *,
    compiled: bool = False,
    estimator: Any = None,
    prepare: Callable[[nn.Module, torch.optim.Optimizer], object] | None = None,
) -> tuple[nn.Module, Callable[[], None]]:
    """A network of NETWORKS for CIFAR-10 and a function that trains it for one step, always on the same noise.

    A usual step: channels_last, bf16 autocast, SGD with Nesterov, and the estimators' schedule,
    here in the middle of training. (Ours for CIFAR-10 have Muon, which costs both alike, and images that grow.)
    ``estimator`` takes the place of AB-Tanh; ``prepare`` gets what the step will call, and its optimizer.
    """
    torch.manual_seed(0)
    architecture, binarization = NETWORKS[name]
    model = abste.models.create(architecture)
    if binarization is not None:
        chosen = dict.fromkeys(binarization, estimator) if estimator else binarization
        abste.convert(model, **chosen, example_input=torch.zeros(1, 3, 32, 32))
    model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(abste.parameter_groups(model, 0.01, 5e-4), lr=0.01, momentum=0.9, nesterov=True)
    schedule = abste.EstimatorSchedule(model, total_steps=2000)
    schedule.load_state_dict({"last_step": 1000, "total_steps": 2000})
    run = torch.compile(model) if compiled else model
    if prepare is not None:
        prepare(run, optimizer)
    images = torch.randn(batch_size, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 10, (batch_size,))

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = nn.functional.cross_entropy(run(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return model, step


def parse(description: str, rounds: int, warm_up: int = 3, batch_sizes: tuple[int, ...] = (128,)) -> argparse.Namespace:
    """The options of a benchmark of training steps, checked; torch's threads are set.

    Args:
        description: the script's docstring.
        rounds, warm_up, batch_sizes: the defaults.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes, sizes = ["eager", "compiled"], " ".join(map(str, batch_sizes))
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes, help="default: eager compiled")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=list(batch_sizes), help=f"default: {sizes}")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"timed steps of each copy (default: {rounds})")
    parser.add_argument("--warm-up", type=int, default=warm_up, help=f"untimed steps before (default: {warm_up})")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if min(arguments.batch_sizes) < 2 or arguments.rounds < 2 or arguments.warm_up < 1 or arguments.threads < 1:
        parser.error("--batch-sizes and --rounds must be at least 2, --warm-up and --threads at least 1")
    torch.set_num_threads(arguments.threads)
    return arguments


def save_steps(arguments: argparse.Namespace, results: list[dict[str, object]]) -> None:
    """Record the results of a benchmark of training steps where --out says, with how they came about."""
    summary = {"rounds": arguments.rounds, "threads": arguments.threads, "precision": "bf16 autocast"}
    save({**summary, **circumstances(), "results": results}, arguments.out)


def by_turns(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Milliseconds of each call of each function. They take turns, there and back, so that noise meets all of them."""
    milliseconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(-warm_up, rounds):
        for name in list(functions)[:: 1 if i % 2 else -1]:
            start = time.perf_counter()
            functions[name]()
            if i >= 0:
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return milliseconds


class Launch(NamedTuple):
    """A way to run ``abste train``: the command up to the recipe, and variables beside those there are."""

    command: str
    environment: Mapping[str, str] = MappingProxyType({})


def launched_by_turns(
    a: tuple[str, Launch], b: tuple[str, Launch], recipe: str, changes: Sequence[str], arguments: argparse.Namespace
) -> dict[str, Any]:
    """How many times as fast as ``b`` a training launched as ``a`` runs, each with its name; whole commands, by turns.

    Args:
        a, b: the two.
        recipe, changes: what is trained, and values for ``--set``.
        arguments: of :func:`parse_launched`.
    """
    launches = dict((a, b))
    speeds: dict[str, list[float]] = {name: [] for name in launches}
    for turn in range(arguments.rounds):
        for name in list(launches)[:: 1 if turn % 2 else -1]:
            speeds[name].append(_images_per_second(launches[name], recipe, changes, arguments))
    ratios = [ours / theirs for ours, theirs in zip(speeds[a[0]], speeds[b[0]], strict=True)]
    result = {
        "recipe": recipe,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "images_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
    }
    print(json.dumps(result), flush=True)
    return result


def _images_per_second(
    launch: Launch, recipe: str, changes: Sequence[str], arguments: argparse.Namespace, every: int = 5
) -> float:
    """The median over a run's lines of metrics, but for the first."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--data", arguments.data, "--out", str(run), "--max-steps", str(arguments.steps)]
        options += ["--set", f"train.log_every={every}", *changes]
        command = [sys.executable, *launch.command.split(), recipe, *options]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **launch.environment})
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        batch = load_recipe(run / "recipe.toml").train.batch_size
    # Each line has the average speed since the start; what is between two lines shows the machine warm.
    seconds = [line["step"] * batch / line["samples_per_second"] for line in lines]
    return statistics.median(every * batch / (after - before) for before, after in itertools.pairwise(seconds))


def parse_launched(description: str) -> argparse.Namespace:
    """The options of a benchmark of whole commands, checked.

    Args:
        description: the script's docstring.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="where CIFAR-10 lies")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=40, help="steps of each command (default: 40)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 15:
        parser.error("--rounds must be at least 1 and --steps at least 15")
    return arguments


def save(result: dict[str, Any], out: Path | None) -> None:
    """Record a result where --out says, if it does."""
    if out:
        out.write_text(json.dumps(result, indent=2) + "\n")


def circumstances() -> dict[str, dict[str, str]]:
    """The machine and the versions, for a benchmark's JSON."""
    return {
        "machine": {"processor": processor(), "system": platform.platform(terse=True)},
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "abste": abste.__version__},
    }
