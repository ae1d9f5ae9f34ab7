"""A transformer block over maps: the self-attention that ends a hybrid ConvNeXt."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from convdit._checks import check_rate, check_whole
from convdit.sparse import ActiveSites, SparseTensor2d

from .dit_block import Attention
from .layers import LayerNorm, Map, drop_path
from .linear import Linear


class AttentionBlock(nn.Module):
    """x + attn(norm1(x)), then x + mlp(norm2(x)): pre-norm, as in ViT (arXiv:2010.11929, equations 2 and 3).

    Each site of a map attends to all sites of its image, or to the visible ones of a sparse map.
    There is no table of positions: the convolutions before it have told sites apart, and any size
    of map works. Names are those of timm's ViT: norm1, attn.qkv, attn.proj, norm2, mlp.fc1, mlp.fc2.

    Args:
        dim: channels C.
        num_heads: of the attention, a divisor of C.
        drop_path: rate of stochastic depth of each of the two branches, in [0, 1).
        eps: of both norms.

    Shapes: (N, H, W, C) to the same, or `SparseTensor2d` to the same.
    """

    def __init__(self, dim: int, num_heads: int, drop_path: float = 0.0, eps: float = 1e-6):
        super().__init__()
        check_whole("num_heads", num_heads, 1)
        check_rate("drop_path", drop_path)
        self.norm1 = LayerNorm(dim, eps)
        if dim % num_heads:
            raise ValueError(f"num_heads: expected a divisor of the {dim} channels, got {num_heads}")
        self.drop_path = drop_path
        self.attn = Attention(dim, num_heads)
        self.norm2 = LayerNorm(dim, eps)
        layers = {"fc1": Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Map, visible: Tensor | None = None) -> Map:
        """`visible` as in `ConvNeXtBlock`; the attended sites are then counted, at the cost of a wait on CUDA."""
        if isinstance(x, SparseTensor2d):
            return x.replace(self._residuals(x.features, x.sites))
        if visible is not None:
            return self(SparseTensor2d.from_dense(x, ActiveSites.from_mask(visible))).dense()
        return self._residuals(x.flatten(1, 2)).view(x.shape)

    def _residuals(self, x: Tensor, sites: ActiveSites | None = None) -> Tensor:
        """x is (N, T, C), or (M, C) of the M sites."""
        x = x + self._drop(self._attend(self.norm1(x), sites), sites)
        return x + self._drop(self.mlp(self.norm2(x)), sites)

    def _attend(self, x: Tensor, sites: ActiveSites | None) -> Tensor:
        if sites is None:
            return self.attn(x)
        if sites.per_image is not None:
            return self.attn(x.view(sites.batch_size, sites.per_image, -1)).flatten(0, 1)
        counts = sites.offsets.diff().tolist()
        return torch.cat([self.attn(image[None])[0] for image in x.split(counts)])

    def _drop(self, branch: Tensor, sites: ActiveSites | None) -> Tensor:
        if sites is None:
            return drop_path(branch[:, :, None], self.drop_path, self.training)[:, :, 0]
        return drop_path(branch, self.drop_path, self.training, sites)

    def extra_repr(self) -> str:
        return f"drop_path={self.drop_path:g}"
