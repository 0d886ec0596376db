from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import abste
from abste.data import Splits
from abste.deploy.runs import export_run
from abste.errors import AbsteError, CheckpointError, ConfigError, DataError, NonFiniteLossError, RunError
from abste.train import Recipe, evaluate, fit, load_recipe, load_run, loop
from abste.train.checkpoint import load_checkpoint
from abste.train.recipe import ScheduleSection, make_recipe
from abste.train.run import build_model, evaluation_batches, load_data
from abste.train.setup import check_model, lr_factor, make_optimizer

Tiny = Callable[..., Recipe]


@given(
    st.sampled_from(["linear", "cosine", "constant"]),
    st.floats(0, 0.95),
    st.floats(0, 1),
    st.integers(1, 500),
)
def test_lr_factor(shape: Any, warmup: float, final: float, total: int) -> None:
    schedule = ScheduleSection(shape=shape, warmup=warmup, final=final)
    values = [lr_factor(schedule, step, total) for step in range(total)]
    assert all(0 < value <= 1 for value in values)
    rising = sum(step < warmup * total for step in range(total))
    assert values[:rising] == sorted(values[:rising])
    assert values[rising:] == sorted(values[rising:], reverse=True)
    if rising < total and shape != "constant":
        assert values[-1] >= final - 1e-9
        assert values[rising] == pytest.approx(1, abs=2 / (total - warmup * total))


def test_lr_factor_is_triangular() -> None:
    schedule = ScheduleSection(shape="linear", warmup=0.2, final=0)
    values = [lr_factor(schedule, step, 1000) for step in range(1000)]
    assert max(values) == values[200] == 1
    assert values[100] == pytest.approx(0.5, abs=0.01) and values[600] == pytest.approx(0.5)
    assert values[-1] == pytest.approx(1 / 800)


def test_a_run(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tiny("optimizer.latent_lr=0.4")
    out = tmp_path / "runs" / "one"
    threads = torch.get_num_threads()
    summary = fit(recipe, None, out)
    assert torch.get_num_threads() == threads
    assert json.loads((out / "summary.json").read_text()) == summary
    assert make_recipe(tomllib.loads((out / "recipe.toml").read_text()), "x") == recipe
    assert "ab_tanh" in (out / "conversion.txt").read_text()
    assert summary["finished"] and summary["resumes"] == 0
    assert summary["test"]["epoch"] == 3 and summary["test"]["images"] == 355
    assert 0.2 < summary["test"]["accuracy"] <= 1
    cost = summary["cost"]
    assert cost["steps"] == 66 and cost["samples"] == 66 * 64
    assert cost["estimated_training_flops"] == 6 * cost["forward_macs"] * cost["samples"] > 0
    assert summary["environment"]["torch"] == torch.__version__ and summary["environment"]["threads"] == 1
    assert not list(out.glob("*.tmp"))

    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    train = [line["step"] for line in lines if line["kind"] == "train"]
    assert train == [*range(5, 25, 5), 22, *range(25, 45, 5), 44, *range(45, 70, 5), 66]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [22, 44, 66]
    assert lines[-1]["accuracy"] == summary["test"]["accuracy"] and lines[-1]["split"] == "test"
    peak = max(line["lr"] for line in lines if line["kind"] == "train")
    assert 0.15 < peak <= 0.2

    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[1].startswith("epoch 1/3  step 22  train loss ")  # readable in a log file
    assert "\r" not in "".join(printed)

    model = load_run(out)
    assert not model.training
    result = evaluate(out)
    assert result["split"] == "test" and result["accuracy"] == summary["test"]["accuracy"]
    assert result["loss"] == pytest.approx(summary["test"]["loss"], rel=1e-6)
    assert evaluate(out, recalibrate=True)["accuracy"] > 0.2
    assert fit(recipe, None, out, resume=True) == summary  # nothing left to do


@pytest.mark.parametrize(
    ("precision", "slowdown", "told"), [("bf16-mixed", 6.64, True), ("bf16-mixed", 0.5, False), ("32-true", 9.0, False)]
)
def test_a_cpu_without_instructions_for_bfloat16_is_told(
    tiny: Tiny,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    slowdown: float,
    told: bool,
) -> None:
    monkeypatch.setattr(loop, "bfloat16_slowdown", lambda: slowdown)
    recipe = tiny(f"train.precision={precision}")
    fit(recipe, None, tmp_path / "run", max_steps=1)
    line = "this CPU takes 6.6 times as long in bfloat16 as in float32: start anew with --precision 32-true"
    assert (line in capsys.readouterr().out.splitlines()) == told
    fit(recipe, None, tmp_path / "run", resume=True, max_steps=1)  # when it is too late
    assert "bfloat16" not in capsys.readouterr().out


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="limits the instructions of x86")
def test_slowdown_of_bfloat16_without_instructions() -> None:
    code = "from abste.train.setup import bfloat16_slowdown; print(min(bfloat16_slowdown() for _ in range(5)))"
    limited = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 2


