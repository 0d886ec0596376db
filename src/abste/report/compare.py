"""Running a study: its runs as processes, side by side, and what they say together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abste.errors import AbsteError, ConfigError, RunError
from abste.report.study import Planned, Study
from abste.train.files import write_atomic
from abste.train.progress import duration
from abste.train.recipe import first_difference
from abste.train.run import RunDirectory, build_model

PATIENCE = 3
"""Runs that may fail alike at the start before the others are not tried."""


STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)
"""Exit status of a run that was asked to stop."""


@dataclass(frozen=True)
class Finished:
    """What a finished run of a study has to say."""

    planned: Planned
    split: str
    accuracy: float
    """Of the last epoch, in per cent; of the averaged weights, where the recipe has ``[average]``."""
    step_ms: float
    """Milliseconds per training step."""
    summary: dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """What became of a call of :func:`run_study`."""

    finished: int
    failed: dict[str, str]
    """Last line of the log of each run that ended with an error."""
    elsewhere: list[str]
    """Runs that another process is at."""
    stopped: bool
    """Whether time ran out before all was done."""


def check_directories(runs: Sequence[Planned], out: Path) -> None:
    """See that every run directory there is one of this study, finished or not.

    Raises:
        RunError: one holds something else, or a run with another recipe: two recipes in one comparison.
    """
    for planned in runs:
        run = RunDirectory(out / planned.path)
        if not run.path.exists():
            continue
        if not run.exists():
            if run.path.is_dir() and all(path == run.lock for path in run.path.iterdir()):
                continue
            raise RunError(
                f"{run.path} holds no run of abste and is where this study would put one; choose another --out."
            )
        theirs, ours = run.read_recipe(), planned.recipe.to_dict()
        for key in ("classes", "holdout"):  # a plan that says None leaves them to the files of the data set
            if getattr(planned.recipe.data, key) is None:
                ours["data"][key] = getattr(theirs.data, key)
        difference = first_difference(theirs.to_dict(), ours)
        if difference is not None:
            name, trained, said = difference
            raise RunError(
                f"{run.path} was trained with {name} = {trained!r} and this study says {said!r}: "
                "they do not belong into one comparison; choose another --out, or remove that run."
            )


def check_arms(runs: Sequence[Planned]) -> None:
    """Build every network that the runs train once, so that a wrong one is known before hours are spent on others.

    Raises:
        ConfigError, ConversionError: an unknown estimator, model or argument, or a network that cannot be binarised.
    """
    seen: set[tuple[str, str]] = set()
    for planned in runs:
        if (planned.setting, planned.arm) not in seen:
            seen.add((planned.setting, planned.arm))
            try:
                build_model(planned.recipe)
            except AbsteError as error:
                raise type(error)(f"{planned.setting}, {planned.arm}: {error}") from None


def read_finished(runs: Sequence[Planned], out: Path) -> list[Finished]:
    """The runs that are done, in the order of the plan.

    Raises:
        RunError: a summary that is damaged, or a run that does not belong here (see :func:`check_directories`).
    """
    check_directories(runs, out)
    found = []
    for planned in runs:
        run = RunDirectory(out / planned.path)
        summary = run.read_summary()
        if summary is None:
            continue
        split = "held_out" if run.read_recipe().data.holdout else "test"
        try:
            accuracy, cost = _accuracy(summary, split), summary["cost"]
            step_ms = 1000 * cost["train_seconds"] / cost["steps"]
        except (KeyError, TypeError):
            raise RunError(f"{run.summary} is not the summary of a run with this recipe.") from None
        found.append(Finished(planned, split, accuracy, step_ms, summary))
    return found


def _accuracy(summary: dict[str, Any], split: str) -> float:
    return 100.0 * float(summary.get("averaged", summary)[split]["accuracy"])


def default_jobs(runs: Sequence[Planned]) -> int:
    """Runs side by side: as many as the cores have threads for, or one on a machine with a GPU."""
    import torch

    threads = max((planned.recipe.train.threads or torch.get_num_threads() for planned in runs), default=1)
    return 1 if torch.cuda.is_available() else max(1, (os.cpu_count() or 1) // threads)


class _Child:
    """One run in a process of its own."""

    def __init__(self, planned: Planned, out: Path, data: str | Path | None) -> None:
        self.planned = planned
        self.run = RunDirectory(out / planned.path)
        folder, name = self.run.path.parent, self.run.path.name
        folder.mkdir(parents=True, exist_ok=True)
        recipe = folder / f"{name}.toml"
        write_atomic(recipe, planned.recipe.to_toml().encode())
        # -P: with -m, Python would look for every module in the current directory first.
        command = [sys.executable, "-P", "-m", "abste", "train", str(recipe), "--out", str(self.run.path)]
        command += ["--data", str(data)] if data is not None else []
        command += ["--resume"] if self.run.exists() else []
        threads = planned.recipe.train.threads
        environment = dict(os.environ) if threads is None else {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.log = folder / f"{name}.log"
        self.started = time.monotonic()
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment)

    def last_line(self) -> str:
        """What the run said last."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1].removeprefix("abste: error: ") if lines else "it said nothing"


