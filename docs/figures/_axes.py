"""What figures of runs have in common."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent


def axes_of(columns: int, height: float = 2.8, rows: int = 1) -> tuple[Any, Any]:
    # A fixed salt and no date: the same figure is the same file.
    mpl.rcParams.update({"svg.hashsalt": "abste", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8})
    figure, axes = plt.subplots(
        rows, columns, figsize=(3.7 * columns, height * rows), layout="constrained", squeeze=False
    )
    for each in axes.flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.5)
    return figure, axes


def save(figure: Any, name: str) -> None:
    figure.savefig(HERE / f"{name}.svg", metadata={"Date": None})
    plt.close(figure)
