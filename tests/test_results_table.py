from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def _run(repo_root: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    script = repo_root / "benchmarks" / "results_table.py"
    return subprocess.run([sys.executable, script, *map(str, arguments)], capture_output=True, text=True)


def _summary(network: str, accuracy: float, binarize: dict[str, Any] | None) -> dict[str, Any]:
    recipe: dict[str, Any] = {"data": {"name": "cifar10"}, "model": {"name": network}, "train": {"seed": 3}}
    if binarize:
        recipe["binarize"] = binarize
    return {
        "recipe": recipe,
        "test": {"accuracy": accuracy},
        "cost": {"epochs": 30, "seconds": 1810.0},
        "git": {"commit": "0123456789abcdef", "modified": False},
        "environment": {
            "cpu": "a processor",
            "threads": 2,
            "abste": "1",
            "python": "3",
            "torch": "2",
            "lightning-fabric": "2.5",
        },
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    runs = {
        "a-w1a1": _summary("resnet20_bireal", 0.8123, {"weights": "ab_tanh", "activations": {"name": "ste", "t": 1.0}}),
        "b-w1a32": _summary("resnet20", 0.89, {"weights": "ab_tanh"}),
        "c-float": _summary("resnet20", 0.912, None),
    }
    runs["d-held-out"] = {**runs["c-float"], "held_out": runs["c-float"]["test"]}
    del runs["d-held-out"]["test"]
    for name, summary in runs.items():
        (tmp_path / "results" / name).mkdir(parents=True)
        (tmp_path / "results" / name / "summary.json").write_text(json.dumps(summary))
    (tmp_path / "README.md").write_text("above\n<!-- results:begin -->\nold\n<!-- results:end -->\nbelow\n")
    return tmp_path


def test_readme_is_up_to_date(repo_root: Path) -> None:
    done = _run(repo_root, "--check")
    assert done.returncode == 0, done.stderr


def test_ablations_are_up_to_date(repo_root: Path) -> None:
    folders = [readme.parent for readme in (repo_root / "results" / "ablations").glob("*/README.md")]
    assert folders
    for folder in folders:
        done = _run(repo_root, "--held-out", "--results", folder, "--check")
        assert done.returncode == 0, done.stderr


def test_table_of_some_runs(repo_root: Path, folder: Path) -> None:
    arguments = ("--results", folder / "results", "--readme", folder / "README.md")
    assert _run(repo_root, *arguments, "--check").returncode == 1
    assert (folder / "README.md").read_text().splitlines()[2] == "old"
    assert _run(repo_root, *arguments).returncode == 0
    assert _run(repo_root, *arguments, "--check").returncode == 0
    lines = (folder / "README.md").read_text().splitlines()
    assert (lines[0], lines[-1]) == ("above", "below")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| [")]
    expected = [
        ["[c-float](results/c-float)", "resnet20", "32/32", "none (float)", "30", "3", "91.20", "90.5"],
        ["[b-w1a32](results/b-w1a32)", "resnet20", "1/32", "`ab_tanh`", "30", "3", "89.00", "88.5"],
        [
            "[a-w1a1](results/a-w1a1)",
            "resnet20_bireal",
            "1/1",
            "W `ab_tanh`, A `ste` (t=1.0)",
            "30",
            "3",
            "81.23",
            "81.0",
        ],
    ]
    assert [row[:8] for row in rows] == expected
    assert all(row[8:] == ["30", "1", "`0123456789`"] for row in rows)
    assert "Machine 1: 2 threads of a processor; abste 1, python 3, torch 2, lightning-fabric 2.5." in lines


def test_readme_without_markers(repo_root: Path, folder: Path) -> None:
    (folder / "README.md").write_text("nothing\n")
    done = _run(repo_root, "--results", folder / "results", "--readme", folder / "README.md")
    assert done.returncode == 1
    assert "README.md has no" in done.stderr
