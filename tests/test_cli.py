from __future__ import annotations

import errno
import io
import os
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abste.cli import main
from abste.train.progress import Progress
from abste.train.recipe import builtin_recipes, load_recipe

TINY = ["--threads", "1", "--set", "model.kwargs.width=4", "train.epochs=1"]
DIGITS = "digits-resnet8-w1a32"


def python(code: str, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *flags, "-c", code], capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("command", ["recipes", f"recipes {DIGITS}", "--help", "train --help", "--version"])
def test_what_needs_no_torch_imports_none(command: str) -> None:
    code = (
        f"import sys\nsys.path[:0] = {sys.path!r}\nfrom abste.cli import main\n"
        f"try:\n    main({command.split()!r})\nexcept SystemExit:\n    pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_base_install(repo_root: Path) -> None:
    # -I -S: no site-packages, as if only abste itself were installed.
    start = f"import sys\nsys.path.insert(0, {str(repo_root / 'src')!r})\nfrom abste.cli import main\n"
    for command in (["quickstart"], ["eval", "x"], ["recipes"], ["train", DIGITS, "--out", "x"]):
        done = python(f"{start}sys.exit(main({command!r}))", "-I", "-S")
        assert done.returncode == 2
        assert re.fullmatch(r"abste: error: [^\n]*pip install [\"']abste\[train\][\"'][^\n]*\n", done.stderr), (
            done.stderr
        )
    assert python(f"{start}main(['--help'])", "-I", "-S").returncode == 0


def test_help_shows_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    text = capsys.readouterr().out
    assert "abste train cifar10-resnet20-w1a32 --data data --out runs/r20 --resume" in text


@pytest.mark.parametrize("columns", [80, 120, 300])
def test_recipes(columns: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["recipes"]) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= min(columns, 120)
    listed, published = text.split("\n\n")
    assert [line.split()[0] for line in listed.splitlines() if line[0] != " "] == list(builtin_recipes())
    words = " ".join(listed.split())
    assert all(f"{name} {load_recipe(name).description}" in words for name in builtin_recipes())
    assert "ReSTE 92.63" in published and published.endswith("epochs and sources of these numbers.\n")


def test_one_recipe(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["recipes", "cifar10-resnet20-w1a1"]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# Published for ResNet-20 Bi-Real, W1A1, on CIFAR-10")
    (tmp_path / "mine.toml").write_text(text)
    assert load_recipe(tmp_path / "mine.toml") == load_recipe("cifar10-resnet20-w1a1")
    assert main(["recipes", DIGITS]) == 0
    assert capsys.readouterr().out == load_recipe(DIGITS).to_toml()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "nope", "--out", "r"], "unknown recipe 'nope'; "),
        (["train", DIGITS, "--out", "r", "--set", "optimizer.lrr=1"], "unknown key 'optimizer.lrr'; did you mean"),
        (["train", DIGITS, "--out", "r", "--seed", "-1"], "'train.seed' must be at least 0, not -1."),
        (["train", DIGITS, "--out", "r", "--precision", "fp8"], "'train.precision' must be '32-true'"),
        (["train", DIGITS, "--out", "r", "--resume"], "there is no run to resume in r"),
        (["train", "cifar10-resnet20-float", "--out", "r"], "'cifar10' needs a folder"),
        (["train", DIGITS, "--out", "r", "--accelerator", "abacus"], "these devices cannot be used: "),
        (["train", DIGITS, "--out", "r", "--accelerator", "tpu"], "these devices cannot be used: "),
        (["eval", "r", "--device", "abacus"], "device 'abacus' cannot be used: "),
        (["eval", "r", "--device", "meta"], "device 'meta' cannot be used: "),
        (["eval", "r", "--device", "cuda:99"], "device 'cuda:99' cannot be used: "),
        (["eval", "r"], "r holds no run of abste"),
        (["summary", "nope"], "unknown recipe 'nope'"),
        (["summary", "."], "holds no run of abste"),
        (["summary", ".", "--set", "train.epochs=1"], "--set changes recipes, not runs"),
    ],
)
def test_errors_are_one_sentence(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("abste: error: ") and message in captured.err
    assert captured.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "train X --out r --epochs 30",
            "unrecognized arguments: --epochs 30; that is a key of recipes: --set train.epochs=30",
        ),
        ("train X --out r --batch-size=64", "--batch-size=64; that is a key of recipes: --set train.batch_size=64"),
        ("quickstart --lr", "unrecognized arguments: --lr; that is a key of recipes: --set optimizer.lr=..."),
        ("train X --out r --foo 1", "unrecognized arguments: --foo 1"),
        ("eval r --epochs 30", "unrecognized arguments: --epochs 30"),
        ("zoo a b", "unrecognized arguments: a b"),
    ],
)
def test_unknown_arguments(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command's own usage, and the way to a key of recipes."""
    with pytest.raises(SystemExit, match="2"):
        main(line.split())
    captured = capsys.readouterr().err
    assert captured.startswith(f"usage: abste {line.split()[0]} [-h]") and captured.endswith(f"{message}\n")


def test_train_stop_resume_eval_summary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", DIGITS, "--out", "my runs/a", *TINY, "--seed", "3", "--max-minutes", "0"]) == 0
    text = capsys.readouterr().out
    assert "stopped by max_minutes after 1 of 22 steps" in text
    command = shlex.split(text.split("resume with: ")[1])
    assert command[0] == "abste" and main(command[1:]) == 0
    text = capsys.readouterr().out
    accuracy = re.search(r"^test accuracy (\d+\.\d+%), .*last epoch, 355 images, float32", text, re.MULTILINE)
    assert accuracy is not None
    assert main(["eval", "my runs/a"]) == 0
    assert capsys.readouterr().out.startswith(f"test accuracy {accuracy[1]}, loss ")
    assert main(["eval", "my runs/a", "--recalibrate"]) == 0
    assert "batch norm recalibrated" in capsys.readouterr().out.splitlines()[1]
    assert main(["eval", "my runs/a", "--averaged"]) == 2
    assert "no section [average]" in capsys.readouterr().err
    assert main(["summary", "my runs/a"]) == 0
    assert "times smaller" in capsys.readouterr().out
    assert main(["train", DIGITS, "--out", "my runs/a", *TINY]) == 2
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err


def test_report(repo_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    runs = [str(repo_root / "results" / f"cifar10-resnet20-{name}") for name in ("float", "w1a32")]
    assert main(["report", *runs, "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"wrote {page}: cifar10-resnet20-float, cifar10-resnet20-w1a32\n"
    assert "cifar10-resnet20-w1a32" in page.read_text(encoding="utf-8")
    assert main(["report", str(tmp_path / "nowhere"), "--out", str(page)]) == 2
    assert capsys.readouterr().err == f"abste: error: there is no directory {tmp_path / 'nowhere'}.\n"


def test_summary_of_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["summary", "cifar10-resnet20-w1a1", "--set", "model.kwargs.width=4"]) == 0
    text = capsys.readouterr().out
    assert "W1 ab_tanh, A1 ab_tanh" in text and "first layer" in text and "times smaller" in text


def test_quickstart(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for expected in ("runs/quickstart", "runs/quickstart-2"):
        assert main(["quickstart", "--set", *TINY[3:], "train.threads=1"]) == 0
        text = capsys.readouterr().out
        assert (tmp_path / expected / "summary.json").exists()
        assert "6 of 8 layers binarised" in text and "times smaller" in text
        assert f"abste eval {expected}" in text and "cifar10-resnet20-w1a32" in text
        first, again = re.findall(r"(?:^test accuracy|safetensors:) (\d+\.\d+%)", text, re.MULTILINE)
        assert first == again


def test_python_m_abste() -> None:
    done = subprocess.run([sys.executable, "-m", "abste", "--version"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("abste ")


def test_a_lost_output_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["train", DIGITS, "--out", str(tmp_path / "r"), *TINY]) == 1
    assert (tmp_path / "r" / "summary.json").exists() and capsys.readouterr().err == ""


@pytest.mark.parametrize("live", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), ValueError("I/O operation on closed file")])
def test_progress_ends_where_nobody_can_read_it(error: Exception, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    class Lost(io.StringIO):
        def write(self, text: str) -> int:
            raise error

        def isatty(self) -> bool:
            return live

    closed = io.StringIO()
    closed.close()
    monkeypatch.setattr(sys, "stdout", None)
    for progress in (Progress(stream=Lost(), every=0.0), Progress(stream=closed, every=0.0), Progress(every=0.0)):
        progress.status("one")
        progress.line("two")
        assert not progress.enabled


def close_output() -> None:
    os.close(1)


def fill_output() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))


@pytest.mark.parametrize(
    ("spoil", "status", "message"),
    [(close_output, 0, ""), (fill_output, 2, "abste: error: cannot write to standard output: File too large.\n")],
)
def test_commands_without_output(tmp_path: Path, spoil: Callable[[], None], status: int, message: str) -> None:
    with open(tmp_path / "out", "wb") as out:
        done = subprocess.run(
            [sys.executable, "-B", "-m", "abste", "recipes"],
            stdout=out,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            preexec_fn=spoil,
        )
    assert (done.returncode, done.stderr) == (status, message)
