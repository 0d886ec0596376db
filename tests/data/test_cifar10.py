"""The real CIFAR-10 files. Collected only where they are at hand, see conftest.py."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import abste.data
from abste.deploy import Verification, export_run, verify_run
from abste.errors import DataError

FOLDER = "cifar-10-batches-py"
RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture(scope="module")
def splits(cifar10_root: Path) -> abste.data.Splits:
    return abste.data.load("cifar10", cifar10_root, download=False)


def test_is_the_published_data(splits: abste.data.Splits) -> None:
    train, test = splits
    assert train.images.shape == (50_000, 3, 32, 32)
    assert test.images.shape == (10_000, 3, 32, 32)
    assert train.images.dtype == test.images.dtype == torch.uint8
    assert train.images.is_contiguous()
    assert train.classes[0] == "airplane" and train.classes[9] == "truck"
    assert train.labels.bincount().tolist() == [5000] * 10
    assert test.labels.bincount().tolist() == [1000] * 10
    assert train.labels[:5].tolist() == [6, 9, 9, 4, 1]
    assert test.labels[:5].tolist() == [3, 8, 8, 0, 6]
    assert train.images[0, :, 0, 0].tolist() == [59, 62, 63]


def test_constants_are_the_statistics_of_the_training_pixels(splits: abste.data.Splits) -> None:
    pixels = splits.train.images.permute(1, 0, 2, 3).flatten(1)
    for channel, values in enumerate(pixels):
        histogram = values.bincount(minlength=256).double() / values.numel()
        levels = torch.arange(256, dtype=torch.float64) / 255
        mean = float((histogram * levels).sum())
        std = float((histogram * (levels - mean) ** 2).sum().sqrt())
        assert splits.train.mean[channel] == pytest.approx(mean, abs=1e-5)
        assert splits.train.std[channel] == pytest.approx(std, abs=1e-5)


def test_accepts_the_folder_itself_under_any_name_and_writes_nothing(cifar10_root: Path, tmp_path: Path) -> None:
    renamed = tmp_path / "my copy"
    shutil.copytree(cifar10_root / FOLDER, renamed)
    for path in (*renamed.iterdir(), renamed):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = sorted(tmp_path.rglob("*"))
    try:
        assert len(abste.data.load("cifar10", renamed).train) == 50_000
    finally:
        renamed.chmod(0o755)
    assert sorted(tmp_path.rglob("*")) == before


def test_names_the_truncated_file_and_leaves_it(cifar10_root: Path, tmp_path: Path) -> None:
    shutil.copytree(cifar10_root / FOLDER, tmp_path / FOLDER)
    damaged = tmp_path / FOLDER / "data_batch_3"
    content = damaged.read_bytes()[:-1000]
    damaged.write_bytes(content)
    with pytest.raises(DataError, match="data_batch_3 is truncated"):
        abste.data.load("cifar10", tmp_path)
    assert damaged.read_bytes() == content


def test_holds_out_the_same_number_of_each_class(splits: abste.data.Splits) -> None:
    rest, validation = abste.data.hold_out(splits.train, 5000, seed=0)
    assert validation.labels.bincount().tolist() == [500] * 10
    assert rest.labels.bincount().tolist() == [4500] * 10


@pytest.mark.slow
@pytest.mark.parametrize("run", sorted(path.parent.name for path in RESULTS.glob("*/weights.safetensors")))
def test_packed_networks_are_the_trained_ones(run: str, cifar10_root: Path, tmp_path: Path) -> None:
    """Every network of results/, over the whole test set."""
    export_run(RESULTS / run, tmp_path / "net.abste")
    checks = verify_run(RESULTS / run, tmp_path / "net.abste", cifar10_root)
    assert all(check.passed for check in checks), "\n".join(map(str, checks))
    *_, last = checks
    assert isinstance(last, Verification) and last.images == last.labelled == 10_000 and last.accuracy is not None
    assert abs(last.accuracy[0] - last.accuracy[1]) <= last.images_with_bits / 10_000
