"""Count the channels of binary activations that have one sign on nearly all images, and filters that shrank.

Such a channel says nothing, and its gradient may be gone for good: what it could learn is lost to the network.

python studies/channels.py studies/i/w1a1/taught/seed-0 studies/i/w1a1/raw/seed-0 --data data
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

from abste.nn import BinaryConv2d
from abste.train.run import RunDirectory, evaluation_batches, load_run, load_run_data

SAME = 0.999  # of all values of a channel
SMALL = 0.5  # of the median filter's mean |latent|


def examine(path: str, data: str) -> str:
    model = load_run(path).eval()
    recipe = RunDirectory(path).read_recipe()
    _, images, split = load_run_data(RunDirectory(path), recipe, data)
    inputs = next(iter(evaluation_batches(images, recipe, "cpu").epoch(0)))[0]
    channels = still = filters = small = 0
    sizes: list[float] = []

    def look(layer: nn.Module, given: tuple[Tensor, ...], _: Tensor) -> None:
        nonlocal channels, still, filters, small
        positive = (given[0] >= 0).float().mean((0, 2, 3))
        magnitudes = layer.get_parameter("weight").detach().abs().mean((1, 2, 3))
        channels += len(positive)
        still += int(((positive < 1 - SAME) | (positive > SAME)).sum())
        filters += len(magnitudes)
        small += int((magnitudes < SMALL * magnitudes.median()).sum())
        sizes.append(float(given[0].square().mean().sqrt()))

    for module in model.modules():
        if isinstance(module, BinaryConv2d) and module.activation is not None:
            module.register_forward_hook(look)
    with torch.no_grad():
        model(inputs)
    return (
        f"{path}: {still} of {channels} channels keep their sign on {len(inputs):,} {split.replace('_', '-')} images, "
        f"{small} of {filters} filters have less than half of their layer's median |latent|, "
        f"RMS of inputs {min(sizes):.2f} to {max(sizes):.2f}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("runs", nargs="+", metavar="RUN")
    parser.add_argument("--data", default="data")
    arguments = parser.parse_args()
    for run in arguments.runs:
        print(examine(run, arguments.data), flush=True)
