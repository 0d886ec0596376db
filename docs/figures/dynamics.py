"""Draw what estimators do over real runs, from the diagnostics of a finished study, and write a summary.

abste compare studies/cifar10-resnet8/dynamics.toml --data data --out runs/dynamics
python docs/figures/dynamics.py runs/dynamics            # docs/figures/dynamics-*.svg and results/dynamics.json
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from _axes import HERE, axes_of, save

from abste.errors import RunError
from abste.train.files import write_json

SUMMARY = HERE.parents[1] / "results" / "dynamics.json"
SIDES = ("weights", "activations")
TOLERANCE = 0.1
"""What the equilibrium promises: its budget is met within this share."""
KEPT = (
    "error",
    "variance",
    "variance_ratio",
    "variation",
    "variation_ratio",
    "beyond",
    "slope",
    "drift",
    "effective_lr",
)

Records = list[dict[str, Any]]


def main(study: Path, setting: str = "w1a1") -> None:
    runs = {path.parent.parent.name: path.parent for path in sorted((study / setting).glob("*/seed-0/summary.json"))}
    if not runs:
        raise RunError(f"{study} holds no finished runs of {setting}: run the command above first.")
    records = {arm: read(run / "diagnostics.jsonl") for arm, run in runs.items()}
    colours = dict(zip(records, plt.get_cmap("tab10").colors, strict=False))
    save(plane(records, colours), "dynamics-plane")
    save(blends({arm: found for arm, found in records.items() if arm.startswith("ab_")}), "dynamics-blends")
    save(flips(records, colours), "dynamics-flips")
    budgets = {arm: list(layer_steps(found)) for arm, found in records.items() if "equilibrium" in arm}
    save(budget(budgets), "dynamics-budget")
    summaries = {arm: json.loads((run / "summary.json").read_text(encoding="utf-8")) for arm, run in runs.items()}
    any_run = next(iter(summaries.values()))
    write_json(
        SUMMARY,
        {
            "command": "python docs/figures/dynamics.py",
            "git": any_run["git"],
            "environment": any_run["environment"],
            "recipe": any_run["recipe"],
            "held_out_accuracy": {arm: summary["held_out"]["accuracy"] for arm, summary in summaries.items()},
            "equilibrium": {arm: met(steps) for arm, steps in budgets.items()},
            "steps": [record["step"] for record in next(iter(records.values()))],
            "total": {arm: {side: series(found, side) for side in SIDES} for arm, found in records.items()},
        },
    )
    for arm, steps in budgets.items():
        print(arm, json.dumps(met(steps)))


def read(path: Path) -> Records:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def series(records: Records, side: str) -> dict[str, list[float | None]]:
    return {
        key: [
            None if (value := record["total"][side].get(key)) is None else float(f"{value:.4g}") for record in records
        ]
        for key in KEPT
        if records[0]["total"][side].get(key) is not None
    }


def layer_steps(records: Records) -> Iterator[dict[str, Any]]:
    """Each layer and side of each record, with what its equilibrium reports."""
    for record in records:
        for name, layer in record["layers"].items():
            for side in SIDES:
                entry = layer[side]
                if entry is not None and entry["blend"] is not None and entry["blend"].get("ratio") is not None:
                    yield {"step": record["step"], "layer": name, "side": side, "own": entry, **entry["blend"]}


def bound(step: dict[str, Any]) -> bool:
    """Whether the budget decides: a lies within (0, 1) and may move as far as it wants."""
    return 0 < step["a"] < 1 and not step["slewing"]


def met(steps: list[dict[str, Any]]) -> dict[str, float | int]:
    """How well the budget was met."""
    ratios = np.array([step["ratio"] / step["rho"] for step in steps if bound(step)])
    measured = np.array([step["own"]["variation_ratio"] / step["rho"] for step in steps if bound(step)])
    return {
        "layer_steps": len(steps),
        "share_bound": round(len(ratios) / len(steps), 4),
        "share_at_one": round(float(np.mean([step["a"] >= 1 for step in steps])), 4),
        "share_slewing": round(float(np.mean([bool(step["slewing"]) for step in steps])), 4),
        "bound_within_tolerance_smoothed": round(float((abs(ratios - 1) <= TOLERANCE).mean()), 4),
        "bound_within_tolerance_of_one_step": round(float((abs(measured - 1) <= TOLERANCE).mean()), 4),
        "bound_median_of_one_step": round(float(np.median(measured)), 4),
    }


def smooth(values: list[float], width: int = 9) -> Any:
    """A running mean: single steps are noisy."""
    padded = np.pad(np.array(values, dtype=float), width // 2, mode="edge")
    return np.convolve(padded, np.ones(width) / width, mode="valid")


def plane(records: dict[str, Records], colours: dict[str, Any]) -> Any:
    figure, axes = axes_of(2, 3.2)
    for column, side in enumerate(SIDES):
        each = axes[0, column]
        for arm, found in records.items():
            known = [record["total"][side] for record in found if record["total"][side]["error"] is not None]
            if not known:
                continue
            x, y = (smooth([total[key] for total in known]) for key in ("error", "variation"))
            each.plot(x, y, color=colours[arm], linewidth=1, label=arm)
            each.plot(x[0], y[0], "o", color=colours[arm], markersize=3, fillstyle="none")
            each.plot(x[-1], y[-1], "o", color=colours[arm], markersize=4)
        each.set(title=side, xlabel="estimating error, RMS of sign(x) - F(x)", ylabel="instability, std|g| / mean|g|")
        each.set_yscale("log")
        each.yaxis.set_major_formatter("{x:g}")
        each.yaxis.set_minor_formatter("")
        each.set_yticks([1, 2, 5, 10, 20] if side == "weights" else [1, 1.5, 2, 3, 4])
    axes[0, 1].legend(frameon=False, fontsize=7)
    return figure


def blends(records: dict[str, Records]) -> Any:
    figure, axes = axes_of(2 * len(SIDES), 2.2, len(records))
    for row, (arm, found) in enumerate(records.items()):
        for column, (side, what) in enumerate((side, what) for side in SIDES for what in ("a", "slope")):
            each = axes[row, column]
            layers = [name for name, layer in found[0]["layers"].items() if layer[side] is not None]
            for index, name in enumerate(layers):
                entries = [(record["step"], record["layers"][name][side]) for record in found]
                values = [entry["blend"]["a"] if what == "a" else entry["slope"] for _, entry in entries]
                colour = plt.get_cmap("viridis")(index / max(1, len(layers) - 1))
                each.plot([step for step, _ in entries], values, color=colour, linewidth=0.9, label=name)
            each.set_title(f"{arm}: {'blend a' if what == 'a' else 'mean slope'}, {side}", fontsize=8)
            each.set_xlabel("step")
            if what == "a":
                each.set_ylim(-0.03, 1.03)
    axes[0, 0].legend(frameon=False, fontsize=6)
    return figure


def flips(records: dict[str, Records], colours: dict[str, Any]) -> Any:
    figure, axes = axes_of(2)
    for arm, found in records.items():
        steps = [record["step"] for record in found]
        for each, key in zip(axes[0], ("drift", "effective_lr"), strict=True):
            each.plot(
                steps, smooth([record["total"]["weights"][key] for record in found]), color=colours[arm], label=arm
            )
    axes[0, 0].set(title="binary weights that flip, per step", xlabel="step", yscale="log")
    axes[0, 1].set(title="effective learning rate of standardised latents", xlabel="step", yscale="log")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


def budget(budgets: dict[str, list[dict[str, Any]]]) -> Any:
    figure, axes = axes_of(2)
    for steps in budgets.values():
        chosen = [step for step in steps if bound(step)]
        for side, colour in zip(SIDES, ("#7b1e3a", "#2a7f9e"), strict=True):
            mine = [step for step in chosen if step["side"] == side]
            spent = [step["ratio"] / step["rho"] for step in mine]
            measured = [step["own"]["variation_ratio"] / step["rho"] for step in mine]
            axes[0, 0].plot([step["step"] for step in mine], spent, ".", markersize=2, color=colour, label=side)
            axes[0, 1].hist(np.clip(measured, 0.5, 1.5), bins=50, range=(0.5, 1.5), color=colour, alpha=0.6, label=side)
    axes[0, 0].axhspan(1 - TOLERANCE, 1 + TOLERANCE, color="#888888", alpha=0.15)
    axes[0, 0].set(title="instability / budget, smoothed moments", xlabel="step", ylim=(0.5, 1.5))
    axes[0, 1].axvspan(1 - TOLERANCE, 1 + TOLERANCE, color="#888888", alpha=0.15)
    axes[0, 1].set(title="the same in single steps", xlabel="instability / budget", ylabel="layer-steps")
    axes[0, 0].legend(frameon=False, fontsize=7)
    return figure


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
