"""Diagnostics of a training run: one line before any loop."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from abste.diagnostics.measure import (
    BINS,
    REACH,
    Sums,
    add,
    blend_state,
    gradient_sums,
    quantities,
    ratio,
    read,
    rounded,
    shape_sums,
    total,
)
from abste.diagnostics.replay import Replay, compiled_parts
from abste.diagnostics.watch import Observer, Place, Watch, binarized, check_count, evaluating, places
from abste.errors import ConfigError, RunError
from abste.estimators import Binarizer
from abste.estimators.blends import sampled
from abste.nn import BinaryActivation

Record = dict[str, Any]


class Diagnostics:
    """Measures what the estimators of a model do while it trains, every so many optimizer steps.

    One line before the loop, none in it:

        diagnostics = Diagnostics(model, optimizer, path="diagnostics.jsonl")

    The optimizer's own steps drive it. Every ``every`` steps the binarizers are watched from one optimizer step to the
    next, over all the backward passes between them, and the record of that step is complete when the optimizer has
    stepped. Training is the same, bit for bit, as without. Other steps cost a comparison of two integers.

    torch.compile: give the compiled module. The measured step runs compiled as any other, and is then repeated once,
    eagerly, from its inputs and the gradient at its outputs, with buffers and random numbers put back; random layers
    draw others in the repetition, and batch norm must not be synchronised between processes. Weights are read from
    the real step. Distributed training: each process measures its own share of the batch, and nothing is
    communicated; make one in rank 0 alone (weights are the same everywhere). Layers may be called several times,
    gradients be accumulated, and the step be given a closure, whose first call is measured. Frozen layers have no
    gradients to report, and activations that no backward reaches are left out (None).

    A record is a dictionary: ``step`` (optimizer steps done, this one included), ``steps`` (since the last record),
    ``layers`` (name, then ``weights`` and ``activations``, None where there is nothing) and ``total`` (``weights``
    and ``activations``). Quantities that do not exist are None. With x what an estimator sees (standardised latents,
    or a layer's input divided by its running RMS, unless those are switched off), b its binary value, g = dL/dx, t its
    clip, and A the gradient that STE clipped at the same t would make of the same upstream gradient:

    ========================  =========================================================================================
    ``count``                 numbers binarised in the step
    ``rms``                   root mean square of x
    ``error``                 estimating error, RMS of b - F(x); needs a surrogate
    ``error_l2``              the same as L2 norm, ReSTE's distance: grows with the root of count
    ``beyond``                share of x with \\|x\\| > t
    ``slope``                 mean F'(x), zeros beyond the clip included; needs a surrogate
    ``variance``              gradient (in)stability, ReSTE's: unbiased variance of \\|g\\|. Of weights, g with respect
                              to x; of activations with respect to the layer's input, before division by RMS (of a
                              BinaryActivation on its own: by its RMS after the last pass)
    ``variance_ratio``        the same divided by the variance of A
    ``variation``             coefficient of variation of g, std \\|g\\| / mean \\|g\\|
    ``variation_ratio``       its square, divided by that of A: what the budget of an equilibrium limits
    ``histogram``             of x / its RMS in each call: shares of 32 equal bins from -4 to 4, the outer ones open
    ``blend``                 of AB-STE: ``kind``, ``a`` (its mean where it depends on x); of an equilibrium also
                              ``budget``, ``rho``, ``ratio`` (the squared coefficient of variation at a, or the
                              variance, in units of STE's, from the equilibrium's own moments: at most rho where the
                              budget is met), ``target`` (the a that would spend the budget) and ``slewing`` (whether a
                              is still on its way there, limited by its slew)
    ========================  =========================================================================================

    and of weights alone:

    ========================  =========================================================================================
    ``latent_variance``       ReSTE's s as its authors compute it: variance of \\|gradient\\| of the latents, as the
                              optimizer gets it
    ``flip_ratio``            share of the binary weights that this step flipped
    ``drift``                 share of them that differ from the last record's (at first: from the start), per step
    ``lr``                    learning rate of the latents in this step
    ``effective_lr``          the learning rate that SGD on x itself would have: lr times mean square of x / mean
                              square of the centred latents, averaged over filters, for standardised latents, whose
                              own size does not matter; lr for raw ones
    ``update``                norm of the step / norm of the latents, for any optimizer
    ========================  =========================================================================================

    The total pools ``error`` (RMS), ``beyond``, ``slope``, ``flip_ratio`` and ``drift`` over all numbers; sums
    ``error_l2``, ``variance`` and ``latent_variance`` over layers, as ReSTE does; divides the sums for
    ``variance_ratio``; and averages ``variation``, ``variation_ratio`` and ``effective_lr`` over layers. ReSTE's own
    script takes F at the end of its schedule and without clip; here F is the present one.

    Args:
        model: the model as the loop calls it: converted, compiled or not, in DistributedDataParallel or not.
        optimizer: of its latents, or a list of all its optimizers, in the order in which they step.
        every: optimizer steps between records. Default 200: at most 3 % of the time, compiled or not.
        sample: of activations, how many numbers of a tensor are measured, evenly spaced, for each call; None for all.
            Default 65,536, which gives moments to about a per cent. Weights are always measured whole.
        path: a file that every record is appended to as a line of JSON.
        writer: a TensorBoard ``SummaryWriter``, which gets every record.
        log: a function that gets every record. The last is also in ``latest``.
        scaler: the ``GradScaler`` of float16 training, or gradients are reported in its units. A step that it leaves
            out gives no record, and its passes do not count. (It calls an optimizer that is ``fused`` all the same,
            so that ``step`` counts such a step.)
        step: optimizer steps done before.

    Raises:
        ConfigError: a model without binary layers, an argument of the wrong type or out of range.
        RunError: while training, ``path`` cannot be written.

    Source: estimating error and gradient stability: Wu et al., ReSTE, arXiv 2308.06689, and its code (utils/tools.py);
    flip ratio: larq; the ratios to STE, coefficient of variation and effective learning rate are our own.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Sequence[Optimizer],
        *,
        every: int = 200,
        sample: int | None = 2**16,
        path: str | Path | None = None,
        writer: Any = None,
        log: Callable[[Record], object] | None = None,
        scaler: Any = None,
        step: int = 0,
    ) -> None:
        self.places = places(model, "Diagnostics")
        optimizers = [optimizer] if isinstance(optimizer, Optimizer) else list(optimizer or [])
        if not optimizers or not all(isinstance(each, Optimizer) for each in optimizers):
            raise ConfigError(f"Diagnostics: needs an optimizer of torch or a list of them, got {optimizer!r}.")
        self.every = check_count("Diagnostics", "every", every, 1)
        self.sample = None if sample is None else check_count("Diagnostics", "sample", sample, 2)
        self.step = check_count("Diagnostics", "step", step, 0)
        self.path = None if path is None else Path(path)
        self.writer, self.log, self.scaler = writer, log, scaler
        self.latest: Record | None = None
        self.optimizers = optimizers

        parts = compiled_parts(model)
        inside = {module for part in parts for module in part.modules()}
        self._replays = [Replay(part, self._scale) for part in parts]
        self._direct = Watch(self._observers(place for place in self.places if place.layer not in inside))
        self._repeated = Watch(self._observers(place for place in self.places if place.layer in inside))
        self._armed = self._blind = False
        self._seen: dict[tuple[str, str], Sums] = {}
        self._counts: dict[str, int] = {}
        self._seen_scale = self._scale()
        self._gathered: _Gathered | None = None
        self._signs = {place.name: _positive(binary) for place, (_, binary) in self._latents().items()}
        self._signs_step = self.step
        # A loop may compile the optimizer's step; what happens here is not to be part of it.
        before, after = torch.compiler.disable(self._before_step), torch.compiler.disable(self._after_step)
        self._hooks = [each.register_step_pre_hook(before) for each in optimizers]
        self._hooks.append(optimizers[-1].register_step_post_hook(after))
        self._arm()

    # Between optimizer steps

    def _observers(self, chosen: Iterable[Place]) -> list[tuple[Binarizer, Observer]]:
        observers: list[tuple[Binarizer, Observer]] = []
        for place in chosen:
            if place.weights is not None:
                observers.append((place.weights, self._weights_observer(place.name, place.weights)))
            if place.activation is not None:
                estimator = place.activation.estimator
                observers.append((estimator, self._activations_observer(place.name, estimator)))
        return observers

    def _scale(self) -> float:
        """What the loss is multiplied by; this waits for the device."""
        return 1.0 if self.scaler is None else float(self.scaler.get_scale())

    def _forget_skipped(self) -> None:
        """Forget the passes of a step that GradScaler left out: it makes its scale smaller then, and no other sign."""
        scale = self._scale()
        if scale != self._seen_scale:
            self._seen, self._counts, self._seen_scale = {}, {}, scale

    def _weights_observer(self, name: str, binarizer: Binarizer) -> Observer:
        def observe(grad: Tensor, x: Tensor, result: Tensor) -> None:
            self._forget_skipped()
            add(self._seen.setdefault((name, "weights"), {}), gradient_sums(grad, x, result, binarizer.t))

        return observe

    def _activations_observer(self, name: str, binarizer: Binarizer) -> Observer:
        def observe(grad: Tensor, x: Tensor, result: Tensor) -> None:
            self._forget_skipped()
            count = x.numel()
            self._counts[name] = self._counts.get(name, 0) + count
            x, grad, result = sampled(self.sample, x, grad, result)
            sums = self._seen.setdefault((name, "activations"), {})
            for more in (gradient_sums(grad, x, result, binarizer.t), shape_sums(binarizer, x)):
                # Calls of different sizes count by what they binarised, and not by what was measured of it.
                add(sums, {key: value * (count / max(1, x.numel())) for key, value in more.items()})

        return observe

    def _arm(self) -> None:
        """Watch the coming step, if it is one to measure."""
        self._disarm()
        if (self.step + 1) % self.every == 0:
            self._armed = True
            self._seen, self._counts, self._seen_scale = {}, {}, self._scale()
            if not self._blind:
                self._direct.start()
            for replay in self._replays:
                replay.start()

    def _disarm(self) -> None:
        if self._armed:
            self._armed = False
            self._direct.stop()
            for replay in self._replays:
                replay.stop()

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if not self._armed:
            return None
        if closure is None:
            self._measure(optimizer)
            return None

        def measured() -> Any:
            loss = closure()  # makes the gradients of this step
            if self._armed:  # an optimizer may call it several times
                self._measure(optimizer)
            return loss

        if "closure" in kwargs:
            return args, {**kwargs, "closure": measured}
        return (args[0], measured, *args[2:]), kwargs

    def _measure(self, optimizer: Optimizer) -> None:
        # GradScaler tells a fused optimizer of an overflow, where it leaves out the step of any other.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and float(overflow) > 0:
            return
        self._disarm()
        with self._repeated:
            for replay in self._replays:
                replay.run()
        if not self._seen and not self._blind and self._reached():
            self._blind = True  # each attempt might cost a compilation
            warnings.warn(
                "Diagnostics saw no backward pass through any binarizer and reports no gradients and no activations; "
                "if the model is compiled, give Diagnostics what torch.compile returned.",
                UserWarning,
                stacklevel=3,
            )
        self._gathered = self._gather()

    def _reached(self) -> bool:
        """Whether a backward came by the binary layers: not if they are frozen, or if there was none."""
        latents = [place.layer.weight for place in self.places if place.weights is not None]
        learned = [p for optimizer in self.optimizers for group in optimizer.param_groups for p in group["params"]]
        return any(parameter.grad is not None for parameter in latents or learned)

    def _after_step(self, *_: Any) -> None:
        self.step += 1
        gathered, self._gathered = self._gathered, None
        if gathered is not None:
            self._record(gathered)
        self._arm()

    # Measuring

    @torch.no_grad()
    def _latents(self) -> dict[Place, tuple[Tensor, Tensor]]:
        """Of each layer with binary weights what its binarizer sees, and the ±1 of it."""
        return {place: binarized(place) for place in self.places if place.weights is not None}

    @torch.no_grad()
    def _gather(self) -> _Gathered:
        """What has to be known before the optimizer steps."""
        rates = {
            parameter: float(group["lr"])
            for optimizer in self.optimizers
            for group in optimizer.param_groups
            for parameter in group["params"]
            if "lr" in group
        }
        unit = 1.0 / self._scale()
        # What a fused optimizer gets has not been scaled back yet.
        scaled = {
            parameter
            for optimizer in self.optimizers
            if getattr(optimizer, "grad_scale", None) is not None
            for group in optimizer.param_groups
            for parameter in group["params"]
        }
        gathered = _Gathered({place.name: {"weights": None, "activations": None} for place in self.places})
        for place, (x, binary) in self._latents().items():
            assert place.weights is not None
            sums = self._seen.setdefault((place.name, "weights"), {})
            add(sums, shape_sums(place.weights, x, binary))
            weight: Tensor = place.layer.weight
            gathered.signs[place.name] = _positive(binary)
            gathered.weights[place.name] = weight.detach().clone()
            values = read(sums)
            entry = quantities(values, values["n"], unit)
            lr = rates.get(weight) if weight.requires_grad else None
            entry |= {"blend": _blend(place.weights, values), "latent_variance": None, "lr": lr, "effective_lr": lr}
            if lr is not None and place.layer.standardize is not False:
                entry["effective_lr"] = lr * _gain(x, weight)
            if weight.grad is not None and weight.numel() > 1:
                grad = weight.grad.detach().cpu().double().abs() * (unit if weight in scaled else 1.0)
                entry["latent_variance"] = float(grad.var())
            gathered.layers[place.name]["weights"] = entry
        for place in self.places:
            if place.activation is None or (place.name, "activations") not in self._seen:
                continue
            values = read(self._seen[place.name, "activations"])
            # In a binary layer 1 / RMS is in the upstream gradient; a module on its own multiplies by it later.
            inner = _inverse_rms(place.activation) if place.alone else 1.0
            entry = quantities(values, self._counts[place.name], unit * inner)
            entry["blend"] = _blend(place.activation.estimator, values)
            gathered.layers[place.name]["activations"] = entry
        self._seen = {}
        return gathered

    @torch.no_grad()
    def _record(self, gathered: _Gathered) -> None:
        """Complete the record after the optimizer's step, and pass it on."""
        steps = self.step - self._signs_step
        moved = square = 0.0
        for place, (_, binary) in self._latents().items():
            positive, old = _positive(binary), gathered.weights[place.name]
            entry = gathered.layers[place.name]["weights"]
            assert entry is not None
            change, size, flipped, drifted = torch.stack(
                [
                    torch.linalg.vector_norm((place.layer.weight - old).float()),
                    torch.linalg.vector_norm(old.float()),
                    (positive != gathered.signs[place.name]).float().mean(),
                    (positive != self._signs[place.name]).float().mean(),
                ]
            ).tolist()
            update = None if entry["lr"] is None else ratio(change, size)
            entry |= {"flip_ratio": flipped, "drift": drifted / steps, "update": update}
            if update is not None:
                moved, square = moved + change**2, square + size**2
            self._signs[place.name] = positive
        self._signs_step = self.step
        layers = gathered.layers
        weights = total([entry["weights"] for entry in layers.values() if entry["weights"] is not None])
        if weights is not None:
            share = ratio(moved, square)
            weights["update"] = None if share is None else share**0.5
        activations = total([entry["activations"] for entry in layers.values() if entry["activations"] is not None])
        record: Record = rounded(
            {
                "step": self.step,
                "steps": steps,
                "layers": layers,
                "total": {"weights": weights, "activations": activations},
            }
        )
        self.latest = record
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            except OSError as error:
                raise RunError(f"diagnostics cannot be written to {self.path}: {error.strerror or error}.") from error
        if self.writer is not None:
            write_scalars(self.writer, record)
        if self.log is not None:
            self.log(record)

    # Saving and ending

    def state_dict(self) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs for the same records as without a stop."""
        return {"step": self.step, "signs_step": self._signs_step, "signs": dict(self._signs)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up where :meth:`state_dict` was called.

        Raises:
            ConfigError: the state of another model.
        """
        signs = state.get("signs")
        shapes = {name: value.shape for name, value in self._signs.items()}
        if not isinstance(signs, Mapping) or {name: value.shape for name, value in signs.items()} != shapes:
            raise ConfigError("Diagnostics: this state belongs to another model; leave it out to start afresh.")
        self.step = check_count("Diagnostics", "step", state.get("step"), 0)
        self._signs_step = check_count("Diagnostics", "signs_step", state.get("signs_step"), 0)
        self._signs = {name: value.to(self._signs[name].device) for name, value in signs.items()}
        self._arm()

    def close(self) -> None:
        """Measure no more, and leave model and optimizer as they would be without."""
        self._disarm()
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def __enter__(self) -> Diagnostics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Gathered:
    """What a record is made of, before the optimizer has stepped."""

    def __init__(self, layers: dict[str, dict[str, dict[str, Any] | None]]) -> None:
        self.layers = layers
        self.signs: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}


