"""Draw README's picture, estimators.svg: AB-Tanh's surrogate F and slope F' as its blend goes from STE to tanh.

python docs/figures/estimators.py [FILE]
"""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt
import torch

from abste.estimators import ABTanh

BLENDS = {0.0: "#9aa0a6", 0.3: "#f2a65a", 0.6: "#d9573f", 0.9: "#7b1e3a"}


def main(path: Path) -> None:
    # The same file from the same code: no date, no random ids. Text stays text: a third of the size.
    mpl.rcParams.update({"svg.hashsalt": "abste", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9})
    x = torch.linspace(-2.0, 2.0, 801)
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.2, 2.7), layout="constrained")
    left.plot(x, torch.where(x >= 0, 1.0, -1.0), color="black", linewidth=0.8, linestyle=":", label="sign(x)")
    for a, colour in BLENDS.items():
        estimator = ABTanh(blend="constant", a_end=a)
        estimator.set_role("activations")
        label = f"a = {a:g}" + (", clipped STE" if a == 0 else "")
        left.plot(x, estimator.surrogate(x), color=colour, label=label)
        right.plot(x, estimator.slope(x), color=colour, label=label)
    left.set_title("surrogate  F(x) = (1 - a) x + a tanh(kx)/tanh(k)", fontsize=9)
    right.set_title("slope  F'(x), used in the backward", fontsize=9)
    left.legend(frameon=False, fontsize=8)
    right.text(0.98, 0.95, f"k = {estimator.k:g}, t = {estimator.t:g}", transform=right.transAxes, ha="right", va="top")
    for axes in (left, right):
        axes.set_xlabel("x")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.5)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_suffix(".svg"))
