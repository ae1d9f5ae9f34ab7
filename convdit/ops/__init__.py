"""The operators: channels-last functions with autograd, autocast, torch.compile, export and vmap."""

from convdit import _library  # loads the compiled operators, or raises

try:
    from .adaln import gated_residual, gated_residual_layer_norm_modulate, layer_norm_modulate
    from .adaln_zero_attention import adaln_zero_attention
    from .attention import packed_attention
    from .convnext_block import convnext_block
    from .depthwise_conv import depthwise_conv2d, depthwise_conv2d_layer_norm
    from .gelu_tanh import gelu_tanh
    from .grn import gelu_grn, grn, sparse_gelu_grn, sparse_grn
    from .sites import neighbors
    from .sparse_depthwise_conv import sparse_depthwise_conv2d
except (RuntimeError, AttributeError) as error:  # PyTorch's, of an operator that is not registered
    raise _library.missing("libconvdit_ops.so", f"is older than these Python files ({error})") from error

__all__ = [
    "adaln_zero_attention",
    "convnext_block",
    "depthwise_conv2d",
    "depthwise_conv2d_layer_norm",
    "gated_residual",
    "gated_residual_layer_norm_modulate",
    "gelu_grn",
    "gelu_tanh",
    "grn",
    "layer_norm_modulate",
    "neighbors",
    "packed_attention",
    "sparse_depthwise_conv2d",
    "sparse_gelu_grn",
    "sparse_grn",
]
