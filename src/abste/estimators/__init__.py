"""Gradient estimators for binary networks: forward sign(x), backward a slope of their own."""

from abste.estimators.ab import ABArcTan, ABTanh, AdaptiveBlend
from abste.estimators.approx_sign import ApproxSign
from abste.estimators.base import (
    Annealed,
    Binarizer,
    Estimator,
    Role,
    Spec,
    available,
    clip_gradient,
    get,
    register,
    resolve,
    sign,
)
from abste.estimators.blends import Blend, Constant, Progress
from abste.estimators.ede import EDE
from abste.estimators.reste import ReSTE
from abste.estimators.schedule import EstimatorSchedule
from abste.estimators.ste import STE, IdentitySTE

__all__ = [
    "EDE",
    "STE",
    "ABArcTan",
    "ABTanh",
    "AdaptiveBlend",
    "Annealed",
    "ApproxSign",
    "Binarizer",
    "Blend",
    "Constant",
    "Estimator",
    "EstimatorSchedule",
    "IdentitySTE",
    "Progress",
    "ReSTE",
    "Role",
    "Spec",
    "available",
    "clip_gradient",
    "get",
    "register",
    "resolve",
    "sign",
]
