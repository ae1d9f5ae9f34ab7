"""The plain PyTorch operators of ConvNeXt: their definitions, gradients, and empty inputs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck, gradgradcheck

from convdit import reference


def random(*shape, dtype=torch.float64, requires_grad=False):
    return torch.randn(shape, dtype=dtype).requires_grad_(requires_grad)


def some_sites(visible):
    """What the reference reads of an ActiveSites, for any visible mask."""
    n, h, w = visible.shape
    return SimpleNamespace(indices=visible.nonzero().int(), batch_size=n, spatial_shape=(h, w))


def two_images():
    visible = torch.zeros(3, 4, 5, dtype=torch.bool)  # the third image has no visible site
    visible[0, ::2, 1:] = True
    visible[1, 3, 2] = True
    return visible


@pytest.mark.parametrize("kernel", [3, 5, 7, 31])
def test_depthwise_conv_is_a_sum_over_the_zero_padded_window(kernel):
    torch.manual_seed(0)
    x, weight, bias = random(2, 4, 6, 3), random(3, 1, kernel, kernel), random(3)
    r = kernel // 2
    padded = F.pad(x, (0, 0, r, r, r, r))
    expected = bias.expand_as(x).clone()
    for i in range(kernel):
        for j in range(kernel):
            expected += padded[:, i : i + 4, j : j + 6] * weight[:, 0, i, j]
    actual = reference.depthwise_conv2d(x, weight, bias)
    torch.testing.assert_close(actual, expected)
    assert actual.is_contiguous()


@pytest.mark.parametrize("shape", [(0, 4, 4, 3), (2, 0, 4, 3), (2, 4, 4, 0)])
def test_empty_maps_keep_every_input_in_the_graph(shape):
    c = shape[-1]
    x = random(*shape, requires_grad=True)
    weight, bias = random(c, 1, 7, 7, requires_grad=True), random(c, requires_grad=True)
    y = reference.depthwise_conv2d(x, weight, bias)
    assert y.shape == shape
    y.sum().backward()
    assert weight.grad.eq(0).all() and bias.grad.eq(0).all() and x.grad.shape == shape


def test_grn_matches_its_formula_with_the_norm_over_sites():
    torch.manual_seed(0)
    x, weight, bias = random(2, 3, 4, 5), random(5), random(5)
    norm = torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True)
    expected = x + weight * (x * norm / (norm.mean(-1, keepdim=True) + 1e-6)) + bias
    torch.testing.assert_close(reference.grn(x, weight, bias), expected)


def test_grn_of_zeros_and_of_dead_channels_has_finite_gradients_of_first_and_second_order():
    x = random(2, 3, 3, 4)
    x[0] = 0
    x[1, ..., 2] = 0
    x.requires_grad_()
    weight, bias = random(4, requires_grad=True), random(4, requires_grad=True)
    (g,) = torch.autograd.grad(reference.grn(x, weight, bias).square().sum(), x, create_graph=True)
    assert g.isfinite().all()
    for second in torch.autograd.grad(g.square().sum(), (x, weight, bias)):
        assert second.isfinite().all()


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_sparse_grn_ignores_absent_sites(scope):
    torch.manual_seed(0)
    visible = two_images()
    dense = random(3, 4, 5, 6) * visible[..., None]
    weight, bias = random(6), random(6)
    if scope == "sample":
        expected = reference.grn(dense, weight, bias)
    else:
        expected = reference.grn(dense.reshape(1, 12, 5, 6), weight, bias).reshape(3, 4, 5, 6)
    actual = reference.sparse_grn(dense[visible], weight, bias, some_sites(visible), scope=scope)
    torch.testing.assert_close(actual, expected[visible])


def test_sparse_depthwise_conv_reads_absent_neighbours_as_zero():
    torch.manual_seed(0)
    visible = two_images()
    dense = random(3, 4, 5, 6) * visible[..., None]
    weight, bias = random(6, 1, 3, 3), random(6)
    expected = reference.depthwise_conv2d(dense, weight, bias)[visible]
    actual = reference.sparse_depthwise_conv2d(dense[visible], weight, bias, some_sites(visible))
    torch.testing.assert_close(actual, expected)


def test_gradients_of_first_and_second_order_match_finite_differences():
    torch.manual_seed(0)
    sites = some_sites(two_images())
    m = sites.indices.shape[0]

    def arguments(*shapes):
        return tuple(random(*shape, requires_grad=True) for shape in shapes)

    cases = [
        (reference.depthwise_conv2d, arguments((1, 2, 3, 2), (2, 1, 3, 3), (2,))),
        (reference.gelu_grn, arguments((2, 2, 2, 3), (3,), (3,))),
        (
            reference.convnext_block,
            arguments((1, 2, 2, 2), (2, 1, 3, 3), (2,), (2,), (2,), (3, 2), (3,), (3,), (3,), (2, 3), (2,)),
        ),
        (
            lambda *a: reference.sparse_depthwise_conv2d(*a, sites),
            arguments((m, 2), (2, 1, 3, 3), (2,)),
        ),
        (lambda *a: reference.sparse_gelu_grn(*a, sites), arguments((m, 2), (2,), (2,))),
        (
            lambda *a: reference.sparse_gelu_grn(*a, sites, scope="batch"),
            arguments((m, 2), (2,), (2,)),
        ),
    ]
    for function, inputs in cases:
        assert gradcheck(function, inputs)
        assert gradgradcheck(function, inputs)


@pytest.mark.parametrize("radius", [1, 3])
def test_neighbors_names_the_row_of_each_visible_site_of_the_window(radius):
    visible = two_images()
    indices = visible.nonzero().int()
    rows = {tuple(site): row for row, site in enumerate(indices.tolist())}
    expected = [
        [rows.get((n, y + dy, x + dx), -1) for dy in range(-radius, radius + 1) for dx in range(-radius, radius + 1)]
        for n, y, x in indices.tolist()
    ]
    table = reference.neighbors(indices, 3, 4, 5, radius)
    assert table.dtype == torch.int32
    assert table.tolist() == expected


def test_an_unknown_grn_scope_is_refused_by_name():
    sites = some_sites(two_images())
    with pytest.raises(ValueError, match=r"scope.*'image'"):
        reference.sparse_grn(random(sites.indices.shape[0], 2), random(2), random(2), sites, scope="image")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_takes_float32_parameters_and_returns_its_own_dtype(dtype):
    torch.manual_seed(0)
    x = (300 * random(1, 4, 4, 3)).to(dtype)  # squares of 300 overflow float16
    weight, bias = random(3, dtype=torch.float32), random(3, dtype=torch.float32)
    y = reference.grn(x, weight, bias)
    assert y.dtype == dtype and y.isfinite().all()
    conv = reference.depthwise_conv2d(x, random(3, 1, 3, 3, dtype=torch.float32), bias)
    assert conv.dtype == dtype and conv.isfinite().all()
