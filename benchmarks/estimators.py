"""Forward plus backward of every estimator against a clipped straight-through estimator written with torch operations.

    python benchmarks/estimators.py [--elements 1048576 4194304] [--repeats 50] [--threads 2] [--out FILE]

The peer is the fastest of the plain ways to write it: an autograd function whose forward is a comparison and whose
backward multiplies the gradient by a mask (eager on CPU, torch.where and masked_fill are slower). The common idiom,
clamp and detach, is a second one. Each is timed eager and compiled, in float32 and bfloat16, all of them by turns in
one run. `ms` is the median over the repetitions and `ratio` its ratio to the peer's, promised to be at most 1.5 for
AB-Tanh and AB-ArcTan; `of least` is the same for the fastest repetition, which another load on the machine disturbs
less. Prints a table, and writes JSON with --out.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _common import circumstances, save
from torch import Tensor

from abste import estimators
from abste.estimators import Binarizer, EstimatorSchedule

PEER, IDIOM = "clipped STE", "clamp + detach"
PROMISED = {"ab_tanh": 1.5, "ab_arctan": 1.5}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

Function = Callable[[Tensor], Tensor]


class ClippedSTE(torch.autograd.Function):
    """The peer: forward sign(x), backward the gradient where |x| <= 1."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


def clamp_detach(x: Tensor) -> Tensor:
    """The idiom: the value of sign(x) with the gradient of clamp."""
    soft = x.clamp(-1, 1)
    return soft + ((x >= 0).to(x.dtype).mul_(2).sub_(1) - soft).detach()


def contestants() -> dict[str, Function]:
    """The peers and every registered estimator, half-way through training."""
    functions: dict[str, Function] = {PEER: ClippedSTE.apply, IDIOM: clamp_detach}
    for name in estimators.available():
        binarizer = estimators.resolve(name, "activations")
        assert isinstance(binarizer, Binarizer)
        schedule = EstimatorSchedule(binarizer, 2)
        schedule.step()
        functions[name] = binarizer
    return functions


def compile_apart(function: Function) -> Function:
    """Compile in a frame of its own: estimators share the code of their forward, and with it a limit on graphs."""
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    return torch.compile(function, fullgraph=True, dynamic=False)


def forward_backward(function: Function, x: Tensor, grad: Tensor) -> float:
    """Seconds for one forward and backward."""
    x.grad = None
    start = time.perf_counter()
    function(x).backward(grad)
    return time.perf_counter() - start


def measure(
    functions: dict[str, Function], elements: int, dtype: torch.dtype, repeats: int
) -> dict[str, tuple[float, float]]:
    """Median and least milliseconds of each function; all of them in every repetition, each time in another order."""
    x = torch.randn(elements, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    grad = torch.randn(elements, generator=torch.Generator().manual_seed(1)).to(dtype)
    order, shuffle = list(functions), random.Random(0).shuffle
    seconds: dict[str, list[float]] = {name: [] for name in order}
    for repeat in range(-3, repeats):
        shuffle(order)
        for name in order:
            duration = forward_backward(functions[name], x, grad)
            if repeat >= 0:
                seconds[name].append(duration)
    return {name: (1e3 * statistics.median(values), 1e3 * min(values)) for name, values in seconds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = [2**20, 2**22]
    parser.add_argument("--elements", type=int, nargs="+", default=sizes, help="default: 1048576 4194304")
    parser.add_argument("--repeats", type=int, default=50, help="timed repetitions (default: 50)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if min(arguments.elements) < 1 or arguments.repeats < 1 or arguments.threads < 1:
        parser.error("--elements, --repeats and --threads must be at least 1")
    torch.set_num_threads(arguments.threads)

    functions = contestants()
    modes = {"eager": functions, "compiled": {name: compile_apart(f) for name, f in functions.items()}}
    results: list[dict[str, object]] = []
    print(f"{'':16}{'elements':>10}  {'mode':10}{'dtype':10}{'ms':>9}{'ratio':>8}{'of least':>10}")
    for mode, chosen in modes.items():
        for dtype in DTYPES:
            for elements in arguments.elements:
                milliseconds = measure(chosen, elements, DTYPES[dtype], arguments.repeats)
                peer, peer_least = milliseconds[PEER]
                for name, (median, least) in milliseconds.items():
                    result = {
                        "name": name,
                        "elements": elements,
                        "mode": mode,
                        "dtype": dtype,
                        "milliseconds": round(median, 4),
                        "ratio": round(median / peer, 3),
                        "least_milliseconds": round(least, 4),
                        "ratio_of_least": round(least / peer_least, 3),
                    }
                    results.append(result)
                    line = f"{name:16}{elements:10}  {mode:10}{dtype:10}{median:9.3f}{median / peer:8.2f}"
                    note = f"  over {PROMISED[name]}" if median / peer > PROMISED.get(name, math.inf) else ""
                    print(f"{line}{least / peer_least:10.2f}{note}", flush=True)
    if arguments.out:
        summary = {
            "promised_ratio": PROMISED,
            "repeats": arguments.repeats,
            "threads": arguments.threads,
            **circumstances(),
            "results": results,
        }
        save(summary, arguments.out)


if __name__ == "__main__":
    main()
