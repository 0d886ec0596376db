from __future__ import annotations

import os
from pathlib import Path

# Before torch is imported: several test processes share few cores, and so do the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from hypothesis import HealthCheck, settings
from random_graphs import random_graph

__all__ = ["random_graph"]

torch.set_num_threads(1)

# Deterministic, and without a deadline: a first call that compiles or warms up is no failure.
settings.register_profile("abste", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("abste")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def repo_root() -> Path:
    """The root of the source tree."""
    return ROOT


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
