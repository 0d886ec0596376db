"""Studies: which arms are compared, in which settings, over which seeds; typed, in TOML.

A study file names a recipe and what its runs differ in::

    recipe = "cifar10-resnet20-w1a32"    # built in, or a path relative to the study
    seeds = [0, 1, 2]
    set = { "data.holdout" = 10000 }     # keys of the recipe, replaced in every run

    [settings.w1a32]                     # as many as wanted
    [settings.w1a1]
    set = { "model.name" = "resnet20_bireal", "binarize.activations" = "ste" }
    vary = ["activations"]               # what an arm's estimator replaces; by default all that the recipe binarises

    [arms.ab_tanh]
    estimator = "ab_tanh"
    [arms.slower]
    estimator = "ab_tanh"
    set = { "optimizer.latent_lr" = 0.03 }
    settings = ["w1a32"]                 # by default all

Two controls come by themselves: STE, where ``control`` names no other arm, and for each arm with an AB-STE estimator of
its own (one that it names, or whose arguments it sets) the same arm with the shape of its slope removed. This module
needs pydantic and tomli-w, not torch.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from abste.errors import ConfigError, nearest
from abste.train.recipe import Recipe, Section, Spec, checked, load_recipe

SHAPE_REMOVED = "-shape_removed"
"""What the name of an arm's shape-removed control ends with."""

Slot = Literal["weights", "activations"]
SLOTS: tuple[Slot, ...] = get_args(Slot)
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.+-]*$")]


class Setting(Section):
    """One way to binarise, such as W1A32, in which all arms are compared."""

    set: dict[str, Any] = Field(default_factory=dict)
    """Keys of the recipe and their values."""
    vary: Annotated[list[Slot], Field(min_length=1)] | None = None
    """What an arm's ``estimator`` replaces; by default all that the recipe binarises."""


class Arm(Section):
    """One of the alternatives. ``"none"`` as an estimator stands for full precision."""

    estimator: Spec = None
    """Of all that the setting varies."""
    weights: Spec = None
    activations: Spec = None
    set: dict[str, Any] = Field(default_factory=dict)
    settings: list[str] | None = None
    """Where it takes part; by default everywhere."""
    shape_removed: bool = False
    """Its AB-STE estimators have the shape of their slopes removed, as in the controls that come by themselves."""

    def names(self, slot: Slot, vary: Sequence[Slot]) -> bool:
        """Whether it says itself what binarises the slot, or how, and does not leave that to the recipe."""
        key = f"binarize.{slot}"
        said = getattr(self, slot) is not None or any(name == key or name.startswith(f"{key}.") for name in self.set)
        return said or (self.estimator is not None and slot in vary)


