"""What is in a packed network, as text."""

from __future__ import annotations

from abste.runtime.network import Network, TensorInfo


def describe(network: Network) -> str:
    """A table of the operations, with shapes, bits, bytes and multiply-accumulates, and what the network needs."""
    rows = [("module", "operation", "output", "weights", "bits", "bytes", "MACs")]
    for node in network.nodes:
        behind = [_short(step, node.name) for step in node.steps if step and step != node.name]
        size = -(-node.weights * node.weight_bits // 8)
        rows.append(
            (
                node.name,
                " + ".join([node.operation, *behind]),
                "x".join(map(str, node.shape)),
                f"{node.weights:,}" if node.weights else "-",
                str(node.weight_bits or "-"),
                f"{size:,}" if size else "-",
                f"{node.macs:,}" if node.macs else "-",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    form = "  ".join(f"{{:{'<' if column < 3 else '>'}{width}}}" for column, width in enumerate(widths))
    lines = [form.format(*row) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    total = {bits: sum(node.weights for node in network.nodes if node.weight_bits == bits) for bits in (1, 16, 32)}
    macs = {bits: sum(node.macs for node in network.nodes if node.weight_bits == bits) for bits in (1, 16, 32)}
    kinds = [f"{count:,} of {bits} bit{'s' * (bits > 1)}" for bits, count in total.items() if count]
    work = [f"{macs[bits]:,} with {bits}-bit weights" for bits in (1, 16, 32) if macs[bits]]
    facts: list[tuple[str, object]] = [("input", _shapes(network.inputs)), ("output", _shapes(network.outputs))]
    if network.classes:
        shown = ", ".join(network.classes[:10]) + (", ..." if len(network.classes) > 10 else "")
        facts.append(("classes", f"{len(network.classes)}: {shown}"))
    facts += [
        ("weights", ", ".join(kinds) or "none"),
        ("MACs", ", ".join(work) or "none"),
        ("file", f"{network.file_bytes:,} bytes"),
        ("arena", f"{network.arena_bytes:,} bytes of working memory for an image"),
        ("kernels", f"{network.isa}, with {network.packed_bytes:,} bytes for weights in their order"),
    ]
    facts += [(key, value) for key, value in network.metadata.items() if isinstance(value, str | int | float)]
    width = max(len(key) for key, _ in facts)
    lines += ["", *(f"{key:{width}}  {value}" for key, value in facts)]
    return "\n".join(map(printable, lines))


def printable(line: str) -> str:
    """A line with names of a file in it; what a terminal would obey rather than show is replaced."""
    return "".join(char if char.isprintable() else "\ufffd" for char in line)


def _short(step: str, node: str) -> str:
    """The last part of a module's name, but the whole of one that encloses the node: a block with a shortcut."""
    return step if node.startswith(f"{step}.") else step.rpartition(".")[2]


def _shapes(values: tuple[TensorInfo, ...]) -> str:
    return ", ".join("x".join(map(str, value.shape)) + (f" ({value.name})" if value.name else "") for value in values)
