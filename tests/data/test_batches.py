from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from abste.data import Augment, Batches, ImageData, load
from abste.errors import ConfigError

EVERYTHING = Augment(crop_padding=2, flip="alternating", cutout=3)


def data(count: int = 40, channels: int = 3, height: int = 8, width: int = 10) -> ImageData:
    """Random images; image i has label i, so that a batch tells which images it holds."""
    pixels = torch.randint(
        0, 256, (count, channels, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    names = tuple(str(label) for label in range(count))
    mean, std = (0.3, 0.5, 0.6)[:channels], (0.2, 0.25, 0.3)[:channels]
    return ImageData(pixels, torch.arange(count), names, mean, std, "made")


def training(
    source: ImageData | None = None, batch_size: int = 8, augment: Augment | None = None, **kw: Any
) -> Batches:
    return Batches(source or data(), batch_size, augment=augment, **{"seed": 0, "train": True, **kw})


def evaluation(source: ImageData | None = None, batch_size: int = 8, **kw: Any) -> Batches:
    return Batches(source or data(), batch_size, augment=None, **{"seed": 0, "train": False, **kw})


def normalised(source: ImageData) -> Tensor:
    mean = torch.tensor(source.mean, dtype=torch.float64).view(-1, 1, 1)
    std = torch.tensor(source.std, dtype=torch.float64).view(-1, 1, 1)
    return (source.images.double() / 255 - mean) / std


def whole(batches: Batches, epoch: int = 0) -> tuple[Tensor, Tensor]:
    images, labels = zip(*batches.epoch(epoch), strict=True)
    return torch.cat(images), torch.cat(labels)


def same(left: Any, right: Any) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in pairs)


# --- order and determinism


def test_training_shuffles_and_leaves_out_the_incomplete_batch() -> None:
    batches = training(data(43), batch_size=8)
    first, second = whole(batches, 0)[1], whole(batches, 1)[1]
    assert len(batches) == 5 and len(first) == 40
    assert len(first.unique()) == 40
    assert not torch.equal(first, first.sort().values)
    assert not torch.equal(first, second)


def test_labels_stay_with_their_images() -> None:
    source = data()
    images, labels = whole(training(source))
    assert torch.allclose(images.double(), normalised(source)[labels], atol=1e-6)


@pytest.mark.parametrize("flip", ["none", "random", "alternating"])
def test_the_same_seed_gives_the_same_epoch(flip: str) -> None:
    augment = Augment(crop_padding=2, flip=flip, cutout=3)
    first, again = training(augment=augment, seed=5), training(augment=augment, seed=5)
    list(first.epoch(0))  # what ran before must not matter
    torch.manual_seed(123)
    assert same(first.epoch(3), again.epoch(3))
    assert not same(first.epoch(3), training(augment=augment, seed=6).epoch(3))


@pytest.mark.parametrize("start", range(6))
def test_an_epoch_resumes_exactly(start: int) -> None:
    batches = training(augment=EVERYTHING)
    assert same(list(batches.epoch(2))[start:], batches.epoch(2, start))
    tests = evaluation(data(39))
    assert same(list(tests.epoch(2))[start:], tests.epoch(2, start))


def test_one_augmentation_changes_nothing_about_the_others() -> None:
    crop_alone = training(augment=Augment(crop_padding=2))
    crop_and_cutout = training(augment=Augment(crop_padding=2, cutout=3))
    for (plain, labels), (cut, cut_labels) in zip(crop_alone.epoch(0), crop_and_cutout.epoch(0), strict=True):
        assert torch.equal(labels, cut_labels)
        assert torch.equal(cut, torch.where(cut == 0, cut, plain))


def test_the_global_generator_is_left_alone() -> None:
    before = torch.get_rng_state()
    list(training(augment=EVERYTHING).epoch(0))
    assert torch.equal(torch.get_rng_state(), before)


def test_the_images_given_are_left_alone() -> None:
    source = data()
    before = source.images.clone()
    list(training(source, augment=EVERYTHING).epoch(0))
    list(evaluation(source).epoch(0))
    assert torch.equal(source.images, before)


# --- ranks


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 5))
def test_ranks_share_evaluation_without_gap_or_overlap(count: int, batch_size: int, world_size: int) -> None:
    source = data(count)
    seen = []
    for rank in range(world_size):
        batches = evaluation(source, batch_size, rank=rank, world_size=world_size)
        mine = list(batches.epoch(0))
        assert len(mine) == len(batches)
        assert all(0 < len(labels) <= batch_size for _, labels in mine)
        seen += [label for _, labels in mine for label in labels.tolist()]
    assert sorted(seen) == list(range(count))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 6), st.integers(1, 4), st.integers(0, 3))
