"""Depthwise convolution over the visible sites of a map, by way of the zero-filled map."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from .depthwise_conv import depthwise_conv2d

if TYPE_CHECKING:
    from convdit.sparse import ActiveSites


def sparse_depthwise_conv2d(features: Tensor, weight: Tensor, bias: Tensor | None, sites: ActiveSites) -> Tensor:
    """Submanifold depthwise convolution: absent neighbours count as zero, absent sites stay absent.

    It uses no table of neighbours: the features are scattered to a zero-filled dense map, the map
    is convolved, and the visible sites are read back.

    Args:
        features: (M, C), one row a visible site, in the order of `sites.indices`.
        weight: (C, 1, K, K), K odd.
        bias: (C,), or None.
        sites: the M visible sites.

    Returns:
        (M, C), in the features' dtype.
    """
    image, row, column = sites.indices.long().unbind(1)
    height, width = sites.spatial_shape
    dense = features.new_zeros(sites.batch_size, height, width, features.shape[1])
    dense = dense.index_put((image, row, column), features)
    return depthwise_conv2d(dense, weight, bias)[image, row, column]
