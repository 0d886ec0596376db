"""Checks an installed wheel, which needs nothing but numpy: every instruction set against the interpreter.

python tests/wheel.py tests/c/corpus
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import numpy as np

import abste
from abste.deploy import format as abste_format
from abste.runtime import isas
from abste.runtime.reference import run


def main(folder: Path) -> None:
    paths = sorted(folder.glob("*.abste"))
    if not paths:
        raise SystemExit(f"{folder} holds no .abste files.")
    for path in paths:
        graph = abste_format.read(path.read_bytes())
        image = np.random.default_rng(0).normal(size=(1, *graph.values[0].shape)).astype(np.float32)
        for isa, int8 in itertools.product(isas(), (None, "all")):
            values = run(graph, [image], int8).values
            found = abste.load(path, isa=isa, int8=int8)(image, layout="nhwc")
            for output, index in zip(found if isinstance(found, tuple) else (found,), graph.outputs(), strict=True):
                what = f"{path.name} with {isa}, int8={int8}"
                np.testing.assert_array_equal(output.ravel(), values[index].ravel(), what)
    assert "torch" not in sys.modules
    sys.stdout.write(f"{len(paths)} networks give the numbers of the interpreter with {', '.join(isas())}\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
