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
from abste.estimators.biper import BiPer
from abste.estimators.blends import Blend, Constant, Equilibrium, Gate, Learned, Progress
from abste.estimators.dsq import DSQ
from abste.estimators.ede import EDE, EDEFloor
from abste.estimators.ewgs import EWGS
from abste.estimators.exste import ExSTE
from abste.estimators.fda import FDA
from abste.estimators.magnitude_aware_sign import MagnitudeAwareSign
from abste.estimators.rbnn import RBNN
from abste.estimators.reste import ReSTE
from abste.estimators.schedule import EstimatorSchedule
from abste.estimators.shape_removed import ShapeRemoved
from abste.estimators.sigmoid_sign import SigmoidSign
from abste.estimators.siman import SiMaN
from abste.estimators.ste import STE, IdentitySTE
from abste.estimators.stochastic_sign import StochasticSign
from abste.estimators.swish_sign import SwishSign

__all__ = [
    "DSQ",
    "EDE",
    "EWGS",
    "FDA",
    "RBNN",
    "STE",
    "ABArcTan",
    "ABTanh",
    "AdaptiveBlend",
    "Annealed",
    "ApproxSign",
    "BiPer",
    "Binarizer",
    "Blend",
    "Constant",
    "EDEFloor",
    "Equilibrium",
    "Estimator",
    "EstimatorSchedule",
    "ExSTE",
    "Gate",
    "IdentitySTE",
    "Learned",
    "MagnitudeAwareSign",
    "Progress",
    "ReSTE",
    "Role",
    "ShapeRemoved",
    "SiMaN",
    "SigmoidSign",
    "Spec",
    "StochasticSign",
    "SwishSign",
    "available",
    "clip_gradient",
    "get",
    "register",
    "resolve",
    "sign",
]