class Study(Section):
    """A whole comparison. Paths in it are relative to ``folder``."""

    name: str = "study"
    description: str = ""
    recipe: str
    seeds: Annotated[list[Annotated[int, Field(ge=0, lt=2**32)]], Field(min_length=1)]
    set: dict[str, Any] = Field(default_factory=dict)
    lr_scale: Annotated[list[Annotated[float, Field(gt=0)]], Field(min_length=1)] = [1.0]
    """Factors on the learning rates. With several each arm runs with each, and is compared at its best, which is found
    on held-out training images alone."""
    control: str = "ste"
    """The arm that the others are compared with; where it is ste, that arm is added if there is none."""
    controls: list[str] | None = None
    """AB-STE arms that get a shape-removed control; by default all."""
    settings: Annotated[dict[Name, Setting], Field(min_length=1)]
    arms: Annotated[dict[Name, Arm], Field(min_length=1)]
    folder: str = "."

    def recipe_of(self, setting: str, arm: str, lr_scale: float = 1.0, seed: int | None = None) -> Recipe:
        """The resolved recipe of one run.

        Raises:
            ConfigError: a key or value that recipes do not have.
        """
        alternative = self.arms[arm]
        where = f"study '{self.name}', {setting}, {arm}"
        common, binarized, vary = self._setting(setting, where)
        if alternative.estimator is not None and not vary:
            raise ConfigError(
                f"{where}: 'estimator' replaces nothing, since the recipe binarises nothing; "
                'say what it is of, as in vary = ["weights"] in the setting.'
            )
        slots: dict[Slot, Any] = {slot: binarized.get(slot, "none") for slot in SLOTS}
        slots |= dict.fromkeys(vary, alternative.estimator) if alternative.estimator is not None else {}
        slots |= {slot: spec for slot in slots if (spec := getattr(alternative, slot)) is not None}
        own: dict[str, Any] = {f"binarize.{slot}": spec for slot, spec in slots.items()}
        if all(spec == "none" for spec in slots.values()):
            own = {"binarize": "none"}
        overrides = {**common, **own, **alternative.set, "train.seed": self.seeds[0] if seed is None else seed}
        recipe = _load(self, overrides, where)
        if alternative.shape_removed:
            blended = _blended_slots(recipe, alternative, vary)
            overrides = {key: value for key, value in overrides.items() if key.rpartition(".")[0] not in blended}
            overrides |= {key: {"name": "shape_removed", "of": spec} for key, spec in blended.items()}
            recipe = _load(self, overrides, where)
        if lr_scale != 1:
            rates = {key: getattr(recipe.optimizer, key) for key in ("lr", "latent_lr")}
            overrides |= {f"optimizer.{key}": rate * lr_scale for key, rate in rates.items() if rate is not None}
            recipe = _load(self, overrides, where)
        return recipe.model_copy(update={"name": f"{self.name}/{setting}/{arm}", "description": self.description})

    def _setting(self, setting: str, where: str) -> tuple[dict[str, Any], dict[str, Any], list[Slot]]:
        """The keys that a setting replaces, what the recipe then binarises, and what of it arms vary."""
        chosen = self.settings[setting]
        common = {**self.set, **chosen.set}
        binarized = _load(self, common, where).to_dict().get("binarize", {})
        return common, binarized, chosen.vary or [slot for slot in SLOTS if slot in binarized]

    def blended(self, arm: str) -> bool:
        """Whether an arm has an AB-STE estimator of its own, in one of its settings."""
        for setting in self.settings:
            if arm in self.arms_in(setting):
                recipe = self.recipe_of(setting, arm)
                if _blended_slots(recipe, self.arms[arm], self._setting(setting, str(recipe.name))[2]):
                    return True
        return False

    def arms_in(self, setting: str) -> list[str]:
        """The arms that take part in a setting, the control first."""
        names = [name for name, arm in self.arms.items() if arm.settings is None or setting in arm.settings]
        return sorted(names, key=lambda name: name != self.control)

    def plan(self) -> list[Planned]:
        """Every run. Seeds come first, so that an unfinished study has compared all arms on some."""
        return list(self._runs())

    def _runs(self) -> Iterator[Planned]:
        for seed in self.seeds:
            for setting in self.settings:
                for arm in self.arms_in(setting):
                    for scale in self.lr_scale:
                        parts = [setting, arm, *([f"lr-x{scale:g}"] if len(self.lr_scale) > 1 else []), f"seed-{seed}"]
                        yield Planned(
                            setting, arm, scale, seed, self.recipe_of(setting, arm, scale, seed), Path(*parts)
                        )


@dataclass(frozen=True)
class Planned:
    """One run of a study; ``path`` is relative to the study's directory."""

    setting: str
    arm: str
    lr_scale: float
    seed: int
    recipe: Recipe
    path: Path

    def __str__(self) -> str:
        return str(self.path)


def _load(study: Study, overrides: Mapping[str, Any], where: str) -> Recipe:
    try:
        return load_recipe(study.recipe, overrides, folder=Path(study.folder))
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None


