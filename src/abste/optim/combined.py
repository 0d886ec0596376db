"""Several optimizers as one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from itertools import chain
from typing import Any

import torch
from torch.optim import Optimizer

from abste.errors import ConfigError


class _States(MutableMapping[Any, Any]):
    """The states of several optimizers as one. They stay apart, since an optimizer may expect only its own in its."""

    def __init__(self, optimizers: tuple[Optimizer, ...]) -> None:
        self.optimizers = optimizers

    def _holder(self, key: Any) -> MutableMapping[Any, Any]:
        for optimizer in self.optimizers:
            if key in optimizer.state or any(key is p for group in optimizer.param_groups for p in group["params"]):
                return optimizer.state
        raise KeyError(key)

    def __getitem__(self, key: Any) -> Any:
        return self._holder(key)[key]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._holder(key)[key] = value

    def __delitem__(self, key: Any) -> None:
        del self._holder(key)[key]

    def __contains__(self, key: object) -> bool:
        return any(key in optimizer.state for optimizer in self.optimizers)

    def get(self, key: Any, default: Any = None) -> Any:
        return next((o.state[key] for o in self.optimizers if key in o.state), default)  # and makes no entry

    def __iter__(self) -> Iterator[Any]:
        return chain.from_iterable(optimizer.state for optimizer in self.optimizers)

    def __len__(self) -> int:
        return sum(len(optimizer.state) for optimizer in self.optimizers)


class Combined(Optimizer):
    """Several optimizers, each with parameters of its own, as one: ``Combined(Muon(latents), SGD(rest, lr=0.1))``.

    ``param_groups``, ``state`` and ``state_dict`` hold what theirs do, one after the other, so that schedulers,
    gradient scalers and checkpoints need to know nothing of it. A step is a step of each, in order.

    Args:
        optimizers: any of ``torch.optim`` or abste, new or used. They go on sharing their groups with this one: load a
            state through this one, and add groups before.

    Raises:
        ConfigError: no optimizer, something else, a parameter that is in two of them, or names of parameters in some of
            them alone.
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
        if len({"param_names" in group for group in groups}) > 1:
            raise ConfigError("Combined: some optimizers have names of their parameters; give them to all, or to none.")
        self.optimizers: tuple[Optimizer, ...] = ()
        # Defaults that all have: what some schedulers look for, such as momentum.
        common = set.intersection(*(set(optimizer.defaults) for optimizer in optimizers))
        super().__init__(groups, {key: optimizers[0].defaults[key] for key in sorted(common)})
        self.optimizers = optimizers
        self.state = _States(optimizers)  # type: ignore[assignment]

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "optimizers": self.optimizers}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if "optimizers" not in state:  # the part of a state that is loaded, and not a copy
            self._share(state["state"])

    def _share(self, loaded: dict[Any, Any]) -> None:
        """Give the optimizers the groups of this one, and each its part of a loaded state."""
        start = 0
        for optimizer in self.optimizers:
            groups = self.param_groups[start : start + len(optimizer.param_groups)]
            start += len(groups)
            own = {p: loaded[p] for group in groups for p in group["params"] if p in loaded}
            # By their own way of taking in a loaded state, which also fills in what that lacks.
            optimizer.__setstate__({"state": defaultdict(dict, own), "param_groups": groups})
        self.state = _States(self.optimizers)  # type: ignore[assignment]

    def _check_groups(self) -> None:
        theirs = [id(group) for optimizer in self.optimizers for group in optimizer.param_groups]
        if theirs != [id(group) for group in self.param_groups]:
            raise ConfigError(
                "Combined: the groups of one of the optimizers have changed since they were combined; add groups "
                "before, and load a state through Combined."
            )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Groups are added to the optimizers, before they are combined.

        Raises:
            ConfigError: always, once they are.
        """
        if self.optimizers:
            raise ConfigError("Combined: add groups to the optimizers before they are combined.")
        super().add_param_group(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from :meth:`state_dict`, of a combination of the same optimizers over the same parameters.

        Raises:
            ConfigError: the groups of one of them have changed since they were combined.
        """
        self._check_groups()
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of each; the closure, where given, is called once, before the first.

        Raises:
            ConfigError: the groups of one of them have changed since they were combined.
        """
        self._check_groups()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss
