from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from abste.errors import ConfigError
from abste.estimators import EstimatorSchedule
from abste.nn import BinaryLinear
from abste.optim import Bop, Combined, Muon

SHAPES: list[tuple[int, ...]] = [(4, 3, 3, 3), (5, 7), (4,), (3, 2), (6,)]


def muon_and_sgd(p: list[nn.Parameter]) -> Combined:
    return Combined(Muon(p[:2]), torch.optim.SGD(p[2:], lr=0.1, momentum=0.9, nesterov=True))


def bop_and_adam(p: list[nn.Parameter]) -> Combined:
    rest = [{"params": p[2:4], "weight_decay": 0.1}, {"params": p[4:], "lr": 0.3}]
    return Combined(Bop(p[:2], gamma=0.3), torch.optim.AdamW(rest, lr=0.1))


def three(p: list[nn.Parameter]) -> Combined:
    return Combined(Muon(p[:1]), Bop(p[1:2], gamma=0.3), torch.optim.Adam(p[2:]))


def muon_and_adagrad(p: list[nn.Parameter]) -> Combined:
    return Combined(Muon(p[:2]), torch.optim.Adagrad(p[2:], lr=0.1))


@pytest.mark.parametrize("make", [muon_and_sgd, bop_and_adam, three, muon_and_adagrad])
def test_resumes(resumes: Callable[..., None], make: Any) -> None:
    resumes(make, SHAPES)


def parameters() -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(3)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


@pytest.mark.parametrize("used", [False, True])
def test_is_what_the_optimizers_do_by_themselves(used: bool) -> None:
    apart, together = parameters(), parameters()
    first, second = Muon(apart[:2]), torch.optim.SGD(apart[2:], lr=0.1, momentum=0.9)
    inner = Muon(together[:2]), torch.optim.SGD(together[2:], lr=0.1, momentum=0.9)
    both = None if used else Combined(*inner)
    for step in range(4):
        for p, q in zip(apart, together, strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        first.step()
        second.step()
        if both is None:
            for optimizer in inner:
                optimizer.step()
            both = Combined(*inner)  # with the momentum they have
        else:
            both.step()
    for p, q in zip(apart, together, strict=True):
        assert torch.equal(p, q)
    assert both is not None and [len(g["params"]) for g in both.param_groups] == [2, 3]
    both.zero_grad()
    assert all(q.grad is None for q in together)


def test_rates_are_set_through_it() -> None:
    p = parameters()
    optimizer = bop_and_adam(p)
    optimizer.load_state_dict(optimizer.state_dict())
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [x.detach().clone() for x in p]
    for x in p:
        x.grad = torch.ones_like(x)
    calls: list[bool] = []

    def closure() -> float:
        calls.append(torch.is_grad_enabled())
        return 5.0

    assert optimizer.step(closure) == 5.0
    assert calls == [True]  # once
    assert all(torch.equal(x, b) for x, b in zip(p, before, strict=True))


def test_what_cannot_be_combined() -> None:
    p = parameters()
    with pytest.raises(ConfigError, match="at least one optimizer"):
        Combined()
    with pytest.raises(ConfigError, match="expected an optimizer of torch, got list"):
        Combined([Muon(p[:1])])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="a parameter is in more than one of the optimizers"):
        Combined(Muon(p[:2]), torch.optim.SGD(p[1:], lr=0.1))
    with pytest.raises(ConfigError, match="add groups to the optimizers before they are combined"):
        Combined(Muon(p[:2])).add_param_group({"params": [p[3]]})

    with pytest.raises(ConfigError, match="some optimizers have names of their parameters"):
        Combined(Muon([("a", p[0])]), torch.optim.SGD(p[2:], lr=0.1))


def test_each_optimizer_has_the_state_of_its_own_parameters() -> None:
    p = parameters()
    muon = Muon(p[:2])
    for x in p:
        x.grad = torch.ones_like(x)
    muon.step()
    adagrad = torch.optim.Adagrad(p[2:])
    both = Combined(muon, adagrad)  # Adagrad looks for its own entries in any state it holds
    both.step()
    for _ in range(2):
        assert set(muon.state_dict()["state"]) == {0, 1} and set(adagrad.state_dict()["state"]) == {0, 1, 2}
        assert set(both.state) == set(p) and len(both.state) == 5 and p[4] in both.state
        assert both.state[p[0]] is muon.state[p[0]] and both.state[p[2]] is adagrad.state[p[2]]
        both.load_state_dict(both.state_dict())
    both.state.clear()
    assert both.state.get(p[0]) is None and not muon.state and not adagrad.state


def test_groups_that_come_later_are_refused() -> None:
    p = parameters()
    sgd = torch.optim.SGD(p[2:4], lr=0.1)
    both = Combined(Muon(p[:2]), sgd)
    state = both.state_dict()
    sgd.add_param_group({"params": [p[4]]})
    for use in (both.step, lambda: both.load_state_dict(state)):
        with pytest.raises(ConfigError, match="the groups of one of the optimizers have changed"):
            use()


def test_no_step_reads_from_the_device() -> None:
    # On the meta device there is nothing to read: what waits for a GPU elsewhere raises here.
    p = [nn.Parameter(torch.empty(shape, device="meta")) for shape in SHAPES[:4]]
    optimizer = Combined(Muon(p[:1]), Muon(p[1:2], normalize="filter", weight_decay=0.1), Bop(p[2:]))
    for _ in range(2):
        for parameter in p:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_goes_on_by_itself(copied: Callable[[Any], Any]) -> None:
    def step(p: list[nn.Parameter], optimizer: Combined) -> None:
        for parameter in p:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    ours = parameters()
    optimizer = muon_and_sgd(ours)
    step(ours, optimizer)
    theirs, other = copied((ours, optimizer))
    other.param_groups[1]["lr"] = 0.3
    assert other.optimizers[1].param_groups[0]["lr"] == 0.3 and optimizer.param_groups[1]["lr"] == 0.1
    other.param_groups[1]["lr"] = 0.1
    step(ours, optimizer)
    step(theirs, other)
    for p, q in zip(ours, theirs, strict=True):
        assert p is not q
        torch.testing.assert_close(p, q, rtol=0, atol=0)


def test_schedulers_find_the_momentum_that_all_have() -> None:
    optimizer = muon_and_sgd(parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=[0.1, 0.2], total_steps=4)
    assert [group["momentum"] for group in optimizer.optimizers[1].param_groups] == [0.95]
    for parameter in (p for group in optimizer.param_groups for p in group["params"]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    schedule.step()
    assert optimizer.optimizers[0].param_groups[0]["lr"] == pytest.approx(optimizer.param_groups[1]["lr"] / 2)


def test_a_forgotten_schedule_is_told_of_after_as_many_steps_as_with_one_optimizer() -> None:
    model = nn.Sequential(BinaryLinear(4, 4), nn.Linear(4, 2))
    optimizer = Combined(Muon([model[0].weight]), torch.optim.SGD(model[1].parameters(), lr=0.1))
    schedule = EstimatorSchedule(model, total_steps=100)
    steps = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while steps < 20:
            optimizer.zero_grad()
            model(torch.ones(3, 4)).sum().backward()
            steps += 1
            try:
                optimizer.step()
            except UserWarning:
                break
    assert steps == 10 and schedule is not None
