"""What benchmarks/inference.py measures, in a process of its own for each setting: networks, engines, turns."""

from __future__ import annotations

import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from abste.bench import measure, peers
from abste.bench.measure import Call, Spread
from abste.bench.peers import Case
from abste.deploy import format as abste_format
from abste.deploy.graph import Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.plan import plan
from abste.deploy.unpack import unpack
from abste.runtime.network import Int8, Network, isas

SHAPES = [(64, 56), (128, 28), (256, 14), (512, 7), (64, 32), (128, 16), (256, 8), (512, 4)]
LAYERS = {"conv": 9, "gemv": 3}
CASES = [
    *(f"conv-{channels}@{size}" for channels, size in SHAPES),
    "gemv-4096",
    "gemv-1024",
    "resnet18-224-w1a1",
    "resnet18-32-w1a32",
    "resnet18-32-w1a1",
]
REST = 0.002
LEAST = 7
GAUGE_BOUND = 1.1
RULE = (
    "A call counts if a fixed loop of about 0.1 ms, timed right before and right after it, took at most "
    f"{GAUGE_BOUND:.2f} times the 10th percentile of all such timings of the setting. An engine with fewer than 5 "
    "calls that count, or than a fifth of its calls, keeps all of them and is marked as contended (~), as are its "
    "ratios: it looks slower than it is."
)

Function = Callable[[], object]
_vector = np.linspace(-1, 1, 4096, dtype=np.float32)


def gauge() -> float:
    """Seconds for a fixed amount of work in the first-level cache."""
    start = time.perf_counter()
    for _ in range(40):
        np.multiply(_vector, _vector).sum()
    return time.perf_counter() - start


