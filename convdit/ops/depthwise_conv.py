"""The depthwise convolution of ConvNeXt over channels-last maps, alone and with the LayerNorm that follows it.

Liu et al., "A ConvNet for the 2020s" (2022), section 2: depthwise 7x7, then LayerNorm over the channels.
Each public function is followed by what PyTorch needs to know of its operators.
"""

from __future__ import annotations

import torch
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


def depthwise_conv2d(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Depthwise "same" convolution with stride 1: each channel with its own K x K kernel; outside the map is zero.

    Args:
        x: (N, H, W, C), float32, float64, bfloat16 or float16, any strides.
        weight: (C, 1, K, K), K odd, at most 31; x's dtype or any of the three smaller ones.
        bias: (C,), as weight; or None.

    Returns:
        (N, H, W, C) in x's dtype (under autocast, in autocast's), contiguous. Sums are taken in float32, or float64.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Matches ``F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=K // 2, groups=C)``.

    Source: Liu et al. 2022, "A ConvNet for the 2020s", sections 2.3 and 2.5.
    """
    out = at_once(library.depthwise_conv2d_fwd.default, x, weight, bias)
    if out is not None:
        return out
    check_floating("x", x)
    x = autocast(x)
    weight = parameter("weight", weight, x)
    bias = None if bias is None else parameter("bias", bias, x)
    if needs_grad(x, weight, bias):
        return _DepthwiseConv2d.apply(x, weight, bias)
    return library.depthwise_conv2d_fwd.default(x, weight, bias)


@register_fake("depthwise_conv2d_fwd")
def _(x, weight, bias):
    return x.new_empty(x.shape)


@register_fake("depthwise_conv2d_input_grad")
def _(grad, weight):
    return grad.new_empty(grad.shape)


@register_fake("depthwise_conv2d_weight_grad")
def _(grad, x, kernel_size):
    channels, dtype = x.shape[-1], accumulate_dtype(x.dtype)
    return x.new_empty((channels, 1, kernel_size, kernel_size), dtype=dtype), x.new_empty((channels,), dtype=dtype)


register_vmap("depthwise_conv2d_fwd", folded=(0,))
register_vmap("depthwise_conv2d_input_grad", folded=(0,))
register_vmap("depthwise_conv2d_weight_grad", folded=())


def _flops(shape: torch.Size, kernel_size: int) -> int:
    """Two a multiply-add; taps beyond the border count, as in PyTorch's formula for convolutions."""
    return 2 * shape.numel() * kernel_size**2


@register_flop_formula(torch.ops.convdit.depthwise_conv2d_fwd)
def _(x_shape, weight_shape, *_args, **_kwargs) -> int:
    return _flops(x_shape, weight_shape[-1])


@register_flop_formula(torch.ops.convdit.depthwise_conv2d_input_grad)
def _(grad_shape, weight_shape, *_args, **_kwargs) -> int:
    return _flops(grad_shape, weight_shape[-1])


@register_flop_formula(torch.ops.convdit.depthwise_conv2d_weight_grad)
def _(grad_shape, x_shape, kernel_size, *_args, **_kwargs) -> int:
    return _flops(x_shape, kernel_size)


