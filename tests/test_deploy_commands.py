"""export, inspect, verify and predict, as a user types them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import abste
from abste.cli import main
from abste.data import load
from abste.deploy import format as abste_format
from abste.deploy.graph import Op
from abste.train import load_recipe


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run on the embedded digits, and digits.abste beside it."""
    folder = tmp_path_factory.mktemp("deploy")
    tiny = ["--threads", "1", "--set", "model.kwargs.width=4", "train.epochs=2"]
    assert main(["train", "digits-resnet8-w1a32", "--out", str(folder / "run"), *tiny]) == 0
    assert main(["export", str(folder / "run"), str(folder / "digits.abste")]) == 0
    return folder


@pytest.fixture
def folder(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, as the working directory."""
    shutil.copytree(run, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


def test_export(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "run", "again.abste"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^conv1 .* float +first layer$", text, re.MULTILINE)
    assert re.search(r"^layer1.0.conv1 .* sign_conv$", text, re.MULTILINE)
    assert "passed on 64 images: Gaussian noise" in text and "passed on 355 images: all of the 355 test images" in text
    accuracy = re.search(r"accuracy +PyTorch (\S+%), packed (\S+%)", text)
    assert accuracy is not None and accuracy[1] == accuracy[2]
    assert text.endswith("wrote again.abste\n") and "times smaller than the float32 state dict" in text
    assert (folder / "again.abste").read_bytes() == (folder / "digits.abste").read_bytes()
    assert main(["export", "run", "half.abste", "--float16", "--description", "reads digits"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"half precision .* accuracy \S+% before, \S+% after \(.* test images of digits\)", text)
    metadata = abste.load("half.abste").metadata
    assert metadata["float16"] is True and metadata["description"] == "reads digits"
    assert abste.load("again.abste").metadata["description"] == load_recipe("digits-resnet8-w1a32").description
    assert main(["verify", "run", "half.abste"]) == 0


def test_inspect(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "digits.abste"]) == 0
    text = capsys.readouterr().out
    net = abste.load("digits.abste")
    assert f"{net.file_bytes:,} bytes" in text and f"{net.arena_bytes:,} bytes of working memory" in text
    assert re.search(rf"kernels +{net.isa}, with {net.packed_bytes:,} bytes", text)
    assert "classes" in text and re.search(r"MACs +[\d,]+ with 1-bit weights", text)
    assert len([line for line in text.splitlines() if "sign_conv" in line]) == 6


def test_verify_finds_one_flipped_bit(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "run", "digits.abste"]) == 0
    text = capsys.readouterr().out
    assert "constants of the file are those of the model" in text and "all of the 355 test images of digits" in text
    assert main(["verify", "run", "digits.abste", "--images", "50", "--int8", "all"]) == 0
    told = re.search(
        r"int8='all' changes logits by at most (.*) of the largest, and the most likely class in (\d+) of 50 images; "
        r"accuracy .*% before, .*% after",
        capsys.readouterr().out,
    )
    assert told and 0 < float(told[1]) < 0.1 and int(told[2]) <= 2
    graph = abste_format.read((folder / "digits.abste").read_bytes())
    graph.metadata = ["float16"]  # type: ignore[assignment]  # what another program may have written
    (folder / "listed.abste").write_bytes(abste_format.write(graph))
    assert main(["verify", "run", "listed.abste", "--images", "10"]) == 0
    capsys.readouterr()
    node = next(node for node in graph.nodes if node.op is Op.SIGN_CONV)
    assert node.weight is not None
    node.weight[0, 0, 0, 0] ^= True
    (folder / "flipped.abste").write_bytes(abste_format.write(graph))
    assert main(["verify", "run", "flipped.abste", "--images", "10"]) == 1
    text = capsys.readouterr().out
    assert "FAILED" in text and "layer1.0.conv1, weight: 1 of" in text and "the first 10 of the 355" in text


def test_predict(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, test = load("digits")
    images = test.images[:5]
    for number, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(f"{number}.png")
    model, net = abste.load_run("run"), abste.load("digits.abste")
    assert net.normalization is not None
    mean, std = (torch.from_numpy(numbers).view(-1, 1, 1) for numbers in net.normalization)
    for number, image in enumerate(images):
        wanted = model((image[None] / 255 - mean) / std)
        assert main(["predict", "digits.abste", f"{number}.png", "--top", "1"]) == 0
        name, probability = capsys.readouterr().out.split()
        assert name == test.classes[int(wanted.argmax())]
        assert float(probability.rstrip("%")) == pytest.approx(100 * float(wanted.detach().softmax(1).max()), abs=0.006)
    Image.new("RGB", (30, 50), "white").save("large.jpg")
    assert main(["predict", "digits.abste", "large.jpg", "0.png"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "large.jpg:" and lines[4] == "0.png:" and len(lines) == 8
    (folder / "bad.png").write_bytes(b"no image")
    assert main(["predict", "digits.abste", "missing.png", "0.png", "bad.png", "1.png", "--top", "1"]) == 2
    captured = capsys.readouterr()
    assert captured.out.splitlines()[::2] == ["0.png:", "1.png:"] and len(captured.out.splitlines()) == 4
    assert re.fullmatch(
        r"abste: error: cannot read missing\.png: .*\nabste: error: cannot read bad\.png: .*\n", captured.err
    )
    graph = abste_format.read((folder / "digits.abste").read_bytes())
    graph.classes = tuple(f"\x1b[31m{name}\N{SNOWMAN}" for name in net.classes or ())
    (folder / "odd.abste").write_bytes(abste_format.write(graph))
    for command in (["predict", "odd.abste", "0.png"], ["inspect", "odd.abste"]):
        done = subprocess.run(  # a name that a terminal would obey, in letters that the output has not
            [sys.executable, "-m", "abste", *command],
            capture_output=True,
            env={**os.environ, "PYTHONIOENCODING": "ascii"},
        )
        assert done.returncode == 0 and b"\\ufffd[31m" in done.stdout and b"\\u2603" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["export", "nothing", "x.abste"], "nothing holds no run of abste"),
        (["export", "run", "no/where.abste"], "cannot write"),
        (["export", "run", "."], "cannot write .: what is there is no regular file; give another path"),
        (["export", "run", ""], "cannot write .: what is there is no regular file; give another path"),
        (["export", "run", "empty/x.abste"], "cannot write empty/x.abste: Not a directory"),
        (["export", "run", "zoo:mine"], "zoo:mine is the name of a network of the zoo, which is read only; give"),
        (["inspect", "missing.abste"], "cannot load missing.abste: No such file"),
        (["inspect", "run/recipe.toml"], "recipe.toml: this is not an .abste file"),
        (["inspect", "empty"], "cannot load empty: it is empty"),
        (["inspect", "cut.abste"], "cut.abste: this .abste file is not whole"),
        (["inspect", "bit.abste"], "bit.abste: this .abste file is damaged"),
        (["verify", "run", "missing.abste"], "cannot read missing.abste: No such file"),
        (["verify", "run", "bit.abste"], "damaged"),
        (["verify", "run", "digits.abste", "--images", "0"], "must be at least 1, not 0"),
        (["predict", "digits.abste", "missing.png"], "cannot read missing.png: No such file"),
        (["predict", "digits.abste", "run/recipe.toml"], "it is damaged, or no image that Pillow reads"),
        (["predict", "digits.abste", "a.png", "--top", "0"], "--top must be at least 1, not 0"),
        *[
            (["predict", "digits.abste", name], f"cannot read {name}: it has more than eight bits per channel")
            for name in ("deep.png", "wide.tif", "float.tif")
        ],
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = (folder / "digits.abste").read_bytes()
    (folder / "empty").write_bytes(b"")
    (folder / "cut.abste").write_bytes(whole[:-100])
    (folder / "bit.abste").write_bytes(whole[:200] + bytes([whole[200] ^ 4]) + whole[201:])
    Image.fromarray(np.full((8, 8), 300, np.uint16)).save("deep.png")
    Image.fromarray(np.full((8, 8), 300, np.int32)).save("wide.tif")
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save("float.tif")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("abste: error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert (folder / "digits.abste").read_bytes() == whole and not (folder / "x.abste").exists()


def test_a_file_of_another_run(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--threads", "1", "--set", "model.kwargs.width=4", "train.epochs=1"]
    assert main(["train", "digits-resnet8-w1a32", "--out", "other", *tiny]) == 0
    assert main(["verify", "other", "digits.abste"]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_a_file_of_another_network(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = ["--threads", "1", "--set", "model.kwargs.width=6", "train.epochs=1"]
    assert main(["train", "digits-resnet8-w1a32", "--out", "wide", *tiny]) == 0
    capsys.readouterr()
    for more in ([], ["--int8", "all"]):
        assert main(["verify", "wide", "digits.abste", *more]) == 1
        text = capsys.readouterr().out
        assert "FAILED: the file is of another network than the model, and there differ\n" in text
        assert "layer1.0.conv1, weight: (4, 4, 3, 3) in the file, (6, 6, 3, 3) in the model\n" in text
        assert "add --data" not in text


@pytest.mark.parametrize(
    ("file", "content", "commands", "message"),
    [
        ("data.json", "{}", ["eval", "export", "verify"], "classes: it is missing"),
        ("data.json", "[]", ["eval", "export"], "[] is of the wrong type"),
        ("data.json", '{"classes": "abc", "mean": [0], "std": [1]}', ["eval", "export"], 'classes: "abc" is of the'),
        ("data.json", '{"classes": ["a"], "mean": [0], "std": [1]}', ["eval", "export"], "it has 1 classes, but"),
        ("summary.json", "{}", ["eval", "export", "resume"], "finished: it is missing"),
        ("summary.json", "[]", ["eval", "export", "resume"], "[] is of the wrong type"),
        (
            "summary.json",
            '{"finished": true, "cost": {}}',
            ["eval", "export", "resume"],
            "cost: seconds: it is missing",
        ),
    ],
)
def test_run_files_of_the_wrong_shape(
    file: str, content: str, commands: list[str], message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "run" / file).write_text(content)
    arguments = {
        "eval": ["eval", "run"],
        "export": ["export", "run", "x.abste"],
        "verify": ["verify", "run", "digits.abste"],
        "resume": ["train", "run/recipe.toml", "--out", "run", "--resume"],
    }
    for command in commands:
        assert main(arguments[command]) == 2
        error = capsys.readouterr().err
        assert (
            error.startswith(f"abste: error: run/{file} is damaged: ") and message in error and error.count("\n") == 1
        )


def test_predict_without_pillow(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert main(["predict", "digits.abste", "0.png"]) == 2
    assert capsys.readouterr().err.endswith("install it with: pip install 'abste[image]'\n")
