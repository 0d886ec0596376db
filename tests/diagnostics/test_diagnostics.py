from __future__ import annotations

import copy
import io
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import abste
from abste.diagnostics import Diagnostics
from abste.errors import ConfigError, RunError
from abste.estimators import EWGS, BiPer, ShapeRemoved, StochasticSign
from abste.nn import BinaryActivation, BinaryConv2d, BinaryLinear

Record = dict[str, Any]


def net(weights: Any = "ab_tanh", activations: Any = "ab_tanh") -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        BinaryConv2d(8, 8, 3, padding=1, weights=weights, activations=activations),
        nn.BatchNorm2d(8),
        nn.Dropout(0.1),
        BinaryActivation(activations or "ste"),
        nn.AvgPool2d(4),
        nn.Flatten(),
        BinaryLinear(32, 10, weights=weights),
    )
    return model.train()


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(7)
    return [
        (torch.randn(16, 3, 8, 8, generator=generator), torch.randint(10, (16,), generator=generator))
        for _ in range(count)
    ]


def train(
    model: nn.Module,
    steps: int,
    *,
    watch: Callable[[nn.Module, torch.optim.Optimizer], Any] | None = None,
    run: nn.Module | None = None,
    accumulate: int = 1,
) -> None:
    """Any training loop."""
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    schedule = abste.EstimatorSchedule(model, steps)
    made = None if watch is None else watch(model, optimizer)
    data = batches(steps * accumulate)
    for step in range(steps):
        optimizer.zero_grad()
        for images, labels in data[step * accumulate :][:accumulate]:
            nn.functional.cross_entropy((run or model)(images), labels).backward()
        optimizer.step()
        schedule.step()
    if made is not None:
        made.close()


def recorded(model: nn.Module, steps: int, *, run: nn.Module | None = None, **options: Any) -> list[Record]:
    records: list[Record] = []
    accumulate = options.pop("accumulate", 1)
    train(
        model,
        steps,
        run=run,
        accumulate=accumulate,
        watch=lambda _, optimizer: Diagnostics(run or model, optimizer, log=records.append, **options),
    )
    return records


def same_state(one: nn.Module, other: nn.Module) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(a[key], b[key]) for key in a)


# Against numpy


class ByHand:
    """BinaryLinear(6, 4), AB-Tanh at a = 0.3, loss sum(y C), in numpy alone, and what each side should report."""

    a, k = 0.3, 2.0

    def __init__(self, w: np.ndarray, xs: list[np.ndarray], cs: list[np.ndarray], rms: list[float]) -> None:
        self.w = w
        centred = w - w.mean(1, keepdims=True)
        self.z = centred / np.sqrt((centred**2).mean(1, keepdims=True))
        scale = np.abs(w).mean(1)
        signs = np.where(self.z >= 0, 1.0, -1.0)
        ups_w = [(c * scale).T @ np.where(x >= 0, 1.0, -1.0) for x, c in zip(xs, cs, strict=True)]
        ups_x = [(c * scale) @ signs / r for c, r in zip(cs, rms, strict=True)]
        self.weights = self.side([self.z] * len(xs), ups_w, 3.0, self.z)
        seen = [x / r for x, r in zip(xs, rms, strict=True)]
        self.activations = self.side(seen, ups_x, 1.5, np.concatenate(seen))

    def side(self, seen: list[np.ndarray], ups: list[np.ndarray], t: float, x: np.ndarray) -> dict[str, float]:
        clipped = np.clip(x, -t, t)
        surrogate = (1 - self.a) * clipped + self.a * np.tanh(self.k * clipped) / np.tanh(self.k)
        error = np.where(x >= 0, 1.0, -1.0) - surrogate
        ste = np.abs(np.concatenate([up * (np.abs(z) <= t) for up, z in zip(ups, seen, strict=True)])).ravel()
        own = ste * np.concatenate([self.slope(z, t) for z in seen]).ravel()
        r = np.sqrt((x**2).mean())
        calls = [x] if len(x) == len(self.z) else seen  # latents are the same in every call
        counts = sum(np.histogram(np.clip(z / np.sqrt((z**2).mean()), -4, 3.999), 32, (-4, 4))[0] for z in calls)
        return {
            "count": x.size,
            "rms": r,
            "error": np.sqrt((error**2).mean()),
            "error_l2": np.linalg.norm(error),
            "beyond": (np.abs(x) > t).mean(),
            "slope": self.slope(x, t).mean(),
            "variance": own.var(ddof=1),
            "variance_ratio": own.var(ddof=1) / ste.var(ddof=1),
            "variation": own.std(ddof=1) / own.mean(),
            "variation_ratio": (own.std(ddof=1) / own.mean() / (ste.std(ddof=1) / ste.mean())) ** 2,
            "histogram": counts / x.size,
        }

    def slope(self, x: np.ndarray, t: float) -> np.ndarray:
        bent = self.k / np.cosh(self.k * x) ** 2 / np.tanh(self.k)
        return np.where(np.abs(x) <= t, (1 - self.a) + self.a * bent, 0.0)


