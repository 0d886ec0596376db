"""The schedule that tells annealed estimators how far training is."""

from __future__ import annotations

import warnings
import weakref
from typing import Any

from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from abste.errors import ConfigError
from abste.estimators.base import Annealed

_PATIENCE = 10


class EstimatorSchedule:
    """Moves every annealed estimator and blend of a model through training; steps like an ``lr_scheduler``.

    Call :meth:`step` once after each ``optimizer.step()``. If an optimizer of the model's parameters steps ten times
    and the schedule never does, it warns once, since the estimators then stay as they are at the start.

    Args:
        model: the model, or any module that holds the estimators.
        total_steps: optimizer steps in the whole training, at least 1. Steps beyond it count as the last.

    Raises:
        ConfigError: total_steps is not a positive integer.
    """

    def __init__(self, model: nn.Module, total_steps: int) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ConfigError(f"EstimatorSchedule: total_steps must be a positive integer, got {total_steps!r}.")
        self.total_steps = total_steps
        self.last_step = 0
        self._annealed = [module for module in model.modules() if isinstance(module, Annealed)]
        self._apply()
        if self._annealed:
            self._watch(model)

    @property
    def progress(self) -> float:
        """The fraction of training done, in [0, 1]."""
        return min(self.last_step / self.total_steps, 1.0)

    def step(self) -> None:
        """Count one optimizer step."""
        self.last_step += 1
        self._apply()

    def state_dict(self) -> dict[str, int]:
        """What :meth:`load_state_dict` needs: the step and the total."""
        return {"last_step": self.last_step, "total_steps": self.total_steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Take up where :meth:`state_dict` was called, and set the estimators accordingly."""
        self.last_step, self.total_steps = int(state["last_step"]), int(state["total_steps"])
        self._apply()

    def _apply(self) -> None:
        for module in self._annealed:
            module.set_progress(self.last_step, self.total_steps)

    def _watch(self, model: nn.Module) -> None:
        parameters = {id(parameter) for parameter in model.parameters()}
        schedule = weakref.ref(self)
        idle = 0

        def after_step(optimizer: Any, *_: Any) -> None:
            nonlocal idle
            owner = schedule()
            if owner is None or owner.last_step > 0:
                handle.remove()
            elif any(id(p) in parameters for group in optimizer.param_groups for p in group["params"]):
                idle += 1
                if idle == _PATIENCE:
                    handle.remove()
                    warnings.warn(
                        f"the optimizer has stepped {_PATIENCE} times but EstimatorSchedule.step() was never called: "
                        "the estimators stay as at the start; call schedule.step() after optimizer.step().",
                        UserWarning,
                        stacklevel=3,
                    )

        handle = register_optimizer_step_post_hook(after_step)
