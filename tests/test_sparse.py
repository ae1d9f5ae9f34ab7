"""Masks, visible sites, and maps of visible sites: shapes, orders, conversions, errors."""

import pytest
import torch

from convdit import reference
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask


def patch_mask():
    mask = torch.ones(3, 3, 4, dtype=torch.bool)  # the second image has no visible patch
    mask[0, 0, 1] = mask[0, 2, 3] = mask[2, 1, 0] = mask[2, 1, 1] = False
    return mask


def fine(visible, block):
    return visible.repeat_interleave(block, 1).repeat_interleave(block, 2)


def test_random_masks_keep_the_stated_number_and_differ_between_images():
    mask = random_patch_mask(64, (7, 7), 0.6, torch.Generator().manual_seed(0))
    assert mask.shape == (64, 7, 7) and mask.dtype == torch.bool
    assert (~mask).flatten(1).sum(1).eq(19).all()
    assert len({tuple(row) for row in mask.flatten(1).tolist()}) == 64
    # Every place is removed about as often as every other.
    many = random_patch_mask(4000, (3, 4), 0.5, torch.Generator().manual_seed(0)).float().mean(0)
    assert (many - 0.5).abs().max() < 0.05


def test_random_masks_repeat_with_the_generator():
    masks = [random_patch_mask(4, (7, 7), 0.6, torch.Generator().manual_seed(3)) for _ in range(2)]
    assert masks[0].equal(masks[1])


@pytest.mark.parametrize("block", [1, 2, 3])
def test_sites_of_a_patch_mask_are_the_sites_of_its_visible_patches_block_by_block(block):
    mask = patch_mask()
    sites = ActiveSites.from_patch_mask(mask, block)
    assert sites.batch_size == 3 and sites.spatial_shape == (3 * block, 4 * block)
    assert len(sites) == 4 * block * block == sites.indices.shape[0]
    image, row, column = sites.indices.long().unbind(1)
    assert (image * 12 + row // block * 4 + column // block).diff().ge(0).all()
    inside = row % block * block + column % block
    assert inside.view(4, -1).eq(torch.arange(block * block)).all()
    visible = torch.zeros(3, *sites.spatial_shape, dtype=torch.bool)
    visible[image, row, column] = True
    assert visible.equal(fine(~mask, block))
    assert sites.offsets.tolist() == [0, 2 * block**2, 2 * block**2, 4 * block**2]
    assert sites.offsets.dtype == torch.int64 and sites.indices.dtype == torch.int32


def test_a_stated_count_gives_the_same_sites():
    mask = random_patch_mask(5, (4, 3), 0.5, torch.Generator().manual_seed(0))
    counted = ActiveSites.from_patch_mask(mask, 2, visible_per_image=6)
    found = ActiveSites.from_patch_mask(mask, 2)
    assert counted.indices.equal(found.indices) and counted.offsets.equal(found.offsets)


@pytest.mark.parametrize("make", ["patches", "mask"])
def test_no_visible_site_is_allowed(make):
    removed = torch.ones(2, 3, 3, dtype=torch.bool)
    if make == "patches":
        sites = ActiveSites.from_patch_mask(removed, 2, visible_per_image=0)
    else:
        sites = ActiveSites.from_mask(~removed)
    assert len(sites) == 0 and sites.indices.shape == (0, 3)
    assert sites.offsets.tolist() == [0, 0, 0]
    assert sites.site_neighbors(1).shape == (0, 9)
    assert len(sites.downsample(2)) == 0
    features = torch.zeros(0, 4, requires_grad=True)
    dense = SparseTensor2d(features, sites).dense(fill=7)
    assert dense.shape == (2, *sites.spatial_shape, 4) and dense.eq(7).all()
    dense.sum().backward()
    assert SparseTensor2d.from_dense(dense, sites).features.shape == (0, 4)


@pytest.mark.parametrize("block", [1, 2])
def test_neighbour_tables_are_those_of_the_reference_and_built_once(block):
    sites = ActiveSites.from_patch_mask(patch_mask(), block)
    height, width = sites.spatial_shape
    expected = reference.neighbors(sites.indices, 3, height, width, 2)
    assert sites.site_neighbors(2).equal(expected)
    assert sites.block_neighbors(1).equal(reference.neighbors(sites.blocks, 3, 3, 4, 1))
    assert sites.site_neighbors(2) is sites.site_neighbors(2)
    assert sites.downsample(block).block_neighbors(1) is sites.block_neighbors(1)


def test_blocks_keep_their_places_when_downsampled():
    sites = ActiveSites.from_patch_mask(patch_mask(), 8)
    coarse = sites.downsample(2)
    assert coarse.block == 4 and coarse.blocks is sites.blocks and coarse.spatial_shape == (12, 16)
    assert coarse.offsets.tolist() == [0, 32, 32, 64]


@pytest.mark.parametrize("shape", [(4, 6), (5, 7)])
def test_a_coarse_site_is_visible_when_any_fine_site_is(shape):
    visible = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0)) < 0.2
    coarse = ActiveSites.from_mask(visible).downsample(2)
    height, width = (shape[0] + 1) // 2, (shape[1] + 1) // 2
    expected = [
        [n, y, x]
        for n in range(3)
        for y in range(height)
        for x in range(width)
        if visible[n, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2].any()
    ]
    assert coarse.spatial_shape == (height, width) and coarse.indices.tolist() == expected


