"""Batches of a data set of files, read and decoded by worker processes."""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing.util  # noqa: F401 (its exit handler, which ends workers, must be registered before ours)
import os
import signal
import time
import warnings
import weakref
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from abste._decode import Unreadable, decode
from abste.data.batches import BatchSource, share, stream_seed
from abste.data.files import ImageFiles
from abste.data.transforms import Views, seeded
from abste.errors import ConfigError, DataError, nearest

ON_ERROR = ("raise", "skip")

_COIN, _ORDER, _VIEW, _MIX = 0, 1, 2, 3  # uses of the seed; the first two are those of Batches
_TRIES = 100  # images in a row that cannot be read before the data set is given up

_LOST = "DataLoader worker"
"""What torch's message about a lost worker begins with."""

Place = tuple[int, int]
"""Epoch and batch."""


class _Read(NamedTuple):
    """A batch as a worker gives it."""

    images: Tensor
    """uint8 (B, H, W, C)."""
    labels: Tensor
    """int64 (B,)."""
    unreadable: dict[str, str]
    """Names of the images that cannot be read, and why."""


class _Reader(Dataset[_Read]):
    """Reads whole batches, by epoch and number, in any process and any order."""

    def __init__(self, batches: FileBatches) -> None:
        self.data, self.views, self.seed = batches.data, batches.views, batches.seed
        self.train, self.skip = batches.train, batches.on_error == "skip"
        self.batch_size, self.rank, self.world_size = batches.batch_size, batches.rank, batches.world_size
        self._view = batches.views.training() if batches.train else batches.views.evaluation()
        self._order: tuple[int, Tensor] | None = None

    def __getitem__(self, place: Place) -> _Read:
        epoch, step = place
        part = share(step, self.batch_size, self.rank, self.world_size)
        height, width = self.views.size
        pixels = np.empty((self.batch_size, height, width, self.data.channels), np.uint8)
        indices: list[int] = []
        unreadable: dict[str, str] = {}
        for position in range(part.start, min(part.stop, len(self.data))):
            index = self._one(epoch, position, pixels[len(indices)], unreadable)
            if index is not None:
                indices.append(index)
            elif not self.skip:
                break
        return _Read(torch.from_numpy(pixels[: len(indices)]), self.data.labels[indices], unreadable)

    def _one(self, epoch: int, position: int, pixels: Any, unreadable: dict[str, str]) -> int | None:
        """Write the image at a position of an epoch into `pixels`, and give its number; None where there is none.

        In training, what cannot be read is replaced by the image behind it in the epoch's order, so that the batch is
        as large as the others; in evaluation it is left out.
        """
        tries = min(_TRIES, len(self.data)) if self.train and self.skip else 1
        for behind in range(tries):
            index = self._index(epoch, (position + behind) % len(self.data))
            try:
                image = decode(io.BytesIO(self.data.read(index)), self.data.channels)
            except OSError as error:
                unreadable[self.data.path(index)] = error.strerror or str(error)
            except Unreadable as error:
                unreadable[self.data.path(index)] = str(error)
            else:
                pixels[:] = np.asarray(self._shown(image, epoch, index)).reshape(pixels.shape)
                return index
        return None

    def _index(self, epoch: int, position: int) -> int:
        if not self.train:
            return position
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, _ORDER, epoch))
            self._order = epoch, torch.randperm(len(self.data), generator=generator)
        return int(self._order[1][position])

    def _shown(self, image: Any, epoch: int, index: int) -> Any:
        if not self.train:
            return self._view(image)
        with seeded(stream_seed(self.seed, _VIEW, epoch, index)):
            image = self._view(image)
        if self.views.flip == "alternating" and (stream_seed(self.seed, _COIN, index) ^ epoch) & 1:
            from torchvision.transforms.v2.functional import horizontal_flip

            image = horizontal_flip(image)
        return image


class _Places(Sampler[Place]):
    """What is to be read next; set before each epoch."""

    def __init__(self) -> None:
        self.now: list[Place] = []

    def __iter__(self) -> Iterator[Place]:
        return iter(self.now)

    def __len__(self) -> int:
        return len(self.now)


