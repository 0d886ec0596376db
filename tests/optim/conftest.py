from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def same_state(a: Optimizer, b: Optimizer) -> None:
    """Both optimizers hold the same groups and, bit for bit, the same state."""
    x, y = a.state_dict(), b.state_dict()
    assert x["param_groups"] == y["param_groups"]
    torch.testing.assert_close(x["state"], y["state"], rtol=0, atol=0)


@pytest.fixture
def resumes() -> Callable[[Callable[[list[nn.Parameter]], Optimizer], list[tuple[int, ...]]], None]:
    """Check that an optimizer, saved by torch.save in the middle and loaded by a new one, goes on bit for bit."""

    def check(make: Callable[[list[nn.Parameter]], Optimizer], shapes: list[tuple[int, ...]]) -> None:
        generator = torch.Generator().manual_seed(1)
        start = [torch.randn(shape, generator=generator) for shape in shapes]
        gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(6)]

        def steps(optimizer: Optimizer, parameters: list[nn.Parameter], which: list[list[Tensor]]) -> None:
            for grads in which:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad.clone()
                optimizer.step()

        through = [nn.Parameter(x.clone()) for x in start]
        one = make(through)
        steps(one, through, gradients[:3])
        saved, weights = _copied(one.state_dict()), [p.detach().clone() for p in through]
        steps(one, through, gradients[3:])

        resumed = [nn.Parameter(torch.zeros_like(x)) for x in start]
        two = make(resumed)
        with torch.no_grad():
            for parameter, weight in zip(resumed, weights, strict=True):
                parameter.copy_(weight)
        for group in two.param_groups:
            group["lr"] = 0.123  # what was saved counts
        two.load_state_dict(saved)
        steps(two, resumed, gradients[3:])
        for p, q in zip(through, resumed, strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=0)
        same_state(one, two)

    return check


def _copied(state: dict[str, object]) -> dict[str, object]:
    """A state dict as it comes back from a file that is read with weights_only=True."""
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
