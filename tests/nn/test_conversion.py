"""convert() on small networks, one for each thing that can be in the way."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abste
from abste.errors import ConfigError, ConversionError
from abste.estimators import ABTanh, EstimatorSchedule
from abste.nn import BinaryConv1d, BinaryConv2d, BinaryLinear, ConversionReport

IMAGE = torch.zeros(2, 3, 8, 8)


def binarize(model: nn.Module, example: Any = IMAGE, **options: Any) -> ConversionReport:
    return abste.convert(model, example_input=example, **options)


def stem(channels: int = 8) -> list[nn.Module]:
    return [nn.Conv2d(3, channels, 3, padding=1), nn.BatchNorm2d(channels)]


def head(channels: int = 8) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 4)]


class Middle(nn.Module):
    """A stem, whatever is to be tested, and a head."""

    def __init__(self, middle: nn.Module, channels: int = 8, out: int | None = None) -> None:
        super().__init__()
        self.stem = nn.Sequential(*stem(channels))
        self.middle = middle
        self.head = nn.Sequential(*head(out or channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.middle(self.stem(x)))


class Lambda(nn.Module):
    """A forward written in the test, with its modules."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def trains(model: nn.Module, *inputs: Tensor) -> None:
    """Forward and backward, and every latent gets a gradient."""
    model.train()
    y = model(*inputs)
    y = y[0] if isinstance(y, tuple) else y
    y.float().square().mean().backward()
    assert y.isfinite().all()
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv1d | BinaryConv2d | BinaryLinear):
            assert module.weight.grad is not None, name
            assert module.weight.grad.isfinite().all(), name


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything about a model that a probe might disturb."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers(), *model.modules())],
        "gradients": [p.grad for p in model.parameters()],
        "modes": [m.training for m in model.modules()],
        "classes": [type(m) for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "hooks": [[len(getattr(m, hook)) for hook in hooks] for m in model.modules()],
        "random": torch.get_rng_state(),
        "grad mode": torch.is_grad_enabled(),
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    torch.testing.assert_close(after.pop("state"), before.pop("state"), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(after.pop("random"), before.pop("random"))
    assert after == before


# ---- what is binarised


def test_first_and_last_by_execution_order_stay_float() -> None:
    class Reversed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last = nn.Linear(8, 4)
            self.second = nn.Conv2d(8, 8, 3, padding=1)
            self.first = nn.Conv2d(3, 8, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.second(self.first(x)).mean((2, 3)))

    model = Reversed()
    report = binarize(model)
    assert report.binarized == ["second"]
    assert report.kept_float == {"last": "last layer", "first": "first layer"}
    model = Reversed()
    report = binarize(model, keep_first=False, keep_last=False)
    assert report.binarized == ["last", "second", "first"]
    trains(model, torch.randn(2, 3, 8, 8))


def test_all_three_kinds_with_their_options_and_weights() -> None:
    model = nn.Sequential(
        *stem(),
        nn.Conv2d(8, 16, (3, 2), stride=2, padding=(1, 0), dilation=(1, 2), groups=2, bias=False),
        nn.Flatten(2),
        nn.Conv1d(16, 4, 3, padding="same", padding_mode="circular"),
        nn.Linear(12, 6),
        nn.Linear(6, 2),
    )
    twin = copy.deepcopy(model)
    report = binarize(
        model, activations="ste", scale="tensor", scale_gradient=True, standardize=False, normalize=False, pad_value=-1
    )
    assert report.binarized == ["2", "4", "5"]
    assert [type(model[i]) for i in (2, 4, 5)] == [BinaryConv2d, BinaryConv1d, BinaryLinear]
    for i in (2, 4, 5):
        layer: Any = model[i]
        assert torch.equal(layer.weight, twin[i].weight)
        assert (layer.scale, layer.scale_gradient, layer.standardize) == ("tensor", True, False)
        assert layer.activation.normalize is False
        assert layer.extra_repr().startswith(twin[i].extra_repr())
    assert (model[2].pad_value, model[4].pad_value) == (-1.0, 0.0)
    trains(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(("weights", "activations"), [("ste", None), ("ste", "ste"), (None, "ste")])
def test_bits(weights: str | None, activations: str | None) -> None:
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head())
    report = binarize(model, weights=weights, activations=activations)
    layer: Any = model[2]
    assert (layer.weight_binarizer is None) == (weights is None)
    assert (layer.activation is None) == (activations is None)
    assert report.layers[1].reason == f"W{'1 ste' if weights else 32}, A{'1 ste' if activations else 32}"
    binary = sum(each.weight.numel() for each in model.modules() if getattr(each, "weight_binarizer", None) is not None)
    assert f" layers binarised, {binary:,} of " in str(report) and bool(binary) == bool(weights)
    trains(model, torch.randn(2, 3, 8, 8))


def test_estimators_are_copied_for_each_layer_and_role() -> None:
    mine = ABTanh(k=3.0)
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), *head())
    binarize(model, weights=mine, activations=mine)
    made: list[Any] = [b for i in (2, 4) for b in (model[i].weight_binarizer, model[i].activation.estimator)]
    assert len({id(b) for b in (*made, mine)}) == 5
    assert [(b.k, b.t) for b in made] == [(3.0, 3.0), (3.0, 1.5)] * 2
    EstimatorSchedule(model, 4).step()
    assert {float(b.blend.progress()) for b in made} == {0.25}
    assert float(mine.blend.progress()) == 0.0


