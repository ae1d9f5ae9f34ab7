"""A Linear layer: PyTorch's, or on a CPU our own product where that is the quicker one.

For float32 PyTorch takes MKL, which on processors with AVX-512 of other makers than Intel keeps to narrower code: less
than half as quick on a Zen 5. `build_info()["cpu_products"]` says which is taken here.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.flop_counter import register_flop_formula

from convdit._library import build_info

from ._common import Function, library, needs_grad, register_fake, register_vmap

HERE = build_info()["cpu_products"] == "convdit"
FEWEST = 1 << 16  # multiply-adds that are worth it, as in csrc/common/products.h


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weight^T + bias``.

    Args:
        x: (..., K), any dtype that PyTorch's ``linear`` takes, any strides. Autocast treats it as PyTorch's.
        weight, bias: (N, K), x's dtype; (N,) or None.

    Returns:
        (..., N) in x's dtype.

    Raises:
        RuntimeError: a dtype, shape or device that does not fit.

    Source: ``torch.nn.functional.linear``, which it is but for large float32 products on such a CPU.
    """
    if not HERE or not _is_ours(x, weight, bias):
        return F.linear(x, weight, bias)
    if needs_grad(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return library.linear_fwd.default(x, weight, bias)


def _is_ours(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if not (x.dtype is weight.dtype is torch.float32 and x.is_cpu and weight.is_cpu):
        return False
    if torch._C._is_any_autocast_enabled() or (bias is not None and bias.dtype is not torch.float32):
        return False
    if torch.compiler.is_exporting():  # a plain operator, as other programs know it
        return False
    # Compiled for any size, the operator itself decides.
    return torch.compiler.is_compiling() or x.numel() * weight.shape[0] >= FEWEST


@register_fake("linear_fwd")
def _(x, weight, bias):
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@register_fake("packed_qkv")
def _(x, *layers):
    return x.new_empty((*x.shape[:-1], sum(weight.shape[0] for weight in layers[::2])))


@register_fake("linear_bwd")
def _(grad, x, weight, need_x, need_weight):
    return x.new_empty(x.shape if need_x else (0,)), weight.new_empty(weight.shape if need_weight else (0,))


register_vmap("linear_fwd", folded=(0,))
register_vmap("packed_qkv", folded=(0,))
register_vmap("linear_bwd", folded=())


@register_flop_formula(library.linear_fwd)
def _(x_shape, weight_shape, *_args, **_kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0]


@register_flop_formula(library.packed_qkv)
def _(x_shape, *layers, **_kwargs) -> int:
    return 2 * x_shape.numel() * sum(weight_shape[0] for weight_shape in layers[::2])


@register_flop_formula(library.linear_bwd)
def _(grad_shape, x_shape, weight_shape, need_x, need_weight, **_kwargs) -> int:
    return 2 * x_shape.numel() * weight_shape[0] * (need_x + need_weight)


class _Linear(Function):
    @staticmethod
    def forward(x, weight, bias):
        return library.linear_fwd.default(x, weight, bias)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        grad_x, grad_weight = library.linear_bwd.default(grad, x, weight, need_x, need_weight)
        return (
            grad_x if need_x else None,
            grad_weight if need_weight else None,
            grad.flatten(0, -2).sum(0) if need_bias else None,
        )
