"""How well gradients of a trained or half-trained network point: against what flipping a sign really does."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from abste.diagnostics.watch import Place, Watch, check_count, places, unwrapped
from abste.errors import ConfigError, nearest
from abste.estimators.base import number

Array = NDArray[np.float64]
Loss = Callable[[Any, Tensor], Tensor]
KINDS = ("weights", "activations")
_RESAMPLES = 1000


@dataclass(frozen=True)
class ProbeResult:
    """What :func:`probe` found.

    A comparison is a dictionary: ``cosine`` and the ends ``low`` and ``high`` of its 95 % bootstrap interval, None
    where one side is zero throughout.

    Attributes:
        layers: for each layer ``weights`` and ``activations``, None where there is nothing, else a dictionary with
            ``count`` (derivatives compared), ``discrete`` and, for activations, ``smoothed``, each with a comparison
            ``before`` the slope (dL/db) and one ``after`` (dL/db F'); for activations also ``agreement``, the cosine
            between the smoothed derivatives from either half of the draws: where it is low, ``smoothed`` is mostly
            noise, and draws should be more.
        total: the same for all layers together, layers resampled separately.
        skipped: layers whose activations could not be probed, and why.
        loss: mean loss at the point that was probed.
        settings: the arguments.
    """

    layers: dict[str, dict[str, Any]]
    total: dict[str, Any]
    skipped: dict[str, str]
    loss: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain tables, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"{'layer':28} {'':11} {'reference':9} {'before slope':>22} {'after slope':>22} {'count':>6}"]
        for name, entry in {**self.layers, "total": self.total}.items():
            for kind in KINDS:
                for reference in ("discrete", "smoothed"):
                    if entry[kind] is not None and reference in entry[kind]:
                        shown = [_shown(entry[kind][reference][side]) for side in ("before", "after")]
                        lines.append(
                            f"{name:28} {kind:11} {reference:9} {shown[0]:>22} {shown[1]:>22} {entry[kind]['count']:>6}"
                        )
        return "\n".join(lines)


def _shown(comparison: Mapping[str, float | None]) -> str:
    if comparison["cosine"] is None:
        return "-"
    return f"{comparison['cosine']:.3f} [{comparison['low']:.3f}, {comparison['high']:.3f}]"


def probe(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    weights: int = 64,
    activations: int = 4,
    draws: int = 16,
    noise: float = 0.5,
    loss: Loss | None = None,
    layers: Sequence[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> ProbeResult:
    """Compare surrogate gradients with what a change of sign does to the loss, on a small network.

    Weights: for sampled binary weights b of a layer, all else fixed, the discrete derivative is
    [L(b = +1) - L(b = -1)] / 2, L being the mean loss over the images. It is compared with dL/db, which is the
    gradient before the slope, and with dL/db F'(x), after it, x being what the estimator sees. The scale of the layer
    stays as it is.

    Activations: for elements z of what a layer's estimator sees (its input divided by the running RMS), of each image
    as many, the discrete derivative of that image's loss is [L(sign(z) = +1) - L(sign(z) = -1)] / 2. The smoothed one
    is that of E L(sign(z + noise e)) with independent standard normal e on all elements of the layer,

        E [L(+1, others) - L(-1, others)] exp(-z^2 / (2 noise^2)) / (noise sqrt(2 pi)),

    the expectation being over the noise of the other elements: ``draws`` samples of it, both signs with the same
    noise. (The element's own noise is integrated exactly; the plain score-function estimator, which this is the
    conditional expectation of, would need thousands of times the samples.) One element of each image is treated in
    one forward pass, since in evaluation no image depends on another.

    The network is copied, in evaluation mode (batch norm by its running statistics) and in ``dtype``; the model and
    the random generators stay as they are. It takes about layers x (weights + activations (2 + 2 draws)) forward
    passes, all of them over all images.

    Intervals are percentiles of 1000 bootstrap resamples: of the weights, and of the images, whose elements stay
    together.

    Args:
        model: converted; no image may influence another in evaluation mode.
        images: (N, ...), moved to the model's device.
        labels: (N, ...), likewise.
        weights: how many weights of each layer; 0 for none. All, where a layer has no more.
        activations: how many elements of each image and layer; 0 for none.
        draws: noise samples of each smoothed derivative, at least 2; fewer will do where ``agreement`` is near 1.
        noise: standard deviation, in units of z. Default 0.5: the slope 2 phi(z / noise) / noise that it amounts to is
            then 1.6 at zero and nothing beyond 1.5, as those of estimators for activations are.
        loss: takes the model's output and the labels and gives the loss of each image, (N,). Default: cross-entropy.
        layers: names of the layers to probe. Default: all that binarise.
        seed: of what is sampled.
        dtype: torch.float64 (default), or torch.float32, in which a single flip's effect has few digits left.

    Raises:
        ConfigError: a model without binary layers, an argument of the wrong type or out of range, a loss of the wrong
            shape.
    """
    counts = {"weights": (weights, 0), "activations": (activations, 0), "draws": (draws, 2), "seed": (seed, 0)}
    for name, (count, least) in counts.items():
        check_count("probe", name, count, least)
    noise = number("probe", "noise", noise)
    if not 1e-3 <= noise <= 1e3:
        raise ConfigError(f"probe: noise must lie in [1e-3, 1e3], got {noise}.")
    if dtype not in (torch.float32, torch.float64):
        raise ConfigError(f"probe: dtype must be torch.float32 or torch.float64, got {dtype!r}.")
    if not (isinstance(images, Tensor) and isinstance(labels, Tensor) and len(images) == len(labels) > 0):
        raise ConfigError("probe: images and labels must be tensors, as many of one as of the other, at least one.")
    known = [place.name for place in places(model, "probe")]
    for name in known if layers is None else layers:
        if name not in known:
            raise ConfigError(f"probe: the model has no binary layer {name!r}; {nearest(name, known)}")

    work = copy.deepcopy(unwrapped(model)).to(dtype).eval()
    device = next((p.device for p in work.parameters()), images.device)
    labels = labels.to(device)
    prober = _Prober(work, images.detach().to(device, dtype), labels, loss or _cross_entropy, seed)
    chosen = [place for place in places(work, "probe") if layers is None or place.name in layers]
    found: dict[str, dict[str, Any]] = {}
    samples: dict[str, list[_Sample]] = {kind: [] for kind in KINDS}
    with torch.random.fork_rng(devices=[]):
        point = prober.differentiate(chosen)
        for place in chosen:
            entry: dict[str, Any] = dict.fromkeys(KINDS)
            if weights and place.name in point.weights:
                samples["weights"].append(prober.flip_weights(place, point, weights))
                entry["weights"] = _compared(samples["weights"][-1:], seed)
            if activations and place.name in point.activations:
                samples["activations"].append(prober.flip_activations(place, point, activations, draws, noise))
                entry["activations"] = _compared(samples["activations"][-1:], seed)
            found[place.name] = entry
    total = {kind: _compared(samples[kind], seed) if samples[kind] else None for kind in KINDS}
    settings = {
        "weights": weights,
        "activations": activations,
        "draws": draws,
        "noise": noise,
        "images": len(images),
        "seed": seed,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return ProbeResult(found, total, point.skipped if activations else {}, float(point.losses.mean()), settings)


def _cross_entropy(logits: Any, labels: Tensor) -> Tensor:
    return F.cross_entropy(logits, labels, reduction="none")


@dataclass
class _Sample:
    """Derivatives of one layer: rows are resampled, the columns of a row stay together."""

    before: Array
    after: Array
    references: dict[str, Array]


@dataclass
class _Point:
    """Losses and gradients where the network stands."""

    losses: Tensor
    weights: dict[str, tuple[Tensor, Tensor, Tensor]]  # signs, dL/db, dL/db F'
    activations: dict[str, tuple[Tensor, Tensor, Tensor]]  # z, dL/db, dL/db F'
    skipped: dict[str, str]


class _Prober:
    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, seed: int) -> None:
        self.model, self.images, self.labels, self.loss = model, images, labels, loss
        self.generator = torch.Generator().manual_seed(seed)

    def losses(self, images: Tensor | None = None) -> Tensor:
        """The loss of each image."""
        losses = self.loss(self.model(self.images if images is None else images), self.labels)
        if not isinstance(losses, Tensor) or losses.shape != (len(self.images),):
            found = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ConfigError(
                f"probe: loss must give one number for each of the {len(self.images)} images, got {found}."
            )
        return losses.double()

    def differentiate(self, chosen: list[Place]) -> _Point:
        """One forward and backward pass."""
        leaves: dict[str, tuple[Tensor, Tensor]] = {}
        seen: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
        inputs: dict[str, list[torch.Size]] = {}
        observers, hooks = [], []

        def as_leaf(name: str) -> Any:
            def hook(_: nn.Module, arguments: Any, output: Tensor) -> Tensor:
                if name not in leaves:  # a layer may be called more than once
                    leaves[name] = arguments[0].detach(), output.detach().requires_grad_()
                return leaves[name][1]

            return hook

        for place in chosen:
            if place.weights is not None:
                hooks.append(place.weights.register_forward_hook(as_leaf(place.name)))
            if place.activation is not None:
                calls = seen.setdefault(place.name, [])
                observers.append((place.activation.estimator, lambda *found, calls=calls: calls.append(found)))
                shapes = inputs.setdefault(place.name, [])
                hooks.append(
                    place.layer.register_forward_pre_hook(lambda _, x, shapes=shapes: shapes.append(x[0].shape))
                )
        try:
            with Watch(observers), torch.enable_grad():
                # With a gradient at the input there is one at every layer, frozen or not.
                losses = self.losses(self.images.clone().requires_grad_())
                losses.sum().backward()
        finally:
            for hook in hooks:
                hook.remove()

        point = _Point(losses.detach(), {}, {}, {})
        images = len(self.images)
        for place in chosen:
            if place.weights is not None and place.name in leaves:
                x, leaf = leaves[place.name]
                grad = torch.zeros_like(leaf) if leaf.grad is None else leaf.grad / images
                point.weights[place.name] = leaf.detach(), grad, place.weights.backward(grad, x).detach()
            if place.activation is None:
                continue
            calls, shapes = seen[place.name], inputs[place.name]
            if not place.activation.estimator.plain_bits:
                point.skipped[place.name] = f"the binary value of {place.activation.estimator} is not the sign"
            elif len(calls) != 1 or len(shapes) != 1:
                point.skipped[place.name] = f"it is called {len(shapes)} times, with {len(calls)} gradients"
            elif calls[0][1].shape != shapes[0] or calls[0][1].shape[:1] != (images,):
                point.skipped[place.name] = f"it binarises {tuple(calls[0][1].shape)}, not its input of {images} images"
            else:
                grad, z, result = (part.detach() for part in calls[0])
                # In a binary layer 1 / RMS is in the upstream gradient already: take it out.
                rms = 1.0 if place.alone else 1.0 / self._inverse_rms(place)
                point.activations[place.name] = z, grad * rms, result * rms
        return point

    def _inverse_rms(self, place: Place) -> float:
        assert place.activation is not None
        inverse = place.activation.inverse_rms(self.images)
        return 1.0 if inverse is None else float(inverse)

    @torch.no_grad()
    def flip_weights(self, place: Place, point: _Point, count: int) -> _Sample:
        """Discrete derivatives of sampled weights."""
        signs, before, after = point.weights[place.name]
        chosen = torch.randperm(signs.numel(), generator=self.generator)[:count]
        flat = signs.flatten().clone()
        assert place.weights is not None
        now = float(point.losses.mean())
        derivatives = []
        hook = place.weights.register_forward_hook(lambda *_: flat.view(signs.shape))
        try:
            for index in chosen.tolist():
                flat[index] *= -1
                then = float(self.losses().mean())
                flat[index] *= -1
                derivatives.append(float(flat[index]) * (now - then) / 2)
        finally:
            hook.remove()
        one, other = (_array(side.flatten()[chosen.to(side.device)]).reshape(-1, 1) for side in (before, after))
        return _Sample(one, other, {"discrete": np.array(derivatives).reshape(-1, 1)})

    @torch.no_grad()
    def flip_activations(self, place: Place, point: _Point, count: int, draws: int, noise: float) -> _Sample:
        """Discrete and smoothed derivatives of sampled elements, a row for each image."""
        z, before, after = point.activations[place.name]
        images = len(z)
        size = z[0].numel()
        columns: list[tuple[Array, ...]] = []
        rows = torch.arange(images, device=z.device)
        for _ in range(count):
            index = torch.randint(size, (images,), generator=self.generator).to(z.device)
            own = z.reshape(images, -1)[rows, index]
            discrete = self._difference(place, z, index) / 2
            density = torch.exp(-(own**2) / (2 * noise**2)) / (noise * math.sqrt(2 * math.pi))
            halves = [torch.zeros_like(own), torch.zeros_like(own)]
            for draw in range(draws):
                blurred = z + noise * torch.randn(z.shape, generator=self.generator, dtype=torch.float64).to(z)
                halves[draw % 2] += self._difference(place, blurred, index) * density
            even, odd = halves[0] / (draws - draws // 2), halves[1] / (draws // 2)
            smoothed = (halves[0] + halves[1]) / draws
            found = [discrete, smoothed, even, odd]
            found += [side.reshape(images, -1)[rows, index] for side in (before, after)]
            columns.append(tuple(_array(values) for values in found))
        stacked = [np.stack(values, axis=1) for values in zip(*columns, strict=True)]
        references = dict(zip(("discrete", "smoothed", "even", "odd"), stacked[:4], strict=True))
        return _Sample(stacked[4], stacked[5], references)

    def _difference(self, place: Place, x: Tensor, index: Tensor) -> Tensor:
        """L(+1) - L(-1) of each image, for one element of each image's x, which a layer gets as its input.

        It may be in any positive unit, since the layer takes its sign.
        """
        rows = torch.arange(len(x), device=x.device)
        losses = []
        for value in (1.0, -1.0):
            changed = x.clone(memory_format=torch.contiguous_format)
            changed.view(len(x), -1)[rows, index] = value
            hook = place.layer.register_forward_pre_hook(lambda _, x, changed=changed: (changed, *x[1:]))
            try:
                losses.append(self.losses())
            finally:
                hook.remove()
        return losses[0] - losses[1]


def _array(values: Tensor) -> Array:
    return values.detach().double().cpu().numpy()


def _cosine(a: Array, b: Array) -> Array:
    """Over the last axis; NaN where either is zero."""
    with np.errstate(invalid="ignore", divide="ignore"):
        norms = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
        return np.where(norms > 0, (a * b).sum(-1) / norms, np.nan)


def _compared(samples: list[_Sample], seed: int) -> dict[str, Any]:
    """The comparisons over one layer or several, each resampled by itself."""
    rng = np.random.default_rng(seed)
    chosen = [rng.integers(len(sample.before), size=(_RESAMPLES, len(sample.before))) for sample in samples]

    def gathered(pick: Callable[[_Sample], Array]) -> tuple[Array, Array]:
        whole = np.concatenate([pick(sample).ravel() for sample in samples])
        again = [pick(sample)[index].reshape(_RESAMPLES, -1) for sample, index in zip(samples, chosen, strict=True)]
        return whole, np.concatenate(again, axis=1)

    def compare(side: Callable[[_Sample], Array], reference: str) -> dict[str, float | None]:
        one, ones = gathered(side)
        other, others = gathered(lambda sample: sample.references[reference])
        value = float(_cosine(one, other))
        if math.isnan(value):
            return {"cosine": None, "low": None, "high": None}
        low, high = np.nanpercentile(_cosine(ones, others), [2.5, 97.5])
        return {"cosine": value, "low": float(low), "high": float(high)}

    result: dict[str, Any] = {"count": sum(sample.before.size for sample in samples)}
    for reference in ("discrete", "smoothed"):
        if reference in samples[0].references:
            result[reference] = {
                "before": compare(lambda sample: sample.before, reference),
                "after": compare(lambda sample: sample.after, reference),
            }
    if "even" in samples[0].references:
        result["agreement"] = compare(lambda sample: sample.references["even"], "odd")["cosine"]
    return result
