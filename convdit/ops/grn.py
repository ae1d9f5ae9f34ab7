"""Global response normalisation, alone and after the exact GELU, of dense maps and of visible sites.

Woo et al., "ConvNeXt V2: Co-designing and Scaling ConvNets with Masked Autoencoders" (2023), section 4.
Each image is read twice in a row, while it is in cache, whatever the batch; the backward recomputes the GELU.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.autograd.function import once_differentiable

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


def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """``x + weight * (x * N) + bias`` with N = G / (mean of G over channels + eps), G the norm of a channel's map.

    Args:
        x: (N, H, W, C), float32, float64, bfloat16 or float16, any strides. Autocast casts it.
        weight, bias: (C,), x's dtype or any of the three smaller ones; gamma and beta of the paper.
        eps: added to the mean of the norms.

    Returns:
        (N, H, W, C) in x's dtype, contiguous. Sums are taken in float32 (float64 for float64). The gradient of a
        norm that is zero (a dead channel, an empty image) is zero.

    Raises:
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Woo et al. 2023, section 4; equal to the ``GRN`` of facebookresearch/ConvNeXt-V2.
    """
    return _dense(x, weight, bias, eps, gelu=False)


def gelu_grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """:func:`grn` of the exact GELU, ``x * Phi(x)``: the middle of a ConvNeXt V2 block, as one operator.

    Arguments, result and errors are those of :func:`grn`. The GELU's result is not rounded to a half-precision
    dtype on the way. In float32 Phi has an absolute error below 1.5e-7.
    """
    return _dense(x, weight, bias, eps, gelu=True)


def sparse_grn(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: ActiveSites,
    eps: float = 1e-6,
    scope: str = "sample",
) -> Tensor:
    """:func:`grn` of packed features: norms are taken over visible sites only.

    Args:
        features: (M, C), one row a visible site, dtypes and strides as in :func:`grn`.
        weight, bias, eps: as in :func:`grn`.
        sites: the M sites, on the same device.
        scope: "sample": norms over each image's own sites, equal to the dense layer on them; "batch": over all
            sites of the batch, as the original sparse code.

    Returns:
        (M, C) in the features' dtype, contiguous.

    Raises:
        ValueError: another scope, or a number of rows that is not the number of sites.
        TypeError, RuntimeError: a dtype, shape or device that does not fit, naming the argument.

    Source: Woo et al. 2023, "Global Response Normalization"; "batch" as the official ``MinkowskiGRN``.
    """
    return _packed(features, weight, bias, sites, eps, scope, gelu=False)


def sparse_gelu_grn(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: ActiveSites,
    eps: float = 1e-6,
    scope: str = "sample",
) -> Tensor:
    """:func:`sparse_grn` of the exact GELU of the features; arguments, result and errors as there."""
    return _packed(features, weight, bias, sites, eps, scope, gelu=True)


def _dense(x: Tensor, weight: Tensor, bias: Tensor, eps: float, gelu: bool) -> Tensor:
    out = at_once(library.grn_fwd.default, x, weight, bias, eps, gelu)
    if out is not None:
        return out
    check_floating("x", x)
    x = autocast(x)
    weight, bias = parameter("weight", weight, x), parameter("bias", bias, x)
    if needs_grad(x, weight, bias):
        return _Grn.shown(x, weight, bias, eps, gelu)[0]
    return library.grn_fwd.default(x, weight, bias, eps, gelu)


def _packed(features, weight, bias, sites, eps, scope, gelu):
    if scope == "sample" and hasattr(sites, "block_neighbors"):
        out = at_once(library.sparse_grn_fwd.default, features, weight, bias, sites.offsets, eps, gelu)
        if out is not None:
            return out
    check_floating("features", features)
    if scope not in ("sample", "batch"):
        raise ValueError(f'scope: expected "sample" or "batch", got {scope!r}')
    if features.dim() != 2 or features.shape[0] != len(sites):
        raise ValueError(f"features: expected shape ({len(sites)}, C), one row a site, got {tuple(features.shape)}")
    if scope == "batch":  # one image that has all the sites
        return _dense(features[None, :, None], weight, bias, eps, gelu)[0, :, 0]
    features = autocast(features)
    weight, bias = parameter("weight", weight, features), parameter("bias", bias, features)
    if needs_grad(features, weight, bias):
        return _SparseGrn.shown(features, weight, bias, sites.offsets, eps, gelu)[0]
    return library.sparse_grn_fwd.default(features, weight, bias, sites.offsets, eps, gelu)


# ---- dense ---------------------------------------------------------------------------------------


@register_fake("grn_fwd")
def _(x, weight, bias, eps, gelu):
    return x.new_empty(x.shape)


@register_fake("grn_fwd_save")
def _(x, weight, bias, eps, gelu):
    norm = x.new_empty((x.shape[0], x.shape[-1]), dtype=accumulate_dtype(x.dtype))
    return x.new_empty(x.shape), norm


@register_fake("grn_bwd")
def _(grad, x, norm, weight, eps, gelu):
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


register_vmap("grn_fwd", folded=(0,))
register_vmap("grn_fwd_save", folded=(0,))
register_vmap("grn_bwd", folded=())  # the parameters' gradients are sums over what would be folded


class _Grn(Function):
    hidden = 1

    @staticmethod
    def forward(x, weight, bias, eps, gelu):
        return library.grn_fwd_save.default(x, weight, bias, eps, gelu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, weight, _, ctx.eps, ctx.gelu = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, output[1], weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _norm):
        return *library.grn_bwd.default(grad, *ctx.saved_tensors, ctx.eps, ctx.gelu), None, None


# ---- packed --------------------------------------------------------------------------------------


@register_fake("sparse_grn_fwd")
def _(features, weight, bias, offsets, eps, gelu):
    return features.new_empty(features.shape)


@register_fake("sparse_grn_fwd_save")
def _(features, weight, bias, offsets, eps, gelu):
    dtype = accumulate_dtype(features.dtype)
    norm = features.new_empty((offsets.shape[0] - 1, features.shape[1]), dtype=dtype)
    return features.new_empty(features.shape), norm


@register_fake("sparse_grn_bwd")
def _(grad, features, norm, weight, offsets, eps, gelu):
    parameters = [weight.new_empty(weight.shape) for _ in range(2)]
    return features.new_empty(features.shape), *parameters


register_vmap("sparse_grn_fwd", folded=())
register_vmap("sparse_grn_fwd_save", folded=())
register_vmap("sparse_grn_bwd", folded=())


class _SparseGrn(Function):
    hidden = 1

    @staticmethod
    def forward(features, weight, bias, offsets, eps, gelu):
        return library.sparse_grn_fwd_save.default(features, weight, bias, offsets, eps, gelu)

    @staticmethod
    def setup_context(ctx, inputs, output):
        features, weight, _, offsets, ctx.eps, ctx.gelu = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(features, output[1], weight, offsets)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _norm):
        grads = library.sparse_grn_bwd.default(grad, *ctx.saved_tensors, ctx.eps, ctx.gelu)
        return *grads, None, None, None
