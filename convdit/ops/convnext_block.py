"""The ConvNeXt V2 block as one operator.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (2023), figure 5.
The CPU takes the batch a few images at a time through one set of scratch tensors, or through one a thread where each
has images of its own: the hidden tensor, four times as wide as the map, stays in cache. With gradients it is kept
once, as the first pointwise layer leaves it; the backward computes the rest of the hidden tensors again. On other
devices the block is its parts, each with its own backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from convdit._library import build_info

from ._common import (
    HALVES,
    Function,
    accumulate_dtype,
    at_once,
    autocast,
    autocast_enabled,
    check_floating,
    is_plain,
    library,
    needs_grad,
    parameter,
    register_fake,
    register_vmap,
)
from .depthwise_conv import conv_gradients, depthwise_conv2d_layer_norm
from .grn import gelu_grn


def convnext_block(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor | None,
    grn_weight: Tensor,
    grn_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor | None,
    eps: float = 1e-6,
) -> Tensor:
    """``x + pwconv2(grn(gelu(pwconv1(layer_norm(dwconv(x))))))``.

    Args:
        x: (N, H, W, C), float32, float64, bfloat16 or float16, any strides. Autocast casts the branch and leaves
            the residual as it is.
        dwconv_weight, dwconv_bias: (C, 1, K, K), K odd, at most 31; (C,) or None.
        norm_weight, norm_bias: (C,), of the LayerNorm.
        pwconv1_weight, pwconv1_bias: (D, C); (D,) or None. D is 4 C in the published models.
        grn_weight, grn_bias: (D,), gamma and beta of the response normalisation.
        pwconv2_weight, pwconv2_bias: (C, D); (C,) or None.
        eps: of the LayerNorm and of the response normalisation.

        Parameters have x's dtype or any of the three smaller ones; float64 goes with float64 only.

    Returns:
        (N, H, W, C) in x's dtype, contiguous.

    Raises:
        ValueError: a shape that does not fit, naming the argument.
        TypeError, RuntimeError: a dtype or device that does not fit, naming the argument.

    Source: Woo et al. 2023, figure 5; equal to the ``Block`` of facebookresearch/ConvNeXt-V2 without drop path.
    """
    given = (
        dwconv_weight,
        dwconv_bias,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        grn_weight,
        grn_bias,
        pwconv2_weight,
        pwconv2_bias,
    )
    # In other dtypes the branch may have one of its own.
    if getattr(x, "dtype", None) is getattr(pwconv1_weight, "dtype", None) is torch.float32:
        out = at_once(library.convnext_block_fwd.default, x, *given, eps)
        if out is not None:
            return out
    try:  # the operators look at the arguments
        if is_plain(x, pwconv1_weight):
            return _block(x, given, eps)
    except (RuntimeError, TypeError, AttributeError):
        pass  # a parameter to be cast, or an error, to be told in terms of this function's arguments
    _check(x, given)
    branch = autocast(x).dtype
    if x.device.type != "cpu" or branch != x.dtype != torch.float32:
        return _composite(x, *given, eps)
    if branch in _WIDENED:
        branch = torch.float32
    arguments = [
        None if p is None else p.to(branch) if name in _MATRICES else parameter(name, p, x)
        for name, p in zip(_SHAPES, given, strict=True)
    ]
    if torch.compiler.is_exporting():  # the operator calls others, which would refuse parameters that want gradients
        x, arguments = x.detach(), [None if t is None else t.detach() for t in arguments]
    return _block(x, arguments, eps)


def _block(x: Tensor, arguments: Sequence[Tensor | None], eps: float) -> Tensor:
    if needs_grad(x, *arguments):
        return _ConvnextBlock.shown(x, *arguments, eps)[0]
    return library.convnext_block_fwd.default(x, *arguments, eps)


# Halves that this CPU has no products of: the branch is computed in float32, which is several times faster there.
_WIDENED = tuple(h for h in HALVES if str(h).removeprefix("torch.") not in build_info()["cpu_halves"])
_SHAPES = {
    "dwconv_weight": ("C", 1, "K", "K"),
    "dwconv_bias": ("C",),
    "norm_weight": ("C",),
    "norm_bias": ("C",),
    "pwconv1_weight": ("D", "C"),
    "pwconv1_bias": ("D",),
    "grn_weight": ("D",),
    "grn_bias": ("D",),
    "pwconv2_weight": ("C", "D"),
    "pwconv2_bias": ("C",),
}
_OPTIONAL = ("dwconv_bias", "pwconv1_bias", "pwconv2_bias")
_MATRICES = ("pwconv1_weight", "pwconv2_weight")  # in the branch's dtype; vectors in the one that kernels sum in


def _check(x: Tensor, given: tuple[Any, ...]) -> None:
    check_floating("x", x)
    if x.dim() != 4:
        raise ValueError(f"x: expected shape (N, H, W, C), got {tuple(x.shape)}")
    sizes: dict[str | int, int] = {1: 1, "C": x.shape[-1]}
    for (name, axes), value in zip(_SHAPES.items(), given, strict=True):
        if value is None and name in _OPTIONAL:
            continue
        check_floating(name, value)
        if (x.dtype == torch.float64) != (value.dtype == torch.float64):
            wanted, got = (str(t.dtype).removeprefix("torch.") for t in (x, value))
            raise TypeError(f"{name}: expected the dtype of x ({wanted}), got {got}")
        # K and D are what the first argument that has them says.
        known = {axis: sizes.get(axis, axis) for axis in axes}
        fits = value.dim() == len(axes)
        if fits:
            for axis, size in zip(axes, value.shape, strict=True):
                fits = fits and sizes.setdefault(axis, size) == size
        if not fits:
            wanted = ", ".join(str(known[axis]) for axis in axes)
            raise ValueError(f"{name}: expected shape ({wanted}), got {tuple(value.shape)}")
        if value.device != x.device:
            raise ValueError(f"{name}: expected the device of x ({x.device}), got {value.device}")


def _composite(
    x: Tensor,
    dwconv_weight: Tensor,
    dwconv_bias: Tensor | None,
    norm_weight: Tensor,
    norm_bias: Tensor,
    pwconv1_weight: Tensor,
    pwconv1_bias: Tensor | None,
    grn_weight: Tensor,
    grn_bias: Tensor,
    pwconv2_weight: Tensor,
    pwconv2_bias: Tensor | None,
    eps: float,
) -> Tensor:
    y = depthwise_conv2d_layer_norm(x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, eps)
    y = _linear(y, pwconv1_weight, pwconv1_bias)
    y = gelu_grn(y, grn_weight, grn_bias, eps)
    return (x + _linear(y, pwconv2_weight, pwconv2_bias)).to(x.dtype)


def _linear(y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if autocast_enabled(y):  # it casts, and keeps what it cast
        return F.linear(y, weight, bias)
    return F.linear(y, weight.to(y.dtype), None if bias is None else bias.to(y.dtype))


@register_fake("convnext_block_fwd")
def _(x, *parameters):
    return x.new_empty(x.shape)


@register_fake("convnext_mlp_fwd")
def _(x, u, pwconv1_weight, *_args):
    n, h, w, _ = x.shape
    hidden = pwconv1_weight.shape[0]
    norm = u.new_empty((n, hidden), dtype=accumulate_dtype(u.dtype))
    return x.new_empty(x.shape), u.new_empty((n * h * w, hidden)), norm


@register_fake("convnext_mlp_bwd")
def _(
    grad, u, _hidden, _norm, weight1, _bias1, grn_weight, _grn_bias, weight2, _eps, need_u, need_weight1, need_weight2
):
    def like(t, needed):
        return t.new_empty(t.shape if needed else (0,))

    vectors = (like(grn_weight, True) for _ in range(3))
    return like(u, need_u), like(weight1, need_weight1), *vectors, like(weight2, need_weight2)


register_vmap("convnext_block_fwd", folded=(0,))
register_vmap("convnext_mlp_fwd", folded=())
register_vmap("convnext_mlp_bwd", folded=())


@register_flop_formula(torch.ops.convdit.convnext_block_fwd)
def _(x_shape, dwconv_weight_shape, _1, _2, _3, pwconv1_weight_shape, *_args, **_kwargs) -> int:
    """Two a multiply-add; taps beyond the border count, as in PyTorch's formula for convolutions."""
    return 2 * x_shape.numel() * (dwconv_weight_shape[-1] ** 2 + 2 * pwconv1_weight_shape[0])