@pytest.mark.parametrize("calls", [1, 3])
def test_against_numpy(calls: int) -> None:
    """Of one backward pass, or of several between two steps of the optimizer."""
    blend = {"name": "ab_tanh", "k": 2.0, "blend": {"name": "constant", "a": 0.3}}
    layer = BinaryLinear(6, 4, weights=blend, activations=blend).double()
    generator = torch.Generator().manual_seed(3)
    xs = [2 * torch.randn(5, 6, generator=generator, dtype=torch.float64) for _ in range(calls)]
    cs = [torch.randn(5, 4, generator=generator, dtype=torch.float64) for _ in range(calls)]
    start = layer.weight.detach().numpy().copy()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    diagnostics = Diagnostics(layer, optimizer, every=1, sample=None)
    rms = []
    for x, c in zip(xs, cs, strict=True):
        (layer(x.requires_grad_()) * c).sum().backward()
        rms.append(float(layer.activation.mean_square) ** 0.5)
    assert layer.weight.grad is not None
    gradient = layer.weight.grad.numpy().copy()
    optimizer.step()

    assert diagnostics.latest is not None
    record = diagnostics.latest
    assert (record["step"], record["steps"]) == (1, 1)
    hand = ByHand(start, [x.detach().numpy() for x in xs], [c.numpy() for c in cs], rms)
    for role, expected in (("weights", hand.weights), ("activations", hand.activations)):
        found = record["layers"][""][role]
        for key, value in expected.items():
            assert found[key] == pytest.approx(value, rel=2e-5, abs=1e-9), (role, key)
        assert found["blend"] == {"kind": "constant", "a": pytest.approx(0.3)}
        for key in ("count", "error", "error_l2", "beyond", "slope", "variance", "variance_ratio", "variation"):
            assert record["total"][role][key] == pytest.approx(expected[key], rel=2e-5)

    weights = record["layers"][""]["weights"]
    after = start - 0.5 * gradient
    centred = start - start.mean(1, keepdims=True)
    flipped = (np.sign(after - after.mean(1, keepdims=True)) != np.sign(centred)).mean()
    assert weights["latent_variance"] == pytest.approx(np.abs(gradient).var(ddof=1), rel=1e-5)
    assert weights["flip_ratio"] == weights["drift"] == pytest.approx(flipped) and flipped > 0
    assert weights["lr"] == 0.5
    assert weights["effective_lr"] == pytest.approx(0.5 * (1 / (centred**2).mean(1)).mean(), rel=1e-5)
    assert weights["update"] == pytest.approx(0.5 * np.linalg.norm(gradient) / np.linalg.norm(start), rel=1e-5)


def test_the_effective_rate_is_that_of_the_standardised_latents() -> None:
    """What the docstring says of it: to first order, x moves as under SGD on x with that rate."""
    torch.manual_seed(1)
    layer = BinaryLinear(50, 1, bias=False, weights="ste").double()
    from abste.nn import standardize

    before = standardize(layer.weight).detach()
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-8)
    diagnostics = Diagnostics(layer, optimizer, every=1)
    up = torch.randn(1, 50, dtype=torch.float64)
    leaf = before.clone().requires_grad_()
    (leaf * up).sum().backward()
    (standardize(layer.weight) * up).sum().backward()
    with pytest.warns(UserWarning, match="saw no backward pass"):
        optimizer.step()
    assert leaf.grad is not None and diagnostics.latest is not None
    tangent = leaf.grad - leaf.grad.mean()
    tangent -= before * (tangent * before).mean()
    moved = standardize(layer.weight).detach() - before
    expected = -diagnostics.latest["layers"][""]["weights"]["effective_lr"] * tangent
    assert (moved - expected).norm() < 1e-3 * expected.norm()


