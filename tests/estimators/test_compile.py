"""The same gradient under torch.compile, from one graph for the whole of training."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

from abste import estimators
from abste.estimators import Binarizer, EstimatorSchedule

Make = Callable[..., Binarizer]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Everything(nn.Module):
    """All estimators side by side."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        roles = itertools.cycle(["weights", "activations"])
        rising = ["ab_tanh, k rises", "ab_arctan, k rises, not normalized"]
        self.members = nn.ModuleList(make(name, role=next(roles)) for name in [*estimators.available(), *rising])

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([member(x) for member in self.members])


def gradient(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """One row per estimator."""
    x = x.detach().requires_grad_()
    y = function(x)
    grad = torch.sin(torch.arange(x.numel())).to(x.dtype)
    rows: list[Tensor] = []
    for row in y if y.dim() == 2 else y[None]:
        rows.extend(torch.autograd.grad(row, x, grad, retain_graph=True))
    return torch.stack(rows)


def points(dtype: torch.dtype) -> Tensor:
    special = [0.0, -0.0, 1.0, -1.0, 1.5, -1.5, 3.0, -3.0, 3.1, 1e-30, -1e-30, 1e4, -1e4]
    return torch.cat([torch.linspace(-4, 4, 243), torch.tensor(special)]).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_same_gradient(name: str, make: Make, dtype: torch.dtype) -> None:
    binarizer = make(name, 50)
    x = points(dtype)
    compiled = torch.compile(binarizer, backend="aot_eager", fullgraph=True)
    torch.manual_seed(0)
    y = compiled(x)
    torch.manual_seed(0)
    assert torch.equal(y, binarizer(x))
    torch.testing.assert_close(gradient(compiled, x), gradient(binarizer, x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_gradient_with_inductor(make: Make, dtype: torch.dtype) -> None:
    everything = Everything(make)
    EstimatorSchedule(everything, 2).step()
    x = points(dtype)
    compiled = torch.compile(everything, fullgraph=True)
    same = [not member.stochastic for member in everything.members]  # inductor has random numbers of its own
    assert torch.equal(compiled(x)[same], everything(x)[same])
    # Inductor computes half precision in float32 and rounds once: eager is the less exact of the two.
    torch.testing.assert_close(gradient(compiled, x), gradient(everything, x))


def kept_for_backward(function: Callable[[Tensor], Tensor], x: Tensor) -> set[torch.dtype]:
    """The types of all that inductor's forward returns and keeps."""
    kept: list[Tensor] = []

    def forward(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        (values,) = graph.graph.output_node().args
        kept.extend(node.meta["val"] for node in values if isinstance(node, torch.fx.Node))  # type: ignore[union-attr]
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward,
        bw_compiler=lambda graph, _: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
        decompositions=select_decomp_table(),
    )
    torch.compile(function, backend=backend, fullgraph=True)(x.requires_grad_()).sum().backward()
    return {value.dtype for value in kept}


def test_no_mask_is_kept_on_a_cpu(name: str, make: Make) -> None:
    """Inductor's code for masks in memory is slow there: they made a step with STE take twice as long."""
    binarizer = make(name, role="activations" if "activations" in make(name).roles else "weights")
    assert torch.bool not in kept_for_backward(lambda x: binarizer(x + 1.0), points(torch.bfloat16))


def test_infinite_gradients_are_not_lost() -> None:
    """A scaler of losses has to see them."""
    ste = estimators.STE(t=1.0)
    x = torch.tensor([0.5, -0.5, 2.0, -2.0, 0.5], requires_grad=True)
    torch.compile(ste, backend="aot_eager", fullgraph=True)(x).backward(
        torch.tensor([1.0, torch.inf, 1.0, -1.0, torch.nan])
    )
    torch.testing.assert_close(x.grad, torch.tensor([1.0, torch.inf, 0.0, 0.0, torch.nan]), equal_nan=True)


def test_the_schedule_steps_without_recompilation(make: Make) -> None:
    everything = Everything(make)
    schedule = EstimatorSchedule(everything, 4)
    x = points(torch.float32)
    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    seen: list[Tensor] = []
    eager: list[Tensor] = []
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(5):
            seen.append(gradient(compiled, x))
            eager.append(gradient(everything, x))
            torch.testing.assert_close(seen[-1], eager[-1])
            schedule.step()
    for (before, after), (eager_before, eager_after) in zip(
        itertools.pairwise(seen), itertools.pairwise(eager), strict=True
    ):
        changed = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert any(changed)
        assert changed == [not torch.equal(a, b) for a, b in zip(eager_before, eager_after, strict=True)]
