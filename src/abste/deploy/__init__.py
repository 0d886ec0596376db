"""From a trained network to one small file: graph, lowering, the .abste format, verification.

abste.deploy.export(model, "net.abste", example_input=torch.zeros(1, 3, 32, 32))
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from abste.deploy.lowering import Lowered, lower
    from abste.deploy.packing import Export, Rounding, export, verify_file
    from abste.deploy.runs import export_run, verify_run
    from abste.deploy.verification import Constants, Verification, verify

# What needs torch is imported when first used: the runtime imports the graph from here, and must not need it.
_HOMES = {
    "Constants": "verification",
    "Export": "packing",
    "Lowered": "lowering",
    "Rounding": "packing",
    "Verification": "verification",
    "export": "packing",
    "export_run": "runs",
    "lower": "lowering",
    "verify": "verification",
    "verify_file": "packing",
    "verify_run": "runs",
}

__all__ = [
    "Constants",
    "Export",
    "Lowered",
    "Rounding",
    "Verification",
    "export",
    "export_run",
    "lower",
    "verify",
    "verify_file",
    "verify_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'abste.deploy' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"abste.deploy.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
