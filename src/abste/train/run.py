"""Run directories: what is in them, who may write to them, and what can be read back."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, RootModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import abste.models
from abste.data import (
    FILE_SETS,
    Augment,
    Batches,
    BatchSource,
    Description,
    FileBatches,
    FileSplits,
    ImageData,
    ImageFiles,
    Views,
    available,
    describe,
    hold_out,
    load,
    open_files,
)
from abste.errors import AbsteError, CheckpointError, ConfigError, DataError, RunError, nearest
from abste.nn import ConversionReport, convert, recalibrate_batch_norm
from abste.train.checkpoint import check_state, load_checkpoint
from abste.train.files import remove_leftovers
from abste.train.recipe import Recipe, builtin_recipes, make_recipe

EVALUATION_BATCH = 500
FILES_EVALUATION_BATCH = 100  # larger images: at 224 pixels, a layer of 64 channels takes 320 MB of them

Images = ImageData | ImageFiles


class _Table(BaseModel):
    """The part of a JSON file that is read back; what else stands in it is not looked at."""

    model_config = ConfigDict(strict=True)


class _Result(_Table):
    accuracy: float
    loss: float
    images: int


class _Results(_Table):
    test: _Result | None = None
    held_out: _Result | None = None


class _Cost(_Table):
    seconds: float
    samples_per_second: float
    parameters: int


class _Unreadable(_Table):
    images: dict[str, Any]


class _Commit(_Table):
    commit: str
    modified: bool


class _Summary(_Results):
    finished: bool
    cost: _Cost
    environment: dict[str, Any]
    resumes: int
    averaged: _Results = _Results()
    unreadable: _Unreadable | None = None
    git: _Commit | None = None
    sha256: dict[str, str] = {}


class _Data(_Table):
    classes: list[str]
    mean: list[float]
    std: list[float]
    resize: int | None = None
    fingerprint: dict[str, str] = {}


class _Evaluated(_Table):
    kind: Literal["evaluation"]
    epoch: float
    split: str
    accuracy: float
    loss: float


class _Trained(_Table):
    kind: Literal["train"]
    epoch: float
    accuracy: float
    loss: float
    lr: float
    samples_per_second: float


class _Metrics(RootModel[Annotated[_Evaluated | _Trained, Field(discriminator="kind")]]):
    pass


class _Sides(_Table):
    weights: dict[str, Any] | None = None
    activations: dict[str, Any] | None = None


class _Diagnostics(_Table):
    step: int
    layers: dict[str, _Sides]
    total: _Sides


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.checkpoint = self.path / "last.ckpt"
        self.data = self.path / "data.json"
        self.conversion = self.path / "conversion.txt"
        self.metrics = self.path / "metrics.jsonl"
        self.diagnostics = self.path / "diagnostics.jsonl"
        self.sessions = self.path / "sessions.jsonl"
        self.tensorboard = self.path / "tensorboard"
        self.weights = self.path / "weights.safetensors"
        self.averaged_weights = self.path / "averaged.safetensors"
        self.summary = self.path / "summary.json"
        self.lock = self.path / ".lock"

    def exists(self) -> bool:
        """Whether a run was ever started here."""
        return self.recipe.is_file()

    def begun(self) -> bool:
        """Whether there is something to continue: a checkpoint, or results."""
        return self.checkpoint.exists() or self.summary.exists()

    @contextlib.contextmanager
    def owned(self, resume: bool) -> Iterator[None]:
        """Create the directory where needed and keep other processes out of it.

        The lock is the kernel's and ends with the process, however it ends.

        Raises:
            RunError: the directory is in use, holds a run and ``resume`` is False, holds none and ``resume`` is True,
                or holds something else.
        """
        if resume and not self.exists():
            raise RunError(
                f"there is no run to resume in {self.path}; check --out, or leave --resume out to start one."
            )
        created, locked = not self.path.exists(), False
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunError(f"cannot use {self.path} as run directory: {error.strerror}.") from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise RunError(
                    f"{self.path} is in use by another process; wait for it to end, or choose another --out."
                ) from None
            except OSError:
                pass  # a file system without locks
            locked = True
            if self.exists() and not resume:
                raise RunError(f"{self.path} already holds a run; continue it with --resume, or choose another --out.")
            remove_leftovers(self.path)
            foreign = sorted(path.name for path in self.path.iterdir() if path != self.lock)
            if foreign and not self.exists():
                raise RunError(
                    f"{self.path} holds files that are no run of abste ('{foreign[0]}'); choose another --out."
                )
            yield
        finally:
            if locked and not self.exists():  # nothing came of it
                with contextlib.suppress(OSError):
                    self.lock.unlink()
                    if created:
                        self.path.rmdir()
            os.close(descriptor)

    def read_recipe(self) -> Recipe:
        """The resolved recipe of the run.

        Raises:
            RunError: there is no run here.
            ConfigError: recipe.toml was altered and does not check.
        """
        try:
            tables = tomllib.loads(self.recipe.read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(
                f"{self.path} holds no run of abste: {self.recipe.name} {_reason(error)}; give the directory of a run."
            ) from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise RunError(f"{self.recipe} is damaged: {error}.") from error
        return make_recipe(tables, str(self.recipe))

    def read_summary(self) -> dict[str, Any] | None:
        """``summary.json``, or None where the run is unfinished.

        Raises:
            RunError: it is damaged.
        """
        return _read_json(self.summary, _Summary)

    def read_data(self) -> dict[str, Any] | None:
        """``data.json``: what :func:`data_record` says of the run's data; None in runs of earlier versions.

        Raises:
            RunError: it is damaged.
        """
        return _read_json(self.data, _Data)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl``, without one that a run that goes on is writing.

        Raises:
            RunError: it is damaged.
        """
        return _read_lines(self.metrics, _Metrics)

    def read_diagnostics(self) -> list[dict[str, Any]]:
        """The lines of ``diagnostics.jsonl``, likewise; none where nothing was diagnosed.

        Raises:
            RunError: it is damaged.
        """
        return _read_lines(self.diagnostics, _Diagnostics)

    def check_data(self, record: Mapping[str, Any]) -> None:
        """Refuse to go on with other files than those that the run began with.

        Raises:
            CheckpointError: images were added, removed, renamed or put into other classes, or normalised otherwise.
        """
        known = self.read_data() or record
        for key, what in (("classes", "classes"), ("fingerprint", "images"), ("mean", "mean"), ("std", "std")):
            if known.get(key) != record.get(key):
                raise CheckpointError(
                    f"{self.path} was begun with other {what} than the data set '{record['name']}' has now; "
                    "resume with the same files, or start again in another --out."
                )


