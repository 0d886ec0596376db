"""A packed network: loads an .abste file and runs it."""

from __future__ import annotations

import json
import mmap
import operator
import os
import warnings
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np

from abste.errors import ConfigError, FormatError, nearest
from abste.zoo import resolve

try:
    from abste.runtime import _native
except ImportError as error:
    raise ImportError("abste is here without its C library; install it with pip, and a C++ compiler.") from error

Array = np.ndarray[Any, np.dtype[Any]]
Layout = Literal["nchw", "nhwc"]
Int8 = Literal["stem", "float", "binary", "all"]

_INT8: dict[str | None, int] = {
    None: 0,
    "stem": _native.INT8_STEM,
    "float": _native.INT8_STEM | _native.INT8_FLOAT,
    "binary": _native.INT8_BINARY,
    "all": _native.INT8_STEM | _native.INT8_FLOAT | _native.INT8_BINARY,
}

_THRESHOLD = 15
"""Kind of the step that makes bits of sums: docs/format.md."""

MAX_ARENA = 2**30
"""Bytes of working memory beyond which :func:`load` refuses a file."""

MAX_WORK = 10**12
"""Multiply-accumulates and comparisons for one image beyond which :func:`load` refuses a file: a small file can ask for
years of honest work. A ResNet-152 has 10**10."""

MAX_THREADS = 256
"""The largest number of threads that a call may ask for: the process keeps them, and starts them before it computes."""


class TensorInfo(NamedTuple):
    """An input, an output, or what a node writes.

    Attributes:
        name: as in the file.
        shape: without the batch, as in PyTorch: (C, H, W), (C, W) or (C,).
    """

    name: str
    shape: tuple[int, ...]


class NodeInfo(NamedTuple):
    """One operation of the network, with what is fused behind it.

    Attributes:
        name: the module it came from.
        operation: its name in docs/format.md.
        shape: of its output, without the batch: (C, H, W), (C, W) or (C,).
        steps: the modules whose outputs stand after its steps; "" for a step in the middle of one. That of a threshold,
            which gives signs, is the last module that went into it.
        weight_bits: 1, 16 or 32; 0 where it has no weights.
        weights: how many.
        macs: multiply-accumulates for one image, padding included.
        input_bits: 1, 32, or 8 where the network was loaded with ``int8``.
    """

    name: str
    operation: str
    shape: tuple[int, ...]
    steps: tuple[str, ...]
    weight_bits: int
    weights: int
    macs: int
    input_bits: int


class Profile(NamedTuple):
    """Where the time of a run went.

    Attributes:
        nodes: seconds of each node, (len(network.nodes),) float64, summed over the images.
        around: seconds spent around the nodes: copying inputs and outputs.
    """

    nodes: Array
    around: float


