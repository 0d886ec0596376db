"""The gradient of a convolution's weight as a product of matrices, beside oneDNN's, where images have become small.

    python benchmarks/weight_gradient.py [--rounds 15] [--threads 2] [--out FILE]
    ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/weight_gradient.py    # as on a machine with less

3x3 convolutions of a ResNet-18 for CIFAR-10 from images of 24, 32, 48 and 64 pixels, batch 128, channels_last. `ratio`
is the median over rounds of the product's time divided by oneDNN's of the same round, with its quartiles; binary
convolutions take the product where it is at most 1 everywhere: up to 16 outputs per image.
"""

from __future__ import annotations

import argparse
import os
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from _common import by_turns, circumstances, save
from torch import Tensor

from abste.nn import functional
from abste.nn.functional import Convolution

BATCH = 128
LAYERS = [(512, 512, 3, 1), (256, 512, 6, 2), (512, 512, 4, 1), (256, 512, 8, 2), (256, 256, 6, 1), (256, 256, 8, 1)]


def gradients(inputs: int, outputs: int, size: int, stride: int, dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """Both ways to the gradient of the same weight."""
    op = Convolution((stride, stride), (1, 1), (1, 1), 1)
    last = {"dtype": dtype, "memory_format": torch.channels_last}
    x = torch.randn(BATCH, inputs, size, size).to(**last)
    weight = torch.randn(outputs, inputs, 3, 3).to(**last)
    grad = torch.randn_like(op.forward(x, weight))

    def with_few(few: int) -> Callable[[], Tensor]:
        def gradient() -> Tensor:
            functional._FEW_OUTPUTS = few
            result = op.backward(grad, x, weight, False, True)[1]
            assert result is not None
            return result

        return gradient

    both = {"oneDNN": with_few(0), "product": with_few(size * size)}
    wanted = op.backward(grad.double(), x.double(), weight.double(), False, True)[1]
    assert wanted is not None
    # Of the product alone: with AVX2 oneDNN itself is 1.3 % off in bfloat16.
    if (both["product"]() - wanted).norm() > 0.005 * wanted.norm():
        raise SystemExit(f"the gradient of {inputs} to {outputs} channels at {size} pixels is wrong")
    return both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each (default: 15)")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the figures here, as JSON")
    arguments = parser.parse_args()
    if arguments.rounds < 2 or arguments.threads < 1:
        parser.error("--rounds must be at least 2 and --threads at least 1")
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    results: list[dict[str, object]] = []
    print(f"{'dtype':10}{'layer':22}{'outputs':>8}{'oneDNN ms':>11}{'ms':>8}{'ratio':>7}  quartiles")
    for dtype in (torch.bfloat16, torch.float32):
        for inputs, outputs, size, stride in LAYERS:
            times = by_turns(gradients(inputs, outputs, size, stride, dtype), arguments.rounds, warm_up=2)
            pairs = zip(times["product"], times["oneDNN"], strict=True)
            low, ratio, high = statistics.quantiles((own / peer for own, peer in pairs), n=4)
            peer_ms, ms = statistics.median(times["oneDNN"]), statistics.median(times["product"])
            kind, places = str(dtype).removeprefix("torch."), (size // stride) ** 2
            layer = f"{inputs} to {outputs} at {size}, {stride}"
            print(
                f"{kind:10}{layer:22}{places:8}{peer_ms:11.1f}{ms:8.1f}{ratio:7.2f}  {low:.2f} to {high:.2f}",
                flush=True,
            )
            results.append(
                {
                    "dtype": kind,
                    "channels": [inputs, outputs],
                    "size": size,
                    "stride": stride,
                    "outputs": places,
                    "onednn_ms": round(peer_ms, 2),
                    "ms": round(ms, 2),
                    "ratio": round(ratio, 3),
                    "quartiles": [round(low, 3), round(high, 3)],
                }
            )
    limit = os.environ.get("ONEDNN_MAX_CPU_ISA")
    save(
        {
            "rounds": arguments.rounds,
            "threads": arguments.threads,
            "isa_limit": limit,
            **circumstances(),
            "results": results,
        },
        arguments.out,
    )


if __name__ == "__main__":
    main()
