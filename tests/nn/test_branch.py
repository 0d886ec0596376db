"""The branch of SURGE: it changes gradients as its formula says, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import abste
from abste.errors import ConfigError
from abste.nn import (
    AdaptiveSet,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    GradientBranch,
    parameter_groups,
    remove_branches,
)

OPTIONS: dict[str, Any] = {"weights": "ste", "activations": "ste", "dtype": torch.float64}


def layers() -> dict[str, tuple[Any, Tensor]]:
    conv = {"kernel_size": 3, "padding": 1, "stride": 2, "groups": 2, **OPTIONS}
    images = torch.randn(2, 4, 7, 6, dtype=torch.float64)
    return {
        "conv1d": (BinaryConv1d(4, 6, **conv), images[:, :, 0]),
        "conv2d": (BinaryConv2d(4, 6, **conv), images),
        "unbatched": (BinaryConv2d(4, 6, **conv), images[0]),
        "reflect": (BinaryConv2d(4, 6, 3, padding=1, padding_mode="reflect", **OPTIONS), images),
        "pad_value": (BinaryConv2d(4, 6, 3, padding=1, pad_value=1, **OPTIONS), images),
        "linear": (BinaryLinear(6, 5, **OPTIONS), images),
        "W1A32": (BinaryLinear(6, 5, weights="ste", dtype=torch.float64), images),
        "set": (AdaptiveSet(BinaryConv2d(4, 6, **conv), scale=0.5, center=0.25), images),
    }


def side(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """W_a x: torch.nn's own layer of the same geometry."""
    core = layer.layer if isinstance(layer, AdaptiveSet) else layer
    if isinstance(core, nn.Linear):
        return F.linear(x, weight)
    mode = "constant" if core.padding_mode == "zeros" else core.padding_mode
    padded = F.pad(x, core._reversed_padding_repeated_twice, mode=mode)
    convolve = F.conv1d if len(core.stride) == 1 else F.conv2d
    return convolve(padded, weight, None, core.stride, 0, core.dilation, core.groups)


