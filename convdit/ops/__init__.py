"""The operators: channels-last functions with autograd, autocast, torch.compile, export and vmap."""

from convdit import _library as _library  # loads the compiled operators, or raises

from .adaln import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
from .grn import gelu_grn, grn, sparse_gelu_grn, sparse_grn

__all__ = [
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_grn",
    "grn",
    "layer_norm_modulate",
    "sparse_gelu_grn",
    "sparse_grn",
]
