"""Distillation: a trained network, the teacher, whose outputs the network learns to give.

The loss is (1 - alpha) CE + alpha T^2 KL(teacher || student), both softmaxes at temperature T (Hinton et al., arXiv
1503.02531, whose T^2 keeps the gradient's size when T changes). ReActNet (arXiv 2003.03488) has alpha = 1 and T = 1: no
labels at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from abste.errors import CheckpointError, ConfigError
from abste.nn import summary
from abste.train.recipe import DistillSection, Recipe
from abste.train.run import open_source


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
        source = open_source("distill.teacher", recipe.distill.teacher, recipe)
        ours = _knowledge(recipe)
        for key, theirs in _knowledge(source.recipe).items():
            if theirs != ours[key]:
                raise ConfigError(
                    f"distill.teacher = '{recipe.distill.teacher}': that run has {key} = {theirs!r}, but this one "
                    f"{ours[key]!r}; a teacher must know the same images and classes."
                )
        self.record = {
            "source": recipe.distill.teacher,
            "file": source.file.name,
            "sha256": source.sha256,
            "name": source.recipe.name,
        }
        self.macs = int(summary(source.model, (1, *recipe.data.image_shape)).total_macs)
        module = source.model.requires_grad_(False).to(device)
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


def _knowledge(recipe: Recipe) -> dict[str, Any]:
    """What a teacher and its student must agree on, by key."""
    return {
        "data.name": recipe.data.name,
        "data.image_shape": recipe.data.image_shape,
        "model.kwargs.num_classes": recipe.model.kwargs.get("num_classes", recipe.data.classes),
    }
