from __future__ import annotations

import tomllib
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

from abste.errors import ConfigError
from abste.nn import AdaptiveSet, GradientBranch, convert
from abste.train.recipe import Recipe, builtin_recipes, first_difference, load_recipe, make_recipe

DIGITS = "digits-resnet8-w1a32"


@pytest.mark.parametrize("name", builtin_recipes())
@pytest.mark.parametrize(
    "overrides", [[], ["average.decay=0.5", "train.threads=2", "binarize.weights={name='ste', t=1}"]]
)
def test_round_trip(name: str, overrides: list[str]) -> None:
    recipe = load_recipe(name, overrides)
    assert recipe.description
    assert make_recipe(tomllib.loads(recipe.to_toml()), "again") == recipe


def test_optional_keys_default_to_none() -> None:
    # None is written by omission, which only reads back where it is the default.
    for section in (Recipe(), Recipe().data, Recipe().optimizer, Recipe().train, Recipe().schedule):
        for name, field in type(section).model_fields.items():
            if type(None) in get_args(field.annotation):
                assert field.default is None, name


@pytest.mark.parametrize(
    ("binary", "allowed"),
    [
        ("cifar10-resnet20-w1a32", {"binarize"}),
        ("cifar10-vgg-small-w1a1", {"binarize"}),
        ("cifar10-resnet18-w1a1", {"binarize", "model"}),
        ("cifar10-resnet20-w1a1", {"binarize", "model", "optimizer", "schedule", "train"}),  # docs/train.md says how
    ],
)
def test_binary_recipes_differ_only_in_binarisation(binary: str, allowed: set[str]) -> None:
    a, b = load_recipe(f"{binary.rsplit('-', 1)[0]}-float").to_dict(), load_recipe(binary).to_dict()
    differing = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
    assert differing == allowed | {"name", "description"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'"),
        ("lr=1", "unknown key 'lr'; did you mean 'optimizer.lr'?"),
        ("optimiser.lr=1", "unknown key 'optimiser'; did you mean 'optimizer'?"),
        ("train.zzz=1", "unknown key 'train.zzz'"),
        ("zzz.q=1", "unknown key 'zzz'; there is no such section."),
        ("optimizer.lr=fast", "'optimizer.lr' must be a number, not the string 'fast'."),
        ("optimizer.lr=true", "'optimizer.lr' must be a number, not true."),
        ("optimizer.lr=none", "'optimizer.lr' must be a number, not none."),
        ("optimizer.lr=nan", "'optimizer.lr' must be a finite number, not nan."),
        ("optimizer.lr=0", "'optimizer.lr' must be greater than 0, not 0."),
        ("optimizer.momentum=0", "'optimizer' has nesterov = true, which needs a momentum above 0."),
        (
            "optimizer.name=muom",
            "'optimizer.name' must be 'sgd', 'adam', 'adamw', 'muon' or 'bop', not the string 'muom'.",
        ),
        ("optimizer.name=3", "'optimizer.name' must be "),
        ("optimizer.gamma=0.01", "'optimizer' has gamma, which needs name = 'bop', not 'sgd'."),
        ("optimizer.muon_filters=false", "'optimizer' has muon_filters, which needs name = 'muon', not 'sgd'."),
        ("optimizer.rest=adamw", "'optimizer' has rest, which needs name = 'muon' or 'bop', not 'sgd'."),
        ("optimizer={name='bop', latent_lr=0.1}", "'optimizer' has latent_lr, but bop has no latents"),
        ("optimizer={name='bop', gamma=1.0}", "'optimizer.gamma' must be less than 1, not 1."),
        ("optimizer={name='bop', rest='sgd', momentum=0}", "nesterov = true, which needs a momentum above 0."),
        ("optimizer={name='muon', momentum=0}", "nesterov = true, which needs a momentum above 0."),
        ("optimizer={name='muon', muon_momentum=0}", "nesterov = true, which needs a muon_momentum above 0."),
        ("optimizer={name='muon', muon_steps=0}", "'optimizer.muon_steps' must be at least 1, not 0."),
        (
            "optimizer={name='muon', muon_normalize='all'}",
            "'optimizer.muon_normalize' must be 'tensor', 'filter' or 'none', not the string 'all'.",
        ),
        ("optimizer.betas=[0.9]", "'optimizer.betas' must be a list of 2 values, not [0.9]."),
        ("optimizer={}\noptimizer=1", "'optimizer' must be a table, not the string"),
        ("train.epochs=1.5", "'train.epochs' must be a whole number, not 1.5."),
        ("train.epochs='3'", "'train.epochs' must be a whole number, not the string '3'."),
        (
            "train.precision=fp8",
            "'train.precision' must be '32-true', 'bf16-mixed' or '16-mixed', not the string 'fp8'.",
        ),
        ("train.channels_last=1", "'train.channels_last' must be true or false, not 1."),
        ("train.label_smoothing=1", "'train.label_smoothing' must be less than 1, not 1."),
        ("schedule.final=2", "'schedule.final' must be at most 1, not 2."),
        ("data.holdout=-1", "'data.holdout' must be at least 0, not -1."),
        ("binarize.weights=3", "'binarize.weights' must be the name of a binarizer or a table with a 'name', not 3."),
        (
            "binarize.standardize=3",
            "'binarize.standardize' must be true, false, the name of a transform or a table with a 'name', not 3.",
        ),
        ("binarize.standardize={tau_end=0.9}", "the name of a transform or a table with a 'name', not a table."),
        ("binarize.standardize=none", "'binarize.standardize' must be true, false, the name of"),
        ("binarize.scale=sdt", "'binarize.scale' must be 'channel', 'tensor', 'std', 'learned' or 'none', not"),
        ("binarize.center=median", "'binarize.center' must be 'mean' or 'learned', not the string 'median'."),
        ("binarize.adaptive_set=1", "'binarize.adaptive_set' must be true or false, not 1."),
        ("binarize.gradient_branch=-0.1", "'binarize.gradient_branch' must be at least 0, not -0.1."),
        ("binarize.gradient_branch=true", "'binarize.gradient_branch' must be a number, not true."),
        ("optimizer.decay_norms=yes", "'optimizer.decay_norms' must be true or false, not the string 'yes'."),
        ("data.crop_fill=black", "'data.crop_fill' must be 'reflect' or 'zero', not the string 'black'."),
        ("data.statistics=cifar", "'data.statistics' must be 'dataset' or 'imagenet', not the string 'cifar'."),
        ("data.statistics=imagenet", "'data' has statistics = 'imagenet', which are of 3 channels, and images of 1."),
        ("binarize.weights=none", "'binarize' needs 'weights', 'activations' or both"),
        ("train=3", "'train' must be a table, not 3."),
    ],
)
def test_bad_values(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(DIGITS, [override])
    text = str(caught.value)
    assert text.startswith(f"recipe '{DIGITS}': ") and message in text


def test_several_problems() -> None:
    with pytest.raises(ConfigError, match=r"'optimizer.lr' must .* \(and 2 more problems\)\.$"):
        load_recipe(DIGITS, ["optimizer.lr=-1", "train.epochs=0", "train.nope=1"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", "is not of the form section.key=value"),
        ("=3", "is not of the form"),
        ("train..epochs=3", "is not of the form"),
        ("optimizer.lr.x=1", "'optimizer.lr' is 0.2, which has no keys"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_recipe(DIGITS, [override])


def test_overrides() -> None:
    recipe = load_recipe(
        DIGITS,
        [
            "optimizer.lr=1",
            "data.flip=random",
            "model.kwargs.width=8",
            "binarize.weights.k=4",
            "binarize.scale=none",
            "average.method=swa",
            "optimizer.latent_lr=3",
            "optimizer.latent_lr=none",
        ],
    )
    assert recipe.optimizer.lr == 1.0 and isinstance(recipe.optimizer.lr, float)
    assert recipe.data.flip == "random"
    assert recipe.model.kwargs == {"width": 8}
    assert recipe.binarize is not None and recipe.binarize.weights == {"name": "ab_tanh", "k": 4}
    assert recipe.binarize.arguments()["scale"] is None
    assert recipe.average is not None and recipe.average.method == "swa"
    assert recipe.optimizer.latent_lr is None
    assert load_recipe(DIGITS, ["binarize=none"]).binarize is None


def test_keys_of_one_optimizer() -> None:
    # Resolved where they count; absent elsewhere, so that runs from before they existed still resume.
    plain = load_recipe(DIGITS).to_dict()["optimizer"]
    shared = {"name", "lr", "momentum", "nesterov", "betas", "weight_decay"}
    assert plain.keys() == shared
    muon = load_recipe(DIGITS, ["optimizer.name=muon", "optimizer.muon_steps=5"])
    own = {
        "rest": "sgd",
        "muon_momentum": 0.6,
        "muon_steps": 5,
        "muon_normalize": "tensor",
        "muon_filters": False,
    }
    assert muon.to_dict()["optimizer"] == plain | {"name": "muon"} | own
    bop = load_recipe(DIGITS, ["optimizer.name=bop", "optimizer.gamma=none", "optimizer.rest=sgd"])
    assert bop.to_dict()["optimizer"] == plain | {"name": "bop", "rest": "sgd", "gamma": 1e-4, "threshold": 1e-8}
    for recipe in (muon, bop):
        assert make_recipe(tomllib.loads(recipe.to_toml()), "again") == recipe
    assert load_recipe(DIGITS, ["optimizer.name=adamw", "optimizer.gamma=none"]).optimizer.gamma is None


def test_extends(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.toml").write_text(f'extends = "{DIGITS}"\n[binarize]\nweights = {{name = "ab_tanh", k = 2.0}}\n')
    child = tmp_path / "sub" / "child.toml"
    child.write_text('extends = "../base.toml"\n[binarize]\nweights = {name = "ste"}\n[train]\nepochs = 7\n')
    recipe = load_recipe(child)
    assert recipe.name == "child"
    assert recipe.binarize is not None and recipe.binarize.weights == {"name": "ste"}  # replaced, not mixed with k
    assert recipe.train.epochs == 7 and recipe.train.batch_size == 64  # merged
    assert load_recipe(child, ["name=other"]).name == "other"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train = [", "is not valid TOML"),
        ("extends = 3", "'extends' must be the name of a recipe, not 3"),
        ('extends = "nope"', "unknown recipe 'nope'"),
        ('extends = "./gone.toml"', "does not exist"),
        ('extends = "./file.toml"', "must not extend themselves"),
    ],
)
def test_bad_files(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "file.toml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(tmp_path / "file.toml")


def test_unknown_recipe() -> None:
    with pytest.raises(
        ConfigError, match="unknown recipe 'cifar10-resnet20-w1a33'; did you mean 'cifar10-resnet20-w1a3"
    ):
        load_recipe("cifar10-resnet20-w1a33")
    with pytest.raises(ConfigError, match=r"recipe file 'gone\.toml' does not exist"):
        load_recipe("gone.toml")


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_notes_of_several_lines(end: str) -> None:
    notes = f'one "1"{end}two \\ {end}'
    text = make_recipe({"notes": notes}, "x").to_toml()
    assert make_recipe(tomllib.loads(text), "again").notes == notes
    assert (len(text.splitlines()) > len(Recipe().to_toml().splitlines()) + 1) == (end == "\n")


def test_keys_that_are_absent_unless_given() -> None:
    keys = {"data": ("crop_fill", "statistics"), "optimizer": ("decay_norms",)}
    old = load_recipe(DIGITS).to_dict()
    assert not [key for section, names in keys.items() for key in names if key in old[section]]
    given = ["data.crop_fill=zero", "data.statistics=dataset", "optimizer.decay_norms=true"]
    recipe = load_recipe(DIGITS, given)
    assert (recipe.data.crop_fill, recipe.data.statistics) == ("zero", "dataset") and recipe.optimizer.decay_norms
    assert make_recipe(tomllib.loads(recipe.to_toml()), "again") == recipe
    assert first_difference(old, recipe.to_dict()) == ("data.crop_fill", None, "zero")


def test_pieces_of_methods() -> None:
    plain = load_recipe(DIGITS).binarize
    assert plain is not None
    new = {"center", "adaptive_set", "gradient_branch", "keep_depthwise"}
    assert not new & plain.model_dump(exclude_none=True).keys()  # so that a run from before there were any resumes
    assert plain.arguments()["adaptive_set"] is False and plain.arguments()["keep_depthwise"] is True
    given = ["standardize=recu", "standardize.tau_end=0.95", "scale=std", "scale_gradient=true", "center=mean"]
    given += ["activations=approx_sign", "adaptive_set=true", "gradient_branch=0.1", "keep_depthwise=false"]
    recipe = load_recipe(DIGITS, [f"binarize.{each}" for each in given])
    assert make_recipe(tomllib.loads(recipe.to_toml()), "again") == recipe
    assert recipe.binarize is not None
    arguments = recipe.binarize.arguments()
    assert arguments["standardize"] == {"name": "recu", "tau_end": 0.95} and arguments["keep_depthwise"] is False
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 2, 1))
    convert(model, **arguments, example_input=torch.zeros(1, 1, 8, 8))
    assert isinstance(model[1], GradientBranch) and isinstance(model[1].layer, AdaptiveSet)
    assert load_recipe(DIGITS, ["binarize.standardize=false"]).to_dict()["binarize"]["standardize"] is False


def test_first_difference() -> None:
    base = load_recipe(DIGITS).to_dict()
    assert (
        first_difference(base, load_recipe(DIGITS, ["train.log_every=3", "train.threads=2", "name=x"]).to_dict())
        is None
    )
    assert first_difference(base, load_recipe(DIGITS, ["optimizer.lr=3"]).to_dict()) == ("optimizer.lr", 0.2, 3.0)
    assert first_difference(base, load_recipe(DIGITS, ["model.kwargs.width=4"]).to_dict()) == (
        "model.kwargs",
        {},
        {"width": 4},
    )
    assert first_difference(base, load_recipe(DIGITS, ["binarize=none"]).to_dict()) == (
        "binarize.weights",
        "ab_tanh",
        None,
    )


def test_none_is_a_flip_in_overrides_too() -> None:
    for overrides in (["data.flip=none"], {"data.flip": "none"}):
        assert load_recipe("cifar10-resnet20-float", overrides).data.flip == "none"
