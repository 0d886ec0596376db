"""What the finished runs of a study support: tables and sentences."""

from __future__ import annotations

import math
import statistics as middle
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from abste.report.compare import Finished
from abste.report.statistics import ALPHA, POWER, Paired, detectable, holm, paired, pooled, spread
from abste.report.study import SHAPE_REMOVED, Study


@dataclass(frozen=True)
class ArmResult:
    """One arm in one setting, at its best learning rate: the one with the best mean over the seeds that all rates have.

    Where they have none in common yet, it is the one with the most seeds, ``chosen`` is False, and there is no
    difference. Accuracies are those of the last epoch, in per cent, and of the averaged weights where an arm averages;
    ``difference`` is to the control's at the same seeds, in points, and ``p_holm`` is adjusted for the number of arms
    in the setting. ``epochs`` and ``training_flops`` are those of one run.
    """

    setting: str
    arm: str
    lr_scale: float
    accuracies: dict[int, float]
    mean: float
    sd: float
    step_ms: float
    step_ratio: float
    difference: Paired | None
    p_holm: float | None
    detectable: float | None
    """Smallest true difference to the control that is found with probability POWER with this arm's seeds, in points."""
    by_lr_scale: dict[float, float]
    chosen: bool
    epochs: float
    training_flops: float


@dataclass(frozen=True)
class SettingResult:
    """All arms of one setting."""

    setting: str
    split: str
    arms: list[ArmResult]
    shape: dict[str, Paired]
    """AB-STE arms minus their shape-removed controls."""
    detectable: float
    """Smallest true difference to the control that is found with probability POWER, in points, with the most seeds that
    an arm has in common with it."""
    seeds: int
    """Most that an arm has."""
    missing: dict[str, int]
    """How many seeds an arm lacks, at the rate that it is compared at."""


@dataclass(frozen=True)
class Comparison:
    """A study's result; ``str()`` of it is Markdown."""

    study: Study
    settings: list[SettingResult]
    finished: int
    planned: int
    commits: list[str]
    machines: list[str]

    def to_dict(self) -> dict[str, Any]:
        """For JSON: infinite limits and unknown spreads are None."""
        tables: dict[str, Any] = _finite(
            {
                "study": self.study.model_dump(exclude={"folder"}, exclude_none=True),
                "finished": self.finished,
                "planned": self.planned,
                "commits": self.commits,
                "machines": self.machines,
                "settings": [asdict(setting) for setting in self.settings],
            }
        )
        return tables

    def __str__(self) -> str:
        parts = [f"# {self.study.name}", self.study.description]
        if self.finished < self.planned:
            parts.append(f"Unfinished: {self.finished} of {self.planned} runs are done.")
        parts += [_markdown(setting, self.study) for setting in self.settings]
        commits, machines = ", ".join(self.commits), "; ".join(self.machines)
        parts.append(
            "Accuracy of the last epoch (of the averaged weights, where an arm averages), mean ± standard deviation "
            f"over seeds. Differences are paired by seed, with {1 - ALPHA:.0%} Student-t intervals; p is two-sided "
            f"and adjusted by Holm for the arms of a setting. Time per step is the median over runs. "
            f"Commits: {commits}. Machines: {machines}."
        )
        return "\n\n".join(part for part in parts if part) + "\n"


def compare_runs(study: Study, runs: Sequence[Finished], planned: int) -> Comparison:
    """What the finished runs of a study say."""
    commits: dict[str, None] = {}  # as ordered sets
    machines: dict[str, None] = {}
    for run in runs:
        git, where = run.summary.get("git") or {}, run.summary.get("environment", {})
        commits[git.get("commit", "unknown")[:10] + (" and changes" if git.get("modified") else "")] = None
        machines[f"{where.get('cpu')}, {where.get('cpus')} CPUs, torch {where.get('torch')}"] = None
    settings = [
        result
        for name in study.settings
        if (result := _setting(study, name, [run for run in runs if run.planned.setting == name])) is not None
    ]
    return Comparison(study, settings, len(runs), planned, list(commits), list(machines))