def test_flips_and_drift_over_an_interval() -> None:
    model = net()
    states: list[dict[str, np.ndarray]] = []

    def signs() -> dict[str, np.ndarray]:
        return {
            name: module.binary_weight().sign.numpy().copy()
            for name, module in model.named_modules()
            if isinstance(module, BinaryConv2d | BinaryLinear)
        }

    records: list[Record] = []

    def watch(_: nn.Module, optimizer: torch.optim.Optimizer) -> Diagnostics:
        states.append(signs())
        optimizer.register_step_post_hook(lambda *_: states.append(signs()))
        return Diagnostics(model, optimizer, every=4, log=records.append)

    train(model, 9, watch=watch)
    assert [record["step"] for record in records] == [4, 8] and records[0]["steps"] == 4
    for record in records:
        step = record["step"]
        counts = changed = 0
        for name in ("2", "8"):
            found = record["layers"][name]["weights"]
            assert found["flip_ratio"] == pytest.approx((states[step][name] != states[step - 1][name]).mean(), rel=1e-4)
            differ = states[step][name] != states[step - 4][name]
            assert found["drift"] == pytest.approx(differ.mean() / 4, rel=1e-4)
            counts, changed = counts + differ.size, changed + differ.sum()
        assert record["total"]["weights"]["drift"] == pytest.approx(changed / counts / 4, rel=1e-4)
    assert records[-1]["total"]["weights"]["drift"] > 0


def test_a_sample_is_close_and_sees_all_channels() -> None:
    model = net()
    whole, part = (recorded(copy.deepcopy(model), 1, every=1, sample=sample)[0] for sample in (None, 1000))
    for name in ("2", "5"):
        one, other = whole["layers"][name]["activations"], part["layers"][name]["activations"]
        assert one["count"] == other["count"] == 16 * 8 * 64
        for key in ("error", "slope", "variation", "rms"):
            assert other[key] == pytest.approx(one[key], rel=0.15)
    assert whole["layers"]["2"]["weights"] == part["layers"]["2"]["weights"]

    from abste.estimators.blends import sampled

    channels = torch.arange(16).view(1, 16, 1, 1).expand(8, 16, 32, 32)
    for x in (channels.contiguous(), channels.contiguous(memory_format=torch.channels_last)):
        (seen,) = sampled(4096, x)
        assert 3000 < len(seen) <= 4096
        assert min(np.bincount(seen.numpy(), minlength=16)) > 0.9 * len(seen) / 16


def test_calls_of_different_sizes_count_by_what_they_binarise() -> None:
    model = nn.Sequential(BinaryConv2d(1, 1, 1, weights=None, activations="ab_tanh"))
    generator = torch.Generator().manual_seed(3)
    large, small = torch.randn(1, 1, 64, 64, generator=generator), 4 * torch.randn(1, 1, 8, 8, generator=generator)

    def measured(sample: int | None) -> Record:
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1)
        diagnostics = Diagnostics(copied, optimizer, every=1, sample=sample)
        (copied(large.requires_grad_()).square().sum() + copied(small.requires_grad_()).square().sum()).backward()
        optimizer.step()
        assert diagnostics.latest is not None
        return dict(diagnostics.latest["layers"]["0"]["activations"])

    whole, part = measured(None), measured(64)
    assert whole["count"] == part["count"] == 64 * 64 + 8 * 8
    for key in ("rms", "beyond", "slope", "variance"):
        assert part[key] == pytest.approx(whole[key], rel=0.35), key  # the mean of the two calls would be far off
    assert sum(part["histogram"]) == pytest.approx(1)


@pytest.mark.parametrize("by_name", [False, True])
def test_a_closure_makes_the_gradients_that_are_measured(by_name: bool) -> None:
    def run(closure: bool) -> list[Record]:
        torch.manual_seed(4)
        model, records = net(), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        diagnostics = Diagnostics(model, optimizer, every=2, log=records.append)
        for images, labels in batches(4):

            def loss(images: Tensor = images, labels: Tensor = labels) -> Tensor:
                optimizer.zero_grad()
                value = nn.functional.cross_entropy(model(images), labels)
                value.backward()
                return value

            if not closure:
                loss()
                optimizer.step()
            elif by_name:
                assert isinstance(optimizer.step(closure=loss), Tensor)
            else:
                assert isinstance(optimizer.step(loss), Tensor)
        diagnostics.close()
        return records

    expected = run(False)
    assert run(True) == expected and expected[0]["layers"]["2"]["activations"] is not None