class Network:
    """A packed network that is ready to run. :func:`load` makes one.

    It is read only, and several threads may call it at the same time. A pickle or a deep copy of it holds the file, and
    on another machine takes the kernels that are fastest there, unless :func:`load` was told which.

    Attributes:
        inputs, outputs: names and shapes.
        nodes: the operations, in the order in which they run.
        classes: names of the classes, or None.
        normalization: mean and standard deviation per channel, each (C,) float32, of pixels between 0 and 1; or None.
        metadata: what else the file says of itself.
        file_bytes: size of the file.
        arena_bytes: working memory for one image.
        isa: the instruction set whose kernels run it.
        packed_bytes: memory for weights in the order that those kernels want.
        int8: which layers compute with integers of eight bits, as given to :func:`load`.
    """

    def __init__(self, data: Array, name: str, isa: str | None = None, int8: Int8 | None = None) -> None:
        try:
            self._model = _native.Model(data)
        except ValueError as error:
            raise FormatError(f"{name}: {error}") from None
        if not isinstance(int8, str | None) or int8 not in _INT8:
            raise ConfigError(f"int8={int8!r}; {nearest(str(int8), [key for key in _INT8 if key])}")
        self.isa = _chosen(isa)
        self.int8 = int8
        if int8 is not None and self.isa not in int8_isas():
            warnings.warn(
                f"int8={int8!r}: there are no kernels for {self.isa} that compute with integers of eight bits; these "
                "layers will be slower than exact.",
                stacklevel=3,
            )
        self.packed_bytes = int(self._model.packed_bytes(self.isa, _INT8[int8]))
        self._name = name
        self._data, self._asked = data, isa
        self.file_bytes = int(data.nbytes)
        self.arena_bytes = int(self._model.arena_bytes)
        self._check_memory()
        records = self._model.nodes
        work = sum(record[7] for record in records)
        if work > MAX_WORK:
            raise FormatError(
                f"{name}: the network asks for {work:.0e} operations for each image, more than {MAX_WORK:.0e}; set "
                "abste.runtime.network.MAX_WORK if you trust the file."
            )
        self._model.pack(self.isa, _INT8[int8])
        self.arena_bytes = int(self._model.arena_bytes)  # of int8 too
        self._check_memory()
        records = self._model.nodes
        self._inputs = [_Tensor(*value) for value in self._model.inputs]
        self._outputs = [_Tensor(*value) for value in self._model.outputs]
        self.inputs = tuple(value.info() for value in self._inputs)
        self.outputs = tuple(value.info() for value in self._outputs)
        self._written = []
        kinds = []  # of first steps
        nodes = []
        for node_name, operation, value, steps, bits, weights, macs, _, input_bits, first in records:
            self._written.append(_Tensor(*value))
            shape = self._written[-1].info().shape
            kinds.append(first)
            nodes.append(NodeInfo(node_name, operation, shape, steps, bits, weights, macs, input_bits))
        self.nodes = tuple(nodes)
        self._points = _points(self.nodes, kinds)
        numbers = self._model.normalization
        self.normalization = None if numbers is None else tuple(np.array(numbers, np.float32).reshape(2, -1))
        classes = self._model.classes
        self.classes = None if classes is None else tuple(classes.decode(errors="replace").split("\0")[:-1])
        self.metadata: dict[str, Any] = {}
        if self._model.metadata is not None:
            try:
                metadata = json.loads(self._model.metadata)
            except (ValueError, RecursionError) as error:
                raise FormatError(f"{name}: its metadata is not JSON ({error}).") from None
            self.metadata = metadata if isinstance(metadata, dict) else {}

    def __reduce__(self) -> tuple[Any, ...]:
        return _from_bytes, (self._data.tobytes(), self._name, self._asked, self.int8)

    def _check_memory(self) -> None:
        memory = self.arena_bytes + self.packed_bytes
        if memory > MAX_ARENA:
            raise FormatError(
                f"{self._name}: the network asks for {memory:,} bytes of working memory, more than {MAX_ARENA:,}; "
                "set abste.runtime.network.MAX_ARENA if you trust the file."
            )

    def __repr__(self) -> str:
        shapes = " and ".join(str(value.shape) for value in self.inputs)
        results = " and ".join(str(value.shape) for value in self.outputs)
        return f"<abste.Network {self._name}: {shapes} to {results}, {self.file_bytes:,} bytes>"

    def __call__(
        self,
        *inputs: Any,
        layout: Layout = "nchw",
        intermediates: Iterable[str] | str | None = None,
        threads: int | None = None,
    ) -> Any:
        """Run the network on a batch.

        Args:
            inputs: one array per input, float32, (N, C, H, W), or (N, H, W, C) with ``layout="nhwc"``; (N, C, W) or
                (N, W, C), and (N, C), where the network's input has fewer dimensions. NumPy, or anything with
                ``__dlpack__`` on the CPU, such as a torch tensor; not copied if contiguous. N may be 0.
            layout: of inputs, outputs and intermediates.
            intermediates: names of modules whose outputs are wanted too, or one name. A layer with binary weights and
                inputs gives its integer sums, before the scale (int32); any other what PyTorch's module gives
                (float32), without the dimensions of a single pixel where a flattening follows.
            threads: how many to use, at most ``MAX_THREADS``; default: as many as the process may use cores.

        Returns:
            The output, (N, ...) float32; a tuple where the network has several. With ``intermediates`` a pair of
            that and a dict of arrays by name.

        Raises:
            ConfigError: an input of the wrong shape or dtype, an unknown layout or name, a number of threads that is
                none or too large.
        """
        if isinstance(intermediates, str):  # else each of its letters would be a name
            intermediates = [intermediates]
        names = list(dict.fromkeys(intermediates or ()))
        outputs, buffers = self._run(inputs, [self._point(name) for name in names], layout, threads)
        result = outputs[0] if len(outputs) == 1 else tuple(outputs)
        if intermediates is None:
            return result
        found = {}
        for name, buffer in zip(names, buffers, strict=True):
            value = self._written[self._point(name)[0]]
            if layout == "nchw":
                buffer = np.ascontiguousarray(np.moveaxis(buffer, -1, 1))
            found[name] = buffer.reshape(len(buffer), *value.shape(layout))
        return result, found

    def trace(
        self, inputs: Any, points: Iterable[tuple[int, int]], *, threads: int | None = None
    ) -> tuple[list[Array], list[Array]]:
        """What nodes compute on the way, for checking: the outputs, and an array per point.

        Args:
            inputs: of a network with one input, as when calling it with ``layout="nchw"``.
            points: (node, step): what stands after that step, float32; for step -1 its sums (int32 of ``xnor``).
            threads: see :meth:`__call__`.

        Returns:
            The outputs (N, ...) and for each point (N, h, w, c).
        """
        return self._run((inputs,), list(points), "nchw", threads)

    def profile(self, *inputs: Any, layout: Layout = "nchw", threads: int | None = None) -> Profile:
        """Run the network on a batch, for how long each node takes.

        Images run one after another, and threads share the rows of each: times are those of a single image, summed.

        Args:
            inputs, layout, threads: see :meth:`__call__`.

        Raises:
            ConfigError: an input of the wrong shape or dtype, an unknown layout.
        """
        times = np.zeros(len(self.nodes) + 1, np.uint64)
        self._run(inputs, [], layout, threads, times)
        return Profile(times[:-1] * 1e-9, float(times[-1]) * 1e-9)

    def _run(
        self,
        inputs: tuple[Any, ...],
        points: list[tuple[int, int]],
        layout: Layout,
        threads: int | None,
        times: Array | None = None,
    ) -> tuple[list[Array], list[Array]]:
        if layout not in ("nchw", "nhwc"):
            raise ConfigError(f"unknown layout {layout!r}; {nearest(layout, ('nchw', 'nhwc'))}")
        count = min(available_cores(), MAX_THREADS) if threads is None else _thread_count(threads)
        if len(inputs) != len(self._inputs):
            raise ConfigError(f"this network takes {len(self._inputs)} input(s), not {len(inputs)}.")
        arrays = [_array(x, value, layout) for x, value in zip(inputs, self._inputs, strict=True)]
        batch = len(arrays[0])
        if any(len(array) != batch for array in arrays):
            raise ConfigError("the inputs differ in their number of images.")
        outputs = [np.empty((batch, *value.shape(layout)), np.float32) for value in self._outputs]
        traces = []
        for node, point in points:
            whole = point < 0 and self.nodes[node].operation == "xnor"
            buffer = np.empty((batch, *self._written[node].size), np.int32 if whole else np.float32)
            traces.append((node, point, buffer))
        self._model.run(arrays, outputs, batch, layout == "nhwc", count, traces, times)
        return outputs, [buffer for _, _, buffer in traces]

    def intermediates(self) -> list[str]:
        """The names that ``intermediates`` accepts."""
        return list(self._points)

    def _point(self, name: str) -> tuple[int, int]:
        if name not in self._points:
            raise ConfigError(
                f"no output of {name!r} stands anywhere in this network (it may be folded into another); "
                f"{nearest(name, self._points)}"
            )
        return self._points[name]