@register_flop_formula(torch.ops.convdit.convnext_mlp_fwd)
def _(x_shape, _u_shape, pwconv1_weight_shape, *_args, **_kwargs) -> int:
    return 2 * x_shape.numel() * 2 * pwconv1_weight_shape[0]


@register_flop_formula(torch.ops.convdit.convnext_mlp_bwd)
def _(grad_shape, _1, _2, _3, weight1_shape, _5, _6, _7, _8, _eps, *needed, **_kwargs) -> int:
    return 2 * grad_shape.numel() * (1 + sum(needed)) * weight1_shape[0]


class _ConvnextBlock(Function):
    """The block in two operators: up to the LayerNorm, u, and from there on."""

    hidden = 6

    @staticmethod
    def forward(
        x,
        dwconv_weight,
        dwconv_bias,
        norm_weight,
        norm_bias,
        pwconv1_weight,
        pwconv1_bias,
        grn_weight,
        grn_bias,
        pwconv2_weight,
        pwconv2_bias,
        eps,
    ):
        branch_x = x.to(pwconv1_weight.dtype)
        u, conv, mean, rstd = library.depthwise_conv2d_layer_norm_fwd_save.default(
            branch_x, dwconv_weight, dwconv_bias, norm_weight, norm_bias, eps
        )
        out, hidden, norm = library.convnext_mlp_fwd.default(
            x, u, pwconv1_weight, pwconv1_bias, grn_weight, grn_bias, pwconv2_weight, pwconv2_bias, eps
        )
        return out, u, conv, mean, rstd, hidden, norm

    @staticmethod
    def setup_context(ctx, inputs, output):
        *tensors, ctx.eps = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(*tensors, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_kept):
        x, dwconv_weight, _, norm_weight, _, weight1, bias1, grn_weight, grn_bias, weight2, bias2, *kept = (
            ctx.saved_tensors
        )
        u, conv, mean, rstd, hidden, norm = kept
        needed = ctx.needs_input_grad
        before = any(needed[:5])
        grad_u, grad_weight1, grad_bias1, grad_grn_weight, grad_grn_bias, grad_weight2 = (
            library.convnext_mlp_bwd.default(
                grad.to(u.dtype),
                u,
                hidden,
                norm,
                weight1,
                bias1,
                grn_weight,
                grn_bias,
                weight2,
                ctx.eps,
                before,
                needed[5],
                needed[9],
            )
        )
        grads: list[Tensor | None] = [None] * 5
        if before:
            grad_conv, *norm_grads = library.depthwise_conv2d_layer_norm_bwd.default(
                grad_u, conv, norm_weight, mean, rstd
            )
            grads = [*conv_gradients(grad_conv, x.to(u.dtype), dwconv_weight, needed), *norm_grads]
        if needed[0]:
            grads[0] = (grad + grads[0]).to(x.dtype)
        return (
            *grads,
            grad_weight1 if needed[5] else None,
            grad_bias1 if needed[6] else None,
            grad_grn_weight,
            grad_grn_bias,
            grad_weight2 if needed[9] else None,
            grad.sum((0, 1, 2), dtype=bias2.dtype) if needed[10] else None,
            None,
        )
