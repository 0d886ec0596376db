"""What steps do to numbers, operation by operation as docs/format.md says, in float32."""

from __future__ import annotations

from typing import cast

import numpy as np

from abste.deploy.graph import Array, Step, StepKind

_f = np.float32


def exp(x: Array) -> Array:
    """The format's exp: saturates beyond -87 and 88, NaN stays NaN."""
    x = np.where(x < _f(-87), _f(-87), np.where(x > _f(88), _f(88), x))
    n = np.floor(x * _f(1.44269504) + _f(0.5))
    r = (x - n * _f(0.693359375)) - n * _f(-2.12194440e-4)
    p = np.full_like(r, _f(1.9875691500e-4))
    for c in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        p = p * r + _f(c)
    power = np.where(np.isnan(n), _f(0), n).astype(np.int32)
    return cast(Array, ((p * (r * r) + r) + _f(1)) * ((power + np.int32(127)) << np.int32(23)).view(np.float32))


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x))."""
    return cast(Array, _f(1) / (_f(1) + exp(-x)))


def tanh(x: Array) -> Array:
    """1 - 2 / (exp(2 x) + 1)."""
    return cast(Array, _f(1) - _f(2) / (exp(_f(2) * x) + _f(1)))


def erf(x: Array) -> Array:
    """Formula 7.1.26 of Abramowitz and Stegun."""
    a = np.abs(x)
    t = _f(1) / (_f(1) + _f(0.3275911) * a)
    p = np.full_like(t, _f(1.061405429))
    for c in (-1.453152027, 1.421413741, -0.284496736, 0.254829592):
        p = p * t + _f(c)
    y = _f(1) - (p * t) * exp(-(a * a))
    return np.where(x < 0, -y, y)


def _clamped(v: Array, low: float, high: float) -> Array:
    return np.where(v < _f(low), _f(low), np.where(v > _f(high), _f(high), v))


def apply(step: Step, v: Array, value: Array | None = None) -> Array:
    """The numbers after a step.

    Args:
        step: any but a threshold, which works on integers.
        v: (..., h, w, c) float32, or anything that ends in the channels.
        value: the value that the step adds or multiplies, of a shape that broadcasts to v's.

    Returns:
        float32, of the shape of v.
    """
    kind, a = step.kind, step.a
    with np.errstate(all="ignore"):  # infinities and NaN are numbers like others here
        if kind is StepKind.AFFINE:
            result = v * a + step.b
        elif kind is StepKind.MULTIPLY:
            result = v * a
        elif kind is StepKind.ADD:
            result = v + a
        elif kind is StepKind.RELU:
            result = np.where(v < 0, _f(0), v)
        elif kind is StepKind.PRELU:
            result = np.where(v < 0, v * a, v)
        elif kind is StepKind.CLAMP:
            result = _clamped(v, step.p, step.q)
        elif kind is StepKind.GELU:
            result = (_f(0.5) * v) * (_f(1) + erf(v * _f(0.70710678)))
        elif kind is StepKind.GELU_TANH:
            inner = _f(0.79788456) * (v + _f(0.044715) * ((v * v) * v))
            result = (_f(0.5) * v) * (_f(1) + tanh(inner))
        elif kind is StepKind.SILU:
            result = v * sigmoid(v)
        elif kind is StepKind.SIGMOID:
            result = sigmoid(v)
        elif kind is StepKind.HARDSWISH:
            result = (v * _clamped(v + _f(3), 0, 6)) / _f(6)
        elif kind is StepKind.HARDSIGMOID:
            result = _clamped(v + _f(3), 0, 6) / _f(6)
        elif kind is StepKind.TANH:
            result = tanh(v)
        elif kind is StepKind.ADD_VALUE:
            result = v + value
        elif kind is StepKind.MULTIPLY_VALUE:
            result = v * value
        elif kind is StepKind.SIGN:
            result = np.where(v >= 0, _f(1), _f(-1))
        else:
            raise ValueError(f"{kind.name} is not a step on floats")
    return np.asarray(result, np.float32)


def threshold(step: Step, sums: Array) -> Array:
    """+1 or -1 (float32) for integer sums (..., c): where d s >= t, (t, d) being the step's numbers per channel."""
    assert step.a is not None
    bound, direction = step.a[:, 0].astype(np.int64), step.a[:, 1].astype(np.int64)
    return np.where(direction * sums >= bound, _f(1), _f(-1))
