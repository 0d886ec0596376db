"""Draw how runs learn: accuracy and loss in training, and the accuracy of their evaluations, by epoch.

python docs/figures/curves.py resnet18-curves results/cifar10-resnet18-float results/cifar10-resnet18-w1a32
"""

from __future__ import annotations

import sys

from _axes import axes_of, save

from abste.report import find_runs

COLOURS = ("#555555", "#7b1e3a", "#2a7f9e", "#c08a1e")


def main(name: str, paths: list[str]) -> None:
    figure, axes = axes_of(2)
    for run, colour in zip(find_runs(paths), COLOURS, strict=False):
        training, evaluations = (run.of_kind(kind) for kind in ("train", "evaluation"))
        epochs = [record["epoch"] for record in training]
        axes[0, 0].plot(epochs, [100 * record["accuracy"] for record in training], color=colour, linewidth=0.8)
        axes[0, 1].plot(
            epochs, [record["loss"] for record in training], color=colour, linewidth=0.8, label=run.path.name
        )
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


if __name__ == "__main__":
    if not 3 <= len(sys.argv) <= 2 + len(COLOURS):
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
