"""What diagnostics add to a training step, at their default interval of 200 steps.

    python benchmarks/diagnostics.py [--modes eager compiled] [--batch-sizes 128] [--rounds 20] [--out FILE]

ResNet-20 with Bi-Real shortcuts, binary weights and activations (W1A1), AB-Tanh throughout; a step is that of
train_step.py. Three copies of the network take turns in one process, so that what else the machine does meets all of
them: without diagnostics; with a measurement at every step, written as JSON and to TensorBoard; and with diagnostics
that are never due. `measured` is what a measured step takes longer (median of the differences within a round, with
quartiles); `share` is that spread over 200 steps, in steps, of which at most 0.03 is promised. `idle` is what a step
between two measurements takes longer: nothing but noise is expected there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from _common import by_turns, parse, save_steps, training_step
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from abste.diagnostics import Diagnostics

EVERY, PROMISED = 200, 0.03
NEVER = 2**40


def steps(batch_size: int, compiled: bool, folder: Path) -> dict[str, Callable[[], None]]:
    """A training step without diagnostics, with a measurement in every step, and with none ever due."""

    def watched(name: str, every: int) -> Callable[[], None]:
        def prepare(run: nn.Module, optimizer: torch.optim.Optimizer) -> None:
            writer = SummaryWriter(str(folder / name))
            Diagnostics(run, optimizer, every=every, path=folder / f"{name}.jsonl", writer=writer)

        return training_step("W1A1", batch_size, compiled=compiled, prepare=prepare)[1]

    return {
        "without": training_step("W1A1", batch_size, compiled=compiled)[1],
        "measured": watched("measured", 1),
        "idle": watched("idle", NEVER),
    }


def measure(batch_size: int, compiled: bool, rounds: int, warm_up: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of each step."""
    torch.compiler.reset()
    return by_turns(steps(batch_size, compiled, folder), rounds, warm_up)


def main() -> None:
    arguments = parse(__doc__, rounds=20)
    results: list[dict[str, object]] = []
    print(f"{'mode':10}{'step ms':>9}{'measured ms':>13}  {'quartiles':18}{'share':>8}{'idle ms':>9}")
    for mode in arguments.modes:
        for batch_size in arguments.batch_sizes:
            with tempfile.TemporaryDirectory() as folder:
                times = measure(batch_size, mode == "compiled", arguments.rounds, arguments.warm_up, Path(folder))
            step = statistics.median(times["without"])
            extra = [a - b for a, b in zip(times["measured"], times["without"], strict=True)]
            idle = statistics.median(a - b for a, b in zip(times["idle"], times["without"], strict=True))
            low, middle, high = statistics.quantiles(extra, n=4)
            share = middle / EVERY / step
            over = f"  over {PROMISED:.2f}" if share > PROMISED else ""
            print(
                f"{mode:10}{step:9.1f}{middle:13.1f}  {f'{low:.1f} to {high:.1f}':18}{share:8.4f}{idle:9.2f}{over}",
                flush=True,
            )
            results.append(
                {
                    "network": "W1A1",
                    "mode": mode,
                    "batch_size": batch_size,
                    "step_ms": round(step, 2),
                    "measured_ms": round(middle, 2),
                    "quartiles": [round(low, 2), round(high, 2)],
                    "every": EVERY,
                    "share": round(share, 5),
                    "promised": PROMISED,
                    "idle_ms": round(idle, 2),
                }
            )
    save_steps(arguments, results)


if __name__ == "__main__":
    main()
