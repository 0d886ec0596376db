"""The sums behind every diagnostic quantity, and what is read off them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from abste.diagnostics.watch import evaluating
from abste.estimators import AdaptiveBlend, Binarizer, Equilibrium, ShapeRemoved
from abste.estimators.blends import equilibrium

BINS = 32
"""Bins of the histogram of what an estimator sees, in units of its RMS, of equal width between -4 and 4. The first and
the last also hold what lies beyond."""
REACH = 4.0

Sums = dict[str, Tensor]
"""Scalars, and the counts of the histogram, on the device where they were measured."""


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.float32 if x.device.type == "mps" else torch.float64)  # Apple's GPUs have no float64


def add(sums: Sums, more: Sums) -> None:
    """Add ``more`` to ``sums``, in place."""
    for key, value in more.items():
        sums[key] = sums[key] + value if key in sums else value


def adaptive(binarizer: Binarizer) -> AdaptiveBlend | None:
    """The AB-STE estimator that it is, or stands in for as the shape-removed control."""
    if isinstance(binarizer, ShapeRemoved):
        binarizer = binarizer.of
    return binarizer if isinstance(binarizer, AdaptiveBlend) else None


def shape_sums(binarizer: Binarizer, x: Tensor, binary: Tensor | None = None) -> Sums:
    """What depends on x alone.

    Args:
        binarizer: whose F and F' are meant; its ``slope`` is called, so a watched binarizer has to be busy.
        x: what it sees: weights whole and in their shape, since some binarizers measure each filter; of activations any
            part, in any shape.
        binary: what it makes of x in evaluation, if known.
    """
    x = x.detach()
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    size = _wide(x).square().sum()
    sums = {"n": torch.full_like(size, x.numel()), "square": size, "beyond": _wide((x.abs() > binarizer.t).sum())}
    if binarizer.has_surrogate:
        if binary is None:
            with evaluating(binarizer):
                binary = binarizer.binarize(x)
        sums["error"] = _wide(binary.detach() - binarizer.surrogate(x)).square().sum()  # type: ignore[operator]
        sums["slope"] = _wide(binarizer.slope(x)).sum()  # type: ignore[operator]
    blended = adaptive(binarizer)
    if blended is not None:
        a = blended.blend.weight(x)
        sums["a"] = _wide(torch.as_tensor(a, device=x.device)).expand(x.shape).sum()
    unit = (size / max(x.numel(), 1)).sqrt().clamp(min=1e-30).to(x.dtype)
    places = (x / unit).add_(REACH).mul_(BINS / (2 * REACH)).floor_().nan_to_num_(0.0).clamp_(0, BINS - 1)
    sums["histogram"] = _wide(torch.bincount(places.long().flatten(), minlength=BINS))
    return sums


def gradient_sums(grad: Tensor, x: Tensor, result: Tensor, t: float) -> Sums:
    """Sums over A = |grad| where |x| <= t, else 0, and B = |result|: STE's gradient with the same clip, and its own."""
    a = _wide(grad.detach().flatten()).abs() * (x.detach().flatten().abs() <= t)
    b = _wide(result.detach().flatten()).abs()
    return {
        "gradients": torch.full_like(a.sum(), a.numel()),
        "ste": a.sum(),
        "ste_square": a.dot(a),
        "own": b.sum(),
        "own_square": b.dot(b),
    }


