"""Layers: drop-in modules with the parameter names that the field uses."""

from .attention_block import AttentionBlock
from .convnext_block import ConvNeXtBlock
from .dit_block import DiTBlock
from .layers import DepthwiseConv2d, GlobalResponseNorm, LayerNorm
from .linear import Linear
from .resample import Downsample, Stem
from .stage import Stage

__all__ = [
    "AttentionBlock",
    "ConvNeXtBlock",
    "DepthwiseConv2d",
    "DiTBlock",
    "Downsample",
    "GlobalResponseNorm",
    "LayerNorm",
    "Linear",
    "Stage",
    "Stem",
]
