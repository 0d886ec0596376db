from __future__ import annotations

import functools
import hashlib
import http.server
import io
import pickle
import re
import socket
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10

import abste.data
from abste.data import ImageData
from abste.errors import ConfigError, DataError

FOLDER = "cifar-10-batches-py"
FILES = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch", "batches.meta")


def images(count: int = 6, classes: int = 3) -> ImageData:
    pixels = torch.arange(count * 12, dtype=torch.int64).remainder(256).to(torch.uint8).view(count, 3, 2, 2)
    names = tuple(f"class {label}" for label in range(classes))
    return ImageData(pixels, torch.arange(count) % classes, names, (0.5,) * 3, (0.25,) * 3, "made")


def one_sentence(error: pytest.ExceptionInfo[Exception]) -> str:
    message = str(error.value)
    assert "\n" not in message and not re.search(r"[.!?] [A-Z]", message)
    return message


# --- digits


def test_digits_are_complete_split_and_scaled() -> None:
    train, test = abste.data.load("digits")
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == test.images.shape[1:] == (1, 8, 8)
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert train.classes == tuple("0123456789")
    assert int(train.images.min()) == 0 and int(train.images.max()) == 255
    assert set(train.images.unique().tolist()) == {round(level * 255 / 16) for level in range(17)}
    assert len(test) / 1797 == pytest.approx(0.2, abs=0.005)
    shares = test.labels.bincount() / (train.labels.bincount() + test.labels.bincount())
    assert shares.numpy() == pytest.approx(0.2, abs=0.01)


def test_digits_split_loses_and_repeats_nothing() -> None:
    from sklearn.datasets import load_digits

    source = load_digits()
    expected = sorted(zip(source.images.reshape(-1, 64).tolist(), source.target.tolist(), strict=True))
    found = [
        ((split.images.flatten(1).double() * 16 / 255).round().tolist(), split.labels.tolist())
        for split in abste.data.load("digits")
    ]
    assert sorted(pair for part in found for pair in zip(*part, strict=True)) == expected


def test_digits_statistics_are_those_of_the_training_split() -> None:
    train, test = abste.data.load("digits")
    pixels = train.images.double() / 255
    assert train.mean[0] == pytest.approx(float(pixels.mean()), abs=1e-5)
    assert train.std[0] == pytest.approx(float(pixels.std()), abs=1e-4)
    assert (test.mean, test.std) == (train.mean, train.std)


def test_digits_are_the_same_at_every_load() -> None:
    first, second = abste.data.load("digits"), abste.data.load("digits", root="nowhere", download=False)
    assert torch.equal(first.train.images, second.train.images)
    assert torch.equal(first.test.labels, second.test.labels)


# --- names, packages, ImageData


def test_available_names_load() -> None:
    assert abste.data.available() == ["cifar10", "digits"]


def test_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'cifar-10'; did you mean 'cifar10'\?") as error:
        abste.data.load("cifar-10")
    one_sentence(error)


