"""From run directories to tables and pages: comparisons of estimators under one protocol."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from abste.report.statistics import Paired, detectable, holm, paired
from abste.report.study import Arm, Planned, Setting, Study, load_study, make_study

if TYPE_CHECKING:
    from abste.report.compare import Finished, Outcome, read_finished, run_study
    from abste.report.comparison import ArmResult, Comparison, SettingResult, compare_runs
    from abste.report.page import Run, find_runs, write_page

__all__ = [
    "Arm",
    "ArmResult",
    "Comparison",
    "Finished",
    "Outcome",
    "Paired",
    "Planned",
    "Run",
    "Setting",
    "SettingResult",
    "Study",
    "compare_runs",
    "detectable",
    "find_runs",
    "holm",
    "load_study",
    "make_study",
    "paired",
    "read_finished",
    "run_study",
    "write_page",
]

_LAZY = {
    **dict.fromkeys(("Finished", "Outcome", "read_finished", "run_study"), "abste.report.compare"),
    **dict.fromkeys(("ArmResult", "Comparison", "SettingResult", "compare_runs"), "abste.report.comparison"),
    **dict.fromkeys(("Run", "find_runs", "write_page"), "abste.report.page"),
}


def __getattr__(name: str) -> Any:
    # What needs torch is imported when it is first used, so that a study can be checked and listed at once.
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