@pytest.mark.parametrize("name", layers())
def test_gradients_are_those_of_the_formula(name: str) -> None:
    layer, x = layers()[name]
    plain = copy.deepcopy(layer)
    branch = GradientBranch(layer, eta=0.3)
    core = layer.layer if isinstance(layer, AdaptiveSet) else layer
    assert torch.equal(branch.branch, core.weight)  # a copy
    with torch.no_grad():
        branch.branch.mul_(1.5).add_(0.1)
    one, two, three = (x.clone().requires_grad_() for _ in range(3))
    y = branch(one)
    assert torch.equal(y, copy.deepcopy(plain)(x))
    upstream = torch.randn_like(y)
    y.backward(upstream)

    plain(two).backward(upstream)
    weight = branch.branch.detach().clone().requires_grad_()
    side(layer, three, weight).backward(upstream)
    assert two.grad is not None and three.grad is not None and weight.grad is not None
    lam = 0.3 * two.grad.norm() / (three.grad.norm() + 1e-8)
    torch.testing.assert_close(one.grad, two.grad + lam * three.grad, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(branch.branch.grad, lam * weight.grad, rtol=1e-9, atol=1e-11)
    for (key, p), (_, q) in zip(layer.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-12, atol=1e-12, msg=key)


def test_eta_of_zero_and_inputs_without_a_gradient() -> None:
    layer, x = layers()["conv2d"]
    plain = copy.deepcopy(layer)
    one, two = (x.clone().requires_grad_() for _ in range(2))
    GradientBranch(layer, eta=0)(one).sum().backward()
    plain(two).sum().backward()
    torch.testing.assert_close(one.grad, two.grad, rtol=0, atol=0)
    branch = GradientBranch(copy.deepcopy(plain))
    branch(x).sum().backward()
    assert branch.branch.grad is not None and branch.branch.grad.isfinite().all()
    zero = torch.zeros_like(x).requires_grad_()
    (branch(zero) * 0).sum().backward()
    assert torch.equal(zero.grad, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision(dtype: torch.dtype) -> None:
    branch = GradientBranch(BinaryConv2d(4, 6, 3, padding=1, activations="ste"))
    x = torch.randn(8, 4, 16, 16).requires_grad_()
    with torch.autocast("cpu", dtype=dtype):
        y = branch(x)
    (100 * y).sum().backward()  # the squares of these overflow float16
    assert y.dtype == dtype and x.grad is not None and x.grad.isfinite().all()
    half = x.detach().to(dtype).requires_grad_()
    (branch.to(dtype)(half) * 10).sum().backward()
    assert half.grad is not None and half.grad.isfinite().all()


def test_an_activation_behind_it_may_work_in_place() -> None:
    x = torch.randn(2, 3, 6, 6)
    branch = GradientBranch(BinaryConv2d(3, 4, 3, weights="ste", activations="ste"))
    grads = []
    for inplace in (False, True):
        model = nn.Sequential(copy.deepcopy(branch), nn.ReLU(inplace))
        model(x).square().sum().backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)


@pytest.mark.parametrize("adaptive", [False, True])
def test_reset_is_a_new_branch(adaptive: bool) -> None:
    def build(device: str) -> GradientBranch:
        layer = BinaryLinear(6, 5, weights="ste", activations="dsq", scale="learned", device=device)
        return GradientBranch(AdaptiveSet(layer, scale=0.5, center=0.25) if adaptive else layer)

    branch = build("meta").to_empty(device="cpu")
    for tensor in (*branch.parameters(), *branch.buffers()):
        tensor.data.fill_(7)
    torch.manual_seed(1)
    branch.reset_parameters()
    torch.manual_seed(1)
    torch.testing.assert_close(branch.state_dict(), build("cpu").state_dict(), rtol=0, atol=0)


def test_outside_training_the_branch_is_not_run() -> None:
    layer, x = layers()["conv2d"]
    branch = GradientBranch(layer)
    with torch.no_grad():
        branch.branch.fill_(float("nan"))
    wanted = copy.deepcopy(layer).eval()(x)
    assert torch.equal(branch.eval()(x), wanted)
    with torch.no_grad():
        assert torch.equal(branch.train()(x), wanted)
    assert torch.equal(branch(x), wanted)  # even in training it is felt in the backward alone


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    abste.convert(model, activations="ste", gradient_branch=0.2, example_input=torch.zeros(2, 6))
    return model


def test_a_state_without_branches_is_complete() -> None:
    model = network()
    state = model.state_dict()
    assert "2.branch" in state
    lean = {key: value for key, value in state.items() if key != "2.branch"}
    other = network()
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1.0)
    other.load_state_dict(lean)
    x = torch.randn(3, 6)
    assert torch.equal(other.eval()(x), model.eval()(x))
    with pytest.raises(RuntimeError, match=r"2\.layer\.weight"):
        other.load_state_dict({key: value for key, value in lean.items() if key != "2.layer.weight"})


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_state_without_the_branch_begins_it_on_its_latents(adaptive: bool) -> None:
    def build() -> nn.Module:
        layer = BinaryLinear(6, 5, weights="ste", activations="ste")
        return nn.Sequential(GradientBranch(AdaptiveSet(layer) if adaptive else layer))

    ours, theirs = build(), build()
    state = {key: value for key, value in ours.state_dict().items() if key != "0.branch"}
    trained = torch.nn.init.ones_(theirs[0].branch).clone()
    theirs.load_state_dict({}, strict=False)
    assert torch.equal(theirs[0].branch, trained)
    copy.deepcopy(theirs).load_state_dict(state)
    assert torch.equal(theirs[0].branch, trained)
    theirs.load_state_dict(state)
    assert torch.equal(theirs[0].branch, ours[0].branch)
    theirs.load_state_dict({**state, "0.branch": trained})
    assert torch.equal(theirs[0].branch, trained)


def test_removing_branches() -> None:
    model = network().eval()
    x = torch.randn(3, 6)
    wanted = model(x)
    assert remove_branches(model) is model
    assert torch.equal(model(x), wanted)
    plain = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))
    abste.convert(plain, activations="ste", example_input=torch.zeros(2, 6))
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), wanted)
    layer = BinaryLinear(3, 2)
    assert remove_branches(GradientBranch(layer)) is layer


def test_a_branch_is_neither_stored_nor_reported() -> None:
    model = network()
    costs = abste.summary(model, (1, 6))
    plain = abste.summary(remove_branches(copy.deepcopy(model)), (1, 6))
    assert [row.name for row in costs.layers] == ["0", "1", "2.layer", "3", "4"]
    assert costs.packed_bytes == plain.packed_bytes and costs.total_macs == plain.total_macs
    report = abste.convert(model, keep_last=False, example_input=torch.zeros(2, 6))
    assert [row.name for row in report.layers] == ["0", "2.layer", "4"]
    groups = {group["name"]: group["params"] for group in parameter_groups(network(), 0.1)}
    assert [p.shape for p in groups["latents"]] == [(8, 8)]
    assert (8, 8) in [p.shape for p in groups["weights"]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GradientBranch(nn.Linear(3, 2)), "wraps a BinaryConv1d, .* got Linear"),  # type: ignore[arg-type]
        (lambda: GradientBranch(BinaryLinear(3, 2), eta=-0.1), "eta must lie in"),
        (lambda: GradientBranch(BinaryLinear(3, 2), eta=float("inf")), "eta must lie in"),
        (lambda: GradientBranch(BinaryLinear(3, 2), eta=None), "eta must be a number"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_one_sentence(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)
