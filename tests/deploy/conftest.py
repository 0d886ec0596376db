from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from random_graphs import Builder

from abste.deploy.graph import Graph, Op


@pytest.fixture(scope="session")
def loose_graph() -> Callable[[int], Graph]:
    """A network from a seed with much to simplify: many identities, several readers, several outputs."""

    def build(seed: int) -> Graph:
        builder = Builder(seed)
        others = [Op.CONV, Op.XNOR, Op.XNOR, Op.SIGN_CONV, Op.MAX_POOL, Op.CONCAT]
        count = int(builder.rng.integers(4, 20))
        for op in builder.rng.choice([*[Op.IDENTITY] * 12, *others], count):
            builder.add(Op(int(op)))
        for index in builder.floats()[1:]:
            if builder.values[index].shape == builder.values[0].shape:
                builder.values[index].output = bool(builder.rng.random() < 0.15)
        for value in builder.values:  # no NaN that hides what differs
            value.name = ""
        graph = builder.graph()
        for node in graph.nodes:
            for step in node.steps:
                if step.a is not None and step.a.dtype == np.float32 and builder.rng.random() < 0.3:
                    step.a = np.sign(step.a)  # ties
        return graph

    return build