def _read_json(path: Path, content: type[BaseModel]) -> dict[str, Any] | None:
    try:
        return _parse(path.read_text(encoding="utf-8"), content, str(path))
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}.") from error


def _read_lines(path: Path, content: type[BaseModel]) -> list[dict[str, Any]]:
    try:
        *lines, last = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise RunError(f"{path} is damaged: {error}.") from error
    records = [_parse(line, content, f"line {n} of {path}") for n, line in enumerate(lines, 1) if line]
    with contextlib.suppress(RunError):  # a line ends with "\n" when it is complete
        if last:
            records.append(_parse(last, content, str(path)))
    return records


def _parse(text: str, content: type[BaseModel], where: str) -> dict[str, Any]:
    try:
        table: dict[str, Any] = json.loads(text)
        content.model_validate(table)
    except ValidationError as error:  # whole JSON, but of something else
        wrong = error.errors(include_url=False)[0]
        place = "".join(f"{key}: " for key in wrong["loc"])
        value = json.dumps(wrong["input"])[:40]
        found = "it is missing" if wrong["type"] == "missing" else f"{value} is of the wrong type"
        raise RunError(f"{where} is damaged: {place}{found}.") from error
    except (ValueError, RecursionError) as error:
        raise RunError(f"{where} is damaged: {error}.") from error
    return table