def load_study(path: str | Path) -> Study:
    """Read a study, add its controls and check every recipe in it.

    Raises:
        ConfigError: no such file, or it is no TOML; an unknown key, arm, setting, estimator or recipe; a wrong type;
            several ``lr_scale`` without held-out images to choose by; arms of a setting judged on different images.
    """
    path = Path(path)
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"study file '{path}' does not exist.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"study file '{path}' cannot be read: {error}.") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"study '{path.stem}' is not valid TOML: {error}.") from None
    return make_study({"name": path.stem, **tables}, path.parent)


def make_study(tables: Mapping[str, Any], folder: Path) -> Study:
    """A checked study from plain tables: see :func:`load_study`."""
    what = f"study '{tables.get('name', 'study')}'"
    tables = {"folder": str(folder), **tables}
    for key, kind in (("settings", Setting), ("arms", Arm)):  # so that a typo's nearest key is looked for where it is
        inner = tables.get(key)
        for name, table in inner.items() if isinstance(inner, dict) else ():
            if isinstance(table, dict):
                checked(kind, table, f"{what}, {key}.{name}")
    study = _with_controls(checked(Study, tables, what), what)
    scales = {f"{scale:g}" for scale in study.lr_scale}  # as run directories are named
    if len(set(study.seeds)) < len(study.seeds) or len(scales) < len(study.lr_scale):
        raise ConfigError(f"{what}: 'seeds' and 'lr_scale' must not name anything twice.")
    for name, arm in study.arms.items():
        for setting in arm.settings or ():
            if setting not in study.settings:
                raise ConfigError(f"{what}: arm '{name}' has an unknown setting {setting!r}; "
                                  f"{nearest(setting, study.settings)}")  # fmt: skip
    for setting in study.settings:
        names = study.arms_in(setting)
        if study.control not in names or len(names) < 2:
            raise ConfigError(f"{what}: setting '{setting}' needs the control '{study.control}' and one more arm.")
        control = study.recipe_of(setting, study.control)
        for name in names:
            recipe = study.recipe_of(setting, name)
            for key in ("name", "holdout"):
                mine, theirs = getattr(recipe.data, key), getattr(control.data, key)
                if mine != theirs:
                    raise ConfigError(
                        f"{what}, {setting}: data.{key} is {mine!r} in arm '{name}' and {theirs!r} in "
                        f"'{study.control}', so that their accuracies would not be of the same images."
                    )
            if len(study.lr_scale) > 1 and not recipe.data.holdout:
                raise ConfigError(
                    f"{what}: 'lr_scale' chooses by accuracy, which must not be that of the test set: "
                    'hold training images out, as in set = { "data.holdout" = 10000 }.'
                )
    return study


def _with_controls(study: Study, what: str) -> Study:
    arms = dict(study.arms)
    if study.control not in arms:
        if study.control != "ste":
            raise ConfigError(f"{what}: unknown control {study.control!r}; {nearest(study.control, arms)}")
        arms = {"ste": Arm(estimator="ste"), **arms}
    study = study.model_copy(update={"arms": arms})
    blended = [name for name, arm in arms.items() if not arm.shape_removed and study.blended(name)]
    wanted = blended if study.controls is None else study.controls
    for name in wanted:
        if name not in blended:
            raise ConfigError(
                f"{what}: 'controls' has {name!r}, which is no arm with an AB-STE estimator of its own"
                + (f"; {nearest(name, blended)}" if blended else ".")
            )
        if name + SHAPE_REMOVED not in arms:
            arms[name + SHAPE_REMOVED] = arms[name].model_copy(update={"shape_removed": True})
    return study.model_copy(update={"arms": arms})


def _blended_slots(recipe: Recipe, arm: Arm, vary: Sequence[Slot]) -> dict[str, Any]:
    """By the recipe's key, the AB-STE estimators that an arm has of its own."""
    binarized = recipe.to_dict().get("binarize", {})
    return {
        f"binarize.{slot}": binarized[slot] for slot in SLOTS if arm.names(slot, vary) and _blended(binarized.get(slot))
    }


def _blended(spec: Any) -> bool:
    name = spec.get("name") if isinstance(spec, dict) else spec
    return isinstance(name, str) and name.startswith("ab_")