def test_layers_that_are_frozen_at_first_are_seen_later() -> None:
    torch.manual_seed(6)
    model, records = net(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every=1, log=records.append)
    optimizer.step()  # nothing has been computed yet
    images, labels = batches(1)[0]
    nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    diagnostics.close()
    assert records[0]["layers"]["2"]["activations"] is None
    assert records[1]["layers"]["2"]["activations"]["variance"] > 0


def test_totals() -> None:
    record = recorded(net(), 1, every=1, sample=None)[0]
    layers = record["layers"]
    assert list(layers) == ["2", "5", "8"]
    assert layers["5"]["weights"] is None and layers["8"]["activations"] is None
    for role, names in (("weights", ["2", "8"]), ("activations", ["2", "5"])):
        parts, found = [layers[name][role] for name in names], record["total"][role]
        counts = np.array([part["count"] for part in parts])
        assert found["count"] == counts.sum()

        def mean(key: str, parts: Any = parts, counts: Any = counts) -> Any:
            return np.average([part[key] for part in parts], weights=counts)

        assert found["slope"] == pytest.approx(mean("slope"), rel=1e-4)
        assert found["beyond"] == pytest.approx(mean("beyond"), rel=1e-4)
        squares = np.average([part["error"] ** 2 for part in parts], weights=counts)
        assert found["error"] == pytest.approx(math.sqrt(squares), rel=1e-4)
        for key in ("error_l2", "variance"):
            assert found[key] == pytest.approx(sum(part[key] for part in parts), rel=1e-4)
        assert found["variation"] == pytest.approx(np.mean([part["variation"] for part in parts]), rel=1e-4)
        ste = sum(part["variance"] / part["variance_ratio"] for part in parts)
        assert found["variance_ratio"] == pytest.approx(found["variance"] / ste, rel=1e-4)


def test_an_activation_on_its_own_reports_as_in_a_layer() -> None:
    """The same computation in either form: the gradient is that of the input, before division by its RMS."""
    torch.manual_seed(2)
    fused = BinaryLinear(12, 5, weights="ste", activations="ab_tanh")
    split = nn.Sequential(BinaryActivation("ab_tanh"), copy.deepcopy(fused))
    split[1].activation = None
    x, records = 3 * torch.randn(40, 12), []
    for model in (fused, split):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Diagnostics(model, optimizer, every=1, log=records.append):
            model(x.clone().requires_grad_()).square().sum().backward()
            optimizer.step()
    one, other = records[0]["layers"][""]["activations"], records[1]["layers"]["0"]["activations"]
    for key in one:
        if key not in ("blend", "histogram"):
            assert other[key] == pytest.approx(one[key], rel=1e-4), key


# What it survives


@pytest.mark.parametrize("every", [1, 3])
def test_training_is_the_same(every: int) -> None:
    plain, watched = (net(StochasticSign(), {"name": "ab_arctan", "blend": "equilibrium"}) for _ in range(2))
    watched.load_state_dict(plain.state_dict())
    train(plain, 7)
    random = torch.get_rng_state()
    assert len(recorded(watched, 7, every=every)) == 7 // every
    assert same_state(plain, watched)
    assert torch.equal(random, torch.get_rng_state())
    assert not any("backward" in vars(module) for module in watched.modules())


def test_kinds_of_layers() -> None:
    """Without a surrogate; called twice; frozen; never reached."""
    shared = BinaryConv2d(8, 8, 3, padding=1, weights=EWGS(), activations=EWGS())
    frozen = BinaryConv2d(8, 8, 3, padding=1, weights="ste", activations="ste")
    unused = BinaryLinear(4, 4, weights=BiPer(), activations="ste", standardize=False)
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3, padding=1), "shared": shared, "frozen": frozen, "unused": unused})
    model["frozen"].requires_grad_(False)
    model["stem"].requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every=1)
    x = model["frozen"](model["stem"](torch.randn(4, 3, 8, 8)))
    shared(shared(x)).sum().backward()
    optimizer.step()
    assert diagnostics.latest is not None
    json.dumps(diagnostics.latest, allow_nan=False)
    layers = diagnostics.latest["layers"]

    twice = layers["shared"]
    assert twice["weights"]["error"] is twice["weights"]["slope"] is twice["weights"]["blend"] is None
    assert twice["weights"]["count"] == shared.weight.numel() and twice["weights"]["variance_ratio"] > 0
    assert twice["activations"]["count"] == 4 * 8 * 64  # the first call's input needs no gradient
    assert layers["frozen"]["activations"] is None
    still = layers["frozen"]["weights"]
    assert still["variance"] is still["lr"] is still["update"] is still["latent_variance"] is None
    assert still["error"] > 0 and still["flip_ratio"] == 0
    assert layers["unused"]["activations"] is None and layers["unused"]["weights"]["variation"] is None
    assert layers["unused"]["weights"]["effective_lr"] == layers["unused"]["weights"]["lr"] == 0.1  # raw latents
    assert layers["unused"]["weights"]["slope"] is not None and layers["unused"]["weights"]["update"] == 0
    assert diagnostics.latest["total"]["weights"]["count"] == sum(each["weights"]["count"] for each in layers.values())


