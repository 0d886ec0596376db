from __future__ import annotations

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from abste.diagnostics import ProbeResult, probe
from abste.errors import ConfigError
from abste.estimators import BiPer
from abste.nn import BinaryActivation, BinaryConv2d, BinaryLinear

AB = {"name": "ab_tanh", "blend": {"name": "constant", "a": 0.5}}


def tiny(activations: object = AB) -> nn.Sequential:
    """Few enough signs that all of them can be tried."""
    torch.manual_seed(4)
    model = nn.Sequential(
        nn.Linear(5, 4),
        nn.BatchNorm1d(4),
        BinaryLinear(4, 3, weights=AB, activations=activations),
        nn.BatchNorm1d(3),
        nn.Tanh(),
        BinaryLinear(3, 3, weights="ste"),
    )
    for _ in range(5):  # statistics
        model(torch.randn(50, 5))
    return model


def some(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(count, 5, generator=generator), torch.randint(3, (count,), generator=generator)


class Network:
    """The tiny network in evaluation, in numpy: the loss of each image as a function of its signs."""

    def __init__(self, model: nn.Sequential, images: Tensor, labels: Tensor) -> None:
        state = {key: value.double().numpy() for key, value in model.state_dict().items()}
        self.s, self.labels = state, labels.numpy()
        h = images.double().numpy() @ state["0.weight"].T + state["0.bias"]
        self.h = self.norm(h, "1")
        self.z = self.h / np.sqrt(state["2.activation.mean_square"])
        self.signs = {name: self.sign(self.latents(f"{name}.weight")) for name in ("2", "5")}

    @staticmethod
    def sign(x: np.ndarray) -> np.ndarray:
        return np.where(x >= 0, 1.0, -1.0)

    def latents(self, key: str) -> np.ndarray:
        centred = self.s[key] - self.s[key].mean(1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(1, keepdims=True))

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        s = self.s
        x = (x - s[f"{name}.running_mean"]) / np.sqrt(s[f"{name}.running_var"] + 1e-5)
        return x * s[f"{name}.weight"] + s[f"{name}.bias"]

    def losses(self, bits: np.ndarray | None = None, signs: dict[str, np.ndarray] | None = None) -> np.ndarray:
        signs = {**self.signs, **(signs or {})}
        x = self.sign(self.z) if bits is None else bits
        for name in ("2", "5"):
            scale = np.abs(self.s[f"{name}.weight"]).mean(1)
            x = x @ (scale[:, None] * signs[name]).T + self.s[f"{name}.bias"]
            if name == "2":
                x = np.tanh(self.norm(x, "3"))
        x = x - x.max(1, keepdims=True)
        return np.log(np.exp(x).sum(1)) - x[np.arange(len(x)), self.labels]


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))


def slope(x: np.ndarray, t: float) -> np.ndarray:
    return np.where(np.abs(x) <= t, 0.5 + 0.5 * 2 / np.cosh(2 * x) ** 2 / np.tanh(2.0), 0.0)


def difference(f: object, x: np.ndarray, step: float = 1e-5) -> np.ndarray:
    """The gradient of f at x, numerically."""
    grad = np.zeros_like(x)
    for index in np.ndindex(x.shape):
        values = []
        for side in (step, -step):
            moved = x.copy()
            moved[index] += side
            values.append(f(moved))  # type: ignore[operator]
        grad[index] = (values[0] - values[1]) / (2 * step)
    return grad


def test_weights_against_brute_force() -> None:
    model, (images, labels) = tiny(), some()
    result = probe(model, images, labels, activations=0, weights=1000)  # all of them
    hand = Network(model, images, labels)
    assert result.loss == pytest.approx(hand.losses().mean(), rel=1e-6)
    assert result.total["activations"] is None and result.layers["5"]["activations"] is None
    pairs = []
    for name in ("2", "5"):
        signs = hand.signs[name]
        discrete = np.zeros_like(signs)
        for index in np.ndindex(signs.shape):
            values = []
            for value in (1.0, -1.0):
                tried = signs.copy()
                tried[index] = value
                values.append(hand.losses(signs={name: tried}).mean())
            discrete[index] = (values[0] - values[1]) / 2
        before = difference(lambda tried, name=name: hand.losses(signs={name: tried}).mean(), signs)
        x = hand.latents(f"{name}.weight")
        after = before * (slope(x, 3.0) if name == "2" else np.abs(x) <= 3.0)
        pairs.append((discrete, before, after))
        found = result.layers[name]["weights"]
        assert found["count"] == signs.size
        assert found["discrete"]["before"]["cosine"] == pytest.approx(cosine(before, discrete), abs=1e-5)
        assert found["discrete"]["after"]["cosine"] == pytest.approx(cosine(after, discrete), abs=1e-5)
        for side in ("before", "after"):
            comparison = found["discrete"][side]
            assert -1 <= comparison["low"] <= comparison["cosine"] <= comparison["high"] <= 1
    whole = [np.concatenate([pair[part].ravel() for pair in pairs]) for part in range(3)]
    assert result.total["weights"]["discrete"]["after"]["cosine"] == pytest.approx(cosine(whole[2], whole[0]), abs=1e-5)
    assert result.total["weights"]["count"] == 21