def _setting(study: Study, name: str, runs: Sequence[Finished]) -> SettingResult | None:
    if not runs:
        return None
    found: dict[str, list[Finished]] = {}
    rates: dict[str, dict[float, float]] = {}
    undecided: list[str] = []
    for arm in study.arms_in(name):
        by_scale: dict[float, dict[int, Finished]] = {scale: {} for scale in study.lr_scale}
        for run in runs:
            if run.planned.arm == arm:
                by_scale[run.planned.lr_scale][run.planned.seed] = run
        done = {scale: by_seed for scale, by_seed in by_scale.items() if by_seed}
        if not done:
            continue
        common = set.intersection(*(set(by_seed) for by_seed in by_scale.values()))
        if common:
            best = max(done, key=lambda scale: middle.fmean(done[scale][seed].accuracy for seed in common))
        else:
            best = max(done, key=lambda scale: len(done[scale]))
            undecided.append(arm)
        found[arm] = [run for _, run in sorted(done[best].items())]
        rates[arm] = {scale: middle.fmean(run.accuracy for run in of.values()) for scale, of in done.items()}
    accuracies = {arm: {run.planned.seed: run.accuracy for run in of} for arm, of in found.items()}
    times = {arm: middle.median(run.step_ms for run in of) for arm, of in found.items()}
    control = study.control
    comparable = {arm: of for arm, of in accuracies.items() if arm not in undecided}
    differences = {
        arm: difference
        for arm in comparable
        if arm != control and (difference := _difference(comparable, arm, control)) is not None
    }
    adjusted = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    # A study under way has arms of one seed, too.
    sd = pooled([(d.sd, d.n) for d in differences.values()])

    def detected(pairs: int) -> float:
        return detectable(sd, pairs, max(1, len(differences)))

    results = [
        ArmResult(
            setting=name,
            arm=arm,
            lr_scale=of[0].planned.lr_scale,
            accuracies=accuracies[arm],
            mean=middle.fmean(accuracies[arm].values()),
            sd=spread(list(accuracies[arm].values())),
            step_ms=times[arm],
            step_ratio=times[arm] / times[control] if control in times else math.nan,
            difference=differences.get(arm),
            p_holm=adjusted.get(arm),
            detectable=detected(differences[arm].n) if arm in differences else None,
            by_lr_scale=rates[arm],
            chosen=arm not in undecided,
            epochs=of[0].summary["cost"]["epochs"],
            training_flops=of[0].summary["cost"]["estimated_training_flops"],
        )
        for arm, of in found.items()
    ]
    shape = {
        arm: difference
        for arm in comparable
        if (difference := _difference(comparable, arm, arm + SHAPE_REMOVED)) is not None
    }
    return SettingResult(
        setting=name,
        split=runs[0].split,
        arms=sorted(results, key=lambda result: -result.mean),
        shape=shape,
        detectable=detected(max((d.n for d in differences.values()), default=0)),
        seeds=max(len(of) for of in found.values()),
        missing={arm: lack for arm in study.arms_in(name) if (lack := len(study.seeds) - len(found.get(arm, ()))) > 0},
    )


def _difference(accuracies: Mapping[str, Mapping[int, float]], arm: str, control: str) -> Paired | None:
    if control not in accuracies:
        return None
    common = [seed for seed in accuracies[arm] if seed in accuracies[control]]
    return paired([accuracies[arm][seed] - accuracies[control][seed] for seed in common]) if common else None


# Words