@pytest.mark.parametrize("name", ["resnet20", "resnet20_bireal"])
def test_report_on_resnet20(name: str) -> None:
    model = abste.models.create(name)
    report = binarize(model, torch.zeros(1, 3, 32, 32), activations="ab_tanh")
    assert len(report.binarized) == 18
    assert report.kept_float == {"conv1": "first layer", "fc": "last layer"}
    text = str(report)
    assert "18 of 20 layers binarised, 267,264 of 268,336 weights (99.6 %)" in text
    assert "layer1.0.conv1" in text
    assert "W1 ab_tanh, A1 ab_tanh" in text
    assert max(map(len, text.splitlines())) <= 100


def test_layers_keep_identity_hooks_and_references() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    calls: list[str] = []
    handle = layer.register_forward_hook(lambda *_: calls.append("hook"))
    model = Middle(layer)
    model.aside = [layer, layer.weight]
    binarize(model)
    calls.clear()
    assert model.middle is layer is model.aside[0]
    assert layer.weight is model.aside[1]
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["hook"]
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert calls == ["hook"]


def test_an_optimizer_from_before_goes_on() -> None:
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    binarize(model)
    before = model[2].weight.detach().clone()
    model(torch.randn(2, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model[2].weight, before)


@pytest.mark.parametrize("training", [True, False])
def test_modes_are_kept(training: bool) -> None:
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head()).train(training)
    model[2].train(not training)
    binarize(model, activations="ste")
    assert model.training == training
    assert {m.training for m in model[2].modules()} == {not training}


# ---- what stays float


@pytest.mark.parametrize(
    "pattern", ["middle.1", ["middle.1"], ["middle.[1-9]"], ["*.1"], {"middle.1"}, lambda name, _: name == "middle.1"]
)
def test_keep_float(pattern: Any) -> None:
    model = Middle(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)))
    report = binarize(model, keep_float=pattern)
    assert report.binarized == ["middle.0"]
    assert report.kept_float["middle.1"] == "named by keep_float"


def test_keep_float_may_name_a_whole_part() -> None:
    model = Middle(nn.Sequential(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)), nn.Conv2d(8, 8, 3)))
    assert binarize(model, keep_float="middle.0").binarized == ["middle.1"]


def test_keep_float_sees_modules() -> None:
    model = Middle(nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 1)))
    report = binarize(model, keep_float=lambda _, module: getattr(module, "kernel_size", None) == (1, 1))
    assert report.binarized == ["middle.0"]


