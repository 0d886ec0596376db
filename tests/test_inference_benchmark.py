"""benchmarks/inference.py: what it compares is right, and what it says follows from the figures."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abste.bench.measure import Call
from abste.runtime.network import isas
from abste.runtime.reference import run


@pytest.fixture
def scripts(repo_root: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    monkeypatch.syspath_prepend(str(repo_root / "benchmarks"))
    return importlib.import_module("inference"), importlib.import_module("_inference")


@pytest.mark.parametrize("kind", ["xnor", "fused", "sign_conv"])
@pytest.mark.parametrize(("kernel", "size"), [(3, 5), (1, 1)])
def test_chains_are_networks(scripts: tuple[Any, Any], kind: str, kernel: int, size: int) -> None:
    _, parts = scripts
    graph = parts.chain(kind, kernel, 32, size, 3)
    x = np.random.default_rng(0).normal(size=(2, *graph.values[0].torch_shape)).astype(np.float32)
    found = parts.network(graph, isas()[0])(x)
    nhwc = np.moveaxis(x, 1, -1) if size > 1 else x[:, None, None]
    wanted = run(graph, [nhwc]).values[-1]
    np.testing.assert_array_equal(np.moveaxis(found, 1, -1) if size > 1 else found[:, None, None], wanted)
    assert parts.exact_error(graph, x, found) < 1e-5
    # Kernels pack bits in, and neither signs nor sums die out on the way.
    bits = [node.bits for node in graph.nodes if node.bits is not None]
    values = run(graph, [nhwc]).values
    assert all(0.2 < values[index].mean() < 0.8 for index in bits) and len(bits) == (0 if kind == "sign_conv" else 3)
    assert 0.1 < wanted.std() < 10


def test_a_setting(scripts: tuple[Any, Any]) -> None:
    """Two shapes, with threads and without: each engine is there, is right, and has a time per layer."""
    _, parts = scripts
    for case, threads, batch, kinds in (("conv-16@6", 1, 1, 4), ("gemv-32", 1, 2, 3), ("conv-16@6", 2, 2, 4)):
        row = parts.Setting(case, threads, batch, ["torch", "torch-bf16"]).measure(0.2)
        fast = [isa for isa in isas() if isa != "scalar"] or ["scalar"]
        assert len(row["engines"]) == (kinds - 1) * len(fast) + 1 + 2 and not row["notes"]
        for name, engine in row["engines"].items():
            assert engine["median"] > 0 and engine["calls"] >= 1, name
            assert engine["error"] < (0.1 if "bf16" in name or "W1A8" in name else 1e-4)
            assert engine["form"] in engine["forms"] and engine["median"] == engine["forms"][engine["form"]]
            assert engine["error"] > 1e-4 or "W1A8" not in name
        if (threads, batch) == (1, 1):
            assert row["engines"][f"abste {fast[0]} W1A1"]["form"] == "nodes"
        json.dumps(row)


def test_calls_that_count(scripts: tuple[Any, Any]) -> None:
    _, parts = scripts
    setting = parts.Setting("resnet18-32-w1a1", 1, 1, ["none"])
    calls = [Call(float(number), 1.0 if number < 6 else 2.0) for number in range(10)]
    timed = setting.timed("engine", calls, 1.05)
    assert (timed["median"], timed["calls"], timed["rejected"], timed["contended"]) == (2.5, 6, 4, False)
    timed = setting.timed("engine", calls[3:], 1.05)  # three good ones are too few
    assert (timed["median"], timed["calls"], timed["rejected"], timed["contended"]) == (6.0, 7, 4, True)


def test_what_is_best_for_others(scripts: tuple[Any, Any]) -> None:
    _, parts = scripts
    setting = parts.Setting("conv-64@56", 1, 1, ["none"])

    def times(median: float) -> dict[str, Any]:
        return {"median": median, "low": median, "high": median, "calls": 5, "rejected": 0, "contended": False}

    best = setting.best("x", {"x/chain": times(90.0), "x/single": times(18.0)})
    assert (best["form"], best["median"]) == ("difference", 9.0) and best["forms"]["chain"] == 10
    best = setting.best("x", {"x/chain": times(90.0), "x/single": times(8.0)})
    assert (best["form"], best["median"]) == ("single", 8.0)
    best = setting.best("x", {"x/chain": times(90.0), "x/single": times(60.0)})  # 3.75 each would be noise
    assert (best["form"], best["median"]) == ("chain", 10.0)


def test_memory(scripts: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, parts = scripts
    monkeypatch.setattr(parts, "resnet", lambda case: parts.chain("xnor", 3, 3, 40, 3))
    row = parts.memory("small", ["torch"], 1)
    assert row["case"] == "memory-small" and {*row["engines"]} == {"abste", "torch"}
    for engine in row["engines"].values():
        assert 0 < engine["bytes"] < 500e6 and engine["error"] < 1e-5 and engine["file_bytes"] > 0


def engine(precision: str, median: float) -> dict[str, Any]:
    return {"precision": precision, "median": median, "contended": False}


def rows(scripts: tuple[Any, Any]) -> dict[str, dict[str, Any]]:
    main, _ = scripts
    found: dict[str, dict[str, Any]] = {}

    def add(case: str, threads: int, engines: dict[str, Any]) -> None:
        row = {"case": case, "threads": threads, "batch": 1, "engines": engines, "notes": ["x is left out: gone."]}
        found[main.key(case, threads, 1)] = row

    add(
        "conv-128@28",
        1,
        {
            "abste avx512 W1A1": engine("W1A1", 100e-6),
            "abste avx2 W1A1": engine("W1A1", 250e-6),
            "abste avx512 W1A1 fused": engine("W1A1 fused", 120e-6),
            "torch": engine("float32", 2500e-6),
            "openvino": engine("float32", 2000e-6),
            "openvino-binary": engine("binary", 90e-6),
        },
    )
    add("conv-128@16", 1, {"abste avx512 W1A1": engine("W1A1", 100e-6), "torch": engine("float32", 1600e-6)})
    add("resnet18-224-w1a1", 1, {"abste avx512 W1A1": engine("W1A1", 9e-3)})
    add("resnet18-224-w1a1", 2, {"abste avx512 W1A1": engine("W1A1", 5e-3), "torch": engine("float32", 1e-3)})
    memory = {"bytes": 0, "file_bytes": 10, "load_and_answer_seconds": 0.1}
    add(main.MEMORY, 1, {"abste": {**memory, "bytes": 10}, "onnxruntime": {**memory, "bytes": 90}})
    return found


def test_verdicts(scripts: tuple[Any, Any]) -> None:
    main, _ = scripts
    lines = main.targets_table(rows(scripts))
    assert len(lines) == 2 + len(main.TARGETS)

    def line(*parts: str) -> str:
        (found,) = [line for line in lines if all(part in line for part in parts)]
        return found

    assert line("packed in and out").endswith("| 15 | 20 | 16.00 | 128@28 20.00, 128@16 16.00 | must |")
    assert line("OpenVINO, binary", "| 1 | 1.2 |").endswith("| 0.90 |  | **below must** |")
    assert line("without them").endswith("| 1.15 | 1.03 | 1.20 |  | **below must** |")
    assert line("AVX2").endswith("| 7 | 10 | 8.00 |  | must |")
    assert line("second core").endswith("| 1.6 | 1.85 | 1.80 |  | must |")
    assert line("memory").endswith("| 8 | 12 | 9.00 |  | must |")
    contended = rows(scripts)
    contended[main.key("conv-128@16", 1, 1)]["engines"]["torch"]["contended"] = True
    assert "| 16.00~ | 128@28 20.00, 128@16 16.00~ | must |" in main.targets_table(contended)[2]
    assert line("W1A8").endswith("| 0.9 | 1 | - | | not measured |")


def test_table(scripts: tuple[Any, Any]) -> None:
    main, parts = scripts
    result = {**main.circumstances(), "rows": rows(scripts)}
    text = main.table(result)
    assert parts.RULE in text and result["machine"]["processor"] in text
    cells = "| conv-128@28 | 1 | 1 | avx512 W1A1 | 100.0 | 2,312 | 2,000 openvino (20.00x) |  |  | 90.0 (0.90x) |"
    assert cells in text
    assert "- x is left out: gone. (conv-128@28, 1 thread, batch 1; conv-128@16" in text
    assert "| onnxruntime | 0.0 | 0.00 | 100 |" in text


def test_options(repo_root: Path, tmp_path: Path) -> None:
    script = str(repo_root / "benchmarks" / "inference.py")

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)

    listed = call("--list", "--only", "conv-64@*", "gemv-1024", "--threads", "1", "--out", str(tmp_path / "x"))
    assert listed.stdout.splitlines() == [
        f"{case}, 1 thread, batch {batch}" for case in ("conv-64@56", "conv-64@32", "gemv-1024") for batch in (1, 32)
    ]
    assert call("--seconds", "0").returncode == 2
    other = {"machine": {}, "versions": {}, "rows": {"a": {}}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    foreign = call("--out", str(tmp_path / "other"))
    assert foreign.returncode == 2 and "is of another machine, or of other versions" in foreign.stderr
