"""Fill the tables of results in README.md, docs/results.md and docs/imagenet.md.

python docs/results.py            # from results/*/summary.json, results/studies/*/*.json and the published accuracies
python docs/results.py --check    # exit 1 where a table is not what those say
"""

from __future__ import annotations

import json
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from _tables import fill, table
from study import ab_tanh

from abste import models, zoo
from abste.nn import summary
from abste.report import load_study
from abste.train.published import PUBLISHED, TITLES, Published, bits_of, estimator_text
from abste.train.recipe import Recipe, first_difference, load_recipe

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PAGES = (ROOT / "README.md", DOCS / "results.md", DOCS / "imagenet.md")
RESULTS = ROOT / "results"
BENCHES = ROOT / "benchmarks" / "results" / "zoo"
IMAGES = 50_000
HEAD = ["method", "accuracy, %", "epochs", "PFLOP", "seeds"]


@dataclass(frozen=True)
class Ours:
    """The runs of one recipe, which differ in their seeds alone."""

    recipe: Recipe
    accuracies: list[float]
    flops: float
    path: Path
    """The run's directory, or the study's report."""
    arm: str = ""

    @property
    def accuracy(self) -> float:
        return statistics.fmean(self.accuracies)

    @property
    def bits(self) -> str:
        return bits_of(self.recipe)

    @property
    def comparable(self) -> bool:
        """Whether it is a network of the literature, as wide as there."""
        return self.recipe.model.name in TITLES and "width" not in self.recipe.model.kwargs

    @property
    def method(self) -> str:
        binarize = self.recipe.binarize
        sides = [] if binarize is None else [side for side in (binarize.weights, binarize.activations) if side]
        names = [f"`{name}`" for name in dict.fromkeys(estimator_text(side) for side in sides)]
        estimators = names[0] if len(names) == 1 else f"W {names[0]}, A {names[1]}" if names else "full precision"
        optimizer = "" if self.recipe.optimizer.name == "sgd" else f", {self.recipe.optimizer.name.capitalize()}"
        taught = "" if self.recipe.distill is None else ", taught"
        return f"**abste**: {estimators}{optimizer}{taught}"

    @property
    def row(self) -> list[str]:
        accuracy, seeds = f"{self.accuracy:.2f}", "single run"
        if len(self.accuracies) > 1:
            accuracy, seeds = f"{accuracy} ± {statistics.stdev(self.accuracies):.2f}", str(len(self.accuracies))
        epochs = f"{self.recipe.train.epochs:g}"
        return [self.method, accuracy, epochs, f"{self.flops / 1e15:.2f}", seeds]

    def link(self, page: Path) -> str:
        """Where it is, as seen from a page."""
        name = self.path.relative_to(RESULTS).with_suffix("").as_posix().removeprefix("studies/")
        link = f"[{name}]({Path(os.path.relpath(self.path, page.parent)).as_posix()})"
        return f"{link}, {self.arm}" if self.arm else link


def ours() -> Iterator[Ours]:
    """All that was scored on a test set; what is kept of a study's runs, such as weights, counts in the study."""
    studied = []
    for path in sorted(RESULTS.glob("studies/*/*.json")):
        report = json.loads(path.read_text(encoding="utf-8"))
        study = load_study(ROOT / path.relative_to(RESULTS).with_suffix(".toml"))
        for setting in report["settings"]:
            if setting["split"] == "test":
                for arm in setting["arms"]:
                    recipe = study.recipe_of(setting["setting"], arm["arm"], arm["lr_scale"])
                    accuracies = list(arm["accuracies"].values())
                    studied.append(recipe)
                    yield Ours(recipe, accuracies, arm["training_flops"], path.with_suffix(".md"), arm["arm"])
    for path in sorted(RESULTS.glob("*/summary.json")):
        run, recipe = json.loads(path.read_text(encoding="utf-8")), load_recipe(path.parent / "recipe.toml")
        if "test" in run and not any(same_but_for_seed(recipe, other) for other in studied):
            flops = run["cost"]["estimated_training_flops"]
            accuracy = run.get("averaged", run)["test"]["accuracy"]  # as studies take it
            yield Ours(recipe, [100 * accuracy], flops, path.parent)


def same_but_for_seed(recipe: Recipe, other: Recipe) -> bool:
    train = other.train.model_copy(update={"seed": recipe.train.seed})
    return first_difference(recipe.to_dict(), other.model_copy(update={"train": train}).to_dict()) is None