def run_study(
    study: Study,
    out: str | Path,
    data: str | Path | None,
    *,
    jobs: int | None = None,
    tasks: Sequence[int] | None = None,
    max_minutes: float | None = None,
    say: Callable[[str], None] = print,
) -> Outcome:
    """Start what is missing of a study's runs, each as a process, and wait for them.

    It can be stopped at any moment and called again: runs go on from their last checkpoint, finished ones stay.

    Args:
        study: from :func:`~abste.report.load_study`.
        out: the directory of the study. Each run gets ``SETTING/ARM/seed-N`` in it, and beside that its recipe and log.
        data: the folder of the data set; embedded data needs none.
        jobs: runs side by side; by default :func:`default_jobs`.
        tasks: numbers of the runs to do, from 0 in the order of ``study.plan()``; by default all.
        max_minutes: stop cleanly after so long.
        say: gets a line of progress when a run ends.

    Raises:
        ConfigError: a task that there is none of, or an argument out of range; or see :func:`check_arms`.
        RunError: see :func:`check_directories`; or the first runs all failed alike.
        KeyboardInterrupt: a signal arrived; all runs have written a checkpoint.
    """
    out, plan = Path(out), study.plan()
    if jobs is not None and jobs < 1:
        raise ConfigError(f"jobs must be at least 1, not {jobs}.")
    if max_minutes is not None and not max_minutes >= 0:
        raise ConfigError(f"max_minutes must be at least 0, not {max_minutes}.")
    for task in tasks or ():
        if not 0 <= task < len(plan):
            raise ConfigError(f"study '{study.name}' has runs 0 to {len(plan) - 1}, there is no {task}.")
    runs = plan if tasks is None else [plan[task] for task in dict.fromkeys(tasks)]
    check_arms(runs)
    check_directories(runs, out)
    waiting = [planned for planned in runs if RunDirectory(out / planned.path).read_summary() is None]
    done, total = len(runs) - len(waiting), len(runs)
    say(f"{total} runs, {done} of them done")
    side_by_side = jobs or default_jobs(runs)
    started = time.monotonic()
    deadline = None if max_minutes is None else started + 60 * max_minutes
    failed: dict[str, str] = {}
    elsewhere: list[str] = []
    running: list[_Child] = []
    ended = 0
    with _stopping(running):
        while waiting or running:
            late = deadline is not None and time.monotonic() >= deadline
            if late and not running:
                break
            if late:
                _stop(running)
            while waiting and len(running) < side_by_side and not late:
                running.append(_Child(waiting.pop(0), out, data))
            time.sleep(0.1)
            for child in [child for child in running if child.process.poll() is not None]:
                running.remove(child)
                name, status = str(child.planned), child.process.returncode
                summary = child.run.read_summary() if status == 0 else None
                if summary is not None:
                    done, ended = done + 1, ended + 1
                    split = "held_out" if "held_out" in summary else "test"
                    left = (time.monotonic() - started) / ended * (total - done - len(failed) - len(elsewhere))
                    say(
                        f"[{done}/{total}] {name}: {_accuracy(summary, split):.2f} % {split.replace('_', '-')} "
                        f"in {duration(time.monotonic() - child.started)}, {duration(left)} left"
                    )
                elif not (late and status in STOPPED):
                    why = child.last_line()
                    if status < 0 or status in STOPPED:
                        number = _signal(-status if status < 0 else status - 128)
                        why = f"ended by {number}, which this command did not send"
                    if "is in use by another process" in why:
                        elsewhere.append(name)
                    else:
                        failed[name] = why
                        say(f"{name} failed: {why}")
                        if ended == 0 and len(failed) == PATIENCE and len(set(failed.values())) == 1:
                            raise RunError(f"the first {PATIENCE} runs all failed, so the rest was not started: {why}")
    return Outcome(done, failed, elsewhere, done + len(failed) + len(elsewhere) < total)


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _stop(children: Sequence[_Child]) -> None:
    """Ask every run to write its checkpoint and end, and wait for that."""
    for child in children:
        with contextlib.suppress(ProcessLookupError):
            child.process.terminate()
    for child in children:
        child.process.wait()


@contextlib.contextmanager
def _stopping(children: list[_Child]) -> Iterator[None]:
    """Whatever ends the block, a signal or an error, ends the runs too, after their checkpoints."""

    def interrupt(number: int, _: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread
        before = None
    try:
        yield
    finally:
        with contextlib.suppress(AbsteError):
            _stop(children)
        if before is not None:
            signal.signal(signal.SIGTERM, before)
