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
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn

import abste.models
from abste.data import Batches, ImageData, hold_out, load
from abste.errors import AbsteError, CheckpointError, ConfigError, DataError, RunError
from abste.nn import ConversionReport, convert, recalibrate_batch_norm
from abste.train.checkpoint import check_state, load_checkpoint
from abste.train.files import remove_leftovers
from abste.train.recipe import Recipe, make_recipe

EVALUATION_BATCH = 500


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.recipe = self.path / "recipe.toml"
        self.checkpoint = self.path / "last.ckpt"
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
        """``summary.json``, or None where the run is unfinished."""
        try:
            summary: dict[str, Any] = json.loads(self.summary.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            raise RunError(f"{self.summary} is damaged: {error}.") from error
        return summary


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
    model = abste.models.create(recipe.model.name, **arguments)
    if recipe.binarize is None:
        return model, ConversionReport(())
    return model, convert(model, **recipe.binarize.arguments(), example_input=example_input(recipe))


def load_data(recipe: Recipe, root: str | Path | None) -> tuple[ImageData, ImageData, str]:
    """``(training images, evaluation images, "test" or "held_out")``.

    Raises:
        DataError: the data set is missing, damaged, or not of the shape the recipe says.
        ConfigError: an unknown data set, or a hold-out larger than the training set.
    """
    section = recipe.data
    train, evaluation = load(section.name, root=root, statistics=section.statistics or "dataset")
    shape, classes = list(train.images.shape[1:]), len(train.classes)
    if shape != section.image_shape:
        raise DataError(
            f"data set '{section.name}' has images of {shape}, but data.image_shape is {section.image_shape}."
        )
    if classes != section.classes:
        raise DataError(f"data set '{section.name}' has {classes} classes, but data.classes is {section.classes}.")
    if section.holdout:
        # One split for every seed, so that runs differ in nothing but what the seed is meant to vary.
        train, evaluation = hold_out(train, section.holdout, seed=0)
        return train, evaluation, "held_out"
    return train, evaluation, "test"


@torch.no_grad()
def count_correct(model: nn.Module, batches: Batches) -> Tensor:
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
    try:
        found = open_run(path.parent if averaged else path, averaged)
    except AbsteError as error:
        raise type(error)(f"{key} = '{source}': {error}") from None
    data = found.recipe.data
    if recipe.data.holdout and data.name == recipe.data.name and data.holdout != recipe.data.holdout:
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
    """
    model = load_run(path, averaged=averaged)
    recipe = RunDirectory(path).read_recipe()
    train, images, split = load_data(recipe, data_root)
    model.to(device)
    if recalibrate:
        recalibrated(model, recipe, train, device)
    return {"split": split, **as_result(count_correct(model, evaluation_batches(images, recipe, device)))}


def evaluation_batches(
    images: ImageData, recipe: Recipe, device: str | torch.device, rank: int = 0, world_size: int = 1
) -> Batches:
    """Every image once, as it is."""
    return Batches(
        images,
        min(EVALUATION_BATCH, len(images)),
        augment=None,
        seed=recipe.train.seed,
        device=device,
        channels_last=recipe.train.channels_last,
        rank=rank,
        world_size=world_size,
        train=False,
    )


def recalibrated(model: nn.Module, recipe: Recipe, train: ImageData, device: str | torch.device) -> None:
    """Batch-norm statistics from the training images without augmentation, in place."""
    recalibrate_batch_norm(model, (images for images, _ in evaluation_batches(train, recipe, device).epoch(0)))


def environment(device: torch.device) -> dict[str, Any]:
    """Versions and machine, for the record."""
    names = ("abste", "torch", "torchvision", "lightning-fabric", "numpy", "scikit-learn")
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