def test_ranks_together_train_on_the_batches_of_one_process(batch_size: int, world_size: int, epoch: int) -> None:
    together = training(batch_size=batch_size * world_size, augment=EVERYTHING)
    ranks = [
        training(batch_size=batch_size, augment=EVERYTHING, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    assert {len(rank) for rank in ranks} == {len(together)}
    steps = zip(*(rank.epoch(epoch) for rank in ranks), strict=True)
    joined = [tuple(torch.cat(parts) for parts in zip(*step, strict=True)) for step in steps]
    assert same(joined, together.epoch(epoch))


# --- augmentations, against naive references


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize(("fill", "mode"), [("reflect", "reflect"), ("zero", "constant")])
def test_crop_equals_a_naive_crop(channels: int, fill: str, mode: str) -> None:
    source = data(60, channels)
    padding = 3
    padded = torch.nn.functional.pad(source.images.double(), [padding] * 4, mode=mode)
    references = normalised(ImageData(padded.to(torch.uint8), *list(source.__dict__.values())[1:]))
    places = list(itertools.product(range(2 * padding + 1), repeat=2))
    found = set()
    augment = Augment(crop_padding=padding, crop_fill=fill)
    for epoch in range(8):
        for image, label in zip(*whole(training(source, 10, augment), epoch), strict=True):
            crops = [references[label, :, y : y + 8, x : x + 10] for y, x in places]
            matches = [torch.allclose(image.double(), crop, atol=1e-5) for crop in crops]
            assert sum(matches) == 1
            found.add(places[matches.index(True)])
    assert found == set(places)  # 480 draws of 49 places


def test_fills_differ_at_the_border_alone() -> None:
    reflect, zero = (training(augment=Augment(crop_padding=2, crop_fill=fill)) for fill in ("reflect", "zero"))
    black = normalised(ImageData(*({**data().__dict__, "images": torch.zeros_like(data().images)}.values())))
    for (a, labels), (b, same_labels) in zip(reflect.epoch(1), zero.epoch(1), strict=True):
        assert torch.equal(labels, same_labels)
        assert torch.equal(a[:, :, 2:-2, 2:-2], b[:, :, 2:-2, 2:-2])
        differs = a != b
        assert differs.any() and torch.allclose(b[differs], black[labels].float()[differs], atol=1e-6)


def test_black_may_be_wider_than_the_image() -> None:
    images, _ = whole(training(augment=Augment(crop_padding=9, crop_fill="zero")))
    assert images.shape == (40, 3, 8, 10) and images.isfinite().all()


def mirrored(source: ImageData, augment: Augment, epoch: int, **options: Any) -> Tensor:
    """By image: whether an epoch shows it mirrored. Every image must be shown as it is or mirrored."""
    images, labels = whole(training(source, len(source), augment, **options), epoch)
    reference = normalised(source)[labels].float()
    is_mirrored = torch.isclose(images, reference.flip(3), atol=1e-5).flatten(1).all(1)
    is_plain = torch.isclose(images, reference, atol=1e-5).flatten(1).all(1)
    assert (is_mirrored ^ is_plain).all()
    return is_mirrored[labels.argsort()]


def test_alternating_flip_shows_each_image_both_ways_in_two_epochs() -> None:
    source = data(400)
    epochs = [mirrored(source, Augment(flip="alternating"), epoch) for epoch in range(4)]
    assert torch.equal(epochs[0], ~epochs[1])
    assert torch.equal(epochs[0], epochs[2]) and torch.equal(epochs[1], epochs[3])
    assert 140 < int(epochs[0].sum()) < 260  # 6 standard deviations around 200
    assert not torch.equal(epochs[0], mirrored(source, Augment(flip="alternating"), 0, seed=1))


def test_random_flip_draws_anew_each_epoch() -> None:
    source = data(400)
    first, second = (mirrored(source, Augment(flip="random"), epoch) for epoch in range(2))
    assert 140 < int(first.sum()) < 260 and 140 < int(second.sum()) < 260
    assert 140 < int((first ^ second).sum()) < 260


def test_no_flip_mirrors_nothing() -> None:
    assert not mirrored(data(), Augment(), 0).any()


@pytest.mark.parametrize("side", [1, 2, 5, 8])
def test_cutout_is_a_square_of_the_mean_clipped_at_the_border(side: int) -> None:
    source = data(500)
    images, labels = whole(training(source, 500, Augment(cutout=side)))
    reference = normalised(source)[labels].float()
    hidden = (images == 0).all(1)
    assert torch.allclose(images, reference.masked_fill(hidden.unsqueeze(1), 0), atol=1e-5)
    rows, columns = hidden.any(2), hidden.any(1)
    assert torch.equal(hidden, rows.unsqueeze(2) & columns.unsqueeze(1))
    for size, along in ((8, rows), (10, columns)):
        expected = torch.zeros(size, size, dtype=torch.bool)
        for centre in range(size):
            expected[centre, max(0, centre - side // 2) : centre - side // 2 + side] = True
        assert set(map(tuple, along.tolist())) == set(map(tuple, expected.tolist()))  # each centre occurs in 500 draws


def test_augmentations_combine() -> None:
    source = data()
    shown = [whole(training(source, augment=EVERYTHING), epoch)[0] for epoch in range(2)]
    assert all(images.shape == (40, 3, 8, 10) and images.isfinite().all() for images in shown)
    assert ((shown[0] == 0).all(1).flatten(1).sum(1) >= 4).all()  # a 3x3 square with its centre inside shows 2x2


# --- what is yielded


def test_normalisation_gives_zero_mean_and_unit_variance() -> None:
    train = load("digits").train
    images, _ = whole(evaluation(train, 100))
    assert float(images.mean()) == pytest.approx(0, abs=1e-4)
    assert float(images.std()) == pytest.approx(1, abs=1e-3)


def test_evaluation_shows_every_image_in_order() -> None:
    source = data(43)
    batches = evaluation(source, 8)
    images, labels = whole(batches)
    assert len(batches) == 6
    assert torch.equal(labels, source.labels)
    assert torch.allclose(images.double(), normalised(source), atol=1e-6)
    assert same(batches.epoch(0), batches.epoch(7))


def test_evaluation_takes_a_batch_size_beyond_the_data() -> None:
    assert [len(labels) for _, labels in evaluation(data(5), 100).epoch(0)] == [5]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("train", [True, False])
def test_dtype_and_memory_format(channels: int, dtype: torch.dtype, channels_last: bool, train: bool) -> None:
    augment = EVERYTHING if train else None
    options: dict[str, Any] = {"augment": augment, "seed": 0, "train": train}
    source = data(channels=channels)
    images, labels = next(Batches(source, 8, dtype=dtype, channels_last=channels_last, **options).epoch(0))
    exact, _ = next(Batches(source, 8, **options).epoch(0))
    assert images.dtype == dtype and labels.dtype == torch.int64
    assert images.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    assert torch.equal(images, exact.to(dtype))  # computed in float32, then rounded once


def test_everything_runs_on_the_device_given() -> None:
    """The meta device stands in for a GPU: it has shapes without values, and refuses operands on the CPU."""
    for batches in (training(augment=EVERYTHING, device="meta"), evaluation(device=torch.device("meta"))):
        for images, labels in batches.epoch(0):
            assert images.device.type == labels.device.type == "meta"
            assert images.shape == (8, 3, 8, 10) and labels.shape == (8,)


def test_batches_are_independent_tensors() -> None:
    for batches in (training(augment=EVERYTHING), evaluation()):
        kept = [(images.clone(), labels.clone()) for images, labels in batches.epoch(0)]
        for images, _ in batches.epoch(0):
            images.zero_()
        assert same(kept, batches.epoch(0))


# --- wrong values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 2.0}, "batch_size is 2.0"),
        ({"batch_size": 41}, "more than the 40 training images of 'made'; give at most 40"),
        ({"batch_size": 21, "world_size": 2}, "on each of 2 processes .* give at most 20"),
        ({"rank": 2, "world_size": 2}, "rank is 2 of world_size 2"),
        ({"rank": -1}, "rank is -1"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1.5}, "seed is 1.5"),
        ({"dtype": torch.int32}, "torch.int32"),
        ({"augment": Augment(crop_padding=8)}, "crop_padding 8 .* give at most 7, or crop_fill='zero'"),
        ({"augment": Augment(cutout=9)}, "cutout 9 is larger than the 8x10 images"),
        ({"augment": EVERYTHING, "train": False}, "augment=None"),
    ],
)
def test_values_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"cutout": -2}, "cutout is -2"),
        ({"cutout": 1.5}, "cutout is 1.5"),
        ({"flip": "alternate"}, "'alternate'; did you mean 'alternating'"),
        ({"crop_fill": "zeros"}, "There is no crop_fill named 'zeros'; did you mean 'zero'"),
        ({"crop_fill": 0}, "There is no crop_fill named 0; known: reflect, zero"),
    ],
)
def test_augmentations_that_do_not_exist(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Augment(**options)


@pytest.mark.parametrize(("epoch", "start"), [(-1, 0), (0, -1), (0, 6)])
def test_epochs_that_do_not_exist_are_refused_at_once(epoch: int, start: int) -> None:
    with pytest.raises(ConfigError):
        training().epoch(epoch, start)
