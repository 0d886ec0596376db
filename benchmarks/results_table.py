"""Write the tables of results in README.md and docs/imagenet.md from results/*/summary.json.

    python benchmarks/results_table.py            # rewrites what stands between the markers in both
    python benchmarks/results_table.py --check    # changes nothing; exits 1 where one is not up to date
    python benchmarks/results_table.py --held-out --results results/ablations/NAME   # that folder's own README

A run is listed where its summary has a test accuracy: runs scored on held-out training images are not results.
--held-out lists just those, for an ablation.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGES = {ROOT / "README.md": "cifar10", ROOT / "docs" / "imagenet.md": "folder"}
"""The pages with a table, and the data set whose runs it has."""
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"

# What CIFAR-10 runs of the shipped recipes must reach, in percent, by network and W/A. The STE control has a floor of
# its own, since results/ablations/cifar10-resnet20-w1a32-ste.
FLOORS = {("resnet20", "32/32"): 90.5, ("resnet20", "1/32"): 88.5, ("resnet20_bireal", "1/1"): 81.0}
CONTROL_FLOORS = {("resnet20", "1/32", "`ste`"): 87.0}

HELD_OUT, TRAINING = "Held-out accuracy, %", "Training accuracy, %"
RIGHT = {"Epochs", "Seed", "Test accuracy, %", "Floor, %", "Time, min", "Latents' learning rate", HELD_OUT, TRAINING}


def bits(binarize: dict[str, Any]) -> str:
    """Bits of weights and activations, as the literature writes them."""
    return "/".join("1" if binarize.get(role) else "32" for role in ("weights", "activations"))


def estimator(binarize: dict[str, Any]) -> str:
    """The estimators of weights and activations, one name where they agree."""

    def text(spec: Any) -> str:
        if isinstance(spec, str):
            return f"`{spec}`"
        arguments = ", ".join(f"{key}={value}" for key, value in spec.items() if key != "name")
        return f"`{spec['name']}`" + (f" ({arguments})" if arguments else "")

    names = [text(binarize[role]) for role in ("weights", "activations") if binarize.get(role)]
    if not names:
        return "none (float)"
    return names[0] if len(set(names)) == 1 else f"W {names[0]}, A {names[1]}"


def machine(environment: dict[str, Any]) -> str:
    """Where a run ran and with what."""
    threads = environment["threads"]
    device = environment.get("gpu") or f"{threads} thread{'s' * (threads != 1)} of {environment['cpu']}"
    versions = ", ".join(f"{name} {environment[name]}" for name in ("abste", "python", "torch", "lightning-fabric"))
    return f"{device}; {versions}"


def described(run: str, summary: dict[str, Any]) -> dict[str, Any]:
    """The cells of one run, still without the number of its machine."""
    recipe, cost, git = summary["recipe"], summary["cost"], summary["git"]
    binarize = recipe.get("binarize") or {}
    network, wa, name = recipe["model"]["name"], bits(binarize), estimator(binarize)
    floor = CONTROL_FLOORS.get((network, wa, name), FLOORS.get((network, wa), ""))
    accuracy = f"{100 * summary['test']['accuracy']:.2f}"
    if "averaged" in summary:
        accuracy += f" (averaged weights: {100 * summary['averaged']['test']['accuracy']:.2f})"
    return {
        "Run": run,
        "Network": network,
        "W/A": wa,
        "Estimator": name,
        "Epochs": cost["epochs"],
        "Seed": recipe["train"]["seed"],
        "Test accuracy, %": accuracy,
        "Floor, %": floor if recipe["data"]["name"] == "cifar10" else "",
        "Time, min": f"{cost['seconds'] / 60:.0f}",
        "Machine": machine(summary["environment"]),
        "Commit": "" if git is None else f"`{git['commit'][:10]}`" + (" and changes" if git["modified"] else ""),
    }


def ablated(run: str, summary: dict[str, Any]) -> dict[str, Any]:
    """The cells of one run of an ablation."""
    recipe = summary["recipe"]
    optimizer = recipe["optimizer"]
    latent_lr = optimizer.get("latent_lr")
    return {
        "Run": run,
        "W/A": bits(recipe.get("binarize") or {}),
        "Estimator": estimator(recipe.get("binarize") or {}),
        "Latents' learning rate": optimizer["lr"] if latent_lr is None else latent_lr,
        "Epochs": summary["cost"]["epochs"],
        "Seed": recipe["train"]["seed"],
        HELD_OUT: f"{100 * summary['held_out']['accuracy']:.2f}",
        TRAINING: f"{100 * summary['train']['accuracy']:.2f}",
        "Machine": machine(summary["environment"]),
    }


def table(
    summaries: dict[str, dict[str, Any]], describe: Callable[[str, dict[str, Any]], dict[str, Any]], folder: Path
) -> str:
    """The Markdown between the markers, from summaries by the name of their run, a directory in `folder`."""
    if not summaries:
        return "No run is committed yet."
    order = ["32/32", "1/32", "1/1"]
    rows = [describe(run, summary) for run, summary in summaries.items()]
    rows.sort(key=lambda row: (order.index(row["W/A"]) if row["W/A"] in order else len(order), row["Run"]))
    machines = list(dict.fromkeys(row["Machine"] for row in rows))
    for row in rows:
        row["Machine"] = machines.index(row["Machine"]) + 1
        row["Run"] = f"[{row['Run']}]({(folder / row['Run']).as_posix()})"
    columns = [column for column in rows[0] if any(row[column] != "" for row in rows)]
    rule = ["---:" if column in RIGHT else "---" for column in columns]
    cells = [columns, rule, *([str(row[column]) for column in columns] for row in rows)]
    lines = [f"| {' | '.join(each)} |" for each in cells]
    notes = [f"Machine {number}: {where}." for number, where in enumerate(machines, 1)]
    return "\n".join([*lines, "", "  \n".join(notes)])


def replaced(text: str, block: str, page: Path) -> str:
    """The page's text with `block` between its markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"results_table: {page.name} has no {BEGIN} ... {END}.")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether the pages are up to date")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="folder of run directories")
    parser.add_argument("--readme", type=Path, help="one page with the markers, in place of the project's own")
    parser.add_argument("--data", default="cifar10", help="the runs for --readme: on this data set (default: cifar10)")
    parser.add_argument("--held-out", action="store_true", help="list the runs that were scored on held-out images")
    arguments = parser.parse_args()
    split, describe = ("held_out", ablated) if arguments.held_out else ("test", described)
    found = {file.parent.name: json.loads(file.read_text("utf-8")) for file in arguments.results.glob("*/summary.json")}
    pages = PAGES
    if arguments.held_out or arguments.readme:
        pages = {arguments.readme or arguments.results / "README.md": arguments.data}
    stale = False
    for page, data in pages.items():
        summaries = {
            run: summary
            for run, summary in sorted(found.items())
            if split in summary and summary["recipe"]["data"]["name"] == data
        }
        old = page.read_text(encoding="utf-8")
        folder = Path(os.path.relpath(arguments.results, page.parent))
        new = replaced(old, table(summaries, describe, folder), page)
        stale = stale or old != new
        if not arguments.check:
            page.write_text(new, encoding="utf-8")
            print(f"{page.name}: {len(summaries)} runs")
        elif old != new:
            command = "run python benchmarks/results_table.py."
            print(f"{page.name}'s results are not those of its runs: {command}", file=sys.stderr)
    return int(arguments.check and stale)


if __name__ == "__main__":
    sys.exit(main())
