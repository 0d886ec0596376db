"""What a comparison says of accuracies that are known."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abste.report import Comparison, Finished, compare_runs, detectable, make_study
from abste.report.statistics import pooled
from abste.report.study import Planned

SEEDS = [0, 1, 2, 3, 4]
NOISE = [0.3, -0.2, 0.1, -0.4, 0.2]  # of a seed, the same for all arms: pairs cancel it
WOBBLE = [0.05, -0.05, 0.02, 0.0, -0.02]
COST = {"cost": {"epochs": 4, "estimated_training_flops": 1.5e13}}


def comparison(
    offsets: dict[str, float],
    seeds: list[int] = SEEDS,
    lr_scale: dict[float, float] | None = None,
    done: Callable[[Planned], bool] = lambda _: True,
    **study: Any,
) -> Comparison:
    """Arms whose accuracy is 70 plus their offset, plus one per learning rate; of all runs those that are ``done``."""
    scales = lr_scale or {1.0: 0.0}
    tables = {
        "recipe": "digits-resnet8-w1a32",
        "seeds": seeds,
        "set": {"data.holdout": 100},
        "lr_scale": list(scales),
        "settings": {"w1a32": {}},
        "arms": {
            name: {"estimator": "ab_tanh" if name == "ab" else "reste"}
            for name in offsets
            if name not in ("ste", "ab-shape_removed")
        },
        **study,
    }
    made = make_study(tables, Path("."))
    runs = []
    for planned in made.plan():
        if planned.arm in offsets and done(planned):
            i = SEEDS.index(planned.seed)
            turn = sorted(offsets).index(planned.arm)
            wobble = WOBBLE[(i + turn) % 5]
            accuracy = 70 + offsets[planned.arm] + scales[planned.lr_scale] + NOISE[i] + wobble
            summary = COST | {
                "git": {"commit": "0123456789abcdef", "modified": False},
                "environment": {"cpu": "abacus"},
            }
            runs.append(Finished(planned, "held_out", accuracy, 10.0 * (1 + turn), summary))
    return compare_runs(made, runs, len(made.plan()))


def said(result: Comparison) -> list[str]:
    return [line[2:] for line in str(result).splitlines() if line.startswith("- ")]


def test_numbers() -> None:
    (setting,) = comparison({"ste": 0.0, "ab": 1.0, "ab-shape_removed": 0.0}).settings
    arms = {arm.arm: arm for arm in setting.arms}
    assert next(arm.arm for arm in setting.arms) == "ab", "the best comes first"
    ab = arms["ab"]
    assert ab.mean == pytest.approx(71.0) and ab.difference is not None
    assert ab.difference.mean == pytest.approx(1.0, abs=0.05) and ab.difference.sd < 0.1 < ab.sd, (
        "pairs cancel the seed"
    )
    assert ab.difference.p < ab.p_holm <= 2 * ab.difference.p * (1 + 1e-9)
    assert arms["ste"].difference is None and arms["ste"].p_holm is None
    assert setting.shape["ab"].mean == pytest.approx(1.0, abs=0.05)
    assert 0 < setting.detectable < 0.5 and ab.step_ratio == pytest.approx(1 / 3)


def test_better_and_by_its_shape() -> None:
    words = said(comparison({"ste": 0.0, "ab": 1.0, "ab-shape_removed": 0.0}))
    assert words[0].startswith("ab is better than ste by 1.0")
    assert any(
        line.startswith("The shape of ab's slope matters: it is better than its mean alone by") for line in words
    )


def test_better_but_not_by_its_shape() -> None:
    words = said(comparison({"ste": 0.0, "ab": 1.0, "ab-shape_removed": 1.0}))
    assert words[0].startswith("ab is better than ste") or words[1].startswith("ab is better than ste")
    assert any("ab is not shown to differ from its shape-removed control" in line for line in words)


def test_worse_and_undecided() -> None:
    words = said(comparison({"ste": 0.0, "bad": -2.0, "same": 0.01}))
    assert words[0].startswith("bad is worse than ste by 2.0") and "(p < 0.001)" in words[0]
    assert words[1].startswith("Not shown to differ from ste: same. With these seeds a true difference of 0.")


def test_an_arm_under_way_hides_nothing_of_those_that_are_done() -> None:
    result = comparison({"ste": 0.0, "same": 0.01, "x": 3.0}, done=lambda run: run.arm != "x" or run.seed == 0)
    assert 0 < result.settings[0].detectable < 1
    assert said(result)[0] == "Runs are missing, and what they would say is not in the above: x (4)."
    assert said(result)[1].startswith("Not shown to differ from ste: same. With these seeds a true difference of 0.")


def test_one_seed_is_a_run() -> None:
    result = comparison({"ste": 0.0, "x": 3.0}, seeds=[0])
    assert said(result) == ["One seed per arm: these are single runs, not a ranking."]
    assert result.settings[0].detectable == math.inf and "(one pair)" in str(result)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert '"detectable": null' in text and '"sd": null' in text


def test_each_arm_at_its_best_learning_rate() -> None:
    result = comparison({"ste": 0.0, "x": 0.0}, lr_scale={0.5: -1.0, 1.0: 0.0, 2.0: 0.5})
    assert {arm.arm: arm.lr_scale for arm in result.settings[0].arms} == {"ste": 2.0, "x": 2.0}
    assert [(arm.epochs, arm.training_flops) for arm in result.settings[0].arms] == [(4, 1.5e13)] * 2
    assert result.settings[0].arms[0].by_lr_scale == pytest.approx({0.5: 69.0, 1.0: 70.0, 2.0: 70.5}, abs=0.05)
    assert "| x 2 |" in str(result)


def test_arms_with_fewer_seeds_are_compared_at_theirs() -> None:
    made = comparison({"ste": 0.0, "x": 1.0})
    runs_of = {arm.arm: arm.accuracies for arm in made.settings[0].arms}
    assert set(runs_of["x"]) == set(SEEDS)
    half = compare_runs(
        made.study,
        [
            Finished(planned, "held_out", 70.0 + planned.seed, 1.0, COST)
            for planned in made.study.plan()
            if planned.arm == "ste" or planned.seed < 2
        ],
        10,
    )
    x = next(arm for arm in half.settings[0].arms if arm.arm == "x")
    assert x.difference is not None and x.difference.n == 2 and x.difference.mean == 0.0
    assert "Unfinished: 7 of 10 runs are done." in str(half)


def test_a_learning_rate_is_chosen_over_the_seeds_that_all_have() -> None:
    rates = {0.5: -5.0, 1.0: 0.0, 2.0: -5.0}
    order = comparison({"ste": 0.0, "x": 0.0}, lr_scale=rates).study.plan()
    for n in range(1, len(order) + 1):  # in the order of the plan, as a study under way has them
        result = comparison({"ste": 0.0, "x": 0.0}, lr_scale=rates, done=lambda run, n=n: run in order[:n])
        assert not any("better" in line or "worse" in line for line in said(result)), said(result)
    lost = comparison({"ste": 0.0, "x": 0.0}, lr_scale=rates,
                      done=lambda run: (run.arm, run.lr_scale, run.seed) != ("ste", 1.0, 1))  # fmt: skip
    assert {arm.arm: arm.lr_scale for arm in lost.settings[0].arms} == {"ste": 1.0, "x": 1.0}
    assert said(lost)[0] == "Runs are missing, and what they would say is not in the above: ste (1)."


def test_an_arm_whose_rates_have_no_common_seed_is_not_compared() -> None:
    result = comparison({"ste": 0.0, "x": 9.0}, lr_scale={1.0: 0.0, 2.0: 1.0},
                        done=lambda run: run.arm == "ste" or run.lr_scale == 1.0)  # fmt: skip
    x = next(arm for arm in result.settings[0].arms if arm.arm == "x")
    assert x.difference is None and not x.chosen and set(x.by_lr_scale) == {1.0}
    assert said(result)[0].startswith("Not compared yet, since their learning rates have no seed in common") and (
        said(result)[-1] == "No arm has two seeds in common with ste: nothing is shown."
    )


def test_what_is_detectable_depends_on_the_seeds_of_the_arm() -> None:
    result = comparison({"ste": 0.0, "few": 0.0, "same": 0.01}, seeds=[0, 1, 2],
                        done=lambda run: run.arm != "few" or run.seed < 2)  # fmt: skip
    (setting,) = result.settings
    arms = {arm.arm: arm for arm in setting.arms if arm.difference is not None}
    assert {name: arm.difference and arm.difference.n for name, arm in arms.items()} == {"few": 2, "same": 3}
    spread = pooled([(arm.difference.sd, arm.difference.n) for arm in arms.values() if arm.difference])
    assert arms["few"].detectable == detectable(spread, 2, 2) and arms["same"].detectable == detectable(spread, 3, 2)
    assert setting.detectable == arms["same"].detectable
    figures = (f"{arm.detectable:.2f} ({arm.arm})" for arm in setting.arms if arm.difference)
    assert (
        f"With these seeds true differences of {' and '.join(figures)} points would have been found" in said(result)[1]
    )


def test_differences_without_a_spread_show_nothing() -> None:
    study = comparison({"ste": 0.0, "x": 1.0}, seeds=[0, 1]).study
    images = [Finished(planned, "held_out", 100 * (250 + (planned.arm == "x")) / 360, 1.0, COST)
              for planned in study.plan()]  # fmt: skip
    result = compare_runs(study, images, 4)
    assert said(result) == ["Not shown to differ from ste: x."] and "+0.28 (no spread)" in str(result)
    assert "Infinity" not in json.dumps(result.to_dict(), allow_nan=False)


def test_seeds_that_are_not_there_are_named() -> None:
    result = comparison({"ste": 0.0, "x": 3.0}, done=lambda run: run.arm != "x" or run.seed < 2)
    words = said(result)
    assert words[0] == "Runs are missing, and what they would say is not in the above: x (3)."
    assert words[1].startswith("x is better than ste by 2.98 (")
    none = comparison({"ste": 0.0, "x": 3.0}, done=lambda run: run.arm == "x")
    assert said(none)[-1] == "No arm has two seeds in common with ste: nothing is shown."


def test_nothing_done_in_a_setting() -> None:
    study = comparison({"ste": 0.0, "x": 1.0}).study
    assert compare_runs(study, [], 10).settings == []
