"""What a test's child process runs."""

from __future__ import annotations

import os
import resource
import sys


def run(
    arguments: list[str], log: str, largest_file: int | None = None, environment: dict[str, str] | None = None
) -> None:
    """``abste ARGUMENTS`` with output in ``log`` and, in bytes, a limit on the size of every file written."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    os.environ.update(environment or {})
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    import torch

    torch.set_num_threads(1)
    from abste.cli import main

    sys.exit(main(arguments))
