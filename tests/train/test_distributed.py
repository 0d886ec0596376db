"""Two processes over gloo, on one machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abste.train import Recipe, evaluate, fit

Tiny = Callable[..., Recipe]


@pytest.fixture(scope="module")
def recipe(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "two.toml"
    # The equilibrium measures in all processes, the learned blend has a gradient of its own.
    path.write_text(
        tiny(
            "average.decay=0.9",
            'binarize.weights={name = "ab_tanh", blend = "equilibrium"}',
            'binarize.activations={name = "ab_tanh", blend = "learned"}',
        ).to_toml()
    )
    return path


def test_two_processes(pair: Any, outcome: Any, recipe: Path, tmp_path: Path) -> None:
    for child in pair(recipe, "--out", tmp_path / "a"):
        assert child.wait() == 0, child.output
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert summary["cost"]["processes"] == 2
    assert summary["cost"]["steps"] == 66 and summary["cost"]["samples"] == 66 * 64  # the batch size is global
    assert summary["test"]["images"] == 355
    assert len(list((tmp_path / "a" / "tensorboard").iterdir())) == 1  # written once
    assert len((tmp_path / "a" / "sessions.jsonl").read_text().splitlines()) == 1
    # Half of it was computed by rank 1 with rank 1's weights; the whole, here, with rank 0's.
    alone = evaluate(tmp_path / "a")
    assert alone["accuracy"] == summary["test"]["accuracy"]
    assert alone["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)

    # Started by torchrun itself, stopped, resumed: the same run.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "abste"]
    done = subprocess.run(
        [*command, "train", str(recipe), "--out", str(tmp_path / "b"), "--max-steps", "27"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stopped by max_steps after 27 of 66 steps") == 1
    assert done.stdout.count("resume with:") == 1
    for child in pair(recipe, "--out", tmp_path / "b", "--resume"):
        assert child.wait() == 0, child.output
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")


@pytest.mark.parametrize("name", ["muon", "bop", "distill"])
def test_processes_take_the_same_steps(pair: Any, outcome: Any, tiny: Tiny, tmp_path: Path, name: str) -> None:
    own = {
        "muon": ["optimizer.name=muon", "optimizer.muon_filters=true"],
        "bop": [
            *("optimizer.name=bop", "optimizer.lr=0.01", "binarize.weights=identity_ste"),
            *("binarize.standardize=false", "binarize.scale=none"),
        ],
        "distill": [f"distill.teacher='{tmp_path / 'teacher'}'", "distill.alpha=0.9"],
    }[name]
    if name == "distill":
        fit(tiny("binarize=none", "train.epochs=1"), None, tmp_path / "teacher", progress=False)
    recipe = tmp_path / "two.toml"
    recipe.write_text(tiny(*own, "train.epochs=2").to_toml())
    for out in ("a", "b"):
        stops = ["--max-steps", "27"] if out == "b" else []
        for child in pair(recipe, "--out", tmp_path / out, *stops):
            assert child.wait() == 0, child.output
    for child in pair(recipe, "--out", tmp_path / "b", "--resume"):
        assert child.wait() == 0, child.output
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    # Half of the test images were seen by rank 1 with rank 1's weights; all, here, by rank 0's.
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    alone = evaluate(tmp_path / "a")
    assert alone["accuracy"] == summary["test"]["accuracy"]
    assert alone["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-5)


def test_all_processes_stop_together(pair: Any, recipe: Path, tmp_path: Path) -> None:
    children = pair(recipe, "--out", tmp_path / "r", "--set", "train.epochs=200")
    while not (tmp_path / "r" / "last.ckpt").exists():
        assert all(child.process.is_alive() for child in children), [child.output for child in children]
        time.sleep(0.05)
    os.kill(children[1].pid, signal.SIGINT)  # one of them, and not the one that writes
    for child in children:
        assert child.wait() == 130, child.output
        assert "Traceback" not in child.output
    assert children[0].output.count("resume with:") == 1 and "resume with:" not in children[1].output
    assert "stopped by SIGINT after" in children[0].output


def test_errors_end_all_processes(pair: Any, recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "mine.txt").write_text("x")
    for child in pair(recipe, "--out", tmp_path / "r"):
        assert child.wait() == 2
        assert "holds files that are no run of abste" in child.output and "Traceback" not in child.output
    for child in pair(recipe, "--out", tmp_path / "x", "--set", "train.batch_size=63"):
        assert child.wait() == 2
        assert "train.batch_size 63 cannot be shared by 2 processes; choose a multiple of 2" in child.output
    for child in pair(recipe, "--out", tmp_path / "y", "--set", "optimizer.lr=1e30"):
        assert child.wait() == 2
        assert "no longer finite at step" in child.output and "Traceback" not in child.output
