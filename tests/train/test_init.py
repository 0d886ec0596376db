from __future__ import annotations

import hashlib
import json
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import abste.models
from abste.cli import main
from abste.errors import CheckpointError, ConfigError, RunError
from abste.nn import AdaptiveSet, BinaryConv2d, GradientBranch, convert
from abste.train import Recipe, evaluate, fit, load_run
from abste.train.init import transfer
from abste.train.loop import _Loop

Tiny = Callable[..., Recipe]
FLOAT = ["binarize=none", "model.name=resnet8_bireal", "average.decay=0.9"]
BINARY = ["model.name=resnet8_bireal", "binarize.activations=ste", "train.epochs=2"]


@pytest.fixture(scope="module")
def float_run(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("source") / "float"
    fit(tiny(*FLOAT), None, out, progress=False)
    return out


def network(**options: Any) -> nn.Module:
    model = abste.models.create("resnet8_bireal", in_channels=1, width=4)
    if options:
        convert(model, example_input=torch.zeros(1, 1, 8, 8), **options)
    return model


def varied(**options: Any) -> nn.Module:
    """A network whose parameters and buffers are nobody's defaults."""
    model = network(**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
        for buffer in model.buffers():
            buffer += 7
    return model


def test_a_float_network_gives_all_that_convert_would_keep() -> None:
    source, binary = varied(), network(weights="ab_tanh", activations="ste", scale="learned", center="learned")
    before = network()
    before.load_state_dict(source.state_dict())
    convert(
        before,
        weights="ab_tanh",
        activations="ste",
        scale="learned",
        center="learned",
        example_input=torch.zeros(1, 1, 8, 8),
    )
    what = transfer(binary, source)
    wanted = before.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in binary.state_dict().items())
    assert what.share < 1  # the learned scales are new
    assert {name.rpartition(".")[2] for name in what.new} == {
        "learned_scale",
        "learned_center",
        "mean_square",
        "num_batches_tracked",
    }
    assert what.left == []


@pytest.mark.parametrize(
    "options",
    [
        {"weights": "ab_tanh", "activations": "ste", "adaptive_set": True, "gradient_branch": 0.1},
        {"weights": None, "activations": "ste"},
        {"weights": "ste", "activations": None, "gradient_branch": 0.1, "standardize": "recu"},
        {"weights": "ste", "activations": "ste", "unsigned_inputs": "batch_norm", "adaptive_set": True},
    ],
)
def test_names_are_those_before_convert(options: dict[str, Any]) -> None:
    source, other = varied(**options), network(weights="ab_tanh", activations="ab_tanh")
    what = transfer(other, source)
    assert what.share == 1 and all("estimator" not in name for name in what.taken)
    binary = {n.removesuffix(".layer").removesuffix(".layer"): m for n, m in source.named_modules()
              if isinstance(m, BinaryConv2d)}  # fmt: skip
    assert len(binary) == 6
    for name, layer in binary.items():
        assert torch.equal(other.get_submodule(name).weight, layer.weight)
    # And the other way, into the modules around the layers.
    again = network(**options)
    transfer(again, other)
    for name, module in again.named_modules():
        if isinstance(module, GradientBranch):
            assert torch.equal(module.branch, other.get_submodule(name).weight)  # as it begins
        elif isinstance(module, AdaptiveSet):
            assert module.scale == 1 and module.center == 0
    # The same kind of network: everything but the estimators' state.
    same = network(**options)
    what = transfer(same, source)
    assert what.new == what.left == [] and what.share == 1
    for (name, a), b in zip(same.state_dict().items(), source.state_dict().values(), strict=True):
        assert torch.equal(a, b) != any(part in name for part in ("binarizer", "estimator", "standardize")), name


def test_a_run(tiny: Tiny, float_run: Path, tmp_path: Path, capsys: Any) -> None:
    recipe = tiny(*BINARY, f"init='{float_run}'")
    fit(recipe, None, tmp_path / "r", max_steps=1)
    sha = hashlib.sha256((float_run / "weights.safetensors").read_bytes()).hexdigest()
    assert sha == json.loads((float_run / "summary.json").read_text())["sha256"]["weights.safetensors"]
    line = (tmp_path / "r" / "conversion.txt").read_text().splitlines()[-1]
    assert line.startswith(f"started from {float_run} (weights.safetensors, sha256 {sha[:12]}): ")
    assert "(100.0% of the parameters); new: layer1.0.conv1.activation" in line and "latents 1." in line
    assert line in capsys.readouterr().out.splitlines()
    assert tomllib.loads((tmp_path / "r" / "recipe.toml").read_text())["init"] == str(float_run)
    summary = fit(recipe, None, tmp_path / "r", resume=True, progress=False)
    assert summary["init"]["sha256"] == sha and summary["init"]["file"] == "weights.safetensors"
    assert summary["init"]["report"] == line == (tmp_path / "r" / "conversion.txt").read_text().splitlines()[-1]
    cold = fit(tiny(*BINARY), None, tmp_path / "cold", progress=False)
    assert "init" not in cold and cold["test"]["accuracy"] < summary["test"]["accuracy"]


def test_resuming_needs_no_source(
    tiny: Tiny, float_run: Path, tmp_path: Path, outcome: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    shutil.copytree(float_run, source)
    recipe = tiny(*BINARY, f"init='{source}'")
    fit(recipe, None, tmp_path / "a", progress=False)

    def die(*_: Any) -> None:
        raise SystemError

    with monkeypatch.context() as patch:
        patch.setattr(_Loop, "_train_step", die)  # before the first step
        with pytest.raises(SystemError):
            fit(recipe, None, tmp_path / "b", progress=False)
    fit(recipe, None, tmp_path / "c", max_steps=3, progress=False)
    (tmp_path / "c" / "last.ckpt").unlink()  # as if killed before the first checkpoint
    shutil.rmtree(source)
    fit(recipe, None, tmp_path / "b", resume=True, progress=False)
    assert outcome(tmp_path / "b") == outcome(tmp_path / "a")
    assert json.loads((tmp_path / "b" / "summary.json").read_text())["init"]["source"] == str(source)
    assert fit(recipe, None, tmp_path / "b", resume=True, progress=False)["finished"]
    with pytest.raises(RunError, match=r"init = '.*source': .*source holds no run of abste: recipe.toml is missing"):
        fit(recipe, None, tmp_path / "c", resume=True, progress=False)
    with pytest.raises(CheckpointError, match=r"was written with init = '.*', but this run asks for nothing"):
        fit(tiny(*BINARY), None, tmp_path / "b", resume=True, progress=False)


def test_what_the_weights_are(tiny: Tiny, float_run: Path, tmp_path: Path) -> None:
    # Float into float, at a learning rate that moves nothing: the evaluation is that of the source.
    still = ["binarize=none", "model.name=resnet8_bireal", "train.epochs=1", "optimizer.lr=1e-30"]
    for source, averaged in ((float_run, False), (float_run / "averaged.safetensors", True)):
        out = tmp_path / str(averaged)
        fit(tiny(*still, f"init='{source}'"), None, out, progress=False)
        weights = load_run(out).state_dict()
        wanted = load_run(float_run, averaged=averaged).state_dict()
        assert all(torch.equal(weights[name], wanted[name]) for name in wanted if "running" not in name
                   and "tracked" not in name)  # fmt: skip


def test_a_checkpointed_run(tiny: Tiny, tmp_path: Path) -> None:
    fit(tiny(*FLOAT), None, tmp_path / "part", max_steps=20, progress=False)
    summary = fit(tiny(*BINARY, f"init='{tmp_path / 'part'}'"), None, tmp_path / "r", progress=False)
    assert summary["init"]["file"] == "last.ckpt" and summary["init"]["report"].startswith("started from")
    with pytest.raises(RunError, match=r"has no averaged.safetensors yet"):
        fit(tiny(*BINARY, f"init='{tmp_path / 'part' / 'averaged.safetensors'}'"), None, tmp_path / "s")


def test_steps_of_binarisation(tiny: Tiny, tmp_path: Path) -> None:
    first = tiny(*BINARY, "binarize={activations='ste'}")
    fit(first, None, tmp_path / "1", progress=False)
    summary = fit(tiny(*BINARY, f"init='{tmp_path / '1'}'"), None, tmp_path / "2", progress=False)
    assert "(100.0% of the parameters)" in summary["init"]["report"] and "new" not in summary["init"]["report"]
    assert evaluate(tmp_path / "2")["accuracy"] > 0.3


def test_command_line(float_run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "r"
    arguments = ["train", "digits-resnet8-w1a32", "--out", str(out), "--set", "model.kwargs.width=4", "train.epochs=1"]
    assert main([*arguments, "--init", str(float_run)]) == 0
    assert f"started from {float_run}" in capsys.readouterr().out
    assert main([*arguments[:3], str(tmp_path / "s"), "--init", str(tmp_path / "no")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"init = '{tmp_path / 'no'}': {tmp_path / 'no'} holds no run of abste" in error
    assert not (tmp_path / "s").exists()


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (
            "model.kwargs.width=8",
            r"\(resnet8_bireal\) has only 0.\d% of the parameters of this one \(resnet8_bireal\) by",
        ),
        (
            "data.holdout=200",
            "with data.holdout = 0, and so may have seen images that data.holdout = 200 holds out; use",
        ),
    ],
)
def test_what_does_not_fit_leaves_nothing(tiny: Tiny, float_run: Path, tmp_path: Path, own: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        fit(tiny(*BINARY, f"init='{float_run}'", own), None, tmp_path / "r")
    assert list(tmp_path.iterdir()) == []


def test_damaged_weights(tiny: Tiny, float_run: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(float_run, source)
    data = bytearray((source / "weights.safetensors").read_bytes())
    data[-1] ^= 1
    (source / "weights.safetensors").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"init = '.*': weights .* are not those of this run's summary.json"):
        fit(tiny(*BINARY, f"init='{source}'"), None, tmp_path / "r")