def test_gradient_accumulation_is_the_sum_of_its_parts() -> None:
    model = net()
    one = recorded(copy.deepcopy(model), 1, every=1, accumulate=4)[0]
    assert one["layers"]["2"]["activations"]["count"] == 4 * 16 * 8 * 64
    assert one["layers"]["2"]["weights"]["count"] == 8 * 8 * 9
    assert recorded(model, 3, every=2, accumulate=4)[0]["step"] == 2


def test_learned_and_scheduled_blends_are_reported() -> None:
    records = recorded(
        net(weights={"name": "ab_tanh", "blend": "learned"}, activations={"name": "ab_tanh", "blend": "gate"}),
        4,
        every=2,
    )
    for record in records:
        assert 0.4 < record["layers"]["2"]["weights"]["blend"]["a"] < 0.6
        assert record["layers"]["2"]["weights"]["blend"]["kind"] == "learned"
        assert 0.3 < record["layers"]["2"]["activations"]["blend"]["a"] < 0.9  # its mean over the inputs
    rising = [record["layers"]["8"]["weights"]["blend"]["a"] for record in recorded(net(), 8, every=2)]
    assert rising == pytest.approx([0.9 * (1 - math.cos(math.pi * (step - 1) / 16)) for step in (2, 4, 6, 8)], rel=1e-4)


def test_an_equilibrium_and_its_budget() -> None:
    blend = {"name": "ab_tanh", "blend": {"name": "equilibrium", "rho_start": 1.3, "rho_end": 1.3, "slew": 0.1}}
    records = recorded(net(blend, blend), 40, every=1)
    first = records[0]["layers"]["2"]["weights"]["blend"]
    assert first == {
        "kind": "equilibrium",
        "a": 0.0,
        "budget": "variation",
        "rho": pytest.approx(1.3),
        "ratio": None,
        "target": None,
        "slewing": None,
    }
    second = records[1]["layers"]["2"]["weights"]["blend"]
    assert second["a"] == pytest.approx(0.1) and second["slewing"] and second["ratio"] < 1.3
    settled = records[-1]["layers"]["2"]
    for role in ("weights", "activations"):
        state = settled[role]["blend"]
        assert not state["slewing"] and state["a"] == pytest.approx(state["target"], abs=1e-3)
        assert state["ratio"] == pytest.approx(1.3, rel=1e-3) or (state["a"] == 1 and state["ratio"] < 1.3)
        # The moments are smoothed; this step's own ratio is near.
        assert settled[role]["variation_ratio"] == pytest.approx(state["ratio"], rel=0.3)


@pytest.mark.parametrize("name", abste.estimators.available())
@pytest.mark.parametrize("role", ["weights", "activations"])
def test_every_estimator(name: str, role: abste.estimators.Role) -> None:
    """Training with each is the same as without, and what exists is reported."""
    if role not in abste.estimators.get(name)().roles:
        with pytest.raises(ConfigError, match="cannot binarise"):
            net(**{role: name})
        return
    plain = net(**{role: name})
    watched = copy.deepcopy(plain)
    train(plain, 3)
    for record in recorded(watched, 3, every=1):
        json.dumps(record, allow_nan=False)
        found = record["layers"]["2"][role]
        for key in ("error", "error_l2", "slope"):
            assert (found[key] is not None) == abste.estimators.get(name).has_surrogate, key
        assert (
            found["variance"] > 0 and found["variation"] > 0 and sum(found["histogram"]) == pytest.approx(1, abs=1e-4)
        )
    assert same_state(plain, watched)


