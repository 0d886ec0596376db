"""Measures a packed network in total, by layer, by instruction set and number of threads, beside other engines."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from abste._version import __version__
from abste.bench import measure, peers
from abste.bench.measure import Spread
from abste.deploy import format as abste_format
from abste.errors import ConfigError
from abste.runtime.inspect import printable
from abste.runtime.network import MAX_THREADS, Int8, Network, available_cores, int8_isas, isas, load
from abste.zoo import resolve

REST = 0.002
"""Seconds before each turn where engines have several threads: those of the one before go on spinning for a while."""


@dataclass
class Timing:
    """How long an engine takes for a batch.

    Attributes:
        engine: ``"abste avx512"``, or the name of a peer.
        threads: how many.
        time: seconds for the batch.
        nodes: seconds for each node of the packed network, medians; empty for peers.
        error: how far its outputs are from the reference (`peers.TOLERANCES`); 0 for the packed network.
    """

    engine: str
    threads: int
    time: Spread
    nodes: list[float] = field(default_factory=list)
    error: float = 0.0


@dataclass
class Benchmark:
    """What was measured; ``print`` it.

    Attributes:
        file: name of the file.
        batch: images in a call.
        timings: of each engine and number of threads.
        nodes: (name, operation, macs) of each node.
        memory: bytes: ``file``, ``arena``, and of the fastest instruction set measured ``packed`` and ``rise``: by how
            much loading it and running it once raises the peak of resident memory in a new process; None if unknown.
        shapes: of input and output.
        notes: what was left out, and why.
        machine: processor, cores and system.
        versions: of abste, Python and numpy.
    """

    file: str
    batch: int
    timings: list[Timing]
    nodes: list[tuple[str, str, int]]
    memory: dict[str, int | None]
    shapes: tuple[str, str]
    notes: list[str]
    machine: dict[str, Any]
    versions: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON types."""
        result = asdict(self)
        for timing in result["timings"]:
            timing["time"] = dict(zip(Spread._fields, timing["time"], strict=True))
        return result

    def __str__(self) -> str:
        images = "one image" if self.batch == 1 else f"batches of {self.batch}"
        head = f"{self.file}: {self.shapes[0]} to {self.shapes[1]}, {images}, on {self.machine['processor']}"
        parts = [head, self._totals(), self._layers(), self._memory()]
        return "\n\n".join([*parts, *(["\n".join(self.notes)] if self.notes else [])])

    def _totals(self) -> str:
        """Each engine, the fastest first, beside the packed network's best with as many threads."""
        rows = [("engine", "threads", "time", "quartiles", "images/s", "")]
        for threads in dict.fromkeys(timing.threads for timing in self.timings):
            those = [timing for timing in self.timings if timing.threads == threads]
            best = min((x.time.median for x in those if x.nodes), default=None)
            for x in sorted(those, key=lambda timing: timing.time.median):
                unit, scale = _unit(x.time.median)
                ratio = x.time.median / best if best else 1.0
                note = "" if x.nodes or not best else f"abste is {ratio:.1f}x as fast"
                rows.append(
                    (
                        x.engine,
                        str(threads),
                        f"{_digits(x.time.median * scale)} {unit}",
                        f"{_digits(x.time.low * scale)}-{_digits(x.time.high * scale)}",
                        f"{self.batch / x.time.median:,.0f}",
                        note,
                    )
                )
        return _table(rows, left=(0, 5))

    def _layers(self) -> str:
        own = [timing for timing in self.timings if timing.nodes]
        if not own:
            return ""
        heads = [f"{x.engine.removeprefix('abste ')} x{x.threads}" for x in own]
        rows: list[tuple[str, ...]] = [("layer", "operation", *heads, "share", "GOP/s")]
        first = np.array(own[0].nodes)
        for number, (name, operation, macs) in enumerate(self.nodes):
            times = [_digits(1e6 * x.nodes[number]) for x in own]
            speed = 2e-9 * macs * self.batch / first[number] if macs and first[number] else 0
            share = first[number] / max(first.sum(), 1e-12)
            rows.append((name or "-", operation, *times, f"{share:.0%}", f"{speed:,.0f}" if macs else "-"))
        return (
            _table(rows, left=(0, 1))
            + f"\n(microseconds; share and GOP/s: {heads[0]}; a multiply-accumulate counts as two)"
        )

    def _memory(self) -> str:
        named = {"file": "the file", "arena": "working memory for an image", "packed": "weights in the kernels' order"}
        lines = [f"{self.memory[key]:>12,} bytes  {what}" for key, what in named.items()]
        if self.memory["rise"] is not None:
            lines.append(f"{self.memory['rise']:>12,} bytes  rise of peak memory from import to first answer")
        return "\n".join(lines)


def _usual(int8: Int8 | None) -> list[str]:
    """The instruction sets of this machine: of layers in int8 those that have kernels for it, if any."""
    return [name for name in isas() if int8 is None or name in int8_isas()] or isas()


