"""Self-attention on the packed output of a qkv Linear.

Vaswani et al., "Attention Is All You Need" (2017), section 3.2. The kernels are ours, but that a CPU leaves float64 to
PyTorch's flash kernel, and large bfloat16 where it has instructions for products of tiles of that.
"""

from __future__ import annotations

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
    register_fake,
    register_vmap,
)


def packed_attention(qkv: Tensor, num_heads: int, scale: float | None = None) -> Tensor:
    """Multi-head softmax attention of each sequence over itself.

    Args:
        qkv: (B, T, 3 D) as one Linear writes it: q, k, v in turn, each with its heads side by side. float32, float64,
            bfloat16 or float16, any strides. Under autocast it is cast as PyTorch casts attention.
        num_heads: heads; must divide D.
        scale: multiplies the scores; ``(D / num_heads) ** -0.5`` unless given.

    Returns:
        (B, T, D) in qkv's dtype, contiguous, heads side by side. With gradients, bfloat16 and float16 on CUDA also keep
        what rounding took from it, as many bytes again, so that the backward starts from the unrounded result.

    Raises:
        TypeError, ValueError, RuntimeError: a dtype, shape or number of heads that does not fit, naming the argument.

    Source: the attention of facebookresearch/DiT's blocks (timm's ``Attention`` without norms or dropout).
    """
    check_floating("qkv", qkv)
    shape = qkv.shape
    if len(shape) != 3:
        raise ValueError(f"qkv: expected shape (B, T, 3 D), got {tuple(shape)}")
    width = shape[2]
    if not isinstance(num_heads, int) or num_heads < 1 or width % (3 * num_heads):
        raise ValueError(f"num_heads: expected a number of heads that divides D = {width / 3:g}, got {num_heads}")
    if scale is None:
        scale = max(width // (3 * num_heads), 1) ** -0.5
    out = at_once(library.packed_attention_fwd.default, qkv, num_heads, scale)
    if out is not None:
        return out
    qkv = autocast(qkv)
    if needs_grad(qkv):
        return _PackedAttention.shown(qkv, num_heads, scale)[0]
    return library.packed_attention_fwd.default(qkv, num_heads, scale)


KEEP_REST = ["cuda"]  # devices whose kernels keep for the backward what rounding took from the result


@register_fake("packed_attention_fwd")
def _(qkv, num_heads, scale):
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


@register_fake("packed_attention_fwd_save")
def _(qkv, num_heads, scale):
    batch, tokens, width = qkv.shape
    log_sum_exp = qkv.new_empty((batch, tokens, num_heads), dtype=accumulate_dtype(qkv.dtype))
    rest = tokens if qkv.element_size() == 2 and qkv.device.type in KEEP_REST else 0
    return qkv.new_empty((batch, tokens, width // 3)), log_sum_exp, qkv.new_empty((batch, rest, width // 3))


@register_fake("packed_attention_bwd")
def _(grad, qkv, out, log_sum_exp, rest, num_heads, scale):
    return qkv.new_empty(qkv.shape)


register_vmap("packed_attention_fwd", folded=(0,))
register_vmap("packed_attention_fwd_save", folded=(0,))
register_vmap("packed_attention_bwd", folded=(0, 1, 2, 3, 4))


@register_flop_formula([library.packed_attention_fwd, library.packed_attention_fwd_save])
def _(qkv, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, width = qkv
    return 2 * 2 * batch * tokens * tokens * (width // 3)  # two matrix products: q k^T, and the weights times v


@register_flop_formula(library.packed_attention_bwd)
def _(grad, qkv, *_args, out_shape=None, **_kwargs) -> int:
    batch, tokens, width = qkv
    return 5 * 2 * batch * tokens * tokens * (width // 3)  # q k^T again, and the gradients of q, k, v and the weights


class _PackedAttention(Function):
    hidden = 2

    @staticmethod
    def forward(qkv, num_heads, scale):
        return library.packed_attention_fwd_save.default(qkv, num_heads, scale)

    @staticmethod
    def setup_context(ctx, inputs, output):
        qkv, ctx.num_heads, ctx.scale = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(qkv, *output)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _log_sum_exp, _rest):
        return library.packed_attention_bwd.default(grad, *ctx.saved_tensors, ctx.num_heads, ctx.scale), None, None
