"""FDA, the frequency domain approximation of FDA-BNN."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abste.errors import ConfigError
from abste.estimators.base import Annealed, Estimator, clip_gradient, register


@register("fda")
class FDA(Estimator, Annealed):
    """Fourier series of a square wave, whose number of terms rises over training.

    F(x) = (4 / pi) (sin(omega x) + sin(3 omega x) / 3 + ... + sin((2 n + 1) omega x) / (2 n + 1));
    F'(x) = (4 omega / pi) (cos(omega x) + cos(3 omega x) + ... + cos((2 n + 1) omega x)) where |x| <= t, else 0 (and F
    is constant there). The slope is 4 omega (n + 1) / pi at 0.

    Not monotone: the slope oscillates, with its first zero at |x| = pi / (2 omega (n + 1)).

    Schedule: n = n_start + floor((n_end - n_start) p), p being the fraction of training done. Its authors apply it to
    weights and activations, together with a learned noise adaptation module (two linear layers added to the binarised
    tensor, fading to nothing), which is a piece beyond the slope and left out here: this is the "sine module" of their
    ablation (ResNet-20 on CIFAR-10: 85.83 with it alone, 86.20 with both, 84.44 without).

    Args:
        omega: angular frequency, in [1e-6, 100]. Half a period, pi / omega, must reach further than t, since there the
            square wave leaves sign. Default 0.1 for weights and activations, from the port.
        t: clip. Default 1 for weights and activations, from the port, for raw inputs.
        n_start: highest term at the start, an integer from 0. Default 9 for weights and activations (ten terms),
            the paper's best constant; with the default omega the first zero is at |x| = 1.57, beyond the clip.
        n_end: highest term at the end, an integer up to 100. Default 18 for weights and activations, twice n_start as
            in the paper; the first zero is at |x| = 0.83, inside the clip.

    Source: Xu et al., FDA-BNN, arXiv 2103.00841, equations 9 and 10 and section 3.2. The paper gives neither omega nor
    a clip, and the authors published code for inference alone: omega = 0.1, the clip at 1 and the linear rise of n are
    those of the port in BiBench (htqin/BiBench, layers/fda.py), which changes n once an epoch.
    """

    monotone = False
    defaults = {
        "omega": {"weights": 0.1, "activations": 0.1},
        "t": {"weights": 1.0, "activations": 1.0},
        "n_start": {"weights": 9.0, "activations": 9.0},
        "n_end": {"weights": 18.0, "activations": 18.0},
    }
    omega: float
    n_start: float
    n_end: float

    def __init__(
        self,
        omega: float | None = None,
        t: float | None = None,
        n_start: float | None = None,
        n_end: float | None = None,
    ) -> None:
        super().__init__(omega=omega, t=t, n_start=n_start, n_end=n_end)

    def check(self) -> None:
        super().check()
        omega, low, high = self.omega, self.n_start, self.n_end
        if not (1e-6 <= omega <= 100 and omega * self.t < math.pi):
            raise ConfigError(f"FDA: needs 1e-6 <= omega <= 100 and omega * t < pi, got omega={omega} and t={self.t}.")
        if not (0 <= low <= high <= 100 and low.is_integer() and high.is_integer()):
            raise ConfigError(f"FDA: needs integers 0 <= n_start <= n_end <= 100, got n_start={low} and n_end={high}.")

    def highest(self) -> Tensor:
        """The present n, a float32 scalar."""
        return self.n_start + (self.progress() * (self.n_end - self.n_start)).floor()

    def surrogate(self, x: Tensor) -> Tensor:
        y = self.omega * x.clamp(-self.t, self.t)
        n = self.highest()
        terms = [torch.sin((2 * i + 1) * y) / (2 * i + 1) * (i <= n) for i in range(int(self.n_end) + 1)]
        return sum(terms, torch.zeros_like(y)) * (4.0 / math.pi)

    def backward(self, grad: Tensor, x: Tensor) -> Tensor:
        # The cosines sum to sin(2 (n + 1) y) / (2 sin(y)). Half precision would leave it no digit where it changes its
        # sign; an infinite x must not turn the zero beyond the clip into NaN.
        y = x.to(torch.promote_types(x.dtype, torch.float32)).clamp(-self.t, self.t) * (self.omega / math.pi)
        count = self.highest() + 1.0
        slope = torch.sinc(y * (2.0 * count)) / torch.sinc(y) * (count * (4.0 * self.omega / math.pi))
        return clip_gradient(grad, x, self.t) * slope.to(grad.dtype)
