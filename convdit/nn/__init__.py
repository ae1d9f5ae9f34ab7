"""Layers: drop-in modules with the parameter names that the field uses."""

from .convnext_block import ConvNeXtBlock
from .dit_block import DiTBlock
from .layers import DepthwiseConv2d, GlobalResponseNorm, LayerNorm
from .resample import Downsample, Stem

__all__ = [
    "ConvNeXtBlock",
    "DepthwiseConv2d",
    "DiTBlock",
    "Downsample",
    "GlobalResponseNorm",
    "LayerNorm",
    "Stem",
]
