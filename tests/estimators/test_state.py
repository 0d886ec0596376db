"""Annealing state and the schedule that moves it."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from abste.errors import ConfigError
from abste.estimators import EDE, STE, ABTanh, Annealed, Binarizer, EstimatorSchedule, ReSTE
from abste.estimators import schedule as schedule_module

Make = Callable[..., Binarizer]
STEP, TOTAL = 37, 997  # neither their ratio nor the numbers are exact in half precision


def progress(module: nn.Module) -> list[float]:
    return [float(part.progress()) for part in module.modules() if isinstance(part, Annealed)]


def slopes(module: nn.Module) -> list[Tensor]:
    x = torch.linspace(-4, 4, 101)
    return [part.backward(torch.ones_like(x), x) for part in module.modules() if isinstance(part, Binarizer)]


def assert_same(a: nn.Module, b: nn.Module) -> None:
    assert progress(a) == progress(b)
    learned = any(isinstance(part, Binarizer) and list(part.parameters()) for part in b.modules())
    tolerance = 5e-3 if learned else 0.0  # half precision rounds a parameter as any other, and what is annealed not
    for mine, other in zip(slopes(a), slopes(b), strict=True):
        torch.testing.assert_close(mine, other, rtol=tolerance, atol=0)


@pytest.fixture
def model(name: str, make: Make) -> nn.Module:
    """A layer and an estimator that is STEP of TOTAL steps into training."""
    model = nn.Sequential(nn.Linear(3, 3), make(name))
    EstimatorSchedule(model, TOTAL).load_state_dict({"last_step": STEP, "total_steps": TOTAL})
    assert set(progress(model)) <= {float(np.float32(STEP) / np.float32(TOTAL))}
    return model


def test_saved_and_loaded(model: nn.Module, name: str, make: Make, tmp_path: Path) -> None:
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = nn.Sequential(nn.Linear(3, 3), make(name))
    fresh.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    assert_same(fresh, model)


@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.half(),
        lambda model: model.bfloat16(),
        lambda model: model.to(torch.float64),
        lambda model: model.half().float(),
        lambda model: model.to(torch.bfloat16).to(memory_format=torch.channels_last),
        copy.deepcopy,
    ],
    ids=["half", "bfloat16", "float64", "half and back", "channels_last", "deepcopy"],
)
def test_converted(model: nn.Module, convert: Callable[[nn.Module], nn.Module]) -> None:
    before = copy.deepcopy(model)
    assert_same(convert(model), before)


AVERAGES: dict[str, dict[str, Any]] = {
    "default": {},
    "swa": {"multi_avg_fn": get_swa_multi_avg_fn()},
    "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "ema, one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("average", AVERAGES)
def test_averaged(name: str, make: Make, average: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make(name))
    averaged = AveragedModel(model, **AVERAGES[average])
    schedule = EstimatorSchedule(model, TOTAL)
    for _ in range(5):
        schedule.step()
        averaged.update_parameters(model)
        assert_same(averaged, model)


@pytest.mark.parametrize("average", ["default", "ema", "ema, one by one"])
def test_averaged_together_with_its_buffers(name: str, make: Make, average: str) -> None:
    """An average of step counts is not the step count, but sign(x) does not depend on it and a schedule sets it."""
    model = nn.Sequential(nn.Linear(3, 3), make(name))
    averaged = AveragedModel(model, use_buffers=True, **AVERAGES[average])
    schedule = EstimatorSchedule(model, TOTAL)
    for _ in range(5):
        schedule.step()
        averaged.update_parameters(model)
    assert all(0 <= value <= 5 / TOTAL for value in progress(averaged))
    x = torch.randn(9)
    averaged.eval()
    model.eval()
    for part, original in zip(averaged.modules(), [None, *model.modules()], strict=True):
        if isinstance(part, Binarizer) and isinstance(original, Binarizer):
            assert torch.equal(part(x), original(x))
    EstimatorSchedule(averaged, 1).load_state_dict(schedule.state_dict())
    assert_same(averaged, model)


def test_progress_follows_the_steps(name: str, make: Make) -> None:
    binarizer = make(name)
    schedule = EstimatorSchedule(binarizer, 4)
    seen = []
    for _ in range(6):
        seen.append(schedule.progress)
        assert set(progress(binarizer)) <= {schedule.progress}
        schedule.step()
    assert seen == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0], "steps beyond the end count as the last"


def test_reaches_every_estimator_of_a_model() -> None:
    model = nn.ModuleDict({"a": ABTanh(), "b": nn.Sequential(ReSTE(), nn.Sequential(EDE(), STE()))})
    schedule = EstimatorSchedule(model, 2)
    schedule.step()
    assert progress(model) == [0.5, 0.5, 0.5]


def test_reaches_estimators_that_came_after_it() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    schedule = EstimatorSchedule(model, 4)
    model[0] = ABTanh()
    schedule.step()
    assert progress(model) == [0.25]
    model[1] = ReSTE()
    schedule.load_state_dict(schedule.state_dict())
    assert progress(model) == [0.25, 0.25]
    schedule.step()
    assert progress(model) == [0.5, 0.5]


def test_a_new_schedule_starts_anew() -> None:
    estimator = ReSTE()
    EstimatorSchedule(estimator, 2).step()
    EstimatorSchedule(estimator, 5)
    assert progress(estimator) == [0.0]


def test_state_round_trip(tmp_path: Path) -> None:
    estimator, other = ReSTE(), ReSTE()
    schedule = EstimatorSchedule(estimator, TOTAL)
    for _ in range(STEP):
        schedule.step()
    torch.save(schedule.state_dict(), tmp_path / "schedule.pt")
    restored = EstimatorSchedule(other, 5)
    restored.load_state_dict(torch.load(tmp_path / "schedule.pt", weights_only=True))
    assert restored.state_dict() == schedule.state_dict() == {"last_step": STEP, "total_steps": TOTAL}
    assert restored.progress == schedule.progress
    assert_same(other, estimator)
    schedule.step()
    restored.step()
    assert_same(other, estimator)


@pytest.mark.parametrize("total", [0, -3, 2.0, True, "10", None, float("nan")])
def test_total_steps(total: Any) -> None:
    with pytest.raises(
        ConfigError, match=r"^EstimatorSchedule: total_steps must be an integer of at least 1, got .*\.$"
    ):
        EstimatorSchedule(ABTanh(), total)


def test_total_steps_of_numpy() -> None:
    state = EstimatorSchedule(ABTanh(), np.int64(7)).state_dict()  # type: ignore[arg-type]
    assert type(state["total_steps"]) is int


@pytest.mark.parametrize(
    "state", [{}, {"last_step": 3}, {"last_step": -1, "total_steps": 3}, {"last_step": 1, "total_steps": 0}]
)
def test_foreign_state(state: dict[str, int]) -> None:
    estimator = ReSTE()
    schedule = EstimatorSchedule(estimator, 10)
    with pytest.raises(ConfigError, match=r"^EstimatorSchedule: \w+ in the state must be an integer"):
        schedule.load_state_dict(state)
    assert schedule.state_dict() == {"last_step": 0, "total_steps": 10}


# The warning of a schedule that never steps


def training(estimator: Binarizer | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
    model = nn.Sequential(nn.Linear(2, 2), ABTanh() if estimator is None else estimator)
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def steps(
    model: nn.Module, optimizer: torch.optim.Optimizer, count: int, schedule: EstimatorSchedule | None = None
) -> int:
    """How many warnings ``count`` optimizer steps gave."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            model(torch.randn(1, 2)).sum().backward()
            optimizer.step()
            if schedule is not None:
                schedule.step()
    assert all("EstimatorSchedule.step() was never called" in str(warning.message) for warning in caught)
    assert all(warning.filename == __file__ for warning in caught)
    return len(caught)


