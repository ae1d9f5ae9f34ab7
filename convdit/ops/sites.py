"""The table of neighbours of active sites, which every sparse operator walks.

Sparse operators compute on visible sites only: Woo et al., "ConvNeXt V2: Co-designing and Scaling
ConvNets with Masked Autoencoders" (2023), section 3. Built once a mask, by `convdit.sparse`.
"""

from __future__ import annotations

from torch import Tensor

from ._common import check_tensor, library, register_fake


def neighbors(indices: Tensor, n: int, h: int, w: int, radius: int) -> Tensor:
    """Rows of the active sites around each active site.

    Args:
        indices: (P, 3) int32: image, row, column of each active site, in any order. A site given
            twice is the caller's mistake: which of its rows is found is not defined.
        n: images.
        h: rows of a map.
        w: columns of a map.
        radius: r; the window is (2 r + 1) x (2 r + 1).

    Returns:
        (P, (2 r + 1)^2) int32: the row in `indices` of the site at (dy, dx), row-major from
        (-r, -r); -1 where that site is absent or outside the map.

    Raises:
        TypeError, RuntimeError: indices of another shape or dtype, or, on a CPU, a site outside the
            maps. On CUDA such a site has no neighbours and is nobody's neighbour.

    Source: the rule book of Graham et al. 2018, "3D Semantic Segmentation with Submanifold Sparse
        Convolutional Networks".
    """
    check_tensor("indices", indices)
    return library.neighbors.default(indices, n, h, w, radius)


@register_fake("neighbors")
def _(indices, n, h, w, radius):
    return indices.new_empty((indices.shape[0], (2 * radius + 1) ** 2))
