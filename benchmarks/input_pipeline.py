"""How fast images are read from files, beside torchvision's ImageFolder with torch's DataLoader.

    python benchmarks/input_pipeline.py [--data FOLDER] [--rounds 9] [--images 2048] [--workers 2] [--out FILE]

FOLDER has train/CLASS/*.jpg; without it, 512 noisy pictures of 500 x 375 pixels are made. Three loaders take turns:
ours from the folder, ours from shards (packed into a temporary folder first), and ImageFolder with DataLoader. All show
the same transforms (RandomResizedCrop, flip, and with --jitter ColorJitter and RandAugment) with as many persistent
workers, and yield normalised float32 batches in this process. A round is an epoch of `--images` images; its first
batch, before which workers have nothing prepared, counts. Prints JSON with the median images per second of each and the
median over rounds of the ratios to ImageFolder, which are promised to be at least 0.9, and of shards to folder, at
least 1 but for noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _common import by_turns, circumstances, save
from PIL import Image
from torch.utils.data import DataLoader, Subset
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

import abste.errors
from abste.data import IMAGENET, FileBatches, FileSplits, ImageFiles, Views, open_files, write_shards

MEAN, STD = IMAGENET


def make_pictures(root: Path, count: int = 512) -> None:
    """``root/train/CLASS/*.jpg`` of two classes, about as large as ImageNet's photos."""
    random = np.random.default_rng(0)
    for number in range(count):
        folder = root / "train" / f"class{number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(random.integers(0, 256, (75, 100, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{number:04}.jpg", quality=90)


def ours(data: ImageFiles, arguments: argparse.Namespace) -> Callable[[], None]:
    jitter = {"color_jitter": (0.4, 0.4, 0.4, 0.1), "rand_augment": (2, 9)} if arguments.jitter else {}
    batches = FileBatches(
        data,
        arguments.batch_size,
        views=Views((arguments.size, arguments.size), flip="random", **jitter),  # type: ignore[arg-type]
        seed=0,
        train=True,
        workers=arguments.workers,
    )
    epochs = iter(range(1 << 30))

    def epoch() -> None:
        for _ in batches.epoch(next(epochs)):
            pass

    return epoch


def theirs(root: Path, chosen: list[int], arguments: argparse.Namespace) -> Callable[[], None]:
    steps: list[torch.nn.Module] = [v2.RandomResizedCrop(arguments.size), v2.RandomHorizontalFlip()]
    if arguments.jitter:
        steps += [v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandAugment(2, 9)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    loader = DataLoader(
        Subset(ImageFolder(str(root), transform=v2.Compose(steps)), chosen),
        batch_size=arguments.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=arguments.workers,
        persistent_workers=arguments.workers > 0,
    )

    def epoch() -> None:
        for _ in loader:
            pass

    return epoch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder with train/CLASS/*.jpg (default: made pictures)")
    parser.add_argument("--images", type=int, default=2048, help="in a round (default: 2048)")
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each loader (default: 9)")
    parser.add_argument("--warm-up", type=int, default=1, help="untimed epochs before (default: 1)")
    parser.add_argument("--batch-size", type=int, default=64, help="default: 64")
    parser.add_argument("--size", type=int, default=160, help="side of a crop in pixels (default: 160)")
    parser.add_argument("--workers", type=int, default=2, help="processes of each loader (default: 2)")
    parser.add_argument("--jitter", action="store_true", help="with ColorJitter and RandAugment")
    parser.add_argument("--threads", type=int, default=2, help="torch threads of this process (default: 2)")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.images < arguments.batch_size or arguments.threads < 1:
        parser.error("--rounds and --threads must be at least 1, --images at least --batch-size")
    torch.set_num_threads(arguments.threads)

    try:
        with tempfile.TemporaryDirectory() as scratch:
            if arguments.data is None:
                arguments.data = Path(scratch) / "pictures"
                make_pictures(arguments.data)
            train = open_files("folder", arguments.data, mean=MEAN, std=STD).train
            chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[: arguments.images]
            folder = train.select(chosen)
            write_shards(FileSplits(folder, None), Path(scratch) / "shards")
            shards = open_files("shards", Path(scratch) / "shards", mean=MEAN, std=STD).train
            loaders = {
                "folder": ours(folder, arguments),
                "shards": ours(shards, arguments),
                "ImageFolder": theirs(arguments.data / "train", chosen.tolist(), arguments),
            }
            milliseconds = by_turns(loaders, arguments.rounds, arguments.warm_up)
    except abste.errors.AbsteError as error:
        parser.error(str(error))

    shown = len(folder) // arguments.batch_size * arguments.batch_size

    def ratio(name: str, to: str) -> float:
        pairs = zip(milliseconds[to], milliseconds[name], strict=True)
        return round(statistics.median(their / our for their, our in pairs), 3)

    result: dict[str, object] = {
        "images_per_second": {name: round(1e3 * shown / statistics.median(t), 1) for name, t in milliseconds.items()},
        "folder_to_ImageFolder": ratio("folder", "ImageFolder"),
        "shards_to_ImageFolder": ratio("shards", "ImageFolder"),
        "shards_to_folder": ratio("shards", "folder"),
        "rounds_ms": {name: [round(t, 1) for t in times] for name, times in milliseconds.items()},
        "images": shown,
        **{key: getattr(arguments, key) for key in ("batch_size", "size", "workers", "jitter", "threads")},
        **circumstances(),
    }
    print(json.dumps(result, indent=2))
    save(result, arguments.out)


if __name__ == "__main__":
    main()
