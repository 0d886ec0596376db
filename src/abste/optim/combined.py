"""Several optimizers as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from abste.errors import ConfigError


class Combined(Optimizer):
    """Several optimizers, each with parameters of its own, as one: ``Combined(Muon(latents), SGD(rest, lr=0.1))``.

    ``param_groups`` and ``state_dict`` hold what theirs do, one after the other, so that schedulers, gradient scalers
    and checkpoints need to know nothing of it. A step is a step of each, in order.

    Args:
        optimizers: any of ``torch.optim`` or abste, new or used. They go on sharing groups and state with this one:
            load a state through this one.

    Raises:
        ConfigError: no optimizer, something else, or a parameter that is in two of them.
    """

    def __init__(self, *optimizers: Optimizer) -> None:
        if not optimizers:
            raise ConfigError("Combined needs at least one optimizer.")
        for optimizer in optimizers:
            if not isinstance(optimizer, Optimizer):
                raise ConfigError(f"Combined: expected an optimizer of torch, got {type(optimizer).__name__}.")
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        parameters = [parameter for group in groups for parameter in group["params"]]
        if len(set(parameters)) != len(parameters):
            raise ConfigError("Combined: a parameter is in more than one of the optimizers; give it to one of them.")
        self.optimizers: tuple[Optimizer, ...] = ()
        state = [(parameter, values) for optimizer in optimizers for parameter, values in optimizer.state.items()]
        # Defaults that all have: what some schedulers look for, such as momentum.
        common = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        super().__init__(groups, {key: optimizers[0].defaults[key] for key in sorted(common)})
        self.state.update(state)
        self.optimizers = optimizers
        self._share()

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizers" in state:  # a copy, and not the part of a state that is loaded
            self._share()

    def _share(self) -> None:
        """Give the optimizers the groups and the state of this one."""
        start = 0
        for optimizer in self.optimizers:
            end = start + len(optimizer.param_groups)
            # By their own way of taking in a loaded state, which also fills in what that lacks.
            optimizer.__setstate__({"state": self.state, "param_groups": self.param_groups[start:end]})
            start = end

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are added to the optimizers, before they are combined.

        Raises:
            ConfigError: always, once they are.
        """
        if self.optimizers:
            raise ConfigError("Combined: add groups to the optimizers before they are combined.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, of a combination of the same optimizers over the same parameters."""
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each; the closure, where given, is called once, before the first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
