"""Diagnostics in recipes and run directories, and in several processes."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from abste.errors import ConfigError
from abste.train import Recipe, fit, load_recipe
from abste.train.recipe import FREE_KEYS, first_difference

TINY = ["train.threads=1", "train.epochs=2", "model.kwargs.width=4", "model.name=resnet8_bireal"]
BLEND = '{name = "ab_tanh", blend = "equilibrium"}'
BOTH = [f"binarize.weights={BLEND}", f"binarize.activations={BLEND}"]

Tiny = Callable[..., Recipe]


def tiny(*overrides: str) -> Recipe:
    """44 steps."""
    return load_recipe("digits-resnet8-w1a32", [*TINY, *BOTH, *overrides])


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "diagnostics.jsonl").read_text().splitlines()]


def weights(run: Path) -> bytes:
    return (run / "weights.safetensors").read_bytes()


def test_a_run_with_and_without(tmp_path: Path) -> None:
    fit(tiny(), None, tmp_path / "without", progress=False)
    assert not (tmp_path / "without" / "diagnostics.jsonl").exists()
    fit(tiny("diagnostics.every=5"), None, tmp_path / "with", progress=False)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")

    lines = records(tmp_path / "with")
    assert [line["step"] for line in lines] == list(range(5, 45, 5))
    layers = lines[0]["layers"]
    assert len(layers) == 6 and all(entry["weights"] and entry["activations"] for entry in layers.values())
    name = next(iter(layers))
    events = EventAccumulator(str(tmp_path / "with" / "tensorboard"))
    events.Reload()
    scalars = [(event.step, event.value) for event in events.Scalars(f"diagnostics/{name}/weights/ratio")]
    expected = [(line["step"], line["layers"][name]["weights"]["blend"]["ratio"]) for line in lines]
    assert [step for step, _ in scalars] == [step for step, _ in expected]
    assert [value for _, value in scalars] == pytest.approx([value for _, value in expected])


def test_stopped_and_resumed(tmp_path: Path) -> None:
    recipe = tiny("diagnostics.every=5", "diagnostics.sample=500", "average.decay=0.9")
    fit(recipe, None, tmp_path / "a", progress=False)
    fit(recipe, None, tmp_path / "b", progress=False, max_steps=8)
    with open(tmp_path / "b" / "diagnostics.jsonl", "a") as file:
        file.write('{"step": 10, "of": "a process that was killed before its next checkpoint"}\n')
    fit(recipe, None, tmp_path / "b", progress=False, resume=True, max_steps=11)
    fit(recipe, None, tmp_path / "b", progress=False, resume=True)
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
    assert (tmp_path / "b" / "diagnostics.jsonl").read_bytes() == (tmp_path / "a" / "diagnostics.jsonl").read_bytes()


def test_switched_on_and_off_along_the_way(tmp_path: Path) -> None:
    """It is not part of what is computed: any run may be continued with, without, or with others."""
    run = tmp_path / "run"
    fit(tiny(), None, run, progress=False, max_steps=8)
    fit(tiny("diagnostics.every=5"), None, run, progress=False, resume=True, max_steps=14)
    assert [line["step"] for line in records(run)] == [10, 15, 20]
    assert records(run)[0]["steps"] == 2  # since it was switched on
    fit(tiny(), None, run, progress=False, resume=True, max_steps=9)
    fit(tiny("diagnostics.every=4"), None, run, progress=False, resume=True)
    assert [line["step"] for line in records(run)] == [10, 15, 20, 32, 36, 40, 44]
    fit(tiny(), None, tmp_path / "plain", progress=False)
    assert weights(run) == weights(tmp_path / "plain")


def test_a_float_network_has_nothing_to_measure(tmp_path: Path) -> None:
    recipe = load_recipe("digits-resnet8-w1a32", [*TINY, "binarize=none", "diagnostics.every=5", "train.epochs=1"])
    fit(recipe, None, tmp_path / "run", progress=False)
    assert records(tmp_path / "run") == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_run(tmp_path: Path) -> None:
    settings = ["train.compile=true", "train.precision=bf16-mixed", "train.epochs=1"]
    fit(tiny(*settings), None, tmp_path / "without", progress=False)
    fit(tiny(*settings, "diagnostics.every=5"), None, tmp_path / "with", progress=False)
    assert weights(tmp_path / "with") == weights(tmp_path / "without")
    entry = next(iter(records(tmp_path / "with")[-1]["layers"].values()))
    assert entry["weights"]["variation"] > 0 and entry["activations"]["variation"] > 0


def test_in_the_recipe() -> None:
    recipe = tiny("diagnostics.every=7")
    assert recipe.diagnostics is not None and recipe.diagnostics.sample == 65536
    assert recipe.to_dict()["diagnostics"] == {"every": 7, "sample": 65536}
    assert "diagnostics" not in tiny().to_dict()
    assert {"diagnostics.every", "diagnostics.sample"} <= FREE_KEYS
    assert first_difference(tiny().to_dict(), recipe.to_dict()) is None
    for wrong, message in {
        "diagnostics.every=0": "'diagnostics.every' must be greater than 0",
        "diagnostics.sample=1": "'diagnostics.sample' must be greater than 1",
        "diagnostics.evry=2": "unknown key 'diagnostics.evry'; did you mean",
    }.items():
        with pytest.raises(ConfigError, match=message):
            tiny(wrong)


# Two processes: the first measures its share


def _one_of_two(rank: int, store: str, out: str) -> None:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from abste import EstimatorSchedule
    from abste.diagnostics import Diagnostics
    from abste.nn import BinaryLinear

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    blend = {"name": "ab_tanh", "blend": "equilibrium"}
    for measured in (False, True):
        torch.manual_seed(0)
        layer = BinaryLinear(16, 4, weights=blend, activations=blend)
        module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), layer)
        for compiled in (False, True):
            model = DistributedDataParallel(module)
            run: Any = torch.compile(model, backend="eager") if compiled else model
            optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
            schedule = EstimatorSchedule(module, 4)
            diagnostics = None
            if measured and rank == 0:
                diagnostics = Diagnostics(run, optimizer, every=2, path=out)
            generator = torch.Generator().manual_seed(rank)
            for _ in range(4):
                optimizer.zero_grad()
                run(torch.randn(32, 8, generator=generator)).square().mean().backward()
                optimizer.step()
                schedule.step()
            if diagnostics is not None:
                diagnostics.close()
        if rank == 0:
            torch.save(module.state_dict(), f"{out}.{measured}")
    torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    out = tmp_path / "d.jsonl"
    context = multiprocessing.get_context("spawn")
    processes = [
        context.Process(target=_one_of_two, args=(rank, str(tmp_path / "store"), str(out))) for rank in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    plain, watched = (torch.load(f"{out}.{measured}") for measured in (False, True))
    assert all(torch.equal(plain[key], watched[key]) for key in plain)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 2, 4]
    for line in lines:
        entry = line["layers"]["2"]
        assert entry["activations"]["count"] == 32 * 16 and entry["weights"]["variation"] > 0
