"""From an exported program to a graph, operation by operation; operations.py knows what each becomes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from abste.deploy.graph import Array, Graph, Kind, Node, Op, Step, StepKind, Value
from abste.errors import ConversionError

BATCH = 2
"""Images in the exported example: more than one, so that no operation takes the batch for something else."""
FIRST_OF_TWO = (  # operations whose first result alone is of use
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "max_pool1d_with_indices",
    "max_pool2d_with_indices",
)
DROPOUTS = ("dropout", "feature_dropout", "alpha_dropout")
"""They return their input itself in evaluation, which no schema and no graph of an older torch.export says."""
_IGNORED = ("_assert_tensor_metadata", "_assert_async", "_assert_scalar", "sym_size")


def image_size(shape: torch.Size) -> tuple[tuple[int, int, int], int] | None:
    """(h, w, c) and rank of a batch's shape, or None where it is no batch of images, signals or vectors."""
    if len(shape) not in (2, 3, 4) or shape[0] != BATCH or 0 in shape:
        return None
    c, *spatial = (int(n) for n in shape[1:])
    h, w = ([1, 1, *spatial])[-2:]
    return (h, w, c), len(shape) - 1


class Walk:
    """Walks an exported program and builds the graph, one node or step per operation."""

    def __init__(self, program: Any, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
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
        size = image_size(result.shape) if isinstance(result, Tensor) else None
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
        size = image_size(node.meta["val"].shape)
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
        name = operation_name(node)
        if name in _IGNORED or name in FIRST_OF_TWO:
            return
        target = cast(Any, node.target)
        in_place = getattr(target, "namespace", "") == "aten" and name.endswith("_") and not name.endswith("__")
        name = name.rstrip("_") if in_place else name
        read: Any = node.args[0] if name == "getitem" else None
        if isinstance(read, fx.Node) and operation_name(read) in FIRST_OF_TWO:
            if node.args[1] != 0:
                self.current = read
                raise self.refuse("its indices are read; only its result is known.")
            name, target = operation_name(read), cast(Any, read.target)
        else:
            read = node
            if in_place and name != "detach":
                self.check_owner(node.args[0])
            if all(value in self.constants for value in node.all_input_nodes):
                self.fold(node)
                return
        handler = self.handlers.get(name)
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
        if in_place or name in DROPOUTS or any(result.alias_info for result in schema.returns):
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


Handler = Callable[[Walk, fx.Node, dict[str, Any]], None]
"""Emits what one operation becomes: (walk, operation, its arguments by name)."""


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


def operation_name(node: fx.Node) -> str:
    """Of the operation, without its overload."""
    return str(getattr(node.target, "_opname", getattr(node.target, "__name__", node.target)))