def test_statistics_of_imagenet_replace_those_of_the_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    made = abste.data.Splits(images(6), images(3))
    monkeypatch.setitem(abste.data.sets._LOADERS, "cifar10", lambda root, download: made)
    plain, other = abste.data.load("cifar10"), abste.data.load("cifar10", statistics="imagenet")
    for split, again, source in zip(plain, other, made, strict=True):
        assert (split.mean, split.std) == (source.mean, source.std)
        assert (again.mean, again.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert again.images is source.images and again.labels is source.labels and again.classes == source.classes


def test_a_description_has_the_statistics_chosen() -> None:
    plain, other = abste.data.describe("cifar10"), abste.data.describe("cifar10", "imagenet")
    assert plain is not None and other is not None
    assert plain.mean == (0.49140, 0.48216, 0.44653) and plain.std == (0.24703, 0.24349, 0.26159)
    assert other == (plain.classes, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert abste.data.describe("nothing", "imagenet") is None


@pytest.mark.parametrize(
    ("name", "statistics", "message"),
    [
        ("cifar10", "imagnet", "There are no statistics named 'imagnet'; did you mean 'imagenet'"),
        ("digits", "imagenet", "'imagenet' are those of 3 channels, and data set 'digits' has 1; leave statistics at"),
    ],
)
def test_statistics_that_do_not_fit(name: str, statistics: str, message: str) -> None:
    for read in (abste.data.load, abste.data.describe):
        with pytest.raises(ConfigError, match=message) as error:
            read(name, statistics=statistics)  # type: ignore[operator]
        one_sentence(error)


@pytest.mark.parametrize(
    ("name", "module", "package"),
    [("digits", "sklearn.datasets", "scikit-learn"), ("cifar10", "torchvision.datasets", "torchvision")],
)
def test_missing_package_names_the_extra(name: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=re.escape("pip install 'abste[train]'")) as error:
        abste.data.load(name)
    assert package in one_sentence(error)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": torch.zeros(6, 3, 2, 2)}, "torch.float32 of shape"),
        ({"images": torch.zeros(6, 12, dtype=torch.uint8)}, r"of shape \(6, 12\)"),
        ({"images": torch.zeros(0, 3, 2, 2, dtype=torch.uint8)}, "non-empty"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, "one label per image"),
        ({"labels": torch.zeros(6, dtype=torch.int32)}, "torch.int32"),
        ({"labels": torch.tensor([0, 1, 2, 3, 0, 1])}, "run from 0 to 3, but it names 3 classes"),
        ({"labels": torch.tensor([0, 1, 2, -1, 0, 1])}, "run from -1 to 2"),
        ({"mean": (0.5,)}, "3 channel"),
        ({"std": (0.2, 0.2, 0.0)}, "positive std"),
    ],
)
def test_image_data_refuses_what_does_not_fit(change: dict[str, object], message: str) -> None:
    good = images()
    with pytest.raises(DataError, match=message) as error:
        ImageData(**{**good.__dict__, **change})
    assert "'made'" in one_sentence(error)


# --- hold_out


def test_hold_out_is_stratified_disjoint_and_complete() -> None:
    train = abste.data.load("digits").train
    rest, validation = abste.data.hold_out(train, 200, seed=3)
    assert (len(rest), len(validation)) == (len(train) - 200, 200)
    ideal = train.labels.bincount() * 200 / len(train)
    assert ((validation.labels.bincount() - ideal).abs() < 1).all()
    both = torch.cat([rest.images, validation.images]).flatten(1)
    assert sorted(both.tolist()) == sorted(train.images.flatten(1).tolist())
    assert (validation.classes, validation.mean, validation.name) == (train.classes, train.mean, train.name)


def test_hold_out_depends_on_the_seed_alone() -> None:
    train = abste.data.load("digits").train
    first, again, other = (abste.data.hold_out(train, 100, seed)[1] for seed in (0, 0, 1))
    assert torch.equal(first.images, again.images) and torch.equal(first.labels, again.labels)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize("count", range(1, 10))
def test_hold_out_gives_exactly_the_count(count: int) -> None:
    rest, validation = abste.data.hold_out(images(10, classes=4), count, seed=0)
    assert (len(rest), len(validation)) == (10 - count, count)


@pytest.mark.parametrize("count", [0, -1, 6, 7, 2.5, True])
def test_hold_out_refuses_a_count_out_of_range(count: int) -> None:
    with pytest.raises(ConfigError, match="give 1 to 5") as error:
        abste.data.hold_out(images(), count, seed=0)
    one_sentence(error)


# --- cifar10: files that are not there or not what they should be


def test_cifar10_needs_a_root() -> None:
    with pytest.raises(DataError, match="needs a folder") as error:
        abste.data.load("cifar10")
    one_sentence(error)


