"""From a torch model to a graph: torch.export, then one small function per operation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from abste.deploy.graph import Array, Graph, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.passes import bits_of, linear, simplify, to_half
from abste.deploy.plan import plan
from abste.errors import ConversionError
from abste.nn.branch import GradientBranch
from abste.nn.layers import BINARY_LAYERS, BinaryActivation
from abste.nn.pieces import AdaptiveSet

BATCH = 2
"""Images in the exported example: more than one, so that no operation takes the batch for something else."""


# What binary layers become in the exported graph, so that nothing needs to be guessed there.


@torch.library.custom_op("abste::sign", mutates_args=())
def _sign(x: Tensor) -> Tensor:
    """+1 where x >= 0, else -1."""
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


@_sign.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("abste::binary_sums", mutates_args=())
def _binary_sums(
    x: Tensor,
    signs: Tensor,
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
) -> Tensor:
    """The sums of a layer with ±1 weights: a linear layer where ``stride`` is empty, else a convolution.

    ``border`` is in the order of ``torch.nn.functional.pad``.
    """
    if not stride:
        return F.linear(x, signs)
    convolve = F.conv1d if len(stride) == 1 else F.conv2d
    return convolve(F.pad(x, list(border), value=pad_value), signs, None, stride, 0, dilation, groups)


@_binary_sums.register_fake
def _(
    x: Tensor,
    signs: Tensor,
    stride: Sequence[int],
    border: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    pad_value: int,
) -> Tensor:
    if not stride:
        return x.new_empty(*x.shape[:-1], signs.shape[0])
    sides = []
    for i, size in enumerate(x.shape[2:]):
        before, after = border[2 * (len(stride) - 1 - i) :][:2]
        sides.append((size + before + after - dilation[i] * (signs.shape[2 + i] - 1) - 1) // stride[i] + 1)
    return x.new_empty(x.shape[0], signs.shape[0], *sides)


class _Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, torch.ops.abste.sign(x))


class _Layer(nn.Module):
    """A binary layer with its signs instead of its latents."""

    signs: Tensor
    scale: Tensor | None
    bias: Tensor | None

    def __init__(self, layer: Any) -> None:
        super().__init__()
        binary = layer.weight_binarizer is not None
        signs, scale = layer.binary_weight() if binary else (layer.weight.detach(), None)
        convolves = not isinstance(layer, nn.Linear)
        trailing = [1] * (layer.weight.dim() - 2)
        self.register_buffer("signs", signs.detach().float())
        self.register_buffer("scale", None if scale is None else scale.float().reshape(-1, *trailing))
        bias = layer.bias
        self.register_buffer("bias", None if bias is None else bias.detach().float().reshape(-1, *trailing))
        self.binary, self.binarizes = binary, layer.activation is not None
        self.stride = list(layer.stride) if convolves else []
        self.dilation = list(layer.dilation) if convolves else []
        self.border = list(layer._reversed_padding_repeated_twice) if convolves else []
        self.groups = layer.groups if convolves else 1
        self.pad_value = int(layer.pad_value) if convolves else 0
        center = layer.binary_center()
        self.window = None if center is None else _Window(self, center)

    def forward(self, x: Tensor) -> Tensor:
        if self.binarizes:
            x = torch.ops.abste.sign(x)
        if self.binary:
            y = torch.ops.abste.binary_sums(
                x, self.signs, self.stride, self.border, self.dilation, self.groups, self.pad_value
            )
        elif self.stride:
            convolve = F.conv1d if len(self.stride) == 1 else F.conv2d
            padded = F.pad(x, self.border, value=self.pad_value)
            y = convolve(padded, self.signs, None, self.stride, 0, self.dilation, self.groups)
        else:
            y = F.linear(x, self.signs)
        if self.scale is not None:
            y = y * self.scale
        if self.window is not None:
            y = y + self.window(x)
        return cast(Tensor, y if self.bias is None else y + self.bias)


class _Window(nn.Module):
    """What the centres of a layer's filters add: the sum of its input over each window, times the centre.

    A filter of +1 for each group, then a 1x1 convolution with factors of 1, which half precision holds exactly, to give
    every channel its group's sum.
    """

    signs: Tensor
    ones: Tensor
    center: Tensor

    def __init__(self, layer: _Layer, center: Tensor) -> None:
        super().__init__()
        shape = layer.signs.shape
        self.register_buffer("signs", torch.ones(layer.groups, *shape[1:]))
        self.register_buffer("ones", torch.ones(shape[0], 1, *[1] * (len(shape) - 2)))
        self.register_buffer("center", center.float().reshape(-1, *[1] * (len(shape) - 2)))
        self.geometry = layer.stride, layer.border, layer.dilation, layer.groups, layer.pad_value

    def forward(self, x: Tensor) -> Tensor:
        sums = torch.ops.abste.binary_sums(x, self.signs, *self.geometry)
        if self.ones.dim() == 2:
            return F.linear(sums, self.ones) * self.center
        convolve = F.conv1d if self.ones.dim() == 3 else F.conv2d
        return convolve(sums, self.ones, groups=self.geometry[3]) * self.center


class _Set(nn.Module):
    """An AdaptiveSet; its layer is replaced as any other is."""

    scale: Tensor
    center: Tensor
    bias: Tensor | None

    def __init__(self, adaptive: AdaptiveSet) -> None:
        super().__init__()
        self.layer = adaptive.layer
        self.register_buffer("scale", adaptive.scale.detach().float())
        self.register_buffer("center", adaptive.center.detach().float())
        twin = _Layer(adaptive.layer)
        # The layer adds its bias, to what is scaled after that.
        self.register_buffer("bias", None if twin.bias is None else (1 - self.scale) * twin.bias)
        self.border = _Border(twin, self.scale * self.center)

    def forward(self, x: Tensor) -> Tensor:
        z = (x - self.center) / self.scale
        y = self.border(z, self.layer(z) * self.scale)
        return cast(Tensor, y if self.bias is None else y + self.bias)


class _Border(nn.Module):
    """Adds ``factor`` times what a layer gives for ones: a constant, but where zero padding enters its windows.

    There it is a convolution of ones, whose sums of signs half precision holds exactly up to 2048 channels. What
    centres add to that is how many numbers of a window are not padding.
    """

    constant: Tensor | None
    bits: Tensor
    sums: Tensor
    scale: Tensor
    tap: Tensor
    spread: Tensor
    center: Tensor | None

    def __init__(self, layer: _Layer, factor: Tensor) -> None:
        super().__init__()
        trailing = [1] * (layer.signs.dim() - 2)
        sums = layer.signs.sum(1, keepdim=True)
        scale = factor * (torch.ones(1, *trailing) if layer.scale is None else layer.scale)
        center = None if layer.window is None else factor * layer.signs.shape[1] * layer.window.center
        self.geometry = layer.stride, layer.border, layer.dilation
        if layer.pad_value or not any(layer.border):
            constant = scale * sums.flatten(1).sum(1).view(-1, *trailing)
            if center is not None:
                constant = constant + center * math.prod(sums.shape[2:])
            self.register_buffer("constant", constant)
            return
        self.register_buffer("constant", None)
        self.register_buffer("bits", torch.ones(1, layer.groups * layer.signs.shape[1], *trailing))
        self.register_buffer("sums", sums)
        self.register_buffer("scale", scale)
        self.register_buffer("tap", torch.ones(1, 1, *sums.shape[2:]))
        self.register_buffer("spread", torch.ones(len(sums), 1, *trailing))
        self.register_buffer("center", center)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        if self.constant is not None:
            return y + self.constant
        dims = self.bits.dim() - 2
        convolve = F.conv1d if dims == 1 else F.conv2d
        stride, border, dilation = self.geometry
        # A plane of ones for each image, by way of a sum that is finite whatever z is.
        signs = torch.ops.abste.sign(z)
        plane = torch.ops.abste.binary_sums(signs, self.bits, [1] * dims, [0] * 2 * dims, [1] * dims, 1, 0) * 0 + 1
        y = y + convolve(F.pad(plane, border), self.sums, None, stride, 0, dilation) * self.scale
        if self.center is None:
            return y
        count = torch.ops.abste.binary_sums(plane, self.tap, stride, border, dilation, 1, 0)
        return y + convolve(count, self.spread) * self.center


def _twin(module: nn.Module) -> nn.Module:
    if isinstance(module, BinaryActivation):
        return _Sign()
    return _Set(module) if isinstance(module, AdaptiveSet) else _Layer(module)


def _replaced(model: nn.Module) -> nn.Module:
    """A copy whose binary layers are of the kinds above, in eval mode and float32."""
    model = copy.deepcopy(model).cpu().float().eval()
    made: dict[int, nn.Module] = {}
    owned = {layer.activation for layer in model.modules() if isinstance(layer, BINARY_LAYERS)}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if not isinstance(module, (*BINARY_LAYERS, BinaryActivation, AdaptiveSet)) or module in owned:
            continue
        if getattr(module, "padding_mode", "zeros") != "zeros":
            raise ConversionError(
                f"{name or 'the model'}: a binary layer with padding_mode={module.padding_mode!r} cannot be packed; "
                "use 'zeros', and pad_value=1 or -1 for inputs that stay one bit wide."
            )
        activation: Any = module if isinstance(module, BinaryActivation) else getattr(module, "activation", None)
        if activation is not None and not activation.estimator.plain_bits:
            raise ConversionError(
                f"{name or 'the model'}: {type(activation.estimator).__name__} is not plain sign(x) at inference "
                "(plain_bits = False), and cannot be packed."
            )
        if id(module) not in made:
            made[id(module)] = _twin(module)
        if not name:
            model = made[id(module)]
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[id(module)])
    return model


@dataclass
class PackedLayer:
    """A layer with weights, as it was packed.

    Attributes:
        name: of its module.
        packed: how: ``xnor`` (binary inputs too), ``sign_conv`` (float inputs) or ``float``.
        why: for a float layer, why; for ``xnor``, whether a threshold took the place of its float steps.
        weights: how many.
        nbytes: of its weights in the file.
    """

    name: str
    packed: str
    why: str
    weights: int
    nbytes: int


@dataclass
class PackReport:
    """What was packed, and the sizes.

    Attributes:
        layers: in the order in which they run.
        rest_bytes: of factors, biases and thresholds.
        float_bytes: of the model's float32 state dict.
    """

    layers: list[PackedLayer]
    rest_bytes: int
    float_bytes: int

    def __str__(self) -> str:
        rows = [("layer", "weights", "bytes", "packed", "")]
        rows += [(x.name, f"{x.weights:,}", f"{x.nbytes:,}", x.packed, x.why) for x in self.layers]
        widths = [max(len(row[column]) for row in rows) for column in range(4)]
        lines = [
            f"{name:{widths[0]}}  {weights:>{widths[1]}}  {nbytes:>{widths[2]}}  {packed:{widths[3]}}  {why}".rstrip()
            for name, weights, nbytes, packed, why in rows
        ]
        bits = sum(layer.nbytes for layer in self.layers if layer.packed != "float")
        floats = sum(layer.nbytes for layer in self.layers if layer.packed == "float")
        lines.append(
            f"\n1-bit weights {bits:,} bytes, float weights {floats:,}, factors and thresholds {self.rest_bytes:,}"
        )
        return "\n".join(lines)


@dataclass
class Lowered:
    """A model as a graph.

    Attributes:
        graph: simplified, its memory planned.
        report: what was packed and what stayed float.
    """

    graph: Graph
    report: PackReport


def lower(
    model: nn.Module,
    example_input: Tensor,
    *,
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    metadata: dict[str, Any] | None = None,
    float16: bool = False,
) -> Lowered:
    """Lower a model with one input to a graph.

    Args:
        model: a torch model of operations that docs/format.md knows; it is not changed.
        example_input: (N, C, H, W), (N, C, L) or (N, C) float32, for the shapes.
        classes: names of the classes.
        normalization: mean and standard deviation per channel of the input, of pixels between 0 and 1.
        metadata: what else the file shall say of itself, as JSON types.
        float16: store the weights that stay float in half precision.

    Raises:
        ConversionError: an operation, or a use of one, that the graph does not know: names the module, the operation,
            and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"only a torch.nn.Module can be packed, not {type(model).__name__}.")
    if (
        not isinstance(example_input, Tensor)
        or not example_input.is_floating_point()
        or example_input.dim() not in (2, 3, 4)
        or 0 in example_input.shape[1:]
    ):
        raise ConversionError(
            "example_input must be a float tensor (N, C, H, W), (N, C, L) or (N, C) with no empty dimension."
        )
    example = torch.zeros(BATCH, *example_input.shape[1:])
    replaced = _replaced(model)
    try:
        with torch.no_grad():
            replaced(example)
    except Exception as error:  # whatever the model raises
        raise ConversionError(
            f"the model does not run on one float32 tensor of shape {tuple(example.shape)}, which is that of "
            f"example_input but for the batch: {_reason(error)}"
        ) from error
    try:
        with torch.no_grad():
            program = torch.export.export(replaced, (example,))
    except Exception as error:  # torch.export raises many kinds
        raise ConversionError(
            f"torch.export cannot trace this model, whose forward must not depend on the values of tensors: "
            f"{_reason(error)}"
        ) from error
    lowering = _Lowering(program)
    graph = lowering.built
    if normalization is not None:
        graph.normalization = np.array(normalization, np.float32)
        if graph.normalization.shape != (2, graph.values[0].shape[2]):
            channels = graph.values[0].shape[2]
            raise ConversionError(
                f"normalization must be a mean and a standard deviation for each of {channels} channels."
            )
    graph.classes = None if classes is None else tuple(classes)
    graph.metadata = metadata
    simplify(graph)
    _order_outputs(graph, lowering.results)
    if float16:
        to_half(graph)
    graph = plan(graph)
    return Lowered(graph, _report(model, graph))