class Scaled(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def cases_of_float() -> dict[str, tuple[nn.Module, dict[str, str]]]:
    convs = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1)}
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, padding=1))
    spectral = nn.utils.spectral_norm(nn.Conv2d(8, 8, 3, padding=1))
    tied = nn.Conv2d(8, 8, 3, padding=1)
    tied.weight = convs["b"].weight
    shared = "its weight is shared with middle."
    outside = "its weight is read without calling it, so a swap would have no effect or a wrong one"
    return {
        "subclass": (Scaled(8, 8, 3), {"middle": "a subclass of Conv2d, which may have a forward of its own"}),
        "weight_norm": (normed, {"middle": "its weight is parametrised"}),
        "spectral_norm": (spectral, {"middle": "its weight is parametrised"}),
        "transposed": (nn.ConvTranspose2d(8, 8, 3), {"middle": "no binary counterpart of ConvTranspose2d"}),
        "3-d": (
            nn.Sequential(nn.Unflatten(1, (8, 1)), nn.Conv3d(8, 8, (1, 3, 3)), nn.Flatten(1, 2)),
            {"middle.1": "no binary counterpart of Conv3d"},
        ),
        "lstm": (
            Lambda(lambda s, x: s.rnn(x.flatten(2).transpose(1, 2))[0].mT.unsqueeze(-1), rnn=nn.LSTM(8, 8)),
            {"middle.rnn": "weight_ih_l0, weight_hh_l0: of no Conv or Linear layer, but of the LSTM itself"},
        ),
        "unused": (
            Lambda(lambda s, x: s.a(x), **convs),
            {"middle.b": "not reached by the forward on example_input"},
        ),
        "weight read": (Lambda(lambda s, x: F.conv2d(x, s.a.weight), **convs), {"middle.a": outside}),
        "view of a weight": (
            Lambda(lambda s, x: s.a(x) + F.conv2d(s.b(x), s.a.weight.data[:, :, :1, :1]), **convs),
            {"middle.a": outside},
        ),
        "tied": (
            Lambda(lambda s, x: s.c(s.b(x)), b=convs["b"], c=tied),
            {"middle.b": shared + "c", "middle.c": shared + "b"},
        ),
    }


@pytest.mark.parametrize("case", cases_of_float())
def test_what_can_not_be_swapped_stays_float_and_says_why(case: str) -> None:
    part, reasons = cases_of_float()[case]
    model = Middle(nn.Sequential(part)[0])
    twin = copy.deepcopy(model)
    report = binarize(model, keep_first=False)
    for name, reason in reasons.items():
        assert report.kept_float[name] == reason
    for name, module in twin.named_modules():
        if name in report.kept_float:
            assert type(model.get_submodule(name)) is type(module)
    trains(model, torch.randn(2, 3, 8, 8))


def test_reading_the_dtype_or_shape_of_a_weight_is_no_obstacle() -> None:
    part = Lambda(lambda s, x: s.a(x.to(s.a.weight.dtype)) * len(s.a.weight), a=nn.Conv2d(8, 8, 3))
    assert binarize(Middle(part)).binarized == ["middle.a"]


def test_a_module_under_two_names_is_one_layer() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    model = Middle(nn.Sequential(layer, nn.BatchNorm2d(8), layer))
    report = binarize(model, activations="ste")
    assert report.binarized == ["middle.0"]
    assert type(model.middle[0]) is BinaryConv2d
    assert model.middle[2] is model.middle[0]
    trains(model, torch.randn(2, 3, 8, 8))
    model = Middle(nn.Sequential(layer, nn.BatchNorm2d(8), nn.ReLU(), layer))
    layer.__class__ = nn.Conv2d


def test_embedding_tied_to_the_last_layer() -> None:
    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(11, 8)
            self.first = nn.Linear(8, 8)
            self.second = nn.Linear(8, 8)
            self.out = nn.Linear(8, 11, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, tokens: Tensor) -> Tensor:
            return self.out(self.second(self.first(self.embed(tokens))))

    model = Language()
    report = binarize(model, torch.randint(0, 11, (2, 5)))
    assert report.binarized == ["second"]
    assert report.kept_float["embed"] == "no binary counterpart of Embedding"
    assert report.kept_float["out"] == "its weight is shared with embed"
    assert model.out.weight is model.embed.weight
    trains(model, torch.randint(0, 11, (2, 5)))