def _reason(error: OSError) -> str:
    return "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"


def example_input(recipe: Recipe) -> Tensor:
    """Zeros of the shape of one image, (1, C, H, W)."""
    return torch.zeros(1, *recipe.data.image_shape)


def build_model(recipe: Recipe) -> tuple[nn.Module, ConversionReport]:
    """The recipe's network on the CPU, binarised where the recipe says so, and the conversion report (empty if not).

    Raises:
        ConfigError: an unknown model, argument, estimator or option.
        ConversionError: the network cannot be binarised as asked.
    """
    arguments = {"num_classes": recipe.data.classes, "in_channels": recipe.data.image_shape[0], **recipe.model.kwargs}
    arguments = {name: value for name, value in arguments.items() if value is not None}  # classes of files not seen yet
    model = abste.models.create(recipe.model.name, **arguments)
    if recipe.binarize is None:
        return model, ConversionReport(())
    return model, convert(model, **recipe.binarize.arguments(), example_input=example_input(recipe))


def resolved(recipe: Recipe, root: str | Path | None) -> Recipe:
    """The recipe with what only the files of its data set can tell: their classes, and how many are held out.

    Raises:
        DataError: see :func:`abste.data.open_files`.
    """
    section = recipe.data
    if not section.on_disk or None not in (section.classes, section.holdout):
        return recipe
    train, test = _open(recipe, root)
    known = {"classes": len(train.classes) if section.classes is None else section.classes, "holdout": section.holdout}
    if section.holdout is None:  # a fifth, and enough for one image of each class
        holdout = max(len(train.classes), round(len(train) / 5)) if test is None else 0
        if holdout >= len(train):
            raise DataError(
                f"{root} has no split named val or test, and only one image of each class, so none can be held out; "
                "add images."
            )
        known["holdout"] = holdout
    return recipe.model_copy(update={"data": section.model_copy(update=known)})


def _open(recipe: Recipe, root: str | Path | None) -> FileSplits:
    section = recipe.data
    return open_files(section.name, root, channels=section.image_shape[0], mean=section.mean, std=section.std)


def load_data(recipe: Recipe, root: str | Path | None) -> tuple[Images, Images, str]:
    """``(training images, evaluation images, "test" or "held_out")``; images of files are found, not read.

    Args:
        recipe: as :func:`resolved` gives it.
        root: the folder of the data set; embedded data needs none.

    Raises:
        DataError: the data set is missing, damaged, or not of the shape the recipe says.
        ConfigError: an unknown data set, or a hold-out larger than the training set.
    """
    section = recipe.data
    train: Images
    test: Images | None
    if section.on_disk:
        train, test = _open(recipe, root)
    else:
        if section.name not in available():
            known = nearest(section.name, [*available(), *FILE_SETS])
            raise ConfigError(f"There is no data set named {section.name!r}; {known}")
        train, test = load(section.name, root=root, statistics=section.statistics or "dataset")
        shape = list(train.images.shape[1:])
        if shape != section.image_shape:
            raise DataError(
                f"data set '{section.name}' has images of {shape}, but data.image_shape is {section.image_shape}."
            )
    classes = len(train.classes)
    if classes != section.classes:
        raise DataError(f"data set '{section.name}' has {classes} classes, but data.classes is {section.classes}.")
    if section.holdout:
        # One split for every seed, so that runs differ in nothing but what the seed is meant to vary.
        train, held_out = hold_out(train, section.holdout, seed=0)
        for name, count in zip(train.classes, torch.bincount(train.labels, minlength=classes).tolist(), strict=True):
            if not count:
                raise DataError(
                    f"no training image of class '{name}' is left beside the {section.holdout} that data.holdout "
                    "holds out; add images, or hold out fewer."
                )
        return train, held_out, "held_out"
    if test is None:
        raise DataError(
            f"{root} has no split named val or test; add one, or hold training images out with data.holdout."
        )
    return train, test, "test"


