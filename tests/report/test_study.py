from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from abste.errors import ConfigError
from abste.report import load_study, make_study
from abste.train.recipe import first_difference

SMALL: dict[str, Any] = {
    "recipe": "digits-resnet8-w1a32",
    "seeds": [0, 7],
    "set": {"data.holdout": 100},
    "settings": {
        "w1a32": {},
        "w1a1": {
            "set": {"model.name": "resnet8_bireal", "binarize.activations": "ste", "binarize.weights": "ste"},
            "vary": ["activations"],
        },
    },
    "arms": {"ab_tanh": {"estimator": "ab_tanh"}},
}


def small(**changes: Any) -> Any:
    return make_study({**SMALL, **changes}, Path("."))


def test_controls_come_by_themselves() -> None:
    study = small()
    assert study.arms_in("w1a1") == ["ste", "ab_tanh", "ab_tanh-shape_removed"]
    for setting, slot in (("w1a32", "weights"), ("w1a1", "activations")):
        specs = {arm: getattr(study.recipe_of(setting, arm).binarize, slot) for arm in study.arms_in(setting)}
        assert specs == {
            "ste": "ste",
            "ab_tanh": "ab_tanh",
            "ab_tanh-shape_removed": {"name": "shape_removed", "of": "ab_tanh"},
        }
    table = {"name": "ab_arctan", "k": 4.0}
    study = small(arms={"mine": {"weights": table, "activations": "reste"}, "ste": {"weights": "identity_ste"}})
    removed = study.recipe_of("w1a1", "mine-shape_removed").binarize
    assert (removed.weights, removed.activations) == ({"name": "shape_removed", "of": table}, "reste")
    assert study.arms["ste"].weights == "identity_ste", "one that is given stays"
    two = {"a": {"estimator": "ab_tanh"}, "b": {"estimator": "ab_arctan"}}
    assert list(small(arms=two, controls=["b"]).arms) == ["ste", "a", "b", "b-shape_removed"]


def test_controls_of_arms_that_set_their_estimator_by_key() -> None:
    slower = {"set": {"optimizer.lr": 0.1}}  # its estimator is the recipe's
    by_key = {"set": {"binarize.weights": "ab_arctan"}, "settings": ["w1a32"]}
    sharper = {"estimator": "ab_tanh", "set": {"binarize.weights.k": 4.0}, "settings": ["w1a32"]}
    sharp = {"set": {"binarize.weights.k": 4.0}, "settings": ["w1a32"]}  # of the recipe's AB-Tanh
    study = small(arms={"slower": slower, "by_key": by_key, "sharper": sharper, "sharp": sharp})
    assert "slower-shape_removed" not in study.arms
    specs = {arm: study.recipe_of("w1a32", arm).binarize.weights for arm in study.arms_in("w1a32")}
    tanh = {"name": "ab_tanh", "k": 4.0}
    assert specs["sharper"] == specs["sharp"] == tanh
    assert specs["sharper-shape_removed"] == specs["sharp-shape_removed"] == {"name": "shape_removed", "of": tanh}
    assert specs["by_key-shape_removed"] == {"name": "shape_removed", "of": "ab_arctan"}


def test_a_shape_removed_arm_of_ones_own() -> None:
    study = small(arms={"mean": {"estimator": "ab_tanh", "shape_removed": True}})
    assert list(study.arms) == ["ste", "mean"]
    assert study.recipe_of("w1a32", "mean").binarize.weights == {"name": "shape_removed", "of": "ab_tanh"}


def test_arms_differ_in_what_they_vary_alone() -> None:
    study = small()
    for setting, key in (("w1a32", "binarize.weights"), ("w1a1", "binarize.activations")):
        ste, ab = (study.recipe_of(setting, arm).to_dict() for arm in ("ste", "ab_tanh"))
        assert first_difference(ste, ab) == (key, "ste", "ab_tanh")
        ab["binarize"][key.split(".")[1]] = "ste"
        assert first_difference(ste, ab) is None


def test_plan_takes_seeds_one_by_one() -> None:
    plan = small(lr_scale=[0.5, 1.0], controls=[]).plan()
    assert [str(planned) for planned in plan[:5]] == [
        "w1a32/ste/lr-x0.5/seed-0",
        "w1a32/ste/lr-x1/seed-0",
        "w1a32/ab_tanh/lr-x0.5/seed-0",
        "w1a32/ab_tanh/lr-x1/seed-0",
        "w1a1/ste/lr-x0.5/seed-0",
    ]
    assert len(plan) == 16 and {planned.seed for planned in plan[8:]} == {7}
    assert all(planned.recipe.train.seed == planned.seed for planned in plan)


def test_lr_scale_counts_for_every_rate() -> None:
    arms = {"raw": {"estimator": "ste", "set": {"binarize.standardize": False, "optimizer.latent_lr": 3.0}}}
    study = small(arms=arms, lr_scale=[0.5, 1.0])
    rates = study.recipe_of("w1a32", "raw", 0.5).optimizer
    assert (rates.lr, rates.latent_lr) == (0.1, 1.5)
    assert study.recipe_of("w1a32", "ste", 0.5).optimizer.latent_lr is None


def test_float_arm() -> None:
    study = small(arms={"float": {"weights": "none", "activations": "none"}, "a32": {"activations": "none"}})
    assert study.recipe_of("w1a1", "float").binarize is None
    assert study.recipe_of("w1a1", "a32").binarize.activations is None