class FileBatches(BatchSource):
    """Batches of images from files: read, decoded and cropped in worker processes, normalised and mixed on the device.

    All that is random about an image is drawn from (seed, epoch, its number in the data), the order from (seed, epoch),
    and the mixing of a batch from (seed, epoch, its number, rank). So a batch is the same whatever the number of
    workers, and from whichever batch the epoch was entered. Images are uint8 until they are on the device.

    Workers last from epoch to epoch, until :meth:`close`. One epoch is read at a time: a new one ends the one before.

    Args:
        data: the images.
        batch_size, seed, device, dtype, channels_last, rank, world_size, train: see :class:`BatchSource`.
        views: how images are cropped, varied and mixed; varied and mixed in training alone.
        workers: processes; 0 to read in this one. By default one for each CPU that this process may use, at most 8,
            shared by the ranks of a machine.
        on_error: what to do with an image that cannot be read: "raise", or "skip" it, which notes it in `unreadable`.
            In training the image behind it takes its place.

    Raises:
        ConfigError: a value out of range, or one that does not fit the data.
    """

    def __init__(
        self,
        data: ImageFiles,
        batch_size: int,
        *,
        views: Views,
        seed: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        rank: int = 0,
        world_size: int = 1,
        train: bool,
        workers: int | None = None,
        on_error: str = "raise",
    ) -> None:
        super().__init__(
            data,
            batch_size,
            seed=seed,
            device=device,
            dtype=dtype,
            channels_last=channels_last,
            rank=rank,
            world_size=world_size,
            train=train,
        )
        if workers is not None and workers < 0:
            raise ConfigError(f"workers is {workers}; give a number of processes, 0 or more.")
        if on_error not in ON_ERROR:
            raise ConfigError(f"on_error is {on_error!r}; {nearest(on_error, ON_ERROR)}")
        self.data = data
        self.views = views
        self.workers = default_workers() if workers is None else workers
        self.on_error = on_error
        self._mix = views.mixing(len(data.classes)) if train else None
        self._places = _Places()
        self._loader: DataLoader[_Read] | None = None
        self._turn = 0
        self._current: Callable[[], Generator[tuple[Tensor, Tensor], None, None] | None] = lambda: None

    def close(self) -> None:
        current = self._current()
        if current is not None:
            current.close()
        self._loader = None  # workers end when nothing refers to them

    def _batches(self, epoch: int, start: int) -> Iterator[tuple[Tensor, Tensor]]:
        current = self._reads(epoch, start)
        self._current = weakref.ref(current)
        return current

    def _reads(self, epoch: int, start: int) -> Generator[tuple[Tensor, Tensor], None, None]:
        self._turn += 1
        turn = self._turn
        self._places.now = [(epoch, step) for step in range(start, len(self))]
        with lost_workers():
            reads = self._open()
        for _, step in self._places.now:
            if turn != self._turn:
                raise ConfigError("An epoch of files was begun while another was read; read one at a time.")
            with lost_workers():
                read = _next(reads)
            self._note(read, epoch, step)
            if not len(read.labels):
                continue  # all of a batch was left out
            images = self._normalise(read.images.to(self.device, non_blocking=True))
            labels = read.labels.to(self.device, non_blocking=True)
            if self._mix is not None:
                with seeded(stream_seed(self.seed, _MIX, epoch, step, self.rank)):
                    images, labels = self._mix(images, labels)
                if self.channels_last:
                    images = images.contiguous(memory_format=torch.channels_last)
            yield images, labels

    def _note(self, read: _Read, epoch: int, step: int) -> None:
        if self.on_error == "raise":
            for name, reason in read.unreadable.items():
                raise DataError(
                    f"Cannot read the image {name}: {reason}; replace or remove it, "
                    "or leave such images out with data.on_error = 'skip'."
                )
        elif self.train and len(read.labels) < self.batch_size:
            raise DataError(
                f"{_TRIES} images in a row of data set '{self.data.name}' cannot be read, the last of them "
                f"{list(read.unreadable)[-1]}: {list(read.unreadable.values())[-1]}."
            )
        self.unreadable |= read.unreadable

    def _open(self) -> Iterator[_Read]:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="This DataLoader will create")  # as many as were asked for
            # What torch's workers do after the fork is made for it: they use no threads.
            warnings.filterwarnings("ignore", message="This process .* is multi-threaded", category=DeprecationWarning)
            if self._loader is None:
                _opened.add(self)
                self._loader = DataLoader(
                    _Reader(self),
                    batch_size=None,
                    sampler=self._places,
                    num_workers=self.workers,
                    collate_fn=_as_it_is,
                    pin_memory=self.device.type == "cuda",
                    persistent_workers=self.workers > 0,
                    worker_init_fn=_begin,
                    generator=torch.Generator(),  # else each epoch would draw from that of the whole process
                )
            return iter(self._loader)


def default_workers() -> int:
    """Processes that read files: one for each CPU that this process may use, at most 8, shared by a machine's ranks."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(8, cpus // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))


def _next(reads: Iterator[_Read]) -> _Read:
    try:
        return next(reads)
    except (ConnectionError, EOFError) as error:  # of a worker that died while it handed a batch over
        time.sleep(1)  # torch hears from the system that it did, about now, and then says so right here
        raise RuntimeError(f"{_LOST} is gone") from error


@contextlib.contextmanager
def lost_workers() -> Iterator[None]:
    """Says in a sentence what torch says when a worker was killed, which it may at any moment in here.

    Raises:
        DataError: a worker is gone.
    """
    try:
        yield
    except RuntimeError as error:
        if _LOST not in str(error):
            raise
        raise DataError(
            "A process that reads images was lost (killed, or out of memory or shared memory, /dev/shm); "
            "continue with fewer data.workers, or with 0."
        ) from error


def _as_it_is(read: Any) -> Any:
    return read


def _begin(_: int) -> None:
    """In a worker: what stops the run is for its main process to act upon, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _first_terminate)


def _first_terminate(_: int, __: Any) -> None:
    # A scheduler sends it to all processes of a job, of which the main one still has a step to finish and a checkpoint
    # to write. Python sends it to what is left at its own end: that is a second one, or there is nobody to wait for.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.alarm(30)


_opened: weakref.WeakSet[FileBatches] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing waits for workers that nobody has told to end."""
    for batches in list(_opened):
        batches.close()