def _points(nodes: Iterable[NodeInfo], first_kinds: Iterable[int]) -> dict[str, tuple[int, int]]:
    """Where the output of each module stands: a node and a step of it, -1 being its sums; in the order of a run.

    Of a module of several operations it is the last. Sums of binary weights are whole numbers with binary inputs, and
    otherwise not yet what the layer gives, if steps follow; what a threshold gives is no module's output.
    """
    points: dict[str, tuple[int, int]] = {}
    integers = set()
    for number, (node, first) in enumerate(zip(nodes, first_kinds, strict=True)):
        if node.name not in integers and not (node.operation == "sign_conv" and node.steps):
            points[node.name] = number, -1
        if node.operation == "xnor":
            integers.add(node.name)
        for step, name in enumerate(() if first == _THRESHOLD else node.steps):
            if name not in integers:
                points[name] = number, step
    points.pop("", None)
    return points


def _thread_count(threads: Any) -> int:
    try:
        count = 0 if isinstance(threads, bool) else operator.index(threads)  # of NumPy's integers, too
    except TypeError:
        count = 0
    if not 1 <= count <= MAX_THREADS:
        raise ConfigError(f"threads must be an integer from 1 to {MAX_THREADS}, not {threads!r}.")
    return count


class _Tensor(NamedTuple):
    name: str
    rank: int
    size: tuple[int, int, int]

    def shape(self, layout: Layout) -> tuple[int, ...]:
        h, w, c = self.size
        if layout == "nchw":
            return {1: (c,), 2: (c, w), 3: (c, h, w)}[self.rank]
        return {1: (c,), 2: (w, c), 3: (h, w, c)}[self.rank]

    def info(self) -> TensorInfo:
        return TensorInfo(self.name, self.shape("nchw"))