def test_odd_blocks_downsample_as_any_mask():
    mask = patch_mask()
    from_blocks = ActiveSites.from_patch_mask(mask, 3).downsample(2)
    from_sites = ActiveSites.from_mask(fine(~mask, 3)).downsample(2)
    assert from_blocks.indices.equal(from_sites.indices)
    assert from_blocks.spatial_shape == (5, 6)


@pytest.mark.parametrize("block", [1, 2, 4])
def test_dense_and_packed_forms_hold_the_same_values_and_gradients(block):
    torch.manual_seed(0)
    mask = patch_mask()
    visible = fine(~mask, block)
    sites = ActiveSites.from_patch_mask(mask, block)
    x = torch.randn(3, 3 * block, 4 * block, 5, requires_grad=True)
    packed = SparseTensor2d.from_dense(x, sites)
    image, row, column = sites.indices.long().unbind(1)
    assert packed.features.equal(x[image, row, column])
    fill = torch.randn(5, requires_grad=True)
    dense = packed.dense(fill)
    assert dense.equal(torch.where(visible[..., None], x, fill)) and dense.is_contiguous()
    assert packed.dense().equal(x * visible[..., None])
    weight = torch.randn_like(dense)
    (dense * weight).sum().backward()
    assert x.grad.equal(weight * visible[..., None])
    torch.testing.assert_close(fill.grad, weight[~visible].sum(0))


def test_a_map_read_from_a_strided_tensor_is_the_same():
    sites = ActiveSites.from_patch_mask(patch_mask(), 2)
    x = torch.randn(3, 5, 6, 8).permute(0, 2, 3, 1)
    expected = SparseTensor2d.from_dense(x.contiguous(), sites).features
    assert SparseTensor2d.from_dense(x, sites).features.equal(expected)


def test_a_site_whose_features_are_zero_stays_visible():
    sites = ActiveSites.from_patch_mask(patch_mask(), 1)
    dense = SparseTensor2d(torch.zeros(len(sites), 2), sites).dense(fill=1)
    assert SparseTensor2d.from_dense(dense, sites).features.eq(0).all()
    assert dense.eq(0).all(-1).equal(~patch_mask())


def test_moving_sites_moves_their_tables():
    sites = ActiveSites.from_patch_mask(patch_mask(), 2)
    sites.block_neighbors(1), sites.indices
    assert sites.to("cpu") is sites
    moved = sites.to("meta")
    assert moved.indices.is_meta and moved.block_neighbors(1).is_meta and len(moved) == len(sites)


def test_spconv_round_trip_keeps_every_site_and_its_features():
    pytest.importorskip("spconv.pytorch", reason="spconv is an optional package")
    torch.manual_seed(0)
    sites = ActiveSites.from_patch_mask(patch_mask(), 2)
    packed = SparseTensor2d(torch.randn(5, len(sites)).T, sites)
    foreign = packed.to_spconv()
    assert foreign.indices.is_contiguous() and foreign.features.is_contiguous()
    assert foreign.indices.dtype == torch.int32
    assert foreign.dense().permute(0, 2, 3, 1).equal(packed.dense())
    assert SparseTensor2d.from_spconv(foreign).dense().equal(packed.dense())


def test_rows_from_spconv_in_any_order_are_sorted():
    spconv = pytest.importorskip("spconv.pytorch", reason="spconv is an optional package")
    visible = ~patch_mask()
    indices, features = visible.nonzero().int(), torch.randn(4, 2)
    order = torch.tensor([2, 0, 3, 1])
    foreign = spconv.SparseConvTensor(features[order], indices[order], [3, 4], 3)
    back = SparseTensor2d.from_spconv(foreign)
    assert back.sites.indices.equal(indices) and back.features.equal(features)
    twice = spconv.SparseConvTensor(features[:2], indices[[0, 0]], [3, 4], 3)
    with pytest.raises(ValueError, match="same site twice"):
        SparseTensor2d.from_spconv(twice)
    outside = spconv.SparseConvTensor(features[:1], indices[[3]] + 9, [3, 4], 3)
    with pytest.raises(ValueError, match="outside 3 maps of 3x4"):
        SparseTensor2d.from_spconv(outside)


