"""The table of neighbours of active sites, in plain PyTorch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def neighbors(indices: Tensor, n: int, h: int, w: int, radius: int) -> Tensor:
    """Rows of the active sites around each active site.

    Args:
        indices: (P, 3) int32: image, row, column of each active site, without duplicates.
        n: images.
        h: rows of the grid.
        w: columns of the grid.
        radius: r; the window is (2 r + 1) x (2 r + 1).

    Returns:
        (P, (2 r + 1)^2) int32: the row in `indices` of the site at (dy, dx), row-major from
        (-r, -r); -1 where that site is absent or outside the grid.
    """
    image, row, column = indices.long().unbind(1)
    table = torch.full((n, h, w), -1, dtype=torch.int32, device=indices.device)
    order = torch.arange(indices.shape[0], dtype=torch.int32, device=indices.device)
    table = table.index_put((image, row, column), order)
    table = F.pad(table, (radius, radius, radius, radius), value=-1)
    offset = torch.arange(2 * radius + 1, device=indices.device)
    rows = (row[:, None] + offset)[:, :, None]
    columns = (column[:, None] + offset)[:, None, :]
    return table[image[:, None, None], rows, columns].flatten(1)
