"""Global response normalisation (ConvNeXt V2, arXiv:2301.00808, section 4), in plain PyTorch.

The functional form takes the weight and bias that a module calls gamma and beta:

    G = sqrt(sum of x^2 over the sites of an image)        one value a channel
    y = x + weight * (x * G / (mean of G over channels + eps)) + bias

The norm's gradient at zero is zero: the square root of a sum of squares has none there, and a
masked map or a dead channel makes it happen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from convdit.sparse import ActiveSites


def _wide(x: Tensor) -> Tensor:
    # Squares of half-precision values overflow; sums of them lose digits.
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _root(squares: Tensor) -> Tensor:
    """sqrt with value and all derivatives zero at zero."""
    zero = squares == 0
    return torch.where(zero, 0, torch.where(zero, 1, squares).sqrt())


def _apply(x: Tensor, squares: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """GRN of x from the sums of squares, already of a shape that broadcasts to x's."""
    norm = _root(squares)
    response = norm / (norm.mean(-1, keepdim=True) + eps)
    return x + weight.to(x.dtype) * (x * response.to(x.dtype)) + bias.to(x.dtype)


def grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """Global response normalisation of dense maps.

    Args:
        x: (N, H, W, C).
        weight: (C,).
        bias: (C,).
        eps: added to the mean of the norms.

    Returns:
        (N, H, W, C), in x's dtype.
    """
    squares = _wide(x).square().sum((1, 2), keepdim=True)
    return _apply(x, squares, weight, bias, eps)


def gelu_grn(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-6) -> Tensor:
    """`grn` of the exact (erf) GELU of x; arguments as there."""
    return grn(F.gelu(x), weight, bias, eps)


def sparse_grn(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: ActiveSites,
    eps: float = 1e-6,
    scope: str = "sample",
) -> Tensor:
    """Global response normalisation over visible sites only.

    Args:
        features: (M, C), one row a visible site.
        weight: (C,).
        bias: (C,).
        sites: the M visible sites.
        eps: added to the mean of the norms.
        scope: "sample": norms over each image's own sites, as the dense layer; "batch": over all
            sites of the batch, as the original sparse code.

    Returns:
        (M, C), in the features' dtype.

    Raises:
        ValueError: another scope.
    """
    squares = _wide(features).square()
    if scope == "sample":
        image = sites.indices[:, 0].long()
        sums = squares.new_zeros(sites.batch_size, squares.shape[1]).index_add(0, image, squares)
        squares = sums[image]
    elif scope == "batch":
        squares = squares.sum(0, keepdim=True)
    else:
        raise ValueError(f'scope: expected "sample" or "batch", got {scope!r}')
    return _apply(features, squares, weight, bias, eps)


def sparse_gelu_grn(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    sites: ActiveSites,
    eps: float = 1e-6,
    scope: str = "sample",
) -> Tensor:
    """`sparse_grn` of the exact (erf) GELU of the features; arguments as there."""
    return sparse_grn(F.gelu(features), weight, bias, sites, eps, scope)
