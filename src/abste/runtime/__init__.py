"""Loads and runs .abste files, with numpy and a small C library; never imports torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abste.runtime.network import Network, NodeInfo, Profile, TensorInfo, isas, load

__all__ = ["Network", "NodeInfo", "Profile", "TensorInfo", "isas", "load"]


def __getattr__(name: str) -> Any:  # so that the interpreter in numpy can be used without the C library
    if name not in __all__:
        raise AttributeError(f"module 'abste.runtime' has no attribute {name!r}")
    value = getattr(importlib.import_module("abste.runtime.network"), name)
    globals()[name] = value
    return value