def test_depthwise_convolutions_stay_float_unless_asked() -> None:
    def model() -> nn.Module:
        return Middle(
            nn.Sequential(
                nn.Conv2d(8, 8, 3, padding=1, groups=8),
                nn.Conv2d(8, 16, 3, padding=1, groups=8),  # two filters for each channel
                nn.Conv2d(16, 8, 3, padding=1, groups=4),  # grouped: filters of four channels
                nn.Flatten(2),
                nn.Conv1d(8, 8, 5, groups=8),
                nn.Unflatten(2, (6, 10)),
            )
        )

    report = binarize(model())
    assert report.binarized == ["middle.2"]
    why = "depthwise convolution: {} weights for a channel, little to gain and much to lose"
    assert {name: report.kept_float[f"middle.{name}"] for name in (0, 1, 4)} == {
        0: why.format(9),
        1: why.format(9),
        4: why.format(5),
    }
    gray = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Conv2d(8, 1, 3), nn.Conv2d(1, 8, 3), *head())
    assert binarize(gray, torch.zeros(2, 1, 9, 9)).binarized == ["1", "2"]  # one channel, but no groups
    asked = model()
    assert binarize(asked, keep_depthwise=False).binarized == [f"middle.{number}" for number in (0, 1, 2, 4)]
    trains(asked, torch.randn(2, 3, 8, 8))


def test_the_report_names_what_an_estimator_is_made_from() -> None:
    control = {"name": "shape_removed", "of": {"name": "shape_removed", "of": "reste"}}
    report = binarize(nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head()), weights=control, activations=ABTanh())
    assert report.layers[1].reason == "W1 shape_removed of shape_removed of reste, A1 ab_tanh"
    report = binarize(nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head()), weights="shape_removed")
    assert report.layers[1].reason == "W1 shape_removed of ab_tanh, A32"


@pytest.mark.parametrize("batch_first", [True, False])
def test_transformer_layers_read_weights_without_calling(batch_first: bool) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=batch_first, dropout=0.0)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 8), nn.Linear(8, 3))
    report = binarize(model, torch.zeros(2, 5, 4))
    assert "without calling" in report.kept_float["1.self_attn.out_proj"]
    if batch_first:  # torch's fused path
        assert "without calling" in report.kept_float["1.linear1"]
        assert report.binarized == ["2"]
    x = torch.randn(2, 5, 4)
    model.eval()
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x), rtol=1e-4, atol=1e-5)
    trains(model, x)


def test_linear_layers_of_a_fast_path_stay_float_even_if_the_example_does_not_take_it() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 8), nn.Linear(8, 3))
    handle = layer.register_forward_hook(lambda *_: None)
    assert binarize(model, torch.zeros(2, 5, 4)).binarized == ["2"]
    handle.remove()
    x = torch.randn(2, 5, 4)
    model.eval()
    with torch.no_grad():
        fused = model(x)
    torch.testing.assert_close(fused, model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("change", [{"batch_first": False}, {"bias": False}, {"nhead": 1}, {"activation": torch.tanh}])
def test_linear_layers_without_a_fast_path_are_binarised(change: dict[str, Any]) -> None:
    options = {"nhead": 2, "batch_first": True, **change}
    layer = nn.TransformerEncoderLayer(8, dim_feedforward=16, **options)
    model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 3))
    assert binarize(model, torch.zeros(2, 5, 4)).binarized == ["1.linear1", "1.linear2"]


def test_already_binary() -> None:
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), *head())
    binarize(model, keep_float="4")
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"nothing to binarise: every layer stays as it is .*binary already"):
        binarize(model, keep_float="4")
    assert_same(before, snapshot(model))
    report = binarize(model, activations="ste")
    assert report.binarized == ["2", "4"]
    assert report.layers[1].reason == "binary already"
    assert model[2].activation is None