BOP = [
    "optimizer.name=bop",
    "optimizer.lr=0.01",
    "binarize.weights=identity_ste",
    "binarize.standardize=false",
    "binarize.scale=none",
]
VARIANTS = {
    "w1a32": [],
    "w1a1, ema, adam, clipped": [
        "model.name=resnet8_bireal",
        "binarize.activations=approx_sign",
        "average.decay=0.9",
        "optimizer.name=adam",
        "optimizer.weight_decay=1e-3",
        "optimizer.lr=0.01",
        "optimizer.clip_grad_norm=1.0",
    ],
    "reste, swa, bf16, augmented, progressive": [
        "binarize.weights=reste",
        "average.method=swa",
        "average.every=3",
        "average.start=0.3",
        "train.precision=bf16-mixed",
        "data.cutout=3",
        "data.flip=alternating",
        "train.label_smoothing=0.1",
        "schedule.shape=cosine",
        "train.channels_last=false",
        "train.image_sizes=[[0, 4], [0.3, 6], [0.6, 8]]",
    ],
    "adaptive": [
        'binarize.weights={name = "ab_tanh", blend = {name = "equilibrium", rho_end = 1.5}}',
        'binarize.activations={name = "ab_arctan", blend = "learned"}',
        "average.decay=0.9",
    ],
    "muon, adamw, bf16, clipped": [
        "optimizer.name=muon",
        "optimizer.muon_normalize=filter",
        "optimizer.muon_filters=true",
        "optimizer.rest=adamw",
        "optimizer.lr=0.01",
        "optimizer.latent_lr=0.1",
        "optimizer.clip_grad_norm=1.0",
        "train.precision=bf16-mixed",
    ],
    "black crop, decayed norms": ["data.crop_fill=zero", "data.flip=random", "optimizer.decay_norms=true"],
    "bop, w1a1, ema": [
        *BOP,
        "model.name=resnet8_bireal",
        "binarize.activations=approx_sign",
        "binarize.scale=learned",
        "average.decay=0.9",
    ],
    "compiled, progressive": [
        "train.compile=true",
        "train.precision=bf16-mixed",
        'binarize.activations="ab_arctan"',
        "train.image_sizes=[[0, 4], [0.3, 8]]",
    ],
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(name, marks=pytest.mark.slow) if name.startswith("compiled") else name for name in VARIANTS],
)
def test_same_bits_again_and_after_stops(tiny: Tiny, tmp_path: Path, outcome: Any, variant: str) -> None:
    recipe = tiny(*VARIANTS[variant])
    fit(recipe, None, tmp_path / "a", progress=False)
    fit(recipe, None, tmp_path / "b", progress=False)
    expected = outcome(tmp_path / "a")
    assert outcome(tmp_path / "b") == expected

    torch.manual_seed(123)  # nothing of the caller's state may matter
    stopped = fit(recipe, None, tmp_path / "c", max_steps=8, progress=False)
    assert stopped == {"finished": False, "stopped": "max_steps", "epoch": 0, "step": 8}
    fit(recipe, None, tmp_path / "c", resume=True, max_steps=14, progress=False)  # the last step of an epoch
    stopped = fit(recipe, None, tmp_path / "c", resume=True, max_minutes=0, progress=False)
    assert (stopped["stopped"], stopped["step"]) == ("max_minutes", 23)
    summary = fit(recipe, None, tmp_path / "c", resume=True, progress=False)
    assert outcome(tmp_path / "c") == expected
    assert summary["resumes"] == 3
    assert ("averaged" in summary) == (recipe.average is not None)
    if recipe.average is not None:
        averaged = evaluate(tmp_path / "c", averaged=True)
        assert averaged["accuracy"] == summary["averaged"]["test"]["accuracy"]