@cache
def macs(network: str) -> int:
    return summary(models.create(network), (1, 3, 32, 32)).total_macs


def row(published: Published) -> list[str]:
    cost = f"{6 * macs(published.network) * IMAGES * published.epochs / 1e15:.2f}" if published.epochs else ""
    return [published.method, f"{published.accuracy:.2f}", str(published.epochs or ""), cost, "not said"]


def beside(network: str, bits: str, found: list[Ours]) -> str:
    """What is published and what is ours for a network at some bits, by accuracy."""
    rows = [(one.accuracy, [*one.row, one.link(DOCS / "results.md")]) for one in _cifar10(network, bits, found)]
    for one in _published(network, bits):
        note = f" ({one.note})" if one.note else ""
        rows.append((one.accuracy, [*row(one), one.source + note]))
    rows.sort(key=lambda each: -each[0])
    return table([*HEAD, "where"], [cells for _, cells in rows], left=["where"])


def overview(found: list[Ours]) -> str:
    """For README: all that is ours on CIFAR-10, and the best published beside it."""
    rows = []
    for network, title in TITLES.items():
        for bits in ("float", "W1A32", "W1A1"):
            if own := _cifar10(network, bits, found):
                lines = [(one.accuracy, one.row) for one in own]
                if published := _published(network, bits):
                    best = max(published, key=lambda one: one.accuracy)
                    lines.append((best.accuracy, row(best)))
                lines.sort(key=lambda each: -each[0])
                rows += [[title, bits, *cells] for _, cells in lines]
    return table(["network", "bits", *HEAD], rows, left=["bits", "method"])


def photos(found: list[Ours]) -> str:
    """For docs/imagenet.md: runs on folders of photos."""
    page = DOCS / "imagenet.md"
    own = [one for one in found if one.recipe.data.name == "folder"]
    rows = [[one.link(page), one.recipe.model.name, one.bits, *one.row] for one in own]
    return table(["run", "network", "bits", *HEAD], rows, left=["network", "bits", "method"])


PEERS = {
    "fastest float32": ("torch", "torch-compile", "onnxruntime", "openvino"),
    "fastest int8": ("onnxruntime-int8", "openvino-int8"),
    "OpenVINO binary": ("openvino-binary",),
}


def shipped() -> str:
    """The networks of the zoo, and how fast `abste bench` found them."""
    rows = []
    for entry in zoo.entries():
        bench = json.loads((BENCHES / f"{entry.name}.json").read_text(encoding="utf-8"))
        times = {timing["engine"]: timing["time"]["median"] for timing in bench["timings"]}
        own = min(time for engine, time in times.items() if engine.startswith("abste "))
        ratios = []
        for engines in PEERS.values():
            theirs = [times[engine] for engine in engines if engine in times]
            ratios.append(f"{min(theirs) / own:.2f}" if theirs else "")
        rows.append(
            [f"`zoo:{entry.name}`", f"{entry.accuracy:.2%}", f"{entry.file_bytes:,}", f"{own * 1e6:.0f} us", *ratios]
        )
    return table(["network", "accuracy", "bytes", "time", *PEERS], rows)


def _cifar10(network: str, bits: str, found: list[Ours]) -> list[Ours]:
    own = [one for one in found if one.comparable]
    return [o for o in own if (o.recipe.data.name, o.recipe.model.name, o.bits) == ("cifar10", network, bits)]


def _published(network: str, bits: str) -> list[Published]:
    return [one for one in PUBLISHED if (one.network, one.bits) == (network, bits)]


def main(check: bool) -> int:
    found = list(ours())

    def make(what: str, which: str) -> str:
        if what == "cifar10":
            return overview(found)
        if what == "zoo":
            return shipped()
        if what == "study":
            return ab_tanh()
        return photos(found) if what == "folder" else beside(what, which, found)

    current = [fill(page, make, check) for page in PAGES]
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES)
    missing = [
        str(one.path)
        for one in found
        if (one.comparable or one.recipe.data.name != "cifar10")
        and f"{one.path.relative_to(RESULTS).as_posix()})" not in text
    ]
    if missing and (check or all(current)):
        sys.exit(f"no page has a table for {', '.join(missing)}")
    if check and not all(current):
        print("Tables of results are out of date: run python docs/results.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