# ---- projection shortcuts


class Block(nn.Module):
    """A residual block whose shortcut is written in one of many ways."""

    def __init__(self, style: str, channels: int = 8) -> None:
        super().__init__()
        self.style = style
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 1),
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 2 * channels, 3, 2, 1),
            nn.BatchNorm2d(2 * channels),
            nn.Conv2d(2 * channels, 2 * channels, 1),
        )
        self.down = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(channels, 2 * channels, 1), nn.BatchNorm2d(2 * channels))

    def forward(self, x: Tensor) -> Tensor:
        if self.style == "shortcut first":
            short = self.down(x)
            return self.body(x) + short
        y = self.body(x)
        if self.style == "in place":
            y += self.down(x)
            return F.relu(y, inplace=True)
        if self.style == "in place on a view":
            y = y.contiguous()
            y[:, :4].add_(self.down(x)[:, :4])
            return y
        if self.style == "into a buffer":
            total = torch.zeros_like(y)
            total[:] = y
            return total.add_(self.down(x))
        if self.style == "torch.add":
            return torch.add(self.down(x), y, alpha=0.5)
        if self.style == "concatenation":
            return torch.cat([y, self.down(x)], 1)[:, ::2]
        if self.style == "product":
            return y * self.down(x)
        return y + self.down(x)