def chain(kind: str, kernel: int, channels: int, size: int, layers: int) -> Graph:
    """Layers of one shape with random weights, one behind the other.

    Args:
        kind: ``xnor``: bits to bits by thresholds (the last gives floats); ``fused``: batch norm, a residual stream of
            floats and the sign; ``sign_conv``: floats to floats, scaled.
        kernel, channels, size, layers: of the layers; a size of 1 makes linear ones.
    """
    rng = np.random.default_rng(0)
    rank, shape = (1 if size == 1 else 3), (size, size, channels)
    reach = kernel * kernel * channels
    small = np.full(channels, 1 / math.sqrt(reach), np.float32)
    values, nodes = [Value(shape, rank=rank)], []

    def new(kind: Kind) -> int:
        values.append(Value(shape, kind, rank))
        return len(values) - 1

    bits, stream = 0, 0
    if kind != "sign_conv":
        bits = new(Kind.BITS)
        nodes.append(Node(Op.IDENTITY, (0,), None, bits))
    for number in range(layers):
        last = number == layers - 1
        op = Op.SIGN_CONV if kind == "sign_conv" else Op.XNOR
        weight = rng.random((channels, kernel, kernel, channels)) < 0.5
        padding = (kernel // 2,) * 4
        node = Node(op, (bits,), weight=weight, kernel=(kernel, kernel), padding=padding, name=f"layer{number}")
        if kind == "xnor" and not last:
            bound = rng.normal(0, math.sqrt(reach) / 2, channels).astype(np.int32)
            direction = np.where(rng.random(channels) < 0.1, -1, 1)
            node.steps = [Step(StepKind.THRESHOLD, a=np.stack([bound, direction], 1).astype(np.int32))]
            node.bits = bits = new(Kind.BITS)
        elif kind == "fused":
            shift = rng.normal(0, 0.3, channels).astype(np.float32)
            node.steps = [Step(StepKind.AFFINE, a=small, b=shift), Step(StepKind.ADD_VALUE, value=stream)]
            node.out = stream = new(Kind.FLOAT)
            if not last:
                node.bits = bits = new(Kind.BITS)
        else:
            node.steps = [Step(StepKind.MULTIPLY, a=small)]
            node.out = bits = new(Kind.FLOAT)
        nodes.append(node)
    values[-1].output = True
    return plan(Graph(values, nodes))


def resnet(name: str) -> Graph:
    """A ResNet-18 with random weights, its batch norms' statistics those of noise."""
    import torch

    import abste
    from abste.deploy import lower

    torch.manual_seed(0)
    _, size, bits = name.split("-")
    activations = "ste" if bits == "w1a1" else None
    builder = {"224": "imagenet_resnet18"}.get(size, "resnet18") + ("_bireal" if activations else "")
    model = abste.models.create(builder)
    example = torch.zeros(1, 3, int(size), int(size))
    abste.convert(model, weights="ste", activations=activations, example_input=example)
    with torch.no_grad():
        model(torch.randn(8, *example.shape[1:]))
    return lower(model.eval(), example).graph


def network(graph: Graph, isa: str, int8: Int8 | None = None) -> Network:
    return Network(np.frombuffer(abste_format.write(graph), np.uint8), "benchmark", isa, int8)


def bound_of(name: str) -> float:
    """How far one of our engines may be from torch: see `peers.TOLERANCES`."""
    eight = "int8" in name or "W1A8" in name
    return peers.TOLERANCES["int8" if eight else "binary" if "W1A1" in name else "float32"]


def exact_error(graph: Graph, x: Any, found: Any) -> float:
    """How far an output is from what torch computes in floats for the same signs."""
    import torch

    from abste.bench.as_torch import as_torch

    with torch.no_grad():
        return peers.distance(found, as_torch(unpack(graph, "exact"))(torch.from_numpy(x)).numpy())


class Setting:
    """A case with its engines; collects functions by name, and turns their times into rows."""

    def __init__(self, case: str, threads: int, batch: int, engines: list[str]) -> None:
        self.case, self.threads, self.batch = case, threads, batch
        self.engines = peers.chosen(engines)
        self.isas = [isa for isa in isas() if isa != "scalar"] or ["scalar"]
        self.functions: dict[str, Function] = {}
        self.nodes: dict[str, list[Any]] = {}  # of each call, seconds by node
        self.errors: dict[str, float] = {}
        self.notes: list[str] = []
        self.rng = np.random.default_rng(1)

    def input(self, graph: Graph) -> Any:
        return self.rng.normal(size=(self.batch, *graph.values[0].torch_shape)).astype(np.float32)

    def add_profile(self, name: str, net: Network, x: Any, kept: slice) -> None:
        """Times of some of its nodes."""
        found = self.nodes[name] = []
        self.functions[name] = lambda: found.append(net.profile(x, threads=self.threads).nodes[kept])

    def add_peers(self, graph: Graph, x: Any, form: str, precisions: tuple[str, ...]) -> None:
        """Other engines, each checked, as ``name/form``."""
        wanted = [peer for peer in self.engines if peer.precision in precisions]
        ours = network(graph, self.isas[0])(x, threads=self.threads)
        runs, errors, notes = peers.build(wanted, Case(graph, x, self.threads), ours)
        self.functions |= {f"{name}{form}": run for name, run in runs.items()}
        for name, error in errors.items():
            self.errors[name] = max(error, self.errors.get(name, 0.0))
        self.notes += [note for note in notes if note not in self.notes]

    def add_openvino_nodes(self, graph: Graph, x: Any) -> None:
        """OpenVINO's binary convolutions by its own clock, which has a resolution of 1 us."""
        if not any(peer.name == "openvino-binary" and not peer.missing() for peer in self.engines):
            return
        from abste.bench.as_openvino import as_openvino

        options = {**peers.openvino_options(self.threads), "PERF_COUNT": True}
        model = as_openvino(unpack(graph, "bits"), self.batch)
        request = peers.openvino_core().compile_model(model, "CPU", options).create_infer_request()
        found = self.nodes["openvino-binary/nodes"] = []

        def run() -> None:
            request.infer([x])
            infos = request.profiling_info
            found.append([i.real_time.total_seconds() for i in infos if i.node_type == "BinaryConvolution"][:-1])

        self.functions["openvino-binary/nodes"] = run

    def layers(self) -> None:
        """Convolutions or linear layers: chains, and single ones, whose difference leaves the ends out."""
        kind, _, rest = self.case.partition("-")
        channels, _, size = rest.partition("@")
        count = LAYERS[kind]
        shape = (3 if kind == "conv" else 1), int(channels), int(size or 1)
        kinds: dict[str, tuple[str, Int8 | None]] = {
            "W1A1": ("xnor", None),
            "W1A1 fused": ("fused", None),
            "W1A32": ("sign_conv", None),
            "W1A8": ("sign_conv", "binary"),
        }
        if kind == "gemv":
            del kinds["W1A1 fused"]
        for title, (name, int8) in kinds.items():
            graph, single = chain(name, *shape, count), chain(name, *shape, 1)
            x = self.input(graph)
            for isa in self.isas if int8 is None else self.isas[:1]:  # of int8 not all have kernels
                net = network(graph, isa, int8)
                self.errors[f"abste {isa} {title}"] = exact_error(graph, x, net(x, threads=self.threads))
                # What packs the input, and the layer that gives floats, are ends; but it is all that a GEMV has.
                packs = 0 if name == "sign_conv" else 1
                self.add_profile(f"abste {isa} {title}/nodes", net, x, slice(packs, -1 if packs else None))
                if kind == "gemv":
                    alone = network(single, isa, int8)
                    self.add_profile(f"abste {isa} {title}/node", alone, x, slice(packs, None))
                if self.threads > 1 and self.batch > 1:  # images side by side, which no profile shows
                    for form, one in (("/chain", net), ("/single", network(single, isa, int8))):
                        call = functools.partial(one, x, threads=self.threads)
                        self.functions[f"abste {isa} {title}{form}"] = call
            if name == "xnor":
                self.add_openvino_nodes(graph, x)
                self.add_peers(graph, x, "/chain", ("binary",))
                self.add_peers(single, x, "/single", ("binary",))
            if title == "W1A32":
                self.add_peers(graph, x, "/chain", ("float32", "bf16", "int8"))
                self.add_peers(single, x, "/single", ("float32", "bf16", "int8"))

    def whole(self) -> None:
        """A network from image to logits."""
        graph = resnet(self.case)
        x = self.input(graph)
        title = self.case.rpartition("-")[2].upper()
        kinds: dict[str, Int8 | None] = {title: None, f"{title}, int8 stem": "stem"}
        if title == "W1A32":
            kinds["W1A8"] = "all"
        for isa in self.isas:
            for kind, int8 in kinds.items() if isa == self.isas[0] else [(title, None)]:
                net = network(graph, isa, int8)
                self.errors[f"abste {isa} {kind}"] = exact_error(graph, x, net(x, threads=self.threads))
                self.functions[f"abste {isa} {kind}"] = functools.partial(net, x, threads=self.threads)
        self.add_peers(graph, x, "", ("float32", "bf16", "int8", *(["binary"] if title == "W1A1" else [])))

    def measure(self, seconds: float) -> dict[str, Any]:
        """The row of this setting, as JSON types; times are seconds for a batch, of layers for a single one."""
        if self.case.startswith("resnet"):
            self.whole()
        else:
            self.layers()
        rest = REST if self.threads > 1 else 0.0
        for name, error in self.errors.items():
            if name.startswith("abste") and not error <= bound_of(name):
                raise SystemExit(f"{self.case}: {name} is wrong, by {error:.2g} of the size of its output.")
        calls = measure.by_turns(self.functions, seconds, least=LEAST, rest=rest, gauge=gauge)
        readings = sorted(call.gauge for found in calls.values() for call in found)
        bound = GAUGE_BOUND * readings[len(readings) // 10]
        timed = {name: self.timed(name, found, bound) for name, found in calls.items()}
        engines: dict[str, Any] = {}
        for name in dict.fromkeys(name.partition("/")[0] for name in timed):
            engines[name] = self.best(name, timed)
            engines[name]["error"] = float(f"{self.errors[name]:.2e}")
            engines[name]["precision"] = peers.PEERS[name].precision if name in peers.PEERS else name.split(" ", 2)[2]
        return {
            "case": self.case,
            "threads": self.threads,
            "batch": self.batch,
            "gauge_us": {"bound": round(1e6 * bound, 1), "median": round(1e6 * statistics.median(readings), 1)},
            "engines": engines,
            "notes": self.notes,
        }

    def timed(self, name: str, found: list[Call], bound: float) -> dict[str, Any]:
        """The spread of the calls that count."""
        seconds = [call.seconds for call in found]
        if name in self.nodes:  # called once before all, then twice in each turn
            rows = [np.asarray(row) for row in self.nodes[name][2::2]]
            seconds = [float(row.mean()) for row in rows]
        good = [s for s, call in zip(seconds, found, strict=True) if call.gauge <= bound]
        contended = len(good) < max(5, len(found) / 5)
        spread = Spread.of(seconds if contended else good)
        return {
            **dict(zip(Spread._fields, spread, strict=True)),
            "rejected": len(found) - len(good),
            "contended": contended,
        }

    def best(self, name: str, timed: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """A network as it is; for a layer the best of what it was timed by, each of them per layer."""
        if name in timed:
            return timed[name]
        forms: dict[str, dict[str, Any]] = {}
        count = LAYERS[self.case.partition("-")[0]]
        numbers = ("median", "low", "high")
        for form in ("nodes", "node", "chain", "single"):
            if f"{name}/{form}" in timed:
                row = timed[f"{name}/{form}"]
                forms[form] = {**row, **{key: row[key] / (count if form == "chain" else 1) for key in numbers}}
        if name.startswith("abste") and self.threads > 1 and self.batch > 1:
            forms.pop("node", None)
            del forms["nodes"]
        if "chain" in forms and "single" in forms:
            each = (timed[f"{name}/chain"]["median"] - forms["single"]["median"]) / (count - 1)
            if each > 0.6 * forms["chain"]["median"]:  # less is noise, not the ends
                forms["difference"] = {**forms["chain"], **dict.fromkeys(numbers, each)}
        form = min(forms, key=lambda key: forms[key]["median"])
        return {**forms[form], "form": form, "forms": {key: row["median"] for key, row in forms.items()}}


# Memory: each engine loads its file and answers once, in a process of its own.

_LOADERS = {
    "abste": "import abste, abste.runtime.network\ndef load(): return abste.load(path)",
    "onnxruntime": (
        "import onnxruntime\ndef load():\n    options = onnxruntime.SessionOptions()\n"
        "    options.intra_op_num_threads = 1\n"
        "    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])\n"
        "    return lambda x: session.run(None, {'input0': x})[0]"
    ),
    "openvino": (
        "import openvino\ndef load():\n"
        "    model = openvino.compile_model(path, 'CPU', {'INFERENCE_NUM_THREADS': 1, 'NUM_STREAMS': 1, "
        "'INFERENCE_PRECISION_HINT': 'f32'})\n    return lambda x: model([x])[0]"
    ),
    "torch": (
        "import torch\nfrom abste.bench.as_torch import PlainModule\ntorch.set_num_threads(1)\ndef load():\n"
        "    module = torch.load(path, weights_only=False)\n    return lambda x: module(torch.from_numpy(x)).numpy()"
    ),
}
_MEMORY = """
import json, sys, time
import numpy as np
from abste.bench.measure import rise
path, size = sys.argv[1], int(sys.argv[2])
{loader}
x = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
found = []
def run():
    start = time.perf_counter()
    y = np.array(load()(x))
    found.extend([time.perf_counter() - start, y.ravel().tolist()])
print(json.dumps([rise(run), *found]))
"""


def memory(case: str, engines: list[str], repeats: int) -> dict[str, Any]:
    """Rise of peak resident memory from imports to first answer, for each engine's own file of one network."""
    import torch

    from abste.bench.as_torch import as_torch

    graph = resnet(case)
    size = graph.values[0].shape[0]
    x = np.random.default_rng(1).normal(size=(1, 3, size, size)).astype(np.float32)
    result: dict[str, Any] = {}
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        (folder / "abste.abste").write_bytes(abste_format.write(graph))
        files = {"abste": ("abste", "abste.abste")}
        for peer in peers.chosen(engines):
            if peer.missing():
                notes.append(f"{peer.name} is left out: {' and '.join(peer.missing())} not installed.")
            elif peer.name == "torch":
                torch.save(as_torch(unpack(graph)), folder / "torch.pt")
                files["torch"] = ("torch", "torch.pt")
            elif peer.name in ("onnxruntime", "onnxruntime-int8"):
                made = Case(graph, x, 1)
                data = made.quantized("QDQ") if peer.precision == "int8" else made.onnx
                (folder / f"{peer.name}.onnx").write_bytes(data)
                files[peer.name] = ("onnxruntime", f"{peer.name}.onnx")
            elif peer.name in ("openvino", "openvino-binary"):
                import openvino

                from abste.bench.as_onnx import as_onnx
                from abste.bench.as_openvino import as_openvino

                if peer.precision == "binary":
                    model = as_openvino(unpack(graph, "bits"), 1)
                else:
                    model = openvino.convert_model(_written(folder / "float.onnx", as_onnx(unpack(graph), 1)))
                openvino.save_model(model, folder / f"{peer.name}.xml", compress_to_fp16=False)
                files[peer.name] = ("openvino", f"{peer.name}.xml")
        answers: dict[str, Any] = {}
        runs: dict[str, list[Any]] = {name: [] for name in files}
        for _ in range(repeats):
            for name, (loader, file) in files.items():
                code = _MEMORY.format(loader=_LOADERS[loader])
                command = [sys.executable, "-c", code, str(folder / file), str(size)]
                environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
                rise, seconds, answers[name] = json.loads(done.stdout)
                runs[name].append((rise, seconds))
        reference = next((answers[name] for name in ("torch", "onnxruntime", "openvino") if name in answers), None)
        for name, found in runs.items():
            wanted = answers["abste"] if name in ("abste", "openvino-binary") else reference
            rises = [rise for rise, _ in found]
            result[name] = {
                "bytes": int(statistics.median(rises)),
                "least": min(rises),
                "most": max(rises),
                "load_and_answer_seconds": round(statistics.median(seconds for _, seconds in found), 4),
                "file_bytes": sum(file.stat().st_size for file in folder.glob(f"{Path(files[name][1]).stem}.*")),
                "error": float(f"{peers.distance(np.array(answers[name]), np.array(wanted)):.2e}"),
            }
    return {"case": f"memory-{case}", "threads": 1, "batch": 1, "engines": result, "notes": notes}


def _written(path: Path, model: Any) -> Path:
    path.write_bytes(model.SerializeToString())
    return path
