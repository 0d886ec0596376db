"""What the operations of torch become in a graph: one small function for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from abste.deploy.graph import Array, Kind, Node, Op, Step, StepKind, Value
from abste.deploy.passes import bits_of, linear
from abste.deploy.walk import DROPOUTS, Handler, Walk, image_size, operation_name

HANDLERS: dict[str, Handler] = {}
"""By the name of the operation, without its overload."""


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def add(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
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


def _weights(walk: Walk, node: fx.Node, argument: Any) -> Array:
    weight = walk.constant(argument)
    if not isinstance(weight, Tensor):
        raise walk.refuse("its weight depends on the input.")
    return weight.detach().float().numpy()


def _bias(walk: Walk, node: fx.Node, made: Node, bias: Any) -> None:
    if bias is not None:
        numbers = walk.constant(bias)
        if not isinstance(numbers, Tensor):
            raise walk.refuse("its bias depends on the input.")
        made.steps.append(Step(StepKind.ADD, walk.name_of(node), numbers.detach().float().numpy()))


@_handles("conv1d", "conv2d")
def _convolution(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    weight = _weights(walk, node, arguments["weight"])
    dims = weight.ndim - 2
    if node.meta["val"].dim() != dims + 2:
        raise walk.refuse("its input has no batch dimension.")
    weight = weight.reshape(*weight.shape[:2], *([1] * (2 - dims)), *weight.shape[2:])
    dilation = _pair(arguments["dilation"], dims)
    kernel = (weight.shape[2], weight.shape[3])
    padding = arguments["padding"]
    if isinstance(padding, str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = (total[0] // 2, total[1] // 2, total[0] - total[0] // 2, total[1] - total[1] // 2)
    else:
        sides = _zero_pair(padding, dims) * 2
    made = walk.emit(
        node,
        Op.CONV,
        (walk.value(arguments["input"]),),
        weight=np.ascontiguousarray(weight.transpose(2, 3, 1, 0)),
        kernel=kernel,
        stride=_pair(arguments["stride"], dims),
        dilation=dilation,
        padding=sides,
        groups=arguments["groups"],
    )
    _bias(walk, node, made, arguments.get("bias"))


@_handles("linear")
def _linear(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    if node.meta["val"].dim() != 2:
        raise walk.refuse(
            f"its input has shape {tuple(arguments['input'].meta['val'].shape)}; a linear layer takes (N, features) "
            "here: flatten first, or use a 1x1 convolution."
        )
    weight = _weights(walk, node, arguments["weight"])
    made = walk.emit(
        node, Op.CONV, (walk.value(arguments["input"]),), weight=np.ascontiguousarray(weight.T)[None, None]
    )
    _bias(walk, node, made, arguments.get("bias"))


@_handles("binary_sums")
def _binary(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    signs = _weights(walk, node, arguments["signs"])
    dims = signs.ndim - 2
    if dims == 0 and node.meta["val"].dim() != 2:
        raise walk.refuse("a binary linear layer takes (N, features) here: flatten first, or use a 1x1 convolution.")
    source, pad_value = arguments["x"], arguments["pad_value"]
    binary = source in walk.signs
    index = bits_of(walk.built, walk.signs[source]) if binary else walk.value(source)
    border = [*arguments["border"], 0, 0, 0, 0][:4]
    made = walk.emit(
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
def _sign_of(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    if "x" not in arguments:
        raise walk.refuse("torch.sign gives 0 at 0; use abste.nn.BinaryActivation.")
    source = arguments["x"]
    walk.signs[node] = walk.signs[source] if source in walk.signs else walk.value(source)


@_handles("batch_norm")
def _batch_norm(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    mean, var = walk.constant(arguments["running_mean"]), walk.constant(arguments["running_var"])
    if arguments["training"] or mean is None or var is None:
        raise walk.refuse("it computes statistics of the batch; use running statistics (track_running_stats=True).")
    weight, bias = (walk.constant(arguments[key]) for key in ("weight", "bias"))
    if (weight is None) != (arguments["weight"] is None) or (bias is None) != (arguments["bias"] is None):
        raise walk.refuse("its weight or bias depends on the input.")
    with np.errstate(all="ignore"):  # a network that diverged stays as it is
        factor = 1 / np.sqrt(var.double().numpy() + arguments["eps"])
        if weight is not None:
            factor = factor * weight.double().numpy()
        shift = -mean.double().numpy() * factor
        if bias is not None:
            shift = shift + bias.double().numpy()
    walk.step(node, arguments["input"], linear(factor, shift, ""))


_PLAIN = {
    "relu": StepKind.RELU,
    "silu": StepKind.SILU,
    "sigmoid": StepKind.SIGMOID,
    "hardswish": StepKind.HARDSWISH,
    "hardsigmoid": StepKind.HARDSIGMOID,
    "tanh": StepKind.TANH,
}


def _plain(kind: StepKind) -> Handler:
    return lambda walk, node, arguments: walk.step(node, arguments["self"], Step(kind))


for _operation, _kind in _PLAIN.items():
    HANDLERS[_operation] = _plain(_kind)


@_handles("gelu")
def _gelu(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    tanh = arguments["approximate"] == "tanh"
    walk.step(node, arguments["self"], Step(StepKind.GELU_TANH if tanh else StepKind.GELU))


@_handles("hardtanh", "clamp", "relu6", "clamp_min", "clamp_max")
def _clamp(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    if "relu6" in str(node.target):
        p, q = 0.0, 6.0
    else:
        least, most = (arguments.get(f"{end}_val", arguments.get(end)) for end in ("min", "max"))
        if isinstance(least, fx.Node) or isinstance(most, fx.Node):
            raise walk.refuse("its limits are tensors; use numbers.")
        p, q = -math.inf if least is None else float(least), math.inf if most is None else float(most)
    if not p <= q:
        raise walk.refuse(f"its limits {p:g} and {q:g} are in the wrong order.")
    # The limits as float32 holds them, so that files compare.
    walk.step(node, arguments["self"], Step(StepKind.CLAMP, p=float(np.float32(p)), q=float(np.float32(q))))


@_handles("prelu", "leaky_relu")
def _prelu(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    slope = walk.constant(arguments["weight"]) if "weight" in arguments else arguments["negative_slope"]
    if slope is None:
        raise walk.refuse("its slope depends on the input.")
    if isinstance(slope, Tensor) and slope.numel() > 1:
        slope = slope.reshape(-1, *[1] * (node.meta["val"].dim() - 2))
    numbers = walk.vector(slope, node).astype(np.float32)
    walk.step(node, arguments["self"], Step(StepKind.PRELU, a=numbers))


@_handles("add", "sub", "mul", "div", "rsub", "neg")
def _arithmetic(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    kind = str(getattr(node.target, "_opname", node.target)).rstrip("_")
    left = arguments["self"]
    right = arguments.get("other", -1)
    if kind == "neg":
        kind = "mul"
    if kind == "rsub":
        kind, left, right = "sub", right, left
    if arguments.get("rounding_mode") is not None:
        raise walk.refuse("it rounds.")
    alpha = float(arguments.get("alpha", 1))
    one, other = walk.constant(left), walk.constant(right)
    if one is None and other is None:
        _combine(walk, node, kind, left, right, alpha)
        return
    source, constant = (left, other) if one is None else (right, one)
    if source.meta["val"].shape != node.meta["val"].shape:
        raise walk.refuse(f"it broadcasts {tuple(source.meta['val'].shape)} to {tuple(node.meta['val'].shape)}.")
    numbers = walk.vector(constant, node)
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
        raise walk.refuse("it divides by a tensor, or by zero; multiply by the reciprocal instead.")
    walk.step(node, source, step)


_COMBINES = "it combines {} and {}; only equal shapes, and one number per channel and image, are known."


def _combine(walk: Walk, node: fx.Node, kind: str, left: fx.Node, right: fx.Node, alpha: float) -> None:
    if kind not in ("add", "sub", "mul"):
        raise walk.refuse("it divides by a tensor, which the packed format cannot.")
    size = image_size(node.meta["val"].shape)
    if size is None or not left.meta["val"].dim() == right.meta["val"].dim() == size[1] + 1:
        raise walk.refuse(_COMBINES.format(*(tuple(side.meta["val"].shape) for side in (left, right))))
    first, second = walk.value(left), walk.value(right)
    if kind == "sub" or alpha != 1:
        factor = np.full(walk.values[second].shape[2], np.float32(-alpha if kind == "sub" else alpha), np.float32)
        value = walk.values[second]
        walk.values.append(Value(value.shape, Kind.FLOAT, value.rank, value.name))
        walk.nodes.append(Node(Op.IDENTITY, (second,), len(walk.values) - 1, steps=[Step(StepKind.MULTIPLY, a=factor)]))
        second = len(walk.values) - 1
    # The one that is written later reads on in its own node: the other stands ready by then.
    if second > first and walk.values[second].shape == size[0]:
        first, second = second, first
    shape = walk.values[second].shape
    if walk.values[first].shape != size[0] or shape not in (size[0], (1, 1, size[0][2])):
        first, second = second, first
        shape = walk.values[second].shape
    if walk.values[first].shape != size[0] or shape not in (size[0], (1, 1, size[0][2])):
        raise walk.refuse(_COMBINES.format(*(tuple(side.meta["val"].shape) for side in (left, right))))
    step = Step(StepKind.MULTIPLY_VALUE if kind == "mul" else StepKind.ADD_VALUE, walk.name_of(node), value=second)
    walk.emit(node, Op.IDENTITY, (first,), steps=[step]).name = ""


@_handles("cat", "concat", "concatenate")
def _cat(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    dims = node.meta["val"].dim()
    if arguments["dim"] % dims != 1:
        raise walk.refuse("it concatenates other dimensions than channels.")
    tensors = list(arguments["tensors"])
    if len(tensors) == 1:
        walk.same(node, tensors[0])
        return
    index = walk.value(tensors[0])
    for number, tensor in enumerate(tensors[1:], 2):
        other = walk.value(tensor)
        h, w, c = walk.values[index].shape
        if number == len(tensors):
            walk.emit(node, Op.CONCAT, (index, other))
            walk.joined.setdefault((index, other), walk.where[node])
        elif (index, other) in walk.joined:  # dense networks concatenate the same again and again
            index = walk.joined[index, other]
        else:
            out = walk.new_value(node, (h, w, c + walk.values[other].shape[2]))
            walk.nodes.append(Node(Op.CONCAT, (index, other), out))
            walk.joined[index, other] = out
            index = out


@_handles("flatten", "view", "reshape", "_unsafe_view", "squeeze", "unsqueeze")
def _reshape(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    source, shape = arguments["self"], node.meta["val"].shape
    size = image_size(shape)
    signs = source in walk.signs
    index = walk.signs[source] if signs else walk.value(source)
    h, w, _ = walk.values[index].shape
    if size is not None and size[1] == 1 and h * w > 1 and size[0][2] == source.meta["val"][0].numel():
        made = walk.emit(node, Op.FLATTEN, (index,))
        made.name = ""
        if signs:  # of what is flattened
            assert made.out is not None
            walk.signs[node] = made.out
            del walk.where[node]
        return
    walk.same(node, source)


@_handles(
    "contiguous",
    "clone",
    "detach",
    "alias",
    *DROPOUTS,
    "to",
    "_to_copy",
    "identity",
)
def _nothing(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    if arguments.get("train") and arguments.get("p"):
        raise walk.refuse("it is random: it drops values in evaluation too.")
    if node.meta["val"].dtype != torch.float32:
        raise walk.refuse(f"it gives {node.meta['val'].dtype}; only float32 is known.")
    walk.same(node, arguments.get("self", arguments.get("input")))


def _pool_name(node: fx.Node) -> str:
    """Of a pooling operation, or of the one whose first result this is."""
    return operation_name(cast(fx.Node, node.args[0]) if operation_name(node) == "getitem" else node)


def _pool_dims(walk: Walk, node: fx.Node, name: str) -> int:
    dims = 1 if "pool1d" in name else 2
    if node.meta["val"].dim() != dims + 2:
        raise walk.refuse("its input has no batch dimension.")
    return dims


@_handles("max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "max_pool1d_with_indices", "max_pool2d_with_indices")
def _pool(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    average = "divisor_override" in arguments or "count_include_pad" in arguments
    dims = _pool_dims(walk, node, _pool_name(node))
    kernel = _pair(arguments["kernel_size"], dims)
    if arguments.get("divisor_override") is not None:
        raise walk.refuse("it has a divisor_override.")
    made = walk.emit(
        node,
        Op.AVERAGE_POOL if average else Op.MAX_POOL,
        (walk.value(arguments["self"]),),
        kernel=kernel,
        stride=_pair(arguments["stride"] or [], dims, kernel[2 - dims :]),
        dilation=(1, 1) if average else _pair(arguments["dilation"], dims),
        padding=_zero_pair(arguments["padding"], dims) * 2,
        count_padding=average and bool(arguments["count_include_pad"]),
    )
    if made.count_padding and not any(made.padding):
        made.count_padding = False


@_handles("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_max_pool1d", "adaptive_max_pool2d", "mean", "amax")
def _global_pool(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    source = arguments["self"]
    index = walk.value(source)
    h, w, _ = walk.values[index].shape
    dims = source.meta["val"].dim()
    name = _pool_name(node)
    if "adaptive" in name:
        size = _pair(arguments["output_size"], _pool_dims(walk, node, name))
        if min(size) < 1 or h % size[0] or w % size[1]:
            raise walk.refuse(f"its output size {size[0]}x{size[1]} does not divide {h}x{w}.")
        kernel = (h // size[0], w // size[1])
    else:
        reduced = arguments.get("dim")
        reduced = range(dims) if reduced is None else [reduced] if isinstance(reduced, int) else reduced
        if sorted(d % dims for d in reduced) != list(range(2, dims)):
            raise walk.refuse("it reduces other dimensions than all spatial ones.")
        kernel = (h, w)
    op = Op.MAX_POOL if "max" in name else Op.AVERAGE_POOL
    walk.emit(node, op, (index,), kernel=kernel, stride=kernel)


@_handles("pad", "constant_pad_nd")
def _pad(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    if arguments.get("mode", "constant") != "constant":
        raise walk.refuse(f"its mode is {arguments['mode']!r}; only 'constant' is known.")
    dims = node.meta["val"].dim()
    sides = [*arguments["pad"]] + [0] * (2 * dims - len(arguments["pad"]))
    if any(sides[-2:]) or min(sides) < 0:
        raise walk.refuse("it pads the batch, or crops.")
    pairs = [(sides[2 * i], sides[2 * i + 1]) for i in range(dims - 1)]  # from the last dimension to the channels
    spatial, channels = pairs[:-1], pairs[-1]
    left, right = spatial[0] if spatial else (0, 0)
    top, bottom = spatial[1] if len(spatial) > 1 else (0, 0)
    fill = arguments.get("value") or 0.0
    if not any(sides):
        walk.same(node, arguments["self"])
        return
    made = walk.emit(
        node, Op.PAD, (walk.value(arguments["self"]),), padding=(top, left, bottom, right), pad_channels=channels
    )
    made.fill = float(np.float32(fill))


@_handles("slice")
def _slice(walk: Walk, node: fx.Node, arguments: dict[str, Any]) -> None:
    source, dim, step = arguments["self"], arguments["dim"], arguments["step"]
    size = source.meta["val"].shape[dim]
    start, end = arguments["start"] or 0, arguments["end"]
    whole = start in (0, -size) and (end is None or end >= size)
    dims = source.meta["val"].dim()
    if whole and step == 1:
        walk.same(node, source)
        return
    if not whole or dim % dims < 2:
        raise walk.refuse("only x[:, :, ::s, ::s] is known: whole dimensions, with a step over rows and columns.")
    stride = (step, 1) if dims == 4 and dim % dims == 2 else (1, step)
    index = walk.value(source)
    before = walk.nodes[-1] if walk.nodes else None
    made = walk.emit(node, Op.MAX_POOL, (index,), stride=stride)
    if (
        before is not None
        and before.out == index
        and before.op is Op.MAX_POOL
        and before.kernel == (1, 1)
        and len(source.users) == 1
    ):
        made.inputs = before.inputs  # rows, then columns: at once
        made.stride = (before.stride[0] * stride[0], before.stride[1] * stride[1])
