"""What loading and augmentation cost beside the training step they feed.

    python benchmarks/data_pipeline.py [--data DIR] [--batches 40] [--out FILE]

Runs a training loop of a full-precision ResNet-20 (bf16 autocast, channels_last, SGD with Nesterov) on CIFAR-10, or on
random images of its size, and times each batch and each step as they alternate. Prints JSON; `ratio` is promised to be
at most 0.05. `batch_ms` is the median over batches, with the cost of starting an epoch spread over its steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from _common import circumstances, save
from torch import nn

import abste.data
import abste.models


def synthetic(count: int) -> abste.data.ImageData:
    """Random images with CIFAR-10's size and statistics; the pipeline's work does not depend on the pixels."""
    generator = torch.Generator().manual_seed(0)
    return abste.data.ImageData(
        torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator),
        torch.randint(0, 10, (count,), generator=generator),
        classes=tuple(str(label) for label in range(10)),
        mean=(0.49140, 0.48216, 0.44653),
        std=(0.24703, 0.24349, 0.26159),
        name="synthetic",
    )


def measure(data: abste.data.ImageData, batch_size: int, batches: int, warm_up: int, threads: int) -> dict[str, object]:
    """Time `batches` batches and steps, after `warm_up` untimed ones."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    augment = abste.data.Augment(crop_padding=4, flip="alternating", cutout=8)
    source = abste.data.Batches(data, batch_size, augment=augment, seed=0, train=True)
    model = abste.models.resnet20(num_classes=10).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loss_of = nn.CrossEntropyLoss()

    first: list[float] = []
    batch: list[float] = []
    step: list[float] = []
    epoch = done = 0
    while done < warm_up + batches:
        stream, place = source.epoch(epoch), 0
        while done < warm_up + batches:
            start = time.perf_counter()
            images, labels = next(stream, (None, None))
            loaded = time.perf_counter()
            if images is None or labels is None:
                break
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = loss_of(model(images), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if place == 0:
                first.append(loaded - start)
            elif done >= warm_up:
                batch.append(loaded - start)
            if done >= warm_up:
                step.append(time.perf_counter() - loaded)
            done += 1
            place += 1
        epoch += 1

    steady = statistics.median(batch)
    batch_ms = 1e3 * (steady + max(0.0, statistics.median(first) - steady) / len(source))
    step_ms = 1e3 * statistics.median(step)
    return {
        "batch_ms": round(batch_ms, 3),
        "step_ms": round(step_ms, 3),
        "ratio": round(batch_ms / step_ms, 4),
        "epoch_start_ms": round(1e3 * statistics.median(first), 3),
        "batches": batches,
        "batch_size": batch_size,
        "threads": threads,
        "data": data.name,
        "images": len(data),
        "augment": {"crop_padding": 4, "flip": "alternating", "cutout": 8},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with CIFAR-10 (default: random images)")
    parser.add_argument("--batches", type=int, default=40, help="timed batches (default: 40)")
    parser.add_argument("--warm-up", type=int, default=5, help="untimed batches before (default: 5)")
    parser.add_argument("--batch-size", type=int, default=256, help="default: 256")
    parser.add_argument("--threads", type=int, default=2, help="torch threads (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.batches < 2 or arguments.warm_up < 0 or arguments.threads < 1:
        parser.error("--batches must be at least 2, --warm-up at least 0, --threads at least 1")

    try:
        data = abste.data.load("cifar10", arguments.data).train if arguments.data else synthetic(50_000)
        result = measure(data, arguments.batch_size, arguments.batches, arguments.warm_up, arguments.threads)
    except abste.errors.AbsteError as error:
        parser.error(str(error))
    result.update(circumstances())
    print(json.dumps(result, indent=2))
    save(result, arguments.out)


if __name__ == "__main__":
    main()
