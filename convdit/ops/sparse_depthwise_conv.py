"""Submanifold depthwise convolution over the visible sites of a batch of maps.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (2023), section 3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ._common import (
    Function,
    accumulate_dtype,
    at_once,
    autocast,
    check_floating,
    library,
    needs_grad,
    parameter,
    register_fake,
    register_vmap,
)

if TYPE_CHECKING:
    from convdit.sparse import ActiveSites


def sparse_depthwise_conv2d(features: Tensor, weight: Tensor, bias: Tensor | None, sites: ActiveSites) -> Tensor:
    """Depthwise convolution that reads and writes visible sites only, "same", stride 1.

    Absent neighbours count as zero and absent sites stay absent, so the result is the dense convolution of the
    zero-filled map, read at the visible sites.

    Args:
        features: (M, C), one row a visible site in the order of ``sites``; float32, float64, bfloat16 or float16, any
            strides. Under autocast it is cast as PyTorch casts a convolution's input.
        weight: (C, 1, K, K), K odd and at most 45; features' dtype or any of the three smaller ones. 7 is fast.
        bias: (C,), or None.
        sites: the M visible sites, on the device of the features; their table of neighbours is built on first use.

    Returns:
        (M, C) in the features' dtype, contiguous. Sums are taken in float32 (float64 for float64).

    Raises:
        TypeError, ValueError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Woo et al. 2023, section 3; ``MinkowskiDepthwiseConvolution`` as facebookresearch/ConvNeXt-V2 uses it.
    """
    if not hasattr(sites, "block_neighbors"):
        raise TypeError(f"sites: expected convdit.sparse.ActiveSites, got {type(sites).__name__}")
    if isinstance(weight, Tensor) and weight.dim() == 4 and weight.shape[2] == weight.shape[3]:
        neighbors = sites.block_neighbors(-(-(weight.shape[3] // 2) // sites.block))
        out = at_once(library.sparse_depthwise_conv2d_fwd.default, features, weight, bias, neighbors, sites.block)
        if out is not None:
            return out
    check_floating("features", features)
    if features.dim() != 2 or features.shape[0] != len(sites):
        raise ValueError(f"features: expected shape ({len(sites)}, C), got {tuple(features.shape)}")
    check_floating("weight", weight)
    channels, kernel = features.shape[1], weight.shape[-1] if weight.dim() else 0
    if tuple(weight.shape) != (channels, 1, kernel, kernel) or kernel % 2 == 0:
        raise ValueError(f"weight: expected shape ({channels}, 1, K, K) with K odd, got {tuple(weight.shape)}")
    features = autocast(features)
    weight = parameter("weight", weight, features)
    bias = None if bias is None else parameter("bias", bias, features)
    if needs_grad(features, weight, bias):
        return _SparseDepthwiseConv2d.apply(features, weight, bias, neighbors, sites.block)
    return library.sparse_depthwise_conv2d_fwd.default(features, weight, bias, neighbors, sites.block)


@register_fake("sparse_depthwise_conv2d_fwd")
def _(features, weight, bias, neighbors, block):
    return features.new_empty(features.shape)


@register_fake("sparse_depthwise_conv2d_input_grad")
def _(grad, weight, neighbors, block):
    return grad.new_empty(grad.shape)


@register_fake("sparse_depthwise_conv2d_weight_grad")
def _(grad, features, neighbors, block, kernel_size):
    channels, dtype = features.shape[1], accumulate_dtype(features.dtype)
    weight = features.new_empty((channels, 1, kernel_size, kernel_size), dtype=dtype)
    return weight, features.new_empty((channels,), dtype=dtype)


for _name in ("fwd", "input_grad", "weight_grad"):
    register_vmap(f"sparse_depthwise_conv2d_{_name}", folded=())


# Absent taps are counted, as PyTorch counts the taps of a dense convolution that fall into its padding.
@register_flop_formula([library.sparse_depthwise_conv2d_fwd, library.sparse_depthwise_conv2d_input_grad])
def _(features, weight, *_args, out_shape=None, **_kwargs) -> int:
    return 2 * features[0] * features[1] * weight[2] * weight[3]


@register_flop_formula(library.sparse_depthwise_conv2d_weight_grad)
def _(grad, features, neighbors, block, kernel_size, out_shape=None, **_kwargs) -> int:
    return 2 * features[0] * features[1] * kernel_size * kernel_size


class _SparseDepthwiseConv2d(Function):
    @staticmethod
    def forward(features, weight, bias, neighbors, block):
        return library.sparse_depthwise_conv2d_fwd.default(features, weight, bias, neighbors, block)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, weight, bias, neighbors, ctx.block = inputs
        ctx.save_for_backward(features, weight, neighbors)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        features, weight, neighbors = ctx.saved_tensors
        grad_features = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_features = library.sparse_depthwise_conv2d_input_grad.default(grad, weight, neighbors, ctx.block)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            grad_weight, grad_bias = library.sparse_depthwise_conv2d_weight_grad.default(
                grad, features, neighbors, ctx.block, weight.shape[-1]
            )
        return grad_features, grad_weight, grad_bias if ctx.needs_input_grad[2] else None, None, None
