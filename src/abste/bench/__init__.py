"""How fast a packed network runs, beside other engines: `abste bench`. Needs numpy; each other engine needs itself."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abste.bench.report import Benchmark, Timing, bench

__all__ = ["Benchmark", "Timing", "bench"]


def __getattr__(name: str) -> Any:  # so that the parts can be used without the C library
    if name not in __all__:
        raise AttributeError(f"module 'abste.bench' has no attribute {name!r}")
    value = getattr(importlib.import_module("abste.bench.report"), name)
    globals()[name] = value
    return value