def test_the_shape_removed_control_reports_what_it_stands_in_for() -> None:
    blend = {"name": "ab_tanh", "blend": {"name": "constant", "a": 0.6}}
    record = recorded(net(ShapeRemoved(blend), ShapeRemoved(blend)), 1, every=1)[0]
    for role in ("weights", "activations"):
        found = record["layers"]["2"][role]
        assert found["blend"] == {"kind": "constant", "a": pytest.approx(0.6)}
        assert found["variation_ratio"] == pytest.approx(1, rel=1e-3)  # STE's shape
        assert 0.5 < found["slope"] < 2


def test_a_forward_of_another_kind() -> None:
    """The binary value of BiPer is a square wave; the error is the distance from that."""
    layer = BinaryLinear(6, 4, weights=BiPer(2.0), standardize=False).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    latents = 5 * torch.randn(4, 6, dtype=torch.float64)
    layer.weight.data.copy_(latents)
    diagnostics = Diagnostics(layer, optimizer, every=1)
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert diagnostics.latest is not None
    wave = np.sin(2 * latents.numpy())
    found = diagnostics.latest["layers"][""]["weights"]
    assert found["error"] == pytest.approx(np.sqrt(((np.where(wave >= 0, 1, -1) - wave) ** 2).mean()), rel=1e-5)
    assert found["slope"] == pytest.approx((2 * np.cos(2 * latents.numpy())).mean(), rel=1e-5)


def test_filters_are_measured_each_by_itself() -> None:
    """What an estimator takes over a filter is that filter's, not that of all weights."""
    layer = BinaryLinear(6, 4, weights="magnitude_aware_sign", standardize=False, scale=None).double()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    latents = torch.rand(4, 6, dtype=torch.float64).sub(0.5) * torch.tensor([[0.1], [0.5], [2.0], [5.0]])
    layer.weight.data.copy_(latents)
    diagnostics = Diagnostics(layer, optimizer, every=1)
    layer(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert diagnostics.latest is not None
    x = latents.numpy()
    surrogate = np.abs(x).mean(1, keepdims=True) * np.clip(x, -3, 3)
    found = diagnostics.latest["layers"][""]["weights"]
    assert found["error"] == pytest.approx(np.sqrt(((np.where(x >= 0, 1, -1) - surrogate) ** 2).mean()), rel=1e-5)


def test_copies_and_saved_models_are_not_watched() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every=1)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    images, labels = batches(1)[0]
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        nn.functional.cross_entropy(other(images), labels).backward()
        assert other[2].weight.grad is not None
    assert not diagnostics._seen
    nn.functional.cross_entropy(model(images), labels).backward()
    assert diagnostics._seen
    diagnostics.close()
    optimizer.step()
    assert diagnostics.latest is None


def test_scaled_gradients() -> None:
    """As under float16: the loss is scaled, and the optimizer gets gradients that have been scaled back."""

    class Scaler:
        def get_scale(self) -> float:
            return 1024.0

    start, (images, labels) = net(), batches(1)[0]
    start[4] = nn.Identity()
    records: list[Record] = []
    for scaler, scale in ((None, 1.0), (Scaler(), 1024.0)):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with Diagnostics(model, optimizer, every=1, log=records.append, scaler=scaler):
            (scale * nn.functional.cross_entropy(model(images), labels)).backward()
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad /= scale
            optimizer.step()
    assert records[0] == records[1]  # a power of two changes no digit


@pytest.mark.parametrize(("compiled", "fused"), [(False, False), (True, False), (False, True)])
def test_steps_that_a_scaler_leaves_out_are_not_counted(compiled: bool, fused: bool) -> None:
    """The record of a step after some that overflowed is that of the step alone."""
    start, (images, labels) = net(), batches(1)[0]
    start[4] = nn.Identity()
    start[1].momentum = start[3].momentum = 0.0  # passes whose step is left out leave no trace but in the record
    for module in start.modules():
        if isinstance(module, BinaryActivation):
            module.normalize = False
    records: list[Record] = []
    passes = []
    for size in (2.0**10, 2.0**127):
        model: nn.Module = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=fused and size > 2**10)
        scaler = torch.amp.GradScaler("cpu", init_scale=size, backoff_factor=2.0**-40)
        called: nn.Module = torch.compile(model, backend="eager") if compiled else model  # type: ignore[assignment]
        found: list[Record] = []
        count = 0
        with Diagnostics(called, optimizer, every=1, log=found.append, scaler=scaler):
            while not found:
                count += 1
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(called(images), labels)).backward()
                scaler.step(optimizer)
                scaler.update()
        records += found
        passes.append(count)
    assert passes[0] == 1 < passes[1]
    assert records[0]["layers"]["2"]["activations"]["count"] == 16 * 8 * 64
    assert records[1]["step"] == (passes[1] if fused else 1)
    for record in records:
        record["step"] = record["steps"] = record["total"]["weights"]["drift"] = None
        for entry in record["layers"].values():
            if entry["weights"] is not None:
                entry["weights"]["drift"] = None  # per step
    assert records[0] == records[1]


