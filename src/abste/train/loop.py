"""The training loop, on Lightning Fabric."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import random
import signal
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from lightning_fabric import Fabric
from torch import Tensor, nn

from abste import models
from abste.data import lost_workers
from abste.errors import CheckpointError, ConfigError, NonFiniteLossError
from abste.estimators import EstimatorSchedule
from abste.train.checkpoint import (
    check_recipe,
    check_state,
    load_checkpoint,
    random_state,
    save_checkpoint,
    set_random_state,
)
from abste.train.distill import Teacher, distillation_loss
from abste.train.files import write_atomic, write_error, write_json
from abste.train.init import start_from_run
from abste.train.processes import RUNNING, Signals, join_again, lost_processes, make_fabric, on_rank_zero
from abste.train.progress import Progress, duration
from abste.train.recipe import Recipe
from abste.train.run import (
    RunDirectory,
    as_result,
    build_model,
    count_correct,
    data_record,
    environment,
    evaluation_batches,
    git_state,
    load_data,
    recalibrated,
    resolved,
    training_batches,
    weights_file,
)
from abste.train.setup import (
    averaged_model,
    bfloat16_slowdown,
    check_model,
    compile_module,
    count_macs,
    lr_factor,
    make_optimizer,
)
from abste.train.sizes import check_sizes, image_size, resized

_NEVER = 2**62  # a step that no run reaches
_MAX_MINUTES, _MAX_STEPS = 1000, 1001  # reasons to stop, beside signal numbers, which are below 1000


class Interrupted(KeyboardInterrupt):
    """A signal stopped :func:`fit` cleanly, after a checkpoint. ``signum`` says which signal."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum


def fit(
    recipe: Recipe,
    data_root: str | Path | None,
    out: str | Path,
    *,
    resume: bool = False,
    max_minutes: float | None = None,
    max_steps: int | None = None,
    accelerator: str = "auto",
    devices: int | str = 1,
    strategy: str = "auto",
    num_nodes: int = 1,
    progress: bool = True,
) -> dict[str, Any]:
    """Train a network as a recipe says and write everything about it to a run directory.

    The run can be killed at any moment and continued with ``resume``; on one device it then ends with the same weights,
    bit for bit. Random number generators and, where the recipe says so, the number of threads are set process-wide.

    Args:
        recipe: what to train, from :func:`abste.train.load_recipe`.
        data_root: the folder of the data set; embedded data needs none.
        out: the run directory, new or empty, or with ``resume`` one that holds this recipe's run.
        resume: continue from the last checkpoint.
        max_minutes: stop cleanly after so long in this process.
        max_steps: stop cleanly after so many optimizer steps in this process.
        accelerator, devices, strategy, num_nodes: of ``lightning.fabric.Fabric``. One device is the default, since more
            change what batch norm sees; strategy is "auto" or "ddp". Under torchrun, its processes are used.
        progress: print progress to standard output.

    Returns:
        The content of ``summary.json``; of a run stopped by ``max_minutes`` or ``max_steps``, ``finished`` (False),
        ``stopped`` (why), ``epoch`` and ``step``.

    Raises:
        Interrupted: SIGINT or SIGTERM arrived (in the main thread); the run can be resumed.
        ConfigError, ConversionError, DataError: the recipe or the data do not fit.
        RunError: the run directory is in use, foreign or full.
        CheckpointError: the checkpoint is damaged or of another recipe.
        NonFiniteLossError: the loss or the weights became infinite or NaN.
    """
    if max_minutes is not None and not max_minutes >= 0:
        raise ConfigError(f"max_minutes must be at least 0, not {max_minutes}.")
    if max_steps is not None and max_steps < 1:
        raise ConfigError(f"max_steps must be at least 1, not {max_steps}.")
    models.check(recipe.model.name, *recipe.model.kwargs)  # before data is looked for, or downloaded
    started = time.monotonic()
    threads = torch.get_num_threads()
    recipe = resolved(recipe, data_root)
    fabric = make_fabric(recipe, accelerator, devices, strategy, num_nodes)
    restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if restarts:
        join_again(fabric, restarts)
    fabric.launch()
    if recipe.train.threads is not None:
        torch.set_num_threads(recipe.train.threads)
    run = RunDirectory(out)
    resume = resume or (restarts > 0 and run.exists())  # torchrun starts workers again with the arguments of the first
    try:
        with contextlib.ExitStack() as stack, lost_processes(fabric, run):
            on_rank_zero(fabric, lambda: stack.enter_context(run.owned(resume)))
            show = Progress(progress and fabric.is_global_zero)
            loop = _Loop(fabric, recipe, run, data_root, show, fresh=not (resume and run.begun()))
            finished = loop.open(resume)
            if finished is not None:
                return finished
            deadline = None if max_minutes is None else started + 60 * max_minutes
            return loop.run_to(deadline, max_steps)
    finally:
        torch.set_num_threads(threads)