def smoothed(hand: Network, noise: float) -> np.ndarray:
    """d/dz of E L(sign(z + noise e)), by the sum over all 16 patterns of bits and their probabilities."""

    def expectation(z: np.ndarray) -> np.ndarray:
        up = 0.5 * (1 + np.vectorize(math.erf)(z / noise / math.sqrt(2)))
        total = np.zeros(len(z))
        for bits in itertools.product((-1.0, 1.0), repeat=z.shape[1]):
            chance = np.where(np.array(bits) > 0, up, 1 - up).prod(1)
            total += chance * hand.losses(bits=np.tile(bits, (len(z), 1)))
        return total

    # Each image's loss depends on its own row alone, so columns can be moved for all images at once.
    grad = np.zeros_like(hand.z)
    for column in range(hand.z.shape[1]):
        step = np.zeros_like(hand.z)
        step[:, column] = 1e-5
        grad[:, column] = (expectation(hand.z + step) - expectation(hand.z - step)) / 2e-5
    return grad


@pytest.mark.parametrize("alone", [False, True])
def test_activations_against_brute_force(alone: bool) -> None:
    """Enough elements that each of the few is drawn, and enough noise that its mean is the smoothed derivative."""
    model, (images, labels) = tiny(), some(300)
    hand = Network(model, images, labels)
    if alone:  # the same with the binarisation as a module of its own
        layer = model[2]
        model = nn.Sequential(*model[:2], layer.activation, *model[2:])
        layer.activation = None
    place = "2"
    result = probe(model, images, labels, weights=0, activations=8, draws=100, noise=0.7)
    found = result.layers[place]["activations"]

    bits = hand.sign(hand.z)
    discrete = np.zeros_like(bits)
    for column in range(bits.shape[1]):
        values = []
        for value in (1.0, -1.0):
            tried = bits.copy()
            tried[:, column] = value
            values.append(hand.losses(bits=tried))
        discrete[:, column] = (values[0] - values[1]) / 2
    before = difference(lambda tried: hand.losses(bits=tried).sum(), bits)
    after = before * slope(hand.z, 1.5)
    exact = smoothed(hand, 0.7)
    assert found["count"] == 300 * 8 and result.total["activations"] == found
    for reference, values in (("discrete", discrete), ("smoothed", exact)):
        for side, gradient in (("before", before), ("after", after)):
            # Elements are drawn, about twice each, so they differ a little in weight.
            assert found[reference][side]["cosine"] == pytest.approx(cosine(gradient, values), abs=0.03)
            assert found[reference][side]["low"] <= found[reference][side]["cosine"] <= found[reference][side]["high"]
    assert found["agreement"] > 0.95


def test_the_smoothed_derivative_itself() -> None:
    """Not its direction alone: value by value, against the sum over all patterns of bits."""
    from abste.diagnostics.probing import _cross_entropy, _Prober
    from abste.diagnostics.watch import places

    model, (images, labels) = tiny().double().eval(), some()
    hand = Network(model, images, labels)
    exact = smoothed(hand, 0.7)
    prober = _Prober(model, images.double(), labels, _cross_entropy, 0)
    chosen = places(model, "test")
    point = prober.differentiate(chosen)
    assert np.allclose(point.activations["2"][0].numpy(), hand.z)
    # Gradients with respect to z itself, in units without the RMS.
    assert np.allclose(
        point.activations["2"][1].numpy(), difference(lambda b: hand.losses(bits=b).sum(), hand.sign(hand.z))
    )
    sample = prober.flip_activations(chosen[0], point, 3, 1000, 0.7)
    gradients = point.activations["2"][1].numpy()
    for row, values in enumerate(sample.references["smoothed"]):
        for value, gradient in zip(values, sample.before[row], strict=True):
            column = int(np.abs(gradients[row] - gradient).argmin())  # the gradient tells which element was drawn
            assert value == pytest.approx(exact[row, column], abs=0.05 * np.abs(exact).max())


