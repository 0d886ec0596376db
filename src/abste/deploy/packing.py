"""From a trained network to a verified .abste file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from abste.deploy import format as abste_format
from abste.deploy.graph import Graph
from abste.deploy.lowering import PackReport, check_metadata, lower
from abste.deploy.twins import TWINNED, float_copy, round_to_half
from abste.deploy.verification import Constants, Verification, compare_constants, random_batches, verify
from abste.errors import ConfigError, ConversionError
from abste.runtime.network import Int8, Network
from abste.train.files import write_atomic
from abste.zoo import PREFIX

Batch = tuple[Tensor, Tensor | None]
Data = tuple[str, Iterable[Batch]]
Logits = Callable[[Tensor], Any]


@dataclass
class Rounding:
    """What computing with fewer bits does to a network. It is told, not judged.

    Attributes:
        what: has fewer bits.
        source: the images, in words.
        images: how many.
        agreement: with the same most likely class before and after.
        difference: the largest between logits, as a fraction of an image's largest logit.
        labelled: images whose class is known.
        correct: how many of these the network gets right, before and after.
    """

    what: str
    source: str
    images: int = 0
    agreement: int = 0
    difference: float = 0.0
    labelled: int = 0
    correct: tuple[int, int] = (0, 0)

    @property
    def passed(self) -> bool:
        """Always."""
        return True

    def __str__(self) -> str:
        text = f"{self.what} changes logits by at most {self.difference:.1e} of the largest"
        text += f", and the most likely class in {self.images - self.agreement:,} of {self.images:,} images"
        if self.labelled:
            before, after = (count / self.labelled for count in self.correct)
            text += f"; accuracy {before:.2%} before, {after:.2%} after ({after - before:+.2%})"
        return f"{text} ({self.source})"


Check = Constants | Verification | Rounding


@dataclass
class Export:
    """What an export did.

    Attributes:
        report: what was packed and what stayed float, and the sizes.
        checks: the constants and one verification per source of images, all passed.
        file_bytes: size of the file.
        rounding: what half precision changed, per source of images; empty without it.
    """

    report: PackReport
    checks: list[Check]
    file_bytes: int
    rounding: list[Rounding]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than the model's float32 state dict."""
        return self.report.float_bytes / self.file_bytes

    def __str__(self) -> str:
        size = (
            f"{self.file_bytes:,} bytes, {self.ratio:.1f} times smaller than the float32 state dict "
            f"({self.report.float_bytes:,} bytes)"
        )
        return "\n\n".join([*map(str, [self.report, *self.checks, *self.rounding]), size])


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor,
    *,
    classes: Sequence[str] | None = None,
    normalization: tuple[Sequence[float], Sequence[float]] | None = None,
    metadata: dict[str, Any] | None = None,
    float16: bool = False,
    data: Data | None = None,
    kept_float: Mapping[str, str] | None = None,
) -> Export:
    """Lower, pack and verify a model, and write it to an .abste file.

    Args:
        model: any torch model of operations that docs/format.md knows, with or without binary layers.
        path: of the file; it is replaced only by one that passed verification.
        example_input: (N, ...) float32, for the shapes.
        classes: names of the classes.
        normalization: mean and standard deviation per channel, of pixels between 0 and 1.
        metadata: what else the file shall say of itself, as JSON types.
        float16: round the weights of float layers to half precision, and store what that holds exactly in it: not
            weights that a layer computes from its own in each call.
        data: (what it is, batches of images and labels) to verify on, besides random images. Images are float32,
            normalised as in training; labels may be None. It is gone through more than once, as a DataLoader can be.
        kept_float: why layers stayed float, by name: ``ConversionReport.kept_float`` of :func:`abste.convert`.

    Returns:
        What was done.

    Raises:
        ConversionError: the model cannot be lowered, the file does not compute what the model does, or what it shall
            say of itself is not of these types.
        RunError: the file cannot be written.
        ConfigError: ``path`` begins with ``zoo:``.
    """
    check_metadata(metadata)
    try:
        path = Path(os.fsdecode(path))
    except TypeError:
        raise ConversionError(f"the path of the file must be a str or a Path, not {type(path).__name__}.") from None
    if str(path).startswith(PREFIX):  # a file of that name could not be read again
        raise ConfigError(f"{path} is the name of a network of the zoo, which is read only; give the path of a file.")
    if float16:
        metadata = {**(metadata or {}), "float16": True}  # the file says it, and can be verified
    lowered = lower(
        model,
        example_input,
        classes=classes,
        normalization=normalization,
        metadata=metadata,
        float16=float16,
    )
    for layer in lowered.report.layers:
        if layer.packed == "float" and layer.name in (kept_float or {}):
            layer.why = (kept_float or {})[layer.name] + (", float16" if layer.nbytes < 4 * layer.weights else "")
    file = abste_format.write(lowered.graph)
    checks = verify_file(model, file, example_input, float16=float16, data=data, graph=lowered.graph)
    for check in checks:
        if not check.passed:
            raise ConversionError(f"the packed network is not the model, and was not written{_hooked(model)}:\n{check}")
    rounding = []
    if float16:
        noise = "Gaussian noise", random_batches(tuple(example_input.shape[1:]))
        rounding = [_rounding(model, *source) for source in (noise, data) if source is not None]
    write_atomic(path, file)
    return Export(lowered.report, checks, len(file), rounding)


