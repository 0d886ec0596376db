"""Studies that really run: processes that train on digits, stopped, continued, failing, left alone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abste.cli import main
from abste.errors import ConfigError, RunError
from abste.report import load_study, read_finished, run_study

STUDY = """
description = "two seeds of very little"
recipe = "digits-resnet8-w1a32"
seeds = [0, 1]
set = { "train.epochs" = 1, "model.kwargs.width" = 4, "data.holdout" = 300 }
controls = []

[settings.w1a32]

[arms.ab_tanh]
estimator = "ab_tanh"
"""


@pytest.fixture(scope="module")
def study_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("study") / "little.toml"
    path.write_text(STUDY)
    return path


@pytest.fixture(scope="module")
def done(study_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of the finished study, which ran from the command line and was stopped once in between."""
    out = tmp_path_factory.mktemp("out") / "little"
    command = [sys.executable, "-m", "abste", "compare", str(study_file), "--out", str(out), "--jobs", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not list(out.glob("*/*/seed-0/recipe.toml")):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on from there" in output
    assert not list(out.glob("*/*/seed-1/recipe.toml")), "the rest was not started"
    finished = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (out / "output").write_text(finished.stdout)
    return out


def copy(done: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(done, tmp_path / "copy"))


def test_command(done: Path, study_file: Path) -> None:
    output = (done / "output").read_text()
    assert output.startswith("4 runs, ") and "[4/4] " in output and "0 s left" in output
    assert f"wrote {done / 'report.md'}" in output and (done / "report.md").read_text() in output
    report = json.loads((done / "report.json").read_text())
    (setting,) = report["settings"]
    assert report["finished"] == report["planned"] == 4 and setting["split"] == "held_out"
    for arm in setting["arms"]:
        for seed, accuracy in arm["accuracies"].items():
            run = done / "w1a32" / arm["arm"] / f"seed-{seed}"
            assert json.loads((run / "summary.json").read_text())["held_out"]["accuracy"] * 100 == accuracy
    assert {arm["arm"]: len(arm["accuracies"]) for arm in setting["arms"]} == {"ste": 2, "ab_tanh": 2}
    assert len(read_finished(load_study(study_file).plan(), done)) == 4


def test_what_is_done_stays(done: Path, study_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.glob("*/*/*/*")}
    assert main(["compare", str(study_file), "--out", str(done)]) == 0
    assert capsys.readouterr().out.startswith("4 runs, 4 of them done\n\n# little\n\ntwo seeds of very little")
    assert {path: path.stat().st_mtime_ns for path in done.glob("*/*/*/*")} == before


def test_list_and_report_start_nothing(
    done: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", str(study_file), "--list"]) == 0
    assert capsys.readouterr().out.splitlines()[1] == "1  w1a32/ab_tanh/seed-0"
    assert main(["compare", str(study_file), "--out", str(tmp_path / "new"), "--report"]) == 0
    assert capsys.readouterr().out == "no run is done yet\n" and not (tmp_path / "new").exists()
    out = copy(done, tmp_path)
    shutil.rmtree(out / "w1a32" / "ab_tanh" / "seed-1")
    assert main(["compare", str(study_file), "--out", str(out), "--report"]) == 0
    assert "Unfinished: 3 of 4 runs are done." in (out / "report.md").read_text()
    assert not (out / "w1a32" / "ab_tanh" / "seed-1").exists()


def test_task_does_one_run_and_writes_no_report(done: Path, study_file: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path)
    (out / "report.md").unlink()
    expected = (out / "w1a32" / "ab_tanh" / "seed-1" / "weights.safetensors").read_bytes()
    for arm in ("ste", "ab_tanh"):
        shutil.rmtree(out / "w1a32" / arm / "seed-1")
    assert main(["compare", str(study_file), "--out", str(out), "--task", "3"]) == 0
    assert (out / "w1a32" / "ab_tanh" / "seed-1" / "weights.safetensors").read_bytes() == expected
    assert not (out / "w1a32" / "ste" / "seed-1").exists() and not (out / "report.md").exists()


def test_max_minutes(study_file: Path, tmp_path: Path) -> None:
    said: list[str] = []
    outcome = run_study(load_study(study_file), tmp_path / "out", None, max_minutes=0, say=said.append)
    assert outcome.stopped and outcome.finished == 0 and said == ["4 runs, 0 of them done"]


def test_a_run_that_something_else_ends_has_failed(study_file: Path, tmp_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        out, said = tmp_path / number.name, []

        def end(out: Path = out, number: signal.Signals = number) -> None:
            log = out / "w1a32" / "ste" / "seed-0.log"
            until = time.monotonic() + 120
            while not (log.exists() and log.read_text()) and time.monotonic() < until:
                time.sleep(0.02)
            (child,) = subprocess.run(
                ["pgrep", "-f", str(out / "w1a32" / "ste")], capture_output=True, text=True, check=True
            ).stdout.split()
            os.kill(int(child), number)

        killer = threading.Thread(target=end)
        killer.start()
        outcome = run_study(load_study(study_file), out, None, tasks=[0, 0], say=said.append)
        killer.join()
        assert not outcome.stopped and list(outcome.failed) == ["w1a32/ste/seed-0"]
        assert outcome.failed["w1a32/ste/seed-0"] == f"ended by {number.name}, which this command did not send"
        assert said[0] == "1 runs, 0 of them done"


def test_what_the_files_tell_is_no_other_recipe(done: Path, study_file: Path, tmp_path: Path) -> None:
    out, plan = copy(done, tmp_path), load_study(study_file).plan()
    unknown = [  # as in the plan of a study on a folder of images
        replace(run, recipe=run.recipe.model_copy(
            update={"data": run.recipe.data.model_copy(update={"classes": None, "holdout": None})}
        ))
        for run in plan
    ]  # fmt: skip
    assert [run.split for run in read_finished(unknown, out)] == ["held_out"] * 4
    other = [replace(run, recipe=run.recipe.model_copy(
        update={"data": run.recipe.data.model_copy(update={"holdout": 100})}
    )) for run in plan]  # fmt: skip
    with pytest.raises(RunError, match=r"was trained with data\.holdout = 300 and this study says 100"):
        read_finished(other, out)


def test_a_run_that_fails_is_named_and_the_others_go_on(
    done: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = copy(done, tmp_path)
    run = out / "w1a32" / "ab_tanh" / "seed-0"
    (run / "summary.json").unlink()
    checkpoint = run / "last.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-100])
    assert main(["compare", str(study_file), "--out", str(out)]) == 1
    output = capsys.readouterr().out
    assert "w1a32/ab_tanh/seed-0 failed: " in output and "last.ckpt" in output and "1 failed" in output
    assert "Unfinished: 3 of 4 runs are done." in output


def test_what_fails_everywhere_is_not_tried_everywhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "all.toml"
    study.write_text(STUDY.replace('"train.epochs"', '"data.classes" = 7, "train.epochs"'))
    assert main(["compare", str(study), "--out", str(tmp_path / "out"), "--jobs", "1"]) == 2
    output = capsys.readouterr()
    why = "data set 'digits' has 10 classes, but data.classes is 7."
    assert output.err == f"abste: error: the first 3 runs all failed, so the rest was not started: {why}\n"
    assert output.out.count(" failed: ") == 3


def test_a_run_in_use_is_left_alone(
    done: Path, study_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from abste.train.run import RunDirectory

    out = copy(done, tmp_path)
    run = RunDirectory(out / "w1a32" / "ab_tanh" / "seed-0")
    run.summary.unlink()
    with run.owned(resume=True):
        assert main(["compare", str(study_file), "--out", str(out)]) == 0
    assert "w1a32/ab_tanh/seed-0 is left to the process that is at it" in capsys.readouterr().out


def test_averaged_weights_are_what_is_scored(tmp_path: Path) -> None:
    study, out = tmp_path / "averaged.toml", tmp_path / "out"
    averaging = '"average.method" = "ema", "average.decay" = 0.5'
    study.write_text(STUDY.replace("[0, 1]", "[0]").replace("set = { ", f"set = {{ {averaging}, "))
    assert main(["compare", str(study), "--out", str(out)]) == 0
    summaries = [json.loads(path.read_text()) for path in sorted(out.glob("*/*/*/summary.json"))]
    scored = sorted(run.accuracy for run in read_finished(load_study(study).plan(), out))
    assert scored == sorted(100 * summary["averaged"]["held_out"]["accuracy"] for summary in summaries)
    assert any(summary["averaged"]["held_out"] != summary["held_out"] for summary in summaries)


def altered(out: Path, what: str) -> None:
    run = out / "w1a32" / "ab_tanh" / "seed-0"
    if what == "recipe":
        (run / "recipe.toml").write_text((run / "recipe.toml").read_text().replace("lr = 0.2", "lr = 0.3"))
    elif what == "foreign":
        shutil.rmtree(run)
        run.mkdir()
        (run / "thesis.tex").write_text("irreplaceable")
    else:
        summary = json.loads((run / "summary.json").read_text())
        summary["test"] = summary.pop("held_out")
        (run / "summary.json").write_text(json.dumps(summary))


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "recipe",
            r"seed-0 was trained with optimizer\.lr = 0\.3 and this study says 0\.2: they do not belong into one",
        ),
        ("foreign", r"seed-0 holds no run of abste and is where this study would put one; choose another --out\.$"),
        ("summary", r"summary\.json is not the summary of a run with this recipe\.$"),
    ],
)
def test_what_does_not_belong(what: str, message: str, done: Path, study_file: Path, tmp_path: Path) -> None:
    out = copy(done, tmp_path)
    altered(out, what)
    before = sorted((path, path.stat().st_size) for path in out.rglob("*"))
    study = load_study(study_file)
    with pytest.raises(RunError, match=message):
        read_finished(study.plan(), out)
    if what != "summary":
        with pytest.raises(RunError, match=message):
            run_study(study, out, None, say=lambda line: None)
    assert sorted((path, path.stat().st_size) for path in out.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"jobs": 0}, "jobs must be at least 1, not 0."),
        ({"max_minutes": -1}, "max_minutes must be at least 0, not -1."),
        ({"tasks": [4]}, "study 'little' has runs 0 to 3, there is no 4."),
    ],
    ids=["jobs", "max_minutes", "tasks"],
)
def test_bad_arguments(arguments: Any, message: str, study_file: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        run_study(load_study(study_file), tmp_path / "out", None, **arguments)
    assert str(caught.value) == message and not (tmp_path / "out").exists()


def test_an_unknown_estimator_is_known_before_anything_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    study = tmp_path / "typo.toml"
    study.write_text(STUDY + '[arms.typo]\nestimator = "ab_tahn"\n')
    assert main(["compare", str(study), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error == "abste: error: w1a32, typo: unknown estimator 'ab_tahn'; did you mean 'ab_tanh' or 'ab_arctan'?\n"
    assert not (tmp_path / "out").exists()
    assert main(["compare", str(study)]) == 2
    assert capsys.readouterr().err == "abste: error: compare needs --out, the directory of the study.\n"
