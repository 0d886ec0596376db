"""Exports and verifies the networks of run directories."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abste.deploy import format as abste_format
from abste.deploy.packing import Batch, Check, Data, Export, export, verify_file
from abste.errors import ConfigError, DataError, FormatError
from abste.runtime.network import Int8
from abste.train.recipe import Recipe
from abste.train.run import (
    Images,
    RunDirectory,
    build_model,
    data_description,
    evaluation_batches,
    example_input,
    load_run,
    load_run_data,
)
from abste.zoo import resolve

EXPORT_IMAGES = 1000
"""Images of the data that an export is verified on; `abste verify` takes all."""

_EMBEDDED = ("digits",)


def export_run(
    path: str | Path,
    file: str | Path,
    data_root: str | Path | None = None,
    *,
    averaged: bool = False,
    float16: bool = False,
    description: str | None = None,
) -> Export:
    """Export the network of a run, with its class names and normalisation.

    Args:
        path: the run directory.
        file: the .abste file to write.
        data_root: the folder of the data set; without it, only random images verify the file (embedded data is there).
        averaged: the averaged weights.
        float16: store the weights that stay float in half precision.
        description: what the file says that it is, in one line; by default the description of the recipe.

    Raises:
        RunError, CheckpointError: see :func:`abste.load_run`.
        DataError: the data in ``data_root`` is missing or damaged.
        ConversionError: see :func:`abste.deploy.export`.
    """
    model = load_run(path, averaged=averaged)
    run = RunDirectory(path)
    recipe = run.read_recipe()
    known = data_description(run, recipe)
    summary = run.read_summary() or {}
    metadata = {
        "name": recipe.name,
        "description": recipe.description if description is None else description,
        "dataset": recipe.data.name,
        "epochs": recipe.train.epochs,
        "seed": recipe.train.seed,
        "float16": float16,
        "averaged": averaged,
    }
    if resize := (run.read_data() or {}).get("resize"):
        metadata["resize"] = resize  # so that `abste predict` sees images as the evaluation does
    result = (summary.get("averaged", {}) if averaged else summary).get("test")
    if result:
        metadata["accuracy"] = result["accuracy"]
    if summary.get("git"):
        metadata["commit"] = summary["git"]["commit"] + (" and changes" if summary["git"]["modified"] else "")
    return export(
        model,
        file,
        example_input(recipe),
        classes=None if known is None else known.classes,
        normalization=None if known is None else (known.mean, known.std),
        metadata=metadata,
        float16=float16,
        data=_data(run, recipe, data_root, None if float16 else EXPORT_IMAGES),
        kept_float=build_model(recipe)[1].kept_float,
    )


def verify_run(
    path: str | Path,
    file: str | Path,
    data_root: str | Path | None = None,
    *,
    averaged: bool = False,
    images: int | None = None,
    int8: Int8 | None = None,
) -> list[Check]:
    """Verify an .abste file against a run: its constants, on random images, and on its test data where that is found.

    Args:
        path: the run directory.
        file: the .abste file, or ``"zoo:NAME"``.
        data_root: the folder of the data set; embedded data needs none.
        averaged: against the averaged weights.
        images: use only so many images of the data.
        int8: tell, too, what loading the file with these layers in integers of eight bits changes.

    Raises:
        RunError, CheckpointError: see :func:`abste.load_run`.
        DataError: the data in ``data_root`` is missing or damaged.
        FormatError: the file cannot be read, or is no whole .abste file.
    """
    if images is not None and images < 1:
        raise ConfigError(f"the number of images must be at least 1, not {images}.")
    model = load_run(path, averaged=averaged)
    run = RunDirectory(path)
    recipe = run.read_recipe()
    try:
        data = np.fromfile(resolve(file), np.uint8)
    except OSError as error:
        raise FormatError(f"cannot read {os.fspath(file)}: {error.strerror or error}.") from error
    metadata: Any = abste_format.read(data.data).metadata
    return verify_file(
        model,
        data,
        example_input(recipe),
        float16=isinstance(metadata, dict) and bool(metadata.get("float16")),  # it may be any JSON
        data=_data(run, recipe, data_root, images),
        int8=int8,
    )


class _Images:
    """Evaluation images in batches, as often as they are wanted."""

    def __init__(self, images: Images, recipe: Recipe) -> None:
        self.images, self.recipe = images, recipe

    def __iter__(self) -> Iterator[Batch]:
        for inputs, labels in evaluation_batches(self.images, self.recipe, "cpu").epoch(0):
            for start in range(0, len(inputs), 100):  # what is kept of every layer is large
                part = slice(start, start + 100)
                yield inputs[part].contiguous(), labels[part]


def _data(run: RunDirectory, recipe: Recipe, root: str | Path | None, images: int | None) -> Data | None:
    """The test images of a recipe, where they are at hand, and what to call them."""
    if root is None and recipe.data.name not in _EMBEDDED:
        return None
    _, evaluation, split = load_run_data(run, recipe, root)
    count = len(evaluation) if images is None else min(images, len(evaluation))
    if count < 1:
        raise DataError(f"data set '{recipe.data.name}' has no images to verify on.")
    which = "all" if count == len(evaluation) else f"{count:,}" if recipe.data.on_disk else f"the first {count:,}"
    source = f"{which} of the {len(evaluation):,} {split.replace('_', '-')} images of {recipe.data.name}"
    # As many as an export takes are spread over the classes of files, which come class by class.
    chosen = torch.arange(count) * len(evaluation) // count if recipe.data.on_disk else torch.arange(count)
    return source, _Images(evaluation if count == len(evaluation) else evaluation.select(chosen), recipe)