def _order_outputs(graph: Graph, results: list[int]) -> None:
    """Outputs stand in the file in the order in which nodes write them: copy those that come before their turn."""
    written = {index: number for number, node in enumerate(graph.nodes) for index in node.written()}
    latest = -1
    for index in results:
        if written[index] > latest:
            latest = written[index]
            continue
        value = graph.values[index]
        graph.values.append(replace(value))
        value.output = False
        graph.nodes.append(Node(Op.IDENTITY, (index,), len(graph.values) - 1))
        latest = len(graph.nodes) - 1


def _reason(error: Exception) -> str:
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {reason}" if reason else type(error).__name__


_PARTS = {"window": "sums over windows, for the centres", "border": "zero padding, for the adaptive set"}


def _report(model: nn.Module, graph: Graph) -> PackReport:
    layers, rest = [], 0
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    for node in graph.nodes:
        rest += sum(array.nbytes for step in node.steps for array in (step.a, step.b) if array is not None)
        if node.weight is None:
            continue
        packed = "float" if node.op is Op.CONV else node.op.name.lower()
        why = ""
        if node.op is Op.CONV:
            why = "its weights are not binary in the model" + (", float16" if node.weight.itemsize == 2 else "")
        elif node.steps and node.steps[0].kind is StepKind.THRESHOLD:
            why = "threshold on integer sums"
        owner, _, part = node.name.rpartition(".")
        if part in _PARTS and node.name not in names:
            why = f"{_PARTS[part]} of {owner or 'the model'}"
        size = node.weight.nbytes if node.op is Op.CONV else -(-node.weight.size // 8)
        layers.append(PackedLayer(node.name, packed, why, node.weight.size, size))
    branches = {module.branch.data_ptr() for module in model.modules() if isinstance(module, GradientBranch)}
    floats = sum(
        4 * tensor.numel()
        for tensor in model.state_dict().values()
        if tensor.is_floating_point() and tensor.data_ptr() not in branches
    )
    return PackReport(layers, rest, floats)


def _size(shape: torch.Size) -> tuple[tuple[int, int, int], int] | None:
    """(h, w, c) and rank of a batch's shape, or None where it is no batch of images, signals or vectors."""
    if len(shape) not in (2, 3, 4) or shape[0] != BATCH or 0 in shape:
        return None
    c, *spatial = (int(n) for n in shape[1:])
    h, w = ([1, 1, *spatial])[-2:]
    return (h, w, c), len(shape) - 1


class _Lowering:
    """Walks an exported program and builds the graph, one node or step per operation."""

    def __init__(self, program: Any) -> None:
        self.values: list[Value] = []
        self.nodes: list[Node] = []
        self.built = Graph(self.values, self.nodes)
        self.where: dict[fx.Node, int] = {}  # the value that an operation's result became
        self.signs: dict[fx.Node, int] = {}  # the value of whose sign it is
        self.constants: dict[fx.Node, Any] = {}
        self.roots: dict[fx.Node, fx.Node] = {}  # of what shares its memory with another's result: that
        self.stale: set[fx.Node] = set()  # views of what was changed in place
        self.joined: dict[tuple[int, int], int] = {}  # concatenations
        self.results: list[int] = []
        self.current: fx.Node | None = None
        signature = program.graph_signature
        tensors = {**program.state_dict, **program.constants}
        names = {
            **signature.inputs_to_parameters,
            **signature.inputs_to_buffers,
            **getattr(signature, "inputs_to_lifted_tensor_constants", {}),
        }
        inputs = []
        for node in program.graph.nodes:
            if node.op == "placeholder":
                if node.name in names:
                    self.constants[node] = tensors[names[node.name]].detach()
                else:
                    inputs.append(node)
        for node in inputs:
            self.new_value(node)
        self.built.input_count = len(inputs)
        live = _live(program.graph)
        for node in program.graph.nodes:
            if node.op == "call_function" and node in live:
                self.lower(node)
            elif node.op == "output":
                self.finish(node)

    # Messages

    def module(self, node: fx.Node) -> str:
        """The innermost module that an operation belongs to."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        return str(stack[-1][0]) if stack else ""

    def refuse(self, what: str) -> ConversionError:
        node = self.current
        if node is None:
            return ConversionError(f"the input cannot be packed: {what}")
        where = self.module(node) or "the model's forward"
        operation = str(node.target).removesuffix(".default")
        return ConversionError(f"{where}: {operation} cannot be packed: {what}")

    # Values

    def name_of(self, node: fx.Node) -> str:
        """The module whose output this operation's result is, or ""."""
        name = self.module(node)
        inside = any(self._within(user, name) for user in node.users)
        return "" if inside else name

    def _within(self, user: fx.Node, name: str) -> bool:
        stack = (user.meta.get("nn_module_stack") or {}).values()
        return bool(name) and any(str(path) == name for path, *_ in stack)

    def new_value(self, node: fx.Node, shape: tuple[int, int, int] | None = None) -> int:
        result = node.meta["val"]
        size = _size(result.shape) if isinstance(result, Tensor) else None
        if size is None:
            found = f"shape {tuple(result.shape)}" if isinstance(result, Tensor) else "several parts"
            raise self.refuse(f"its result has {found}; only (N, C, H, W), (N, C, L) and (N, C) are known.")
        h, w, c = shape or size[0]
        if max(h, w) > 65535 or c > 2**24:
            raise self.refuse(f"it has {h}x{w} pixels of {c} channels; at most 65535x65535 of 2^24 are known.")
        self.values.append(Value((h, w, c), Kind.FLOAT, size[1], node.name))
        if shape is None:
            self.where[node] = len(self.values) - 1
        return len(self.values) - 1

    def value(self, node: Any) -> int:
        """The float value of an operation's result."""
        if not isinstance(node, fx.Node):
            raise self.refuse(f"it reads {node!r}, which is no tensor of the network.")
        if node in self.stale:
            raise self.refuse("it reads a view of a tensor that was changed in place since; use x = x + y for x += y.")
        if node in self.signs:
            if node not in self.where:
                index = self.new_value(node)
                self.nodes.append(Node(Op.IDENTITY, (self.signs[node],), index, steps=[Step(StepKind.SIGN)]))
            return self.where[node]
        if node not in self.where:
            raise self.refuse("it reads a tensor that does not depend on the input, other than per channel.")
        return self.where[node]

    def emit(self, node: fx.Node, op: Op, inputs: tuple[int, ...], **options: Any) -> Node:
        """A node that writes this operation's result."""
        index = self.new_value(node)
        made = Node(op, inputs, index, name=self.module(node), **options)
        self.nodes.append(made)
        return made

    def step(self, node: fx.Node, source: Any, step: Step) -> None:
        """This operation as a step behind a value."""
        step.name = self.name_of(node)
        self.emit(node, Op.IDENTITY, (self.value(source),), steps=[step]).name = ""

    def same(self, node: fx.Node, source: Any) -> None:
        """This operation changes nothing but, perhaps, what the shape is called."""
        index = self.signs[source] if source in self.signs else self.value(source)
        size = _size(node.meta["val"].shape)
        if size is None or size[0] != self.values[index].shape:
            raise self.refuse(
                f"it turns {tuple(source.meta['val'].shape)} into {tuple(node.meta['val'].shape)}; "
                "flatten to (N, features) instead."
            )
        if source in self.signs:
            self.signs[node] = index
            return
        if size[1] == self.values[index].rank:
            self.where[node] = index
        else:
            self.emit(node, Op.IDENTITY, (index,)).name = ""

    def channels(self, node: fx.Node) -> int:
        return int(node.meta["val"].shape[1])

    def vector(self, constant: Any, like: fx.Node) -> Array:
        """A number, or a tensor of one number per channel, as (c,) float64."""
        c, rank = self.channels(like), like.meta["val"].dim()
        if isinstance(constant, Tensor):
            numbers = constant.detach().double()
            if numbers.numel() != 1:
                shape = [1] * (rank - numbers.dim()) + list(numbers.shape)
                if len(shape) != rank or any(n != (c if d == 1 else 1) for d, n in enumerate(shape)):
                    raise self.refuse(
                        f"it reads a constant of shape {tuple(constant.shape)}; only one number per channel is known."
                    )
            return np.broadcast_to(numbers.reshape(-1).numpy(), (c,)).copy()
        return np.full(c, float(constant))

    def constant(self, argument: Any) -> Any:
        """A number or a constant tensor, or None for what depends on the input."""
        if isinstance(argument, fx.Node):
            return self.constants.get(argument)
        return argument

    # Operations

    def lower(self, node: fx.Node) -> None:
        self.current = node
        name = _name(node)
        if name in _IGNORED or name in _FIRST_OF_TWO:
            return
        target = cast(Any, node.target)
        in_place = getattr(target, "namespace", "") == "aten" and name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        read: Any = node.args[0] if name == "getitem" else None
        if isinstance(read, fx.Node) and _name(read) in _FIRST_OF_TWO:
            if node.args[1] != 0:
                self.current = read
                raise self.refuse("its indices are read; only its result is known.")
            name, target = _name(read), cast(Any, read.target)
        else:
            read = node
            if in_place and name != "detach":
                self.check_owner(node.args[0])
            if all(value in self.constants for value in node.all_input_nodes):
                self.fold(node)
                return
        handler = _HANDLERS.get(name)
        if handler is None:
            raise self.refuse(
                "the packed format has no such operation; replace it by one that it has (docs/format.md), or leave "
                "this part out of the exported model."
            )
        schema = target._schema
        arguments = {
            argument.name: argument.default_value for argument in schema.arguments if argument.has_default_value()
        }
        arguments.update(zip((argument.name for argument in schema.arguments), read.args, strict=False))
        arguments.update(read.kwargs)
        source = arguments.get("self", arguments.get("input", arguments.get("x")))
        handler(self, node, arguments)
        if not isinstance(source, fx.Node):
            return
        if in_place or name in _DROPOUTS or any(result.alias_info for result in schema.returns):
            self.roots[node] = self.roots.get(source, source)
        if in_place:
            self.changed(source, node)

    def check_owner(self, changed: Any) -> None:
        """Refuse to change in place what is not the forward's own."""
        kept = [_memory(self.constants[node]) for node in self.constants if node.op == "placeholder"]
        if changed in self.constants and _memory(self.constants[changed]) in kept:
            raise self.refuse("it changes a parameter or buffer of the model; a packed network has no state.")

    def changed(self, source: fx.Node, result: fx.Node) -> None:
        """Whoever reads a tensor that was changed in place sees the change."""
        root = self.roots.get(source, source)
        before = self.where.get(source)
        for alias in [node for node in (root, *self.roots) if self.roots.get(node, node) is root]:
            if alias is result:
                continue
            same = alias is source or (before is not None and self.where.get(alias) == before)
            for table in (self.where, self.signs, self.constants):
                table.pop(alias, None)
                if same and result in table:
                    table[alias] = cast(Any, table[result])
            if not same:
                self.stale.add(alias)

    def fold(self, node: fx.Node) -> None:
        """Compute what depends on constants alone."""
        target = cast(Any, node.target)
        if torch.Tag.nondeterministic_seeded in getattr(target, "tags", ()):
            raise self.refuse("it is random.")
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.constants[n])
        self.constants[node] = target(*args, **kwargs)
        for source in node.all_input_nodes:
            if _memory(self.constants[source]) == _memory(self.constants[node]) is not None:
                self.roots[node] = self.roots.get(source, source)

    def finish(self, node: fx.Node) -> None:
        self.current = node
        results = [result for result in cast("tuple[Any, ...]", node.args[0]) if isinstance(result, fx.Node)]
        if not results:
            raise ConversionError("this model returns no tensor that depends on its input.")
        for result in results:
            self.current = result
            index = self.value(result)
            if index < self.built.input_count or self.values[index].output:  # outputs are values of their own
                value = self.values[index]
                self.values.append(Value(value.shape, Kind.FLOAT, value.rank, value.name))
                self.nodes.append(Node(Op.IDENTITY, (index,), len(self.values) - 1))
                index = len(self.values) - 1
            self.values[index].output = True
            self.results.append(index)


