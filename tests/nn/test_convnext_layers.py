"""ConvNeXt layers: one module for dense maps, packed rows, and zero-filled maps with a mask."""

import pytest
import torch
import torch.nn.functional as F

from convdit import nn, reference
from convdit.nn.resample import coarsen
from convdit.sparse import ActiveSites, SparseTensor2d

MASKS = ("random", "one visible", "all visible but one", "image without visible site")


def visible_map(pattern, shape=(3, 6, 8)):
    visible = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    if pattern == "one visible":
        visible[:] = False
        visible[:, 2, 3] = True
    elif pattern == "all visible but one":
        visible[:] = True
        visible[:, 2, 3] = False
    elif pattern == "image without visible site":
        visible[1] = False
    return visible


def randomised(module, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = 0.5 * torch.randn(parameter.shape, dtype=torch.float64, generator=generator)
    return module


def compare(module, visible, result_visible=None):
    """Run both forms; the values and every gradient must agree."""
    result_visible = visible if result_visible is None else result_visible
    torch.manual_seed(0)
    x = torch.randn(*visible.shape, 4, dtype=torch.float64) * visible[..., None]
    weight = torch.randn(*result_visible.shape, 8, dtype=torch.float64)
    results = []
    for sparse in (True, False):
        module.zero_grad()
        source = x.clone().requires_grad_()
        torch.manual_seed(0)  # for stochastic depth
        if sparse:
            y = module(SparseTensor2d.from_dense(source, ActiveSites.from_mask(visible)))
            y = y.dense()
        else:
            y = module(source, visible)
        (y * weight[..., : y.shape[-1]]).sum().backward()
        gradients = [p.grad.clone() for p in module.parameters()]
        results.append([y.detach(), source.grad * visible[..., None], *gradients])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-10, atol=1e-10)
    assert results[0][0][~result_visible].eq(0).all()


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("pattern", MASKS)
def test_sparse_v2_block_equals_the_zero_filled_one(pattern, scope):
    compare(randomised(nn.ConvNeXtBlock(4, grn_scope=scope)), visible_map(pattern))


@pytest.mark.parametrize("version", [1, 2])
def test_sparse_block_with_stochastic_depth_drops_the_same_images(version):
    block = randomised(nn.ConvNeXtBlock(4, version, drop_path=0.5))
    compare(block.train(), visible_map("random"))


@pytest.mark.parametrize("shape", [(3, 6, 8), (3, 5, 7)])
@pytest.mark.parametrize("pattern", MASKS)
def test_sparse_downsampling_equals_the_zero_filled_one(pattern, shape):
    visible = visible_map(pattern, shape)
    compare(randomised(nn.Downsample(4, 8)), visible, coarsen(visible))


def test_sparse_downsampling_of_blocks_equals_that_of_any_mask():
    torch.manual_seed(0)
    patches = torch.rand(2, 3, 2) < 0.5
    visible = (~patches).repeat_interleave(4, 1).repeat_interleave(4, 2)
    x = torch.randn(2, 12, 8, 4)
    layer = nn.Downsample(4, 8)
    blocks = SparseTensor2d.from_dense(x, ActiveSites.from_patch_mask(patches, 4))
    rows = SparseTensor2d.from_dense(x, ActiveSites.from_mask(visible))
    torch.testing.assert_close(layer(blocks).dense(), layer(rows).dense())


def test_stem_of_visible_patches_equals_the_dense_stem():
    torch.manual_seed(0)
    images = torch.randn(2, 3, 24, 16)
    patches = torch.rand(2, 3, 2) < 0.5
    stem = nn.Stem(3, 8, 2)
    sites = ActiveSites.from_patch_mask(patches, 4)
    expected = SparseTensor2d.from_dense(stem(images), sites).features
    torch.testing.assert_close(stem.visible(images, sites).features, expected)


@pytest.mark.parametrize("training", [True, False])
def test_dense_v2_block_is_the_block_of_the_paper(training):
    block = randomised(nn.ConvNeXtBlock(4, drop_path=0.0 if training else 0.3)).train(training)
    x = torch.randn(2, 5, 6, 4, dtype=torch.float64)
    p = dict(block.named_parameters())
    y = reference.depthwise_conv2d(x, p["dwconv.weight"], p["dwconv.bias"])
    y = F.layer_norm(y, (4,), p["norm.weight"], p["norm.bias"], 1e-6)
    y = F.gelu(F.linear(y, p["pwconv1.weight"], p["pwconv1.bias"]))
    y = reference.grn(y, p["grn.gamma"], p["grn.beta"])
    y = x + F.linear(y, p["pwconv2.weight"], p["pwconv2.bias"])
    torch.testing.assert_close(block(x), y)


def test_dense_blocks_equal_sparse_blocks_where_every_site_is_visible():
    visible = torch.ones(2, 4, 4, dtype=torch.bool)
    for version in (1, 2):
        block = randomised(nn.ConvNeXtBlock(4, version))
        x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
        packed = block(SparseTensor2d.from_dense(x, ActiveSites.from_mask(visible)))
        torch.testing.assert_close(packed.dense(), block(x))