def test_infinite_gradients_have_no_variance() -> None:
    model, (images, _) = net(), batches(1)[0]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with Diagnostics(model, optimizer, every=1) as diagnostics:
        (model(images).sum() * math.inf).backward()
        optimizer.step()
    assert diagnostics.latest is not None
    for entry in (*diagnostics.latest["layers"]["8"].values(), *diagnostics.latest["total"].values()):
        assert entry is None or (entry["variance"] is None and entry["variance_ratio"] is None)


def test_several_optimizers() -> None:
    model = net()
    first = torch.optim.SGD([model[2].weight], lr=0.1)
    second = torch.optim.Adam([p for p in model.parameters() if p is not model[2].weight], lr=0.01)
    diagnostics = Diagnostics(model, [first, second], every=2)
    for images, labels in batches(2):
        nn.functional.cross_entropy(model(images), labels).backward()
        first.step()
        second.step()
    assert diagnostics.latest is not None and diagnostics.latest["step"] == 2
    layers = diagnostics.latest["layers"]
    assert layers["2"]["weights"]["lr"] == 0.1 and layers["8"]["weights"]["lr"] == 0.01
    assert layers["2"]["weights"]["update"] > 0 and layers["8"]["weights"]["update"] > 0


def test_half_precision() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every=1)
    images, labels = batches(1)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    assert diagnostics.latest is not None
    exact = recorded(copy.deepcopy(model), 1, every=1)[0]
    for role in ("weights", "activations"):
        found, expected = diagnostics.latest["layers"]["2"][role], exact["layers"]["2"][role]
        assert found["error"] == pytest.approx(expected["error"], rel=0.05)
        assert found["variation"] == pytest.approx(expected["variation"], rel=0.2)


# torch.compile

# torch's compiler itself asks tensors that are no leaves for their gradient.
compiles = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


def compilations() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@compiles
@pytest.mark.parametrize("how", ["module", "in place", "a part"])
def test_compiled(how: str) -> None:
    """The same weights as without, no compilation more, and what an eager run reports."""
    torch.compiler.reset()
    # No dropout: the repetition would draw its own.
    models = [net("ab_tanh", {"name": "ab_tanh", "blend": "equilibrium"}) for _ in range(3)]
    for model in models:
        model[4] = nn.Identity()
        model.load_state_dict(models[0].state_dict())
    eager, plain, watched = models

    def compiled(model: nn.Sequential) -> nn.Module:
        if how == "module":
            return torch.compile(model, backend="aot_eager")  # type: ignore[return-value]
        if how == "in place":
            model.compile(backend="aot_eager")
        else:
            model[2] = torch.compile(model[2], backend="aot_eager")
            model[8].compile(backend="aot_eager")
        return model

    before = compilations()
    train(plain, 6, run=compiled(plain))
    graphs = compilations() - before
    assert graphs >= 1
    before = compilations()
    records = recorded(watched, 6, run=compiled(watched), every=2)
    assert compilations() - before <= graphs
    assert same_state(plain, watched)

    expected = recorded(eager, 6, every=2)
    assert len(records) == len(expected) == 3
    for found, reference in zip(records, expected, strict=True):
        assert list(found["layers"]) == list(reference["layers"])
        for name, entry in reference["layers"].items():
            for role, values in entry.items():
                for key in () if values is None else ("count", "error", "rms", "variance", "variation", "flip_ratio"):
                    if values.get(key) is not None:
                        assert found["layers"][name][role][key] == pytest.approx(values[key], rel=0.02, abs=2e-3), key


def test_a_compiled_model_that_it_was_not_given() -> None:
    torch.compiler.reset()
    model = net()
    run = torch.compile(model, backend="aot_eager")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    diagnostics = Diagnostics(model, optimizer, every=1)
    data = batches(3)
    before = compilations()
    nn.functional.cross_entropy(run(data[0][0]), data[0][1]).backward()
    with pytest.warns(UserWarning, match="give Diagnostics what torch.compile returned"):
        optimizer.step()
    for images, labels in data[1:]:
        nn.functional.cross_entropy(run(images), labels).backward()
        optimizer.step()
    assert compilations() - before <= 2  # one try, no more
    assert diagnostics.latest is not None and diagnostics.latest["step"] == 3
    assert diagnostics.latest["layers"]["2"]["weights"]["error"] > 0
    assert diagnostics.latest["layers"]["2"]["activations"] is None


