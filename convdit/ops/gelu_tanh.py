"""The tanh form of GELU, with the bias before it: the middle of DiT's MLP.

Hendrycks & Gimpel, "Gaussian Error Linear Units" (2016), section 2. On a CPU the arithmetic is ours, several times as
quick as PyTorch's; other devices have PyTorch's own, which a compiler can fuse into what is around it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import Function, check_floating, check_tensor, library, needs_grad, parameter, register_fake


def gelu_tanh(x: Tensor, bias: Tensor | None = None, overwrite: bool = False) -> Tensor:
    """``v / 2 * (1 + tanh(sqrt(2 / pi) * (v + 0.044715 * v**3)))`` of ``v = x + bias``.

    Args:
        x: (..., D), float32, float64, bfloat16 or float16, any strides. Autocast leaves it as it is.
        bias: (D,) or None, x's dtype or any of the three smaller ones.
        overwrite: nobody reads x hereafter, so its memory may take the result. It does so on a CPU, where no gradient,
            compiler or transform sees the call.

    Returns:
        (..., D), x's dtype; contiguous on a CPU.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Hendrycks & Gimpel 2016, section 2; equal to ``torch.nn.functional.gelu(x + bias, approximate="tanh")``.
    """
    check_floating("x", x)
    if bias is not None:
        check_tensor("bias", bias)
    if x.device.type != "cpu":
        return F.gelu(x if bias is None else x + parameter("bias", bias, x).to(x.dtype), approximate="tanh")
    if needs_grad(x, bias):
        return _GeluTanh.apply(x, bias)
    bias = _kernel_bias(bias, x)
    if overwrite and not torch.compiler.is_compiling() and x.is_contiguous():
        library.gelu_tanh_.default(x, bias)
        return x
    return library.gelu_tanh_fwd.default(x, bias)


def _kernel_bias(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """The bias as kernels take it. Inside the autograd function, so that no node of its own casts the gradient back."""
    if bias is None or bias.dtype is x.dtype:
        return bias
    return parameter("bias", bias, x)


@register_fake("gelu_tanh_fwd")
def _(x, bias):
    return x.new_empty(x.shape)


@register_fake("gelu_tanh_")
def _(x, bias):
    return None


@register_fake("gelu_tanh_bwd")
def _(grad, x, bias):
    return x.new_empty(x.shape)


def _vmap_rule(operator):
    def rule(info, in_dims, *given):
        size, (*tensors, bias) = info.batch_size, given
        rows = [
            t.expand(size, *t.shape) if axis is None else t.movedim(axis, 0)
            for t, axis in zip(tensors, in_dims[:-1], strict=True)
        ]
        if in_dims[-1] is None:  # one bias for all, or none
            return operator(*rows, bias), 0
        biases = bias.movedim(in_dims[-1], 0)
        return torch.stack([operator(*(t[k] for t in rows), biases[k]) for k in range(size)]), 0

    return rule


for _name in ("gelu_tanh_fwd", "gelu_tanh_bwd"):
    torch.library.register_vmap(f"convdit::{_name}", _vmap_rule(getattr(library, _name)))


class _GeluTanh(Function):
    @staticmethod
    def forward(x, bias):
        return library.gelu_tanh_fwd.default(x, _kernel_bias(bias, x))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, bias = ctx.saved_tensors
        grad_x = library.gelu_tanh_bwd.default(grad, x, _kernel_bias(bias, x))
        if not ctx.needs_input_grad[1]:
            return grad_x, None
        if grad_x.dim() > 1 and bias.dtype is grad_x.dtype:
            return grad_x, grad_x.sum(tuple(range(grad_x.dim() - 1)))  # in half the time of the general way
        rows = grad_x.flatten(0, -2) if grad_x.dim() > 1 else grad_x[None]
        return grad_x, rows.sum(0, dtype=bias.dtype)