def test_cosine_behind_a_warmup() -> None:
    """That of a published protocol, lr (e + 1) / 5 in epoch e < 5 and then half a cosine to 0, a step at a time."""
    schedule, steps, epochs = ScheduleSection(shape="cosine", warmup=5 / 1000, final=0), 195, 1000
    values = [lr_factor(schedule, step, epochs * steps) for step in range(epochs * steps)]
    for epoch in range(5):  # theirs is constant in an epoch, and where ours is at its end
        assert values[(epoch + 1) * steps - 1] == pytest.approx((epoch + 1) / 5, rel=0.002)
    for epoch in (5, 100, 500, 999):
        theirs = (1 + math.cos(math.pi * (epoch - 4) / (epochs - 4))) / 2
        assert values[epoch * steps] == pytest.approx(theirs, abs=0.002)
    assert max(values) == values[5 * steps] == 1 and 0 < values[-1] < 1e-9


@pytest.mark.parametrize("more", [[], ["optimizer.decay_norms=false"], ["optimizer.decay_norms=true"]])
@pytest.mark.parametrize("own", [[], ["optimizer.name=muon"], BOP], ids=["sgd", "muon", "bop"])
def test_norms_are_decayed_where_the_recipe_says_so(
    tiny: Tiny, tmp_path: Path, own: list[str], more: list[str]
) -> None:
    # Where nothing else moves a norm's weight, decay does.
    recipe = tiny(*own, *more, "optimizer.weight_decay=0.5", "optimizer.lr=0.01")
    model, _ = build_model(recipe)
    groups = {group["name"]: group for group in make_optimizer(model, recipe).param_groups}
    assert groups["norms_biases"]["weight_decay"] == (0.5 if recipe.optimizer.decay_norms else 0.0)
    assert groups["weights"]["weight_decay"] == 0.5
    fit(recipe, None, tmp_path / "r", max_steps=3, progress=False)
    saved = load_checkpoint(tmp_path / "r" / "last.ckpt")["optimizer"]
    parts = [saved] if "param_groups" in saved else [part for part in saved.values() if "param_groups" in part]
    decays = {group["name"]: group.get("weight_decay") for part in parts for group in part["param_groups"]}
    assert decays["norms_biases"] == groups["norms_biases"]["weight_decay"]


@pytest.mark.parametrize(("name", "coupled"), [("adam", True), ("adamw", False)])
def test_decay_is_part_of_adams_gradient(tiny: Tiny, name: str, coupled: bool) -> None:
    # A weight without a gradient of its own: Adam takes what the decay gives for one, and makes a step of its size.
    recipe = tiny(f"optimizer.name={name}", "optimizer.weight_decay=1e-3", "optimizer.lr=0.01")
    model, _ = build_model(recipe)
    weight = model.conv1.weight
    before = weight.detach().clone()
    weight.grad = torch.zeros_like(weight)
    make_optimizer(model, recipe).step()
    expected = before - 0.01 * before.sign() if coupled else before * (1 - 1e-5)
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-4 if coupled else 1e-7)


