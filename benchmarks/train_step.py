"""What a training step of a binary network costs, in steps of the same network in full precision.

    python benchmarks/train_step.py [--modes eager compiled] [--batch-sizes 128 256] [--rounds 30] [--out FILE]

ResNet-20 with binary weights (W1A32) and ResNet-20 with Bi-Real shortcuts, binary weights and activations (W1A1),
AB-Tanh throughout, each beside its float twin: forward, backward, optimizer and schedule in bf16 autocast and
channels_last. The four networks take turns in one process, so that what else the machine does meets all of them alike.
`ms` is the median step, `ratio` the median over rounds of a step divided by the twin's of the same round, with its
quartiles. Promised are at most 1.10 for W1A32 and 1.35 for W1A1.
"""

from __future__ import annotations

import statistics

import torch
from _common import NETWORKS, by_turns, parse, save_steps, training_step, twin

PROMISED = {"W1A32": 1.10, "W1A1": 1.35}


def measure(batch_size: int, compiled: bool, steps: int, warm_up: int) -> dict[str, list[float]]:
    """Milliseconds of each step of each network."""
    torch.compiler.reset()
    functions = {name: training_step(name, batch_size, compiled=compiled)[1] for name in NETWORKS}
    return by_turns(functions, steps, warm_up)


def main() -> None:
    arguments = parse(__doc__, rounds=30, warm_up=4, batch_sizes=(128, 256))
    results: list[dict[str, object]] = []
    print(f"{'':8}{'mode':10}{'batch':>6}{'float ms':>10}{'ms':>8}{'ratio':>7}  quartiles")
    for mode in arguments.modes:
        for batch_size in arguments.batch_sizes:
            milliseconds = measure(batch_size, mode == "compiled", arguments.rounds, arguments.warm_up)
            for name, promised in PROMISED.items():
                ratios = [a / b for a, b in zip(milliseconds[name], milliseconds[twin(name)], strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                float_ms, ms = statistics.median(milliseconds[twin(name)]), statistics.median(milliseconds[name])
                over = f"  over {promised:.2f}" if ratio > promised else ""
                print(
                    f"{name:8}{mode:10}{batch_size:6}{float_ms:10.1f}{ms:8.1f}{ratio:7.3f}  "
                    f"{low:.3f} to {high:.3f}{over}",
                    flush=True,
                )
                results.append(
                    {
                        "network": name,
                        "mode": mode,
                        "batch_size": batch_size,
                        "float_ms": round(float_ms, 2),
                        "ms": round(ms, 2),
                        "ratio": round(ratio, 3),
                        "quartiles": [round(low, 3), round(high, 3)],
                        "promised": promised,
                    }
                )
    save_steps(arguments, results)


if __name__ == "__main__":
    main()
