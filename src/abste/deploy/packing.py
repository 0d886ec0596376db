"""From a trained network to a verified .abste file."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from abste.deploy import format as abste_format
from abste.deploy.lowering import lower
from abste.deploy.verification import Verification, random_batches, verify
from abste.errors import ConversionError
from abste.nn.layers import BINARY_LAYERS
from abste.train.files import write_atomic

Batch = tuple[Tensor, Tensor | None]


@dataclass
class Export:
    """What an export did.

    Attributes:
        report: what was packed and what stayed float, and the sizes.
        checks: one verification per source of images, all passed.
        file_bytes: size of the file.
    """

    report: Any
    checks: list[Verification]
    file_bytes: int

    def __str__(self) -> str:
        return "\n\n".join(map(str, [self.report, *self.checks]))


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor,
    *,
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    metadata: dict[str, Any] | None = None,
    float16: bool = False,
    data: tuple[str, Iterable[Batch]] | None = None,
) -> Export:
    """Lower, pack and verify a model, and write it to an .abste file.

    Args:
        model: any torch model of operations that docs/format.md knows, with or without binary layers.
        path: of the file; it is replaced only by one that passed verification.
        example_input: (N, ...) float32, for the shapes.
        classes: names of the classes.
        normalization: mean and standard deviation per channel, of pixels between 0 and 1.
        metadata: what else the file shall say of itself, as JSON types.
        float16: store the weights that stay float in half precision.
        data: (what it is, batches of images and labels) to verify on, besides random images.

    Returns:
        What was done.

    Raises:
        ConversionError: the model cannot be lowered, or the file does not compute what the model does.
        RunError: the file cannot be written.
    """
    lowered = lower(
        model,
        example_input,
        classes=classes,
        normalization=normalization,
        metadata=metadata,
        float16=float16,
    )
    file = abste_format.write(lowered.graph)
    checks = verify_file(model, file, example_input, float16=float16, data=data)
    for check in checks:
        if not check.passed:
            raise ConversionError(f"the packed network is not the model, and was not written:\n{check}")
    write_atomic(Path(path), file)
    return Export(lowered.report, checks, len(file))


def verify_file(
    model: nn.Module,
    file: Any,
    example_input: Tensor,
    *,
    float16: bool = False,
    data: tuple[str, Iterable[Batch]] | None = None,
) -> list[Verification]:
    """Verify a packed network on random images, and on data where it is given.

    With ``float16`` it must equal the model whose float weights are rounded likewise.
    """
    model = copy.deepcopy(model).eval().float().cpu()
    if float16:
        round_to_half(model)
    shape = tuple(example_input.shape[1:])
    checks = [verify(model, file, random_batches(shape), "Gaussian noise")]
    if data is not None:
        source, batches = data
        checks.append(verify(model, file, batches, source))
    return checks


@torch.no_grad()
def round_to_half(model: nn.Module) -> None:
    """Round what a file in half precision rounds: the weights of float convolutions and linear layers."""
    for module in model.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
            binary = isinstance(module, BINARY_LAYERS) and module.weight_binarizer is not None
            if not binary:
                module.weight.copy_(module.weight.half().float())
