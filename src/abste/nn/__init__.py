"""Binary layers, and the functions that turn any torch model into a binary one."""

from abste.nn.branch import GradientBranch, remove_branches
from abste.nn.conversion import ConversionReport, LayerReport, convert
from abste.nn.costs import LayerCost, Summary, summary
from abste.nn.latents import ReCU, Standardize, standardize
from abste.nn.layers import (
    BINARY_LAYERS,
    BinaryActivation,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BinaryWeight,
)
from abste.nn.parameters import latent_weights, parameter_groups, recalibrate_batch_norm
from abste.nn.pieces import AdaptiveSet, ChannelShift, Maxout, RPReLU, RSign

__all__ = [
    "BINARY_LAYERS",
    "AdaptiveSet",
    "BinaryActivation",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryWeight",
    "ChannelShift",
    "ConversionReport",
    "GradientBranch",
    "LayerCost",
    "LayerReport",
    "Maxout",
    "RPReLU",
    "RSign",
    "ReCU",
    "Standardize",
    "Summary",
    "convert",
    "latent_weights",
    "parameter_groups",
    "recalibrate_batch_norm",
    "remove_branches",
    "standardize",
    "summary",
]
