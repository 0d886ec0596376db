"""Distillation: a trained network, the teacher, whose outputs the network learns to give.

The loss is (1 - alpha) CE + alpha T^2 KL(teacher || student), both softmaxes at temperature T (Hinton et al., arXiv
1503.02531, whose T^2 keeps the gradient's size when T changes). ReActNet (arXiv 2003.03488) has alpha = 1 and T = 1: no
labels at all.
"""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import torchvision.models as tv
from torch import Tensor, nn

from abste.data import IMAGENET
from abste.errors import CheckpointError, ConfigError, nearest
from abste.nn import summary
from abste.train.recipe import DistillSection, Recipe
from abste.train.run import open_source

TORCHVISION = "torchvision:"
"""What begins the name of a teacher that torchvision trained."""


def distillation_loss(
    logits: Tensor, teacher: Tensor, labels: Tensor, section: DistillSection, label_smoothing: float = 0.0
) -> Tensor:
    """(1 - alpha) CE + alpha T^2 KL(teacher || student), the mean over the batch, in float32.

    Args:
        logits: the student's, (N, classes).
        teacher: the teacher's, likewise.
        labels: int64 (N,).
        section: alpha and T.
        label_smoothing: of CE.
    """
    inverse = 1 / section.temperature
    ours, theirs = (F.log_softmax(x.float() * inverse, 1) for x in (logits, teacher))
    divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    loss = section.alpha * section.temperature**2 * divergence
    if section.alpha < 1:
        loss = loss + (1 - section.alpha) * F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return loss


class Teacher:
    """The teacher of a recipe with ``[distill]``: in eval mode, without gradient, in the precision of training.

    It sees what the student sees, augmentation included, but at full size.

    Args:
        recipe: of the student.
        device: of the training.
        autocast: gives the context in which the student computes.
        prepare: what the student is passed through, such as torch.compile.

    Attributes:
        record: ``source``, ``file``, ``sha256`` and ``name`` (of its recipe).
        macs: multiply-accumulates of one image.

    Raises:
        RunError, CheckpointError: there is no such run, or it has no weights, or they are damaged.
        ConfigError: it was trained on other data, or on images that are held out here.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        prepare: Callable[[nn.Module], nn.Module],
    ) -> None:
        assert recipe.distill is not None
        teacher = recipe.distill.teacher
        if teacher.startswith(TORCHVISION):
            module, self.record = _of_torchvision(teacher, recipe)
        else:
            module, self.record = _of_run(teacher, recipe)
        self.macs = int(summary(module, (1, *recipe.data.image_shape)).total_macs)
        module.requires_grad_(False).to(device)
        if recipe.train.channels_last:
            module.to(memory_format=torch.channels_last)
        self._model = prepare(module)
        self._autocast = autocast

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        with self._autocast():
            logits: Tensor = self._model(images)
        return logits

    def check(self, checkpoint: Path, record: dict[str, Any]) -> None:
        """Refuse to go on from a checkpoint that another teacher taught.

        Raises:
            CheckpointError: the checksums differ.
        """
        if record["sha256"] != self.record["sha256"]:
            raise CheckpointError(
                f"{checkpoint} had the teacher {record['sha256'][:12]} ({record['file']} of {record['source']}), but "
                f"{self.record['source']} now holds {self.record['sha256'][:12]} ({self.record['file']}); put that "
                "teacher back, or start again in another --out."
            )


def _of_run(teacher: str, recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    source = open_source("distill.teacher", teacher, recipe)
    ours = _knowledge(recipe)
    for key, theirs in _knowledge(source.recipe).items():
        if theirs != ours[key]:
            raise ConfigError(
                f"distill.teacher = '{teacher}': that run has {key} = {theirs!r}, but this one {ours[key]!r}; "
                "a teacher must know the same images and classes."
            )
    record = {"source": teacher, "file": source.file.name, "sha256": source.sha256, "name": source.recipe.name}
    return source.model, record


def _of_torchvision(teacher: str, recipe: Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """A classifier of ImageNet with torchvision's weights, which are downloaded where they are not there yet.

    Its classes are those of ImageNet in the order of their folders, n01440764 and so on. Only their number is checked.
    """
    name, _, which = teacher.removeprefix(TORCHVISION).partition(":")
    known = tv.list_models(module=tv)
    if name not in known:
        raise ConfigError(f"distill.teacher: torchvision has no classifier named {name!r}; {nearest(name, known)}")
    choices = {weights.name: weights for weights in tv.get_model_weights(name)}
    which = which or next(iter(choices))
    if which not in choices:
        raise ConfigError(f"distill.teacher: torchvision has no weights {which!r} of {name}; {nearest(which, choices)}")
    weights = choices[which]
    section = recipe.data
    classes, ours = len(weights.meta["categories"]), recipe.model.kwargs.get("num_classes", section.classes)
    if not section.on_disk or ours != classes:
        raise ConfigError(
            f"distill.teacher = '{teacher}': it knows the {classes} classes of ImageNet, but this run has {ours} of "
            f"data set '{section.name}'; a teacher must know the same images and classes."
        )
    if any(
        given is not None and given != list(own)
        for given, own in zip((section.mean, section.std), IMAGENET, strict=True)
    ):
        raise ConfigError(
            f"distill.teacher = '{teacher}' was trained with ImageNet's mean and std; leave data.mean and data.std out."
        )
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    file = folder / Path(weights.url).name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            torch.hub.download_url_to_file(weights.url, str(file), hash_prefix=file.stem.rpartition("-")[2])
        state = torch.load(
            file, map_location="cpu", weights_only=True
        )  # not as torchvision does: it runs what is in it
        model = tv.get_model(name, weights=None)
        model.load_state_dict(state)
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, RuntimeError, pickle.UnpicklingError, EOFError) as error:
        raise ConfigError(
            f"distill.teacher = '{teacher}': {file} cannot be downloaded from {weights.url} or read "
            f"({' '.join(str(error).split())[:200]}); remove it, or put a whole one there by hand."
        ) from error
    return model.eval(), {"source": teacher, "file": file.name, "sha256": digest, "name": str(weights)}


def _knowledge(recipe: Recipe) -> dict[str, Any]:
    """What a teacher and its student must agree on, by key."""
    return {
        "data.name": recipe.data.name,
        "data.image_shape": recipe.data.image_shape,
        "model.kwargs.num_classes": recipe.model.kwargs.get("num_classes", recipe.data.classes),
    }
