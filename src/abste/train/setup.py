"""What a recipe asks for, as objects: compiled module, optimizer, schedules, average."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import shutil
import sys
import time
from copy import deepcopy

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn

from abste.errors import ConfigError
from abste.nn import parameter_groups, summary
from abste.optim import Bop, Combined, Muon
from abste.train.recipe import Recipe, ScheduleSection
from abste.train.sizes import image_sizes


def lr_factor(schedule: ScheduleSection, step: int, total_steps: int) -> float:
    """The learning rate of optimizer step ``step`` (from 0), as a factor of its peak: a pure function.

    It rises linearly over ``warmup * total_steps`` steps, then falls to ``final`` in the shape given.
    """
    rising = schedule.warmup * total_steps
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule.shape == "constant":
        return 1.0
    fall = (step - rising) / (total_steps - rising)
    if schedule.shape == "cosine":
        fall = (1 - math.cos(math.pi * fall)) / 2
    return 1.0 + (schedule.final - 1.0) * fall


def compile_module(module: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """The module itself where the recipe does not compile."""
    if not recipe.train.compile:
        return module
    compilers = filter(None, (os.environ.get("CXX"), "g++", "clang++"))
    if device.type == "cpu" and not any(shutil.which(compiler) for compiler in compilers):
        raise ConfigError("train.compile needs a C++ compiler on a CPU: install g++, or --set train.compile=false.")
    # Each size of images has code of its own: what is compiled must not depend on the sizes this process saw before.
    return torch.compile(module, dynamic=False)  # type: ignore[return-value]


def keep_freed_memory() -> None:
    """Have this process keep memory that it frees, for its next step, rather than return it to the system.

    By default glibc returns large tensors when they are freed, and each step of training asks for them anew, page by
    page, which takes a good part of a small network's step on a CPU. ``abste train`` calls this; a program of your own
    may, once, before it trains. It concerns the whole process, which then stays as large as it has been at its largest.

    Nothing happens without glibc, nor where the environment says something of malloc (``GLIBC_TUNABLES``,
    ``MALLOC_TRIM_THRESHOLD_`` and the like).
    """
    asked = "".join(key for key in os.environ if key.startswith("MALLOC_")) + os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "malloc" in asked.lower():
        return
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of malloc.h
    with contextlib.suppress(AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_max, 0)


def bfloat16_slowdown() -> float:
    """How many times as long this CPU takes for a convolution in bfloat16 as in float32: 0.5 with instructions for it,
    several times without. Measured, since no public call tells.
    """
    fastest = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32):
            images = torch.ones(8, 64, 16, 16, dtype=dtype).to(memory_format=torch.channels_last)
            weight = torch.ones(64, 64, 3, 3, dtype=dtype).to(memory_format=torch.channels_last)
            seconds = []
            for _ in range(4):  # the first prepares
                start = time.perf_counter()
                torch.nn.functional.conv2d(images, weight, padding=1)
                seconds.append(time.perf_counter() - start)
            fastest.append(min(seconds))
    return fastest[0] / fastest[1]


def make_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Of parameters in the groups that binary networks need, with what the recipe says of each."""
    section = recipe.optimizer
    groups = parameter_groups(
        module,
        section.lr,
        section.weight_decay,
        latent_lr=section.latent_lr,
        latent_weight_decay=section.latent_weight_decay,
        filters=bool(section.muon_filters),
        flips=section.name == "bop",
        decay_norms=bool(section.decay_norms),
    )
    plain = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    if section.name in plain:
        return plain[section.name](groups, lr=section.lr, **section.arguments())
    own = [group for group in groups if group["name"] in ("latents", "filters")]
    rest = [group for group in groups if group["name"] not in ("latents", "filters")]
    first: torch.optim.Optimizer
    if section.name == "bop":
        first = Bop(own, **section.arguments())
    else:
        if not own:
            raise ConfigError(
                "optimizer.name = 'muon' finds nothing to train: binarise weights, or set optimizer.muon_filters."
            )
        for group in own:
            group["lr"] = section.lr if section.latent_lr is None else section.latent_lr
        first = Muon(own, **section.arguments())
    if not rest:
        return first
    other = section.rest or "sgd"
    return Combined(first, plain[other](rest, lr=section.lr, **section.plain_arguments(other)))


def check_model(module: nn.Module, recipe: Recipe, images: int) -> None:
    """See that the network fits the classes and trains on so few images, by a forward of one; it stays as it is.

    Args:
        module: the network, on the CPU.
        recipe: what it is trained as.
        images: that a step gives it at once, at least.

    Raises:
        ConfigError: it gives other logits than one for each class, or a batch norm is left with one value per channel.
    """
    copy = deepcopy(module).eval()
    channels, *full = recipe.data.image_shape
    with torch.no_grad():
        logits = copy(torch.zeros(1, channels, *full))
        if logits.shape != (1, recipe.data.classes):
            raise ConfigError(
                f"the network '{recipe.model.name}' gives an image {math.prod(logits.shape)} logits, but data.classes "
                f"is {recipe.data.classes}; leave model.kwargs.num_classes out."
            )
        if images > 1 or recipe.train.sync_batch_norm:  # which counts the images of other processes too
            return
        try:
            for size in image_sizes(recipe):
                copy.train()(torch.zeros(1, channels, *size))
        except ValueError as error:
            raise ConfigError(
                f"the network '{recipe.model.name}' cannot be trained on one image at a time, since a batch norm would "
                "have one value per channel; give a larger train.batch_size, or a smaller train.accumulate."
            ) from error


def averaged_model(module: nn.Module, recipe: Recipe) -> AveragedModel | None:
    """The average of the recipe, if it has one."""
    if recipe.average is None:
        return None
    ema = recipe.average.method == "ema"
    function = get_ema_multi_avg_fn(recipe.average.decay) if ema else get_swa_multi_avg_fn()
    return AveragedModel(module, multi_avg_fn=function)  # buffers follow the model; n_averaged stays on the CPU


def count_macs(module: nn.Module, recipe: Recipe) -> tuple[int, int]:
    """Multiply-accumulates of one forward pass of one image: at full size, and over all epochs at the size of each."""
    channels, *full = recipe.data.image_shape
    sizes = image_sizes(recipe)
    macs = {size: int(summary(module, (1, channels, *size)).total_macs) for size in {tuple(full), *sizes}}
    return macs[tuple(full)], sum(macs[size] * epochs for size, epochs in sizes.items())
