"""Where the CPU's table of neighbours raises, the CUDA one has no neighbours for a row, and nobody has it for one."""

import pytest
import torch

from convdit import ops

INSIDE = [[0, 0, 0], [0, 1, 2], [1, 1, 1]]


@pytest.mark.parametrize("row", [(-1, 0, 1), (2, 0, 0), (0, -1, 1), (0, 2, 1), (0, 0, -1), (0, 0, 3)], ids=str)
def test_a_row_outside_the_map_changes_nothing(row):
    right = ops.neighbors(torch.tensor(INSIDE, dtype=torch.int32), 2, 2, 3, 1)
    table = ops.neighbors(torch.tensor([*INSIDE, row], dtype=torch.int32), 2, 2, 3, 1)
    assert torch.equal(table[:3], right)
    assert (table[3] == -1).all()