def test_stochastic_depth_zeroes_whole_images_and_keeps_the_mean():
    block = randomised(nn.ConvNeXtBlock(4, drop_path=0.25)).train()
    x = torch.randn(1, 2, 2, 4, dtype=torch.float64).expand(4000, 2, 2, 4)
    torch.manual_seed(0)
    branch = block(x) - x
    full = block.eval()(x) - x
    dropped = branch.flatten(1).eq(0).all(1)
    torch.testing.assert_close(branch[~dropped], full[~dropped] / 0.75)
    assert abs(dropped.double().mean() - 0.25) < 0.03


def test_a_block_compiles_for_sites_made_outside():
    block, visible = randomised(nn.ConvNeXtBlock(4)), visible_map("random")
    x = torch.randn(3, 6, 8, 4, dtype=torch.float64)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for seen in (visible, visible.flip(2)):  # a second mask of the same count
        packed = SparseTensor2d.from_dense(x, ActiveSites.from_mask(seen))
        torch.testing.assert_close(compiled(packed).features, block(packed).features)


def test_gradients_stay_finite_where_a_whole_image_is_zero():
    block = randomised(nn.ConvNeXtBlock(4))
    block.grn.beta.data.zero_(), block.pwconv1.bias.data.zero_(), block.norm.bias.data.zero_()
    block.dwconv.bias.data.zero_()
    visible = visible_map("random")
    x = torch.zeros(3, 6, 8, 4, dtype=torch.float64, requires_grad=True)
    block(SparseTensor2d.from_dense(x, ActiveSites.from_mask(visible))).features.sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in block.parameters())


def test_parameter_names_and_shapes_are_the_official_ones():
    shapes = {name: tuple(p.shape) for name, p in nn.ConvNeXtBlock(4).named_parameters()}
    assert shapes == {
        "dwconv.weight": (4, 1, 7, 7),
        "dwconv.bias": (4,),
        "norm.weight": (4,),
        "norm.bias": (4,),
        "pwconv1.weight": (16, 4),
        "pwconv1.bias": (16,),
        "grn.gamma": (16,),
        "grn.beta": (16,),
        "pwconv2.weight": (4, 16),
        "pwconv2.bias": (4,),
    }
    first = set(dict(nn.ConvNeXtBlock(4, version=1).named_parameters()))
    assert first == set(shapes) - {"grn.gamma", "grn.beta"} | {"gamma"}


def test_layers_take_device_and_dtype():
    block = nn.ConvNeXtBlock(4, version=1, device="meta", dtype=torch.bfloat16)
    assert all(p.is_meta and p.dtype == torch.bfloat16 for p in block.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DepthwiseConv2d(0), "dim: expected a whole number, at least 1, got 0"),
        (lambda: nn.GlobalResponseNorm(0), "dim: .* got 0"),
        (lambda: nn.LayerNorm(0), "dim: .* got 0"),
        (lambda: nn.ConvNeXtBlock(-4), "dim: .* got -4"),
        (lambda: nn.Stem(3, 8, 0), "stride: .* got 0"),
        (lambda: nn.Downsample(4, 0), "out_dim: .* got 0"),
        (lambda: nn.DepthwiseConv2d(4, 4), "kernel_size: .* got 4"),
        (lambda: nn.DepthwiseConv2d(4, 33), "kernel_size: .* got 33"),
        (lambda: nn.ConvNeXtBlock(4, version=3), "version: .* got 3"),
        (lambda: nn.ConvNeXtBlock(4, drop_path=1.0), "drop_path: .* got 1.0"),
        (lambda: nn.GlobalResponseNorm(4, scope="image"), "scope: .* got 'image'"),
    ],
)
def test_bad_settings_are_refused_by_name(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.DepthwiseConv2d(4.0), "dim: expected a whole number, got 4.0"),
        (lambda: nn.DepthwiseConv2d(4, 7.0), "kernel_size: expected a whole number, got 7.0"),
        (lambda: nn.ConvNeXtBlock("4"), "dim: expected a whole number, got '4'"),
        (lambda: nn.ConvNeXtBlock(4, drop_path="much"), "drop_path: .* got 'much'"),
        (lambda: nn.LayerNorm(4)([1.0]), "x: expected a tensor, got list"),
        (lambda: nn.DepthwiseConv2d(4)([1.0]), "x: expected a tensor, got list"),
        (lambda: nn.ConvNeXtBlock(4)([1.0]), "x: expected a tensor, got list"),
        (lambda: nn.ConvNeXtBlock(4, version=1)(None), "x: expected a tensor, got NoneType"),
        (lambda: nn.GlobalResponseNorm(4)([1.0]), "x: expected a tensor, got list"),
        (lambda: nn.Downsample(4, 8)([1.0]), "x: expected a tensor, got list"),
        (lambda: nn.Stem(3, 8)([1.0]), "images: expected a tensor, got list"),
    ],
)
def test_values_of_another_kind_are_refused_by_name(make, message):
    with pytest.raises(TypeError, match=message):
        make()
