from __future__ import annotations

import io
import os
import shutil
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from photos import CLASSES, make_folder, noise
from torchvision.datasets import ImageFolder

import abste.data.shards as shards_module
from abste.data import FILE_SETS, FileSplits, hold_out, open_files, write_shards
from abste.errors import ConfigError, DataError
from abste.train.recipe import DATA_FILES


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "photos", {"train": 4, "val": 2})


@pytest.fixture
def shards(folder: Path) -> Path:
    root = folder.parent / "shards"
    write_shards(open_files("folder", folder), root, images=5)
    return root


def pack(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as shard:
        for name, content in members.items():
            member = tarfile.TarInfo(name.partition("#")[0])  # what follows '#' only tells two of one name apart
            member.size = len(content)
            shard.addfile(member, io.BytesIO(content))


def jpeg(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    noise(seed).save(buffer, "JPEG")
    return buffer.getvalue()


# --- folders


def test_a_folder_is_what_torchvision_finds(folder: Path) -> None:
    deeper = folder / "train" / "dog" / "more"
    deeper.mkdir()
    noise(99).save(deeper / "A.JPEG")
    noise(98).save(folder / "train" / "dog" / "zz.png")
    (folder / "train" / "dog" / "notes.txt").write_text("no image")
    train, test = open_files("folder", folder)
    assert test is not None
    for found, split in ((train, "train"), (test, "val")):
        wanted = ImageFolder(str(folder / split))
        assert list(found.classes) == wanted.classes == list(CLASSES)
        assert found.labels.tolist() == wanted.targets
        assert [found.path(i) for i in range(len(found))] == [path for path, _ in wanted.samples]
        assert found.read(0) == Path(wanted.samples[0][0]).read_bytes()
    assert len(train) == 14 and train.channels == 3
    assert train.mean == (0.485, 0.456, 0.406) and train.std == (0.229, 0.224, 0.225)


def test_what_desktops_leave_behind_is_passed_over(folder: Path) -> None:
    before = open_files("folder", folder).train
    for name in (".ipynb_checkpoints", "__MACOSX"):
        (folder / "train" / name).mkdir()
    (folder / "train" / "cat" / "._000.jpg").write_bytes(b"finder")
    after = open_files("folder", folder).train
    assert after.classes == before.classes and after.fingerprint() == before.fingerprint()


def test_names_and_order_of_splits(tmp_path: Path) -> None:
    root = make_folder(tmp_path / "a", {"train": 2, "test": 1})
    assert len(open_files("folder", root).test or ()) == 3
    make_folder(root, {"val": 2})
    assert len(open_files("folder", root).test or ()) == 6  # test of ImageNet has no labels


def test_a_folder_without_splits_is_held_out_from(tmp_path: Path) -> None:
    train, test = open_files("folder", make_folder(tmp_path, {"": 5}))
    assert test is None and len(train) == 15
    rest, held = hold_out(train, 6, seed=0)
    names = [{part.path(i) for i in range(len(part))} for part in (rest, held)]
    assert len(names[0]) == 9 and len(names[1]) == 6 and not names[0] & names[1]
    assert torch.bincount(held.labels).tolist() == [2, 2, 2]
    for part in (rest, held):
        assert all(Path(part.path(i)).parent.name == CLASSES[part.labels[i]] for i in range(len(part)))


def test_grey_and_other_statistics(folder: Path) -> None:
    grey = open_files("folder", folder, channels=1).train
    assert grey.channels == 1 and len(grey.mean) == len(grey.std) == 1
    other = open_files("folder", folder, mean=[0.1, 0.2, 0.3], std=[1, 2, 3]).train
    assert other.mean == (0.1, 0.2, 0.3) and other.std == (1, 2, 3)
    for arguments in ({"mean": [0.5]}, {"std": [1, 1, 0]}, {"channels": 2}, {"channels": 1, "mean": [0.1, 0.2, 0.3]}):
        with pytest.raises(ConfigError, match="channel"):
            open_files("folder", folder, **arguments)  # type: ignore[arg-type]


def test_fingerprints_know_names_and_labels(folder: Path) -> None:
    first = open_files("folder", folder).train
    shutil.copytree(folder, folder.parent / "moved")
    assert open_files("folder", folder.parent / "moved").train.fingerprint() == first.fingerprint()
    assert first.select(torch.tensor([1, 0])).fingerprint() != first.select(torch.tensor([0, 1])).fingerprint()
    (folder / "train" / "cat" / "train000.jpg").rename(folder / "train" / "cat" / "renamed.jpg")
    assert open_files("folder", folder).train.fingerprint() != first.fingerprint()


def empty_class(root: Path) -> None:
    (root / "train" / "fox").mkdir()
    (root / "val" / "fox").mkdir()
    (root / "train" / "fox" / "image.txt").write_text("")


def copied(root: Path) -> None:
    shutil.copy(root / "train" / "dog" / "train001.jpg", root / "val" / "dog" / "train001.jpg")


def one_class(root: Path) -> None:
    for split in ("train", "val"):
        for name in CLASSES[1:]:
            shutil.rmtree(root / split / name)


def loop(root: Path) -> None:
    (root / "train" / "cat" / "loop").symlink_to(".")


def loop_above(root: Path) -> None:
    (root / "train" / "cat" / "loop").symlink_to("../..")


def not_utf8(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "cat").rename(os.fsdecode(os.fsencode(root / split) + b"/c\xe4t"))


LAYOUT = r"train/CLASS/\*.jpg and val/CLASS/\*.jpg, or CLASS/\*.jpg alone\.$"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "There is no folder .*photos; give a folder with " + LAYOUT),
        (lambda root: (shutil.rmtree(root), root.write_text("")), "photos is a file; give a folder with " + LAYOUT),
        (lambda root: shutil.rmtree(root / "train"), "has a split 'val' but no 'train'; it needs " + LAYOUT),
        (
            lambda root: [shutil.rmtree(root / "train" / name) for name in CLASSES],
            "train holds no folders of classes; the data set needs " + LAYOUT,
        ),
        (lambda root: shutil.rmtree(root / "val" / "dog"), "Class 'dog' is in .*train but not in .*val; both splits"),
        (lambda root: shutil.rmtree(root / "train" / "eel"), "Class 'eel' is in .*val but not in .*train; both splits"),
        (empty_class, "Class 'fox' has no images in .*train .*.jpg, .*; add some, or remove the class"),
        (one_class, "train has images of one class alone, 'cat'; give at least two"),
        (copied, "The image .*train/dog/train001.jpg is in .*val too; remove one of them"),
        (loop, "train/cat/loop is reached by a link from within itself, so its images have no end; remove it"),
        (loop_above, "cat/loop/train/cat is reached by a link from within itself"),
        (not_utf8, r"The class 'c\\udce4t' in .*train is no name in UTF-8; rename its folder"),
    ],
)
def test_errors_of_folders(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message) as caught:
        open_files("folder", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("Train", "Val"), ("Train", "train")),
        (("training", "validation"), ("training", "train")),
        (("train", "valid"), ("valid", "val")),
        (("train", "VAL"), ("VAL", "val")),
        (("train", "Testing"), ("Testing", "test")),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_splits_under_other_names(
    folder: Path, shards: Path, kind: str, names: tuple[str, str], told: tuple[str, str]
) -> None:
    root = folder if kind == "folder" else shards
    for split, name in zip(("train", "val"), names, strict=True):
        (root / split).rename(root / name)
    with pytest.raises(DataError, match=f"has the folder '{told[0]}' where a split is called '{told[1]}'; rename it"):
        open_files(kind, root)


