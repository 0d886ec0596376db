"""Recipes, the training loop, checkpoints and runs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from abste.train.recipe import Recipe, builtin_recipes, load_recipe

if TYPE_CHECKING:
    from abste.train.loop import Interrupted, fit
    from abste.train.run import evaluate, load_run
    from abste.train.setup import keep_freed_memory

__all__ = [
    "Interrupted",
    "Recipe",
    "builtin_recipes",
    "evaluate",
    "fit",
    "keep_freed_memory",
    "load_recipe",
    "load_run",
]

_LAZY = {
    "Interrupted": "abste.train.loop",
    "fit": "abste.train.loop",
    "evaluate": "abste.train.run",
    "load_run": "abste.train.run",
    "keep_freed_memory": "abste.train.setup",
}


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is first used, so that recipes can be listed at once.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
