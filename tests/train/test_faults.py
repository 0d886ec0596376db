"""Real processes, killed, interrupted and starved of disk space."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abste.cli import main
from abste.errors import RunError
from abste.train import Recipe, fit, load_run

Tiny = Callable[..., Recipe]

# A checkpoint after every step, so that a kill at a random moment often hits a write.
BUSY = ["train.checkpoint_minutes=1e-5", "average.decay=0.9"]


@pytest.fixture(scope="module")
def expected(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory, outcome: Any) -> tuple[Path, Any]:
    """The recipe's file and what an undisturbed run computes."""
    folder = tmp_path_factory.mktemp("undisturbed")
    recipe = tiny(*BUSY)
    (folder / "recipe.toml").write_text(recipe.to_toml())
    fit(recipe, None, folder / "run", progress=False)
    return folder / "recipe.toml", outcome(folder / "run")


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float run of the same network."""
    out = tmp_path_factory.mktemp("trained") / "run"
    fit(tiny("binarize=none", "train.epochs=1"), None, out, progress=False)
    return out


def wait_for(condition: Callable[[], bool], child: Any, seconds: float = 60) -> bool:
    """Watch closely until ``condition``; False where the process ended first."""
    end = time.monotonic() + seconds
    while not condition():
        if not child.process.is_alive():
            return False
        assert time.monotonic() < end, child.output
    return True


def logged(out: Path) -> int:
    """How far a run is: lines of metrics, 16 in all. A clock would tell nothing on a busy machine."""
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def kill_and_compare(
    abste: Any, outcome: Any, expected: Any, out: Path, kills: int, during_write: bool, seed: int = 0
) -> int:
    """Kill a run again and again, finish it, compare; gives how many kills left half a file behind."""
    recipe, result = expected
    choose = random.Random(seed)
    halves = 0
    for _ in range(kills):
        resume = ["--resume"] if (out / "recipe.toml").exists() else []
        goal = logged(out) + choose.randint(0, 3)
        child = abste("train", recipe, "--out", out, *resume)
        if wait_for(lambda goal=goal: (out / "recipe.toml").exists() and logged(out) >= goal, child):  # type: ignore[misc]
            time.sleep(choose.uniform(0, 0.05))
            if during_write:
                wait_for(lambda: any(path.startswith("last.ckpt.") for path in os.listdir(out)), child)
        if child.process.is_alive():
            os.kill(child.pid, signal.SIGKILL)
        child.process.join()
        halves += any(out.glob("*.tmp"))
    child = abste("train", recipe, "--out", out, "--resume")
    assert child.wait() == 0, child.output
    assert outcome(out) == result
    assert not any(out.glob("*.tmp"))
    return halves


@pytest.mark.parametrize("during_write", [False, True], ids=["any moment", "during a write"])
def test_killed_runs_end_with_the_same_bits(
    abste: Any, outcome: Any, expected: Any, tmp_path: Path, during_write: bool
) -> None:
    halves = kill_and_compare(abste, outcome, expected, tmp_path / "run", 3, during_write)
    if during_write:
        assert halves > 0  # or this tests nothing


@pytest.mark.parametrize("feature", ["init", "distill", "image_sizes"])
def test_killed_runs_that_depend_on_more(
    abste: Any, outcome: Any, tiny: Tiny, trained: Path, tmp_path: Path, feature: str
) -> None:
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    own = {
        "init": [f"init='{other}'"],
        # Random signs, since a teacher that is built again must not draw from their stream.
        "distill": [f"distill={{teacher = '{other}', alpha = 0.5}}", "binarize.weights=stochastic_sign"],
        "image_sizes": ["train.image_sizes=[[0, 4], [0.5, 8]]"],
    }[feature]
    recipe = tiny(*BUSY, *own, "train.epochs=2")
    (tmp_path / "recipe.toml").write_text(recipe.to_toml())
    fit(recipe, None, tmp_path / "undisturbed", progress=False)
    expected = tmp_path / "recipe.toml", outcome(tmp_path / "undisturbed")
    out = tmp_path / "run"
    if feature == "init":  # no more than the first checkpoint is needed to go on without the other run
        child = abste("train", expected[0], "--out", out)
        assert wait_for((out / "last.ckpt").exists, child)
        os.kill(child.pid, signal.SIGKILL)
        child.process.join()
        shutil.rmtree(other)
    kill_and_compare(abste, outcome, expected, out, 2, False)


@pytest.mark.slow
@pytest.mark.parametrize("during_write", [False, True], ids=["any moment", "during a write"])
def test_runs_killed_many_times(abste: Any, outcome: Any, expected: Any, tmp_path: Path, during_write: bool) -> None:
    halves = 0
    for seed in range(1, 6):
        halves += kill_and_compare(abste, outcome, expected, tmp_path / f"run{seed}", 4, during_write, seed)
    assert halves > 0 or not during_write


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_cleanly(abste: Any, outcome: Any, expected: Any, tmp_path: Path, number: signal.Signals) -> None:
    recipe, result = expected
    out = tmp_path / "run"
    child = abste("train", recipe, "--out", out)
    assert wait_for(lambda: logged(out) >= 3, child)
    os.kill(child.pid, number)
    assert child.wait() == 128 + number, child.output
    assert f"stopped by {number.name} after" in child.output
    assert "Traceback" not in child.output
    command = child.output.split("resume with: abste ")[1].splitlines()[0]
    assert abste(*shlex.split(command)).wait() == 0
    assert outcome(out) == result


def test_a_full_disk(abste: Any, outcome: Any, expected: Any, tmp_path: Path) -> None:
    recipe, result = expected
    out = tmp_path / "never"
    child = abste("train", recipe, "--out", out, largest_file=20_000)
    assert child.wait() == 2, child.output
    assert child.output.count("abste: error: cannot write") == 1 and "Traceback" not in child.output
    assert not any(out.glob("*.tmp")) and not (out / "last.ckpt").exists()

    out = tmp_path / "run"
    assert abste("train", recipe, "--out", out, "--max-steps", "5").wait() == 0
    before = (out / "last.ckpt").read_bytes()
    child = abste("train", recipe, "--out", out, "--resume", largest_file=len(before) // 2)
    assert child.wait() == 2, child.output
    assert "last.ckpt: File too large; free some space and continue with --resume" in child.output
    assert (out / "last.ckpt").read_bytes() == before
    assert not any(out.glob("*.tmp"))
    load_run(out)
    assert abste("train", recipe, "--out", out, "--resume").wait() == 0
    assert outcome(out) == result


def test_a_directory_in_use(abste: Any, expected: Any, tiny: Tiny, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "run"
    child = abste("train", expected[0], "--out", out, "--set", "train.epochs=100")
    assert wait_for((out / "last.ckpt").exists, child)
    with pytest.raises(RunError, match="is in use by another process; wait for it to end, or choose another --out"):
        fit(tiny(*BUSY), None, out, resume=True)
    assert main(["train", str(expected[0]), "--out", str(out)]) == 2
    assert "is in use" in capsys.readouterr().err
    os.kill(child.pid, signal.SIGKILL)
    child.process.join()
    # The lock went with the process.
    again = abste("train", expected[0], "--out", out, "--set", "train.epochs=100", "--resume", "--max-steps", "1")
    assert again.wait() == 0, again.output