def test_it_leaves_no_trace() -> None:
    model, (images, labels) = tiny(), some()
    model.train()
    state, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = probe(model, images, labels, weights=3, activations=1, draws=2)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state()) and model.training
    assert all(parameter.grad is None for parameter in model.parameters()) and not images.requires_grad
    assert first == probe(model, images, labels, weights=3, activations=1, draws=2)
    assert first != probe(model, images, labels, weights=3, activations=1, draws=2, seed=1)
    json.dumps(first.to_dict(), allow_nan=False)
    text = str(first)
    assert "smoothed" in text and "total" in text and max(map(len, text.splitlines())) < 120
    assert isinstance(first, ProbeResult) and first.settings["dtype"] == "float64"


def test_a_convolutional_network_and_single_precision() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        BinaryConv2d(4, 4, 3, activations="approx_sign"),
        nn.BatchNorm2d(4),
        BinaryActivation("ste"),
        nn.Flatten(),
        nn.Linear(64, 10),
    )
    images = torch.randn(8, 1, 8, 8)
    for parameter in model[:2].parameters():
        parameter.requires_grad_(False)  # frozen layers below do not matter
    labels = torch.randint(10, (8,))
    double, single = (
        probe(model, images, labels, weights=20, activations=3, draws=4, dtype=dtype)
        for dtype in (torch.float64, torch.float32)
    )
    assert list(double.layers) == ["2", "4"]
    for name, role in (("2", "weights"), ("2", "activations"), ("4", "activations")):
        one, other = double.layers[name][role], single.layers[name][role]
        assert one["discrete"]["after"]["cosine"] == pytest.approx(other["discrete"]["after"]["cosine"], abs=0.02)
    # Nothing lies between the second place's signs and the loss but a linear layer: the derivative is nearly exact.
    assert double.layers["4"]["activations"]["discrete"]["before"]["cosine"] > 0.98
    only = probe(model, images, labels, layers=["4"], activations=1, draws=2)
    assert list(only.layers) == ["4"] and only.total["weights"] is None


def test_what_can_not_be_probed_is_named() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BinaryLinear(5, 5, activations="ste")
            self.other = BinaryLinear(5, 3, activations=BiPer(1.0))
            self.never = BinaryLinear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.other(self.layer(self.layer(x)))
            return y

    images, labels = some()
    result = probe(Twice(), images, labels, weights=4, activations=1, draws=2)
    assert result.layers["layer"]["activations"] is None and result.layers["layer"]["weights"]["count"] == 4
    assert result.skipped["layer"] == "it is called 2 times, with 2 gradients"
    assert "is not the sign" in result.skipped["other"]
    assert result.layers["never"] == {"weights": None, "activations": None}


def test_another_loss() -> None:
    images, labels = some()
    result = probe(tiny(), images, labels, weights=2, activations=1, draws=2, loss=lambda x, y: x.square().sum(1))
    assert result.loss > 0
    with pytest.raises(ConfigError, match="loss must give one number for each of the 6 images, got \\(\\)"):
        probe(tiny(), images, labels, loss=nn.functional.cross_entropy)
    with pytest.raises(ConfigError, match="of the 6 images, got float"):
        probe(tiny(), images, labels, loss=lambda x, y: 1.0)  # type: ignore[arg-type,return-value]


def test_bad_arguments() -> None:
    images, labels = some()
    for message, arguments in {
        "weights must be an integer of at least 0": {"weights": -1},
        "activations must be an integer of at least 0": {"activations": 1.5},
        "draws must be an integer of at least 2": {"draws": 1},
        "seed must be an integer": {"seed": None},
        "noise must lie in": {"noise": 0},
        "noise must be a number": {"noise": "much"},
        "dtype must be torch.float32 or torch.float64": {"dtype": torch.float16},
        "no binary layer '22'": {"layers": ["22"]},
    }.items():
        with pytest.raises(ConfigError, match=message):
            probe(tiny(), images, labels, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="as many of one as of the other"):
        probe(tiny(), images, labels[:3])
    with pytest.raises(ConfigError, match="convert it first"):
        probe(nn.Linear(5, 3), images, labels)
