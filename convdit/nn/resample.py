"""Patchify stem and 2x2 downsampling of ConvNeXt, dense and over visible sites only."""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convdit._checks import check_fits, check_floating, check_whole
from convdit.ops.linear import linear
from convdit.sparse import ActiveSites, SparseTensor2d

from .layers import LayerNorm, Map, hide


class Stem(nn.Sequential):
    """Convolution of kernel = stride over the image, then LayerNorm. Names: 0 and 1.

    Args:
        in_chans: image channels c.
        dim: channels C of the map.
        stride: image pixels along a site's side.
        eps: of the norm.
    """

    def __init__(self, in_chans: int, dim: int, stride: int = 4, eps: float = 1e-6):
        check_whole("in_chans", in_chans, 1)
        check_whole("dim", dim, 1)
        check_whole("stride", stride, 1)
        super().__init__(nn.Conv2d(in_chans, dim, stride, stride), LayerNorm(dim, eps))

    @property
    def _conv(self) -> nn.Conv2d:
        return cast(nn.Conv2d, self[0])

    def forward(self, images: Tensor, name: str = "images") -> Tensor:
        """(N, c, H, W) to (N, H // stride, W // stride, C).

        Images on another device or of another dtype than the parameters are a ValueError or a
        TypeError, under `name`; autocast takes every dtype but float64.
        """
        check_floating(name, images)
        check_fits(name, images, self._conv.weight)
        # The image has the fewest channels: this is the cheapest place to change the layout.
        images = images.contiguous(memory_format=torch.channels_last)
        return self[1](self[0](images).permute(0, 2, 3, 1).contiguous())

    def visible(self, images: Tensor, sites: ActiveSites) -> SparseTensor2d:
        """The visible sites only of the map of (N, c, H, W) images.

        No two sites of this convolution share a pixel, so each visible block of sites is computed
        from its own patch of the image, as if that were an image.
        """
        n, channels = images.shape[:2]
        (height, width), patch = sites.grid, sites.block * self._conv.stride[0]
        patches = images.view(n, channels, height, patch, width, patch).permute(0, 2, 4, 1, 3, 5)
        image, row, column = sites.blocks.long().unbind(1)
        return SparseTensor2d(self(patches[image, row, column]).flatten(0, 2), sites)


class Downsample(nn.Sequential):
    """LayerNorm, then 2x2 convolution of stride 2. Names: 0 and 1.

    Shapes: (N, H, W, C) to (N, H // 2, W // 2, D), or `SparseTensor2d` to the sites of
    `ActiveSites.downsample(2)`, absent sites counting as zero after the norm.
    """

    def __init__(self, dim: int, out_dim: int, eps: float = 1e-6):
        check_whole("out_dim", out_dim, 1)
        super().__init__(LayerNorm(dim, eps), nn.Conv2d(dim, out_dim, 2, 2))

    def forward(self, x: Map, visible: Tensor | None = None) -> Map:
        """`visible`, (N, H, W) bool, as in `ConvNeXtBlock`; `coarsen` gives the result's."""
        x = self[0](x)
        if isinstance(x, SparseTensor2d):
            return self._sparse(x)
        if visible is not None:
            x = hide(x, visible)
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            visible = coarsen(visible)
        y = self[1](x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()
        return hide(y, visible)

    def _sparse(self, x: SparseTensor2d) -> SparseTensor2d:
        sites, channels = x.sites, x.features.shape[1]
        coarse = sites.downsample(2)
        if sites.block % 2 == 0:
            half = sites.block // 2
            quads = x.features.reshape(sites.blocks.shape[0], half, 2, half, 2, channels)
            quads = quads.transpose(2, 3)
        else:
            # Any mask: look up the four fine sites of each coarse one; row 0 is an absent site.
            rows = F.pad(x.sites.row_map(), (0, 1, 0, 1), value=-1).long() + 1
            image, row, column = coarse.indices.long().unbind(1)
            step = torch.arange(2, device=row.device)
            row, column = 2 * row[:, None, None] + step[:, None], 2 * column[:, None, None] + step
            quads = F.pad(x.features, (0, 0, 1, 0))[rows[image[:, None, None], row, column]]
        conv = cast(nn.Conv2d, self[1])
        weight = conv.weight.permute(0, 2, 3, 1).flatten(1)
        quads = quads.reshape(len(coarse), 4 * channels)
        return SparseTensor2d(linear(quads, weight, conv.bias), coarse)


def coarsen(visible: Tensor) -> Tensor:
    """(N, H, W) bool to half the size, rounded up: True where any of the four sites is."""
    padded = F.pad(visible, (0, visible.shape[2] % 2, 0, visible.shape[1] % 2))
    n, height, width = padded.shape
    return padded.view(n, height // 2, 2, width // 2, 2).any(4).any(2)