def test_classes_may_be_called_as_splits_are(tmp_path: Path) -> None:
    root = make_folder(tmp_path, {"": 1}, classes=("Test", "Training", "validation"))
    assert open_files("folder", root).train.classes == ("Test", "Training", "validation")


def test_the_same_name_is_not_the_same_image(folder: Path) -> None:
    noise(77).save(folder / "val" / "dog" / "train001.jpg")
    open_files("folder", folder)


def test_names_of_data_sets() -> None:
    assert tuple(FILE_SETS) == DATA_FILES
    with pytest.raises(ConfigError, match="did you mean 'folder'"):
        open_files("fodler", ".")
    with pytest.raises(DataError, match="'folder' needs a folder; give one with train/CLASS"):
        open_files("folder", None)


# --- shards


def test_shards_hold_what_the_folder_does(folder: Path, shards: Path) -> None:
    assert sorted(path.name for path in (shards / "train").glob("*.tar")) == ["000000.tar", "000001.tar", "000002.tar"]
    for found, wanted in zip(open_files("shards", shards), open_files("folder", folder), strict=True):
        assert found is not None and wanted is not None
        assert found.classes == wanted.classes and torch.equal(found.labels, wanted.labels)
        assert [found.read(i) for i in range(len(found))] == [wanted.read(i) for i in range(len(wanted))]
    train = open_files("shards", shards).train
    assert train.path(6) == str(shards / "train" / "000001.tar" / "00000006.jpg")
    rest, held = hold_out(train, 3, seed=0)
    assert {rest.read(i) for i in range(9)} | {held.read(i) for i in range(3)} == {train.read(i) for i in range(12)}


