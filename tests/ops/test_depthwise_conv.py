"""depthwise_conv2d, alone and with LayerNorm: right for any shape and kernel size, and at home in PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convdit import ops, reference
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit


def flat(op):
    """`op` with its weight as (C, K * K), so that the error rule, which goes by rows, goes by channels."""

    def call(x, weight, *rest):
        k = math.isqrt(weight.shape[1])
        return op(x, weight.view(-1, 1, k, k), *rest)

    return call


def conv_case(n, h, w, c, k=7, bias=True, name="", **x):
    return Case(
        f"conv {n}x{h}x{w}x{c} k{k} {name}",
        flat(ops.depthwise_conv2d),
        flat(reference.depthwise_conv2d),
        lambda g: (randn(g, n, h, w, c, **x), randn(g, c, k * k), *([randn(g, c)] if bias else [])),
    )


def norm_case(n, h, w, c, k=7, name="", **x):
    return Case(
        f"conv_norm {n}x{h}x{w}x{c} k{k} {name}",
        flat(ops.depthwise_conv2d_layer_norm),
        flat(reference.depthwise_conv2d_layer_norm),
        lambda g: (randn(g, n, h, w, c, **x), randn(g, c, k * k), *(randn(g, c) for _ in range(3))),
    )


SHAPES = [
    (2, 7, 7, 48),
    (1, 14, 14, 100),
    (1, 33, 47, 40),
    (1, 28, 56, 16),
    (2, 3, 2, 33),
    (1, 4, 130, 17),
    (1, 130, 4, 16),
]
KERNELS = [(2, 6, 8, 20, 3), (1, 9, 15, 17, 5), (1, 12, 16, 33, 9)]
CASES = [make(*shape) for shape in [*SHAPES, *KERNELS] for make in (conv_case, norm_case)]
CASES += [
    conv_case(2, 7, 8, 20, bias=False, name="without bias"),
    conv_case(3, 7, 7, 520, name="a narrow image in two parts of its sum"),
    conv_case(3, 5, 6, 520, name="a narrow image in two parts of its sum"),
    conv_case(1, 16, 9, 1240, name="so wide that its channels are taken in groups"),
    norm_case(1, 16, 9, 1240, name="so wide that its channels are taken in groups"),
    norm_case(1, 8, 8, 96, name="large mean", offset=100.0),
    norm_case(5, 8, 7, 72, name="large mean, tiles", offset=100.0),
    conv_case(2, 8, 8, 40, name="small values", scale=1e-4),
]
# Too few values a row for a rule that compares the largest error of a row, or too slow in PyTorch's halves.
TINY = [
    (1, 1, 1, 17),
    (2, 9, 1, 8),
    (1, 1, 9, 8),
    (2, 3, 2, 5),
    (1, 6, 60, 5, 31),
    (1, 40, 33, 3, 31),
    (2, 4, 5, 3, 1),
    (2, 7, 9, 1),
]
EXACT = CASES + [make(*shape) for shape in TINY for make in (conv_case, norm_case)]
SMALL = [conv_case(2, 4, 9, 19), norm_case(2, 4, 9, 19), conv_case(2, 5, 4, 3, 5), norm_case(2, 5, 4, 3, 5)]
EMPTY = [
    make(*shape)
    for shape in [(0, 5, 5, 8), (2, 0, 5, 8), (2, 5, 0, 8), (2, 5, 5, 0)]
    for make in (conv_case, norm_case)
]


@pytest.mark.parametrize("case", EXACT, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(case, dtype)


@pytest.mark.parametrize("k", [15, 31])
def test_error_rule_for_large_kernels(k):
    harness.assert_error_rule(conv_case(1, 10, 33, 20, k), torch.float32)


@pytest.mark.parametrize("shape", [(128, 7, 7, 8), (8, 56, 56, 8)])
def test_norm_of_as_many_tiles_as_a_gpu_has_for_one_launch(shape):
    """Too many short rows for the error rule."""
    case = norm_case(*shape)
    args = harness.inputs(case, torch.float32, requires_grad=True)
    exact = [a.detach().double().requires_grad_() for a in args]
    ours, right = harness.run(case.op, case, args), harness.run(case.reference, case, exact)
    for o, r in zip([*ours[0], *ours[1]], [*right[0], *right[1]], strict=True):
        assert (o - r).abs().max() < 1e-5 * r.abs().max()


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


@pytest.mark.parametrize("width", range(1, 30))
def test_every_width_of_tile_and_side_of_the_map(width):
    g = torch.Generator().manual_seed(width)
    x, weight = randn(g, 1, 3, width, 16).float().requires_grad_(), randn(g, 16, 1, 7, 7).float().requires_grad_()
    wide = [t.detach().double().requires_grad_() for t in (x, weight)]
    ours, right = ops.depthwise_conv2d(x, weight), reference.depthwise_conv2d(*wide)
    torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=2e-5)
    cotangent = randn(g, *x.shape)
    gradients = torch.autograd.grad(ours, (x, weight), cotangent.float())
    for o, r in zip(gradients, torch.autograd.grad(right, wide, cotangent), strict=True):
        torch.testing.assert_close(o.double(), r, rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("height", range(1, 17))
def test_every_height_of_a_narrow_map(height):
    """Up to seven columns wide, rows of output go two at a time, and the last one alone."""
    g = torch.Generator().manual_seed(height)
    for width in (3, 7):
        x, weight, bias = randn(g, 2, height, width, 40), randn(g, 40, 1, 7, 7), randn(g, 40)
        ours, right = (
            ops.depthwise_conv2d(x.float(), weight.float(), bias.float()),
            reference.depthwise_conv2d(x, weight, bias),
        )
        torch.testing.assert_close(ours.double(), right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_any_strides_and_alignment(case):
    harness.assert_any_strides(case)


@pytest.mark.parametrize("case", [*CASES[:4], conv_case(3, 30, 30, 40), norm_case(3, 30, 30, 40)], ids=str)
def test_repeats_bitwise_for_any_number_of_threads(case):
    harness.assert_repeats_for_any_threads(case)


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_compiles_without_a_graph_break(case):
    harness.assert_compiles(case)


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_exports(case):
    harness.assert_exports(case)


@pytest.mark.parametrize("case", SMALL[:2], ids=str)
def test_vmap_equals_loop(case):
    harness.assert_vmap_equals_loop(case)


def test_vmap_over_x_alone_is_one_call():
    x, weight, bias = torch.randn(3, 2, 5, 6, 8), torch.randn(8, 1, 7, 7), torch.randn(8)
    got = torch.func.vmap(ops.depthwise_conv2d, in_dims=(1, None, None), out_dims=1)(x, weight, bias)
    assert torch.equal(got, torch.stack([ops.depthwise_conv2d(x[:, i], weight, bias) for i in range(2)], 1))


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_inputs_keep_shape_and_autograd(case):
    args = harness.inputs(case, torch.float32, requires_grad=True)
    values, gradients = harness.run(case.op, case, args)
    assert values[0].shape == args[0].shape
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, args, strict=True))


@pytest.mark.parametrize("k", [3, 7, 31])
def test_matches_conv2d_of_a_channels_last_image(k):
    image = torch.randn(2, 24, 9, 13).to(memory_format=torch.channels_last)
    conv = torch.nn.Conv2d(24, 24, k, padding=k // 2, groups=24)
    ours = ops.depthwise_conv2d(image.permute(0, 2, 3, 1), conv.weight, conv.bias).permute(0, 3, 1, 2)
    torch.testing.assert_close(ours, conv(image), rtol=1e-4, atol=1e-5)


def test_without_gradients_the_fused_operator_gives_the_same_values():
    case = norm_case(2, 9, 9, 40)
    args = harness.inputs(case, torch.float32)
    assert torch.equal(case.op(*args), case.op(args[0].requires_grad_(), *args[1:]))


def test_only_the_needed_gradients_are_computed():
    x, weight, bias = torch.randn(2, 5, 6, 8), torch.randn(8, 1, 7, 7), torch.randn(8, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(x, weight, bias).sum().backward()
    forward = 2 * 49 * x.numel()
    assert counter.get_total_flops() == forward
    torch.testing.assert_close(bias.grad, torch.full((8,), 60.0))
    with FlopCounterMode(display=False) as counter:
        ops.depthwise_conv2d(x, weight.requires_grad_(), bias).sum().backward()
    assert counter.get_total_flops() == 2 * forward


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_parameters_beside_a_map_of_halves(dtype):
    g = torch.Generator().manual_seed(0)
    x = randn(g, 2, 6, 7, 24).to(dtype).requires_grad_()
    parameters = [t.float().requires_grad_() for t in (randn(g, 24, 1, 7, 7), *(randn(g, 24) for _ in range(3)))]
    out = ops.depthwise_conv2d_layer_norm(x, *parameters)
    wide = [t.detach().double().requires_grad_() for t in (x, *parameters)]
    right = reference.depthwise_conv2d_layer_norm(*wide)
    eps = torch.finfo(dtype).eps
    assert out.dtype == dtype
    assert (out.double() - right).abs().max() < 4 * eps * right.abs().max()
    out.sum().backward(), right.sum().backward()
    for t, w in zip((x, *parameters), wide, strict=True):
        assert t.grad.dtype == t.dtype and (t.grad.double() - w.grad).abs().max() < 8 * eps * (1 + w.grad.abs().max())


def test_autocast_casts_the_map_and_keeps_the_parameters():
    x, weight = torch.randn(2, 5, 6, 8), torch.randn(8, 1, 7, 7, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.depthwise_conv2d(x, weight)
    assert out.dtype == torch.bfloat16
    out.sum().backward()
    assert weight.grad.dtype == torch.float32


def test_opcheck():
    g = torch.Generator().manual_seed(0)
    x, weight, bias = randn(g, 2, 4, 5, 19).float(), randn(g, 19, 1, 7, 7).float(), randn(g, 19).float()
    out, conv, mean, rstd = library.depthwise_conv2d_layer_norm_fwd_save(x, weight, bias, bias, bias, 1e-6)
    calls = [
        ("depthwise_conv2d_fwd", (x, weight, bias)),
        ("depthwise_conv2d_fwd", (x, weight, None)),
        ("depthwise_conv2d_input_grad", (x, weight)),
        ("depthwise_conv2d_weight_grad", (x, out, 7)),
        ("depthwise_conv2d_layer_norm_fwd", (x, weight, None, bias, bias, 1e-6)),
        ("depthwise_conv2d_layer_norm_fwd_save", (x, weight, bias, bias, bias, 1e-6)),
        ("depthwise_conv2d_layer_norm_bwd", (out, conv, bias, mean, rstd)),
    ]
    for name, args in calls:
        torch.library.opcheck(getattr(library, name).default, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 5, 8)), RuntimeError, r"x: expected 4 dimensions \(N, H, W, C\), got shape \(3, 5, 8\)"),
        (dict(x=torch.zeros(2, 3, 5, 8, dtype=torch.int64)), TypeError, "x: expected float32.*got int64"),
        (dict(x=None), TypeError, "x: expected a tensor, got NoneType"),
        (dict(weight=torch.zeros(8, 1, 4, 4)), RuntimeError, "weight: expected an odd kernel size from 1 to 31, got 4"),
        (dict(weight=torch.zeros(8, 1, 33, 33)), RuntimeError, "weight: expected an odd kernel size.*got 33"),
        (dict(weight=torch.zeros(8, 1, 7, 5)), RuntimeError, r"weight: expected shape \(8, 1, K, K\), got .*7, 5\)"),
        (dict(weight=torch.zeros(9, 1, 7, 7)), RuntimeError, r"weight: expected shape \(8, 1, K, K\), got \(9"),
        (dict(weight=torch.zeros(8, 7, 7)), RuntimeError, r"weight: expected 4 dimensions \(C, 1, K, K\)"),
        (dict(weight=torch.zeros(8, 1, 7, 7).double()), TypeError, "weight: expected the dtype of x.*got float64"),
        (dict(bias=torch.zeros(7)), RuntimeError, r"bias: expected shape \(8\), got \(7\)"),
        (dict(bias=torch.zeros(8, dtype=torch.int32)), TypeError, "bias: expected float32.*got int32"),
        (dict(ln_weight=torch.zeros(8, 1)), RuntimeError, r"ln_weight: expected shape \(8\), got \(8, 1\)"),
        (dict(ln_bias=torch.zeros(9)), RuntimeError, r"ln_bias: expected shape \(8\), got \(9\)"),
        (dict(bias=torch.zeros(8, device="meta")), RuntimeError, r"bias: expected the device of x \(cpu\), got meta"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(change, error, message):
    good = dict(x=torch.zeros(2, 3, 5, 8), weight=torch.zeros(8, 1, 7, 7), bias=torch.zeros(8))
    good |= dict(ln_weight=torch.zeros(8), ln_bias=torch.zeros(8))
    with pytest.raises(error, match=message):
        ops.depthwise_conv2d_layer_norm(**(good | change))


def test_a_gradient_of_another_shape_is_refused():
    x = torch.zeros(2, 3, 5, 8)
    with pytest.raises(RuntimeError, match=r"grad: expected shape \(2, 3, 5, 8\), got \(2, 3, 4, 8\)"):
        library.depthwise_conv2d_weight_grad(x[:, :, 1:], x, 7)
    with pytest.raises(RuntimeError, match="kernel_size: expected an odd kernel size from 1 to 31, got 6"):
        library.depthwise_conv2d_weight_grad(x, x, 6)


def test_reads_no_value_from_outside_the_map():
    """Neighbouring memory full of NaN does not leak in, for any channel tail."""
    for c in (1, 5, 16, 23):
        storage = torch.full((3, 4, 5, c), float("nan"))
        storage[1] = torch.randn(4, 5, c)
        x, weight = storage[1:2], torch.randn(c, 1, 7, 7)
        right = F.conv2d(x.permute(0, 3, 1, 2).contiguous(), weight, padding=3, groups=c)
        torch.testing.assert_close(ops.depthwise_conv2d(x, weight).permute(0, 3, 1, 2), right, rtol=1e-4, atol=1e-5)


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule or every_width or threads")