def _markdown(result: SettingResult, study: Study) -> str:
    tuned = len(study.lr_scale) > 1
    split = result.split.replace("_", "-")
    lines = [
        f"## {result.setting}",
        "",
        f"| arm | n | {split} accuracy, % | difference to {study.control}, points | p | time per step |"
        + (" learning rate |" if tuned else ""),
        "|---|---|---|---|---|---|" + ("---|" if tuned else ""),
    ]
    for arm in result.arms:
        sd = "" if math.isnan(arm.sd) else f" ± {arm.sd:.2f}"
        ratio = "" if math.isnan(arm.step_ratio) else f", {arm.step_ratio:.2f} x"
        lines.append(
            f"| {arm.arm} | {len(arm.accuracies)} | {arm.mean:.2f}{sd} | {_interval(arm.difference)} | "
            f"{'' if arm.p_holm is None else _p(arm.p_holm)} | {arm.step_ms:.0f} ms{ratio} |"
            + (f" x {arm.lr_scale:g} |" if tuned else "")
        )
    lines += ["", *(f"- {sentence}" for sentence in sentences(result, study.control))]
    return "\n".join(lines)


def _interval(difference: Paired | None) -> str:
    if difference is None:
        return ""
    if math.isinf(difference.high):
        return f"{difference.mean:+.2f} ({'one pair' if difference.n < 2 else 'no spread'})"
    return f"{difference.mean:+.2f} ({difference.low:+.2f} to {difference.high:+.2f})"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def sentences(result: SettingResult, control: str) -> list[str]:
    """What the data support, in words."""
    undecided = [arm.arm for arm in result.arms if not arm.chosen]
    found = []
    if undecided:
        found.append(
            f"Not compared yet, since their learning rates have no seed in common to choose by: {', '.join(undecided)}."
        )
    if result.seeds < 2:
        return [*found, "One seed per arm: these are single runs, not a ranking."]
    if result.missing:
        lacking = ", ".join(f"{arm} ({lack})" for arm, lack in result.missing.items())
        found.append(f"Runs are missing, and what they would say is not in the above: {lacking}.")
    others = [arm for arm in result.arms if arm.difference is not None and arm.difference.n > 1]
    if not others:
        found.append(f"No arm has two seeds in common with {control}: nothing is shown.")
    for arm, difference in ((arm, arm.difference) for arm in others):
        if difference is not None and arm.p_holm is not None and arm.p_holm < ALPHA:
            word = "better" if difference.mean > 0 else "worse"
            found.append(f"{arm.arm} is {word} than {control} by {_range(difference)} points (p {_p(arm.p_holm)}).")
    level = [arm for arm in others if arm.p_holm is not None and arm.p_holm >= ALPHA]
    if level:
        found.append(f"Not shown to differ from {control}: {', '.join(arm.arm for arm in level)}.")
        figures = [f"{arm.detectable:.2f}" for arm in level if arm.detectable and math.isfinite(arm.detectable)]
        if figures:  # of all or of none: it is one spread
            each = " and ".join(f"{figure} ({arm.arm})" for figure, arm in zip(figures, level, strict=True))
            what = f"a true difference of {figures[0]}" if len(set(figures)) == 1 else f"true differences of {each}"
            found[-1] += (
                f" With these seeds {what} points would have been found with probability {POWER:g}; smaller ones may "
                "exist."
            )
    adjusted = holm([difference.p for difference in result.shape.values()])
    for (name, difference), p in zip(result.shape.items(), adjusted, strict=True):
        if difference.n < 2:
            continue
        if p < ALPHA:
            word = "better" if difference.mean > 0 else "worse"
            found.append(
                f"The shape of {name}'s slope matters: it is {word} than its mean alone by {_range(difference)} points "
                f"(p {_p(p)})."
            )
        else:
            found.append(
                f"{name} is not shown to differ from its shape-removed control ({_interval(difference)} points): what "
                "it does may be the doing of its mean slope and clip."
            )
    return found


def _range(difference: Paired) -> str:
    low, high = sorted((abs(difference.low), abs(difference.high)))
    return f"{abs(difference.mean):.2f} ({low:.2f} to {high:.2f})"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