def data_record(recipe: Recipe, train: Images, evaluation: Images, split: str) -> dict[str, Any]:
    """What a run remembers of its data: names, numbers, normalisation, and of files which they are."""
    record: dict[str, Any] = {
        "name": train.name,
        "classes": list(train.classes),
        "mean": list(train.mean),
        "std": list(train.std),
        "images": {"train": len(train), split: len(evaluation)},
    }
    if isinstance(train, ImageFiles) and isinstance(evaluation, ImageFiles):
        record["resize"] = views(recipe).shorter_side
        record["fingerprint"] = {"train": train.fingerprint(), split: evaluation.fingerprint()}
    return record


def data_description(run: RunDirectory, recipe: Recipe) -> Description | None:
    """Class names and normalisation of a run's data, from no other file than its own; None where nobody knows.

    Raises:
        RunError: data.json is damaged.
    """
    record = run.read_data()
    if record is None:
        return describe(recipe.data.name, recipe.data.statistics or "dataset")
    if len(record["classes"]) != recipe.data.classes:
        raise RunError(
            f"{run.data} is damaged: it has {len(record['classes'])} classes, but recipe.toml {recipe.data.classes}."
        )
    return Description(tuple(record["classes"]), tuple(record["mean"]), tuple(record["std"]))


def load_run_data(run: RunDirectory, recipe: Recipe, root: str | Path | None) -> tuple[Images, Images, str]:
    """As :func:`load_data`, for a network that was trained: whatever files there are now have the classes it knows, and
    what is held out of them is what the run held out.

    Raises:
        DataError: they have other classes, or other images are held out.
        RunError: data.json is damaged.
    """
    found = load_data(recipe, root)
    known = data_description(run, recipe)
    if known is not None and known.classes != found[0].classes:
        pairs = zip(found[0].classes, known.classes, strict=True)  # as many as data.classes says
        number, (here, there) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise DataError(
            f"class {number} is '{here}' in {root}, but '{there}' for run {run.path}; give data of the run's classes."
        )
    _, evaluation, split = found
    if split == "held_out" and isinstance(evaluation, ImageFiles):  # drawn again, from the files that are there now
        held_out = (run.read_data() or {}).get("fingerprint", {}).get(split)
        if held_out not in (None, evaluation.fingerprint()):
            raise DataError(
                f"the images of {root} are not those that run {run.path} began with, so it may have been trained on "
                "some that are held out now; give the images as they were."
            )
    return found


@torch.no_grad()
def count_correct(model: nn.Module, batches: BatchSource) -> Tensor:
    """Correct answers, summed cross-entropy and number of images, float64 of shape (3,); in eval mode and float32."""
    was_training = model.training
    model.eval()
    correct, losses, images = [], [], 0
    for inputs, labels in batches.epoch(0):
        logits = model(inputs)
        losses.append(F.cross_entropy(logits, labels, reduction="sum"))
        correct.append((logits.argmax(1) == labels).sum())
        images += len(labels)
    model.train(was_training)
    if not images:  # a rank with no share of a small set
        return torch.zeros(3, dtype=torch.float64)
    sums = [torch.stack(values).cpu().double().sum() for values in (correct, losses)]
    return torch.stack([*sums, torch.tensor(images, dtype=torch.float64)])


def as_result(totals: Tensor) -> dict[str, Any]:
    """Accuracy (0 to 1), mean cross-entropy (without label smoothing) and number of images."""
    correct, loss, images = totals.tolist()
    if not images:
        raise DataError("none of the images to evaluate on can be read; see data.on_error.")
    return {"accuracy": correct / images, "loss": loss / images, "images": int(images)}


class Trained(NamedTuple):
    """The network of a run and where it came from."""

    model: nn.Module
    """Built as its recipe says, weights loaded, in eval mode, on the CPU."""
    recipe: Recipe
    file: Path
    """What was read: the weights of a finished run, the averaged weights, or the last checkpoint."""
    sha256: str
    """Of the weights as safetensors, which is what summary.json of the finished run says."""


