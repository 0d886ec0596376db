"""Fill the tables of docs/results.md: our runs beside what is published for the same network at the same bits.

python docs/results.py            # from results/*/summary.json and results/studies/*/*.json
python docs/results.py --check    # exit 1 where a table is not what those say
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abste import models
from abste.nn import summary
from abste.report import load_study
from abste.train.published import PUBLISHED, TITLES
from abste.train.recipe import Recipe, load_recipe

DOCS = Path(__file__).parent
PAGE = DOCS / "results.md"
RESULTS = DOCS.parent / "results"
STUDIES = DOCS.parent / "studies"
IMAGES = 50_000
HEAD = ["method", "accuracy, %", "epochs", "PFLOP", "seeds", "where"]


@dataclass(frozen=True)
class Ours:
    """The runs of one recipe, which differ in their seeds alone."""

    recipe: Recipe
    accuracies: list[float]
    flops: float
    where: str

    @property
    def method(self) -> str:
        binarize = self.recipe.binarize
        sides = [] if binarize is None else [side for side in (binarize.weights, binarize.activations) if side]
        names = list(dict.fromkeys(side if isinstance(side, str) else _text(side) for side in sides))
        optimizer = "" if self.recipe.optimizer.name == "sgd" else f", {self.recipe.optimizer.name.capitalize()}"
        return f"**abste**: {' and '.join(f'`{name}`' for name in names) or 'full precision'}{optimizer}"

    @property
    def row(self) -> list[str]:
        accuracy, seeds = f"{statistics.fmean(self.accuracies):.2f}", "single run"
        if len(self.accuracies) > 1:
            accuracy, seeds = f"{accuracy} ± {statistics.stdev(self.accuracies):.2f}", str(len(self.accuracies))
        epochs = f"{self.recipe.train.epochs:g}"
        return [self.method, accuracy, epochs, f"{self.flops / 1e15:.2f}", seeds, self.where]


def _text(spec: Any) -> str:
    arguments = dict(spec)
    return f"{arguments.pop('name')}({', '.join(f'{key}={value}' for key, value in arguments.items())})"


def ours() -> Iterator[Ours]:
    """All that was scored on the test set of CIFAR-10."""
    for path in sorted(RESULTS.glob("*/summary.json")):
        run = json.loads(path.read_text(encoding="utf-8"))
        if run["recipe"]["data"]["name"] == "cifar10" and "test" in run:
            name = path.parent.name
            where = f"[{name}](../results/{name})"
            flops = run["cost"]["estimated_training_flops"]
            yield Ours(load_recipe(path.parent / "recipe.toml"), [100 * run["test"]["accuracy"]], flops, where)
    for path in sorted(RESULTS.glob("studies/*/*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        name = f"{path.parent.name}/{path.stem}"
        study = load_study(STUDIES / f"{name}.toml")
        for setting in report["settings"]:
            if setting["split"] == "test":
                for arm in setting["arms"]:
                    recipe = study.recipe_of(setting["setting"], arm["arm"], arm["lr_scale"])
                    where = f"[{name}](../results/studies/{name}.md), {arm['arm']}"
                    yield Ours(recipe, list(arm["accuracies"].values()), arm["training_flops"], where)


def table(network: str, bits: str, found: list[Ours]) -> str:
    """What is published and what is ours for a network at some bits, by accuracy."""
    wanted = [one for one in found if one.recipe.model.name == network and _bits(one.recipe) == bits]
    macs = summary(models.create(network), (1, 3, 32, 32)).total_macs
    rows = [(statistics.fmean(one.accuracies), one.row) for one in wanted]
    for row in (row for row in PUBLISHED if (row.network, row.bits) == (network, bits)):
        cost = f"{6 * macs * IMAGES * row.epochs / 1e15:.2f}" if row.epochs else ""
        note = f" ({row.note})" if row.note else ""
        epochs = str(row.epochs or "")
        rows.append((row.accuracy, [row.method, f"{row.accuracy:.2f}", epochs, cost, "not said", row.source + note]))
    rows.sort(key=lambda row: -row[0])
    lines = [HEAD, ["---", *["---:"] * 4, "---"], *(cells for _, cells in rows)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _bits(recipe: Recipe) -> str:
    binarize = recipe.binarize
    if binarize is None or not (binarize.weights or binarize.activations):
        return "float"
    return "W1A1" if binarize.activations and binarize.weights else "W1A32" if binarize.weights else "W32A1"


def main(check: bool) -> int:
    found = list(ours())
    text = PAGE.read_text(encoding="utf-8")
    new = re.sub(
        r"(<!-- (\w+):(\w+) -->\n).*?(<!-- end -->)",
        lambda match: match[1] + table(match[2], match[3], found) + match[4],
        text,
        flags=re.DOTALL,
    )
    missing = [one.where for one in found if one.recipe.model.name in TITLES and one.where not in new]
    if missing:
        sys.exit(f"{PAGE.name} has no table for {', '.join(missing)}")
    if check:
        if new != text:
            print(f"{PAGE.name} is out of date: run python docs/results.py")
        return int(new != text)
    PAGE.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
