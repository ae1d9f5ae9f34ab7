"""The residual block of ConvNeXt, versions 1 and 2."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit import ops
from convdit._checks import check_rate
from convdit.sparse import ActiveSites, SparseTensor2d

from .layers import DepthwiseConv2d, GlobalResponseNorm, LayerNorm, Map, drop_path, hide
from .linear import Linear


class ConvNeXtBlock(nn.Module):
    """x + pwconv2(act(pwconv1(norm(dwconv(x))))).

    Version 2 (arXiv:2301.00808, figure 5): act is the exact GELU, then global response
    normalisation. Version 1 (arXiv:2201.03545): act is the GELU alone, and the branch is scaled by
    `gamma`. Names are those of facebookresearch/ConvNeXt-V2 and facebookresearch/ConvNeXt.

    Args:
        dim: channels C.
        version: 1 or 2.
        drop_path: rate of stochastic depth, in [0, 1).
        kernel_size: of the depthwise convolution, odd, 3 to 31.
        layer_scale_init_value: first value of gamma in version 1; 0 leaves gamma out.
        grn_scope: in version 2, see `GlobalResponseNorm`.
        eps: of the norm.

    Shapes: (N, H, W, C) to the same, or `SparseTensor2d` to the same.
    """

    def __init__(
        self,
        dim: int,
        version: int = 2,
        drop_path: float = 0.0,
        kernel_size: int = 7,
        layer_scale_init_value: float = 1e-6,
        grn_scope: str = "sample",
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if version not in (1, 2):
            raise ValueError(f"version: expected 1 or 2, got {version}")
        check_rate("drop_path", drop_path)
        to: dict[str, Any] = {"device": device, "dtype": dtype}
        self.version = version
        self.drop_path = drop_path
        self.dwconv = DepthwiseConv2d(dim, kernel_size, **to)
        self.norm = LayerNorm(dim, eps, **to)
        self.pwconv1 = Linear(dim, 4 * dim, **to)
        if version == 2:
            self.grn = GlobalResponseNorm(4 * dim, scope=grn_scope, **to)
        self.pwconv2 = Linear(4 * dim, dim, **to)
        if version == 1:
            gamma = torch.full((dim,), layer_scale_init_value, **to)
            self.gamma = nn.Parameter(gamma) if layer_scale_init_value > 0 else None

    def forward(self, x: Map, visible: Tensor | None = None) -> Map:
        """Apply the block.

        Args:
            x: (N, H, W, C), or a `SparseTensor2d`.
            visible: (N, H, W) bool for a dense x that stands for a sparse one: x must be zero where
                this is False, and so is the result. The result is that of the sparse form.
        """
        sites = x.sites if isinstance(x, SparseTensor2d) else None
        dropping = self.training and self.drop_path > 0
        if self.version == 2 and not isinstance(x, SparseTensor2d) and visible is None and not dropping:
            return self._fused(x)
        y = self._activate(self.pwconv1(self._mix(x)), sites, visible)
        y = self.pwconv2(y)
        if self.version == 1 and self.gamma is not None:
            y = y * self.gamma
        y = drop_path(y, self.drop_path, self.training, sites)
        if isinstance(x, SparseTensor2d):
            return x.replace(x.features + y)
        return x + hide(y, visible)

    def _mix(self, x: Map) -> Tensor:
        """Mix sites, normalise channels: the part before the pointwise layers."""
        if isinstance(x, SparseTensor2d):
            return self.norm(self.dwconv(x)).features
        conv, norm = self.dwconv, self.norm
        return ops.depthwise_conv2d_layer_norm(x, conv.weight, conv.bias, norm.weight, norm.bias, norm.eps)

    def _activate(self, y: Tensor, sites: ActiveSites | None, visible: Tensor | None) -> Tensor:
        if self.version == 1:
            return F.gelu(y)
        if sites is not None:
            return self.grn.gelu(SparseTensor2d(y, sites)).features
        # Absent sites must not reach the norm; GELU keeps their zeros.
        return self.grn.gelu(hide(y, visible), visible)

    def _fused(self, x: Tensor) -> Tensor:
        return ops.convnext_block(
            x,
            self.dwconv.weight,
            self.dwconv.bias,
            self.norm.weight,
            self.norm.bias,
            self.pwconv1.weight,
            self.pwconv1.bias,
            self.grn.gamma,
            self.grn.beta,
            self.pwconv2.weight,
            self.pwconv2.bias,
            self.norm.eps,
        )

    def extra_repr(self) -> str:
        return f"version={self.version}, drop_path={self.drop_path:g}"