@pytest.mark.parametrize(
    "style", ["plain", "shortcut first", "in place", "in place on a view", "into a buffer", "torch.add"]
)
def test_projection_shortcuts_stay_float(style: str) -> None:
    model = Middle(Block(style), out=16)
    report = binarize(model)
    assert report.binarized == ["middle.body.0", "middle.body.2", "middle.body.4"]
    assert report.kept_float["middle.down.1"] == "1x1 projection shortcut"
    assert "middle.down.1" in binarize(Middle(Block(style), out=16), keep_projections=False).binarized
    trains(model, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("style", ["concatenation", "product"])
def test_other_1x1_convolutions_are_binarised(style: str) -> None:
    assert len(binarize(Middle(Block(style), out=16)).binarized) == 4


def test_a_projection_around_one_convolution() -> None:
    convs = {"a": nn.Conv2d(8, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 1)}
    for forward in (lambda s, x: s.a(x) + s.b(x), lambda s, x: s.b(x) + s.a(x)):  # Bi-Real's, and RepVGG's branches
        report = binarize(Middle(Lambda(forward, **copy.deepcopy(convs))))
        assert report.binarized == ["middle.a"]
    # In series, from another input, or with no longer path beside it, a 1x1 convolution is no shortcut.
    series = Middle(Lambda(lambda s, x: x + s.b(s.a(x)), **copy.deepcopy(convs)))
    assert binarize(series).binarized == ["middle.a", "middle.b"]
    after = Middle(Lambda(lambda s, x: (y := s.b(x)) + s.a(y), **copy.deepcopy(convs)))
    assert binarize(after).binarized == ["middle.a", "middle.b"]
    pair = Middle(Lambda(lambda s, x: s.a(x) + s.b(x), a=nn.Conv2d(8, 8, 1), b=nn.Conv2d(8, 8, 1)))
    assert binarize(pair).binarized == ["middle.a", "middle.b"]


def test_a_projection_of_the_very_input() -> None:
    class TwoInputs(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two, self.three = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.three(self.one(a) + self.two(b))

    def report(same: bool) -> ConversionReport:
        a, b = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8)
        return binarize(TwoInputs(), (a, a if same else b), keep_first=False)

    assert report(same=False).binarized == ["one", "two"]
    assert report(same=True).binarized == ["two"]


def test_squeeze_and_excite_is_no_shortcut() -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        y = self.conv(x)
        gate = torch.sigmoid(self.up(F.relu(self.down(y.mean((2, 3), keepdim=True)))))
        return y * gate + x

    part = Lambda(forward, conv=nn.Conv2d(8, 8, 3, padding=1), down=nn.Conv2d(8, 4, 1), up=nn.Conv2d(4, 8, 1))
    assert binarize(Middle(part)).binarized == ["middle.conv", "middle.down", "middle.up"]


def test_memory_of_the_probe_is_freed_as_it_goes() -> None:
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Step(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            y = x + 1
            if not torch.is_grad_enabled():
                made.append(weakref.ref(y))
                alive.append(sum(ref() is not None for ref in made))
            return y

    binarize(Middle(nn.Sequential(*(Step() for _ in range(40)), nn.Conv2d(8, 8, 3))))
    assert len(made) == 40
    assert max(alive) <= 3


# ---- inputs that are never negative


def relu_first() -> nn.Sequential:
    return nn.Sequential(
        *stem(), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 4)
    )


def test_unsigned_inputs_are_refused() -> None:
    model = relu_first()
    before = snapshot(model)
    with pytest.raises(ConversionError, match=r"the input of 3 is never negative .* or choose unsigned_inputs='batch"):
        binarize(model, activations="ste")
    assert_same(before, snapshot(model))
    assert binarize(relu_first()).binarized == ["3", "5"]  # W1A32 has no signs to lose


def test_remedies_for_unsigned_inputs() -> None:
    x = torch.randn(2, 3, 8, 8)
    model = relu_first()
    report = binarize(model, activations="ste", unsigned_inputs="keep_float")
    assert report.binarized == ["5"]
    assert report.kept_float["3"] == "its input is never negative"
    trains(model, x)

    model = relu_first()
    report = binarize(model, activations="ste", unsigned_inputs="weights_only")
    assert report.binarized == ["3", "5"]
    assert report.layers[1].reason == "W1 ab_tanh, A32; its input is never negative, so activations stay float"
    assert model[3].activation is None
    assert model[5].activation is not None
    trains(model, x)

    model = relu_first().eval()
    layer = model[3]
    report = binarize(model, activations="ste", unsigned_inputs="batch_norm")
    assert report.layers[1].reason == "W1 ab_tanh, A1 ste; after a new batch norm"
    assert type(model[3].norm) is nn.BatchNorm2d
    assert model[3].layer is layer
    assert not any(m.training for m in model[3].modules())
    seen: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    trains(model, x)
    assert (seen[0] < 0).any()
    assert (seen[0] >= 0).any()


def test_a_remedy_reaches_every_name_of_a_layer() -> None:
    layer = nn.Conv2d(8, 8, 3, padding=1)
    model = Middle(nn.Sequential(nn.ReLU(), layer, nn.ReLU(), layer))
    binarize(model, activations="ste", unsigned_inputs="batch_norm")
    assert model.middle[1] is model.middle[3]
    assert model.middle[1].layer is layer
    trains(model, torch.randn(2, 3, 8, 8))


def test_remedies_that_do_not_apply() -> None:
    linear = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 2))
    before = snapshot(linear)
    with pytest.raises(ConversionError, match="can not be applied to 2, a Linear"):
        binarize(linear, torch.zeros(9, 6), activations="ste", unsigned_inputs="batch_norm")
    with pytest.raises(ConversionError, match="nothing to binarise"):
        binarize(linear, torch.zeros(9, 6), activations="ste", unsigned_inputs="keep_float")
    with pytest.raises(ConversionError, match=r"nothing to binarise.*2: its input is never negative"):
        binarize(linear, torch.zeros(9, 6), weights=None, activations="ste", unsigned_inputs="weights_only")
    assert_same(before, snapshot(linear))


def test_a_first_operation_in_place_does_not_reach_the_example_input() -> None:
    model = nn.Sequential(nn.Hardtanh(inplace=True), *stem(), nn.Conv2d(8, 8, 3), *head())
    x = 3 * torch.randn(2, 3, 8, 8)
    before = x.clone()
    assert binarize(model, x).binarized == ["3"]
    assert torch.equal(x, before)


