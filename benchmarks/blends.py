"""What AB-STE's blends cost in a training step, in steps with the default one, `progress`.

    python benchmarks/blends.py [--modes eager compiled] [--batch-size 128] [--rounds 30] [--out FILE]

ResNet-20 with Bi-Real shortcuts, binary weights and activations (W1A1), AB-Tanh throughout; a step is that of
train_step.py. The copies take turns in one process. `ratio` is the median over rounds of a step divided by that with
`progress` of the same round, with its quartiles. Promised is at most 1.05 for the equilibrium.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from _common import by_turns, circumstances, save, training_step

from abste.estimators.blends import BLENDS

PROMISED = 1.05


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    modes = ["eager", "compiled"]
    parser.add_argument("--modes", nargs="+", choices=modes, default=modes, help="default: eager compiled")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--rounds", type=int, default=30, help="timed steps of each copy (default: 30)")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps before (default: 3)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if arguments.batch_size < 2 or arguments.rounds < 2 or arguments.warm_up < 1 or arguments.threads < 1:
        parser.error("--batch-size and --rounds must be at least 2, --warm-up and --threads at least 1")
    torch.set_num_threads(arguments.threads)

    results: list[dict[str, object]] = []
    print(f"{'mode':10}{'blend':13}{'ms':>8}{'ratio':>7}  quartiles")
    for mode in arguments.modes:
        torch.compiler.reset()
        functions = {
            blend: training_step(
                "W1A1",
                arguments.batch_size,
                compiled=mode == "compiled",
                estimator={"name": "ab_tanh", "blend": blend},
            )[1]
            for blend in sorted(BLENDS)
        }
        times = by_turns(functions, arguments.rounds, arguments.warm_up)
        for blend, milliseconds in times.items():
            pairs = zip(milliseconds, times["progress"], strict=True)
            low, ratio, high = statistics.quantiles((own / progress for own, progress in pairs), n=4)
            over = f"  over {PROMISED:.2f}" if blend == "equilibrium" and ratio > PROMISED else ""
            ms = statistics.median(milliseconds)
            print(f"{mode:10}{blend:13}{ms:8.1f}{ratio:7.3f}  {low:.3f} to {high:.3f}{over}", flush=True)
            results.append(
                {
                    "blend": blend,
                    "mode": mode,
                    "batch_size": arguments.batch_size,
                    "ms": round(ms, 2),
                    "ratio": round(ratio, 3),
                    "quartiles": [round(low, 3), round(high, 3)],
                }
            )
    if arguments.out:
        summary = {
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "precision": "bf16 autocast",
            "promised": {"equilibrium": PROMISED},
            **circumstances(),
            "results": results,
        }
        save(summary, arguments.out)


if __name__ == "__main__":
    main()
