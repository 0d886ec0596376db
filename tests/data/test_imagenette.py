"""Real photos, where a copy lies beside the repository."""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from abste.data import FileBatches, FileSplits, Views, open_files, write_shards

RAW = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


def test_real_photos(imagenette_root: Path, tmp_path: Path) -> None:
    train, test = open_files("folder", imagenette_root, **RAW)
    assert test is not None and (len(train), len(test), len(train.classes)) == (4500, 2200, 10)
    wanted = ImageFolder(str(imagenette_root / "val"))
    assert [(test.path(i), int(test.labels[i])) for i in range(len(test))] == wanted.samples

    some = torch.arange(0, 2200, 55)
    steps = v2.Compose([v2.Resize(146), v2.CenterCrop(128), v2.PILToTensor()])
    batches = FileBatches(test.select(some), 10, views=Views((128, 128)), seed=0, train=False, workers=2)
    found = torch.cat([images for images, _ in batches.epoch(0)])
    batches.close()
    modes = set()
    for index, image in zip(some.tolist(), (found * 255).round().to(torch.uint8), strict=True):
        with Image.open(wanted.samples[index][0]) as photo:
            modes.add(photo.mode)
            assert torch.equal(image, steps(photo.convert("RGB")))

    write_shards(FileSplits(test.select(some), None), tmp_path / "shards", images=16)
    views = Views((64, 64), flip="random", rand_augment=(2, 9), cutmix=1.0)
    packed = open_files("shards", tmp_path / "shards", **RAW).train
    assert torch.equal(packed.labels, test.labels[some])
    pairs = [FileBatches(data, 8, views=views, seed=3, train=True, workers=1) for data in (packed, test.select(some))]
    for one, other in zip(*(batches.epoch(2) for batches in pairs), strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    for batches in pairs:
        batches.close()
