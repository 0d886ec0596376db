"""Draw how runs learn: accuracy and loss in training, and the accuracy of their evaluations, by epoch.

python docs/figures/curves.py resnet18-curves results/cifar10-resnet18-float results/cifar10-resnet18-w1a32
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from _axes import axes_of, save

from abste.errors import RunError

COLOURS = ("#555555", "#7b1e3a", "#2a7f9e", "#c08a1e")


def main(name: str, runs: list[Path]) -> None:
    figure, axes = axes_of(2)
    for run, colour in zip(runs, COLOURS, strict=False):
        training, evaluations = (of_kind(read(run), kind) for kind in ("train", "evaluation"))
        epochs = [record["epoch"] for record in training]
        axes[0, 0].plot(epochs, [100 * record["accuracy"] for record in training], color=colour, linewidth=0.8)
        axes[0, 1].plot(epochs, [record["loss"] for record in training], color=colour, linewidth=0.8, label=run.name)
        axes[0, 0].plot(
            [record["epoch"] for record in evaluations],
            [100 * record["accuracy"] for record in evaluations],
            "o--",
            color=colour,
            markersize=3,
            linewidth=0.5,
        )
    axes[0, 0].set(title="accuracy, %: line training, dots test", xlabel="epoch")
    axes[0, 1].set(title="training loss", xlabel="epoch")
    axes[0, 1].legend(frameon=False, fontsize=7)
    save(figure, name)


def read(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    if not path.exists():
        raise RunError(f"{run} is not the directory of a run: it holds no metrics.jsonl.")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_kind(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [record for record in records if record["kind"] == kind]


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 2 + len(COLOURS):
        sys.exit(__doc__)
    main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
