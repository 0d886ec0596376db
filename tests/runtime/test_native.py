"""The C runtime against the interpreter in numpy: the same bits, from other code."""

from __future__ import annotations

import copy
import pickle
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Node, Op, Value
from abste.deploy.plan import plan
from abste.errors import ConfigError
from abste.runtime import load, network
from abste.runtime.network import MAX_THREADS, Network, isas
from abste.runtime.reference import run

Build = Callable[[int], Graph]


ISAS = isas()


def loaded(graph: Graph, isa: str | None = None) -> Network:
    return Network(np.frombuffer(abste_format.write(graph), np.uint8), "a test", isa)


def image(graph: Graph, seed: int, batch: int) -> Any:
    x = np.random.default_rng(seed).normal(size=(batch, *graph.values[0].shape)).astype(np.float32)
    x[np.random.default_rng(seed).random(x.shape) < 0.05] = -0.0
    return x


def assert_same_bits(found: Any, wanted: Any, what: str) -> None:
    assert found.dtype == wanted.dtype and found.shape == wanted.shape, what
    number = np.isnan(wanted) if wanted.dtype == np.float32 else np.zeros(wanted.shape, bool)
    same = (found.view(np.uint32) == np.ascontiguousarray(wanted).view(np.uint32)) | (number & np.isnan(found))
    assert same.all(), f"{what}: {(~same).sum()} of {same.size} differ"


@pytest.mark.parametrize("isa", ISAS)
@settings(max_examples=150)
@given(seed=st.integers(0, 2**31), threads=st.sampled_from([1, 2]))
def test_every_number_of_every_node(random_graph: Build, isa: str, seed: int, threads: int) -> None:
    graph = random_graph(seed)
    x = image(graph, seed, 2)
    result = run(graph, [x])
    network = loaded(graph, isa)
    assert network.isa == isa
    points = [(n, step) for n, node in enumerate(graph.nodes) for step in range(-1, len(node.steps))]
    (output,), traced = network.trace(np.moveaxis(x, -1, 1), points, threads=threads)
    for (n, step), found in zip(points, traced, strict=True):
        wanted = np.asarray(result.points[n][step + 1])
        assert_same_bits(found, wanted, f"node {n} ({graph.nodes[n].op.name}), step {step}")
    last = graph.outputs()[0]
    wanted = np.ascontiguousarray(result.values[last])
    assert_same_bits(np.moveaxis(output, 1, -1), wanted, "output")
    # Steps take another way where nobody looks on.
    alone = network(np.moveaxis(x, -1, 1), threads=threads)
    assert_same_bits(np.moveaxis(alone, 1, -1), wanted, "output without traces")


def test_every_operation_and_step_is_among_them(random_graph: Build) -> None:
    graphs = [random_graph(seed) for seed in range(300)]
    assert {node.op for graph in graphs for node in graph.nodes} == set(Op)
    kinds = {step.kind for graph in graphs for node in graph.nodes for step in node.steps}
    assert len(kinds) == 17
    assert any(node.weight is not None and node.weight.dtype == np.float16 for graph in graphs for node in graph.nodes)


@pytest.mark.parametrize("batch", [0, 1, 5])
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_layouts_batches_and_threads(random_graph: Build, batch: int, layout: Any) -> None:
    graph = random_graph(3)
    network = loaded(graph)
    x = image(graph, 0, batch)
    given = x if layout == "nhwc" else np.ascontiguousarray(np.moveaxis(x, -1, 1))
    results = [network(given, layout=layout, threads=threads) for threads in (1, 2, 3)]
    wanted = (
        run(graph, [x]).values[graph.outputs()[0]] if batch else np.empty((0, *graph.values[graph.outputs()[0]].shape))
    )
    for result in results:
        nhwc = result if layout == "nhwc" else np.moveaxis(result, 1, -1)
        np.testing.assert_array_equal(nhwc, wanted)


