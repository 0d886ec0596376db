"""Runs on folders and shards of images."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from photos import CLASSES, make_folder, noise
from PIL import Image
from torchvision.transforms import v2

import abste
from abste.cli import main
from abste.data import Batches, ImageData, describe, open_files, write_shards
from abste.deploy.runs import export_run
from abste.errors import CheckpointError, ConfigError, DataError
from abste.runtime.image import classify, read_image
from abste.train import Recipe, evaluate, fit, load_recipe
from abste.train.run import RunDirectory, load_data, resolved

SMALL = [
    "model.name=resnet8",
    "model.kwargs.width=4",
    "data.image_shape=[3,16,16]",
    "train.batch_size=6",
    "train.epochs=3",
    "train.threads=1",
    "train.log_every=3",
]
VARIED = [
    "train.epochs=10",
    "data.flip=alternating",
    "data.color_jitter=[0.4, 0.4, 0.4, 0.1]",
    "data.rand_augment=[1, 9]",
    "data.mixup=0.5",
    "data.cutmix=1.0",
    "binarize.activations=stochastic_sign",  # draws from the process's own generator
]

Make = Callable[..., Recipe]


def small(*overrides: str) -> Recipe:
    return load_recipe("finetune", [*SMALL, *overrides])


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("data") / "photos", {"train": 10, "val": 3})


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory, outcome: Any) -> Any:
    """What an undisturbed run with all that is random computes."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    fit(small(*VARIED, "data.workers=0"), photos, out, progress=False)
    return outcome(out)


def test_any_number_of_workers_and_any_stop_give_the_same_bits(
    photos: Path, expected: Any, tmp_path: Path, outcome: Any
) -> None:
    fit(small(*VARIED, "data.workers=2"), photos, tmp_path / "r", max_steps=7, progress=False)
    fit(small(*VARIED, "data.workers=1"), photos, tmp_path / "r", resume=True, max_steps=1, progress=False)
    summary = fit(small(*VARIED, "data.workers=0"), photos, tmp_path / "r", resume=True, progress=False)
    assert outcome(tmp_path / "r") == expected
    assert summary["test"]["images"] == 9 and summary["cost"]["steps"] == 50
    # Shards with the same images are the same run, whatever they are called.
    write_shards(open_files("folder", photos), tmp_path / "shards", images=7)
    fit(small(*VARIED, "data.name=shards", "data.workers=2"), tmp_path / "shards", tmp_path / "s", progress=False)
    assert outcome(tmp_path / "s") == expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_stopped_with_its_workers(
    photos: Path, expected: Any, tmp_path: Path, outcome: Any, number: signal.Signals
) -> None:
    recipe, out = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(small(*VARIED, "data.workers=2", "train.checkpoint_minutes=1e-5").to_toml())
    command = [sys.executable, "-m", "abste", "train", str(recipe), "--data", str(photos), "--out", str(out)]
    # A session of its own, so that all its processes can be sent a signal together, as a terminal or a scheduler does.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, start_new_session=True, **pipes) as process:  # type: ignore[call-overload]
        end = time.monotonic() + 300
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").stat().st_size == 0:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.01)
        if number == signal.SIGKILL:
            os.kill(process.pid, number)  # and its workers are left alone
        else:
            os.killpg(process.pid, number)
        output = process.communicate(timeout=120)[0]
    if number != signal.SIGKILL:
        assert process.returncode == 128 + number, output
        assert "Traceback" not in output and f"stopped by {number.name} after" in output
    end = time.monotonic() + 60
    with contextlib.suppress(ProcessLookupError):  # when none is left
        while True:
            os.killpg(process.pid, 0)
            assert time.monotonic() < end, "workers outlive their run"
            time.sleep(0.1)
    fit(small(*VARIED, "data.workers=0"), photos, out, resume=True, progress=False)
    assert outcome(out) == expected