class Listed(nn.Module):
    """Calls its layers through a list of Python."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.steps = [self.a, self.b, self.c]

    def forward(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step(x)
        return x


def reads_dtype(self: Any, x: Tensor) -> Tensor:
    return self.c(self.b(self.a(x).to(self.b.weight.dtype)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Listed, "^b is called through another reference than its name, past the GradientBranch"),
        (
            lambda: Lambda(reads_dtype, a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4)),
            "^with modules put around layers .* 'GradientBranch' object has no attribute 'weight'",
        ),
    ],
)
def test_wrappers_that_a_model_goes_past_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    model = make()
    before, layer = snapshot(model), model.b
    attributes = {key: copy.copy(value) for key, value in vars(layer).items()}
    with pytest.raises(ConversionError, match=message):
        binarize(model, torch.zeros(2, 4), activations="ste", adaptive_set=True, gradient_branch=0.1)
    assert_same(before, snapshot(model))
    assert model.b is layer and type(layer) is nn.Linear and vars(layer).keys() == attributes.keys()
    assert binarize(model, torch.zeros(2, 4), activations="ste").binarized == ["b"]


def test_example_input_of_zeros_only_gives_the_shape() -> None:
    def model() -> nn.Sequential:
        torch.manual_seed(1)
        return nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 8, 3), *head())

    for example in (torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.randn(1, 3, 8, 8)):
        before = example.clone()
        assert binarize(model(), example, activations="ste").binarized == ["1"]
        assert torch.equal(example, before)
    untrained = nn.Sequential(*stem(), nn.BatchNorm2d(8), nn.Sigmoid(), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3), *head())
    assert binarize(untrained, activations="ste").binarized == ["5"]


# ---- the probe leaves nothing behind


class Restless(nn.Module):
    """Everything a forward can change: batch norm, dropout, a buffer of its own, replaced and in place."""

    def __init__(self, fail: bool = False) -> None:
        super().__init__()
        self.net = nn.Sequential(*stem(), nn.Dropout(0.5), nn.Conv2d(8, 8, 3), nn.ReLU(inplace=True), *head())
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(3))
        self.register_buffer("positions", torch.arange(4).expand(2, 4))
        self.fail = fail
        self.net[3].eval()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.average = 0.9 * self.average + 0.1 * x.mean((0, 2, 3))
        torch.randn(3)
        y = self.net(F.dropout(x, 0.5, training=True))
        if self.fail:
            raise ValueError("out of luck\nin many words")
        return y


@pytest.mark.parametrize("grad", [True, False])
def test_a_failing_forward_leaves_the_model_as_it_was(grad: bool) -> None:
    model = Restless(fail=True)
    model.net[3].register_forward_hook(lambda *_: None)
    before = snapshot(model)
    with torch.set_grad_enabled(grad):
        before["grad mode"] = grad
        with pytest.raises(ConversionError, match=r"fails on example_input of shape \(2, 3, 8, 8\): out of luck$"):
            binarize(model)
        assert_same(before, snapshot(model))


def test_conversion_changes_only_what_it_says() -> None:
    model = Restless()
    before = snapshot(model)
    binarize(model)
    after = snapshot(model)
    assert type(model.net[3]) is BinaryConv2d
    model.net[3].__class__ = nn.Conv2d
    assert all(torch.equal(after["state"][key], value) for key, value in before["state"].items())
    extra = {id(t) for t in (*model.net[3].modules(), *model.net[3].buffers())} - {id(model.net[3])}
    assert [i for i in after["objects"] if i not in extra] == before["objects"]
    assert torch.equal(after["random"], before["random"])
    assert after["grad mode"] == before["grad mode"]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "ab_tahn"},
        {"activations": {"name": "ste", "tt": 1}},
        {"weights": None},
        {"weights": 3},
        {"scale": "chanel"},
        {"pad_value": 1},
        {"pad_value": 3, "activations": "ste"},
        {"unsigned_inputs": "keepfloat"},
        {"keep_float": 3},
        {"keep_float": [3]},
        {"keep_float": ["net.33"]},
        {"example_input": None},
        {"example_input": "zeros"},
        {"example_input": (8, 8)},
    ],
)
def test_bad_options_are_one_sentence_and_change_nothing(options: dict[str, Any]) -> None:
    model = Restless()
    before = snapshot(model)
    with pytest.raises(ConfigError) as raised:
        abste.convert(model, **{"example_input": IMAGE, **options})
    assert "\n" not in str(raised.value)
    assert_same(before, snapshot(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "ab_tahn"}, "unknown estimator 'ab_tahn'; did you mean 'ab_tanh'"),
        ({"unsigned_inputs": "keepfloat"}, "unknown unsigned_inputs 'keepfloat'; did you mean 'keep_float'"),
        ({"keep_float": ["net.33"]}, r"no layer is named 'net.33' \(keep_float\); did you mean 'net.3'"),
        ({"keep_float": 3}, "keep_float must be names or a function"),
        ({"weights": None}, "weights and activations are both None"),
        ({"example_input": "zeros"}, "example_input must be a tensor or a tuple with one, got str"),
    ],
)
def test_messages_name_what_is_wrong(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        abste.convert(Restless(), **{"example_input": IMAGE, **options})


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Linear(3, 3), "the model is a single Linear: put it in a Sequential"),
        (nn.Sequential(nn.ReLU()), "the model has no convolution or linear layer"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), "nothing to binarise: every layer stays as it is .0: first layer"),
        (nn.Sequential(nn.LazyConv2d(4, 3), nn.Conv2d(4, 4, 3)), "lazy layers"),
        (nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head()).to("meta"), "meta device"),
        (nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)), r"fails on example_input of shape \(2, 3, 8, 8\): "),
    ],
)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_models_that_can_not_be_converted(model: nn.Module, message: str) -> None:
    with pytest.raises(ConversionError, match=message) as raised:
        binarize(model)
    assert "\n" not in str(raised.value)


def test_no_model_at_all() -> None:
    with pytest.raises(ConfigError, match=r"must be a torch\.nn\.Module, got list"):
        binarize([])  # type: ignore[arg-type]


def test_arguments_of_many_kinds() -> None:
    class Fusion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(5, 8)
            self.a, self.b, self.c = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: dict[str, Tensor], tokens: Tensor, flag: bool) -> Tensor:
            return self.c(self.b(self.a(x["image"]) + self.embed(tokens) * flag))

    report = binarize(Fusion(), ({"image": torch.zeros(2, 4)}, torch.tensor([0, 4]), True))
    assert report.binarized == ["b"]


def test_a_weight_on_the_model_itself() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(8, 8))
            self.net = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    report = binarize(Odd())
    assert report.binarized == ["net.2"]
    assert report.kept_float["(model)"] == "no binary counterpart of Odd"


# ---- other ways to run a module


def test_scripted_compiled_and_inference_parts() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            with torch.inference_mode():
                y = self.conv(x)
            return y.clone()

    compiled = torch.compile(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)), backend="eager")
    model = nn.Sequential(Frozen(), *stem(), compiled, nn.Conv2d(8, 8, 3), *head())
    report = binarize(model)
    assert report.kept_float["0.conv"] == "first layer"
    assert report.binarized == ["1", "3._orig_mod.0", "4"]
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
def test_a_scripted_part() -> None:
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU()))
    model = Middle(nn.Sequential(scripted, nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3)))
    assert "middle.2" in binarize(model).binarized
    trains(model, torch.randn(2, 3, 8, 8))


def test_double_and_bfloat16_models() -> None:
    for dtype in (torch.float64, torch.bfloat16):
        model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head()).to(dtype)
        binarize(model, IMAGE.to(dtype), activations="ste", scale="learned")
        assert model[2].learned_scale.dtype == dtype
        trains(model, torch.randn(2, 3, 8, 8, dtype=dtype))


def test_autocast_around_the_conversion() -> None:
    model = nn.Sequential(*stem(), nn.Conv2d(8, 8, 3), *head())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert binarize(model, activations="ste").binarized == ["2"]
    assert model[2].weight.dtype == torch.float32
