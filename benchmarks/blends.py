"""What AB-STE's blends cost in a training step, in steps with the default one, `progress`.

    python benchmarks/blends.py [--modes eager compiled] [--batch-sizes 128] [--rounds 30] [--out FILE]

ResNet-20 with Bi-Real shortcuts, binary weights and activations (W1A1), AB-Tanh throughout; a step is that of
train_step.py. The copies take turns in one process. `ratio` is the median over rounds of a step divided by that with
`progress` of the same round, with its quartiles. Promised is at most 1.05 for the equilibrium.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from _common import by_turns, parse, save_steps, training_step

from abste.estimators.blends import BLENDS

PROMISED = 1.05


def steps(batch_size: int, compiled: bool) -> dict[str, Callable[[], None]]:
    """A training step with each blend."""
    return {
        blend: training_step("W1A1", batch_size, compiled=compiled, estimator={"name": "ab_tanh", "blend": blend})[1]
        for blend in sorted(BLENDS)
    }


def main() -> None:
    arguments = parse(__doc__, rounds=30)
    results: list[dict[str, object]] = []
    print(f"{'mode':10}{'blend':13}{'ms':>8}{'ratio':>7}  quartiles")
    for mode in arguments.modes:
        for batch_size in arguments.batch_sizes:
            torch.compiler.reset()
            times = by_turns(steps(batch_size, mode == "compiled"), arguments.rounds, arguments.warm_up)
            for blend, milliseconds in times.items():
                pairs = zip(milliseconds, times["progress"], strict=True)
                low, ratio, high = statistics.quantiles((own / progress for own, progress in pairs), n=4)
                promised = PROMISED if blend == "equilibrium" else None
                over = f"  over {promised:.2f}" if promised and ratio > promised else ""
                ms = statistics.median(milliseconds)
                print(f"{mode:10}{blend:13}{ms:8.1f}{ratio:7.3f}  {low:.3f} to {high:.3f}{over}", flush=True)
                results.append(
                    {
                        "blend": blend,
                        "mode": mode,
                        "batch_size": batch_size,
                        "ms": round(ms, 2),
                        "ratio": round(ratio, 3),
                        "quartiles": [round(low, 3), round(high, 3)],
                        "promised": promised,
                    }
                )
    save_steps(arguments, results)


if __name__ == "__main__":
    main()