def test_many_threads_share_a_network(random_graph: Build) -> None:
    graph = random_graph(5)
    network = loaded(graph)
    inputs = [np.moveaxis(image(graph, seed, 3), -1, 1).copy() for seed in range(4)]
    wanted = [network(x, threads=1) for x in inputs]
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            if not np.array_equal(network(inputs[number], threads=2), wanted[number], equal_nan=True):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda packed: pickle.loads(pickle.dumps(packed))])
@pytest.mark.parametrize(("isa", "int8"), [(None, None), ("scalar", None), (None, "all")])
def test_pickles_and_copies(
    tmp_path: Path, random_graph: Build, clone: Callable[[Network], Network], isa: str | None, int8: Any
) -> None:
    graph = random_graph(5)
    path = tmp_path / "one.abste"
    path.write_bytes(abste_format.write(graph))
    packed = load(path, isa=isa, int8=int8)
    x = np.moveaxis(image(graph, 0, 2), -1, 1).copy()
    wanted = packed(x)
    text = repr(packed)
    stored = clone(packed)
    path.unlink()  # they stand on their own
    assert (stored.isa, stored.int8, repr(stored)) == (packed.isa, int8, text)
    np.testing.assert_array_equal(stored(x), wanted)


def test_pickle_for_another_machine(random_graph: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that were fastest where it was written need not exist where it is read."""
    stored = pickle.dumps(loaded(random_graph(5)))
    asked = pickle.dumps(loaded(random_graph(5), ISAS[0]))
    monkeypatch.setattr(network, "isas", lambda: ["scalar"])
    assert pickle.loads(stored).isa == "scalar"
    if ISAS[0] != "scalar":
        with pytest.raises(ConfigError, match=f"^isa: this machine has no '{ISAS[0]}'"):
            pickle.loads(asked)


@pytest.mark.parametrize("threads", [0, -1, MAX_THREADS + 1, np.int64(MAX_THREADS + 1), True, np.True_, 2.0, "2"])
def test_numbers_of_threads_that_are_refused(
    random_graph: Build, threads: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = random_graph(3)
    packed = loaded(graph)
    monkeypatch.setattr(packed, "_model", None)  # so that none is ever started
    x = np.moveaxis(image(graph, 0, 1), -1, 1).copy()
    for call in (packed, packed.profile, lambda x, threads: packed.trace(x, [], threads=threads)):
        with pytest.raises(ConfigError, match=rf"^threads must be an integer from 1 to {MAX_THREADS}, not .*\.$"):
            call(x, threads=threads)


def test_numbers_of_threads(random_graph: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Integers of NumPy are some, and a machine with many cores does not ask for more than are allowed."""
    graph = random_graph(3)
    packed = loaded(graph)
    x = np.moveaxis(image(graph, 0, 2), -1, 1).copy()
    wanted = packed(x, threads=1)
    np.testing.assert_array_equal(packed(x, threads=np.int64(2)), wanted)
    asked = []

    class Model:
        def run(self, *arguments: Any) -> None:
            asked.append(arguments[4])

    monkeypatch.setattr(packed, "_model", Model())
    monkeypatch.setattr(network, "available_cores", lambda: 1000)
    packed(x)
    assert asked == [MAX_THREADS]


def test_a_path_may_be_bytes_and_must_be_one(random_graph: Build, tmp_path: Path) -> None:
    path = tmp_path / "net.abste"
    path.write_bytes(abste_format.write(random_graph(3)))
    assert load(bytes(path)).file_bytes == load(path).file_bytes == path.stat().st_size
    for wrong in (3, None, [path]):
        with pytest.raises(ConfigError, match=r"^the path of an \.abste file must be a str or a Path, not \w+\.$"):
            load(wrong)  # type: ignore[arg-type]


def test_an_int8_that_is_no_name(random_graph: Build) -> None:
    with pytest.raises(ConfigError, match=r"^int8=\['stem'\]; "):
        Network(np.frombuffer(abste_format.write(random_graph(3)), np.uint8), "a test", int8=["stem"])  # type: ignore[arg-type]


def test_one_name_of_an_intermediate(random_graph: Build) -> None:
    graph = random_graph(3)
    packed = loaded(graph)
    name = next(name for name in packed.intermediates() if len(name) > 1)
    x = np.moveaxis(image(graph, 0, 1), -1, 1).copy()
    output, found = packed(x, intermediates=name)
    again, wanted = packed(x, intermediates=[name])
    assert list(found) == [name]
    np.testing.assert_array_equal(found[name], wanted[name])
    np.testing.assert_array_equal(output, again)
    with pytest.raises(ConfigError, match=r"^no output of 'nowhere' stands anywhere"):
        packed(x, intermediates="nowhere")


def test_choice_of_instruction_set(random_graph: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = random_graph(3)
    assert ISAS[-1] == "scalar" and loaded(graph).isa == ISAS[0]
    monkeypatch.setenv("ABSTE_ISA", "scalar")
    assert loaded(graph).isa == "scalar" and loaded(graph, ISAS[0]).isa == ISAS[0]
    assert loaded(graph).packed_bytes == 0
    with pytest.raises(ConfigError, match=r"^isa: this machine has no 'avx9'; "):
        loaded(graph, "avx9")
    monkeypatch.setenv("ABSTE_ISA", "scalr")
    with pytest.raises(ConfigError, match=r"^the environment variable ABSTE_ISA: this machine has no 'scalr'; did you"):
        loaded(graph)


def test_profile(random_graph: Build) -> None:
    """Every node takes time, nodes and what lies around them take what the call takes, and a batch takes the sum."""
    graph = random_graph(5)
    network = loaded(graph)
    x = np.moveaxis(image(graph, 0, 200), -1, 1).copy()
    for threads in (1, 2):
        start = time.perf_counter()
        profile = network.profile(x, threads=threads)
        elapsed = time.perf_counter() - start
        assert profile.nodes.shape == (len(network.nodes),) and (profile.nodes > 0).all() and profile.around > 0
        assert profile.nodes.sum() + profile.around < elapsed
    few = min(network.profile(x[:2], threads=1).nodes.sum() for _ in range(5))
    assert few < 0.5 * min(network.profile(x, threads=1).nodes.sum() for _ in range(5))
    empty = network.profile(x[:0], layout="nchw")
    assert not empty.nodes.any() and empty.around == 0
    nhwc = network.profile(np.ascontiguousarray(np.moveaxis(x, 1, -1)), layout="nhwc")
    assert (nhwc.nodes > 0).all()
    with pytest.raises(ConfigError, match=r"^unknown layout 'nchv'"):
        network.profile(x, layout="nchv")  # type: ignore[arg-type]


def test_slowest_node_is_seen() -> None:
    """A convolution with a million times the work of the other takes most of the time."""
    rng = np.random.default_rng(0)
    values = [Value((1, 1, 2)), Value((1, 1, 2)), Value((40, 40, 2)), Value((40, 40, 64), output=True)]
    nodes = [
        Node(Op.CONV, (0,), 1, weight=np.ones((1, 1, 2, 2), np.float32)),
        Node(Op.PAD, (1,), 2, padding=(39, 39, 0, 0)),
        Node(
            Op.CONV, (2,), 3, weight=rng.normal(size=(5, 5, 2, 64)).astype(np.float32), kernel=(5, 5), padding=(2,) * 4
        ),
    ]
    for isa in ISAS:
        network = loaded(plan(Graph(values, nodes)), isa)
        # Of several, lest the system took a while for itself in the middle of another node.
        times = np.min([network.profile(np.ones((3, 2, 1, 1), np.float32), threads=1).nodes for _ in range(7)], axis=0)
        assert times.argmax() == 2 and times[2] > 0.8 * times.sum()