def test_finetune_from_folder_to_prediction(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = make_folder(tmp_path / "photos", {"": 8})
    names = ["finetune", "--model", "resnet8", "--data", str(photos), "--out", str(tmp_path / "run")]
    settings = [setting for setting in SMALL if not setting.startswith("model.name")]
    assert main(["train", *names, "--set", *settings]) == 0
    assert "held-out accuracy" in capsys.readouterr().out
    run = RunDirectory(tmp_path / "run")
    recipe = run.read_recipe()
    assert (recipe.model.name, recipe.data.classes, recipe.data.holdout) == ("resnet8", 3, 5)
    assert recipe.binarize is not None and recipe.binarize.weights == "ab_tanh" and recipe.binarize.activations is None
    assert evaluate(run.path, photos)["images"] == 5

    # Without the images: all that a file says comes from the run.
    file = tmp_path / "mine.abste"
    shutil.move(photos, tmp_path / "moved")
    assert main(["export", str(run.path), str(file)]) == 0
    network = abste.load(file)
    assert network.classes == CLASSES and network.metadata["resize"] == 18
    assert network.normalization is not None
    assert np.allclose(network.normalization, [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)])
    assert main(["verify", str(run.path), str(file), "--data", str(tmp_path / "moved")]) == 0
    assert "all of the 5 held-out images of folder" in capsys.readouterr().out
    image = tmp_path / "moved" / "dog" / "000.jpg"
    assert main(["predict", str(file), str(image)]) == 0
    shown = {line.split()[0]: float(line.split()[1].rstrip("%")) / 100 for line in capsys.readouterr().out.splitlines()}
    # The probabilities are those of the trained network, on the image as evaluation shows it.
    steps = [v2.Resize(18), v2.CenterCrop(16), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    steps.append(v2.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        wanted = abste.load_run(run.path)(v2.Compose(steps)(Image.open(image))[None]).softmax(1)[0]
    assert shown == pytest.approx(dict(zip(CLASSES, wanted.tolist(), strict=True)), abs=1e-4)


@pytest.mark.parametrize("size", [(24, 33), (33, 24), (20, 20), (90, 41)])
def test_prediction_sees_what_evaluation_sees(tmp_path: Path, size: tuple[int, int]) -> None:
    noise(1, *size).save(tmp_path / "x.png")
    wanted = v2.Compose([v2.Resize(18), v2.CenterCrop((16, 16)), v2.PILToTensor()])(Image.open(tmp_path / "x.png"))
    found = read_image(tmp_path / "x.png", (3, 16, 16), resize=18)
    assert np.array_equal(np.rint(found * 255), wanted.numpy())


@pytest.mark.parametrize("name", ["cifar10", "imagenet", "odd"])
def test_prediction_normalises_as_evaluation_does(tmp_path: Path, name: str) -> None:
    """To the bit: binary activations make another class of a last bit."""
    known = describe("cifar10", name if name == "imagenet" else "dataset")
    assert known is not None
    mean, std = (known.mean, known.std) if name != "odd" else ((0.1234567, 0.0, 0.3333), (0.3, 1.0, 0.0123))
    pixels = torch.randint(0, 256, (8, 3, 33, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    data = ImageData(pixels, torch.zeros(8, dtype=torch.int64), ("a", "b"), mean, std, name)
    wanted, _ = next(Batches(data, 8, augment=None, seed=0, train=False).epoch(0))
    network = Seen(mean, std)
    for number, image in enumerate(pixels):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "x.png")
        classify(network, tmp_path / "x.png")  # type: ignore[arg-type]
        assert network.seen is not None and network.seen.dtype == np.float32
        assert np.array_equal(network.seen, wanted[number : number + 1].numpy())


class Seen:
    """A network that keeps its input; mean and std in float32, as files have them."""

    inputs, outputs = (SimpleNamespace(shape=(3, 33, 32)),), (SimpleNamespace(shape=(2,)),)
    metadata: Mapping[str, Any] = {}
    classes = ("a", "b")
    seen: Any = None

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.normalization = np.float32(mean), np.float32(std)

    def __call__(self, images: Any) -> Any:
        self.seen = images
        return np.zeros((1, 2), np.float32)


def test_images_that_pillow_does_not_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> Any:
        return read_image(path, (3, 12, 12))

    image = noise(1, 12, 12).quantize(8)
    image.save(tmp_path / "x.png", transparency=b"\x00\x80")  # of which Pillow warns
    assert np.array_equal(np.rint(read(tmp_path / "x.png") * 255), v2.PILToTensor()(image.convert("RGB")).numpy())
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    read(tmp_path / "x.png")  # and of this, before it is opened
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
    with pytest.raises(DataError, match=r"cannot read .*x.png: it has more than the 100 pixels that Pillow takes\.$"):
        read(tmp_path / "x.png")
    with pytest.raises(DataError, match=f"cannot read {tmp_path}: Is a directory"):
        read(tmp_path)

    def fail(file: Any) -> Any:
        raise RuntimeError("a decoder's own")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataError, match=r"x.png: it is damaged, or no image that Pillow reads"):
        read(tmp_path / "x.png")


def test_what_the_folder_decides(photos: Path, tmp_path: Path) -> None:
    with_test = resolved(small(), photos)
    assert (with_test.data.classes, with_test.data.holdout) == (3, 0)
    assert load_data(with_test, photos)[2] == "test"
    held = resolved(small("data.holdout=6"), photos)
    train, evaluation, split = load_data(held, photos)
    assert (len(train), len(evaluation), split) == (24, 6, "held_out")
    digits = load_recipe("digits-resnet8-w1a32")
    assert resolved(digits, None) is digits
    assert "workers" not in resolved(small(), photos).to_dict()["data"]
    plain = make_folder(tmp_path, {"": 2})
    assert resolved(small(), plain).data.holdout == 3  # one of each class, though a fifth would be one
    with pytest.raises(DataError, match="has no split named val or test, and only one image of each class, so none"):
        resolved(small(), make_folder(tmp_path / "one", {"": 1}))


def spoil(folder: Path) -> None:
    (folder / "train" / "cat" / "train003.jpg").write_bytes(b"")
    (folder / "val" / "dog" / "val001.jpg").write_bytes(b"")


def test_unreadable_images_in_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str], outcome: Any) -> None:
    photos = make_folder(tmp_path / "photos", {"train": 10, "val": 3})
    spoil(photos)
    with pytest.raises(DataError, match=r"Cannot read the image .*(train003|val001).jpg: .*data.on_error = 'skip'"):
        fit(small("data.workers=2"), photos, tmp_path / "r", progress=False)
    out = str(tmp_path / "r")
    # The run that stopped there goes on without them, in as many parts as it takes.
    arguments = ["train", "finetune", "--data", str(photos), "--out", out, "--resume", "--set", *SMALL]
    arguments += ["data.on_error=skip", "data.workers=0"]
    assert main([*arguments, "--max-steps", "6"]) == 0
    assert main(arguments) == 0
    assert "2 images could not be read and were left out, such as " in capsys.readouterr().out
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert summary["unreadable"]["count"] == 2 and summary["test"]["images"] == 8
    bad = {str(photos / "train" / "cat" / "train003.jpg"), str(photos / "val" / "dog" / "val001.jpg")}
    assert set(summary["unreadable"]["images"]) == bad
    assert evaluate(out, photos)["images"] == 8
    fit(small("data.on_error=skip", "data.workers=2"), photos, tmp_path / "s", progress=False)
    assert outcome(tmp_path / "s") == outcome(tmp_path / "r")


