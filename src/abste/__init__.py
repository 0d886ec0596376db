"""Train binary neural networks in PyTorch with AB-STE, and run them as bits.

``import abste`` and :func:`abste.load` need numpy alone. What trains needs ``pip install "abste[train]"`` and is
imported when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from abste._version import __version__

if TYPE_CHECKING:
    from abste import data, deploy, diagnostics, estimators, models, nn, runtime, train, zoo
    from abste.estimators import EstimatorSchedule
    from abste.nn import convert, parameter_groups, summary
    from abste.runtime import Network, load
    from abste.train import load_run

_MODULES = ("data", "deploy", "diagnostics", "estimators", "models", "nn", "runtime", "train", "zoo")
_NAMES = {
    "EstimatorSchedule": "abste.estimators",
    "Network": "abste.runtime",
    "convert": "abste.nn",
    "load": "abste.runtime",
    "load_run": "abste.train",
    "parameter_groups": "abste.nn",
    "summary": "abste.nn",
}

__all__ = [
    "EstimatorSchedule",
    "Network",
    "__version__",
    "convert",
    "data",
    "deploy",
    "diagnostics",
    "estimators",
    "load",
    "load_run",
    "models",
    "nn",
    "parameter_groups",
    "runtime",
    "summary",
    "train",
    "zoo",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES and name not in _NAMES:
        raise AttributeError(f"module 'abste' has no attribute {name!r}")
    home = _NAMES.get(name, f"abste.{name}")
    try:
        module = importlib.import_module(home)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "abste":
            raise
        raise ImportError(f"abste.{name} needs {error.name}: pip install 'abste[train]'") from error
    value = module if name in _MODULES else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