def _array(x: Any, value: _Tensor, layout: Layout) -> Array:
    if not isinstance(x, np.ndarray):
        if hasattr(x, "__dlpack__"):
            try:
                x = np.from_dlpack(x.detach() if hasattr(x, "detach") else x)
            except (BufferError, RuntimeError, TypeError, ValueError) as error:
                raise ConfigError(f"an input could not be read in place: {error}; copy it to the CPU first.") from None
        else:
            raise ConfigError(f"an input must be an array, not {type(x).__name__}.")
    shape = value.shape(layout)
    if x.dtype != np.float32 or x.ndim != len(shape) + 1 or x.shape[1:] != shape:
        raise ConfigError(
            f"input {value.name!r} must be float32 of shape (N, {', '.join(map(str, shape))}) in layout {layout!r}, "
            f"not {x.dtype} of shape {x.shape}."
        )
    return np.ascontiguousarray(x)


def _from_bytes(data: bytes, name: str, isa: str | None, int8: Int8 | None) -> Network:
    return Network(np.frombuffer(data, np.uint8), name, isa, int8)


def isas() -> list[str]:
    """The instruction sets of this machine that there are kernels for, the fastest first; the last is ``"scalar"``."""
    return _native.isas()


def int8_isas() -> list[str]:
    """Those that have kernels for layers in integers of eight bits; to others, these are slower than exact ones."""
    return _native.int8_isas()


def _chosen(isa: str | None) -> str:
    wanted = isa or os.environ.get("ABSTE_ISA") or None
    if wanted is None:
        return isas()[0]
    if wanted not in isas():
        where = "isa" if isa else "the environment variable ABSTE_ISA"
        raise ConfigError(f"{where}: this machine has no {wanted!r}; {nearest(wanted, isas())}")
    return wanted


def available_cores() -> int:
    """How many cores the process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str | bytes | os.PathLike[str], *, isa: str | None = None, int8: Int8 | None = None) -> Network:
    """Load an .abste file, which stays mapped rather than being read into memory.

    Args:
        path: of the file, or ``"zoo:NAME"`` for a trained network that comes with abste (see ``abste.zoo``). Replace a
            file, as `abste export` does, rather than writing into it while it is loaded.
        isa: the instruction set whose kernels are to run it, one of :func:`isas`; by default the environment variable
            ``ABSTE_ISA``, else the fastest. All give the same bits.
        int8: layers that are to be faster than exact: their inputs become integers of eight bits, with one scale for an
            image, and so do float weights, with a scale per output channel. ``"stem"`` is the layer that reads the
            image, ``"float"`` all layers with float weights, ``"binary"`` those with binary weights and float inputs
            (W1A8), ``"all"`` both. Layers with binary inputs stay exact, and so do grouped convolutions.
            ``abste verify --int8`` tells what it costs in accuracy.

    Raises:
        ConfigError: an instruction set that this machine does not have, an unknown ``int8``, a name that is not in
            the zoo, or what is no path.
        FormatError: it cannot be opened, is no .abste file, damaged, malformed, made for a newer version, or asks for
            more memory or work than ``MAX_ARENA`` and ``MAX_WORK``.
    """
    try:
        path = os.fsdecode(path)
    except TypeError:
        raise ConfigError(f"the path of an .abste file must be a str or a Path, not {type(path).__name__}.") from None
    file_path = resolve(path)
    name = file_path.name
    try:
        with open(file_path, "rb") as file:
            data = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except (OSError, ValueError) as error:  # mmap raises the latter for an empty file
        reason = error.strerror if isinstance(error, OSError) else "it is empty"
        raise FormatError(f"cannot load {path}: {reason}.") from None
    return Network(data, name, isa, int8)
