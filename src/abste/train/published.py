"""Published accuracies on CIFAR-10 and ImageNet, to hold a run of a recipe against. Needs pydantic, not torch."""

from __future__ import annotations

import textwrap
from dataclasses import dataclass
from typing import Any, Literal

from abste.train.recipe import Recipe

Bits = Literal["float", "W1A32", "W32A1", "W1A1"]
Kind = Literal["repository", "paper", "abstract", "secondary"]


@dataclass(frozen=True)
class Published:
    """One published accuracy: of the best epoch on the test set in nearly all cases, over an unknown number of seeds.

    Attributes:
        network: a name of ``abste.models``.
        bits: of weights and activations.
        method: as its authors call it.
        accuracy: top-1 on CIFAR-10's test set or ImageNet's validation set, in %.
        kind: where the number was read: in the authors' repository, in a paper, in its abstract, or at second hand.
        source: which repository or paper.
        epochs: of training, where known.
        note: what else is to be known, as the end of a sentence; or nothing.
    """

    network: str
    bits: Bits
    method: str
    accuracy: float
    kind: Kind
    source: str
    epochs: int | None = None
    note: str = ""


TITLES = {
    "resnet18": "ResNet-18",
    "resnet20": "ResNet-20",
    "resnet20_bireal": "ResNet-20 Bi-Real",
    "vgg_small": "VGG-Small",
}
"""What the networks for CIFAR-10 are called in the literature."""

IMAGENET_TITLES = {
    "imagenet_resnet18": "ResNet-18",
    "imagenet_resnet34": "ResNet-34",
    "imagenet_resnet18_bireal": "Bi-Real net 18",
    "reactnet_a": "ReActNet-A",
}
"""Those for ImageNet."""

_FDA = "arXiv 2103.00841"
_BEANET = "BEANet, a manuscript on GitHub"
_RESTE = "DravenALG/ReSTE"
_TABLE_3 = "arXiv 2308.06689, Table 3: estimators alone"
_IR_NET = "htqin/IR-Net"
_RBNN = "lmbxmu/RBNN"
_SIMAN = "lmbxmu/SiMaN"
_RECU = "z-hXu/ReCU"
_BIPER = "edmav4/BiPer"
_SLB = "SLB's repository, arXiv 2009.08695"
_ADABIN = "huawei-noah/Efficient-Computing"
_SURGE = "arXiv 2605.10989"
_AB_STE = "doi 10.1007/978-3-032-06066-2_8"

