"""The real CIFAR-10 and real photos, where copies lie beside the repository; their tests exist only there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

MAKE_CIFAR10 = Path(__file__).resolve().parents[3] / "shared" / "data" / "make_cifar10.py"
IMAGENETTE = next(
    (folder for up in Path(__file__).resolve().parents if (folder := up / "shared/data/imagenette224").is_dir()), None
)

collect_ignore = [] if MAKE_CIFAR10.is_file() else ["test_cifar10.py"]
if IMAGENETTE is None:
    collect_ignore.append("test_imagenette.py")


@pytest.fixture(scope="session")
def cifar10_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the official cifar-10-batches-py/; written once per session, about 15 s."""
    root = tmp_path_factory.mktemp("cifar10")
    subprocess.run([sys.executable, str(MAKE_CIFAR10), str(root)], check=True, capture_output=True)
    return root


@pytest.fixture(scope="session")
def imagenette_root() -> Path:
    """``train`` and ``val`` of ten classes of ImageNet."""
    assert IMAGENETTE is not None
    return IMAGENETTE
