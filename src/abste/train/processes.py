"""Devices, processes and signals: what surrounds the training loop."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch.distributed as dist
from lightning_fabric import Fabric

from abste.errors import AbsteError, ConfigError, RunError
from abste.train.recipe import Recipe
from abste.train.run import RunDirectory

T = TypeVar("T")
RUNNING = 0
"""Stands for no signal, whose numbers begin with 1."""


def make_fabric(recipe: Recipe, accelerator: str, devices: int | str, strategy: str, num_nodes: int) -> Fabric:
    """As :func:`abste.train.fit` takes it, checked against the recipe; under torchrun, its processes."""
    if strategy not in ("auto", "ddp"):
        raise ConfigError(f"strategy must be 'auto' or 'ddp', not {strategy!r}: checkpoints hold unsharded weights.")
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has decided
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        devices, num_nodes, strategy = local, int(os.environ["WORLD_SIZE"]) // local, "ddp"
    # Fabric announces the precision; that is in the recipe.
    logger = logging.getLogger("lightning_fabric")
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*AMP with fp16 is not supported on CPU")  # an error, below
            fabric = Fabric(
                accelerator=accelerator,
                devices=devices,
                strategy=strategy,
                num_nodes=num_nodes,
                precision=recipe.train.precision,
            )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        # What Fabric raises for options that do not fit the machine, and the absence of what drives a device.
        raise ConfigError(f"these devices cannot be used: {' '.join(str(error).split())}") from error
    finally:
        logger.setLevel(level)
    if recipe.train.precision == "16-mixed" and fabric.device.type == "cpu":
        raise ConfigError("train.precision '16-mixed' needs a GPU; on a CPU use 'bf16-mixed' or '32-true'.")
    accumulate = recipe.train.accumulate or 1
    shares = accumulate if recipe.train.scale else accumulate * fabric.world_size
    if recipe.train.batch_size % shares:
        parts = f" in {accumulate} parts each" if accumulate > 1 else ""
        raise ConfigError(
            f"train.batch_size {recipe.train.batch_size} cannot be shared by {shares // accumulate} "
            f"process{'es' if shares > accumulate else ''}{parts}; choose a multiple of {shares}."
        )
    if recipe.train.sync_batch_norm and fabric.device.type == "cpu":
        raise ConfigError("train.sync_batch_norm needs GPUs; on CPUs every process normalises its own share.")
    return fabric


def join_again(fabric: Fabric, restarts: int) -> None:
    """Set up communication after a restart by torchrun.

    Its store outlives the workers, so without a prefix they would find the addresses of those that are gone.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, world, is_master=False)  # type: ignore[attr-defined]
    fresh = dist.PrefixStore(f"abste-{restarts}", store)  # type: ignore[attr-defined]
    backend = "nccl" if fabric.device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=fresh, rank=rank, world_size=world)


@contextlib.contextmanager
def lost_processes(fabric: Fabric, run: RunDirectory) -> Iterator[None]:
    """One sentence where communication fails, as it does for all that are left once a process has died."""
    try:
        yield
    except RuntimeError as error:
        if fabric.world_size == 1 or isinstance(error, AbsteError) or not _is_communication(error):
            raise
        raise RunError(
            f"process {fabric.global_rank} of {fabric.world_size} has lost touch with another, which probably died: "
            f"see its output; the last checkpoint in {run.path} is whole, continue with --resume."
        ) from error


def _is_communication(error: RuntimeError) -> bool:
    # gloo raises bare RuntimeErrors.
    return isinstance(error, dist.DistError) or any(word in str(error) for word in ("gloo", "NCCL", "process group"))


def on_rank_zero(fabric: Fabric, action: Callable[[], T]) -> T:
    """Run ``action`` on rank 0 and give its result, or raise its error, everywhere: no rank waits for a dead one."""
    result: T | None = None
    error: AbsteError | None = None
    if fabric.is_global_zero:
        try:
            result = action()
        except AbsteError as caught:
            if fabric.world_size == 1:
                raise
            error = caught
    if fabric.world_size > 1:
        result, error = fabric.broadcast((result, error))
        if error is not None:
            raise error
    return result  # type: ignore[return-value]


class Signals:
    """Notes the first SIGINT or SIGTERM, for the loop to stop cleanly; a second SIGINT stops at once."""

    def __init__(self) -> None:
        self.received = RUNNING
        self._when = 0.0

    @contextlib.contextmanager
    def caught(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets only the main thread handle signals
            return
        before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _: Any) -> None:
        now = time.monotonic()
        if self.received == RUNNING:
            self.received, self._when = number, now
        elif number == signal.SIGINT and now - self._when > 1:
            # A launcher such as torchrun passes on the Ctrl-C that the terminal already sent: within a second it is
            # the same one.
            raise KeyboardInterrupt
