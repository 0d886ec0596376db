"""`abste bench` and what it is made of: turns, peers that are checked, one table."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abste.bench import bench, measure, peers
from abste.bench.measure import Spread
from abste.cli import main
from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan
from abste.errors import ConfigError
from abste.runtime.network import Network, isas, load


@pytest.fixture(scope="module")
def graph() -> Graph:
    """A stem, a binary layer of four fifths of the work, pooling, a classifier."""
    rng = np.random.default_rng(0)
    values = [
        Value((16, 16, 3), name="image"),
        Value((16, 16, 32)),
        Value((16, 16, 32), Kind.BITS),
        Value((16, 16, 32)),
        Value((1, 1, 32), rank=1),
        Value((1, 1, 10), rank=1, output=True, name="logits"),
    ]
    nodes = [
        Node(Op.CONV, (0,), 1, 2, "stem", rng.normal(size=(3, 3, 3, 32)).astype(np.float32), (3, 3), padding=(1,) * 4),
        Node(Op.XNOR, (2,), 3, None, "block", rng.random((32, 3, 3, 32)) < 0.5, (3, 3), padding=(1,) * 4),
        Node(Op.AVERAGE_POOL, (3,), 4, name="pool", kernel=(16, 16), stride=(16, 16)),
        Node(Op.CONV, (4,), 5, name="fc", weight=rng.normal(size=(1, 1, 32, 10)).astype(np.float32)),
    ]
    nodes[1].steps = [
        Step(StepKind.MULTIPLY, a=np.full(32, 0.1, np.float32)),
        Step(StepKind.ADD_VALUE, value=1),
        Step(StepKind.RELU),
    ]
    return plan(Graph(values, nodes))


@pytest.fixture(scope="module")
def path(graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("bench") / "net.abste"
    file.write_bytes(abste_format.write(graph))
    return file


def test_turns() -> None:
    order: list[str] = []
    readings = iter(range(1, 1000))

    def call(name: str, seconds: float) -> Any:
        def function() -> None:
            order.append(name)
            time.sleep(seconds)

        return function

    functions = {"fast": call("fast", 0.001), "slow": call("slow", 0.02)}
    calls = measure.by_turns(functions, 0.3, gauge=lambda: float(next(readings)))
    assert order[:10] == ["fast", "slow", "slow", "slow", "fast", "fast", "fast", "fast", "slow", "slow"]
    assert all(call.seconds >= 0.001 for call in calls["fast"]) and min(calls["fast"]).seconds < 0.02
    assert all(call.seconds >= 0.02 for call in calls["slow"])
    # Both have about their share of the time, in calls that last twenty times as long.
    assert len(calls["slow"]) < 8 < 2 * len(calls["slow"]) + 3 < len(calls["fast"])
    # The gauge was read before and after; the larger one counts.
    assert calls["slow"][0].gauge == 2 and calls["fast"][0].gauge == 4


def test_a_slow_one_is_called_three_times() -> None:
    calls = measure.by_turns({"slow": lambda: time.sleep(0.02)}, 0.001)
    assert len(calls["slow"]) == 3
    assert len(measure.by_turns({"slow": lambda: None}, 0.0, least=5)["slow"]) == 5
    assert measure.by_turns({}, 1.0) == {}


def test_spread() -> None:
    assert Spread.of([3.0]) == (3.0, 3.0, 3.0, 1)
    assert Spread.of([5.0, 1.0, 3.0, 2.0, 4.0]) == (3.0, 2.0, 4.0, 5)


def test_rise_of_memory() -> None:
    found = measure.rise(lambda: np.ones(5_000_000))  # gone by now; its peak is not
    assert 39e6 < found < 60e6
    assert measure.rise(lambda: None) < 5e6


def test_peers_are_checked(graph: Graph) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    ours = Network(np.frombuffer(abste_format.write(graph), np.uint8), "test")(x)
    right = peers.PEERS["torch"]
    calls = peers.Case(graph, x, 1)
    wrong = peers.Peer("wrong", "bf16", ("torch",), lambda case: lambda: 2 * right.build(case)())
    broken = peers.Peer("broken", "int8", ("torch",), lambda case: 1 / 0)  # type: ignore[arg-type]
    absent = peers.Peer("absent", "float32", ("no_such_engine",), right.build)
    far = peers.Peer("far", "binary", ("torch",), right.build)
    good = peers.Peer("good", "binary", ("torch",), lambda case: lambda: ours)
    functions, errors, notes = peers.build([broken, wrong, absent, far, good, right], calls, ours)
    assert list(functions) == ["torch", "good"]
    assert errors["wrong"] == pytest.approx(1) and errors["torch"] == 0 and errors["far"] > 0.1
    assert notes[0] == "absent is left out: no_such_engine is not installed."
    assert notes[1] == "broken is left out: division by zero"
    assert notes[2] == "wrong is left out: its outputs are wrong, by 1 of their size."
    assert notes[3].startswith("far is left out: its outputs are wrong")
    # Without an engine in float32 nobody knows what the others should give.
    assert peers.build([wrong], calls, ours)[2] == ["wrong is left out: no engine in float32 says what is right."]


def test_every_peer_that_is_installed_is_right(graph: Graph) -> None:
    x = np.random.default_rng(0).normal(size=(2, 3, 16, 16)).astype(np.float32)
    ours = Network(np.frombuffer(abste_format.write(graph), np.uint8), "test")(x)
    wanted = [peer for name, peer in peers.PEERS.items() if "compile" not in name and not peer.missing()]
    functions, errors, notes = peers.build(wanted, peers.Case(graph, x, 1), ours)
    assert not notes and {*functions} == {peer.name for peer in wanted} >= {"torch", "torch-nchw", "torch-bf16"}
    assert all(errors[peer.name] <= peers.TOLERANCES[peer.precision] for peer in wanted)
    assert errors["torch-bf16"] > 0


def test_distance() -> None:
    a = np.array([3.0, 4.0], np.float32)
    assert peers.distance(a, a) == 0 and peers.distance(1.5 * a, a) == pytest.approx(0.5)
    assert peers.distance(a[:1], a) == float("inf")


def test_bench(path: Path) -> None:
    said: list[str] = []
    result = bench(path, threads=[1, 2], seconds=0.2, peer_names=["torch"], say=said.append, batch=3)
    assert said[0].startswith("measuring with 1 thread: ") and said[1].startswith("measuring with 2 threads: ")
    names = [(timing.engine, timing.threads) for timing in result.timings]
    assert names == [(name, t) for t in (1, 2) for name in (*(f"abste {isa}" for isa in isas()), "torch")]
    for timing in result.timings:
        assert 0 < timing.time.low <= timing.time.median <= timing.time.high and timing.time.calls >= 3
        assert len(timing.nodes) == (0 if timing.engine == "torch" else 4)
    scalar = next(timing for timing in result.timings if timing.engine == "abste scalar")
    assert np.argmax(scalar.nodes) == 1 and sum(scalar.nodes) < 2 * scalar.time.high
    assert result.memory["file"] == path.stat().st_size and result.memory["arena"] > 0
    assert result.memory["rise"] is not None and 0 < result.memory["rise"] < 50e6
    text = str(result)
    assert text.startswith("net.abste: 3x16x16 to 10, batches of 3, on ")
    assert re.search(r"^torch +1 .* abste is \d+\.\dx as fast$", text, re.MULTILINE)
    assert re.search(r"^block +xnor +[\d.,]+ .* \d+% +[\d,]+$", text, re.MULTILINE)
    assert re.search(rf"^ +{path.stat().st_size:,} bytes  the file$", text, re.MULTILINE)
    back = json.loads(json.dumps(result.to_dict()))
    assert back["timings"][0]["time"]["calls"] >= 3 and back["versions"]["abste"]


def test_memory_is_that_of_the_fastest(path: Path) -> None:
    result = bench(path, threads=[1], seconds=0.1, isa=["scalar", load(path).isa], peer_names=["none"])
    fastest = min(result.timings, key=lambda timing: timing.time.median).engine.removeprefix("abste ")
    assert result.memory["packed"] == load(path, isa=fastest).packed_bytes


def test_command(path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "bench.json"
    options = ["--threads", "1", "--isa", "scalar", "--seconds", "0.05", "--peers", "none", "--json", str(target)]
    options += ["--int8", "stem"]
    assert main(["bench", str(path), *options]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("abste scalar") == 1 and "torch" not in captured.out
    assert captured.err == "measuring with 1 thread: scalar\n"
    result = json.loads(target.read_text())
    assert [timing["engine"] for timing in result["timings"]] == ["abste scalar"] and result["batch"] == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--batch", "0"], "--batch, --threads and --seconds must be positive."),
        (["--batch", str(10**15)], f"--batch {10**15}: so many images do not fit into memory."),
        (["--threads", "1", "0"], "--batch, --threads and --seconds must be positive."),
        (["--seconds", "-1"], "--batch, --threads and --seconds must be positive."),
        (["--isa", "avx9"], "isa: this machine has no 'avx9'"),
        (["--int8", "stemm"], "int8='stemm'; did you mean 'stem'"),
        (["--peers", "none", "torch"], "--peers none stands alone; leave out 'none' or the other names."),
        (["--peers", "onxruntime"], "unknown peer 'onxruntime'; did you mean 'onnxruntime'"),
        (
            ["--seconds", "0.01", "--threads", "1", "--peers", "none", "--json", "no/where.json"],
            "cannot write no/where",
        ),
    ],
)
def test_errors_are_one_sentence(
    options: list[str], message: str, path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", str(path), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("abste: error: ") and message in error


def test_peers_need_one_input_and_one_output(tmp_path: Path) -> None:
    values = [Value((1, 1, 2)), Value((1, 1, 2)), Value((1, 1, 2), output=True)]
    steps = [Step(StepKind.ADD_VALUE, value=1)]
    two = plan(Graph(values, [Node(Op.IDENTITY, (0,), 2, steps=steps)], input_count=2))
    file = tmp_path / "two.abste"
    file.write_bytes(abste_format.write(two))
    result = bench(file, threads=[1], seconds=0.01)
    assert result.timings[0].time.calls >= 3
    assert result.notes == ["Other engines are left out: the network has several inputs or outputs."]
    with pytest.raises(ConfigError, match="only a network with one input and one output can be compared"):
        bench(file, threads=[1], seconds=0.01, peer_names=["torch"])


def test_needs_no_torch(path: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxruntime', 'openvino'): sys.modules[name] = None\n"
        "import importlib.util\nfind = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: find(name, *rest) if name.startswith('abste') else None\n"
        "from abste.cli import main\n"
        f"sys.exit(main(['bench', {str(path)!r}, '--threads', '1', '--seconds', '0.05']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "torch is left out: torch is not installed.\n" in done.stdout
    assert "openvino-int8 is left out: onnx and onnxruntime and openvino are not installed." in done.stdout
