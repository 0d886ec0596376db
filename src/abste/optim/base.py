"""What the optimizers share: groups of parameters that are checked as they arrive."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from abste.errors import ConfigError


class CheckedOptimizer(Optimizer):
    """An optimizer that refuses groups it cannot work with, in one sentence, and leaves the step to its subclass."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Check a group and add it.

        Raises:
            ConfigError: an option out of range, or a parameter of the wrong kind; the group is then not added.
        """
        super().add_param_group({**param_group})
        try:
            self._check_group(self.param_groups[-1])
        except ConfigError:
            self.param_groups.pop()
            raise

    @abstractmethod
    def _check_group(self, group: dict[str, Any]) -> None:
        """Raise ConfigError unless the group's options, merged with the defaults, and its parameters will do."""

    @abstractmethod
    def _update(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        """One step of one parameter, in place."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient.

        Args:
            closure: evaluates the model again and gives the loss, as in ``torch.optim``.

        Returns:
            What the closure gives, else None. Nothing is read from the device.

        Raises:
            ConfigError: a sparse gradient.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if parameter.grad.is_sparse:
                    raise ConfigError(f"{type(self).__name__} needs dense gradients, got a sparse one.")
                self._update(parameter, parameter.grad, group)
        return loss


def check_number(owner: str, name: str, value: object, below: float = math.inf) -> None:
    """Check that ``value`` is a number, at least 0 and less than ``below``.

    Raises:
        ConfigError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < below:
        limit = f" and less than {below:g}" if below < math.inf else ""
        raise ConfigError(f"{owner}: {name} must be a finite number, at least 0{limit}, got {value!r}.")
