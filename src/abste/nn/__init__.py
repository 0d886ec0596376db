"""Binary layers, and the functions that turn any torch model into a binary one."""

from abste.nn.convert import ConversionReport, LayerReport, convert
from abste.nn.layers import (
    BinaryActivation,
    BinaryConv1d,
    BinaryConv2d,
    BinaryLinear,
    BinaryWeight,
    standardize,
)
from abste.nn.parameters import latent_weights, parameter_groups, recalibrate_batch_norm
from abste.nn.summary import LayerCost, Summary, summary

__all__ = [
    "BinaryActivation",
    "BinaryConv1d",
    "BinaryConv2d",
    "BinaryLinear",
    "BinaryWeight",
    "ConversionReport",
    "LayerCost",
    "LayerReport",
    "Summary",
    "convert",
    "latent_weights",
    "parameter_groups",
    "recalibrate_batch_norm",
    "standardize",
    "summary",
]
