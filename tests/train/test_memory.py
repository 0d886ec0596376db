"""What a process that trains does with memory that it frees."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from abste.train import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
def faults():
    for _ in range(10):
        a, b = torch.ones(10_000_000), torch.ones(500_000)
        del a, b
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = faults()
print(faults() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's malloc is set")
@pytest.mark.parametrize(("how", "environment", "kept"), [
    ("keep", {}, True),
    ("leave", {}, False),
    ("keep", {"MALLOC_MMAP_THRESHOLD_": "65536"}, False),  # the user's word counts
])  # fmt: skip
def test_freed_memory_is_kept(how: str, environment: dict[str, str], kept: bool) -> None:
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-c", FAULTS, how]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    pages = 10 * 42_000_000 // 4096
    assert int(done.stdout) < pages / 100 if kept else int(done.stdout) > pages / 20  # pages may be huge ones
