"""Numbers the values of a graph as the format wants them, and finds each a place in the arena."""

from __future__ import annotations

from dataclasses import replace

from abste.deploy.graph import Graph

ALIGNMENT = 64


def ordered(graph: Graph) -> Graph:
    """The graph with its values in the order in which nodes write them, inputs first; values that no node writes go.

    The nodes are new; the values, their weights and steps' arrays are shared.
    """
    order = list(range(graph.input_count))
    for node in graph.nodes:
        order += node.written()
    index = {old: new for new, old in enumerate(order)}
    nodes = []
    for node in graph.nodes:
        steps = [replace(step, value=None if step.value is None else index[step.value]) for step in node.steps]
        nodes.append(
            replace(
                node,
                inputs=tuple(index[i] for i in node.inputs),
                out=None if node.out is None else index[node.out],
                bits=None if node.bits is None else index[node.bits],
                steps=steps,
            )
        )
    return replace(graph, values=[graph.values[old] for old in order], nodes=nodes)


def plan(graph: Graph) -> Graph:
    """The graph, ordered, with a place for each value: no two that live at the same time overlap.

    A node works in place where it may. Then, largest first, each place is the lowest that is free while it is lived in.
    """
    graph = ordered(graph)
    lives = graph.lives()
    places = [[index] for index in range(len(graph.values))]  # values that take each other's place, in turn
    for number, node in enumerate(graph.nodes):
        before = next((i for i in graph.in_place(node) if lives[i][1] == number), None)
        if before is not None and node.out is not None:
            places[before].append(node.out)
            places[node.out] = places[before]
    chains = {chain[0]: chain for chain in places}
    placed: list[tuple[int, int, int, int]] = []  # first node, last node, begin, end
    values = list(graph.values)
    for first in sorted(chains, key=lambda i: (-values[i].nbytes, i)):
        birth, death = lives[first][0], lives[chains[first][-1]][1]
        size = -(-values[first].nbytes // ALIGNMENT) * ALIGNMENT
        at = 0
        for _, _, begin, end in sorted((p for p in placed if p[0] <= death and birth <= p[1]), key=lambda p: p[2]):
            if at + size <= begin:
                break
            at = max(at, end)
        for index in chains[first]:
            values[index] = replace(values[index], offset=at)
        placed.append((birth, death, at, at + size))
    return replace(graph, values=values, arena_bytes=max((end for *_, end in placed), default=0))
