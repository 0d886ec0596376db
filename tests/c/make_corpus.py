"""Writes the seeds of the fuzzer: small networks that together use every operation and every kind of step.

python tests/c/make_corpus.py tests/c/corpus
"""

from __future__ import annotations

import sys
from pathlib import Path

from abste.deploy import format as abste_format
from abste.deploy.graph import Op

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from random_graphs import Builder


def seeds() -> dict[str, bytes]:
    """File names and contents: each one is taken only if it uses what none before did."""
    files: dict[str, bytes] = {}
    known: set[object] = set()
    for seed in range(2000):
        made = Builder(seed)
        for op in made.rng.permutation([*Op, Op.XNOR])[:4]:
            made.add(Op(int(op)))
        graph = made.graph()
        used: set[object] = {(node.op, node.groups > 1, node.pad_value, node.count_padding) for node in graph.nodes}
        used |= {step.kind for node in graph.nodes for step in node.steps}
        data = abste_format.write(graph)
        if used - known and len(data) < 4096:
            known |= used
            files[f"{seed:04}.abste"] = data
    return files


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in seeds().items():
        (folder / name).write_bytes(data)