def test_cifar10_missing_without_download(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no CIFAR-10 in") as error:
        abste.data.load("cifar10", tmp_path, download=False)
    assert str(tmp_path) in one_sentence(error)
    assert list(tmp_path.iterdir()) == []


def test_cifar10_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(DataError, match="is a file; give the folder") as error:
        abste.data.load("cifar10", tmp_path / "file")
    one_sentence(error)


class Bomb:
    """Unpickling this writes a file: proof that foreign code ran."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("nested", [True, False])
def test_cifar10_foreign_pickles_are_not_opened(tmp_path: Path, nested: bool) -> None:
    folder = tmp_path / FOLDER if nested else tmp_path
    folder.mkdir(exist_ok=True)
    for file in FILES:
        (folder / file).write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    before = {file: (folder / file).read_bytes() for file in FILES}
    with pytest.raises(DataError, match="data_batch_1 is truncated or not the one of CIFAR-10") as error:
        abste.data.load("cifar10", tmp_path)
    one_sentence(error)
    assert not (tmp_path / "ran").exists()
    assert {file: (folder / file).read_bytes() for file in FILES} == before


def test_cifar10_names_a_missing_file(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    with pytest.raises(DataError, match="data_batch_1 is missing") as error:
        abste.data.load("cifar10", tmp_path)
    one_sentence(error)


# --- cifar10: the download, from a server of our own with a small archive of the official layout


@dataclass
class Server:
    url: str
    folder: Path  # what it serves

    @property
    def archive(self) -> Path:
        return self.folder / CIFAR10.filename


def small_archive() -> tuple[bytes, dict[str, str]]:
    """A .tar.gz like the official one with 4 images per file, and the MD5s of its files."""
    rng = np.random.default_rng(0)
    contents = {}
    for file in FILES[:-1]:
        pixels = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        contents[file] = pickle.dumps({"data": pixels, "labels": rng.integers(0, 10, 4).tolist()})
    contents["batches.meta"] = pickle.dumps({"label_names": [f"class {label}" for label in range(10)]})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for file, content in contents.items():
            member = tarfile.TarInfo(f"{FOLDER}/{file}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue(), {file: hashlib.md5(content).hexdigest() for file, content in contents.items()}


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "served"
    folder.mkdir()
    archive, md5s = small_archive()
    (folder / CIFAR10.filename).write_bytes(archive)
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/{CIFAR10.filename}"
        monkeypatch.setattr(CIFAR10, "url", url)
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive).hexdigest())
        monkeypatch.setattr(CIFAR10, "train_list", [[file, md5s[file]] for file in FILES[:5]])
        monkeypatch.setattr(CIFAR10, "test_list", [[FILES[5], md5s[FILES[5]]]])
        monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5s["batches.meta"]})
        yield Server(url, folder)
        running.shutdown()


@pytest.mark.filterwarnings(
    "ignore:Python 3.14 will, by default:DeprecationWarning"
)  # torchvision unpacks, MD5 checked
def test_download_gives_the_data_and_leaves_nothing_else(server: Server, tmp_path: Path) -> None:
    root = tmp_path / "new" / "root"
    train, test = abste.data.load("cifar10", root)
    assert (len(train), len(test)) == (20, 4)
    assert [path.name for path in root.iterdir()] == [FOLDER]
    server.archive.unlink()
    again = abste.data.load("cifar10", root)
    assert torch.equal(again.train.images, train.images)
    from_inside = abste.data.load("cifar10", root / FOLDER)
    assert torch.equal(from_inside.test.images, test.images)


def test_download_of_a_truncated_archive(server: Server, tmp_path: Path) -> None:
    server.archive.write_bytes(server.archive.read_bytes()[:-100])
    with pytest.raises(DataError, match="Could not download CIFAR-10 into") as error:
        abste.data.load("cifar10", tmp_path / "root")
    assert server.url in one_sentence(error)
    assert list((tmp_path / "root").iterdir()) == []


def test_download_from_a_server_without_the_file(server: Server, tmp_path: Path) -> None:
    server.archive.unlink()
    with pytest.raises(DataError, match="404"):
        abste.data.load("cifar10", tmp_path / "root")


def test_download_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{port}/{CIFAR10.filename}")
    with pytest.raises(DataError, match=r"Could not download .* or download .* by hand") as error:
        abste.data.load("cifar10", tmp_path / "root")
    one_sentence(error)


def test_download_where_nothing_can_be_written(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(DataError, match="file") as error:
        abste.data.load("cifar10", tmp_path / "file" / "root")
    one_sentence(error)