def test_the_index_is_kept_until_shards_change(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans: list[Path] = []
    scan = shards_module._scan
    monkeypatch.setattr(shards_module, "_scan", lambda where, names: (scans.append(where), scan(where, names))[1])
    first = open_files("shards", shards).train
    assert len(scans) == 2
    again = open_files("shards", shards).train
    assert len(scans) == 2 and again.fingerprint() == first.fingerprint() and again.read(7) == first.read(7)
    index = shards / "train" / shards_module.INDEX
    whole = index.read_bytes()
    index.write_bytes(whole[:100])  # damaged
    assert open_files("shards", shards).train.read(7) == first.read(7) and len(scans) == 3
    method = whole.index(b"PK\x01\x02") + 10  # of compression, which no zip file has so
    index.write_bytes(whole[:method] + b"\x63" + whole[method + 1 :])
    assert open_files("shards", shards).train.read(7) == first.read(7) and len(scans) == 4
    pack(shards / "train" / "000001.tar", {"a.jpg": jpeg(5), "a.cls": b"2"})
    changed = open_files("shards", shards).train
    assert len(scans) == 5 and len(changed) == 8 and changed.read(5) == jpeg(5)
    assert not list(shards.rglob("*.npz.*"))
    index.unlink()
    index.mkdir()  # cannot be replaced, as in a folder that cannot be written
    assert open_files("shards", shards).train.read(5) == jpeg(5)


def test_many_shards_open_few_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards_module, "_OPEN_SHARDS", 2)
    for i in range(6):
        pack(tmp_path / f"{i}.tar", {"a.jpg": jpeg(i), "a.cls": str(i % 2).encode()})
    train = open_files("shards", tmp_path).train
    for i in (0, 5, 1, 0, 3, 3, 2, 0):
        assert train.read(i) == jpeg(i)
    assert len(train.source._open) == 2  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("labels", "names", "classes", "numbers"),
    [
        (("0", "2", "01"), None, ("0", "1", "2"), [0, 2, 1]),
        (("0", "2", "1"), "x\ny y\nz\n", ("x", "y y", "z"), [0, 2, 1]),
        (("b", "a\n", "c"), None, ("a", "b", "c"), [1, 0, 2]),
        (("b", "a", "c"), "c\nb\na", ("c", "b", "a"), [1, 2, 0]),
    ],
)
def test_labels_are_numbers_or_names(
    tmp_path: Path, labels: tuple[str, ...], names: str | None, classes: tuple[str, ...], numbers: list[int]
) -> None:
    members = {}
    for i, label in enumerate(labels):
        members |= {f"deep/{i}.JPG": jpeg(i), f"deep/{i}.cls": label.encode(), f"deep/{i}.json": b"{}"}
        members |= {f"deep/{i}.mask.png": b"", f"thumbs/{i}.small.jpg": b""}  # what else there may be
    pack(tmp_path / "0.tar", members)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    train, test = open_files("shards", tmp_path)
    assert test is None and train.classes == classes and train.labels.tolist() == numbers
    assert [train.read(i) for i in range(3)] == [jpeg(i) for i in range(3)]


GOOD = {"a.jpg": jpeg(0), "a.cls": b"0", "b.jpg": jpeg(1), "b.cls": b"1"}