BAD = {
    "no such recipe": ({"recipe": "digits-resnet8-w1a33"}, "unknown recipe 'digits-resnet8-w1a33'; did you mean"),
    "key of the study": ({"seed": [1]}, "unknown key 'seed'; did you mean 'seeds' or"),
    "key of an arm": (
        {"arms": {"x": {"estimater": "ste"}}},
        "study 'study', arms.x: unknown key 'estimater'; did you mean 'estimator'?",
    ),
    "key of a setting": ({"settings": {"x": {"varies": 1}}}, "settings.x: unknown key 'varies'; did you mean 'vary'?"),
    "key of the recipe": (
        {"set": {"train.epoch": 3}},
        "study 'study', w1a32, ste: recipe 'digits-resnet8-w1a32': unknown key 'train.epoch'; did you mean",
    ),
    "value of the recipe": ({"set": {"train.epochs": 0}}, "'train.epochs' must be greater than 0, not 0."),
    "no seeds": ({"seeds": []}, "'seeds' must be a list that is not empty, not []."),
    "seed twice": ({"seeds": [1, 1]}, "must not name anything twice."),
    "missing arms": ({"arms": {}}, "'arms'"),
    "setting of an arm": ({"arms": {"x": {"estimator": "reste", "settings": ["w1a2"]}}}, "unknown setting 'w1a2'; did"),
    "control": ({"control": "stee"}, "unknown control 'stee'; known: ab_tanh."),
    "controls": (
        {"controls": ["ab_tan"]},
        "'controls' has 'ab_tan', which is no arm with an AB-STE estimator of its own; did",
    ),
    "control that is missing somewhere": (
        {"arms": {"ste": {"estimator": "ste", "settings": ["w1a1"]}, "x": {"estimator": "reste"}}},
        "setting 'w1a32' needs the control 'ste' and one more arm.",
    ),
    "tuning on the test set": ({"set": {}, "lr_scale": [1.0, 2.0]}, "hold training images out"),
    "other images": (
        {"arms": {"x": {"estimator": "reste", "set": {"data.holdout": 0}}}},
        "data.holdout is 0 in arm 'x' and 100 in 'ste', so that",
    ),
    "a name that is a path": ({"arms": {"../x": {"estimator": "ste"}}}, "'arms.../x"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_studies(case: str) -> None:
    changes, message = BAD[case]
    with pytest.raises(ConfigError) as caught:
        small(**changes)
    text = str(caught.value)
    assert text.startswith("study 'study'") and message in text, text
    assert "\n" not in text and text.endswith((".", "?"))


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study file '.*gone.toml' does not exist\.$"):
        load_study(tmp_path / "gone.toml")
    broken = tmp_path / "broken.toml"
    broken.write_text("seeds = [")
    with pytest.raises(ConfigError, match="study 'broken' is not valid TOML"):
        load_study(broken)
    broken.write_text(
        'recipe = "digits-resnet8-w1a32"\nseds = [0]\nsettings.w1a32 = {}\narms.reste.estimator = "reste"\n'
    )
    with pytest.raises(
        ConfigError, match=r"study 'broken': unknown key 'seds'; did you mean 'seeds'.*\(and 1 more problem"
    ):
        load_study(broken)
    (tmp_path / "base.toml").write_text('extends = "digits-resnet8-w1a32"\ntrain.epochs = 2\n')
    mine = tmp_path / "mine.toml"
    mine.write_text('recipe = "base.toml"\nseeds = [0]\nsettings.w1a32 = {}\narms.reste.estimator = "reste"\n')
    study = load_study(mine)
    assert study.name == "mine" and study.recipe_of("w1a32", "reste").train.epochs == 2
    assert re.fullmatch("mine/w1a32/reste", study.recipe_of("w1a32", "reste").name)


def test_the_example_of_the_docs(repo_root: Path, tmp_path: Path) -> None:
    text = (repo_root / "docs" / "compare.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, flags=re.DOTALL)
    (tmp_path / "example.toml").write_text(example)
    study = load_study(tmp_path / "example.toml")
    assert study.arms_in("w1a32") == [
        "ste",
        "ab_tanh",
        "sharper",
        "slower",
        "ab_tanh-shape_removed",
        "sharper-shape_removed",
        "slower-shape_removed",
    ]
    assert len(study.plan()) == 5 * (7 + 5)


def test_every_study_of_the_project_loads(repo_root: Path) -> None:
    studies = [path for path in (repo_root / "studies").rglob("*.toml") if path.stem != "base"]
    assert studies
    for path in studies:
        assert load_study(path).plan()


def test_an_estimator_that_would_replace_nothing_is_refused() -> None:
    floats = {"set": {"data.holdout": 100, "binarize": "none"}, "settings": {"w1a32": {}}}
    with pytest.raises(
        ConfigError, match=r"w1a32, ste: 'estimator' replaces nothing, since the recipe binarises nothing"
    ):
        small(**floats)
    study = small(**{**floats, "settings": {"w1a32": {"vary": ["weights"]}}})
    assert study.recipe_of("w1a32", "ab_tanh").to_dict()["binarize"]["weights"] == "ab_tanh"


def test_learning_rates_whose_directories_would_be_one_are_refused() -> None:
    with pytest.raises(ConfigError, match="must not name anything twice"):
        small(lr_scale=[1.0, 1.0000001])