def read(sums: Sums) -> dict[str, Any]:
    """Sums as Python numbers: this waits for the device."""
    keys = [key for key in sums if key != "histogram"]
    values: dict[str, Any] = {}
    if keys:
        values = dict(zip(keys, torch.stack([sums[key] for key in keys]).tolist(), strict=True))
    if "histogram" in sums:
        values["histogram"] = sums["histogram"].tolist()
    return values


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None where either is unknown, or there is nothing to divide by."""
    return None if above is None or not below else above / below


def variance(total: float, squares: float, n: float) -> float | None:
    """The unbiased variance of n numbers, from their sum and squares; None of fewer than two, or if one is infinite."""
    spread = squares - total * total / n if n else math.nan
    return None if n < 2 or not math.isfinite(spread) else max(0.0, spread) / (n - 1)


def quantities(values: Mapping[str, Any], count: float, unit: float) -> dict[str, Any]:
    """The quantities of one place, from what :func:`read` gives.

    Args:
        values: the sums.
        count: numbers binarised, of which the sums may be a sample.
        unit: what gradients are multiplied by.
    """
    n = values.get("n", 0.0)
    error = ratio(values.get("error"), n)
    result: dict[str, Any] = {
        "count": int(count),
        "rms": None if not n else math.sqrt(values["square"] / n),
        "error": None if error is None else math.sqrt(error),
        "error_l2": None if error is None else math.sqrt(error * count),
        "beyond": ratio(values.get("beyond"), n),
        "slope": ratio(values.get("slope"), n),
        "variance": None,
        "variance_ratio": None,
        "variation": None,
        "variation_ratio": None,
        "histogram": [share / n for share in values["histogram"]] if n else None,
    }
    m = values.get("gradients", 0.0)
    if m:
        own = variance(values["own"], values["own_square"], m)
        ste = variance(values["ste"], values["ste_square"], m)
        if own is not None and ste is not None:
            result["variance"] = own * unit * unit
            result["variance_ratio"] = ratio(own, ste)
            mean = values["own"] / m
            squared = ratio(own, mean * mean)
            mean = values["ste"] / m
            result["variation"] = None if squared is None else math.sqrt(squared)
            result["variation_ratio"] = ratio(squared, ratio(ste, mean * mean))
    return result


def total(places: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """The same quantities for all places together: see :class:`~abste.diagnostics.Diagnostics`."""
    if not places:
        return None

    def known(key: str) -> list[tuple[float, float]]:
        return [(place[key], place["count"]) for place in places if place.get(key) is not None]

    def pooled(key: str, power: int = 1) -> float | None:
        pairs = known(key)
        mean = ratio(sum(value**power * count for value, count in pairs), sum(count for _, count in pairs))
        return mean if power == 1 or mean is None else math.sqrt(mean)

    def added(key: str) -> float | None:
        pairs = known(key)
        return sum(value for value, _ in pairs) if pairs else None

    def mean(key: str) -> float | None:
        return ratio(added(key), len(known(key)))

    both = [place for place in places if place["variance"] is not None and place["variance_ratio"]]
    result = {
        "count": sum(place["count"] for place in places),
        "error": pooled("error", 2),
        "error_l2": added("error_l2"),
        "beyond": pooled("beyond"),
        "slope": pooled("slope"),
        "variance": added("variance"),
        "variance_ratio": ratio(
            sum(place["variance"] for place in both),
            sum(place["variance"] / place["variance_ratio"] for place in both),
        ),
        "variation": mean("variation"),
        "variation_ratio": mean("variation_ratio"),
    }
    if "flip_ratio" in places[0]:
        result |= {
            "latent_variance": added("latent_variance"),
            "flip_ratio": pooled("flip_ratio"),
            "drift": pooled("drift"),
            "effective_lr": mean("effective_lr"),
        }
    return result


@torch.no_grad()
def blend_state(binarizer: Binarizer) -> dict[str, Any] | None:
    """The blend of an AB-STE estimator apart from a; None of another binarizer. This waits for the device."""
    blended = adaptive(binarizer)
    if blended is None:
        return None
    blend = blended.blend
    state: dict[str, Any] = {"kind": type(blend).__name__.lower()}
    if isinstance(blend, Equilibrium):
        a, mb, va, c, vb, measured = blend.state.view(torch.float32).cpu().double()
        rho = blend.rho().cpu().double()
        state |= {"budget": blend.budget, "rho": float(rho), "ratio": None, "target": None, "slewing": None}
        if measured > 0:
            spread = (1 - a) ** 2 * va + 2 * a * (1 - a) * c + a**2 * vb
            mean = 1 if blend.budget == "variance" else 1 - a + a * mb
            target = equilibrium(mb, va, c, vb, rho, torch.tensor(blend.budget == "variance"))
            state |= {
                "ratio": ratio(float(spread / mean**2), float(va)),
                "target": float(target),
                "slewing": abs(float(target - a)) > 1e-3,
            }
    return state


def rounded(value: Any) -> Any:
    """Six significant digits, and None for what is not finite, throughout."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, list) else value
