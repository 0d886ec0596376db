"""The trained networks that come with abste are those of the runs in results/."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import abste
from abste import zoo
from abste.errors import ConfigError

RESULTS = Path(__file__).resolve().parents[1] / "results"


def test_it_has_resnet20_in_both_precisions() -> None:
    assert {"cifar10-resnet20-w1a1", "cifar10-resnet20-w1a32"} <= set(zoo.available())


@pytest.mark.parametrize("entry", zoo.entries(), ids=lambda entry: entry.name)
def test_an_entry_says_what_the_summary_of_its_run_says(entry: zoo.Entry) -> None:
    summary = json.loads((RESULTS / entry.name / "summary.json").read_text())
    recipe, git = summary["recipe"], summary["git"]
    assert entry.accuracy == summary["test"]["accuracy"]
    assert (entry.epochs, entry.seed) == (recipe["train"]["epochs"], recipe["train"]["seed"])
    assert entry.dataset == recipe["data"]["name"]
    assert entry.commit == git["commit"] + (" and changes" if git["modified"] else "")
    assert entry.file_bytes == zoo.resolve(f"zoo:{entry.name}").stat().st_size <= 3_000_000


@pytest.mark.parametrize("name", zoo.available())
def test_a_file_holds_the_weights_of_its_run(name: str) -> None:
    from abste.deploy.runs import verify_run

    checks = verify_run(RESULTS / name, f"zoo:{name}")
    assert len(checks) == 2
    assert all(check.passed for check in checks), "\n".join(map(str, checks))


def test_load_takes_a_name_of_the_zoo() -> None:
    network = abste.load("zoo:cifar10-resnet20-w1a1")
    assert network.classes is not None
    assert "ship" in network.classes


def test_a_name_that_is_not_there_gets_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no network 'cifar10-resnet20-w1a2' in the zoo; did you mean 'cifar10-"):
        abste.load("zoo:cifar10-resnet20-w1a2")


def test_the_zoo_needs_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; import abste.zoo, abste; "
        "print([entry.name for entry in abste.zoo.entries()]); abste.load('zoo:cifar10-resnet20-w1a32')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "cifar10-resnet20-w1a32" in done.stdout


def test_the_command_lists_every_network() -> None:
    done = subprocess.run([sys.executable, "-m", "abste", "zoo"], capture_output=True, text=True, check=True)
    for entry in zoo.entries():
        assert entry.name in done.stdout
        assert f"{entry.accuracy:.2%}" in done.stdout
    assert done.stderr == ""
