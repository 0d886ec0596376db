"""The checkpoint file: a magic line, the SHA-256 of the payload, the payload (``torch.save``).

The checksum is verified before anything is parsed, and the payload is read with ``weights_only=True``, so a file never
runs code.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abste.errors import CheckpointError
from abste.train.files import write_atomic
from abste.train.recipe import first_difference

MAGIC = b"abste checkpoint 1\n"
_HEADER = len(MAGIC) + 65  # 64 hex digits and a newline


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Replace ``path`` atomically. ``state`` holds tensors, numbers, strings, and tables, lists and tuples of them.

    Raises:
        RunError: the disk is full or the file cannot be written; the old checkpoint stays whole.
    """
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    payload = buffer.getvalue()
    digest = hashlib.sha256(payload).hexdigest().encode()
    write_atomic(path, MAGIC + digest + b"\n" + payload)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read and verify a checkpoint; tensors arrive on the CPU.

    Raises:
        CheckpointError: the file is missing, truncated, altered, or no checkpoint of abste.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror or error}.") from error
    if not data.startswith(MAGIC):
        raise CheckpointError(f"{path} is not a checkpoint of this version of abste; give the run's own directory.")
    digest, payload = data[len(MAGIC) : _HEADER], data[_HEADER:]
    if hashlib.sha256(payload).hexdigest().encode() + b"\n" != digest:
        raise CheckpointError(
            f"checkpoint {path} is truncated or damaged (its checksum does not match); "
            "restore it from a copy, or start again in another --out."
        )
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} cannot be read by torch {torch.__version__}.") from error
    return state


def check_recipe(path: Path, saved: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose recipe would compute something else.

    Raises:
        CheckpointError: names the first key that differs and both values.
    """
    difference = first_difference(saved, asked)
    if difference is not None:
        key, old, new = difference
        raise CheckpointError(
            f"{path} was written with {key} = {_shown(old)}, but this run asks for {_shown(new)}; "
            "resume with the recipe.toml of that run, or the same --set values, or choose another --out."
        )


def check_state(source: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse weights of another network.

    Args:
        source: the file, for the message.
        found: the state dict it holds.
        wanted: the state dict of the network it should fit.

    Raises:
        CheckpointError: names the first tensor that differs, and how many do.
    """
    problems = []
    for name, tensor in wanted.items():
        if name not in found:
            problems.append(f"it lacks '{name}'")
        elif found[name].shape != tensor.shape:
            problems.append(f"its '{name}' has shape {tuple(found[name].shape)}, not {tuple(tensor.shape)}")
        elif found[name].dtype != tensor.dtype:
            problems.append(f"its '{name}' has dtype {found[name].dtype}, not {tensor.dtype}")
    problems += [f"it has '{name}', which the model has not" for name in found if name not in wanted]
    if problems:
        more = f" (and {len(problems) - 1} more tensors differ)" if len(problems) > 1 else ""
        raise CheckpointError(f"{source} is of another model than its recipe's: {problems[0]}{more}.")


def random_state(device: torch.device) -> dict[str, Any]:
    """The state of every random number generator a model might use."""
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Any], device: torch.device) -> None:
    """Continue the streams of :func:`random_state`."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _shown(value: Any) -> str:
    return "nothing" if value is None else repr(value)
