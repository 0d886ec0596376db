from __future__ import annotations

import itertools
import multiprocessing
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import make_folder, noise, number_of
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from abste.data import Batches, FileBatches, ImageData, ImageFiles, Views, open_files, write_shards
from abste.data.batches import stream_seed
from abste.data.loading import default_workers
from abste.errors import ConfigError, DataError

PLAIN = Views((8, 8))
EVERYTHING = Views(
    (16, 20),
    flip="alternating",
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    rand_augment=(2, 9),
    mixup=0.3,
    cutmix=1.0,
)
# Pixels as they are: x / 255.
RAW: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """26 images of several sizes, of two classes."""
    root = make_folder(tmp_path_factory.mktemp("noisy"), {"": 13}, ("cat", "dog"))
    return open_files("folder", root, **RAW).train


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    """26 images of one colour each."""
    root = make_folder(tmp_path_factory.mktemp("plain"), {"": 13}, ("cat", "dog"), "plain", ".png")
    return open_files("folder", root, **RAW).train


def training(data: ImageFiles, batch_size: int = 6, views: Views = PLAIN, **kw: Any) -> FileBatches:
    return FileBatches(data, batch_size, views=views, **{"seed": 0, "train": True, "workers": 0, **kw})


def evaluation(data: ImageFiles, batch_size: int = 6, views: Views = PLAIN, **kw: Any) -> FileBatches:
    return FileBatches(data, batch_size, views=views, **{"seed": 0, "train": False, "workers": 0, **kw})


def numbers(batches: Iterable[tuple[Tensor, Tensor]]) -> list[list[int]]:
    """Which plain images each batch holds."""
    return [[number_of(image[:, 0, 0].numpy() * 255) for image in images] for images, _ in batches]


def pixels(images: Tensor) -> list[Tensor]:
    """The uint8 pixels of raw images, each (C, H, W)."""
    return list((images * 255).round().to(torch.uint8))


def same(left: Iterable[Any], right: Iterable[Any]) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# --- order and determinism


def test_any_number_of_workers_and_any_start_give_the_same_batches(noisy: ImageFiles, tmp_path: Path) -> None:
    expected = {epoch: list(training(noisy, views=EVERYTHING).epoch(epoch)) for epoch in (0, 1)}
    assert len(expected[0]) == 4
    assert not same(expected[0], expected[1])
    for workers in (1, 3):
        batches = training(noisy, views=EVERYTHING, workers=workers)
        for epoch, start in ((1, 0), (0, 3), (0, 1), (1, 4)):
            assert same(batches.epoch(epoch, start), expected[epoch][start:])
        batches.close()
        assert same(batches.epoch(0, 2), expected[0][2:])  # starts its workers again
        batches.close()
    assert not same(training(noisy, views=EVERYTHING, seed=1).epoch(0), expected[0])
    shards = tmp_path / "shards"
    write_shards(open_files("folder", noisy.source.root), shards, images=7)
    packed = open_files("shards", shards, **RAW).train
    assert same(training(packed, views=EVERYTHING, workers=2).epoch(1), expected[1])


def test_training_shuffles_and_leaves_out_the_incomplete_batch(plain: ImageFiles) -> None:
    batches = training(plain)
    epochs = [list(itertools.chain(*numbers(batches.epoch(epoch)))) for epoch in (0, 1)]
    assert len(batches) == 4
    for order in epochs:
        assert len(set(order)) == 24 and order != sorted(order)
    assert epochs[0] != epochs[1]
    # The order is that of a data set in memory.
    small = ImageData(torch.zeros(26, 3, 1, 1, dtype=torch.uint8), torch.arange(26), ("a",) * 26, **RAW, name="small")
    memory = Batches(small, 6, augment=None, seed=0, train=True)
    assert numbers(batches.epoch(3)) == [labels.tolist() for _, labels in memory.epoch(3)]