def open_run(path: str | Path, averaged: bool = False) -> Trained:
    """See :func:`load_run`, which gives the network alone."""
    run = RunDirectory(path)
    recipe = run.read_recipe()
    if averaged and recipe.average is None:
        raise RunError(f"run {run.path} has no averaged weights: its recipe has no section [average].")
    model, _ = build_model(recipe)
    source = run.averaged_weights if averaged else run.weights
    if source.exists():
        state, digest = _read_weights(source, run.read_summary())
    elif run.checkpoint.exists() and not averaged:
        source = run.checkpoint
        state = load_checkpoint(source)["model"]
        digest = hashlib.sha256(weights_file(state, recipe)).hexdigest()
    else:
        raise RunError(f"run {run.path} has no {source.name} yet; continue it with `abste train ... --resume`.")
    check_state(source, state, model.state_dict())
    model.load_state_dict(state)
    return Trained(model.eval(), recipe, source, digest)


def load_run(path: str | Path, averaged: bool = False) -> nn.Module:
    """The trained network of a run: built as its recipe says, weights loaded, in eval mode, on the CPU.

    Args:
        path: the run directory. Of an unfinished run, the last checkpoint is loaded.
        averaged: the averaged weights, where the recipe has ``[average]``.

    Raises:
        RunError: there is no run, or it has no weights yet.
        CheckpointError: the weights are damaged or of another model.
    """
    return open_run(path, averaged).model


def open_source(key: str, source: str, recipe: Recipe) -> Trained:
    """The run that a key of a recipe names: its directory, or ``averaged.safetensors`` in it.

    Raises:
        RunError, CheckpointError: see :func:`load_run`; the message names key and source.
        ConfigError: the run was trained on images that ``recipe`` holds out.
    """
    path = Path(source)
    averaged = path.name == RunDirectory(path).averaged_weights.name
    folder = path.parent if averaged else path
    if not folder.exists() and folder.name in builtin_recipes():
        raise RunError(
            f"{key} = '{source}' is not there yet: train it first (abste train {folder.name} --out {folder}), or name "
            "another run."
        )
    try:
        found = open_run(folder, averaged)
    except AbsteError as error:
        raise type(error)(f"{key} = '{source}': {error}") from None
    data = found.recipe.data
    same = (data.name, data.classes) == (recipe.data.name, recipe.data.classes)  # two folders may both be "folder"
    if recipe.data.holdout and same and data.holdout != recipe.data.holdout:
        raise ConfigError(
            f"{key} = '{source}': that run was trained with data.holdout = {data.holdout}, and so may have seen "
            f"images that data.holdout = {recipe.data.holdout} holds out; use the same for both."
        )
    return found


def weights_file(state: Mapping[str, Tensor], recipe: Recipe) -> bytes:
    """A state dict as the safetensors file of a run."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # One key of metadata: the order of several is random, and equal weights should make equal files.
    return save_safetensors(tensors, metadata={"recipe": recipe.name})


def _read_weights(path: Path, summary: Mapping[str, Any] | None) -> tuple[dict[str, Tensor], str]:
    try:
        data = path.read_bytes()
        state: dict[str, Tensor] = load_safetensors(data)
    except OSError as error:
        raise CheckpointError(f"weights {path} cannot be read: {error.strerror or error}.") from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"weights {path} are truncated or damaged: {error}.") from error
    digest = hashlib.sha256(data).hexdigest()
    expected = (summary or {}).get("sha256", {}).get(path.name)
    if expected is not None and digest != expected:
        raise CheckpointError(f"weights {path} are not those of this run's summary.json (their checksums differ).")
    return state, digest


def evaluate(
    path: str | Path,
    data_root: str | Path | None = None,
    *,
    averaged: bool = False,
    recalibrate: bool = False,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Evaluate a run in float32 on its test set, or on its held-out images where its recipe holds some out.

    Args:
        path: the run directory.
        data_root: the folder of the data set; embedded data needs none.
        averaged: of the averaged weights, whose batch norms were recalibrated when they were saved.
        recalibrate: estimate the batch-norm statistics anew, on the training images without augmentation.
        device: where to compute.

    Returns:
        ``split`` ("test" or "held_out"), ``accuracy`` (0 to 1), ``loss`` (mean cross-entropy), ``images``.

    Raises:
        RunError, CheckpointError: see :func:`load_run`.
        DataError: see :func:`abste.data.load`.
        ConfigError: there is no such device.
    """
    _check_device(device)
    model = load_run(path, averaged=averaged)
    recipe = RunDirectory(path).read_recipe()
    train, images, split = load_run_data(RunDirectory(path), recipe, data_root)
    model.to(device)
    if recalibrate:
        recalibrated(model, recipe, train, device)
    return {"split": split, **as_result(count_correct(model, evaluation_batches(images, recipe, device)))}