def bench(
    path: str | os.PathLike[str],
    *,
    batch: int = 1,
    threads: Sequence[int] | None = None,
    isa: Sequence[str] | None = None,
    seconds: float = 5.0,
    peer_names: Iterable[str] | None = None,
    int8: Int8 | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Benchmark:
    """Measure an .abste file on this machine.

    Engines take turns (:func:`abste.bench.measure.by_turns`), and read the same random images.

    Args:
        path: of the file.
        batch: images in a call.
        threads: numbers of threads; default: 1, and as many as the process may use cores.
        isa: instruction sets; default: all of the machine.
        seconds: for each number of threads.
        peer_names: other engines, of `abste.bench.peers.PEERS`, or ``["all"]`` or ``["none"]``; default: the usual
            ones, where the network has one input and one output.
        int8: which of the packed network's layers compute with integers of eight bits: see :func:`abste.load`.
        say: is told what is being done.

    Raises:
        ConfigError: a number that is not positive, an unknown instruction set or peer.
        FormatError: see :func:`abste.load`.
    """
    cores = available_cores()
    threads = list(dict.fromkeys(threads or (1, min(cores, MAX_THREADS))))
    if batch < 1 or min(threads) < 1 or not seconds > 0:
        raise ConfigError("--batch, --threads and --seconds must be positive.")
    wanted = peers.chosen(peer_names)
    networks = {name: load(path, isa=name, int8=int8) for name in dict.fromkeys(isa or _usual(int8))}
    first = next(iter(networks.values()))
    rng = np.random.default_rng(0)
    try:
        inputs = [rng.normal(size=(batch, *value.shape)).astype(np.float32) for value in first.inputs]
    except (MemoryError, ValueError):  # NumPy raises the latter where a size is no machine word
        raise ConfigError(f"--batch {batch}: so many images do not fit into memory.") from None
    notes: list[str] = []
    if peer_names is None and (len(first.inputs), len(first.outputs)) != (1, 1):
        wanted, notes = [], ["Other engines are left out: the network has several inputs or outputs."]
    timings: list[Timing] = []
    for count in threads:
        say(f"measuring with {count} thread{'s' * (count > 1)}: {', '.join([*networks, *(p.name for p in wanted)])}")
        functions: dict[str, Callable[[], object]] = {}
        layers: dict[str, list[Any]] = {}  # of each call
        for name, network in networks.items():
            functions[f"abste {name}"] = functools.partial(network, *inputs, threads=count)
            found = layers[f"abste {name}"] = []
            functions[f"layers of {name}"] = functools.partial(_by_node, network, inputs, count, found)
        others: dict[str, peers.Run] = {}
        errors: dict[str, float] = {}
        if wanted:
            graph = abste_format.read(resolve(path).read_bytes())
            case = peers.Case(graph, inputs[0], count)
            others, errors, left_out = peers.build(wanted, case, load(path)(*inputs, threads=count))
            notes += [note for note in left_out if note not in notes]
        functions |= others
        calls = measure.by_turns(functions, seconds, rest=REST if count > 1 else 0.0)
        for name in (name for name in functions if not name.startswith("layers of ")):
            time = Spread.of([call.seconds for call in calls[name]])
            nodes = [float(x) for x in np.median(layers[name], axis=0)] if name in layers else []
            timings.append(Timing(name, count, time, nodes, errors.get(name, 0.0)))
    fastest = min((x for x in timings if x.engine.startswith("abste ")), key=lambda x: x.time.median)
    network = networks[fastest.engine.removeprefix("abste ")]
    shapes = ["x".join(map(str, value.shape)) for value in (first.inputs[0], first.outputs[0])]
    return Benchmark(
        file=resolve(path).name,
        batch=batch,
        timings=timings,
        nodes=[(node.name, node.operation, node.macs) for node in first.nodes],
        memory={
            "file": first.file_bytes,
            "arena": first.arena_bytes,
            "packed": network.packed_bytes,
            "rise": rise_in_new_process(path, batch, network.isa, int8),
        },
        shapes=(shapes[0], shapes[1]),
        notes=notes,
        machine={"processor": processor(), "cores": cores, "system": platform.platform(terse=True)},
        versions={"abste": __version__, "python": platform.python_version(), "numpy": np.__version__},
    )


def _by_node(network: Network, inputs: list[Any], threads: int, found: list[Any]) -> None:
    found.append(network.profile(*inputs, threads=threads).nodes)


_CHILD = """
import sys
import numpy as np
import abste, abste.runtime.network
from abste.bench.measure import rise
path, batch, isa, int8 = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4] or None
def run():
    net = abste.load(path, isa=isa, int8=int8)
    net(*(np.zeros((batch, *value.shape), np.float32) for value in net.inputs), threads=1)
print(rise(run))
"""


def rise_in_new_process(path: str | os.PathLike[str], batch: int, isa: str, int8: str | None = None) -> int | None:
    """Bytes by which loading a file and running it once raise the peak of resident memory; None if that failed."""
    command = [sys.executable, "-c", _CHILD, os.fspath(path), str(batch), isa, int8 or ""]
    done = subprocess.run(command, capture_output=True, text=True)
    return int(json.loads(done.stdout)) if done.returncode == 0 else None


def processor() -> str:
    """The processor's name where the system tells it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _unit(seconds: float) -> tuple[str, float]:
    if seconds >= 1:
        return "s", 1
    return ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)


def _digits(number: float) -> str:
    """Three digits or more, without an exponent."""
    return f"{number:,.{0 if number >= 100 else 1 if number >= 10 else 2}f}"


def _table(rows: Sequence[tuple[str, ...]], left: tuple[int, ...]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    form = "  ".join(f"{{:{'<' if column in left else '>'}{width}}}" for column, width in enumerate(widths))
    lines = [form.format(*row).rstrip() for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    # Names come from the file: what a terminal would obey rather than show is replaced.
    return "\n".join(map(printable, lines))