def _hooked(model: nn.Module) -> str:
    """What may be why a packed network is not the model."""
    for name, module in model.named_modules():
        if isinstance(module, TWINNED) and (module._forward_hooks or module._forward_pre_hooks):
            return f" ({name or 'the model'} has hooks, which are not packed: remove them, or make modules of them)"
    return ""


def verify_file(
    model: nn.Module,
    file: Any,
    example_input: Tensor,
    *,
    float16: bool = False,
    data: Data | None = None,
    graph: Graph | None = None,
    int8: Int8 | None = None,
) -> list[Check]:
    """Verify a packed network: its constants, what it computes for random images, and for data where it is given.

    Args:
        model: the model it was made from.
        file: the bytes of the file.
        example_input: (N, ...) float32, for the shapes.
        float16: the file's float weights are in half precision: it must equal the model with its weights rounded.
        data: see :func:`export`.
        graph: what lowering gives, where it is known.
        int8: tell, too, what loading the file with these layers in integers of eight bits changes.

    Raises:
        ConversionError: the model cannot be lowered.
        FormatError: the file is malformed.
    """
    model = float_copy(model)
    if graph is None:
        graph = lower(model, example_input, float16=float16).graph
    if float16:
        round_to_half(model)
    checks: list[Check] = [compare_constants(abste_format.read(np.frombuffer(file, np.uint8).data), graph)]
    noise = verify(model, file, random_batches(tuple(example_input.shape[1:])), "Gaussian noise")
    checks.append(noise)
    if noise.unlike:  # nothing can be compared
        return checks
    if data is not None:
        source, batches = data
        checks.append(verify(model, file, batches, source))
    if int8 is not None:
        source, batches = data or ("Gaussian noise", random_batches(tuple(example_input.shape[1:])))
        packed = np.frombuffer(file, np.uint8)
        exact, eight = (Network(packed, "the file", int8=chosen) for chosen in (None, int8))
        checks.append(compare_logits(f"int8={int8!r}", source, exact, eight, batches))
    return checks


@torch.no_grad()
def compare_logits(what: str, source: str, before: Logits, after: Logits, batches: Iterable[Batch]) -> Rounding:
    """Compare what two networks say of the same images.

    Args:
        what: distinguishes the second from the first.
        source: the images, in words.
        before, after: give logits for a batch (N, ...); of several outputs, the first one is taken for the logits.
        batches: the images, with labels where they are known.
    """
    found = Rounding(what, source)
    correct = [0, 0]
    for images, labels in batches:
        a, b = (torch.as_tensor(tree_leaves(one(images))[0]).flatten(1) for one in (before, after))
        largest = a.abs().amax(1).clamp(min=1e-30)
        found.difference = max(found.difference, float(((a - b).abs().amax(1) / largest).max()))
        found.agreement += int((a.argmax(1) == b.argmax(1)).sum())
        found.images += len(images)
        if labels is not None:
            found.labelled += len(labels)
            correct = [n + int((y.argmax(1) == labels).sum()) for n, y in zip(correct, (a, b), strict=True)]
    found.correct = (correct[0], correct[1])
    return found


def _rounding(model: nn.Module, source: str, batches: Iterable[Batch]) -> Rounding:
    """Compare a model with itself, its float weights rounded to half precision."""
    before, after = float_copy(model), float_copy(model)
    round_to_half(after)
    return compare_logits("half precision", source, before, after, batches)