def _positive(binary: Tensor) -> Tensor:
    return binary > 0


def _gain(x: Tensor, weight: Tensor) -> float:
    """Mean square of x / mean square of the centred latents, of each filter, averaged; of all where the fan-in is 1."""
    x, w = (values.detach().cpu().double().flatten(1) for values in (x, weight))
    if w.shape[1] == 1:
        x, w = x.view(1, -1), w.view(1, -1)
    else:
        w = w - w.mean(1, keepdim=True)
    return float((x.square().mean(1) / w.square().mean(1).clamp(min=1e-30)).mean())


def _inverse_rms(activation: BinaryActivation) -> float:
    with evaluating(activation):  # so that nothing is counted
        inverse = activation.inverse_rms(torch.empty(0))
    return 1.0 if inverse is None else float(inverse)


def _blend(binarizer: Binarizer, values: Mapping[str, Any]) -> dict[str, Any] | None:
    state = blend_state(binarizer)
    if state is not None:
        state["a"] = ratio(values.get("a"), values.get("n"))
    return state


def write_scalars(writer: Any, record: Record) -> None:
    """Write a record to TensorBoard, under ``diagnostics/``: scalars, and the histograms of what estimators see.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``.
        record: of :class:`Diagnostics`.
    """
    step = record["step"]
    for name, entry in {"total": record["total"], **record["layers"]}.items():
        for role, values in entry.items():
            if values is None:
                continue
            tag = f"diagnostics/{name}/{role}" if name else f"diagnostics/{role}"
            for key, value in {**values, **(values.get("blend") or {})}.items():
                if isinstance(value, float | bool) and key != "count":
                    writer.add_scalar(f"{tag}/{key}", float(value), step)
            if values.get("histogram"):
                counts = [share * values["count"] for share in values["histogram"]]
                width = 2 * REACH / BINS
                limits = [-REACH + width * (i + 1) for i in range(BINS)]
                writer.add_histogram_raw(
                    f"{tag}/histogram",
                    min=-REACH,
                    max=REACH,
                    num=values["count"],
                    sum=sum(count * (limit - width / 2) for count, limit in zip(counts, limits, strict=True)),
                    sum_squares=sum(
                        count * (limit - width / 2) ** 2 for count, limit in zip(counts, limits, strict=True)
                    ),
                    bucket_limits=limits,
                    bucket_counts=counts,
                    global_step=step,
                )