def test_labels_are_those_of_the_images(plain: ImageFiles) -> None:
    for source in (training(plain, workers=2), evaluation(plain)):
        for images, labels in source.epoch(0):
            assert labels.dtype == torch.int64
            assert [number_of(image[:, 0, 0].numpy() * 255) // 13 for image in images] == labels.tolist()
        source.close()


def test_ranks_take_disjoint_shares(plain: ImageFiles) -> None:
    alone = numbers(training(plain, 6).epoch(1))
    shares = [numbers(training(plain, 3, rank=rank, world_size=2).epoch(1)) for rank in (0, 1)]
    assert [a + b for a, b in zip(*shares, strict=True)] == alone


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_evaluation_is_exact_under_sharding(plain: ImageFiles, world_size: int) -> None:
    ranks = [evaluation(plain, 4, rank=rank, world_size=world_size) for rank in range(world_size)]
    shares = [numbers(rank.epoch(0)) for rank in ranks]
    assert [len(share) for share in shares] == [len(rank) for rank in ranks]
    assert sorted(itertools.chain(*itertools.chain(*shares))) == list(range(26))


def test_evaluation_keeps_the_order_of_the_data(plain: ImageFiles) -> None:
    assert list(itertools.chain(*numbers(evaluation(plain, workers=2).epoch(0)))) == list(range(26))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_random_numbers_of_the_process_are_left_alone(noisy: ImageFiles, workers: int) -> None:
    before = torch.get_rng_state()
    batches = training(noisy, views=EVERYTHING, workers=workers)
    for _ in batches.epoch(0):
        assert torch.equal(torch.get_rng_state(), before)
    batches.close()


def test_an_epoch_may_be_left_in_the_middle(noisy: ImageFiles) -> None:
    expected = list(training(noisy).epoch(1))
    batches = training(noisy, workers=2)
    left = batches.epoch(0)
    next(left)
    assert same(batches.epoch(1), expected)
    with pytest.raises(ConfigError, match="another was read; read one at a time"):
        next(left)
    batches.close()


def test_closing_ends_the_workers(noisy: ImageFiles) -> None:
    before = set(multiprocessing.active_children())
    batches = training(noisy, workers=2)
    inside = batches.epoch(0)
    next(inside)
    assert len(set(multiprocessing.active_children()) - before) == 2
    batches.close()
    assert set(multiprocessing.active_children()) <= before


LOSE_A_WORKER = """
import multiprocessing, os, signal, sys
from abste.data import FileBatches, Views, lost_workers, open_files
from abste.errors import DataError

data = open_files("folder", sys.argv[1]).train
batches = FileBatches(data, 2, views=Views((8, 8)), seed=0, train=True, workers=1)
try:
    with lost_workers():  # torch may tell of it anywhere in here
        inside = batches.epoch(0)
        next(inside)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        list(inside)
except DataError as error:
    print(error)
"""


def test_a_lost_worker_is_one_sentence(noisy: ImageFiles) -> None:
    command = [sys.executable, "-c", LOSE_A_WORKER, str(noisy.source.root)]  # torch would tell pytest of it, too
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.startswith("A process that reads images was lost"), done.stderr
    assert done.stdout.endswith("; continue with fewer data.workers, or with 0.\n")


# --- views


def test_evaluation_is_torchvisions(noisy: ImageFiles) -> None:
    for size, resize in (((16, 16), None), ((16, 20), None), ((16, 16), 30)):
        views = Views(size, resize=resize)
        # 8/7 of the longer side, as 256 is of 224.
        wanted = v2.Compose([v2.Resize(resize or {16: 18, 20: 23}[max(size)]), v2.CenterCrop(size), v2.PILToTensor()])
        found = list(itertools.chain(*(pixels(images) for images, _ in evaluation(noisy, views=views).epoch(0))))
        for index, image in enumerate(found):
            assert torch.equal(image, wanted(Image.open(noisy.path(index)).convert("RGB")))
    assert Views((224, 224)).shorter_side == 256


def test_training_is_torchvisions(noisy: ImageFiles) -> None:
    views = Views(
        (16, 20), scale=(0.3, 0.9), ratio=(0.5, 2), flip="random", color_jitter=(0.4, 0.3, 0.2), rand_augment=(1, 5)
    )
    steps = [
        v2.RandomResizedCrop((16, 20), scale=(0.3, 0.9), ratio=(0.5, 2)),
        v2.RandomHorizontalFlip(),
        v2.ColorJitter(0.4, 0.3, 0.2),
        v2.RandAugment(1, 5),
        v2.PILToTensor(),
    ]
    order = torch.randperm(26, generator=torch.Generator().manual_seed(stream_seed(7, 1, 2)))
    found = list(itertools.chain(*(pixels(images) for images, _ in training(noisy, views=views, seed=7).epoch(2))))
    assert len(found) == 24
    for index, image in zip(order.tolist(), found, strict=False):
        torch.manual_seed(stream_seed(7, 2, 2, index))  # by seed, epoch and number
        assert torch.equal(image, v2.Compose(steps)(Image.open(noisy.path(index)).convert("RGB")))


def test_normalisation(noisy: ImageFiles) -> None:
    mean, std = (0.1, 0.5, 0.7), (0.2, 0.3, 0.4)
    other = open_files("folder", noisy.source.root, mean=mean, std=std).train
    raw, _ = next(evaluation(noisy).epoch(0))
    for channels_last in (True, False):
        images, _ = next(evaluation(other, channels_last=channels_last, dtype=torch.float64).epoch(0))
        wanted = v2.functional.normalize(raw.double(), mean, std)
        assert images.dtype == torch.float64 and torch.allclose(images, wanted, atol=1e-5)
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert images.is_contiguous(memory_format=memory_format)
    mixed, _ = next(training(noisy, views=EVERYTHING).epoch(0))
    assert mixed.is_contiguous(memory_format=torch.channels_last)


def test_alternating_flips_show_both_sides(tmp_path: Path) -> None:
    for i in range(16):
        folder = tmp_path / f"class{i % 2}"
        folder.mkdir(exist_ok=True)
        noise(i, 16, 16).save(folder / f"{i:02}.png")
    data = open_files("folder", tmp_path, **RAW).train
    views = Views((16, 16), scale=(1, 1), ratio=(1, 1), flip="alternating")
    order = [
        torch.randperm(16, generator=torch.Generator().manual_seed(stream_seed(0, 1, epoch))) for epoch in range(3)
    ]
    shown = [next(training(data, 16, views).epoch(epoch))[0][order[epoch].argsort()] for epoch in range(3)]
    originals = next(evaluation(data, 16, Views((16, 16), resize=16)).epoch(0))[0]
    mirrored = (shown[0] != originals).flatten(1).any(1)
    assert 0 < mirrored.sum() < 16
    assert torch.equal(shown[0], torch.where(mirrored.view(-1, 1, 1, 1), originals.flip(3), originals))
    assert torch.equal(shown[1], shown[0].flip(3)) and torch.equal(shown[2], shown[0])


# --- mixing


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_labels_are_what_the_pixels_say(tmp_path: Path, kind: str) -> None:
    classes = [f"{i:02}" for i in range(12)]
    data = open_files("folder", make_folder(tmp_path, {"": 1}, classes, "plain", ".png"), **RAW).train
    colours = next(evaluation(data, 12).epoch(0))[0][:, :, 0, 0]
    shares = []
    for epoch in range(25):
        order = torch.randperm(12, generator=torch.Generator().manual_seed(stream_seed(0, 1, epoch))).tolist()
        batches = training(data, 6, Views((32, 32), **{kind: 1.0})).epoch(epoch)
        for step, (images, labels) in enumerate(batches):
            now = order[6 * step : 6 * step + 6]
            assert labels.dtype == torch.float32 and labels.shape == (6, 12)
            assert torch.allclose(labels.sum(1), torch.ones(6))
            share = float(labels[0, now[0]])
            shares.append(share)
            wanted = torch.zeros(6, 12)
            for place, index in enumerate(now):
                wanted[place, index] += share
                wanted[place, now[place - 1]] += 1 - share
            assert torch.allclose(labels, wanted, atol=1e-6)
            mixed = share * colours[now] + (1 - share) * colours[[now[place - 1] for place in range(6)]]
            assert torch.allclose(images.mean((2, 3)), mixed, atol=1e-5)
            whole = images.flatten(2).amax(2) - images.flatten(2).amin(2)
            if kind == "mixup":
                assert whole.abs().max() < 1e-6  # every pixel alike; a pasted piece is not
    # Beta(1, 1) is uniform. A box of side s = sqrt(1 - share) loses s/4 of it beyond the border, in each direction.
    mean = 0.5 if kind == "mixup" else 1 - (1 / 2 - 1 / 5 + 1 / 48)
    assert abs(np.mean(shares) - mean) < 0.08 and np.std(shares) > 0.15


def test_each_batch_is_mixed_in_one_of_two_ways(plain: ImageFiles) -> None:
    kinds = []
    for epoch in range(10):
        for images, _ in training(plain, views=Views((8, 8), mixup=1.0, cutmix=1.0)).epoch(epoch):
            flat = images.flatten(2)
            kinds.append(bool((flat.amax(2) - flat.amin(2)).max() > 1e-6))
    assert 8 < sum(kinds) < 32  # of 40, which ones depends on the seed alone
    plainly, labels = next(evaluation(plain, views=Views((8, 8), mixup=1.0)).epoch(0))
    assert labels.dtype == torch.int64 and len(plainly) == 6


def test_ranks_mix_differently(plain: ImageFiles) -> None:
    views = Views((8, 8), mixup=1.0)
    shares = [next(training(plain, 4, views, rank=rank, world_size=2).epoch(0))[1].amax(1) for rank in (0, 1)]
    assert not torch.equal(shares[0].unique(), shares[1].unique())


# --- what Pillow finds


def test_images_of_every_kind(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    photo = noise(0, 16, 16)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by 90 degrees to the right
    turned.save(tmp_path / "a" / "0.png", exif=exif)
    photo.save(tmp_path / "a" / "1.png")
    photo.convert("L").save(tmp_path / "a" / "2.png")
    photo.convert("RGBA").save(tmp_path / "a" / "3.webp", lossless=True)
    photo.convert("CMYK").save(tmp_path / "b" / "4.jpg")
    photo.quantize(8).save(tmp_path / "b" / "5.png", transparency=b"\x00\x80")
    photo.convert("1").save(tmp_path / "b" / "6.png")
    photo.save(tmp_path / "b" / "7.TIFF")
    data = open_files("folder", tmp_path, **RAW).train
    images, _ = next(evaluation(data, 8, Views((16, 16), resize=16)).epoch(0))
    wanted = v2.PILToTensor()
    found = pixels(images)
    for index in (0, 1, 3, 7):
        assert torch.equal(found[index], wanted(photo)), index
    assert torch.equal(found[2], wanted(photo.convert("L").convert("RGB")))
    grey = open_files("folder", tmp_path, channels=1, mean=[0.0], std=[1.0]).train
    images, _ = next(evaluation(grey, 8, Views((16, 16), resize=16)).epoch(0))
    assert images.shape == (8, 1, 16, 16) and torch.equal(pixels(images)[1], wanted(photo.convert("L")))


def too_large(path: Path) -> None:
    """What says that it has 20,000 x 20,000 pixels."""
    data = path.read_bytes()
    head = b"IHDR" + struct.pack(">II", 20_000, 20_000) + data[24:29]
    path.write_bytes(data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:])


SPOILED = {
    "cat/003.png": (lambda path: path.write_bytes(path.read_bytes()[:50]), "it is truncated"),
    "cat/007.png": (lambda path: path.write_bytes(b""), "it is damaged, or no image that Pillow reads"),
    "cat/011.png": (lambda path: path.write_text("no image"), "it is damaged, or no image that Pillow reads"),
    "dog/002.png": (lambda path: path.unlink(), "No such file or directory"),
    "dog/004.png": (
        lambda path: Image.fromarray(np.zeros((9, 9), np.uint16)).save(path),
        "it has more than eight bits per channel",
    ),
    "dog/006.png": (too_large, "it has more than the 178,956,970 pixels that Pillow takes"),
}
BAD = {3, 7, 11, 15, 17, 19}


@pytest.fixture
def spoiled(tmp_path: Path) -> ImageFiles:
    data = open_files("folder", make_folder(tmp_path, {"": 13}, ("cat", "dog"), "plain", ".png"), **RAW).train
    for name, (spoil, _) in SPOILED.items():
        spoil(tmp_path / name)  # type: ignore[no-untyped-call]
    return data


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("train", [False, True])
def test_unreadable_images_are_named(spoiled: ImageFiles, workers: int, train: bool) -> None:
    source = (training if train else evaluation)(spoiled, workers=workers)
    with pytest.raises(
        DataError, match=r"Cannot read the image .*\d.png: .*; replace or remove it, or leave"
    ) as caught:
        for _ in source.epoch(0):
            pass
    assert "\n" not in str(caught.value)
    source.close()


def test_each_reason_is_told(spoiled: ImageFiles) -> None:
    for name, (_, reason) in SPOILED.items():
        index = next(i for i in range(26) if spoiled.path(i).endswith(name))
        with pytest.raises(DataError, match=f"Cannot read the image .*{name}: ({reason})"):
            next(evaluation(spoiled.select(torch.tensor([index]))).epoch(0))


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_on_request(spoiled: ImageFiles, workers: int) -> None:
    names = {spoiled.path(i) for i in BAD}
    source = evaluation(spoiled, workers=workers, on_error="skip")
    assert list(itertools.chain(*numbers(source.epoch(0)))) == sorted(set(range(26)) - BAD)
    assert set(source.unreadable) == names
    source.close()

    source = training(spoiled, workers=workers, on_error="skip")
    order = torch.randperm(26, generator=torch.Generator().manual_seed(stream_seed(0, 1, 0))).tolist()

    def instead(place: int) -> int:
        return next(order[i % 26] for i in range(place, place + 26) if order[i % 26] not in BAD)

    wanted = [[instead(6 * step + i) for i in range(6)] for step in range(4)]
    assert numbers(source.epoch(0)) == wanted  # batches as large as ever
    assert set(source.unreadable) == {spoiled.path(i) for i in BAD & set(order[:24])}
    assert numbers(source.epoch(0, 2)) == wanted[2:]
    source.close()


def test_where_no_image_can_be_read(spoiled: ImageFiles) -> None:
    bad = spoiled.select(torch.tensor(sorted(BAD)))
    source = evaluation(bad, 2, on_error="skip")
    assert list(source.epoch(0)) == [] and len(source.unreadable) == 6
    with pytest.raises(
        DataError, match=r"images in a row of data set 'folder' cannot be read, the last of them .*png: "
    ):
        next(training(bad, 2, on_error="skip").epoch(0))


def test_a_shard_that_shrinks(tmp_path: Path) -> None:
    make_folder(tmp_path / "a", {"": 3}, ("cat", "dog"))
    write_shards(open_files("folder", tmp_path / "a"), tmp_path / "b")
    data = open_files("shards", tmp_path / "b").train
    shard = tmp_path / "b" / "000000.tar"
    shard.write_bytes(shard.read_bytes()[:600])
    with pytest.raises(DataError, match=r"000000.tar/00000000.jpg: the shard has become shorter"):
        next(evaluation(data).epoch(0))


# --- arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": (0, 8)}, "give height and width in pixels"),
        ({"resize": 7}, "resize is 7; give at least 8"),
        ({"scale": (0.5, 0.1)}, r"scale is \[0.5, 0.1\]; give the smallest and the largest"),
        ({"ratio": (0, 1)}, "ratio is .* both above 0"),
        ({"flip": "randm"}, "did you mean 'random'"),
        ({"color_jitter": (1, 2)}, "color_jitter is .* give brightness, contrast and saturation"),
        ({"color_jitter": (1, 2, 1, 0.6)}, "hue, at most 0.5"),
        ({"rand_augment": (0, 9)}, "rand_augment is .* 1 or more, and a magnitude from 0 to 30"),
        ({"rand_augment": (2, 31)}, "magnitude from 0 to 30"),
        ({"mixup": 0.0}, "mixup is 0.0; give an alpha above 0"),
        ({"cutmix": -1.0}, "cutmix is -1.0; give an alpha above 0"),
    ],
)
def test_wrong_views(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Views(**{"size": (8, 8), **arguments})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": -1}, "workers is -1; give a number of processes"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; known: raise, skip"),
        ({"batch_size": 27}, "batch_size 27 is more than the 26 training images of 'folder'; give at most 26"),
        ({"rank": 1}, "rank is 1 of world_size 1"),
    ],
)
def test_wrong_arguments(noisy: ImageFiles, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(noisy, **arguments)


def test_default_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    assert default_workers() == 6
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert default_workers() == 1
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(96)), raising=False)
    assert default_workers() == 8