def test_other_data_than_the_run_began_with(photos: Path, tmp_path: Path) -> None:
    mine = tmp_path / "photos"
    shutil.copytree(photos, mine)
    fit(small("data.workers=0"), mine, tmp_path / "r", max_steps=2, progress=False)
    (mine / "train" / "cat" / "train000.jpg").rename(mine / "train" / "cat" / "other.jpg")
    with pytest.raises(
        CheckpointError, match=r"was begun with other images than the data set 'folder' has now; resume"
    ):
        fit(small("data.workers=0"), mine, tmp_path / "r", resume=True, progress=False)
    for split in ("train", "val"):
        (mine / split / "cat").rename(mine / split / "ant")
    with pytest.raises(CheckpointError, match="was begun with other classes"):
        fit(small("data.workers=0"), mine, tmp_path / "r", resume=True, progress=False)
    with pytest.raises(
        DataError, match=r"class 0 is 'ant' in .*, but 'cat' for run .*; give data of the run's classes"
    ):
        evaluate(tmp_path / "r", mine)
    fit(small("data.workers=0"), photos, tmp_path / "r", resume=True, progress=False)  # where it is does not matter


def test_a_hold_out_of_changed_files_is_not_evaluated_on(tmp_path: Path) -> None:
    photos = make_folder(tmp_path / "photos", {"": 8})
    fit(small("data.workers=0", "train.epochs=1"), photos, tmp_path / "r", progress=False)
    assert evaluate(tmp_path / "r", photos)["split"] == "held_out"
    for name in CLASSES:
        noise(90).save(photos / name / "!new.jpg")
    message = r"the images of .*photos are not those that run .*r began with, .* trained on some that are held out now"
    for use in (
        lambda: evaluate(tmp_path / "r", photos),
        lambda: export_run(tmp_path / "r", tmp_path / "x.abste", photos),
    ):
        with pytest.raises(DataError, match=message):
            use()
    assert not (tmp_path / "x.abste").exists()
    data = json.loads((tmp_path / "r" / "data.json").read_text())
    del data["fingerprint"]  # as of earlier versions
    (tmp_path / "r" / "data.json").write_text(json.dumps(data))
    assert evaluate(tmp_path / "r", photos)["split"] == "held_out"


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["data.classes=4"], DataError, "data set 'folder' has 3 classes, but data.classes is 4"),
        (["data.holdout=29"], DataError, "no training image of class 'cat' is left beside the 29 that data.holdout"),
        (["data.resize=8"], ConfigError, "resize is 8; give at least 16"),
        (["data.mean=[0.5]"], ConfigError, "as many means"),
        (["data.image_shape=[2,16,16]"], ConfigError, "not 2"),
        (["data.name=shards"], DataError, "holds no shards; the data set needs train/"),
        (["data.name=foldr", "data.scale=none"], ConfigError, "did you mean 'folder'"),
        (["train.batch_size=40"], ConfigError, "more than the 30 training images of 'folder'; give at most 30"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    photos: Path, tmp_path: Path, overrides: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(small(*overrides), photos, tmp_path / "r", progress=False)
    assert list(tmp_path.iterdir()) == []


def test_missing_split(tmp_path: Path) -> None:
    make_folder(tmp_path / "photos", {"train": 2})
    with pytest.raises(DataError, match=r"photos has no split named val or test; add one, or hold training images out"):
        load_data(small("data.classes=3", "data.holdout=0"), tmp_path / "photos")
    with pytest.raises(DataError, match="needs a folder; give one with train/CLASS"):
        fit(small(), None, tmp_path / "r")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.cutout=4", "'data' has cutout, which needs name = a data set in memory, not 'folder'."),
        ("data.name=digits", "'data' has scale, which needs name = 'folder' or 'shards', not 'digits'."),
        ("data.on_error=ignore", "'data.on_error' must be 'raise' or 'skip', not the string 'ignore'."),
        ("data.mixup=0", "'data.mixup' must be greater than 0, not 0."),
        ("data.color_jitter=[1]", "'data.color_jitter' must be a list of 3 values, not [1]."),
        ("data.workers=-1", "'data.workers' must be at least 0, not -1."),
    ],
)
def test_keys_of_files(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        small(override)
    assert message in str(caught.value)
