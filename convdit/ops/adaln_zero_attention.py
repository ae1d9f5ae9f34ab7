"""The attention half of an adaLN-Zero block as one operator.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN-Zero block.
In float32 on the CPU its parts' kernels run on a few sequences at a time through one set of scratch: what the qkv
Linear writes, three times as wide as the residual stream, stays in cache. With gradients it is kept. Elsewhere the
half-block is its parts, each with its own backward.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from ._common import (
    Function,
    at_once,
    check_device,
    check_floating,
    check_tensor,
    is_plain,
    library,
    needs_grad,
    register_fake,
    register_vmap,
)
from .adaln import gated_residual, layer_norm_modulate
from .attention import packed_attention
from .linear import linear


def adaln_zero_attention(
    x: Tensor,
    modulation: Tensor,
    qkv_weight: Tensor,
    qkv_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    num_heads: int,
    eps: float = 1e-6,
) -> Tensor:
    """The attention half of an adaLN-Zero block, residual included.

    ``x + gate * proj(attention(qkv(LN(x) * (1 + scale) + shift)))``, of :func:`layer_norm_modulate`,
    :func:`packed_attention` and :func:`gated_residual`, with matrix products between them.

    Args:
        x: (B, T, D), the residual stream.
        modulation: (B, 3, D): shift, scale, gate.
        qkv_weight, qkv_bias: (3 D, D) and (3 D,) or None, as nn.Linear keeps them.
        proj_weight, proj_bias: (D, D) and (D,) or None.
        num_heads: heads; must divide D.
        eps: added to the variance of the LayerNorm.

    Returns:
        (B, T, D) in x's dtype.

    Raises:
        TypeError, ValueError, RuntimeError: a dtype, shape or number of heads that does not fit, naming the argument.

    Source: Peebles & Xie 2023, section 3.2, adaLN-Zero block.
    """
    given = (x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias)
    if getattr(x, "dtype", None) is getattr(qkv_weight, "dtype", None) is torch.float32:  # of no other
        out = at_once(library.adaln_zero_attention_fwd.default, *given, num_heads, eps)
        if out is not None:
            return out
    try:  # the operator looks at the arguments
        if is_plain(x, qkv_weight):
            if needs_grad(*given):
                return _AdalnZeroAttention.shown(*given, num_heads, eps)[0]
            return library.adaln_zero_attention_fwd.default(*given, num_heads, eps)
    except (RuntimeError, TypeError, AttributeError):
        pass  # an argument to be cast, or an error, to be told by the parts
    check_floating("x", x)
    check_floating("modulation", modulation)
    expected = (x.shape[0], 3, x.shape[-1])
    if x.dim() != 3:
        raise ValueError(f"x: expected shape (B, T, D), got {tuple(x.shape)}")
    if tuple(modulation.shape) != expected:
        raise ValueError(f"modulation: expected shape {expected}, got {tuple(modulation.shape)}")
    names = ("modulation", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    for name, value in zip(names, given[1:], strict=True):
        if value is not None:
            check_tensor(name, value)
            check_device(name, value, x)
    shift, scale, gate = modulation.unbind(1)
    attended = packed_attention(linear(layer_norm_modulate(x, shift, scale, eps), qkv_weight, qkv_bias), num_heads)
    return gated_residual(x, linear(attended, proj_weight, proj_bias), gate)


@register_fake("adaln_zero_attention_fwd")
def _(x, *_args):
    return x.new_empty(x.shape)


@register_fake("adaln_zero_attention_fwd_save")
def _(x, _modulation, _1, _2, _3, _4, num_heads, _eps):
    rows, width = x.shape[:2], x.shape[2]
    wide = (x.new_empty((*rows, n)) for n in (width, 3 * width, width, num_heads, width))
    return x.new_empty(x.shape), x.new_empty(rows), x.new_empty(rows), *wide


register_vmap("adaln_zero_attention_fwd", folded=(0, 1))
register_vmap("adaln_zero_attention_fwd_save", folded=(0, 1))


@register_flop_formula([library.adaln_zero_attention_fwd, library.adaln_zero_attention_fwd_save])
def _(x_shape, *_args, **_kwargs) -> int:
    batch, tokens, width = x_shape
    return 2 * batch * tokens * (4 * width**2 + 2 * tokens * width)  # four D x D products a token, and attention's two


class _AdalnZeroAttention(Function):
    hidden = 7

    @staticmethod
    def forward(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps):
        return library.adaln_zero_attention_fwd_save.default(
            x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads, eps
        )

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, modulation, qkv_weight, _, proj_weight, _, ctx.num_heads, _ = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(x, modulation, qkv_weight, proj_weight, *output[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, *_kept):
        x, modulation, qkv_weight, proj_weight, mean, rstd, modulated, qkv, attended, log_sum_exp, y = ctx.saved_tensors
        _, scale, gate = modulation.unbind(1)
        needed = ctx.needs_input_grad
        grad_y, grad_gate = library.gated_residual_bwd.default(grad, y, gate)
        grad_attended, grad_proj = library.linear_bwd.default(grad_y, attended, proj_weight, True, needed[4])
        rest = attended.new_empty((attended.shape[0], 0, attended.shape[2]))
        softmax_scale = max(x.shape[2] // ctx.num_heads, 1) ** -0.5
        grad_qkv = library.packed_attention_bwd.default(
            grad_attended, qkv, attended, log_sum_exp, rest, ctx.num_heads, softmax_scale
        )
        grad_modulated, grad_qkv_weight = library.linear_bwd.default(grad_qkv, modulated, qkv_weight, True, needed[2])
        grad_x, grad_shift, grad_scale = library.layer_norm_modulate_bwd.default(grad_modulated, x, scale, mean, rstd)
        return (
            grad + grad_x if needed[0] else None,
            torch.stack([grad_shift, grad_scale, grad_gate], 1) if needed[1] else None,
            grad_qkv_weight if needed[2] else None,
            grad_qkv.sum((0, 1)) if needed[3] else None,
            grad_proj if needed[4] else None,
            grad_y.sum((0, 1)) if needed[5] else None,
            None,
            None,
        )
