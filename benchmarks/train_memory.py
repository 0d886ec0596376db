"""How much memory training a binary network takes, compared with the same network in full precision.

    python benchmarks/train_memory.py [--batch-size 256] [--steps 4] [--out FILE]

Each network trains in a process of its own. `peak_mb` is the highest resident memory while training less that before
the first step; `saved_mb` is what the forward keeps for the backward, each storage once. The networks and the step
are those of train_step.py. Promised is at most 1.15 for the peak of W1A1.

glibc is told to give tensors back to the system as they are freed (MALLOC_MMAP_THRESHOLD_): the peak is then what the
training needs. Else it also counts the holes in the heap, and differs by a fifth from run to run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from _common import NETWORKS, circumstances, save, training_step, twin

from abste.bench.measure import resident

PROMISED = {"W1A1": 1.15}


def child(name: str, batch_size: int, steps: int, threads: int) -> dict[str, float]:
    """Train one network here and measure."""
    torch.set_num_threads(threads)
    _, step = training_step(name, batch_size)
    before = resident()[0]
    for _ in range(steps):
        step()
    peak = resident()[1] - before
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return {"peak_mb": round(peak / 1e6, 2), "saved_mb": round(sum(kept.values()) / 1e6, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--steps", type=int, default=4, help="training steps (default: 4)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    parser.add_argument("--network", choices=NETWORKS, help=argparse.SUPPRESS)  # what a child process measures
    arguments = parser.parse_args()
    if arguments.batch_size < 2 or arguments.steps < 1 or arguments.threads < 1:
        parser.error("--batch-size must be at least 2, --steps and --threads at least 1")
    options = (arguments.batch_size, arguments.steps, arguments.threads)
    if arguments.network:
        print(json.dumps(child(arguments.network, *options)))
        return

    measured: dict[str, dict[str, float]] = {}
    flags = [f"--{key}={value}" for key, value in zip(("batch-size", "steps", "threads"), options, strict=True)]
    for name in NETWORKS:
        command = [sys.executable, __file__, *flags, f"--network={name}"]
        environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
        finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        measured[name] = json.loads(finished.stdout)
    results: list[dict[str, object]] = []
    print(f"{'':8}{'':10}{'float MB':>10}{'MB':>8}{'ratio':>7}")
    for name in (name for name in NETWORKS if twin(name) in NETWORKS):
        for what in ("peak_mb", "saved_mb"):
            mb, float_mb = measured[name][what], measured[twin(name)][what]
            promised = PROMISED.get(name) if what == "peak_mb" else None
            over = f"  over {promised}" if promised and mb / float_mb > promised else ""
            print(f"{name:8}{what[:-3]:10}{float_mb:10.1f}{mb:8.1f}{mb / float_mb:7.3f}{over}")
            results.append(
                {
                    "network": name,
                    "what": what,
                    "float": float_mb,
                    "binary": mb,
                    "ratio": round(mb / float_mb, 3),
                    "promised": promised,
                }
            )
    if arguments.out:
        names = ("batch_size", "steps", "threads")
        summary = {**dict(zip(names, options, strict=True)), **circumstances(), "results": results}
        save(summary, arguments.out)


if __name__ == "__main__":
    main()