def test_never_stepped_warns_once() -> None:
    model, optimizer = training()
    schedule = EstimatorSchedule(model, 100)
    assert steps(model, optimizer, 9) == 0
    assert steps(model, optimizer, 30) == 1
    assert schedule.last_step == 0


def test_never_stepped_warns_of_estimators_that_came_after_it() -> None:
    model, optimizer = training(STE())
    schedule = EstimatorSchedule(model, 100)
    model[1] = ABTanh()
    assert steps(model, optimizer, 30) == 1
    assert schedule.last_step == 0


def test_resumed_and_never_stepped_warns() -> None:
    model, optimizer = training()
    schedule = EstimatorSchedule(model, 100)
    schedule.load_state_dict({"last_step": 50, "total_steps": 100})
    assert steps(model, optimizer, 12) == 1


def test_no_warning_where_it_steps() -> None:
    model, optimizer = training()
    assert steps(model, optimizer, 25, EstimatorSchedule(model, 100)) == 0


def test_no_warning_where_nothing_is_annealed() -> None:
    model, optimizer = training(STE())
    schedule = EstimatorSchedule(model, 100)
    assert steps(model, optimizer, 25) == 0
    assert schedule.progress == 0.0


def test_no_warning_for_another_model() -> None:
    model, _ = training()
    other, optimizer = training()
    schedule = EstimatorSchedule(model, 100)
    assert steps(other, optimizer, 25) == 0
    assert schedule.last_step == 0


def test_a_schedule_that_is_gone_is_forgotten() -> None:
    model, optimizer = training()
    schedule = EstimatorSchedule(model, 100)
    gone = weakref.ref(schedule)
    assert schedule in schedule_module._WAITING
    del schedule
    gc.collect()
    assert gone() is None
    assert len(schedule_module._WAITING) == 0
    assert steps(model, optimizer, 25) == 0


def test_two_schedules_at_once() -> None:
    model, optimizer = training()
    other, other_optimizer = training()
    schedule, other_schedule = EstimatorSchedule(model, 100), EstimatorSchedule(other, 100)
    assert steps(model, optimizer, 3, schedule) == 0
    assert steps(other, other_optimizer, 3, other_schedule) == 0
    third = EstimatorSchedule(model, 100)
    assert steps(model, optimizer, 15) == 1
    assert third.last_step == 0
