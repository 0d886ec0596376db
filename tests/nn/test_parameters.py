"""Parameter groups and batch-norm recalibration."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.utils.data
from torch import Tensor, nn
from torch.nn.utils import prune

import abste
from abste.errors import ConfigError
from abste.nn import latent_weights, parameter_groups, recalibrate_batch_norm


def network(**options: Any) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.Flatten(),
        nn.Linear(32, 4),
    )
    if options:
        abste.convert(model, **options, example_input=torch.zeros(2, 3, 8, 8))
    return model


# ---- parameter groups


def names_of(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, list[str]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {group["name"]: [names[parameter] for parameter in group["params"]] for group in groups}


def test_every_parameter_is_in_the_group_where_it_belongs() -> None:
    model = network(weights="ste", scale="learned")
    groups = parameter_groups(model, 0.1, 5e-4)
    assert names_of(model, groups) == {
        "latents": ["2.weight", "4.weight"],
        "weights": ["0.weight", "6.weight"],
        "norms_biases": [
            *("0.bias", "1.weight", "1.bias", "2.bias", "2.learned_scale", "3.weight", "3.bias", "4.learned_scale"),
            "6.bias",
        ],
    }
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.1, 5e-4), (0.1, 5e-4), (0.1, 0.0)]
    assert latent_weights(model) == groups[0]["params"]


def test_latents_may_have_rates_of_their_own() -> None:
    model = network(weights="ste")
    groups = parameter_groups(model, 0.1, 5e-4, latent_lr=0.3, latent_weight_decay=0.0)
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.3, 0.0), (0.1, 5e-4), (0.1, 0.0)]
    assert parameter_groups(model, 0.1)[0]["weight_decay"] == 0.0


def test_empty_groups_frozen_and_shared_parameters() -> None:
    assert [g["name"] for g in parameter_groups(network(), 0.1)] == ["weights", "norms_biases"]
    assert [g["name"] for g in parameter_groups(network(weights=None, activations="ste"), 0.1)] == [
        "weights",
        "norms_biases",
    ]
    model = network(weights="ste")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "2.weight")
    assert names_of(model, parameter_groups(model, 0.1)) == {"latents": ["2.weight"]}
    layer = nn.Linear(3, 3)
    (weights, biases) = parameter_groups(nn.Sequential(layer, layer), 0.1)
    assert (len(weights["params"]), len(biases["params"])) == (1, 1)


def test_filters_in_full_precision_may_have_a_group_of_their_own() -> None:
    groups = parameter_groups(network(weights="ste"), 0.1, 5e-4, latent_lr=0.3, filters=True)
    assert [g["name"] for g in groups] == ["latents", "filters", "weights", "norms_biases"]
    assert [len(g["params"]) for g in groups] == [2, 1, 1, 7]
    assert [(g["lr"], g["weight_decay"]) for g in groups] == [(0.3, 5e-4), (0.1, 5e-4), (0.1, 5e-4), (0.1, 0.0)]
    assert [len(g["params"]) for g in parameter_groups(network(), 0.1, filters=True)] == [3, 1, 7]


def test_norms_may_be_decayed_too() -> None:
    model = network(weights="ste", scale="learned")
    plain, groups = parameter_groups(model, 0.1, 5e-4), parameter_groups(model, 0.1, 5e-4, decay_norms=True)
    assert names_of(model, groups) == names_of(model, plain)
    assert [g["weight_decay"] for g in groups] == [5e-4] * 3
    groups = parameter_groups(model, 0.1, 5e-4, latent_weight_decay=0.0, decay_norms=True)
    assert [g["weight_decay"] for g in groups] == [0.0, 5e-4, 5e-4]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    before = model[1].weight.detach().clone()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before * (1 - 0.1 * 5e-4))


def test_weights_that_flip_have_no_rates() -> None:
    model = network(weights="identity_ste", standardize=False, scale="learned")
    latents, *rest = parameter_groups(model, 0.1, latent_lr=0.3, flips=True)  # tests/optim/test_bop.py has what fails
    assert latents == {"name": "latents", "params": latent_weights(model)}
    assert [g["lr"] for g in rest] == [0.1, 0.1]
    for weight in latents["params"]:
        weight.requires_grad_(False)
    with pytest.raises(ConfigError, match="the model has no trainable binary weight that could flip"):
        parameter_groups(model, 0.1, flips=True)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
def test_optimizers_take_them(optimizer: Any) -> None:
    model = network(weights="ste", scale="learned")
    before = [p.detach().clone() for p in model.parameters()]
    step = optimizer(parameter_groups(model, 0.1, 1e-2), lr=0.1)
    model(torch.randn(4, 3, 8, 8)).square().sum().backward()
    step.step()
    assert all(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    "rates",
    [{"lr": -0.1}, {"lr": float("nan")}, {"lr": "0.1"}, {"weight_decay": -1.0}, {"latent_lr": -1.0}],
)
def test_bad_rates(rates: dict[str, Any]) -> None:
    (key,) = rates
    with pytest.raises(ConfigError, match=f"parameter_groups: {key} must be a number and not negative, got"):
        parameter_groups(network(), **{"lr": 0.1, **rates})


def test_nothing_to_train() -> None:
    with pytest.raises(ConfigError, match="no parameter that requires a gradient"):
        parameter_groups(nn.ReLU(), 0.1)


# ---- batch norm


def batches() -> list[Tensor]:
    return [3.0 + 2.0 * torch.randn(16, 3, 8, 8) for _ in range(4)]


def test_recalibration_is_one_plain_pass() -> None:
    model = network(weights="ste", activations="ste")
    for batch in batches():  # wrong statistics to begin with
        model(10.0 * batch)
    model[3].eval()
    model[1].momentum = None
    data = batches()
    rms = [m.activation.mean_square.clone() for m in (model[2], model[4])]
    assert recalibrate_batch_norm(model, iter(data)) == 4
    assert [m.training for m in model.modules()] == [m is not model[3] for m in model.modules()]
    assert (model[1].momentum, model[3].momentum) == (None, 0.1)
    assert [m.activation.mean_square for m in (model[2], model[4])] == rms

    model.eval()
    seen = [model[0](batch).detach() for batch in data]
    for norm, following in ((model[1], model[2]), (model[3], None)):
        means = torch.stack([x.mean((0, 2, 3)) for x in seen])
        variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen])
        torch.testing.assert_close(norm.running_mean, means.mean(0), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(norm.running_var, variances.mean(0), rtol=1e-4, atol=1e-5)
        assert norm.num_batches_tracked == 4
        if following is not None:  # each batch is normalised with its own statistics on the way
            seen = [following(nn.functional.batch_norm(x, None, None, norm.weight, norm.bias, True)) for x in seen]


def test_recalibration_is_float32() -> None:
    model = network(weights="ste")
    twin = network(weights="ste")
    twin.load_state_dict(model.state_dict())
    data = [batch.bfloat16() for batch in batches()]
    recalibrate_batch_norm(twin, [batch.float() for batch in data])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        recalibrate_batch_norm(model, data)
    torch.testing.assert_close(model.state_dict(), twin.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_recalibration_is_in_the_precision_of_the_model(dtype: torch.dtype) -> None:
    """It measures what the model computes, whatever the precision of the batches."""
    data = batches()
    for given in (dtype, torch.float32):
        model, twin = network(weights="ste").to(dtype), network(weights="ste")
        twin.load_state_dict(model.state_dict())
        recalibrate_batch_norm(model, [batch.to(given) for batch in data])
        recalibrate_batch_norm(twin, data)
        for key, value in twin.state_dict().items():
            close = {torch.float64: 1e-5, torch.bfloat16: 5e-2}[dtype]
            torch.testing.assert_close(model.state_dict()[key].to(value.dtype), value, rtol=close, atol=close)


def test_recalibration_changes_nothing_else() -> None:
    model = network(weights="ste", activations="ste")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    recalibrate_batch_norm(model, batches())
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {f"{i}.{key}" for i in (1, 3) for key in ("running_mean", "running_var", "num_batches_tracked")}
    assert not any(p.grad is not None for p in model.parameters())


def test_without_batch_norm_nothing_happens() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    assert recalibrate_batch_norm(nn.Sequential(nn.Linear(3, 3)), never()) == 0
    assert recalibrate_batch_norm(nn.BatchNorm1d(3, track_running_stats=False), never()) == 0


def test_a_recalibration_that_fails_changes_nothing() -> None:
    model = network(weights="ste")
    model(batches()[0])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="there is no batch"):
        recalibrate_batch_norm(model, [])
    with pytest.raises(RuntimeError, match="channels"):
        recalibrate_batch_norm(model.train(), [*batches(), torch.zeros(2, 4, 8, 8)])
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(m.training for m in model.modules())
    assert model[1].momentum == 0.1


def test_latents_under_parametrizations_and_pruning_are_latents() -> None:
    layers = [abste.nn.BinaryLinear(8, 8, bias=False) for _ in range(4)]
    torch.nn.utils.parametrizations.weight_norm(layers[1])
    prune.l1_unstructured(layers[2], "weight", 0.5)
    torch.nn.utils.parametrizations.spectral_norm(layers[3])
    model = nn.Sequential(*layers)
    groups = names_of(model, parameter_groups(model, 0.1, latent_lr=1.0))
    latents = ["0.weight", "1.parametrizations.weight.original1", "2.weight_orig", "3.parametrizations.weight.original"]
    assert groups == {"latents": latents, "weights": ["1.parametrizations.weight.original0"]}


def test_rates_may_be_numpy_numbers() -> None:
    (group,) = parameter_groups(nn.Linear(2, 2, bias=False), np.float32(0.5), np.float64(0.25))  # type: ignore[arg-type]
    assert (group["lr"], group["weight_decay"]) == (0.5, 0.25)
    assert type(group["lr"]) is type(group["weight_decay"]) is float, "which checkpoints can hold"


def test_recalibration_takes_the_batches_of_a_data_loader() -> None:
    images = torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    first, second = network(), network()
    second.load_state_dict(first.state_dict())
    data = torch.utils.data.TensorDataset(images, torch.zeros(12))
    assert recalibrate_batch_norm(first, torch.utils.data.DataLoader(data, batch_size=4)) == 3
    recalibrate_batch_norm(second, images.split(4))
    for key, value in first.state_dict().items():
        torch.testing.assert_close(value, second.state_dict()[key], rtol=0, atol=0, msg=key)
