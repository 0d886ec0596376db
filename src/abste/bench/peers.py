"""Other engines, each running the float network of a packed network's shape; each is imported when it is asked for."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from abste.deploy.graph import Array, Graph
from abste.deploy.unpack import Plain, unpack
from abste.errors import ConfigError, nearest

Run = Callable[[], Array]

TOLERANCES = {"float32": 1e-3, "bf16": 0.1, "int8": 0.35, "binary": 0.1}
"""How far outputs may be from the reference: the root of the mean square of the difference over that of the reference.
int8 is quantised on random numbers; a binary network differs where sums that are added in another order turn a sign."""


@dataclass(frozen=True)
class Peer:
    """An engine in one precision.

    Attributes:
        name: as on the command line.
        precision: ``float32``, ``bf16``, ``int8`` or ``binary``.
        modules: what it imports.
        build: from a case to a function that runs it.
    """

    name: str
    precision: str
    modules: tuple[str, ...]
    build: Callable[[Case], Run]

    def missing(self) -> list[str]:
        """The modules that are not installed."""
        return [module for module in self.modules if importlib.util.find_spec(module) is None]


class Case:
    """A network, its input, and how many threads to use: what a peer is built from.

    Args:
        graph: with one input and one output.
        x: (N, ...) float32.
        threads: how many.
    """

    def __init__(self, graph: Graph, x: Array, threads: int) -> None:
        if graph.input_count != 1 or len(graph.outputs()) != 1:
            raise ConfigError(
                "only a network with one input and one output can be compared with other engines: use --peers none."
            )
        self.graph = graph
        self.x = np.ascontiguousarray(x, np.float32)
        self.threads = threads

    @functools.cached_property
    def plain(self) -> Plain:
        """The float network."""
        return unpack(self.graph, "drop")

    @functools.cached_property
    def onnx(self) -> bytes:
        """It as a file of ONNX."""
        from abste.bench.as_onnx import as_onnx

        return bytes(as_onnx(self.plain, len(self.x)).SerializeToString())

    @functools.cache  # noqa: B019  a case lives as long as its peers
    def quantized(self, form: str) -> bytes:
        """It as a file of ONNX in int8, quantised on the input: ``QDQ`` or ``QOperator``."""
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,unused-ignore]
            def __init__(self, x: Array) -> None:
                self.feeds = iter([{"input0": x}])

            def get_next(self) -> Any:
                return next(self.feeds, None)

        with tempfile.TemporaryDirectory() as folder, _quiet():
            source, target = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
            source.write_bytes(self.onnx)
            quantization.quantize_static(
                str(source),
                str(target),
                Reader(self.x),
                quant_format=quantization.QuantFormat[form],
                per_channel=True,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
            )
            return target.read_bytes()


@contextlib.contextmanager
def _quiet() -> Any:
    """Keeps a quantiser from telling how it would like its model."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)


def _torch(case: Case, *, bf16: bool = False, compiled: bool = False, channels_last: bool = True) -> Run:
    import torch
    import torch._inductor.config

    from abste.bench.as_torch import as_torch

    torch.set_num_threads(case.threads)
    dtype = torch.bfloat16 if bf16 else torch.float32
    module: Any = as_torch(case.plain).to(dtype)
    x = torch.from_numpy(case.x).to(dtype)
    if channels_last and x.dim() == 4:
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    if compiled:
        torch._inductor.config.freezing = True
        module = torch.compile(module)

    def run() -> Array:
        with torch.inference_mode() if not compiled else torch.no_grad():
            y = module(x)
        found: Array = (y.float() if bf16 else y).numpy()
        return found

    return run


def _onnxruntime(case: Case, form: str = "") -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = case.threads, 1
    options.log_severity_level = 3
    model = case.quantized(form) if form else case.onnx
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    feed = {"input0": case.x}

    def run() -> Array:
        found: Array = session.run(None, feed)[0]
        return found

    return run


@functools.cache
def openvino_core() -> Any:
    """OpenVINO's core, kept until the process ends.

    Its CPU plugin gives the thread an alternate signal stack and, when it goes, frees it without telling the system:
    the next signal that Python handles, a Ctrl-C or the end of a child, would then kill the process.
    """
    import openvino

    return openvino.Core()


def openvino_options(threads: int, precision: str = "f32") -> dict[str, Any]:
    """What OpenVINO's CPU plugin is told: the threads, and not to compute in another precision than asked for."""
    return {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "INFERENCE_PRECISION_HINT": precision,
        "ENABLE_CPU_PINNING": False,
    }


