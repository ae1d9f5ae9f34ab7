"""grn and gelu_grn, dense and packed: right, differentiable, and at home in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from convdit import ops, reference
from convdit.sparse import ActiveSites, SparseTensor2d, random_patch_mask
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit
NAMES = ("grn", "gelu_grn")


def parameters(g, channels):
    # Both are zero at initialisation, where GRN is the identity: a test needs other values.
    return randn(g, channels), randn(g, channels)


def dense_case(name, *shape, change=None, label="", **x):
    def make(g):
        t = randn(g, *shape, **x)
        return (change(t) if change else t), *parameters(g, shape[-1])

    return Case(f"{name} {'x'.join(map(str, shape))} {label}", getattr(ops, name), getattr(reference, name), make)


def packed_case(name, sites, channels, scope, label=""):
    def bound(module):
        function = getattr(module, "sparse_" + name)
        return lambda features, weight, bias: function(features, weight, bias, sites, scope=scope)

    def make(g):
        return randn(g, len(sites), channels), *parameters(g, channels)

    return Case(f"sparse_{name} {len(sites)}x{channels} {scope} {label}", bound(ops), bound(reference), make)


def patch_sites(n=3, grid=(3, 2), block=2, ratio=0.5):
    return ActiveSites.from_patch_mask(random_patch_mask(n, grid, ratio, torch.Generator().manual_seed(0)), block)


def ragged_sites():
    """Images with 3, 0, 77 and 1 visible sites: none, one, and more than a tile."""
    visible = torch.zeros(4, 9, 10, dtype=torch.bool)
    visible[0, 2, 3:6] = visible[3, 8, 9] = True
    visible[2].view(-1)[5:82] = True
    return ActiveSites.from_mask(visible)


def dead_channels(t):
    t[..., ::3] = 0
    return t


def dead_image(t):
    t[0] = 0
    return t


def constant_rows(t):
    return t[..., :1].expand_as(t).clone()


SHAPES = [
    (2, 5, 7, 13),
    (3, 9, 8, 100),
    (2, 14, 15, 40),
    (1, 3, 1, 1536),
    (1, 5, 2, 264),
    (1, 5, 2, 260),
    (2, 1, 1, 17),
    (2, 3, 4, 1),
]
DENSE = [dense_case(name, *shape) for shape in SHAPES for name in NAMES]
DENSE += [
    case
    for name in NAMES
    for case in (
        dense_case(name, 2, 6, 5, 33, change=dead_channels, label="dead channels"),
        dense_case(name, 2, 6, 5, 33, change=dead_image, label="dead image"),
        dense_case(name, 2, 6, 5, 33, change=constant_rows, label="constant rows"),
        dense_case(name, 2, 6, 5, 33, label="large mean", offset=100.0),
        dense_case(name, 2, 6, 5, 33, label="negative mean", offset=-2.0),
        dense_case(name, 2, 6, 5, 33, label="small values", scale=1e-3),
    )
]
PACKED = [
    packed_case(name, sites, channels, scope, label)
    for name in NAMES
    for scope in ("sample", "batch")
    for sites, channels, label in ((patch_sites(), 40, "patches"), (ragged_sites(), 19, "ragged"))
]
SMALL = [
    case for name in NAMES for case in (dense_case(name, 2, 3, 4, 7), packed_case(name, ragged_sites(), 5, "sample"))
]


@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", DENSE + PACKED, ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(case, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_any_strides_and_alignment(case):
    harness.assert_any_strides(case)


MANY_TILES = [
    dense_case("gelu_grn", 1, 40, 41, 70),  # one image, many tiles
    dense_case("gelu_grn", 9, 12, 12, 33),  # an image a thread
    dense_case("grn", 2, 20, 20, 48),
    packed_case("gelu_grn", patch_sites(5, (7, 7), 4), 40, "sample"),
    packed_case("gelu_grn", ragged_sites(), 40, "sample"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", MANY_TILES, ids=str)
def test_repeats_bitwise_for_any_number_of_threads(case, dtype):
    harness.assert_repeats_for_any_threads(case, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_without_a_graph_break(case):
    harness.assert_compiles(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_exports(case):
    harness.assert_exports(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_vmap_equals_loop(case):
    harness.assert_vmap_equals_loop(case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0)], ids=str)
def test_empty_maps_keep_shape_and_autograd(name, shape):
    case = dense_case(name, *shape)
    args = harness.inputs(case, torch.float32, requires_grad=True)
    (value,), gradients = harness.run(case.op, case, args)
    assert value.shape == shape
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, args, strict=True))


@pytest.mark.parametrize("scope", ["sample", "batch"])
@pytest.mark.parametrize("name", NAMES)
def test_no_visible_site_keeps_shape_and_autograd(name, scope):
    case = packed_case(name, ActiveSites.from_mask(torch.zeros(2, 3, 3, dtype=torch.bool)), 5, scope)
    args = harness.inputs(case, torch.float32, requires_grad=True)
    (value,), gradients = harness.run(case.op, case, args)
    assert value.shape == (0, 5)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, args, strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_sparse_equals_dense_on_masked_maps(name):
    sites = ragged_sites()
    weight, bias = parameters(torch.Generator().manual_seed(0), 12)
    features = torch.randn(len(sites), 12, dtype=torch.float64)
    dense = getattr(ops, name)(SparseTensor2d(features, sites).dense(), weight, bias)
    packed = getattr(ops, "sparse_" + name)(features, weight, bias, sites)
    torch.testing.assert_close(packed, SparseTensor2d.from_dense(dense, sites).features)


@pytest.mark.parametrize("name", NAMES)
def test_images_do_not_mix(name):
    case = dense_case(name, 3, 5, 6, 24)
    x, weight, bias = harness.inputs(case, torch.float32)
    together = case.op(x, weight, bias)
    assert all(torch.equal(together[i : i + 1], case.op(x[i : i + 1], weight, bias)) for i in range(3))


@pytest.mark.parametrize("name", NAMES)
def test_gradient_at_zero_is_finite_and_goes_through_the_identity(name):
    x = torch.zeros(2, 3, 3, 20, requires_grad=True)
    weight, bias = torch.randn(20), torch.randn(20)
    out = getattr(ops, name)(x, weight, bias)
    out.sum().backward()
    assert torch.equal(out, bias.expand_as(out))
    assert torch.equal(x.grad, torch.full_like(x, 1.0 if name == "grn" else 0.5))


def test_gelu_of_huge_values_is_the_identity_or_zero():
    x = torch.tensor([1e4, -1e4, 3e18, -3e18, 5.6, -5.6, 0.0, -0.0]).expand(1, 1, 1, 8)
    out = ops.gelu_grn(x, torch.zeros(8), torch.zeros(8))
    torch.testing.assert_close(out, F.gelu(x), rtol=0, atol=1e-6)


def test_not_a_number_is_not_hidden():
    x = torch.randn(2, 2, 2, 20)
    x[0, 1, 1, 3] = torch.nan
    out = ops.gelu_grn(x, torch.ones(20), torch.ones(20))
    assert out[0].isnan().all() and not out[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_take_float32_parameters(dtype):
    x, (weight, bias) = torch.randn(2, 5, 5, 24).to(dtype), (p.float() for p in parameters(torch.Generator(), 24))
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    out = ops.gelu_grn(x, weight, bias)
    right = reference.gelu_grn(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(out.double(), right, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    out.sum().backward()
    assert weight.grad.dtype == bias.grad.dtype == torch.float32


def test_autocast_casts_x_and_not_the_parameters():
    x, weight, bias = torch.randn(2, 4, 4, 8), torch.randn(8, requires_grad=True), torch.randn(8)
    sites = patch_sites()
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.gelu_grn(x, weight, bias)
        packed = ops.sparse_gelu_grn(torch.randn(len(sites), 8), weight, bias, sites)
    assert out.dtype == packed.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


@pytest.mark.parametrize("gelu", [False, True])
def test_opcheck(gelu):
    x, weight, bias = torch.randn(2, 4, 5, 19), torch.randn(19), torch.randn(19)
    _, norm = library.grn_fwd_save(x, weight, bias, 1e-6, gelu)
    sites = ragged_sites()
    features = torch.randn(len(sites), 19)
    _, packed_norm = library.sparse_grn_fwd_save(features, weight, bias, sites.offsets, 1e-6, gelu)
    calls = {
        "grn_fwd": (x, weight, bias, 1e-6, gelu),
        "grn_fwd_save": (x, weight, bias, 1e-6, gelu),
        "grn_bwd": (x, x, norm, weight, 1e-6, gelu),
        "sparse_grn_fwd": (features, weight, bias, sites.offsets, 1e-6, gelu),
        "sparse_grn_fwd_save": (features, weight, bias, sites.offsets, 1e-6, gelu),
        "sparse_grn_bwd": (features, features, packed_norm, weight, sites.offsets, 1e-6, gelu),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(library, name).default, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(2, 3, 8)), RuntimeError, r"x: expected 4 dimensions \(N, H, W, C\), got shape \(2, 3, 8\)"),
        (dict(x=torch.zeros(2, 3, 3, 8, dtype=torch.int32)), TypeError, "x: expected float32.*got int32"),
        (dict(x=None), TypeError, "x: expected a tensor, got NoneType"),
        (dict(weight=torch.zeros(1, 1, 1, 8)), RuntimeError, r"weight: expected shape \(8\), got \(1, 1, 1, 8\)"),
        (dict(bias=torch.zeros(9)), RuntimeError, r"bias: expected shape \(8\), got \(9\)"),
        (dict(bias=torch.zeros(8, dtype=torch.float64)), TypeError, "bias: expected the dtype of x.*got float64"),
        (
            dict(weight=torch.zeros(8, device="meta")),
            RuntimeError,
            r"weight: expected the device of x \(cpu\), got meta",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = dict(x=torch.zeros(2, 3, 3, 8), weight=torch.zeros(8), bias=torch.zeros(8))
    with pytest.raises(error, match=message):
        ops.gelu_grn(**(good | change))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (
            dict(features=torch.zeros(80, 8)),
            ValueError,
            r"features: expected shape \(81, C\), one row a site, got \(80, 8\)",
        ),
        (dict(features=torch.zeros(81)), ValueError, r"features: expected shape \(81, C\).*got \(81,\)"),
        (dict(features=torch.zeros(81, 8).bool()), TypeError, "features: expected float32.*got bool"),
        (dict(scope="image"), ValueError, """scope: expected "sample" or "batch", got 'image'"""),
        (dict(weight=torch.zeros(7)), RuntimeError, r"weight: expected shape \(8\), got \(7\)"),
    ],
)
def test_bad_packed_arguments_are_named(change, error, message):
    sites = ragged_sites()
    good = dict(features=torch.zeros(len(sites), 8), weight=torch.zeros(8), bias=torch.zeros(8), sites=sites)
    with pytest.raises(error, match=message):
        ops.sparse_grn(**(good | change))


@pytest.mark.parametrize("offsets", [[0, 3, 5], [1, 3, 6], [0, 4, 3, 6]], ids=str)
def test_offsets_that_do_not_fit_the_rows_are_refused(offsets):
    features, p = torch.zeros(6, 8), torch.zeros(8)
    with pytest.raises(RuntimeError, match="offsets: expected rising row numbers from 0 to the 6 rows"):
        library.sparse_grn_fwd(features, p, p, torch.tensor(offsets), 1e-6, False)


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule or huge_values or not_hidden")
