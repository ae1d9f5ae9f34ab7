"""sparse_depthwise_conv2d: equal to the dense convolution of the zero-filled map, for any mask."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convdit import ops, reference
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit


def patches(block, n=2, grid=(4, 5), ratio=0.6, seed=0):
    return ActiveSites.from_patch_mask(random_patch_mask(n, grid, ratio, torch.Generator().manual_seed(seed)), block)


def from_visible(visible, block=1):
    return ActiveSites.from_mask(visible) if block == 1 else ActiveSites.from_patch_mask(~visible, block)


def random_visible(density, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) < density


def one_visible():
    visible = torch.zeros(1, 3, 4, dtype=torch.bool)
    visible[0, 2, 1] = True
    return visible


def isolated():
    visible = torch.zeros(2, 9, 9, dtype=torch.bool)
    visible[:, ::4, ::4] = True
    return visible


def last_removed():
    visible = torch.ones(2, 3, 4, dtype=torch.bool)
    visible[:, -1] = visible[:, :, -1] = False
    return visible


def ragged():
    """Images with some, none, all and one visible."""
    visible = torch.zeros(4, 3, 4, dtype=torch.bool)
    visible[0, :2, 1:3] = visible[2] = visible[3, 2, 3] = True
    return visible


MASKS = {
    "one": one_visible(),
    "all": torch.ones(2, 3, 4, dtype=torch.bool),
    "isolated": isolated(),
    "last row and column removed": last_removed(),
    "an image without any": ragged(),
}


def case(sites, channels, kernel=7, bias=True, label="", **x):
    def bound(module):
        return lambda features, weight, b: module.sparse_depthwise_conv2d(features, weight, b, sites)

    def make(g):
        weight, b = randn(g, channels, 1, kernel, kernel), randn(g, channels) if bias else None
        return randn(g, len(sites), channels, **x), weight, b

    name = f"{label} {len(sites)}x{channels} block {sites.block} kernel {kernel}"
    return Case(name.strip(), bound(ops), bound(reference), make)


# Channels: whole vectors and tails of every level, groups of vectors and what is left of them.
CASES = [case(patches(block), channels) for block in (8, 4, 2, 1) for channels in (40, 100)]
CASES += [case(from_visible(mask, block), 20, label=name) for name, mask in MASKS.items() for block in (8, 4, 2, 1)]
CASES += [
    case(from_visible(random_visible(0.3, 2, 13, 11)), 81, label="any mask"),
    case(patches(8), 5),
    case(patches(2, n=9), 160, label="several tasks"),
    case(patches(1, n=9, grid=(7, 7)), 96, label="several tasks"),
    case(patches(1, n=8, grid=(12, 12)), 24, label="several windows a part"),
    case(from_visible(torch.ones(1, 2, 20, dtype=torch.bool), 4), 8, label="the first block far from one under it"),
    case(patches(4), 36, bias=False, label="without bias"),
    case(patches(8), 17, label="large mean", offset=30.0),
    case(patches(1), 17, label="small values", scale=1e-3),
]
OTHERS = [(8, 3), (4, 5), (2, 9), (1, 1), (1, 3), (3, 7), (16, 7), (5, 31)]  # block, kernel
CASES += [case(patches(block), 20, kernel) for block, kernel in OTHERS]
SMALL = [case(patches(block, grid=(2, 3)), 3, kernel) for block, kernel in [(2, 7), (1, 7), (2, 3)]]
LAYERS = [case(patches(block, grid=(3, 3)), 19) for block in (8, 4, 2, 1)]
MANY_SITES = [
    case(patches(block, grid=grid), 8, label="many sites", offset=3.0)
    for block, grid in [(16, (8, 8)), (8, (16, 16)), (4, (32, 32)), (2, (64, 64))]
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(case, dtype)


@pytest.mark.parametrize("case", MANY_SITES, ids=str)
def test_gradients_over_many_sites_are_no_long_sums(case):
    """Thousands of terms taken one after the other would round worse than PyTorch's sums do."""
    harness.assert_error_rule(case, torch.float32)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


@pytest.mark.parametrize("case", LAYERS, ids=str)
def test_any_strides_and_alignment(case):
    harness.assert_any_strides(case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case(patches(b, n=7), 72) for b in (8, 4, 2, 1)] + [case(patches(2), 40, 5)], ids=str)
def test_repeats_bitwise_for_any_number_of_threads(case, dtype):
    harness.assert_repeats_for_any_threads(case, dtype)


@pytest.mark.parametrize("case", LAYERS[:2], ids=str)
def test_compiles_without_a_graph_break(case):
    harness.assert_compiles(case)


