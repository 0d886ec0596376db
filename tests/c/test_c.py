"""The C runtime by itself: sanitizers and hostile files, its size, what it calls, the example."""

from __future__ import annotations

import os
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import abste
from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan
from abste.errors import FormatError
from abste.runtime.network import Network, isas
from abste.runtime.reference import run

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [str(path) for folder in ("src", "kernels") for path in sorted((ROOT / "csrc" / folder).glob("*.c"))]
COMPILERS = [name for name in ("gcc", "clang") if shutil.which(name)] or ["cc"]
CROSS = [name for name in ("aarch64-linux-gnu-gcc",) if shutil.which(name)]
HEADER = (ROOT / "csrc/include/abste.h").read_text()
STATUS = {
    name: number
    for number, name in enumerate(re.findall(r"^    ABSTE_(?:ERROR_)?(\w+)(?: = 0)?,?\s+(?=/\*)", HEADER, re.M), 1)
} | {"OK": 0}


def compiled(compiler: str, out: Path, *arguments: str) -> Path:
    command = [compiler, "-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{ROOT / 'csrc/include'}", *arguments]
    done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs files under AddressSanitizer and UBSan; gives the lines printed, and fails where a sanitizer speaks."""
    program = compiled(
        COMPILERS[0],
        tmp_path_factory.mktemp("harness") / "harness",
        *("-O1", "-g", "-ffp-contract=off", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        str(ROOT / "tests/c/harness.c"),
        *SOURCES,
    )

    def call(files: Sequence[bytes], folder: Path, *flags: str) -> list[str]:
        paths = [folder / f"{number:05}" for number in range(len(files))]
        for path, data in zip(paths, files, strict=True):
            path.write_bytes(data)
        done = subprocess.run([str(program), *flags, *map(str, paths)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout.splitlines()

    return call


def statuses(lines: Sequence[str]) -> list[int]:
    return [int(line.split()[1]) for line in lines if line.startswith("status ")]


def corpus() -> list[bytes]:
    return [path.read_bytes() for path in sorted((ROOT / "tests/c/corpus").glob("*.abste"))]


def repaired(file: bytes) -> bytes:
    """With the checksum of what it says now."""
    changed = bytearray(file)
    changed[16:20] = bytes(4)
    struct.pack_into("<I", changed, 16, zlib.crc32(changed))
    return bytes(changed)


def test_seeds_give_the_bits_of_the_interpreter(harness: Callable[..., list[str]], tmp_path: Path) -> None:
    for data in corpus():
        lines = harness([data], tmp_path)
        assert lines[0].startswith("status 0") and lines[1:4] == ["run 0", f"small {STATUS['ARENA']}", "unaligned 1"]
        graph = abste_format.read(data)
        shape = graph.values[0].shape
        k = np.arange(np.prod(shape), dtype=np.uint64)
        image = ((k * 2654435761 % 1000).astype(np.int64) - 500).astype(np.float32) / np.float32(128)
        values = run(graph, [image.reshape(shape)]).values
        compared = [f"{isa}{int8} same" for int8 in ("", " int8") for isa in reversed(isas())]
        assert lines[-len(compared) :] == compared
        for line, index in zip(lines[4 : -len(compared)], graph.outputs(), strict=True):
            found = np.array([int(word, 16) for word in line.split()], np.uint32).view(np.float32)
            np.testing.assert_array_equal(found, values[index].ravel())


def test_seeds_use_every_operation_and_step() -> None:
    nodes = [node for data in corpus() for node in abste_format.read(data).nodes]
    assert {node.op for node in nodes} == set(Op)
    assert {step.kind for node in nodes for step in node.steps} == set(StepKind)


def test_truncated_files(harness: Callable[..., list[str]], tmp_path: Path) -> None:
    data = corpus()[0]
    found = statuses(harness([data[:size] for size in range(len(data))], tmp_path))
    assert found == [STATUS["MAGIC"]] * 8 + [STATUS["TRUNCATED"]] * (len(data) - 8)
    # Nor does one pass whose header agrees with its size, and whose checksum is right.
    shorter = [data[:12] + struct.pack("<I", size) + data[16:size] for size in range(64, len(data))]
    assert 0 not in statuses(harness(shorter, tmp_path, "--skip-checksum"))


def test_every_flipped_bit_is_seen(harness: Callable[..., list[str]], tmp_path: Path) -> None:
    data = corpus()[0]
    flipped = [bytes([*data[:at], data[at] ^ 1 << at % 8, *data[at + 1 :]]) for at in range(len(data))]
    assert 0 not in statuses(harness(flipped, tmp_path))


def test_no_change_breaks_the_reader(harness: Callable[..., list[str]], tmp_path: Path) -> None:
    """Random numbers in the records, with the checksum repaired: it loads or gives an error, and what loads runs."""
    rng = np.random.default_rng(0)
    interesting = [0, 1, 2, 3, 31, 32, 33, 63, 64, 127, 255, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1]
    files = []
    for data in corpus():
        for _ in range(60):
            changed = bytearray(data)
            for _ in range(int(rng.integers(1, 4))):
                at = 4 * int(rng.integers(5, len(data) // 4))
                struct.pack_into("<I", changed, at, int(rng.choice(interesting)))
            files.append(repaired(bytes(changed)))
    lines = harness(files, tmp_path)
    found = statuses(lines)
    assert len(found) == len(files) and 0 in found and len(set(found)) > 5
    assert all(line == "run 0" for line in lines if line.startswith("run "))
    compared = [line for line in lines if line.split()[0] in isas()]
    assert compared and all(line.endswith(" same") for line in compared)
    for number, (data, status) in enumerate(zip(files, found, strict=True)):
        if status:  # the binding says the same, in words
            with pytest.raises(FormatError):
                Network(np.frombuffer(data, np.uint8), str(number))


def small() -> Graph:
    """image -> conv -> bits -> xnor -> logits, which add what an average of the conv gives."""
    rng = np.random.default_rng(0)
    values = [
        Value((6, 5, 3), name="image"),
        Value((6, 5, 7), name="stem"),
        Value((6, 5, 7), Kind.BITS),
        Value((1, 1, 7)),
        Value((1, 1, 7), rank=1, output=True, name="logits"),
    ]
    nodes = [
        Node(Op.CONV, (0,), 1, 2, "stem", rng.normal(size=(3, 3, 3, 7)).astype(np.float32), (3, 3), padding=(1,) * 4),
        Node(Op.AVERAGE_POOL, (1,), 3, kernel=(6, 5)),
        Node(Op.XNOR, (2,), 4, None, "fc", rng.random((7, 6, 5, 7)) < 0.5, (6, 5)),
    ]
    nodes[2].steps = [Step(StepKind.MULTIPLY, a=np.ones(7, np.float32)), Step(StepKind.ADD_VALUE, value=3)]
    return plan(Graph(values, nodes, classes=("a", "b")))


def packed(change: Callable[[Graph], Any]) -> bytes:
    graph = small()
    change(graph)
    return abste_format.write(graph)


def patched(at: int, form: str, *numbers: Any) -> bytes:
    file = bytearray(abste_format.write(small()))
    struct.pack_into("<" + form, file, at, *numbers)
    return repaired(bytes(file))


VALUES_AT, NODES_AT = 64, 64 + 192  # five values of 32 bytes, rounded up to 64
STEPS_AT = NODES_AT + 320  # three nodes of 96
BLOBS_AT = STEPS_AT + 64  # two steps

# What is wrong, the file, and what the reader says.
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "MAGIC"),
    "foreign": (b"\x89PNG\r\n\x1a\n" + bytes(64), "MAGIC"),
    "future major": (patched(8, "H", 2), "VERSION"),
    "future minor": (patched(10, "H", 1), "VERSION"),
    "longer than it says": (abste_format.write(small()) + bytes(64), "TRUNCATED"),
    "more values than fit": (patched(24, "I", 4096), "HEADER"),
    "more values than allowed": (patched(24, "I", 2**32 - 1), "HEADER"),
    "more blobs than allowed": (patched(36, "I", 2**31), "HEADER"),
    "strings without end": (patched(40, "I", 2**32 - 1), "HEADER"),
    "no input": (patched(44, "I", 0), "HEADER"),
    "reserved header": (patched(60, "I", 1), "HEADER"),
    "huge value": (patched(VALUES_AT + 4, "III", 65535, 65535, 2**24), "VALUE"),
    "empty value": (patched(VALUES_AT + 4, "I", 0), "VALUE"),
    "value beyond the arena": (patched(VALUES_AT + 16, "I", 2**32 - 64), "VALUE"),
    "value of an unknown kind": (patched(VALUES_AT, "B", 2), "VALUE"),
    "value of rank 0": (patched(VALUES_AT + 4 * 32 + 2, "B", 0), "VALUE"),
    "no output": (packed(lambda g: setattr(g.values[4], "output", False)), "VALUE"),
    "name outside the strings": (patched(VALUES_AT + 20, "I", 2**32 - 1), "STRING"),
    "overlapping values": (packed(lambda g: setattr(g.values[3], "offset", g.values[1].offset)), "OVERLAP"),
    "bits over floats": (packed(lambda g: setattr(g.values[2], "offset", g.values[1].offset)), "OVERLAP"),
    "cycle": (packed(lambda g: setattr(g.nodes[0], "inputs", (4,))), "ORDER"),
    "node that reads what it writes": (packed(lambda g: setattr(g.nodes[1], "inputs", (3,))), "ORDER"),
    "step that reads what it writes": (packed(lambda g: setattr(g.nodes[2].steps[1], "value", 4)), "ORDER"),
    "value written twice": (packed(lambda g: setattr(g.nodes[1], "out", 1)), "ORDER"),
    "input written": (packed(lambda g: setattr(g.nodes[1], "out", 0)), "ORDER"),
    "value that does not exist": (packed(lambda g: setattr(g.nodes[1], "inputs", (99,))), "NODE"),
    "unknown operation": (patched(NODES_AT, "B", 9), "NODE"),
    "floats for xnor": (packed(lambda g: setattr(g.nodes[2], "inputs", (1,))), "NODE"),
    "kernel of another size": (patched(NODES_AT + 32, "HH", 5, 3), "NODE"),
    "no stride": (patched(NODES_AT + 36, "HH", 0, 1), "NODE"),
    "huge padding": (patched(NODES_AT + 44, "H", 65535), "NODE"),
    "groups that divide nothing": (patched(NODES_AT + 28, "I", 2), "NODE"),
    "groups of none": (patched(NODES_AT + 28, "I", 0), "NODE"),
    "pool with weights": (packed(lambda g: setattr(g.nodes[1], "weight", np.ones(1, bool))), "NODE"),
    "weight that is too short": (packed(lambda g: setattr(g.nodes[2], "weight", np.ones(9, bool))), "BLOB"),
    "float weight for xnor": (patched(NODES_AT + 2 * 96 + 24, "I", 0), "BLOB"),
    "steps outside": (patched(NODES_AT + 2 * 96 + 64, "I", 2**32 - 1), "STEP"),
    "unknown step": (patched(STEPS_AT, "B", 17), "STEP"),
    "factors that are too few": (packed(lambda g: setattr(g.nodes[2].steps[0], "a", np.ones(6, np.float32))), "STEP"),
    "step on a blob that does not exist": (patched(STEPS_AT + 8, "I", 99), "STEP"),
    "overlapping blobs": (patched(BLOBS_AT, "I", STEPS_AT), "BLOB"),
    "blob larger than the file": (patched(BLOBS_AT + 4, "III", 2**32 - 4, 0, 2**30 - 1), "BLOB"),
    "class names without end": (packed(lambda g: setattr(g, "metadata", {})), "BLOB"),
}
# Its classes are what its metadata was, "{}", which no zero byte ends.
_no_end = bytearray(HOSTILE["class names without end"][0])
_no_end[52:60] = _no_end[56:60] + struct.pack("<I", 0xFFFFFFFF)
HOSTILE["class names without end"] = (repaired(bytes(_no_end)), "BLOB")


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_files(what: str, harness: Callable[..., list[str]], tmp_path: Path) -> None:
    data, wanted = HOSTILE[what]
    (line,) = harness([data], tmp_path)
    assert int(line.split()[1]) == STATUS[wanted], line
    path = tmp_path / "hostile.abste"
    path.write_bytes(data)
    with pytest.raises(FormatError) as caught:
        abste.load(path)
    sentence = str(caught.value)
    assert "hostile.abste" in sentence and "\n" not in sentence


def test_the_untouched_file_loads(harness: Callable[..., list[str]], tmp_path: Path) -> None:
    assert harness([abste_format.write(small())], tmp_path)[1] == "run 0"


@pytest.mark.parametrize("change", ["", "operand", "place", "reader", "bits"])
def test_only_what_is_read_number_by_number_is_replaced(
    change: str, harness: Callable[..., list[str]], tmp_path: Path
) -> None:
    """image -> a -> (b = pool(a) + image): b may lie where the image lay, as long as nobody else wants it."""
    values = [Value((4, 4, 8)), Value((4, 4, 8)), Value((4, 4, 8), output=True), Value((4, 4, 8), Kind.BITS)]
    nodes = [
        Node(Op.MAX_POOL, (0,), 1, kernel=(3, 3), padding=(1,) * 4),
        Node(Op.MAX_POOL, (1,), 2, 3, kernel=(3, 3), padding=(1,) * 4, steps=[Step(StepKind.ADD_VALUE, value=0)]),
    ]
    graph = plan(Graph(values, nodes))
    places = [value.offset for value in graph.values]
    assert places[2] == places[0] != places[1]
    wanted = 0
    if change:
        wanted = STATUS["OVERLAP"]
        if change == "operand":  # the pool reads it at other places
            graph.nodes[1].inputs = (0,)
        elif change == "place":
            graph.values[2].offset = 64
            graph.values[1].offset = 1024
            graph.arena_bytes = 2048
        elif change == "reader":
            graph.values[0].output = True
        elif change == "bits":
            graph.values[3].offset = graph.values[0].offset
    assert statuses(harness([abste_format.write(graph)], tmp_path)) == [wanted]


@pytest.mark.parametrize(
    ("values", "node", "message"),
    [
        (
            [(4096, 4096, 32), (4096, 4096, 32)],
            Node(Op.IDENTITY, (0,), 1),
            "2,147,483,648 bytes of working memory, more than 1,073,741,824",
        ),
        ([(4096, 4096, 1), (2049, 2049, 1)], Node(Op.MAX_POOL, (0,), 1, kernel=(2048, 2048)), "2e\\+13 operations"),
    ],
    ids=["memory", "time"],
)
def test_files_that_ask_for_too_much(values: Any, node: Node, message: str, tmp_path: Path) -> None:
    path = tmp_path / "greedy.abste"
    path.write_bytes(abste_format.write(plan(Graph([Value(values[0]), Value(values[1], output=True)], [node]))))
    assert path.stat().st_size < 1000
    with pytest.raises(FormatError, match=f"greedy.abste: .*{message}.*if you trust the file"):
        abste.load(path)


def test_names_and_metadata_may_be_anything(tmp_path: Path) -> None:
    """Names that are no UTF-8 are shown with replacement characters, and no terminal obeys them."""
    from abste.runtime.inspect import describe

    file = packed(lambda g: setattr(g.nodes[0], "name", "st\x1b[31m#") or setattr(g, "metadata", {"a": "\x1b]0;"}))
    path = tmp_path / "odd.abste"
    path.write_bytes(repaired(file.replace(b"[31m#", b"[31m\xff")))
    network = abste.load(path)
    assert network.nodes[0].name == "st\x1b[31m�"
    text = describe(network)
    assert "\x1b" not in text and "st�[31m�" in text
    deep = b"[" * 100_000
    with pytest.raises(FormatError, match="metadata is not JSON"):
        Network(np.frombuffer(_with_metadata(deep), np.uint8), "deep")
    with pytest.raises(FormatError, match="malformed"):
        abste_format.read(_with_metadata(deep))


def _with_metadata(text: bytes) -> bytes:
    graph = small()
    graph.classes = (text.decode(),)
    file = bytearray(abste_format.write(graph))
    file[52:60] = b"\xff" * 4 + file[52:56]
    # Without the zero byte at its end, which is no JSON either.
    index = struct.unpack_from("<I", file, 56)[0]
    struct.pack_into("<II", file, BLOBS_AT + 16 * index + 4, len(text), 4)
    struct.pack_into("<I", file, BLOBS_AT + 16 * index + 12, len(text))
    return repaired(bytes(file))


@pytest.mark.parametrize(("scalar", "most"), [(True, 60_000), (False, 300_000)], ids=["scalar", "all"])
@pytest.mark.parametrize("compiler", COMPILERS + CROSS)
def test_size_and_calls_of_the_library(compiler: str, scalar: bool, most: int, tmp_path: Path) -> None:
    """Scalar code of at most 60 kB; of all functions outside it calls memcpy alone. Built as CMakeLists.txt does."""
    keep = "-fno-tree-loop-distribute-patterns" if "gcc" in compiler else "-fno-builtin-memset"
    flags = ["-O3", "-ffp-contract=off", "-ffreestanding", keep, "-fPIC", "-nostdlib", "-r"]
    flags += ["-DABSTE_SCALAR_ONLY"] if scalar else []
    library = compiled(compiler, tmp_path / "abste.o", *flags, *SOURCES)
    tools = compiler.removesuffix("gcc") if compiler in CROSS else ""
    undefined = subprocess.run(
        [f"{tools}nm", "-u", str(library)], capture_output=True, text=True, check=True
    ).stdout.split()
    assert sorted(name for name in undefined if name not in ("U", "_GLOBAL_OFFSET_TABLE_")) == ["memcpy"]
    sizes = subprocess.run([f"{tools}size", str(library)], capture_output=True, text=True, check=True).stdout.split()
    text, data, bss = map(int, sizes[6:9])
    assert text + data + bss <= most
    shutil.copy(library, tmp_path / "stripped.o")
    subprocess.run([f"{tools}strip", "--strip-unneeded", str(tmp_path / "stripped.o")], check=True)
    assert (tmp_path / "stripped.o").stat().st_size <= most


@pytest.mark.parametrize("compiler", COMPILERS)
def test_example_runs_from_read_only_memory(compiler: str, tmp_path: Path) -> None:
    graph = small()
    graph.normalization = np.array([[0.5, 0.25, 0.125], [0.5, 0.25, 2.0]], np.float32)
    graph.classes = tuple("abcdefg")
    path = tmp_path / "net.abste"
    path.write_bytes(abste_format.write(graph))
    command = ["make", "-C", str(ROOT / "examples/c"), f"MODEL={path}", f"OUT={tmp_path}", f"CC={compiler}"]
    built = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "MAKEFLAGS": ""})
    assert built.returncode == 0, built.stderr
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), np.uint8)
    done = subprocess.run([str(tmp_path / "classify")], input=pixels.tobytes(), capture_output=True)
    assert done.returncode == 0, done.stderr
    names, numbers = zip(*(line.split() for line in done.stdout.decode().splitlines()), strict=True)
    network = abste.load(path)
    assert network.normalization is not None and names == network.classes
    mean, std = network.normalization
    image = (pixels.astype(np.float32) / np.float32(255) - mean) / std
    np.testing.assert_allclose([float(n) for n in numbers], network(image[None], layout="nhwc")[0], atol=6e-6)
    short = subprocess.run([str(tmp_path / "classify")], input=b"\0", capture_output=True)
    assert short.returncode == 1 and b"too short" in short.stderr
    # Another network or other flags make it anew, the same ones do not; and without a network it says what it needs.
    again = subprocess.run(command, capture_output=True, text=True)
    assert "up to date" in again.stdout
    graph.values[graph.input_count].output = True  # a second output
    other = tmp_path / "other.abste"
    other.write_bytes(abste_format.write(plan(graph)))
    os.utime(other, (0, 0))
    subprocess.run([*command, f"MODEL={other}"], capture_output=True, text=True, check=True)
    several = subprocess.run([str(tmp_path / "classify")], input=pixels.tobytes(), capture_output=True)
    assert several.returncode == 1 and b"does not take one image and give one vector" in several.stderr
    flags = subprocess.run([*command, f"MODEL={other}", "CFLAGS=-O1"], capture_output=True, text=True, check=True)
    assert "-O1" in flags.stdout
    none = subprocess.run([*command[:3], f"OUT={tmp_path}"], capture_output=True, text=True)
    assert none.returncode == 2 and "make MODEL=net.abste" in none.stderr
