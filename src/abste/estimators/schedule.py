"""The schedule that tells annealed estimators how far training is."""

from __future__ import annotations

import warnings
import weakref
from collections import Counter
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from abste.errors import ConfigError
from abste.estimators.base import Annealed
from abste.estimators.blends import Equilibrium

_PATIENCE = 10


class EstimatorSchedule:
    """Moves every annealed estimator and blend of a model through training; steps like an ``lr_scheduler``.

    Call :meth:`step` once after each ``optimizer.step()``. If an optimizer of the model's parameters steps ten times
    and the schedule never does, it warns once, since the estimators then stay as they are. Estimators may come or go,
    as by ``convert``, until the first step; one that comes later is taken in by :meth:`load_state_dict`.

    Args:
        model: the model, or any module that holds the estimators.
        total_steps: optimizer steps in the whole training, at least 1. Steps beyond it count as the last.

    Raises:
        ConfigError: total_steps is not a positive integer.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        self.total_steps = _count("total_steps", total_steps, 1)
        self.last_step = 0
        self._model = model
        self._find()
        self._apply()
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._idle: Counter[int] = Counter()  # steps of each optimizer; one may be made of several
        self._stepped = False
        _WAITING.add(self)
        if not _HOOKS:
            _HOOKS.append(register_optimizer_step_post_hook(_after_step))

    @property
    def progress(self) -> float:
        """The fraction of training done, in [0, 1]."""
        return min(self.last_step / self.total_steps, 1.0)

    def step(self) -> None:
        """Count one optimizer step."""
        if not self._stepped:  # not at every step, since it takes as long as setting a few of them
            self._stepped = True
            self._find()
        self.last_step += 1
        self._apply()
        Equilibrium.settle(self._equilibria)
        _WAITING.discard(self)

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs: the step and the total."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take up where :meth:`state_dict` was called, and set the estimators accordingly.

        Raises:
            ConfigError: the state of something else.
        """
        last_step = _count("last_step in the state", state.get("last_step"), 0)
        self.total_steps = _count("total_steps in the state", state.get("total_steps"), 1)
        self.last_step = last_step
        self._find()
        self._apply()

    def _find(self) -> None:
        self._annealed = [module for module in self._model.modules() if isinstance(module, Annealed)]
        self._equilibria = [module for module in self._annealed if isinstance(module, Equilibrium)]

    def _apply(self) -> None:
        for module in self._annealed:
            module.set_progress(self.last_step, self.total_steps)


def _count(name: str, value: object, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ConfigError(f"EstimatorSchedule: {name} must be an integer of at least {least}, got {value!r}.")
    return int(value)


# Schedules that have not stepped yet, under one hook for all. The hook stays for good: one that is removed while an
# optimizer goes through its hooks makes that optimizer's step fail, and garbage collection might do so at any moment.
_WAITING: weakref.WeakSet[EstimatorSchedule] = weakref.WeakSet()
_HOOKS: list[Any] = []


def _after_step(optimizer: Any, *_: Any) -> None:
    for schedule in list(_WAITING):
        if any(id(p) in schedule._parameters for group in optimizer.param_groups for p in group["params"]):
            schedule._idle[id(optimizer)] += 1
            if schedule._idle[id(optimizer)] == _PATIENCE:
                _WAITING.discard(schedule)
                schedule._find()
                if not schedule._annealed:
                    continue
                warnings.warn(
                    f"the optimizer has stepped {_PATIENCE} times but EstimatorSchedule.step() was never called: the "
                    "estimators stay as they are; call schedule.step() after optimizer.step().",
                    UserWarning,
                    stacklevel=3,
                )
