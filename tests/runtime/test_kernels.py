"""Every kernel of every instruction set against the scalar reference, in shapes that fill registers and others."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan
from abste.errors import ConfigError
from abste.runtime.network import Network, isas
from abste.runtime.reference import run

FASTER = [isa for isa in isas() if isa != "scalar"]


def sides(size: int, kernel: int, stride: int, dilation: int, before: int, after: int) -> int:
    return (size + before + after - dilation * (kernel - 1) - 1) // stride + 1


@st.composite
def convolutions(draw: st.DrawFn, op: Op) -> tuple[Graph, Any]:
    """A convolution of random geometry, what feeds it, and an image: with floats, bits or thresholds behind it."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    groups = draw(st.sampled_from([1, 1, 1, 2]))
    c_in = draw(st.sampled_from([1, 3, 16, 31, 32, 33, 64, 100, 128, 200])) * groups
    c_out = draw(st.sampled_from([1, 15, 16, 17, 31, 32, 33, 48, 64, 65, 80, 128, 150])) * groups
    if draw(st.integers(0, 4)) == 4:  # depthwise
        groups = c_out = c_in
    kernel = draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    stride, dilation = (draw(st.tuples(st.integers(1, 2), st.integers(1, 2))) for _ in range(2))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(4))
    size = draw(st.tuples(st.integers(1, 12), st.integers(1, 30)))
    h, w = (sides(size[i], kernel[i], stride[i], dilation[i], padding[i], padding[i + 2]) for i in range(2))
    if h < 1 or w < 1:
        kernel, h, w = (1, 1), *(sides(size[i], 1, stride[i], 1, padding[i], padding[i + 2]) for i in range(2))
    out = (h, w, c_out)
    values = [Value((*size, c_in), name="image")]
    source = 0
    if op is Op.XNOR:
        values.append(Value((*size, c_in), Kind.BITS))
        source = 1
    nodes = [Node(Op.IDENTITY, (0,), None, 1)] if op is Op.XNOR else []
    if op is Op.CONV:
        weight = rng.normal(size=(*kernel, c_in // groups, c_out)).astype(
            draw(st.sampled_from([np.float32, np.float16]))
        )
    else:
        weight = rng.random((c_out, *kernel, c_in // groups)) < 0.5
    node = Node(op, (source,), None, None, "conv", weight, kernel, stride, dilation, padding, groups=groups)
    node.pad_value = draw(st.sampled_from([-1, 0, 1])) if op is Op.XNOR else 0
    reach = int(np.prod(kernel)) * (c_in // groups)
    how = draw(st.sampled_from(["threshold", "bits", "floats", "both"]))
    if how == "threshold" and op is Op.XNOR:
        pairs = [rng.integers(-reach - 1, reach + 2, c_out), rng.choice([-1, 1], c_out)]
        node.steps = [Step(StepKind.THRESHOLD, "", np.stack(pairs, 1).astype(np.int32))]
    else:
        vectors = iter(rng.normal(size=(6, c_out)).astype(np.float32))
        plenty = [
            Step(StepKind.AFFINE, "", next(vectors), next(vectors)),
            Step(StepKind.PRELU, "", next(vectors)),
            Step(StepKind.MULTIPLY, "", next(vectors)),
            Step(StepKind.ADD, "", next(vectors)),
            Step(StepKind.RELU, ""),
            Step(StepKind.CLAMP, "", p=-0.5, q=2.0),
            Step(StepKind.SILU, ""),
            Step(StepKind.SIGN, ""),
        ]
        node.steps = [plenty[i] for i in draw(st.lists(st.integers(0, len(plenty) - 1), max_size=4))]
        if out == values[0].shape and draw(st.booleans()):
            node.steps.append(Step(draw(st.sampled_from([StepKind.ADD_VALUE, StepKind.MULTIPLY_VALUE])), "", value=0))
    if how in ("floats", "both"):
        node.out = len(values)
        values.append(Value(out))
    if how in ("bits", "both", "threshold"):
        node.bits = len(values)
        values.append(Value(out, Kind.BITS))
    nodes.append(node)
    if node.bits is not None:  # what was packed comes to light in the sums of another
        eye = np.eye(c_out, dtype=bool).reshape(c_out, 1, 1, c_out)
        nodes.append(Node(Op.XNOR, (node.bits,), len(values), None, "look", eye, (1, 1)))
        values.append(Value(out))
    for value in values[2 if op is Op.XNOR else 1 :]:
        value.output = value.kind is Kind.FLOAT
    image = rng.normal(size=(1, *size, c_in)).astype(np.float32)
    image[rng.random(image.shape) < 0.02] = np.nan
    image[rng.random(image.shape) < 0.02] = -0.0
    return plan(Graph(values, nodes)), image


def outputs(graph: Graph, image: Any, isa: str, int8: Any = None, threads: int = 1) -> tuple[Any, ...]:
    network = Network(np.frombuffer(abste_format.write(graph), np.uint8), "a test", isa, int8)
    found = network(image, layout="nhwc", threads=threads)
    return found if isinstance(found, tuple) else (found,)


def assert_same(wanted: tuple[Any, ...], found: tuple[Any, ...]) -> None:
    for a, b in zip(wanted, found, strict=True):
        same = (a.view(np.uint32) == b.view(np.uint32)) | (np.isnan(a) & np.isnan(b))
        assert same.all(), f"{(~same).sum()} of {same.size} numbers differ"


def extreme(side: int = 3, c: int = 300) -> tuple[Graph, Any]:
    """Sums as far from 0 as they can be, on both sides: no counter of a kernel may overflow."""
    shape = (side, side + 6, c)
    values = [Value(shape), Value(shape, Kind.BITS), Value((1, 7, 40), output=True)]
    weight = np.ones((40, side, side, c), bool)
    weight[::3] = False
    nodes = [Node(Op.IDENTITY, (0,), None, 1), Node(Op.XNOR, (1,), 2, None, "conv", weight, (side, side))]
    return plan(Graph(values, nodes)), np.full((1, *shape), -1, np.float32)


@pytest.mark.parametrize(("side", "c"), [(3, 300), (1, 140_000)], ids=["of 8 bits", "of 16 bits"])
@pytest.mark.parametrize("isa", FASTER)
def test_no_counter_overflows(isa: str, side: int, c: int) -> None:
    (found,) = outputs(*extreme(side, c), isa)
    assert (found == np.where(np.arange(40) % 3, np.float32(-side * side * c), np.float32(side * side * c))).all()


@pytest.mark.parametrize("pad_value", [-1, 1])
@pytest.mark.parametrize("c", [2048, 2049, 4100])
@pytest.mark.parametrize("isa", FASTER)
def test_a_border_of_bits_for_any_number_of_channels(isa: str, c: int, pad_value: int) -> None:
    """Of the inside, sums of c; of taps outside, whatever their bits are."""
    values = [Value((3, 9, c)), Value((3, 9, c), Kind.BITS), Value((3, 9, 40), output=True)]
    weight = np.ones((40, 3, 3, c), bool)
    weight[::3] = False
    nodes = [Node(Op.IDENTITY, (0,), None, 1), Node(Op.XNOR, (1,), 2, None, "conv", weight, (3, 3))]
    nodes[1].padding, nodes[1].pad_value = (1, 1, 1, 1), pad_value
    (found,) = outputs(plan(Graph(values, nodes)), np.full((1, 3, 9, c), -pad_value, np.float32), isa)
    inside = np.outer([2, 3, 2], [2, *[3] * 7, 2])[..., None]
    wanted = pad_value * c * (9 - 2 * inside) * np.where(np.arange(40) % 3, 1, -1)
    assert (found == wanted).all()


@pytest.mark.parametrize("c", [100, 32_766, 32_767, 32_768, 40_000])
@pytest.mark.parametrize("isa", FASTER)
def test_thresholds_of_any_size(isa: str, c: int) -> None:
    """Sums of c and -c on both sides of thresholds that 16 bits can hold, and that they can not."""
    near = [edge + off for edge in (-32_768, -c, c, 32_767) for off in (-2, -1, 0, 1, 2)]
    pairs = [(t, d) for t in (-(2**31), *near, 2**31 - 1) for d in (-1, 1) for _ in range(2)]
    count = len(pairs)
    values = [Value((1, 1, c)), Value((1, 1, c), Kind.BITS), Value((1, 1, count), Kind.BITS)]
    values.append(Value((1, 1, count), output=True))
    weight = np.ones((count, 1, 1, c), bool)
    weight[::2] = False
    nodes = [Node(Op.IDENTITY, (0,), None, 1), Node(Op.XNOR, (1,), None, 2, "fc", weight)]
    nodes[1].steps = [Step(StepKind.THRESHOLD, "", np.array(pairs, np.int32))]
    nodes.append(Node(Op.XNOR, (2,), 3, None, "look", np.eye(count, dtype=bool).reshape(count, 1, 1, count)))
    (found,) = outputs(plan(Graph(values, nodes)), np.ones((1, 1, 1, c), np.float32), isa)
    t, d = np.array(pairs).T
    bits = np.where(d * np.where(np.arange(count) % 2, c, -c) >= t, 1, -1)
    assert (found.ravel() == np.where(np.eye(count, dtype=bool), 1, -1) @ bits).all()


@pytest.mark.parametrize("isa", FASTER)
@pytest.mark.parametrize("op", [Op.XNOR, Op.SIGN_CONV, Op.CONV])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_convolutions_give_the_bits_of_the_scalar_code(isa: str, op: Op, data: st.DataObject) -> None:
    graph, image = data.draw(convolutions(op))
    threads = data.draw(st.sampled_from([1, 2]))
    assert_same(outputs(graph, image, "scalar"), outputs(graph, image, isa, threads=threads))


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("op", [Op.SIGN_CONV, Op.CONV])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_eight_bits_give_the_bits_of_the_interpreter(isa: str, op: Op, data: st.DataObject) -> None:
    graph, image = data.draw(convolutions(op))
    if data.draw(st.booleans()):
        times = np.float32(data.draw(st.sampled_from([1.0, 0.0, 1e-42, 1e30, np.inf])))
        with np.errstate(all="ignore"):
            image = np.nan_to_num(image) * times
    values = run(graph, [image], "all").values
    wanted = tuple(np.asarray(values[index], np.float32) for index in graph.outputs())
    assert_same(wanted, outputs(graph, image, isa, "all"))


def test_eight_bits_are_near_and_where_they_were_asked_for() -> None:
    rng = np.random.default_rng(1)
    values = [Value((9, 8, 3), name="image")]
    values += [Value((9, 8, 32)) for _ in range(3)] + [Value((9, 8, 32), Kind.BITS), Value((9, 8, 32), output=True)]
    weight = rng.normal(size=(3, 3, 3, 32)).astype(np.float32)
    pointwise = rng.normal(size=(1, 1, 32, 32)).astype(np.float32)
    signs = rng.random((32, 3, 3, 32)) < 0.5
    nodes = [
        Node(Op.CONV, (0,), 1, None, "stem", weight, (3, 3), padding=(1,) * 4),
        Node(Op.SIGN_CONV, (1,), 2, None, "binary", signs, (3, 3), padding=(1,) * 4),
        Node(Op.CONV, (2,), 3, 4, "pointwise", pointwise),
        Node(Op.XNOR, (4,), 5, None, "bits", signs, (3, 3), padding=(1,) * 4),
    ]
    values[3].output = True
    file = np.frombuffer(abste_format.write(plan(Graph(values, nodes))), np.uint8)
    image = rng.normal(size=(2, 9, 8, 3)).astype(np.float32)
    exact = Network(file, "a test")(image, layout="nhwc")[0]
    eight = {None: (), "stem": (0,), "float": (0, 2), "binary": (1,), "all": (0, 1, 2)}
    for int8, numbers in eight.items():
        network = Network(file, "a test", int8=int8)
        assert [node.input_bits for node in network.nodes] == [8 if i in numbers else 32 for i in range(3)] + [1]
        assert network.int8 == int8
        off = np.abs(network(image, layout="nhwc")[0] - exact).max() / np.abs(exact).max()
        assert off == 0 if int8 is None else 0 < off < 0.03
    with pytest.warns(UserWarning, match=r"int8='all': there are no kernels for scalar"):
        Network(file, "a test", "scalar", "all")
    with pytest.raises(ConfigError, match=r"int8='steem'; .*'stem'"):
        Network(file, "a test", int8="steem")  # type: ignore[arg-type]


ARM = "aarch64-linux-gnu"
ARM_BUILDS = {
    "gcc": [f"{ARM}-gcc", "-O3", "-static"],
    "clang": ["clang", f"--target={ARM}", "-O3", "-static"],  # with the headers and libraries of the other
    "sanitizers": [f"{ARM}-gcc", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
}


@pytest.fixture(scope="module", params=ARM_BUILDS)
def arm_harness(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, repo_root: Path) -> list[str]:
    """The command that runs tests/c/harness.c, compiled for 64-bit ARM, in an emulator."""
    build = ARM_BUILDS[request.param]
    for needed in (f"{ARM}-gcc", build[0], "qemu-aarch64"):
        if not shutil.which(needed):
            pytest.skip(f"{needed} is not installed (Debian: gcc-aarch64-linux-gnu, libc6-dev-arm64-cross, qemu-user)")
    program = tmp_path_factory.mktemp("arm") / "harness"
    sources = [*repo_root.glob("csrc/src/*.c"), *repo_root.glob("csrc/kernels/*.c"), repo_root / "tests/c/harness.c"]
    flags = ["-std=c11", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", f"-I{repo_root / 'csrc/include'}"]
    command = [*build, *flags, *map(str, sources), "-o", str(program)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ["qemu-aarch64", "-L", f"/usr/{ARM}", str(program), "--images"]


def some_convolutions(op: Op, count: int) -> list[tuple[Graph, Any]]:
    made = []

    @settings(max_examples=count, phases=[Phase.generate])
    @given(convolutions(op))
    def collect(example: tuple[Graph, Any]) -> None:
        made.append(example)

    collect()
    return made


def test_arm_gives_the_bits_of_this_machine(
    arm_harness: list[str], random_graph: Callable[[int], Graph], repo_root: Path, tmp_path: Path
) -> None:
    """Random convolutions, random networks and the seeds of the fuzzer, compiled for ARM and run in an emulator."""
    rng = np.random.default_rng(0)
    graphs = [random_graph(seed) for seed in range(60)]
    graphs += [abste_format.read(path.read_bytes()) for path in sorted(repo_root.glob("tests/c/corpus/*.abste"))]
    cases = [(graph, rng.normal(size=(1, *graph.values[0].shape)).astype(np.float32)) for graph in graphs]
    cases += [extreme()]
    cases += [case for op in (Op.XNOR, Op.SIGN_CONV, Op.CONV) for case in some_convolutions(op, 150)]
    wanted: list[list[str]] = []
    arguments = []
    for graph, image in cases:
        file = abste_format.write(graph)
        if sum(node.macs for node in Network(np.frombuffer(file, np.uint8), "a test").nodes) > 1e6:
            continue  # an emulator is slow
        lines = []
        for output in outputs(graph, image, "scalar"):
            words = np.where(np.isnan(output), np.float32(np.nan), output).view(np.uint32).ravel()
            lines.append(" ".join(f"{word:08x}" for word in words))
        wanted.append(lines)
        for name, data in (("abste", file), ("image", image.tobytes())):
            arguments.append(tmp_path / f"{len(wanted):05}.{name}")
            arguments[-1].write_bytes(data)
    assert len(wanted) > 350
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0"}  # which the emulator does not let it do
    done = subprocess.run([*arm_harness, *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    answers = done.stdout.split("status ")[1:]
    for number, (answer, lines) in enumerate(zip(answers, wanted, strict=True), 1):
        found = answer.splitlines()
        assert found[1] == "run 0", found[0]
        assert found[4 : 4 + len(lines)] == lines, f"outputs of {number:05}.abste"
        kernels = ["scalar same", "neon same", "scalar int8 same", "neon int8 same"]
        assert found[4 + len(lines) :] == kernels, f"kernels of {number:05}.abste"
