"""Training on two processes of one thread each, beside one process of two threads: images per second.

    python benchmarks/processes.py --data DIR [--rounds 5] [--steps 40] [--out FILE]

Both are whole `abste train` commands on CIFAR-10 with the same global batch, by turns; each round's figure is the
median over its lines of metrics but the first. Promised is at least 0.85 of the one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from _common import circumstances, save

PROMISED = 0.85
BATCH = 256
RECIPES = ("cifar10-resnet20-w1a32", "cifar10-resnet20-w1a1")
LAUNCHERS = {
    "one": "-m abste train --threads 2",
    "two": "-m torch.distributed.run --standalone --nproc-per-node 2 -m abste train --threads 1",
}


def speed(recipe: str, launcher: str, data: str, steps: int) -> float:
    """Images per second of one command."""
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        options = ["--data", data, "--out", str(run), "--max-steps", str(steps)]
        changes = ["--set", "train.log_every=5", "train.compile=false", f"train.batch_size={BATCH}"]
        command = [sys.executable, *launcher.split(), recipe, *options, *changes]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # Each line has the average speed since the start; what is between two lines shows the machine warm.
    seconds = [line["step"] * BATCH / line["samples_per_second"] for line in lines]
    return statistics.median(5 * BATCH / (after - before) for before, after in itertools.pairwise(seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, metavar="DIR", help="where CIFAR-10 lies")
    parser.add_argument("--rounds", type=int, default=5, help="default: 5")
    parser.add_argument("--steps", type=int, default=40, help="steps of each command (default: 40)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.steps < 15:
        parser.error("--rounds must be at least 1 and --steps at least 15")
    results = []
    for recipe in RECIPES:
        speeds: dict[str, list[float]] = {name: [] for name in LAUNCHERS}
        for turn in range(arguments.rounds):
            for name in list(LAUNCHERS)[:: 1 if turn % 2 else -1]:
                speeds[name].append(speed(recipe, LAUNCHERS[name], arguments.data, arguments.steps))
        ratios = [two / one for one, two in zip(speeds["one"], speeds["two"], strict=True)]
        result = {
            "recipe": recipe,
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "images_per_second": {name: round(statistics.median(values), 1) for name, values in speeds.items()},
        }
        print(json.dumps(result), flush=True)
        results.append(result)
    save({"promised": PROMISED, "steps": arguments.steps, **circumstances(), "results": results}, arguments.out)


if __name__ == "__main__":
    main()
