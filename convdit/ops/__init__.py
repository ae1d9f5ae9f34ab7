"""The operators: channels-last functions with autograd, autocast, torch.compile, export and vmap."""

from convdit import _library as _library  # loads the compiled operators, or raises

from .adaln import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from .depthwise_conv import depthwise_conv2d, depthwise_conv2d_layer_norm
from .sites import neighbors

__all__ = [
    "depthwise_conv2d",
    "depthwise_conv2d_layer_norm",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "layer_norm_modulate",
    "neighbors",
]