PUBLISHED = (
    Published("resnet18", "float", "full precision", 94.8, "paper", _BEANET),
    Published(
        *("resnet18", "W1A32", "AB-STE (W/A inferred)", 94.6, "abstract", _AB_STE),
        note="AB-Tanh; that it is W1A32 is inferred",
    ),
    Published("resnet18", "W1A1", "RAD-BNN", 90.5, "paper", _BEANET),
    Published("resnet18", "W1A1", "IR-Net", 91.5, "repository", _IR_NET),
    Published(
        "resnet18", "W1A1", "A&B (ReActNet-18)", 91.94, "repository", "Ruichen0424/AB-BNN", note="abstract: 92.30"
    ),
    Published("resnet18", "W1A1", "RBNN", 92.2, "repository", _RBNN, 1000),
    Published("resnet18", "W1A1", "SiMaN", 92.5, "repository", _SIMAN, 400),
    Published("resnet18", "W1A1", "ReSTE", 92.63, "repository", _RESTE, 2000),
    Published("resnet18", "W1A1", "ReCU", 92.8, "repository", _RECU, 600, note="93.2 after fine-tuning"),
    Published("resnet18", "W1A1", "AdaBin", 93.1, "paper", _BEANET, 400),
    Published("resnet18", "W1A1", "SURGE", 93.1, "secondary", _SURGE),
    Published("resnet18", "W1A1", "BNext18", 93.6, "paper", _BEANET),
    Published("resnet18", "W1A1", "BiPer", 93.75, "repository", _BIPER, 900),
    Published("resnet18", "W1A1", "BEAN18", 93.8, "paper", _BEANET),
    Published("resnet20", "float", "full precision", 92.1, "paper", _FDA),
    Published("resnet20", "W1A32", "SLB", 90.6, "repository", _SLB, 500, note="the repository's own code: 91.1"),
    Published("resnet20", "W1A32", "IR-Net", 90.8, "repository", _IR_NET, 400),
    Published("resnet20", "W1A32", "ReSTE", 91.32, "repository", _RESTE, 1000),
    Published("resnet20", "W1A1", "DSQ", 84.11, "paper", _FDA),
    Published("resnet20", "W1A1", "DoReFa", 84.44, "paper", _FDA),
    Published("resnet20", "W1A1", "STE alone", 84.44, "secondary", _TABLE_3),
    Published("resnet20", "W1A1", "EDE alone", 85.2, "secondary", _TABLE_3),
    Published("resnet20", "W1A1", "XNOR", 85.23, "paper", _FDA),
    Published("resnet20", "W1A1", "IR-Net", 85.4, "paper", _FDA),
    Published("resnet20", "W1A1", "SLB", 85.5, "repository", _SLB, 500, note="the repository's own code: 86.2"),
    Published("resnet20", "W1A1", "LNS", 85.78, "paper", _FDA),
    Published("resnet20", "W1A1", "FDA alone", 85.8, "secondary", _TABLE_3),
    Published("resnet20", "W1A1", "RBNN alone", 85.87, "secondary", _TABLE_3),
    Published("resnet20", "W1A1", "FDA", 86.2, "paper", _FDA),
    Published("resnet20", "W1A1", "RBNN", 86.5, "repository", _RBNN, 1000),
    Published("resnet20", "W1A1", "ReSTE", 86.75, "repository", _RESTE, 1000),
    Published("resnet20", "W1A1", "BiPer", 86.98, "repository", _BIPER, 900, note="87.5 in BEANet"),
    Published("resnet20", "W1A1", "SiMaN", 87.4, "repository", _SIMAN, 400),
    Published("resnet20", "W1A1", "ReCU", 87.5, "repository", _RECU, 600, note="88.0 after fine-tuning"),
    Published("resnet20", "W1A1", "SURGE", 88.0, "secondary", _SURGE),
    Published("resnet20", "W1A1", "AdaBin", 88.1, "repository", _ADABIN, 400),
    Published("resnet20", "W1A1", "BEAN20", 88.52, "paper", _BEANET),
    Published("resnet20_bireal", "W1A1", "IR-Net", 86.5, "repository", _IR_NET, 400),
    Published("resnet20_bireal", "W1A1", "RBNN", 87.8, "repository", _RBNN, 1000),
    Published("resnet20_bireal", "W1A1", "ReSTE", 87.92, "repository", _RESTE, 1000),
    Published("vgg_small", "float", "full precision", 94.1, "paper", _FDA),
    Published("vgg_small", "W1A32", "SLB", 93.8, "repository", _SLB, 500),
    Published("vgg_small", "W1A1", "XNOR", 89.8, "paper", _FDA),
    Published("vgg_small", "W1A1", "BNN", 89.9, "paper", _FDA),
    Published("vgg_small", "W1A1", "DoReFa", 90.2, "paper", _FDA),
    Published("vgg_small", "W1A1", "IR-Net", 90.4, "paper", _FDA, 300),
    Published("vgg_small", "W1A1", "RBNN", 91.3, "repository", _RBNN, 1000),
    Published("vgg_small", "W1A1", "BNN+", 91.31, "paper", _FDA),
    Published("vgg_small", "W1A1", "DSQ", 91.72, "paper", _FDA),
    Published("vgg_small", "W1A1", "SLB", 92.0, "repository", _SLB, 500),
    Published("vgg_small", "W1A1", "ReCU", 92.2, "repository", _RECU, 600, note="93.3 after fine-tuning"),
    Published("vgg_small", "W1A1", "AdaBin", 92.3, "repository", _ADABIN, 400),
    Published("vgg_small", "W1A1", "BiPer", 92.46, "repository", _BIPER, 900),
    Published("vgg_small", "W1A1", "SiMaN", 92.5, "repository", _SIMAN, 400),
    Published("vgg_small", "W1A1", "SURGE", 92.5, "secondary", _SURGE),
    Published("vgg_small", "W1A1", "FDA", 92.54, "paper", _FDA),
    Published("vgg_small", "W1A1", "ReSTE", 92.55, "repository", _RESTE, 1000),
    Published("imagenet_resnet18", "W1A32", "ReSTE", 67.40, "repository", _RESTE, 250),
    Published(
        *("imagenet_resnet18", "W1A32", "AB-STE (all inferred)", 67.96, "abstract", _AB_STE),
        note="AB-Tanh; the abstract names neither network nor W/A",
    ),
    Published("imagenet_resnet18", "W1A1", "ReSTE", 60.88, "repository", _RESTE, 250),
    Published("imagenet_resnet34", "W1A32", "ReSTE", 70.74, "repository", _RESTE, 250),
    Published("imagenet_resnet34", "W1A1", "ReSTE", 65.05, "repository", _RESTE, 250),
    Published("imagenet_resnet18_bireal", "W1A1", "Bi-Real net", 56.4, "repository", "liuzechun/Bi-Real-net", 256),
    Published(
        *("reactnet_a", "W32A1", "ReActNet, step 1", 70.11, "secondary", "liuzechun/ReActNet#21", 128),
        note="weights still float",
    ),
    Published("reactnet_a", "W1A1", "ReActNet", 69.5, "repository", "liuzechun/ReActNet", 256, note="in two steps"),
)