@pytest.mark.parametrize("statistics", ["dataset", "imagenet", None])
def test_statistics_reach_training_evaluation_and_the_file(
    tmp_path: Path, made_cifar10: Splits, statistics: str | None
) -> None:
    given = [f"data.statistics={statistics or 'none'}", "model.name=resnet8", "model.kwargs.width=4"]
    small = ["train.batch_size=20", "train.epochs=1", "train.compile=false", "train.threads=1", "data.crop_padding=0"]
    small += ["train.image_sizes=[]"]
    recipe = load_recipe("cifar10-resnet20-w1a32", [*given, *small, 'data.flip="none"'])
    mean, std = made_cifar10.train.mean, made_cifar10.train.std
    if statistics == "imagenet":
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    train, test, _ = load_data(recipe, None)
    assert [(part.mean, part.std) for part in (train, test)] == [(mean, std)] * 2
    images, _ = next(evaluation_batches(test, recipe, "cpu").epoch(0))
    shape = (1, 3, 1, 1)
    expected = (test.images / 255 - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    torch.testing.assert_close(images, expected, rtol=0, atol=1e-5)

    summary = fit(recipe, None, tmp_path / "r", progress=False)
    model = load_run(tmp_path / "r")
    with torch.no_grad():
        correct = (model(expected).argmax(1) == test.labels).float().mean().item()
    assert evaluate(tmp_path / "r")["accuracy"] == summary["test"]["accuracy"] == pytest.approx(correct)

    export_run(tmp_path / "r", tmp_path / "r.abste", "given: the data are made up")
    net = abste.load(tmp_path / "r.abste")
    assert net.normalization is not None
    torch.testing.assert_close(torch.tensor(np.array(net.normalization)), torch.tensor([mean, std]))


@pytest.mark.parametrize("own", [["optimizer.name=muon"], BOP], ids=["muon", "bop"])
def test_optimizers_learn(tiny: Tiny, tmp_path: Path, own: list[str]) -> None:
    summary = fit(tiny("train.epochs=6", *own), None, tmp_path / "r", progress=False)
    assert summary["test"]["accuracy"] > 0.75


def test_flips_are_what_learns(tiny: Tiny, tmp_path: Path) -> None:
    # The same with signs that stay where they began, under norms and a last layer that learn.
    summary = fit(tiny("train.epochs=6", *BOP, "optimizer.threshold=1e9"), None, tmp_path / "r", progress=False)
    assert summary["test"]["accuracy"] < 0.6
    binary = [tensor for name, tensor in load_run(tmp_path / "r").state_dict().items() if "layer" in name]
    assert len([tensor for tensor in binary if tensor.dim() == 4 and (tensor.abs() == 1).all()]) == 6


def test_seeds_differ(tiny: Tiny, tmp_path: Path, outcome: Any) -> None:
    for seed in (1, 2):
        fit(tiny(f"train.seed={seed}", "train.epochs=1"), None, tmp_path / str(seed), progress=False)
    assert outcome(tmp_path / "1")[0] != outcome(tmp_path / "2")[0]


def test_curves_have_no_duplicates(tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny()
    # Killed between checkpoint and the next one: metrics go on, the checkpoint is the older one.
    fit(recipe, None, tmp_path / "r", max_steps=30, progress=False)
    checkpoint = (tmp_path / "r" / "last.ckpt").read_bytes()
    fit(recipe, None, tmp_path / "r", resume=True, max_steps=25, progress=False)
    (tmp_path / "r" / "last.ckpt").write_bytes(checkpoint)
    time.sleep(1.1)  # TensorBoard orders event files by the second in their names, and those of one second at random
    with open(tmp_path / "r" / "metrics.jsonl", "a") as file:
        file.write('{"kind": "train", "st')  # half a line
    fit(recipe, None, tmp_path / "r", resume=True, progress=False)
    steps = [
        (line["kind"], line["step"])
        for line in map(json.loads, (tmp_path / "r" / "metrics.jsonl").read_text().splitlines())
    ]
    assert len(steps) == len(set(steps)) == 19 and [s for _, s in steps] == sorted(s for _, s in steps)
    board = EventAccumulator(str(tmp_path / "r" / "tensorboard")).Reload()
    shown = [event.step for event in board.Scalars("train/loss")]
    assert shown == [step for kind, step in steps if kind == "train"]


def test_held_out_images_replace_the_test_set(tiny: Tiny, tmp_path: Path) -> None:
    summary = fit(tiny("data.holdout=200", "train.epochs=1"), None, tmp_path / "r", progress=False)
    assert summary["held_out"]["images"] == 200 and "test" not in summary
    assert summary["cost"]["steps"] == (1442 - 200) // 64
    assert evaluate(tmp_path / "r")["split"] == "held_out"


@pytest.mark.parametrize("every", [1, 5, 1000])
def test_non_finite_loss(tiny: Tiny, tmp_path: Path, every: int) -> None:
    recipe = tiny("optimizer.lr=1e30", f"train.log_every={every}", "train.checkpoint_minutes=1e-5")
    with pytest.raises(
        NonFiniteLossError, match=r"no longer finite at step \d+ \(epoch 1, learning rate \d.*e\+"
    ) as caught:
        fit(recipe, None, tmp_path / "r", progress=False)
    path = tmp_path / "r" / "last.ckpt"
    if path.exists():
        assert f"{path} holds the run as it was after" in str(caught.value)
        assert all(tensor.isfinite().all() for tensor in load_run(path.parent).state_dict().values())
    else:
        assert "no checkpoint was written before it" in str(caught.value)
    assert not (tmp_path / "r" / "summary.json").exists()


def test_non_finite_weights_are_not_saved(tiny: Tiny, tmp_path: Path) -> None:
    # The loss of the only step is finite; what it does to the weights is not.
    recipe = tiny("optimizer.lr=1e38", "optimizer.weight_decay=1e38", "schedule.warmup=0.0")
    with pytest.raises(NonFiniteLossError, match="no longer finite at step"):
        fit(recipe, None, tmp_path / "r", max_steps=1, progress=False)
    assert not (tmp_path / "r" / "last.ckpt").exists()


def test_run_directories(tiny: Tiny, tmp_path: Path) -> None:
    recipe, out = tiny("train.epochs=1"), tmp_path / "r"
    with pytest.raises(RunError, match=r"there is no run to resume in .*r; check --out"):
        fit(recipe, None, out, resume=True)
    assert not out.exists()
    fit(recipe, None, out, max_steps=3, progress=False)
    with pytest.raises(RunError, match=r"already holds a run; continue it with --resume, or choose another --out"):
        fit(recipe, None, out)
    descriptor = os.open(out / ".lock", os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with pytest.raises(RunError, match="is in use by another process"):
        fit(recipe, None, out, resume=True)
    os.close(descriptor)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("x")
    with pytest.raises(RunError, match=r"holds files that are no run of abste \('thesis.tex'\)"):
        fit(recipe, None, foreign)
    assert [path.name for path in foreign.iterdir()] == ["thesis.tex"]
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match=r"cannot use .*file as run directory"):
        fit(recipe, None, tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert fit(recipe, None, tmp_path / "empty", progress=False)["finished"]


def test_resume_before_the_first_checkpoint(tiny: Tiny, tmp_path: Path, outcome: Any) -> None:
    recipe = tiny("train.epochs=1")
    fit(recipe, None, tmp_path / "a", progress=False)
    fit(recipe, None, tmp_path / "b", max_steps=13, progress=False)
    (tmp_path / "b" / "last.ckpt").unlink()
    with pytest.raises(RunError, match=r"has no weights.safetensors yet"):
        load_run(tmp_path / "b")
    fit(recipe, None, tmp_path / "b", resume=True, progress=False)
    assert outcome(tmp_path / "a") == outcome(tmp_path / "b")


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        (["model.name=resnet9"], ConfigError, "resnet9"),
        (["model.kwargs.wdth=4"], ConfigError, "wdth"),
        (["model.kwargs.num_classes=1"], ConfigError, "gives an image 1 logits, but data.classes is 10; leave model"),
        (["model.kwargs.num_classes=12"], ConfigError, "gives an image 12 logits, but data.classes is 10"),
        (["train.batch_size=1"], ConfigError, "'resnet8' cannot be trained on one image at a time, since a"),
        (["train.batch_size=4", "train.accumulate=4"], ConfigError, "or a smaller train.accumulate"),
        (["data.name=digit"], ConfigError, "did you mean 'digits'"),
        (["optimizer.name=muon", "binarize=none"], ConfigError, "finds nothing to train: binarise weights, or set"),
        (["optimizer.name=bop", "binarize=none"], ConfigError, "no trainable binary weight that could flip"),
        ([*BOP, "binarize.standardize=true"], ConfigError, "standardises its weights, which must stay ±1"),
        ([*BOP, "binarize.scale=tensor"], ConfigError, "takes its scale 'tensor' from its weights, but they are ±1"),
        ([*BOP, "binarize.weights=ste"], ConfigError, "has the estimator 'ste' on weights of ±1"),
        (["binarize.weights=ab_tahn"], ConfigError, "did you mean 'ab_tanh'"),
        (["data.image_shape=[3,8,8]"], DataError, r"images of \[1, 8, 8\], but data.image_shape is \[3, 8, 8\]"),
        (["data.classes=9"], DataError, "10 classes, but data.classes is 9"),
        (["data.holdout=5000"], ConfigError, "5000"),
        (["train.batch_size=2000"], ConfigError, "2000"),
        (["train.precision=16-mixed"], ConfigError, "needs a GPU"),
    ],
)
def test_what_does_not_fit_leaves_nothing(
    tiny: Tiny, tmp_path: Path, overrides: list[str], error: type[AbsteError], message: str
) -> None:
    with pytest.raises(error, match=message):
        fit(tiny(*overrides), None, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_checking_a_network_leaves_it_as_it_is(tiny: Tiny) -> None:
    module, _ = build_model(tiny())
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    check_model(module, tiny(), 2)
    with pytest.raises(ConfigError, match="cannot be trained on one image at a time"):
        check_model(module, tiny(), 1)
    assert module.training and all(torch.equal(before[name], t) for name, t in module.state_dict().items())


@pytest.mark.parametrize("override", ["model.name=resnet9", "model.kwargs.wdth=4"])
def test_a_wrong_network_is_told_before_images_are_looked_for(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        fit(load_recipe("finetune", [override]), tmp_path / "no images", tmp_path / "run")


def test_devices_that_are_not_there(tiny: Tiny, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="these devices cannot be used"):
            fit(tiny(), None, tmp_path / "r", accelerator="cuda")
    with pytest.raises(ConfigError, match="these devices cannot be used"):
        fit(tiny(), None, tmp_path / "r", accelerator="abacus")
    with pytest.raises(ConfigError, match="strategy must be 'auto' or 'ddp', not 'fsdp'"):
        fit(tiny(), None, tmp_path / "r", strategy="fsdp")
    with pytest.raises(ConfigError, match="max_minutes"):
        fit(tiny(), None, tmp_path / "r", max_minutes=math.nan)
    with pytest.raises(ConfigError, match="max_steps must be at least 1, not 0"):
        fit(tiny(), None, tmp_path / "r", max_steps=0)
    assert list(tmp_path.iterdir()) == []


def test_foreign_checkpoints(tiny: Tiny, tmp_path: Path) -> None:
    fit(tiny(), None, tmp_path / "a", max_steps=3, progress=False)
    fit(tiny("optimizer.lr=0.3"), None, tmp_path / "b", max_steps=3, progress=False)
    wide = tiny("model.kwargs.width=8")
    fit(wide, None, tmp_path / "wide", max_steps=3, progress=False)
    mine, before = tmp_path / "a" / "last.ckpt", (tmp_path / "a" / "last.ckpt").read_bytes()

    with pytest.raises(
        CheckpointError, match=r"was written with optimizer.lr = 0.2, but this run asks for 0.3; resume with"
    ):
        fit(tiny("optimizer.lr=0.3"), None, tmp_path / "a", resume=True)
    mine.write_bytes((tmp_path / "b" / "last.ckpt").read_bytes())
    with pytest.raises(
        CheckpointError, match=r"last.ckpt was written with optimizer.lr = 0.3, but this run asks for 0.2"
    ):
        fit(tiny(), None, tmp_path / "a", resume=True)
    mine.write_bytes((tmp_path / "wide" / "last.ckpt").read_bytes())
    with pytest.raises(CheckpointError, match=r"model.kwargs = \{'width': 8\}"):
        fit(tiny(), None, tmp_path / "a", resume=True)
    with pytest.raises(CheckpointError, match=r"of another model than its recipe's: its 'conv1.weight' has shape"):
        load_run(tmp_path / "a")
    mine.write_bytes(before[:-100])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        fit(tiny(), None, tmp_path / "a", resume=True)
    mine.write_bytes(before)
    assert fit(tiny("train.log_every=7"), None, tmp_path / "a", resume=True, progress=False)["finished"]


def test_load_run(tiny: Tiny, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"holds no run of abste: recipe.toml is missing"):
        load_run(tmp_path)
    out = tmp_path / "r"
    fit(tiny("train.epochs=2"), None, out, max_steps=30, progress=False)
    unfinished = load_run(out).state_dict()
    fit(tiny("train.epochs=2"), None, out, resume=True, progress=False)
    finished = load_run(out).state_dict()
    assert any(not torch.equal(unfinished[name], finished[name]) for name in finished)
    with pytest.raises(RunError, match=r"its recipe has no section \[average\]"):
        load_run(out, averaged=True)
    weights = out / "weights.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-7])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        load_run(out)
    weights.write_bytes(data[:-7] + b"\0" * 7)
    with pytest.raises(CheckpointError, match="checksums differ"):
        load_run(out)
    weights.write_bytes(data)
    (out / "recipe.toml").write_text((out / "recipe.toml").read_text().replace("width = 4", "width = 8"))
    with pytest.raises(CheckpointError, match="of another model than its recipe's"):
        load_run(out)
    (out / "recipe.toml").write_text("x = [")
    with pytest.raises(RunError, match=r"recipe.toml is damaged"):
        load_run(out)
