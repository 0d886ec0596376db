"""Fill the tables of studies in the pages from the reports in results/studies/, and draw the figure of docs/study.md.

python docs/study.py            # both
python docs/study.py --check    # exit 1 where a table is not what the reports say

README's table of what AB-Tanh brings is made here too, and filled in by docs/results.py with the rest of that page.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

from _tables import fill, table

from abste.report.statistics import ALPHA, holm, paired

DOCS = Path(__file__).parent
PAGES = (DOCS / "study.md", DOCS / "speed.md")
REPORTS = DOCS.parent / "results" / "studies"
DRAWN = "cifar10-resnet8/c"
TITLES = {"w1a32": "W1A32", "w1a1": "W1A1"}

Report = dict[str, Any]


def main(check: bool) -> int:
    stale = [page.name for page in PAGES if not fill(page, lambda study, kind: TABLES[kind](load(study)), check)]
    if check:
        for name in stale:
            print(f"{name} is out of date: run python docs/study.py")
        return int(bool(stale))
    draw(load(DRAWN), DOCS / "figures" / "study.svg")
    return 0


def load(study: str) -> Report:
    report: Report = json.loads((REPORTS / f"{study}.json").read_text(encoding="utf-8"))
    return report


def value(arm: Report) -> str:
    return f"{arm['mean']:.2f}" + (f" ± {arm['sd']:.2f}" if arm["sd"] is not None else "")


def overview(report: Report) -> str:
    """Every arm, one column for each setting, in the order of the first that has it."""
    found = {setting["setting"]: {arm["arm"]: arm for arm in setting["arms"]} for setting in report["settings"]}
    names = list(dict.fromkeys(name for arms in found.values() for name in arms))
    head = ["arm", *(TITLES[name] for name in found)]
    return table(head, ([f"`{n}`", *(value(arms[n]) if n in arms else "" for arms in found.values())] for n in names))


def rates(report: Report) -> str:
    """Accuracy by factor on the learning rates, the best one in bold."""
    parts = []
    for setting in report["settings"]:
        scales = sorted({float(scale) for arm in setting["arms"] for scale in arm["by_lr_scale"]})
        body = []
        for arm in setting["arms"]:
            means = {float(scale): mean for scale, mean in arm["by_lr_scale"].items()}
            best = max(means, key=lambda scale: means[scale])
            cells = [f"**{means[s]:.2f}**" if s == best else f"{means[s]:.2f}" if s in means else "" for s in scales]
            body.append([f"`{arm['arm']}`", *cells])
        parts.append(table([TITLES[setting["setting"]], *(f"x {scale:g}" for scale in scales)], body))
    return "\n".join(parts)


def contrasts(report: Report) -> str:
    """Accuracy, and the difference to the control with its interval and adjusted p."""
    parts, control = [], report["study"]["control"]
    for setting in report["settings"]:
        body = []
        for arm in setting["arms"]:
            gap, p = arm["difference"], arm["p_holm"]
            known = gap is not None and gap["low"] is not None
            chance = "" if not known else "< 0.001" if p < 0.001 else f"{p:.3f}"
            cells = [f"{gap['mean']:+.2f} ({gap['low']:+.2f} to {gap['high']:+.2f})" if known else "", chance]
            body.append([f"`{arm['arm']}`", str(len(arm["accuracies"])), value(arm), *cells])
        parts.append(
            table([TITLES[setting["setting"]], "n", "accuracy, %", f"difference to `{control}`, points", "p"], body)
        )
        if setting["detectable"] is not None:
            parts.append(
                f"Smallest difference to `{control}` that this design finds: {setting['detectable']:.2f} points.\n"
            )
        for name, gap in setting["shape"].items():
            if gap["low"] is not None:
                parts.append(
                    f"`{name}` minus its shape-removed control: {gap['mean']:+.2f} "
                    f"({gap['low']:+.2f} to {gap['high']:+.2f}) points.\n"
                )
    return "\n".join(parts)


def pairs(report: Report) -> str:
    """Every arm against every other, p adjusted for all pairs of the setting; bold where it is below ALPHA."""
    parts = []
    for setting in report["settings"]:
        scores = {arm["arm"]: arm["accuracies"] for arm in setting["arms"]}
        couples = list(combinations(scores, 2))
        gaps = [paired([scores[a][seed] - scores[b][seed] for seed in scores[a]]) for a, b in couples]
        chances = holm([gap.p for gap in gaps])
        cells = {
            couple: f"**{gap.mean:+.2f}**" if p < ALPHA else f"{gap.mean:+.2f}"
            for couple, gap, p in zip(couples, gaps, chances, strict=True)
        }
        columns = list(scores)[1:]
        head = [f"{TITLES[setting['setting']]}, row minus column", *(f"`{name}`" for name in columns)]
        parts.append(table(head, ([f"`{a}`", *(cells.get((a, b), "") for b in columns)] for a in list(scores)[:-1])))
    return "\n".join(parts)


AB_TANH = (  # network, what trains the latents, study, setting, arms: AB-Tanh, STE, the control without a shape
    ("ResNet-8", "SGD", "cifar10-resnet8/c", "w1a32", "ab_tanh", "ste", None),
    ("ResNet-8", "Muon", "cifar10-resnet8/c", "w1a32", "ab_tanh-muon", "ste-muon", "ab_tanh-muon-shape_removed"),
    ("ResNet-8", "Muon", "cifar10-resnet8/e", "w1a32", "ab_tanh", "ste", "ab_tanh-shape_removed"),
    ("ResNet-20", "Muon, taught", "cifar10-resnet20/w1a32", "w1a32", "ab_tanh", "ste", None),
    ("ResNet-18, half width", "Muon", "cifar10-resnet18/w1a32", "w1a32", "ab_tanh", "ste", "ab_tanh-shape_removed"),
    ("ResNet-8", "SGD", "cifar10-resnet8/c", "w1a1", "ab_tanh", "ste", None),
    (
        "ResNet-8",
        "SGD, constant blend",
        "cifar10-resnet8/c",
        "w1a1",
        "ab_tanh-constant",
        "ste",
        "ab_tanh-constant-shape_removed",
    ),
    ("ResNet-8", "SGD, constant blend", "cifar10-resnet8/c", "w1a1", "ab_tanh-constant", "ste-raw-input", None),
)


def difference(own: Report, other: Report) -> str:
    gap = paired([score - other["accuracies"][seed] for seed, score in own["accuracies"].items()])
    return f"{gap.mean:+.2f} ({gap.low:+.2f} to {gap.high:+.2f})"


def ab_tanh() -> str:
    """For README: AB-Tanh beside STE and the control that has no shape, wherever the test set was asked."""
    body = []
    for network, latents, study, which, *names in AB_TANH:
        setting = next(each for each in load(study)["settings"] if each["setting"] == which)
        own, *others = (next((arm for arm in setting["arms"] if arm["arm"] == name), None) for name in names)
        cells = ["" if other is None else difference(own, other) for other in others]
        raw = " on raw inputs" if names[1].endswith("raw-input") else ""
        ours = [f"{own['mean']:.2f}", f"{others[0]['mean']:.2f}{raw}"]
        body.append([network, TITLES[which], latents, str(own["epochs"]), str(len(own["accuracies"])), *ours, *cells])
    head = [
        "network",
        "bits",
        "training",
        "epochs",
        "seeds",
        "AB-Tanh, %",
        "STE, %",
        "AB-Tanh - STE",
        "AB-Tanh - control",
    ]
    return table(head, body, left=["bits", "training"])


TABLES: dict[str, Callable[[Report], str]] = {
    "overview": overview,
    "rates": rates,
    "contrasts": contrasts,
    "pairs": pairs,
}


def draw(report: Report, path: Path) -> None:
    """Differences to STE with their intervals, and those of the single seeds."""
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "abste", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 8})
    panels = report["settings"]
    figure, axes = plt.subplots(1, len(panels), figsize=(3.7 * len(panels), 2.6), layout="constrained", squeeze=False)
    for each, setting in zip(axes[0], panels, strict=True):
        control = next(arm for arm in setting["arms"] if arm["difference"] is None)
        arms = [arm for arm in setting["arms"] if arm["difference"] is not None][::-1]
        for height, arm in enumerate(arms):
            gaps = [score - control["accuracies"][seed] for seed, score in arm["accuracies"].items()]
            each.plot(gaps, [height] * len(gaps), "o", color="#9aa0a6", markersize=3, alpha=0.6, markeredgewidth=0)
            gap = arm["difference"]
            each.plot([gap["low"], gap["high"]], [height, height], color="#7b1e3a", linewidth=1.5)
            each.plot(gap["mean"], height, "D", color="#7b1e3a", markersize=4)
        each.axvline(0, color="#333333", linewidth=0.8)
        each.set(title=f"{TITLES[setting['setting']]}, {control['epochs']} epochs", xlabel="difference to STE, points")
        each.set_yticks(range(len(arms)), [arm["arm"] for arm in arms])
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.5, axis="x")
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