_HEAD = "mostly of the best epoch on the test set, over unknown seeds"


def bits_of(recipe: Recipe) -> Bits:
    """Those of the weights and activations of a recipe's binary layers."""
    binarize = recipe.binarize
    if binarize is None:
        return "float"
    return "W1A32" if binarize.activations is None else "W32A1" if binarize.weights is None else "W1A1"


def estimator_text(spec: str | dict[str, Any]) -> str:
    """An estimator of a recipe in words: ``ste``, ``ab_tanh(k=4.0)``."""
    if isinstance(spec, str):
        return spec
    return f"{spec['name']}({', '.join(f'{key}={value}' for key, value in spec.items() if key != 'name')})"


def published_for(recipe: Recipe) -> list[Published]:
    """What is published for a recipe's network, as wide as in the literature, at the bits the recipe has; rising."""
    network, data = recipe.model.name, recipe.data
    known = (network in TITLES and data.name == "cifar10") or (
        network in IMAGENET_TITLES and data.on_disk and data.classes == 1000 and data.image_shape == [3, 224, 224]
    )
    if not known or "width" in recipe.model.kwargs:
        return []
    rows = [row for row in PUBLISHED if (row.network, row.bits) == (network, bits_of(recipe))]
    return sorted(rows, key=lambda row: row.accuracy)


def overview(width: int) -> str:
    """All that is published, without sources: a paragraph for each network at its bits, in lines of ``width``."""
    lines = []
    for titles, where in ((TITLES, "CIFAR-10"), (IMAGENET_TITLES, "ImageNet (top-1)")):
        groups: dict[str, list[Published]] = {}
        for row in PUBLISHED:
            if row.network in titles:
                groups.setdefault(f"  {titles[row.network]}, {row.bits}", []).append(row)
        lines.append(textwrap.fill(f"Published accuracy on {where} in %, {_HEAD}:", width))
        for title, rows in groups.items():
            rows = sorted(rows, key=lambda row: row.accuracy)
            # No break between a method and its number.
            shown = ", ".join(f"{row.method} {row.accuracy}".replace(" ", "\0") for row in rows)
            first, rest = f"{title:<28}", 28 * " "
            wrapped = textwrap.fill(shown, width, initial_indent=first, subsequent_indent=rest, break_on_hyphens=False)
            lines.append(wrapped.replace("\0", " "))
    return "\n".join(lines)


def comments(recipe: Recipe) -> str:
    """The published rows of a recipe with epochs and sources, as comments in TOML; empty where there is none."""
    rows = published_for(recipe)
    if not rows:
        return ""
    first = rows[0]
    size = max(len(row.method) for row in rows)
    where = "CIFAR-10" if first.network in TITLES else "ImageNet (top-1)"
    title = (TITLES | IMAGENET_TITLES)[first.network]
    lines = [f"# Published for {title}, {first.bits}, on {where} in %, {_HEAD}:"]
    for row in rows:
        epochs = "" if row.epochs is None else f"{row.epochs} epochs"
        note = f"; {row.note}" if row.note else ""
        lines.append(f"#   {row.method:<{size}}  {row.accuracy:5.2f}  {epochs:<11}  {row.kind}: {row.source}{note}")
    return "\n".join(lines) + "\n\n"