def errors():
    mask, sites = patch_mask(), ActiveSites.from_patch_mask(patch_mask(), 2)
    sparse, features = SparseTensor2d, torch.zeros(16, 3)
    return {
        r"grid: expected 2 whole numbers, at least 1 each, got \(7, 0\)": lambda: random_patch_mask(2, (7, 0), 0.6),
        r"grid: expected 2 whole numbers, .* got \(7,\)": lambda: random_patch_mask(2, (7,), 0.6),
        r"grid: expected 2 whole numbers, got \(7, 7.5\) \(type\)": lambda: random_patch_mask(2, (7, 7.5), 0.6),
        r"grid: expected 2 whole numbers, got 7 \(type\)": lambda: random_patch_mask(2, 7, 0.6),
        r"n: expected a number of images, got 2.0 \(type\)": lambda: random_patch_mask(2.0, (7, 7), 0.6),
        r"ratio: expected .* got 'half' \(type\)": lambda: random_patch_mask(2, (7, 7), "half"),
        r"generator: expected a torch.Generator, got int \(type\)": lambda: random_patch_mask(2, (7, 7), 0.6, 3),
        "device: expected the device of the generator, cpu, got cuda": lambda: random_patch_mask(
            2, (7, 7), 0.6, torch.Generator(), "cuda"
        ),
        "n: expected a number": lambda: random_patch_mask(-1, (7, 7), 0.6),
        r"ratio: expected .* \[0, 1\)": lambda: random_patch_mask(1, (7, 7), 1.0),
        "ratio: 0.9 of 4 patches leaves no": lambda: random_patch_mask(1, (2, 2), 0.9),
        "mask: expected dtype torch.bool, got torch.float32": lambda: ActiveSites.from_patch_mask(mask.float(), 2),
        r"mask: expected shape .* got \(3, 12\)": lambda: ActiveSites.from_patch_mask(mask.flatten(1), 2),
        "block: expected .* got 0": lambda: ActiveSites.from_patch_mask(mask, 0),
        r"visible_per_image: expected 2 .* got \[2, 0, 2\]": lambda: ActiveSites.from_patch_mask(
            mask, 2, visible_per_image=2
        ),
        "visible_per_image: expected 0 to 12": lambda: ActiveSites.from_patch_mask(mask, 2, 13),
        r"block: expected .* got 2.0 \(type\)": lambda: ActiveSites.from_patch_mask(mask, 2.0),
        r"visible_per_image: expected .* got 2.0 \(type\)": lambda: ActiveSites.from_patch_mask(mask, 2, 2.0),
        r"mask: expected a tensor, got list \(type\)": lambda: ActiveSites.from_patch_mask(mask.tolist(), 2),
        r"visible: expected a tensor, got ndarray \(type\)": lambda: ActiveSites.from_mask(mask.numpy()),
        "visible: expected dtype torch.bool": lambda: ActiveSites.from_mask(mask.int()),
        r"factor: expected a whole number, got 2.0 \(type\)": lambda: sites.downsample(2.0),
        "radius: expected a whole number, at least 0, got -1": lambda: sites.site_neighbors(-1),
        r"radius: expected a whole number, got 1.5 \(type\)": lambda: sites.block_neighbors(1.5),
        "factor: expected": lambda: sites.downsample(0),
        r"features: expected shape \(M, C\)": lambda: sparse(torch.zeros(3), sites),
        "features: expected 16 rows, .* got 15": lambda: sparse(torch.zeros(15, 3), sites),
        "features: .* device .* got meta": lambda: sparse(features.to("meta"), sites),
        r"features: expected a tensor, got int \(type\)": lambda: sparse(3, sites),
        "features: expected a floating dtype, got torch.int64": lambda: sparse(features.long(), sites),
        r"sites: expected ActiveSites, got Tensor \(type\)": lambda: sparse(features, mask),
        r"tensor: expected a spconv.* got int \(type\)": lambda: sparse.from_spconv(3),
        r"x: expected a tensor, got ndarray \(type\)": lambda: sparse.from_dense(features.numpy(), sites),
        r"fill: expected shape \(3,\)": lambda: sparse(features, sites).dense(torch.zeros(4)),
        r"x: expected shape \(3, 6, 8, 'C'\)": lambda: sparse.from_dense(torch.zeros(3, 6, 6, 2), sites),
        "x: expected the device of the sites, cpu, got meta": lambda: sparse.from_dense(
            torch.zeros(3, 6, 8, 2, device="meta"), sites
        ),
    }


@pytest.mark.parametrize("message", errors())
def test_bad_input_is_refused_by_name(message):
    call = errors()[message]
    kind = TypeError if "type" in message else ValueError
    with pytest.raises(kind, match=message.removesuffix(r" \(type\)")):
        call()
