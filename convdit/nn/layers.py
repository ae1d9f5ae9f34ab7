"""The small layers of a ConvNeXt, over channels-last maps or the visible sites of masked ones.

Each takes an (N, H, W, C) tensor or a `SparseTensor2d` and returns the same kind. Absent sites are
never computed in the sparse form. A dense map with absent sites must hold zeros there, and the
layers that look at it as a whole take a `visible` mask.
"""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor, nn

from convdit import ops
from convdit._checks import check_tensor, check_whole
from convdit.sparse import ActiveSites, SparseTensor2d

Map = Tensor | SparseTensor2d


class DepthwiseConv2d(nn.Module):
    """Depthwise "same" convolution of stride 1.

    Args:
        dim: channels C.
        kernel_size: K, odd, 3 to 31.
        bias: whether to add one.

    Shapes: (N, H, W, C) to the same, or sparse (M, C) to the same, where absent neighbours count as
    zero. Parameters: weight (C, 1, K, K), bias (C,), drawn as `torch.nn.Conv2d` draws them.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int = 7,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole("dim", dim, 1)
        check_whole("kernel_size", kernel_size, 3)
        if kernel_size % 2 == 0 or kernel_size > 31:
            raise ValueError(f"kernel_size: expected an odd size from 3 to 31, got {kernel_size}")
        self.dim = dim
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(dim, 1, kernel_size, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(dim, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if self.bias is not None:
            nn.init.uniform_(self.bias, -1 / self.kernel_size, 1 / self.kernel_size)

    def forward(self, x: Map) -> Map:
        if isinstance(x, SparseTensor2d):
            return x.replace(ops.sparse_depthwise_conv2d(x.features, self.weight, self.bias, x.sites))
        return ops.depthwise_conv2d(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.dim}, kernel_size={self.kernel_size}, bias={self.bias is not None}"


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the channels of a map, dense or sparse; eps is 1e-6 as in ConvNeXt."""

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        check_whole("dim", dim, 1)
        super().__init__(dim, eps=eps, device=device, dtype=dtype)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: SparseTensor2d) -> SparseTensor2d: ...
    def forward(self, x: Map) -> Map:
        if isinstance(x, SparseTensor2d):
            return x.replace(super().forward(x.features))
        check_tensor("x", x)
        return super().forward(x)


class GlobalResponseNorm(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv:2301.00808, section 4).

    Args:
        dim: channels C.
        eps: added to the mean of the norms.
        scope: of the norm where sites are absent: "sample" for each image's own sites, "batch" for
            all sites of the batch. Maps without absent sites are always normalised one by one.

    Parameters: gamma and beta, (C,), zeros at first: the layer starts as the identity.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        scope: str = "sample",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_whole("dim", dim, 1)
        check_scope("scope", scope)
        self.eps = eps
        self.scope = scope
        self.gamma = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))
        self.beta = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Map, visible: Tensor | None = None) -> Map:
        """Normalise x; where `visible`, (N, H, W), is given, x must be zero at absent sites."""
        return self._normalise(x, visible, ops.grn, ops.sparse_grn)

    @overload
    def gelu(self, x: Tensor, visible: Tensor | None = None) -> Tensor: ...
    @overload
    def gelu(self, x: SparseTensor2d, visible: None = None) -> SparseTensor2d: ...
    def gelu(self, x: Map, visible: Tensor | None = None) -> Map:
        """`forward` of the exact GELU of x, in one operator."""
        return self._normalise(x, visible, ops.gelu_grn, ops.sparse_gelu_grn)

    def _normalise(self, x, visible, dense, sparse):
        if isinstance(x, SparseTensor2d):
            y = sparse(x.features, self.gamma, self.beta, x.sites, self.eps, self.scope)
            return x.replace(y)
        if visible is None or self.scope == "sample":
            return dense(x, self.gamma, self.beta, self.eps)
        n, height, width, channels = x.shape  # one tall image: zeros add nothing to its norm
        y = dense(x.reshape(1, n * height, width, channels), self.gamma, self.beta, self.eps)
        return y.view(n, height, width, channels)

    def extra_repr(self) -> str:
        return f"{self.gamma.numel()}, eps={self.eps}, scope={self.scope!r}"


def check_scope(name: str, scope: str) -> None:
    if scope not in ("sample", "batch"):
        raise ValueError(f'{name}: expected "sample" or "batch", got {scope!r}')


def drop_path(values: Tensor, rate: float, training: bool, sites: ActiveSites | None = None) -> Tensor:
    """Stochastic depth (arXiv:1603.09382): zero a branch for whole images, scale up the others.

    values is (N, H, W, C), or (M, C) with the M sites.
    """
    if not training or rate == 0:
        return values
    n = values.shape[0] if sites is None else sites.batch_size
    keep = values.new_empty(n).bernoulli_(1 - rate).div_(1 - rate)
    if sites is None:
        return values * keep[:, None, None, None]
    return values * keep[sites.indices[:, 0].long()][:, None]


def hide(x: Tensor, visible: Tensor | None) -> Tensor:
    """Zero a dense map, (N, H, W, C), where `visible`, (N, H, W), is False."""
    return x if visible is None else x * visible[..., None]