class _Loop:
    """One run in this process: its objects, its position, and how they are saved."""

    def __init__(
        self,
        fabric: Fabric,
        recipe: Recipe,
        run: RunDirectory,
        data_root: str | Path | None,
        progress: Progress,
        fresh: bool,
    ) -> None:
        self.fabric, self.recipe, self.run, self.progress = fabric, recipe, run, progress
        self.device = fabric.device
        settings = recipe.train

        random.seed(settings.seed)
        np.random.seed(settings.seed)
        torch.manual_seed(settings.seed)

        if fabric.world_size > 1:
            on_rank_zero(fabric, lambda: load_data(recipe, data_root)[2])  # one process downloads
        self.train_images, evaluation_images, self.split = load_data(recipe, data_root)
        self.data_record = data_record(recipe, self.train_images, evaluation_images, self.split)
        grown = fabric.world_size if settings.scale else 1
        self.batch_size = settings.batch_size * grown  # of all processes
        place = self.device, fabric.global_rank, fabric.world_size
        self.train = training_batches(self.train_images, recipe, self.batch_size, *place)
        self.evaluation = evaluation_batches(evaluation_images, recipe, *place)
        self.unreadable: dict[str, str] = {}  # of all processes, at the last checkpoint
        self.steps_per_epoch = len(self.train)
        self.total_steps = settings.epochs * self.steps_per_epoch

        self.module, self.conversion = build_model(recipe)
        # What the weights started from; a checkpoint has weights of its own, and needs no other run.
        self.started = start_from_run(self.module, recipe) if fresh else None
        check_sizes(self.module, recipe)
        check_model(self.module, recipe, self.batch_size // fabric.world_size // (settings.accumulate or 1))
        self.macs, self.macs_of_all_epochs = count_macs(self.module, recipe)
        self.module.to(self.device)
        if settings.channels_last:
            self.module.to(memory_format=torch.channels_last)
        if settings.sync_batch_norm:
            self.module = nn.SyncBatchNorm.convert_sync_batchnorm(self.module)
        self.raw_optimizer = make_optimizer(self.module, recipe)
        for group in self.raw_optimizer.param_groups:
            group["initial_lr"] = group["lr"] * grown
        self.peak_lr = recipe.optimizer.lr * grown
        self.schedule = EstimatorSchedule(self.module, self.total_steps)
        self.averaged = averaged_model(self.module, recipe)
        self.model, self.optimizer = fabric.setup(self._prepared(self.module), self.raw_optimizer)
        self.teacher: Teacher | None = None
        self.taught: dict[str, Any] | None = None  # by whom, up to the checkpoint
        torch.manual_seed(settings.seed + fabric.global_rank)  # dropout and the like differ between ranks

        self.epoch = 0
        self.done = 0  # steps done in this epoch
        self.seconds = 0.0  # of this run, in all processes that wrote a checkpoint
        self.train_seconds = 0.0  # the part of it spent in training steps
        self.first_bad = torch.full((), _NEVER, dtype=torch.int64, device=self.device)
        self.window = torch.zeros(2, device=self.device)  # loss and correct answers since the last metrics
        self.window_images = 0  # of all processes
        self.epoch_sums = [0.0, 0.0, 0.0]  # loss, correct, images of this epoch up to the last metrics
        self.last_training: dict[str, Any] | None = None
        self.last_evaluation: dict[str, Any] | None = None
        self.metrics_bytes = self.diagnostics_bytes = 0
        self.diagnostics_state: dict[str, Any] | None = None
        self.saved_step: int | None = None
        self.signals = Signals()
        self.git = git_state()  # at the start: the checkout may move on while the run goes on with what it imported
        self.writer: Any = None
        self.metrics_file: Any = None
        self.diagnostics: Any = None
        self.diagnostics_file: Any = None

    def _prepared(self, module: nn.Module) -> nn.Module:
        return compile_module(module, self.recipe, self.device)

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.epoch * self.steps_per_epoch + self.done

    # Starting

    def open(self, resume: bool) -> dict[str, Any] | None:
        """Restore the checkpoint, if any, and open the files; gives the summary of a run that is already finished."""
        if resume:
            on_rank_zero(
                self.fabric,
                lambda: check_recipe(self.run.recipe, self.run.read_recipe().to_dict(), self.recipe.to_dict()),
            )
            on_rank_zero(self.fabric, lambda: self.run.check_data(self.data_record))
            if self.run.checkpoint.exists():
                self._restore()
            finished = on_rank_zero(self.fabric, self.run.read_summary)
            if finished is not None:
                self.progress.line(f"{self.run.path} is already finished")
                return finished
        if self.recipe.distill is not None:
            random = random_state(self.device)
            self.teacher = Teacher(self.recipe, self.device, self.fabric.autocast, self._prepared)
            set_random_state(random, self.device)  # a network that is built draws its first weights
            if self.taught is not None:
                self.teacher.check(self.run.checkpoint, self.taught)
        on_rank_zero(self.fabric, lambda: self._open_files(resume))
        if self.fabric.is_global_zero:  # of its share of the batch; the weights are the same everywhere
            self.diagnostics = self._diagnostics()
        return None

    def _open_files(self, resume: bool) -> None:
        run = self.run
        write_atomic(run.recipe, self.recipe.to_toml().encode())  # first: it makes the directory a run
        write_json(run.data, self.data_record)
        report = str(self.conversion) if self.started is None else f"{self.conversion}\n{self.started['report']}"
        write_atomic(run.conversion, f"{report}\n".encode())
        try:
            self.metrics_file = _open_lines(run.metrics, self.metrics_bytes)
            if self.recipe.diagnostics is not None or run.diagnostics.exists():
                self.diagnostics_file = _open_lines(run.diagnostics, self.diagnostics_bytes)
            with open(run.sessions, "a", encoding="utf-8") as file:
                session = {
                    "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "step": self.step,
                    "processes": self.fabric.world_size,
                    "git": self.git,
                    **environment(self.device),
                }
                file.write(json.dumps(session) + "\n")
        except OSError as error:
            raise write_error(run.path, error) from error
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, needed here only

        self.writer = SummaryWriter(str(run.tensorboard), purge_step=self.step + 1 if resume else None)

    def _diagnostics(self) -> Any:
        section = self.recipe.diagnostics
        if section is None or self.recipe.binarize is None:
            return None
        from abste.diagnostics import Diagnostics

        diagnostics = Diagnostics(
            self.model,
            self.raw_optimizer,
            every=section.every,
            sample=section.sample,
            log=self._write_diagnostics,
            scaler=getattr(self.fabric.strategy.precision, "scaler", None),
            step=self.step,
        )
        if self.diagnostics_state is not None:
            diagnostics.load_state_dict(self.diagnostics_state)
        return diagnostics

    def _restore(self) -> None:
        source = self.run.checkpoint
        state = load_checkpoint(source)
        check_recipe(source, state["recipe"], self.recipe.to_dict())
        check_state(source, state["model"], self.module.state_dict())
        self.module.load_state_dict(state["model"])
        self.raw_optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        if self.averaged is not None:
            self.averaged.load_state_dict(state["averaged"])
        position, processes = state["position"], len(state["random"])
        if self.recipe.train.scale and processes != self.fabric.world_size:
            raise CheckpointError(
                f"{source} was written by {processes} process{'es' * (processes > 1)}, whose number sets the batch "
                f"size (train.scale = true); resume on as many, not on {self.fabric.world_size}."
            )
        if position["steps_per_epoch"] != self.steps_per_epoch:
            raise CheckpointError(
                f"{source} was written with {position['steps_per_epoch']} steps per epoch, but this data set gives "
                f"{self.steps_per_epoch}; resume with the same data."
            )
        self.epoch, self.done = position["epoch"], position["start"]
        self.seconds, self.train_seconds = state["seconds"], state["train_seconds"]
        self.metrics_bytes = state["metrics_bytes"]
        # Checkpoints of earlier versions have none.
        self.diagnostics_bytes, self.diagnostics_state = state.get("diagnostics_bytes", 0), state.get("diagnostics")
        self.window_images, self.epoch_sums = state["window_images"], list(state["epoch_sums"])
        self.last_training, self.last_evaluation = state["last_training"], state["last_evaluation"]
        self.started, self.taught = state.get("started"), state.get("teacher")
        self.unreadable = state.get("unreadable", {})
        self.saved_step = self.step
        rank = self.fabric.global_rank
        if rank < processes:  # else there are more now than there were
            set_random_state(state["random"][rank], self.device)
        windows = state["window"].reshape(-1, 2)
        if processes == self.fabric.world_size:
            self.window.copy_(windows[rank])
        elif rank == 0:
            self.window.copy_(windows.sum(0))

    # Running

    def run_to(self, deadline: float | None, max_steps: int | None) -> dict[str, Any]:
        """Train until the end, or until a reason to stop."""
        recipe = self.recipe
        parameters = sum(p.numel() for p in self.module.parameters())
        self.progress.line(
            f"{recipe.name}: {parameters:,} parameters, {len(self.train_images):,} training images, "
            f"{recipe.train.epochs} epochs of {self.steps_per_epoch} steps, on {self.device}"
            + (f", from step {self.step}" if self.step else "")
        )
        if self.started is not None and self.saved_step is None:
            self.progress.line(self.started["report"])
        if not self.step and self.device.type == "cpu" and recipe.train.precision == "bf16-mixed":
            slowdown = bfloat16_slowdown()
            if slowdown > 2:
                self.progress.line(
                    f"this CPU takes {slowdown:.1f} times as long in bfloat16 as in float32: "
                    "start anew with --precision 32-true"
                )
        self.deadline = deadline
        self.last_step = _NEVER if max_steps is None else self.step + max_steps
        self.clock = self.saved = self.shown = time.monotonic()
        self.timed_steps, self.timed_seconds, self.latest = 0, 0.0, ""
        try:
            with self.signals.caught(), lost_workers():
                if self.started is not None and self.saved_step is None:
                    self._save()  # from here on the run needs no other
                while self.epoch < recipe.train.epochs:
                    reason = self._train_epoch()
                    if reason != RUNNING:
                        return self._stopped(reason)
                    self._end_epoch()
                return self._finish()
        finally:
            for batches in (self.train, self.evaluation):
                batches.close()
            if self.writer is not None:
                with contextlib.suppress(OSError):
                    self.writer.close()
            if self.diagnostics is not None:
                self.diagnostics.close()
            for file in (self.metrics_file, self.diagnostics_file):
                if file is not None:
                    file.close()

    def _train_epoch(self) -> int:
        """The rest of the current epoch; gives the reason to stop, if there is one."""
        settings = self.recipe.train
        alone = self.fabric.world_size == 1
        self.model.train()
        begun = time.monotonic()
        for images, labels in self.train.epoch(self.epoch, self.done):
            self._train_step(images, labels)
            now = time.monotonic()
            self.train_seconds += now - begun
            self.timed_seconds += now - begun
            self.timed_steps += 1
            log = self.step % settings.log_every == 0 or self.done == self.steps_per_epoch
            agree = alone or log or self.step >= self.last_step
            reason, due = self._wishes(now)
            if agree and not alone:
                wishes = self._reduce(torch.tensor([reason, int(due)], device=self.device), "max")
                reason, due = int(wishes[0]), bool(wishes[1])
            if log:
                self._log()
            self._show(now)
            if agree and (reason != RUNNING or (due and self.done < self.steps_per_epoch)):
                self._save()
            if agree and reason != RUNNING:
                return reason
            begun = time.monotonic()
        return RUNNING

    def _reduce(self, values: Tensor, how: str) -> Tensor:
        """``values`` reduced ("sum", "min" or "max") over all processes."""
        if self.fabric.world_size == 1:
            return values
        reduced = self.fabric.all_reduce(values.clone(), reduce_op=how)
        return cast(Tensor, reduced)

    def _wishes(self, now: float) -> tuple[int, bool]:
        """This process's reason to stop, and whether a checkpoint is due."""
        reason = self.signals.received
        if reason == RUNNING and self.step >= self.last_step:
            reason = _MAX_STEPS
        elif reason == RUNNING and self.deadline is not None and now >= self.deadline:
            reason = _MAX_MINUTES
        return reason, now - self.saved >= 60 * self.recipe.train.checkpoint_minutes

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        recipe, step = self.recipe, self.step
        factor = lr_factor(recipe.schedule, step, self.total_steps)
        for group in self.raw_optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        shown = image_size(recipe, self.epoch)
        parts = recipe.train.accumulate or 1
        shares = zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
        loss, correct = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        for number, (some, their) in enumerate(shares, start=1):
            wait = number < parts and self.fabric.world_size > 1  # gradients are exchanged once
            with self.fabric.no_backward_sync(cast(Any, self.model), enabled=wait):
                logits = self.model(resized(some, shown))
                part = self._loss(logits, some, their) / parts
                self.fabric.backward(part)
            with torch.no_grad():
                loss += part.detach()
                likeliest = their if their.ndim == 1 else their.argmax(1)  # of images that are mixed
                correct += (logits.argmax(1) == likeliest).sum()
        if recipe.optimizer.clip_grad_norm is not None:
            self.fabric.clip_gradients(
                self.model, self.optimizer, max_norm=recipe.optimizer.clip_grad_norm, error_if_nonfinite=False
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        with torch.no_grad():
            # Read by the host only every log_every steps, so that no step waits for the device.
            self.first_bad = torch.where(loss.isfinite(), self.first_bad, self.first_bad.clamp(max=step))
            self.window += torch.stack([loss * len(labels), correct])
        self.window_images += len(labels) * self.fabric.world_size
        if self.averaged is not None and recipe.average is not None:
            begin = recipe.average.start * self.total_steps
            if step + 1 == self.total_steps or (step >= begin and (step + 1) % recipe.average.every == 0):
                self.averaged.update_parameters(self.module)
        self.done += 1

    def _loss(self, logits: Tensor, images: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.recipe.train.label_smoothing
        if self.teacher is None or self.recipe.distill is None:
            return F.cross_entropy(logits, labels, label_smoothing=smoothing)
        return distillation_loss(logits, self.teacher(images), labels, self.recipe.distill, smoothing)

    def _check_finite(self, weights: bool = False) -> None:
        """Raise if any loss since the start was not finite, or with ``weights`` any weight now is not."""
        bad = self.first_bad
        if weights:
            tensors = [t for t in self.module.state_dict().values() if t.is_floating_point()]
            finite = torch.stack([t.isfinite().all() for t in tensors]).all()
            bad = torch.where(finite, bad, bad.clamp(max=self.step))
        first = int(self._reduce(bad, "min"))
        if first == _NEVER:
            return
        epoch = min(first // self.steps_per_epoch, self.recipe.train.epochs - 1)
        lr = self.peak_lr * lr_factor(self.recipe.schedule, min(first, self.total_steps - 1), self.total_steps)
        raise NonFiniteLossError(
            f"the loss is no longer finite at step {first} (epoch {epoch + 1}, learning rate {lr:.3g}); "
            f"{self._last_good()}; "
            "try a lower optimizer.lr, or optimizer.clip_grad_norm."
        )

    def _last_good(self) -> str:
        if self.saved_step is None:
            return "no checkpoint was written before it"
        return f"{self.run.checkpoint} holds the run as it was after {self.saved_step} steps"

    def _log(self) -> None:
        """Metrics of the steps since the last ones."""
        self._check_finite()
        images = float(self.window_images)
        loss, correct = self._reduce(self.window, "sum").tolist()
        self.window.zero_()
        self.window_images = 0
        self.epoch_sums = [a + b for a, b in zip(self.epoch_sums, (loss, correct, images), strict=True)]
        lr = self.peak_lr * lr_factor(self.recipe.schedule, self.step - 1, self.total_steps)
        speed = self._speed()
        metrics = {"loss": loss / images, "accuracy": correct / images, "lr": lr, "samples_per_second": round(speed, 1)}
        self._write_metrics("train", metrics)
        self.latest = f"loss {loss / images:.4f}  train {correct / images:.2%}"

    def _show(self, now: float) -> None:
        """Progress on the screen, without reading anything from the device."""
        if now - self.shown < 0.5:
            return
        self.shown = now
        speed = self._speed()
        left = (self.total_steps - self.step) * self.batch_size / speed
        self.progress.status(
            f"epoch {self.epoch + 1}/{self.recipe.train.epochs}  step {self.step}/{self.total_steps}  "
            f"{speed:,.0f} images/s  {self.latest}  {duration(left)} left"
        )

    def _speed(self) -> float:
        """Training images per second in this process, all ranks together."""
        return self.timed_steps * self.batch_size / max(self.timed_seconds, 1e-9)

    def _end_epoch(self) -> None:
        settings = self.recipe.train
        loss, correct, images = self.epoch_sums
        self.last_training = {"loss": loss / images, "accuracy": correct / images}
        text = f"train loss {loss / images:.4f}, accuracy {correct / images:.2%}"
        done = self.epoch + 1
        if done % settings.eval_every == 0 or done == settings.epochs:
            self.last_evaluation = self._evaluate(self.module)
            self._write_metrics("evaluation", {"split": self.split, **self.last_evaluation})
            text += f"  {self.split.replace('_', '-')} accuracy {self.last_evaluation['accuracy']:.2%}"
        speed = self._speed()
        self.epoch, self.done, self.epoch_sums = done, 0, [0.0, 0.0, 0.0]
        self._save()
        left = (self.total_steps - self.step) * self.batch_size / max(speed, 1e-9)
        self.progress.line(
            f"epoch {done}/{settings.epochs}  step {self.step}  {text}  {speed:,.0f} images/s  {duration(left)} left"
        )

    def _evaluate(self, model: nn.Module) -> dict[str, Any]:
        self._share_buffers()
        result = as_result(self._reduce(count_correct(model, self.evaluation).to(self.device), "sum"))
        if not math.isfinite(result["loss"]):
            raise NonFiniteLossError(
                f"the loss on the {self.split.replace('_', '-')} images is not finite after step {self.step}; "
                f"{self._last_good()}; try a lower optimizer.lr."
            )
        return result

    def _share_buffers(self) -> None:
        """Rank 0's batch-norm statistics everywhere, as DDP does at the start of each step."""
        if self.fabric.world_size > 1:
            for buffer in self.module.buffers():
                dist.broadcast(buffer, 0)

    def _write_metrics(self, kind: str, values: dict[str, Any]) -> None:
        if self.metrics_file is None:
            return
        line = {"kind": kind, "step": self.step, "epoch": round(self.step / self.steps_per_epoch, 4), **values}
        try:
            self.metrics_file.write((json.dumps(line) + "\n").encode())
            self.metrics_file.flush()
            for key, value in values.items():
                if isinstance(value, float):
                    self.writer.add_scalar(f"{kind}/{key}", value, self.step)
            self.writer.flush()
        except OSError as error:
            raise write_error(self.run.metrics, error) from error

    def _write_diagnostics(self, record: dict[str, Any]) -> None:
        from abste.diagnostics import write_scalars

        try:
            self.diagnostics_file.write((json.dumps(record) + "\n").encode())
            self.diagnostics_file.flush()
            write_scalars(self.writer, record)
        except OSError as error:
            raise write_error(self.run.diagnostics, error) from error

    # Saving

    def _save(self) -> None:
        """Write the checkpoint, unless there is something wrong with what it would hold."""
        self._check_finite(weights=True)
        self._share_buffers()
        unreadable = self.train.unreadable | self.evaluation.unreadable
        states: list[Any] = [(random_state(self.device), self.window.cpu(), unreadable)]
        if self.fabric.world_size > 1:
            gathered: list[Any] = [None] * self.fabric.world_size
            dist.all_gather_object(gathered, states[0])
            states = gathered
        on_rank_zero(self.fabric, lambda: self._write_checkpoint(states))
        self.saved, self.saved_step = time.monotonic(), self.step

    def _write_checkpoint(self, states: list[Any]) -> None:
        now = time.monotonic()
        self.seconds += now - self.clock
        self.clock = now
        for *_, unreadable in states:
            self.unreadable |= unreadable
        try:
            for file in (self.metrics_file, self.diagnostics_file):
                if file is not None:
                    os.fsync(file.fileno())
        except OSError as error:
            raise write_error(self.run.metrics, error) from error
        state = {
            "recipe": self.recipe.to_dict(),
            "model": self.module.state_dict(),
            "averaged": None if self.averaged is None else self.averaged.state_dict(),
            "optimizer": self.raw_optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "precision": self.fabric.strategy.precision.state_dict(),
            "random": [state for state, *_ in states],
            "window": torch.stack([window for _, window, _ in states]),
            "position": {"epoch": self.epoch, "start": self.done, "steps_per_epoch": self.steps_per_epoch},
            "seconds": self.seconds,
            "train_seconds": self.train_seconds,
            "metrics_bytes": self.metrics_file.tell(),
            "diagnostics_bytes": 0 if self.diagnostics_file is None else self.diagnostics_file.tell(),
            "diagnostics": None if self.diagnostics is None else self.diagnostics.state_dict(),
            "window_images": self.window_images,
            "epoch_sums": self.epoch_sums,
            "last_training": self.last_training,
            "last_evaluation": self.last_evaluation,
            "started": self.started,
            "teacher": None if self.teacher is None else self.teacher.record,
            "unreadable": self.unreadable,
        }
        save_checkpoint(self.run.checkpoint, state)

    def _stopped(self, reason: int) -> dict[str, Any]:
        where = f"after {self.step} of {self.total_steps} steps; {self.run.checkpoint} is written"
        if reason < _MAX_MINUTES:
            raise Interrupted(reason, f"stopped by {signal.Signals(reason).name} {where}")
        why = "max_minutes" if reason == _MAX_MINUTES else "max_steps"
        self.progress.line(f"stopped by {why} {where}")
        return {"finished": False, "stopped": why, "epoch": self.epoch, "step": self.step}

    def _finish(self) -> dict[str, Any]:
        """Weights and summary of a finished run."""
        recipe = self.recipe
        averaged = None
        if self.averaged is not None:
            network = self.averaged.module
            recalibrated(network, recipe, self.train_images, self.device)
            averaged = self._evaluate(network)
        return on_rank_zero(self.fabric, lambda: self._write_results(averaged))

    def _write_results(self, averaged: dict[str, Any] | None) -> dict[str, Any]:
        recipe, run = self.recipe, self.run
        now = time.monotonic()
        self.seconds += now - self.clock
        digests = {run.weights.name: _write_weights(run.weights, self.module, recipe)}
        if self.averaged is not None:
            digests[run.averaged_weights.name] = _write_weights(run.averaged_weights, self.averaged.module, recipe)
        samples = self.total_steps * self.batch_size
        summary: dict[str, Any] = {
            "name": recipe.name,
            "finished": True,
            self.split: {**(self.last_evaluation or {}), "epoch": recipe.train.epochs, "precision": "float32"},
        }
        if averaged is not None:
            summary["averaged"] = {
                self.split: {**averaged, "epoch": recipe.train.epochs, "precision": "float32"},
                "batch_norm": f"recalibrated on the {len(self.train_images)} training images",
            }
        if self.started is not None:
            summary["init"] = self.started
        if self.teacher is not None:
            summary["teacher"] = self.teacher.record
        if recipe.data.on_error == "skip":
            summary["unreadable"] = {"count": len(self.unreadable), "images": self.unreadable}
        summary |= {
            "train": self.last_training,
            "cost": {
                "seconds": round(self.seconds, 3),
                "train_seconds": round(self.train_seconds, 3),
                "samples_per_second": round(samples / max(self.train_seconds, 1e-9), 1),
                "epochs": recipe.train.epochs,
                "steps": self.total_steps,
                "samples": samples,
                "forward_macs": self.macs,
                **self._flops(),
                "parameters": sum(p.numel() for p in self.module.parameters()),
                "processes": self.fabric.world_size,
            },
            "resumes": len(run.sessions.read_text(encoding="utf-8").splitlines()) - 1,
            "environment": environment(self.device),
            "git": self.git,
            "sha256": digests,
            "recipe": recipe.to_dict(),
        }
        write_json(run.summary, summary)
        return summary

    def _flops(self) -> dict[str, Any]:
        epochs, rule, macs = self.recipe.train.epochs, "6 x MACs of one forward pass", 6 * self.macs_of_all_epochs
        if self.recipe.train.image_sizes is not None:
            rule += " at the size of the epoch"
        if self.teacher is not None:
            rule, macs = f"({rule} + 2 x those of the teacher)", macs + 2 * self.teacher.macs * epochs
        samples_per_epoch = self.steps_per_epoch * self.batch_size
        return {"estimated_training_flops": macs * samples_per_epoch, "flops_rule": f"{rule} x samples seen"}


def _open_lines(path: Path, size: int) -> Any:
    """A file of lines to append to, without those after the last checkpoint, which will come again."""
    file = open(path, "ab")  # noqa: SIM115, closed with the run
    file.truncate(min(size, file.tell()))
    file.seek(0, os.SEEK_END)
    return file


def _write_weights(path: Path, module: nn.Module, recipe: Recipe) -> str:
    """Write a state dict as safetensors and give the file's SHA-256."""
    data = weights_file(module.state_dict(), recipe)
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()