@compiles
def test_a_replay_leaves_no_trace() -> None:
    """Evaluation between two steps, several calls, outputs in a dictionary, random numbers, gradients of an input."""
    torch.compiler.reset()

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def forward(self, *, images: Tensor) -> dict[str, Tensor]:
            logits = self.body(images)
            return {"logits": logits, "norm": logits.square().mean()}

    plain, watched = Two(), Two()
    watched.load_state_dict(plain.state_dict())
    records: list[Record] = []
    for model in (plain, watched):
        run = torch.compile(model, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        if model is watched:
            Diagnostics(run, optimizer, every=1, log=records.append)
        torch.manual_seed(3)
        for images, labels in batches(3):
            with torch.no_grad():
                run(images=images)
            for _ in range(2):
                inputs = images.clone().requires_grad_()
                out = run(images=inputs)
                (nn.functional.cross_entropy(out["logits"], labels) + out["norm"]).backward()
                assert inputs.grad is not None
            run(images=images)  # without a backward
            optimizer.step()
            optimizer.zero_grad()
    assert same_state(plain, watched)
    assert [record["layers"]["body.2"]["activations"]["count"] for record in records] == [2 * 16 * 8 * 64] * 3


# Files and state


def test_records_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    records = recorded(net(), 4, every=2, path=path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == records
    with pytest.raises(RunError, match="diagnostics cannot be written to"):
        recorded(net(), 1, every=1, path=tmp_path / "no" / "d.jsonl")


def test_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        records = recorded(net(), 4, every=2, writer=writer)
    events = EventAccumulator(str(tmp_path), size_guidance={"histograms": 0})
    events.Reload()
    scalars = [event.value for event in events.Scalars("diagnostics/2/activations/error")]
    assert scalars == pytest.approx([record["layers"]["2"]["activations"]["error"] for record in records])
    assert "diagnostics/total/weights/flip_ratio" in events.Tags()["scalars"]
    assert "diagnostics/2/weights/a" in events.Tags()["scalars"]
    histogram = events.Histograms("diagnostics/8/weights/histogram")[0].histogram_value
    assert histogram.num == 320 and sum(histogram.bucket) == pytest.approx(320, rel=1e-3)


def test_state() -> None:
    """Stopped and continued between two records: the same records."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    data = batches(6)

    def steps(part: list[tuple[Tensor, Tensor]]) -> None:
        for images, labels in part:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    diagnostics = Diagnostics(model, optimizer, every=4)
    steps(data[:2])
    state = diagnostics.state_dict()
    diagnostics.close()
    clone, other = copy.deepcopy(model), copy.deepcopy(optimizer.state_dict())
    results = []
    for later in (False, True):
        model.load_state_dict(clone.state_dict())
        optimizer.load_state_dict(other)
        if later:
            model[4] = nn.Dropout(0.1)
        torch.manual_seed(9)
        with Diagnostics(model, optimizer, every=4) as diagnostics:
            diagnostics.load_state_dict(copy.deepcopy(state))
            steps(data[2:])
            results.append(diagnostics.latest)
    assert results[0] == results[1] and results[0] is not None
    assert (results[0]["step"], results[0]["steps"]) == (4, 4)
    with pytest.raises(ConfigError, match="belongs to another model"):
        Diagnostics(nn.Sequential(model[2]), optimizer).load_state_dict(state)


def test_bad_arguments() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for match, arguments in {
        "every must be an integer of at least 1, got 0": {"every": 0},
        "every must be an integer of at least 1, got 1.5": {"every": 1.5},
        "every must be an integer of at least 1, got True": {"every": True},
        "sample must be an integer of at least 2": {"sample": 1},
        "step must be an integer of at least 0": {"step": -1},
    }.items():
        with pytest.raises(ConfigError, match=match):
            Diagnostics(model, optimizer, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="has no binary layer; convert it first"):
        Diagnostics(nn.Linear(2, 2), optimizer)
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got str"):
        Diagnostics("resnet", optimizer)  # type: ignore[arg-type]
    for wrong in (None, [], "sgd", [model]):
        with pytest.raises(ConfigError, match="needs an optimizer of torch"):
            Diagnostics(model, wrong)  # type: ignore[arg-type]
