"""The table of neighbours: right for every mask, and at home in torch.compile and export."""

import pytest
import torch

from convdit import ops, reference
from convdit.sparse import ActiveSites
from tests.ops import harness


def visible(density, *shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density


def isolated(*shape):
    mask = torch.zeros(shape, dtype=torch.bool)
    mask[:, ::4, ::4] = True
    return mask


def without_last_row_and_column(*shape):
    mask = torch.ones(shape, dtype=torch.bool)
    mask[:, -1] = mask[:, :, -1] = False
    return mask


MASKS = {
    "some": visible(0.4, 3, 7, 7),
    "odd sizes": visible(0.5, 2, 5, 13),
    "all": visible(2.0, 2, 6, 4),
    "none": visible(0.0, 2, 6, 4),
    "one": torch.eye(3, dtype=torch.bool)[None],
    "one site": torch.ones(1, 1, 1, dtype=torch.bool),
    "isolated": isolated(2, 9, 9),
    "last row and column removed": without_last_row_and_column(2, 5, 6),
    "an image without any": torch.cat([visible(0.5, 1, 4, 4), visible(0.0, 1, 4, 4), visible(0.5, 1, 4, 4)]),
    "more than a task": visible(0.7, 2, 40, 30),
    "no image": torch.zeros(0, 4, 4, dtype=torch.bool),
}


def indices_of(mask):
    return mask.nonzero().int()


@pytest.mark.parametrize("radius", [0, 1, 3, 6])
@pytest.mark.parametrize("name", MASKS)
def test_equals_reference(name, radius):
    mask = MASKS[name]
    indices = indices_of(mask)
    table = ops.neighbors(indices, *mask.shape, radius)
    assert table.dtype == torch.int32 and table.shape == (len(indices), (2 * radius + 1) ** 2)
    assert torch.equal(table, reference.neighbors(indices, *mask.shape, radius))


def test_any_order_and_strides_of_the_sites():
    mask = MASKS["some"]
    indices = indices_of(mask)[torch.randperm(int(mask.sum()), generator=torch.Generator().manual_seed(0))]
    expected = reference.neighbors(indices, *mask.shape, 2)
    assert torch.equal(ops.neighbors(indices, *mask.shape, 2), expected)
    assert torch.equal(ops.neighbors(indices.t().contiguous().t(), *mask.shape, 2), expected)


def test_being_neighbors_is_mutual():
    mask = MASKS["odd sizes"]
    table = ops.neighbors(indices_of(mask), *mask.shape, 3)
    for row, tap in (table >= 0).nonzero().tolist():
        assert table[table[row, tap], 48 - tap] == row


def test_images_are_never_neighbors():
    mask = MASKS["all"]
    indices = indices_of(mask)
    table = ops.neighbors(indices, *mask.shape, 6)
    image = indices[:, 0]
    assert (image[table.clamp(min=0).long()] == image[:, None])[table >= 0].all()


def test_repeats_for_any_number_of_threads():
    mask = MASKS["more than a task"]
    before, tables = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            tables.append(ops.neighbors(indices_of(mask), *mask.shape, 3))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tables[0], t) for t in tables)


@pytest.mark.parametrize(
    "indices, sizes, error, message",
    [
        ([[0, 1, 7]], (1, 7, 7, 1), RuntimeError, r"indices: .* 1 maps of 7x7, got \(0, 1, 7\) in row 0"),
        ([[0, 0, 0], [0, -1, 0]], (1, 7, 7, 1), RuntimeError, r"got \(0, -1, 0\) in row 1"),
        ([[1, 0, 0]], (1, 7, 7, 1), RuntimeError, r"got \(1, 0, 0\) in row 0"),
        ([[0, 0]], (1, 7, 7, 1), RuntimeError, r"indices: expected shape \(P, 3\).*got \(1, 2\)"),
        ([0, 0, 0], (1, 7, 7, 1), RuntimeError, r"indices: expected 2 dimensions"),
        ([[0, 0, 0]], (1, 7, 7, -1), RuntimeError, "radius: expected 0 to 1000, got -1"),
        ([[0, 0, 0]], (1, -7, 7, 1), RuntimeError, "n, h, w: expected sizes of at least 0, got 1, -7, 7"),
    ],
)
def test_bad_arguments_are_named(indices, sizes, error, message):
    with pytest.raises(error, match=message):
        ops.neighbors(torch.tensor(indices, dtype=torch.int32), *sizes)


def test_wrong_type_is_named():
    with pytest.raises(RuntimeError, match="indices: expected dtype int32, got int64"):
        ops.neighbors(torch.zeros(1, 3, dtype=torch.int64), 1, 2, 2, 1)
    with pytest.raises(TypeError, match="indices: expected a tensor, got list"):
        ops.neighbors([[0, 0, 0]], 1, 2, 2, 1)


def test_opcheck():
    mask = MASKS["some"]
    torch.library.opcheck(torch.ops.convdit.neighbors.default, (indices_of(mask), *mask.shape, 2))


def test_compiles_without_a_graph_break_and_exports():
    mask = MASKS["some"]
    indices = indices_of(mask)

    class Module(torch.nn.Module):
        def forward(self, indices):
            return ops.neighbors(indices, *mask.shape, 1) + 1

    expected = reference.neighbors(indices, *mask.shape, 1) + 1
    torch._dynamo.reset()
    assert torch.equal(torch.compile(Module(), fullgraph=True)(indices), expected)
    assert torch.equal(torch.export.export(Module(), (indices,)).module()(indices), expected)


def test_active_sites_keep_their_table():
    sites = ActiveSites.from_mask(MASKS["some"])
    assert sites.block_neighbors(3) is sites.block_neighbors(3)


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference")