def _check_device(device: str | torch.device) -> None:
    try:
        torch.zeros(1, device=device).item()  # which a device without memory can not give back
    except Exception as error:  # each kind of device has its own for being absent
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"device '{device}' cannot be used: {reason.rstrip('.')}.") from error


def views(recipe: Recipe) -> Views:
    """How a recipe crops and varies images from files.

    Raises:
        ConfigError: a value that does not fit.
    """
    section = recipe.data
    _, height, width = section.image_shape
    keys = ("resize", "scale", "ratio", "flip", "color_jitter", "rand_augment", "mixup", "cutmix")
    given: dict[str, Any] = {key: value for key in keys if (value := getattr(section, key)) is not None}
    given |= {key: tuple(value) for key, value in given.items() if isinstance(value, list)}
    return Views((height, width), **given)


def training_batches(
    images: Images, recipe: Recipe, batch_size: int, device: str | torch.device, rank: int = 0, world_size: int = 1
) -> BatchSource:
    """The images as a training epoch shows them, this process's share of each batch of ``batch_size``."""
    section = recipe.data
    augment = Augment(
        crop_padding=section.crop_padding,
        crop_fill=section.crop_fill or "reflect",
        flip=section.flip,
        cutout=section.cutout,
    )
    return _batches(
        images, recipe, batch_size // world_size, augment, device=device, rank=rank, world_size=world_size, train=True
    )


def evaluation_batches(
    images: Images, recipe: Recipe, device: str | torch.device, rank: int = 0, world_size: int = 1
) -> BatchSource:
    """Every image once, as it is."""
    size = min(FILES_EVALUATION_BATCH if isinstance(images, ImageFiles) else EVALUATION_BATCH, len(images))
    return _batches(images, recipe, size, None, device=device, rank=rank, world_size=world_size, train=False)


def _batches(images: Images, recipe: Recipe, size: int, augment: Augment | None, **arguments: Any) -> BatchSource:
    arguments |= {"seed": recipe.train.seed, "channels_last": recipe.train.channels_last}
    if isinstance(images, ImageData):
        return Batches(images, size, augment=augment, **arguments)
    workers, on_error = recipe.data.workers, recipe.data.on_error or "raise"
    return FileBatches(images, size, views=views(recipe), workers=workers, on_error=on_error, **arguments)


def recalibrated(model: nn.Module, recipe: Recipe, train: Images, device: str | torch.device) -> None:
    """Batch-norm statistics from the training images without augmentation, in place."""
    recalibrate_batch_norm(model, (images for images, _ in evaluation_batches(train, recipe, device).epoch(0)))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the record."""
    names = ("abste", "torch", "torchvision", "lightning-fabric", "numpy", "pillow", "scikit-learn")
    versions = {}
    for name in names:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    versions["torch"] = torch.__version__  # with what it was built for
    found = {
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"] = torch.version.cuda
    return found


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state() -> dict[str, Any] | None:
    """Commit of the checkout abste is imported from and whether its source was modified; None where it is installed."""
    package = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(package), *arguments], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not git("ls-files", "--error-unmatch", "errors.py"):  # an environment inside somebody else's checkout
        return None
    commit = git("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "modified": bool(git("status", "--porcelain", "--", "."))}