def _openvino(case: Case, precision: str = "f32", form: str = "", binary: bool = False) -> Run:
    core = openvino_core()
    if binary:
        from abste.bench.as_openvino import as_openvino

        plain = unpack(case.graph, "bits")
        if not any(operation.kind == "BinaryConvolution" for operation in plain.operations):
            raise ConfigError("the network has no layer that its BinaryConvolution could run.")
        model: Any = as_openvino(plain, len(case.x))
    else:
        model = core.read_model(case.quantized(form) if form else case.onnx)
    request = core.compile_model(model, "CPU", openvino_options(case.threads, precision)).create_infer_request()
    feed = [case.x]

    def run() -> Array:
        found: Array = request.infer(feed, share_inputs=True, share_outputs=True)[0]
        return found

    return run


_ORT = ("onnx", "onnxruntime")
PEERS = {
    peer.name: peer
    for peer in (
        Peer("torch", "float32", ("torch",), _torch),
        Peer("torch-nchw", "float32", ("torch",), functools.partial(_torch, channels_last=False)),
        Peer("torch-compile", "float32", ("torch",), functools.partial(_torch, compiled=True)),
        Peer("torch-bf16", "bf16", ("torch",), functools.partial(_torch, bf16=True)),
        Peer("torch-compile-bf16", "bf16", ("torch",), functools.partial(_torch, bf16=True, compiled=True)),
        Peer("onnxruntime", "float32", _ORT, _onnxruntime),
        Peer("onnxruntime-int8", "int8", _ORT, functools.partial(_onnxruntime, form="QDQ")),
        Peer("onnxruntime-int8-qop", "int8", _ORT, functools.partial(_onnxruntime, form="QOperator")),
        Peer("openvino", "float32", ("onnx", "openvino"), _openvino),
        Peer("openvino-bf16", "bf16", ("onnx", "openvino"), functools.partial(_openvino, precision="bf16")),
        Peer("openvino-int8", "int8", (*_ORT, "openvino"), functools.partial(_openvino, form="QDQ")),
        Peer("openvino-binary", "binary", ("openvino",), functools.partial(_openvino, binary=True)),
    )
}
USUAL = ("torch", "onnxruntime", "onnxruntime-int8", "openvino", "openvino-int8", "openvino-binary")
"""Those that `abste bench` takes by itself: they are ready in seconds."""


def chosen(names: Iterable[str] | None) -> list[Peer]:
    """The peers of these names; ``["all"]`` are all of them, ``["none"]`` none, None the usual ones.

    Raises:
        ConfigError: an unknown name, or "all" or "none" beside others.
    """
    names = list(USUAL if names is None else names)
    if names == ["all"]:
        return list(PEERS.values())
    if names == ["none"]:
        return []
    for name in names:
        if name in ("all", "none"):
            raise ConfigError(f"--peers {name} stands alone; leave out {name!r} or the other names.")
        if name not in PEERS:
            raise ConfigError(f"unknown peer {name!r}; {nearest(name, [*PEERS, 'all', 'none'])}")
    return [PEERS[name] for name in names]


def build(peers: Iterable[Peer], case: Case, binary: Array) -> tuple[dict[str, Run], dict[str, float], list[str]]:
    """Build engines and check what they compute.

    The reference of floats is the first engine in float32; that of binary networks is the packed network.

    Args:
        peers: which.
        case: what they run.
        binary: what the packed network gives for the case's input.

    Returns:
        Functions that run them; how far their outputs are from the reference; and a sentence for each that is left out.
    """
    functions: dict[str, Run] = {}
    errors: dict[str, float] = {}
    notes: list[str] = []
    reference: Array | None = None
    for peer in sorted(peers, key=lambda peer: peer.precision != "float32"):
        missing = peer.missing()
        if missing:
            notes.append(f"{peer.name} is left out: {_are(missing)} not installed.")
            continue
        try:
            run = peer.build(case)
            y = np.array(run(), np.float32)
        except Exception as error:  # whatever an engine raises
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            notes.append(f"{peer.name} is left out: {reason}")
            continue
        wanted = binary if peer.precision == "binary" else reference
        if wanted is None:
            if peer.precision == "float32":
                reference = wanted = y
            else:
                notes.append(f"{peer.name} is left out: no engine in float32 says what is right.")
                continue
        errors[peer.name] = distance(y, wanted)
        if not errors[peer.name] <= TOLERANCES[peer.precision]:
            notes.append(f"{peer.name} is left out: its outputs are wrong, by {errors[peer.name]:.2g} of their size.")
            continue
        functions[peer.name] = run
    return functions, errors, notes


def _are(missing: list[str]) -> str:
    return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'}"


def distance(found: Array, wanted: Array) -> float:
    """Root mean square of the difference over that of what is wanted; infinite where shapes differ."""
    if found.shape != wanted.shape:
        return float("inf")
    size = float(np.sqrt(np.mean(np.square(wanted, dtype=np.float64))))
    return float(np.sqrt(np.mean(np.square(found.astype(np.float64) - wanted)))) / max(size, 1e-30)