@pytest.mark.parametrize("case", LAYERS[1:3], ids=str)
def test_exports(case):
    harness.assert_exports(case)


def test_exporting_first_leaves_no_traced_table_behind():
    sites = ActiveSites.from_patch_mask(torch.tensor([[[True, False], [False, False]]]), 2)
    features, weight = torch.randn(len(sites), 8), torch.randn(8, 1, 7, 7)

    class Layer(torch.nn.Module):
        def forward(self, features, weight):
            return ops.sparse_depthwise_conv2d(features, weight, None, sites)

    exported = torch.export.export(Layer(), (features, weight)).module()
    assert torch.equal(exported(features, weight), Layer()(features, weight))


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_vmap_equals_loop(case):
    harness.assert_vmap_equals_loop(case)


def test_mask_to_result_compiles_without_a_graph_break():
    """Sites, their table and the convolution in one graph, with static shapes."""

    def layer(features, weight, bias, mask):
        sites = ActiveSites.from_patch_mask(mask, block=2, visible_per_image=4)
        return ops.sparse_depthwise_conv2d(features, weight, bias, sites)

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    for seed in (0, 1):  # another mask needs no other graph
        g = torch.Generator().manual_seed(seed)
        mask = random_patch_mask(3, (3, 4), 0.66, g)
        args = [torch.randn(*s, generator=g).requires_grad_() for s in [(48, 10), (10, 1, 7, 7), (10,)]]
        ours, right = compiled(*args, mask), layer(*args, mask)
        torch.testing.assert_close(ours, right)
        for a, b in zip(torch.autograd.grad(ours.sum(), args), torch.autograd.grad(right.sum(), args), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("block", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
def test_no_visible_site_keeps_shape_and_autograd(block, dtype):
    sites = from_visible(torch.zeros(2, 3, 3, dtype=torch.bool), block)
    args = [torch.zeros(*s, dtype=dtype, requires_grad=True) for s in [(0, 5), (5, 1, 7, 7), (5,)]]
    out = ops.sparse_depthwise_conv2d(*args, sites)
    assert out.shape == (0, 5) and out.dtype == dtype
    out.sum().backward()
    assert all(a.grad.shape == a.shape and not a.grad.any() for a in args)


def test_no_channels():
    out = ops.sparse_depthwise_conv2d(torch.zeros(320, 0), torch.zeros(0, 1, 7, 7), None, patches(4, ratio=0.5))
    assert out.shape == (320, 0)


def test_a_removed_site_does_not_matter():
    """Whatever the dense map holds at removed sites, the packed features and their result do not know of it."""
    sites, g = patches(4), torch.Generator().manual_seed(0)
    dense, weight = torch.randn(2, 16, 20, 24, generator=g), torch.randn(24, 1, 7, 7, generator=g)
    packed = SparseTensor2d.from_dense(dense, sites)
    out = ops.sparse_depthwise_conv2d(packed.features, weight, None, sites)
    zero_filled = packed.dense().permute(0, 3, 1, 2)
    right = F.conv2d(zero_filled, weight, padding=3, groups=24).permute(0, 2, 3, 1)
    torch.testing.assert_close(out, SparseTensor2d.from_dense(right.contiguous(), sites).features, rtol=1e-4, atol=1e-4)


def test_blocks_and_single_sites_agree():
    sites, g = patches(4), torch.Generator().manual_seed(0)
    fine = ActiveSites(sites.indices, sites.batch_size, sites.spatial_shape)
    x, weight = torch.randn(len(sites), 33, generator=g), torch.randn(33, 1, 7, 7, generator=g)
    blocks, single = (ops.sparse_depthwise_conv2d(x, weight, None, s) for s in (sites, fine))
    torch.testing.assert_close(blocks, single, rtol=1e-5, atol=1e-4)


def test_frozen_parameters_get_no_gradient():
    sites = patches(2)
    x, weight = torch.randn(len(sites), 8, requires_grad=True), torch.randn(8, 1, 7, 7)
    with FlopCounterMode(display=False) as counter:
        ops.sparse_depthwise_conv2d(x, weight, None, sites).sum().backward()
    assert x.grad is not None and weight.grad is None
    assert counter.get_total_flops() == 2 * 2 * len(sites) * 8 * 49


def test_flops_count_every_tap_once_forward_and_twice_backward():
    sites = patches(2)
    args = [torch.randn(*s, requires_grad=True) for s in [(len(sites), 8), (8, 1, 5, 5)]]
    with FlopCounterMode(display=False) as counter:
        ops.sparse_depthwise_conv2d(*args, None, sites).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * len(sites) * 8 * 25


def test_autocast_casts_as_pytorch_casts_a_convolution():
    sites = patches(2)
    args = [torch.randn(*s, requires_grad=True) for s in [(len(sites), 8), (8, 1, 7, 7), (8,)]]
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.sparse_depthwise_conv2d(*args, sites)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert all(a.grad.dtype == torch.float32 for a in args)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_features_take_float32_parameters(half):
    sites, g = patches(4), torch.Generator().manual_seed(0)
    x = torch.randn(len(sites), 24, generator=g).to(half)
    weight, bias = torch.randn(24, 1, 7, 7, generator=g), torch.randn(24, generator=g)
    out = ops.sparse_depthwise_conv2d(x, weight, bias, sites)
    right = reference.sparse_depthwise_conv2d(x.double(), weight.double(), bias.double(), sites)
    assert out.dtype == half
    torch.testing.assert_close(out.double(), right, rtol=torch.finfo(half).eps, atol=1e-4)


def test_opcheck():
    sites = patches(2)
    x, weight, bias = torch.randn(len(sites), 9), torch.randn(9, 1, 7, 7), torch.randn(9)
    table = sites.block_neighbors(2)
    torch.library.opcheck(library.sparse_depthwise_conv2d_fwd.default, (x, weight, bias, table, 2))
    torch.library.opcheck(library.sparse_depthwise_conv2d_fwd.default, (x, weight, None, table, 2))
    torch.library.opcheck(library.sparse_depthwise_conv2d_input_grad.default, (x, weight, table, 2))
    torch.library.opcheck(library.sparse_depthwise_conv2d_weight_grad.default, (x, x, table, 2, 7))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(features=torch.zeros(31, 8)), ValueError, r"features: expected shape \(32, C\), got \(31, 8\)"),
        (dict(features=torch.zeros(32, 8, 1)), ValueError, r"features: expected shape \(32, C\)"),
        (dict(features=torch.zeros(32, 8, dtype=torch.int32)), TypeError, "features: expected float32.*got int32"),
        (dict(weight=torch.zeros(9, 1, 7, 7)), ValueError, r"weight: expected shape \(8, 1, K, K\).*got \(9, 1"),
        (dict(weight=torch.zeros(8, 1, 4, 4)), ValueError, r"weight: .*K odd, got \(8, 1, 4, 4\)"),
        (dict(weight=torch.zeros(8, 1, 7, 5)), ValueError, r"weight: .*got \(8, 1, 7, 5\)"),
        (dict(weight=torch.zeros(8, 7, 7)), ValueError, r"weight: .*got \(8, 7, 7\)"),
        (dict(weight=torch.zeros(8, 1, 47, 47)), RuntimeError, "weight: .*odd kernel size of at most 45, got 47"),
        (dict(weight=torch.zeros(8, 1, 7, 7).double()), TypeError, "weight: expected the dtype of x.*got float64"),
        (dict(bias=torch.zeros(9)), RuntimeError, r"bias: expected shape \(8\), got \(9\)"),
        (dict(bias=torch.zeros(8, device="meta")), RuntimeError, r"bias: expected the device of x"),
        (dict(sites=torch.zeros(32, 3)), TypeError, "sites: expected convdit.sparse.ActiveSites, got Tensor"),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    sites = ActiveSites.from_patch_mask(torch.zeros(2, 2, 2, dtype=torch.bool), 2)
    good = dict(features=torch.zeros(32, 8), weight=torch.zeros(8, 1, 7, 7), bias=None, sites=sites)
    with pytest.raises(error, match=message):
        ops.sparse_depthwise_conv2d(**(good | change))


@pytest.mark.parametrize(
    "table, block, message",
    [
        (torch.zeros(8, 9, dtype=torch.int32), 2, r"neighbors: expected shape \(8, 25\), got \(8, 9\)"),
        (torch.zeros(8, 25, dtype=torch.int64), 2, "neighbors: expected dtype int32, got int64"),
        (torch.zeros(8, 25, dtype=torch.int32), 3, "features: expected a multiple of 9 rows"),
        (torch.zeros(8, 25, dtype=torch.int32), 0, "block: expected at least 1 site a side, got 0"),
        (torch.zeros(7, 25, dtype=torch.int32), 2, r"neighbors: expected shape \(8, 25\), got \(7, 25\)"),
    ],
)
def test_a_wrong_table_is_named(table, block, message):
    x, weight = torch.zeros(32, 8), torch.zeros(8, 1, 7, 7)
    with pytest.raises(RuntimeError, match=message):
        library.sparse_depthwise_conv2d_fwd(x, weight, None, table, block)
    with pytest.raises(RuntimeError, match=message):
        library.sparse_depthwise_conv2d_weight_grad(x, x, table, block, 7)


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule or visible_site or strides")