Handler = Callable[[_Lowering, fx.Node, dict[str, Any]], None]
_HANDLERS: dict[str, Handler] = {}
_FIRST_OF_TWO = (  # operations whose first result alone is of use
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
)
_DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
"""They return their input itself in evaluation, which no schema and no graph of an older torch.export says."""
_IGNORED = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size")


def _live(graph: fx.Graph) -> set[fx.Node]:
    """The operations that outputs depend on, and those that change something in place."""
    live: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op == "output" or getattr(schema, "is_mutable", False) or any(user in live for user in node.users):
            live.add(node)
    return live


def _memory(constant: Any) -> int | None:
    return constant.untyped_storage().data_ptr() if isinstance(constant, Tensor) else None


def _name(node: fx.Node) -> str:
    """Of the operation, without its overload."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return add


def _pair(number: Any, dims: int, default: Any = None) -> tuple[int, int]:
    """(vertical, horizontal) from an int or a list, for one spatial dimension or two."""
    numbers = [number] if isinstance(number, int) else list(number)
    numbers = numbers or list(default)
    numbers = numbers * dims if len(numbers) == 1 else numbers
    return (numbers[0], numbers[1]) if dims == 2 else (1, numbers[0])


def _zero_pair(number: Any, dims: int) -> tuple[int, int]:
    vertical, horizontal = _pair(number, dims)
    return (vertical, horizontal) if dims == 2 else (0, horizontal)


def _weights(low: _Lowering, node: fx.Node, argument: Any) -> Array:
    weight = low.constant(argument)
    if not isinstance(weight, Tensor):
        raise low.refuse("its weight depends on the input.")
    return weight.detach().float().numpy()


def _bias(low: _Lowering, node: fx.Node, made: Node, bias: Any) -> None:
    if bias is not None:
        numbers = low.constant(bias)
        if not isinstance(numbers, Tensor):
            raise low.refuse("its bias depends on the input.")
        made.steps.append(Step(StepKind.ADD, low.name_of(node), numbers.detach().float().numpy()))


@_handles("conv1d", "conv2d")
def _convolution(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    weight = _weights(low, node, arguments["weight"])
    dims = weight.ndim - 2
    if node.meta["val"].dim() != dims + 2:
        raise low.refuse("its input has no batch dimension.")
    weight = weight.reshape(*weight.shape[:2], *([1] * (2 - dims)), *weight.shape[2:])
    dilation = _pair(arguments["dilation"], dims)
    kernel = (weight.shape[2], weight.shape[3])
    padding = arguments["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        sides = _zero_pair(padding, dims) * 2
    made = low.emit(
        node,
        Op.CONV,
        (low.value(arguments["input"]),),
        weight=np.ascontiguousarray(weight.transpose(2, 3, 1, 0)),
        kernel=kernel,
        stride=_pair(arguments["stride"], dims),
        dilation=dilation,
        padding=sides,
        groups=arguments["groups"],
    )
    _bias(low, node, made, arguments.get("bias"))


@_handles("linear")
def _linear(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    if node.meta["val"].dim() != 2:
        raise low.refuse(
            f"its input has shape {tuple(arguments['input'].meta['val'].shape)}; a linear layer takes (N, features) "
            "here: flatten first, or use a 1x1 convolution."
        )
    weight = _weights(low, node, arguments["weight"])
    made = low.emit(node, Op.CONV, (low.value(arguments["input"]),), weight=np.ascontiguousarray(weight.T)[None, None])
    _bias(low, node, made, arguments.get("bias"))


@_handles("binary_sums")
def _binary(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    signs = _weights(low, node, arguments["signs"])
    dims = signs.ndim - 2
    if dims == 0 and node.meta["val"].dim() != 2:
        raise low.refuse("a binary linear layer takes (N, features) here: flatten first, or use a 1x1 convolution.")
    source, pad_value = arguments["x"], arguments["pad_value"]
    binary = source in low.signs
    index = bits_of(low.built, low.signs[source]) if binary else low.value(source)
    border = [*arguments["border"], 0, 0, 0, 0][:4]
    made = low.emit(
        node,
        Op.XNOR if binary else Op.SIGN_CONV,
        (index,),
        weight=np.ascontiguousarray(
            signs.reshape(*signs.shape[:2], *([1] * (2 - dims)), *signs.shape[2:]).transpose(0, 2, 3, 1) > 0
        ),
        groups=arguments["groups"],
        pad_value=pad_value if binary else 0,
    )
    assert made.weight is not None
    made.kernel = made.weight.shape[1:3]
    if dims:
        made.stride, made.dilation = _pair(arguments["stride"], dims), _pair(arguments["dilation"], dims)
        left, right, top, bottom = border
        made.padding = (top, left, bottom, right)


@_handles("sign")
def _sign_of(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    if "x" not in arguments:
        raise low.refuse("torch.sign gives 0 at 0; use abste.nn.BinaryActivation.")
    source = arguments["x"]
    low.signs[node] = low.signs[source] if source in low.signs else low.value(source)


@_handles("batch_norm")
def _batch_norm(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    mean, var = low.constant(arguments["running_mean"]), low.constant(arguments["running_var"])
    if arguments["training"] or mean is None or var is None:
        raise low.refuse("it computes statistics of the batch; use running statistics (track_running_stats=True).")
    weight, bias = (low.constant(arguments[key]) for key in ("weight", "bias"))
    if (weight is None) != (arguments["weight"] is None) or (bias is None) != (arguments["bias"] is None):
        raise low.refuse("its weight or bias depends on the input.")
    with np.errstate(all="ignore"):  # a network that diverged stays as it is
        factor = 1 / np.sqrt(var.double().numpy() + arguments["eps"])
        if weight is not None:
            factor = factor * weight.double().numpy()
        shift = -mean.double().numpy() * factor
        if bias is not None:
            shift = shift + bias.double().numpy()
    low.step(node, arguments["input"], linear(factor, shift, ""))


_PLAIN = {
    "relu": StepKind.RELU,
    "silu": StepKind.SILU,
    "sigmoid": StepKind.SIGMOID,
    "hardswish": StepKind.HARDSWISH,
    "hardsigmoid": StepKind.HARDSIGMOID,
    "tanh": StepKind.TANH,
}


def _plain(kind: StepKind) -> Handler:
    return lambda low, node, arguments: low.step(node, arguments["self"], Step(kind))


for _operation, _kind in _PLAIN.items():
    _HANDLERS[_operation] = _plain(_kind)


@_handles("gelu")
def _gelu(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    tanh = arguments["approximate"] == "tanh"
    low.step(node, arguments["self"], Step(StepKind.GELU_TANH if tanh else StepKind.GELU))


@_handles("hardtanh", "clamp", "relu6", "clamp_min", "clamp_max")
def _clamp(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    if "relu6" in str(node.target):
        p, q = 0.0, 6.0
    else:
        least, most = (arguments.get(f"{end}_val", arguments.get(end)) for end in ("min", "max"))
        if isinstance(least, fx.Node) or isinstance(most, fx.Node):
            raise low.refuse("its limits are tensors; use numbers.")
        p, q = -math.inf if least is None else float(least), math.inf if most is None else float(most)
    if not p <= q:
        raise low.refuse(f"its limits {p:g} and {q:g} are in the wrong order.")
    # The limits as float32 holds them, so that files compare.
    low.step(node, arguments["self"], Step(StepKind.CLAMP, p=float(np.float32(p)), q=float(np.float32(q))))


@_handles("prelu", "leaky_relu")
def _prelu(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    slope = low.constant(arguments["weight"]) if "weight" in arguments else arguments["negative_slope"]
    if slope is None:
        raise low.refuse("its slope depends on the input.")
    if isinstance(slope, Tensor) and slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (node.meta["val"].dim() - 2))
    numbers = low.vector(slope, node).astype(np.float32)
    low.step(node, arguments["self"], Step(StepKind.PRELU, a=numbers))


@_handles("add", "sub", "mul", "div", "rsub", "neg")
def _arithmetic(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    kind = str(getattr(node.target, "_opname", node.target)).rstrip("_")
    left = arguments["self"]
    right = arguments.get("other", -1)
    if kind == "neg":
        kind = "mul"
    if kind == "rsub":
        kind, left, right = "sub", right, left
    if arguments.get("rounding_mode") is not None:
        raise low.refuse("it rounds.")
    alpha = float(arguments.get("alpha", 1))
    one, other = low.constant(left), low.constant(right)
    if one is None and other is None:
        _combine(low, node, kind, left, right, alpha)
        return
    source, constant = (left, other) if one is None else (right, one)
    if source.meta["val"].shape != node.meta["val"].shape:
        raise low.refuse(f"it broadcasts {tuple(source.meta['val'].shape)} to {tuple(node.meta['val'].shape)}.")
    numbers = low.vector(constant, node)
    ones, zeros = np.ones_like(numbers), np.zeros_like(numbers)
    if kind == "mul":
        step = linear(numbers, zeros, "")
    elif kind == "add":
        step = linear(ones, alpha * numbers, "") if one is None else linear(alpha * ones, numbers, "")
    elif kind == "sub":
        step = linear(ones, -alpha * numbers, "") if one is None else linear(-alpha * ones, numbers, "")
    elif one is None and numbers.all():
        step = linear(1 / numbers, zeros, "")
    else:
        raise low.refuse("it divides by a tensor, or by zero; multiply by the reciprocal instead.")
    low.step(node, source, step)


_COMBINES = "it combines {} and {}; only equal shapes, and one number per channel and image, are known."


def _combine(low: _Lowering, node: fx.Node, kind: str, left: fx.Node, right: fx.Node, alpha: float) -> None:
    if kind not in ("add", "sub", "mul"):
        raise low.refuse("it divides by a tensor, which the packed format cannot.")
    size = _size(node.meta["val"].shape)
    if size is None or not left.meta["val"].dim() == right.meta["val"].dim() == size[1] + 1:
        raise low.refuse(_COMBINES.format(*(tuple(side.meta["val"].shape) for side in (left, right))))
    first, second = low.value(left), low.value(right)
    if kind == "sub" or alpha != 1:
        factor = np.full(low.values[second].shape[2], np.float32(-alpha if kind == "sub" else alpha), np.float32)
        value = low.values[second]
        low.values.append(Value(value.shape, Kind.FLOAT, value.rank, value.name))
        low.nodes.append(Node(Op.IDENTITY, (second,), len(low.values) - 1, steps=[Step(StepKind.MULTIPLY, a=factor)]))
        second = len(low.values) - 1
    # The one that is written later reads on in its own node: the other stands ready by then.
    if second > first and low.values[second].shape == size[0]:
        first, second = second, first
    shape = low.values[second].shape
    if low.values[first].shape != size[0] or shape not in (size[0], (1, 1, size[0][2])):
        first, second = second, first
        shape = low.values[second].shape
    if low.values[first].shape != size[0] or shape not in (size[0], (1, 1, size[0][2])):
        raise low.refuse(_COMBINES.format(*(tuple(side.meta["val"].shape) for side in (left, right))))
    step = Step(StepKind.MULTIPLY_VALUE if kind == "mul" else StepKind.ADD_VALUE, low.name_of(node), value=second)
    low.emit(node, Op.IDENTITY, (first,), steps=[step]).name = ""


@_handles("cat", "concat", "concatenate")
def _cat(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    dims = node.meta["val"].dim()
    if arguments["dim"] % dims != 1:
        raise low.refuse("it concatenates other dimensions than channels.")
    tensors = list(arguments["tensors"])
    if len(tensors) == 1:
        low.same(node, tensors[0])
        return
    index = low.value(tensors[0])
    for number, tensor in enumerate(tensors[1:], 2):
        other = low.value(tensor)
        h, w, c = low.values[index].shape
        if number == len(tensors):
            low.emit(node, Op.CONCAT, (index, other))
            low.joined.setdefault((index, other), low.where[node])
        elif (index, other) in low.joined:  # dense networks concatenate the same again and again
            index = low.joined[index, other]
        else:
            out = low.new_value(node, (h, w, c + low.values[other].shape[2]))
            low.nodes.append(Node(Op.CONCAT, (index, other), out))
            low.joined[index, other] = out
            index = out


@_handles("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze")
def _reshape(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    source, shape = arguments["self"], node.meta["val"].shape
    size = _size(shape)
    signs = source in low.signs
    index = low.signs[source] if signs else low.value(source)
    h, w, _ = low.values[index].shape
    if size is not None and size[1] == 1 and h * w > 1 and size[0][2] == source.meta["val"][0].numel():
        made = low.emit(node, Op.FLATTEN, (index,))
        made.name = ""
        if signs:  # of what is flattened
            assert made.out is not None
            low.signs[node] = made.out
            del low.where[node]
        return
    low.same(node, source)


@_handles(
    "contiguous",
    "clone",
    "detach",
    "alias",
    *_DROPOUTS,
    "to",
    "_to_copy",
    "identity",
)
def _nothing(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    if arguments.get("train") and arguments.get("p"):
        raise low.refuse("it is random: it drops values in evaluation too.")
    if node.meta["val"].dtype != torch.float32:
        raise low.refuse(f"it gives {node.meta['val'].dtype}; only float32 is known.")
    low.same(node, arguments.get("self", arguments.get("input")))


def _pool_name(node: fx.Node) -> str:
    """Of a pooling operation, or of the one whose first result this is."""
    return _name(cast(fx.Node, node.args[0]) if _name(node) == "getitem" else node)


def _pool_dims(low: _Lowering, node: fx.Node, name: str) -> int:
    dims = 1 if "pool1d" in name else 2
    if node.meta["val"].dim() != dims + 2:
        raise low.refuse("its input has no batch dimension.")
    return dims


@_handles("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "max_pool1d_with_indices", "max_pool2d_with_indices")
def _pool(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    average = "divisor_override" in arguments or "count_include_pad" in arguments
    dims = _pool_dims(low, node, _pool_name(node))
    kernel = _pair(arguments["kernel_size"], dims)
    if arguments.get("divisor_override") is not None:
        raise low.refuse("it has a divisor_override.")
    made = low.emit(
        node,
        Op.AVERAGE_POOL if average else Op.MAX_POOL,
        (low.value(arguments["self"]),),
        kernel=kernel,
        stride=_pair(arguments["stride"] or [], dims, kernel[2 - dims :]),
        dilation=(1, 1) if average else _pair(arguments["dilation"], dims),
        padding=_zero_pair(arguments["padding"], dims) * 2,
        count_padding=average and bool(arguments["count_include_pad"]),
    )
    if made.count_padding and not any(made.padding):
        made.count_padding = False


@_handles("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "mean", "amax")
def _global_pool(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    source = arguments["self"]
    index = low.value(source)
    h, w, _ = low.values[index].shape
    dims = source.meta["val"].dim()
    name = _pool_name(node)
    if "adaptive" in name:
        size = _pair(arguments["output_size"], _pool_dims(low, node, name))
        if h % size[0] or w % size[1]:
            raise low.refuse(f"its output size {size[0]}x{size[1]} does not divide {h}x{w}.")
        kernel = (h // size[0], w // size[1])
    else:
        reduced = arguments.get("dim")
        reduced = range(dims) if reduced is None else [reduced] if isinstance(reduced, int) else reduced
        if sorted(d % dims for d in reduced) != list(range(2, dims)):
            raise low.refuse("it reduces other dimensions than all spatial ones.")
        kernel = (h, w)
    op = Op.MAX_POOL if "max" in name else Op.AVERAGE_POOL
    low.emit(node, op, (index,), kernel=kernel, stride=kernel)


@_handles("pad", "constant_pad_nd")
def _pad(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    if arguments.get("mode", "constant") != "constant":
        raise low.refuse(f"its mode is {arguments['mode']!r}; only 'constant' is known.")
    dims = node.meta["val"].dim()
    sides = [*arguments["pad"]] + [0] * (2 * dims - len(arguments["pad"]))
    if any(sides[-2:]) or min(sides) < 0:
        raise low.refuse("it pads the batch, or crops.")
    pairs = [(sides[2 * i], sides[2 * i + 1]) for i in range(dims - 1)]  # from the last dimension to the channels
    spatial, channels = pairs[:-1], pairs[-1]
    left, right = spatial[0] if spatial else (0, 0)
    top, bottom = spatial[1] if len(spatial) > 1 else (0, 0)
    fill = arguments.get("value") or 0.0
    if not any(sides):
        low.same(node, arguments["self"])
        return
    made = low.emit(
        node, Op.PAD, (low.value(arguments["self"]),), padding=(top, left, bottom, right), pad_channels=channels
    )
    made.fill = float(np.float32(fill))


@_handles("slice")
def _slice(low: _Lowering, node: fx.Node, arguments: dict[str, Any]) -> None:
    source, dim, step = arguments["self"], arguments["dim"], arguments["step"]
    size = source.meta["val"].shape[dim]
    start, end = arguments["start"] or 0, arguments["end"]
    whole = start in (0, -size) and (end is None or end >= size)
    dims = source.meta["val"].dim()
    if whole and step == 1:
        low.same(node, source)
        return
    if not whole or dim % dims < 2:
        raise low.refuse("only x[:, :, ::s, ::s] is known: whole dimensions, with a step over rows and columns.")
    stride = (step, 1) if dims == 4 and dim % dims == 2 else (1, step)
    index = low.value(source)
    before = low.nodes[-1] if low.nodes else None
    made = low.emit(node, Op.MAX_POOL, (index,), stride=stride)
    if (
        before is not None
        and before.out == index
        and before.op is Op.MAX_POOL
        and before.kernel == (1, 1)
        and len(source.users) == 1
    ):
        made.inputs = before.inputs  # rows, then columns: at once
        made.stride = (before.stride[0] * stride[0], before.stride[1] * stride[1])