@pytest.mark.parametrize(
    ("members", "names", "message"),
    [
        ({"a.jpg": b"", "b.jpg": b"", "b.cls": b"1"}, None, "0.tar has the image 'a.jpg' without a label; add 'a.cls'"),
        ({**GOOD, "c.cls": b"1"}, None, "0.tar has the label 'c.cls' without an image; add 'c.jpg'"),
        (
            {**GOOD, "c.2024.jpg": b"", "c.2024.cls": b"1"},
            None,
            "0.tar has the label 'c.2024.cls', but keys end at the first dot of a name: rename it and its image",
        ),
        ({**GOOD, "a.jpg#": b""}, None, "0.tar has two images of the key 'a'; keys must differ"),
        ({**GOOD, "a.png": b""}, None, "0.tar has two images of the key 'a'; keys must differ"),
        ({**GOOD, "a.cls#": b"1"}, None, "0.tar has two labels of the key 'a'; keys must differ"),
        ({**GOOD, "a.cls": b" "}, None, "The label 'a.cls' of shard .*0.tar is empty or too long"),
        ({**GOOD, "a.cls": b"0" * 2000}, None, "The label 'a.cls' of shard .*0.tar is empty or too long"),
        ({**GOOD, "a.cls": b"7"}, None, "A label in .* says 7, but there are 2 images; correct it"),
        ({**GOOD, "a.cls": b"2"}, "x\ny", "A label in .* says '2', but .*classes.txt names 2 classes; correct one"),
        ({**GOOD, "a.cls": b"fox"}, "x\ny", "A label in .* says '1', but .*classes.txt names 2 classes; correct one"),
        (GOOD, "x\ny\nz", "Class 'z' has no images in "),
        (GOOD, "x\nx", "classes.txt has the class 'x' twice; each name stands for one number"),
        ({"readme.txt": b""}, None, "The shards in .* hold no images; they need KEY.jpg beside KEY.cls"),
    ],
)
def test_errors_of_shards(tmp_path: Path, members: dict[str, bytes], names: str | None, message: str) -> None:
    pack(tmp_path / "0.tar", members)
    if names is not None:
        (tmp_path / "classes.txt").write_text(names)
    with pytest.raises(DataError, match=message) as caught:
        open_files("shards", tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_and_missing_shards(shards: Path) -> None:
    path = shards / "train" / "000001.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as shard:
        last = shard.getmembers()[-2].offset  # what is cut off before it misses nothing but its end
    for content in (whole[: len(whole) // 2], whole[:last], b"no tar file" * 100, whole[:700], b""):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"000001.tar is damaged, compressed or no tar file .*; copy or pack it anew"
        ):
            open_files("shards", shards)
    for path in (shards / "train").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"train holds no shards; the data set needs train/\*.tar \(KEY.jpg beside"):
        open_files("shards", shards)


def test_the_same_shard_in_both_splits(shards: Path) -> None:
    for path in (shards / "train").glob("*.tar"):
        shutil.copy(path, shards / "val" / path.name)
    with pytest.raises(DataError, match=r"000000.tar/00000000.jpg \(and 11 more\) is in .*val too"):
        open_files("shards", shards)


def test_writing_shards(folder: Path, shards: Path, tmp_path: Path) -> None:
    splits = open_files("folder", folder)
    with pytest.raises(DataError, match="is not empty; give another folder"):
        write_shards(splits, shards)
    with pytest.raises(ConfigError, match="A shard of 0 images"):
        write_shards(splits, tmp_path / "x", images=0)
    for name in (" cat", "cat\n", "c\nat", "c\x1cat"):
        odd = FileSplits(replace(splits.train, classes=(name, *CLASSES[1:])), None)
        with pytest.raises(DataError, match=r"The class '.*' has a line break, or space at an end, .*; rename it"):
            write_shards(odd, tmp_path / "odd")
        assert not (tmp_path / "odd").exists()
    missing = folder / "train" / "cat" / "train000.jpg"
    missing.unlink()
    with pytest.raises(DataError, match=r"Cannot read .*train000.jpg: No such file"):
        write_shards(splits, tmp_path / "y")
    assert not (tmp_path / "y" / "classes.txt").exists()
    assert np.array_equal(splits.train.select(torch.tensor([1])).indices, [1])
