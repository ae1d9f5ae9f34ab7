"""The adaptive LayerNorm of DiT: LayerNorm + modulate, gated residual, and the two in one pass.

Peebles & Xie, "Scalable Diffusion Models with Transformers" (2023), section 3.2, adaLN-Zero block.
Each public function is followed by what PyTorch needs to know of its operators.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ._common import (
    Function,
    accumulate_dtype,
    at_once,
    check_device,
    check_floating,
    library,
    needs_grad,
    parameter,
    register_fake,
    register_vmap,
)


def layer_norm_modulate(x: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6) -> Tensor:
    """``LN(x) * (1 + scale) + shift``, LayerNorm over the last axis without affine parameters.

    Args:
        x: (B, T, D), float32, float64, bfloat16 or float16, any strides.
        shift, scale: (B, D), x's dtype or any of the three smaller ones.
        eps: added to the biased variance, inside the root.

    Returns:
        (B, T, D) in x's dtype, contiguous. Sums are taken in float32 (float64 for float64).

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Peebles & Xie 2023, section 3.2; the ``modulate`` of facebookresearch/DiT after its LayerNorm.
    """
    out = at_once(library.layer_norm_modulate_fwd.default, x, shift, scale, eps)
    if out is not None:
        return out
    check_floating("x", x)
    shift, scale = parameter("shift", shift, x), parameter("scale", scale, x)
    if needs_grad(x, shift, scale):
        return _LayerNormModulate.shown(x, shift, scale, eps)[0]
    return library.layer_norm_modulate_fwd.default(x, shift, scale, eps)


@register_fake("layer_norm_modulate_fwd")
def _(x, shift, scale, eps):
    return x.new_empty(x.shape)


@register_fake("layer_norm_modulate_fwd_save")
def _(x, shift, scale, eps):
    rows = x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), rows, torch.empty_like(rows)


@register_fake("layer_norm_modulate_bwd")
def _(grad, x, scale, mean, rstd):
    columns = x.new_empty((x.shape[0], x.shape[2]), dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), columns, torch.empty_like(columns)


register_vmap("layer_norm_modulate_fwd", folded=(0, 1, 2))
register_vmap("layer_norm_modulate_fwd_save", folded=(0, 1, 2))
register_vmap("layer_norm_modulate_bwd", folded=(0, 1, 2, 3, 4))


class _LayerNormModulate(Function):
    hidden = 2

    @staticmethod
    def forward(x, shift, scale, eps):
        return library.layer_norm_modulate_fwd_save.default(x, shift, scale, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, _, scale, _ = inputs
        _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, scale, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _mean, _rstd):
        return *library.layer_norm_modulate_bwd.default(grad, *ctx.saved_tensors), None


def gated_residual(x: Tensor, y: Tensor, gate: Tensor) -> Tensor:
    """``x + gate * y``: a branch added to the residual stream through its gate.

    Args:
        x: (B, T, D), the residual stream, any of the four dtypes, any strides.
        y: (B, T, D), the branch, in x's dtype; beside a float32 x also bfloat16 or float16, as autocast gives it.
        gate: (B, D), x's dtype or any of the three smaller ones.

    Returns:
        (B, T, D) in x's dtype, contiguous.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Peebles & Xie 2023, section 3.2.
    """
    out = at_once(library.gated_residual_fwd.default, x, y, gate)
    if out is not None:
        return out
    check_floating("x", x)
    check_floating("y", y)
    check_device("y", y, x)
    if not isinstance(gate, Tensor) or gate.dtype is not x.dtype or gate.device != x.device:
        gate = parameter("gate", gate, x)
    if needs_grad(x, y, gate):
        return _GatedResidual.apply(x, y, gate)
    return library.gated_residual_fwd.default(x, y, gate)


@register_fake("gated_residual_fwd")
def _(x, y, gate):
    return x.new_empty(x.shape)


@register_fake("gated_residual_bwd")
def _(grad, y, gate):
    return y.new_empty(y.shape), gate.new_empty(gate.shape)


register_vmap("gated_residual_fwd", folded=(0, 1, 2))
register_vmap("gated_residual_bwd", folded=(0, 1, 2))


class _GatedResidual(Function):
    @staticmethod
    def forward(x, y, gate):
        return library.gated_residual_fwd.default(x, y, gate)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, y, gate = inputs
        ctx.save_for_backward(y, gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        return grad, *library.gated_residual_bwd.default(grad, *ctx.saved_tensors)


def gated_residual_layer_norm_modulate(
    x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """``r = x + gate * y`` and ``LN(r) * (1 + scale) + shift``, reading and writing the residual stream once.

    Args:
        x, y, gate: as in :func:`gated_residual`.
        shift, scale, eps: as in :func:`layer_norm_modulate`.

    Returns:
        (r, modulated), both (B, T, D) in x's dtype, contiguous.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Peebles & Xie 2023, section 3.2: the end of one branch and the beginning of the next.
    """
    out = at_once(library.gated_residual_layer_norm_modulate_fwd.default, x, y, gate, shift, scale, eps)
    if out is not None:
        return out
    check_floating("x", x)
    check_floating("y", y)
    check_device("y", y, x)
    gate, shift = parameter("gate", gate, x), parameter("shift", shift, x)
    scale = parameter("scale", scale, x)
    if needs_grad(x, y, gate, shift, scale):
        return _GatedResidualLayerNormModulate.shown(x, y, gate, shift, scale, eps)[:2]
    return library.gated_residual_layer_norm_modulate_fwd.default(x, y, gate, shift, scale, eps)


@register_fake("gated_residual_layer_norm_modulate_fwd")
def _(x, y, gate, shift, scale, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


@register_fake("gated_residual_layer_norm_modulate_fwd_save")
def _(x, y, gate, shift, scale, eps):
    rows = x.new_empty(x.shape[:2], dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), x.new_empty(x.shape), rows, torch.empty_like(rows)


@register_fake("gated_residual_layer_norm_modulate_bwd")
def _(grad_residual, grad_out, residual, y, gate, scale, mean, rstd):
    columns = [gate.new_empty(gate.shape) for _ in range(3)]
    return residual.new_empty(residual.shape), y.new_empty(y.shape), *columns


register_vmap("gated_residual_layer_norm_modulate_fwd", folded=(0, 1, 2, 3, 4))
register_vmap("gated_residual_layer_norm_modulate_fwd_save", folded=(0, 1, 2, 3, 4))
register_vmap("gated_residual_layer_norm_modulate_bwd", folded=(0, 1, 2, 3, 4, 5, 6, 7))


class _GatedResidualLayerNormModulate(Function):
    hidden = 2

    @staticmethod
    def forward(x, y, gate, shift, scale, eps):
        return library.gated_residual_layer_norm_modulate_fwd_save.default(x, y, gate, shift, scale, eps)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, y, gate, _, scale, _ = inputs
        residual, _, mean, rstd = output
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(residual, y, gate, scale, mean, rstd)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_residual, grad_out, _mean, _rstd):
        grads = library.gated_residual_layer_norm_modulate_bwd.default(grad_residual, grad_out, *ctx.saved_tensors)
        return *grads, None