class _DepthwiseConv2d(Function):
    @staticmethod
    def forward(x, weight, bias):
        return library.depthwise_conv2d_fwd.default(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return conv_gradients(grad, x, weight, ctx.needs_input_grad)


def conv_gradients(
    grad: Tensor, x: Tensor, weight: Tensor, needed
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, weight and bias, each only where it is needed."""
    grad_x = library.depthwise_conv2d_input_grad.default(grad, weight) if needed[0] else None
    grad_weight = grad_bias = None
    if needed[1]:
        grad_weight, grad_bias = library.depthwise_conv2d_weight_grad.default(grad, x, weight.shape[-1])
    elif needed[2]:
        grad_bias = grad.sum((0, 1, 2), dtype=weight.dtype)
    return grad_x, grad_weight, grad_bias if needed[2] else None


def depthwise_conv2d_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    ln_weight: Tensor,
    ln_bias: Tensor,
    eps: float = 1e-6,
) -> Tensor:
    """:func:`depthwise_conv2d`, then LayerNorm over the channels while its output is in cache.

    Args:
        x, weight, bias: as in :func:`depthwise_conv2d`.
        ln_weight, ln_bias: (C,), x's dtype or any of the three smaller ones.
        eps: added to the biased variance, inside the root.

    Returns:
        (N, H, W, C) in x's dtype (under autocast, in autocast's), contiguous. Without gradients no other map is
        written; with them, the convolution's output is kept for the backward.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Matches ``F.layer_norm(depthwise_conv2d(x, weight, bias), (C,), ln_weight, ln_bias, eps)``.

    Source: the start of the block of Liu et al. 2022, section 2.6.
    """
    out = at_once(library.depthwise_conv2d_layer_norm_fwd.default, x, weight, bias, ln_weight, ln_bias, eps)
    if out is not None:
        return out
    check_floating("x", x)
    x = autocast(x)
    weight = parameter("weight", weight, x)
    bias = None if bias is None else parameter("bias", bias, x)
    ln_weight, ln_bias = parameter("ln_weight", ln_weight, x), parameter("ln_bias", ln_bias, x)
    if needs_grad(x, weight, bias, ln_weight, ln_bias):
        return _DepthwiseConv2dLayerNorm.shown(x, weight, bias, ln_weight, ln_bias, eps)[0]
    return library.depthwise_conv2d_layer_norm_fwd.default(x, weight, bias, ln_weight, ln_bias, eps)


@register_fake("depthwise_conv2d_layer_norm_fwd")
def _(x, weight, bias, ln_weight, ln_bias, eps):
    return x.new_empty(x.shape)


@register_fake("depthwise_conv2d_layer_norm_fwd_save")
def _(x, weight, bias, ln_weight, ln_bias, eps):
    statistic = x.new_empty(x.shape[:3], dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), statistic, torch.empty_like(statistic)


@register_fake("depthwise_conv2d_layer_norm_bwd")
def _(grad, conv, ln_weight, mean, rstd):
    channel = conv.new_empty(conv.shape[-1:], dtype=accumulate_dtype(conv.dtype))
    return conv.new_empty(conv.shape), channel, torch.empty_like(channel)


register_vmap("depthwise_conv2d_layer_norm_fwd", folded=(0,))
register_vmap("depthwise_conv2d_layer_norm_fwd_save", folded=(0,))
register_vmap("depthwise_conv2d_layer_norm_bwd", folded=())


@register_flop_formula([library.depthwise_conv2d_layer_norm_fwd, library.depthwise_conv2d_layer_norm_fwd_save])
def _(x_shape, weight_shape, *_args, **_kwargs) -> int:
    return _flops(x_shape, weight_shape[-1])


class _DepthwiseConv2dLayerNorm(Function):
    hidden = 3

    @staticmethod
    def forward(x, weight, bias, ln_weight, ln_bias, eps):
        return library.depthwise_conv2d_layer_norm_fwd_save.default(x, weight, bias, ln_weight, ln_bias, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ln_weight, _, _ = inputs
        _, conv, mean, rstd = output
        ctx.mark_non_differentiable(conv, mean, rstd)
        ctx.save_for_backward(x, weight, ln_weight, conv, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _conv, _mean, _rstd):
        x, weight, ln_weight, conv, mean, rstd = ctx.saved_tensors
        grad_conv, grad_ln_weight, grad_ln_bias = library.depthwise_conv2d_layer_norm_bwd.default(
            grad, conv, ln_weight, mean, rstd
        )
        grads = conv_gradients(grad_conv, x, weight, ctx.needs_input_grad)
        return *grads, grad_ln_weight, grad_ln_bias, None
