"""packed_attention and adaln_zero_attention: right, differentiable, and at home in PyTorch."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from convdit import ops, reference
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit


def packed_case(b, t, heads, d, label="", scale=None, **x):
    return Case(
        f"packed_attention {b}x{t} {heads}x{d} {label}",
        ops.packed_attention,
        reference.packed_attention,
        lambda g: (randn(g, b, t, 3 * heads * d, **x),),
        kwargs=dict(num_heads=heads, scale=scale),
    )


# The error rule compares with what a user of PyTorch would call. A softmax spelled out, as in the reference, is closer
# to the truth than a fused kernel where scores are large: it keeps each weight and not only their logarithmic sum.
def plain_attention(qkv, num_heads, scale=None):
    q, k, v = qkv.unflatten(2, (3, num_heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)


def plain_block(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias, num_heads):
    shift, scale, gate = modulation.unbind(1)
    qkv = F.linear(reference.layer_norm_modulate(x, shift, scale), qkv_weight, qkv_bias)
    y = F.linear(plain_attention(qkv, num_heads), proj_weight, proj_bias)
    return reference.gated_residual(x, y, gate)


def block_case(b, t, heads, d, bias=True):
    width = heads * d

    def make(g):
        small = width**-0.5
        parameters = [randn(g, 3 * width, width, scale=small), randn(g, 3 * width) if bias else None]
        parameters += [randn(g, width, width, scale=small), randn(g, width) if bias else None]
        return randn(g, b, t, width), randn(g, b, 3, width, scale=0.3), *parameters

    name = f"adaln_zero_attention {b}x{t} {heads}x{d} {'' if bias else 'without biases'}"
    return Case(name, ops.adaln_zero_attention, reference.adaln_zero_attention, make, kwargs=dict(num_heads=heads))


PACKED = [
    packed_case(2, 65, 6, 64),
    packed_case(3, 7, 2, 5, "odd width"),
    packed_case(1, 300, 1, 72, "one head"),
    packed_case(1, 70, 1, 16, "one head"),
    packed_case(2, 1, 3, 8, "one token"),
    packed_case(2, 33, 4, 1, "width 1"),
    packed_case(2, 9, 2, 16, "scale", scale=0.3),
    packed_case(2, 40, 2, 16, "large scores", scale=10.0),
    packed_case(2, 40, 2, 16, "large mean", offset=30.0),
    packed_case(2, 9, 2, 16, "negative scale", scale=-0.3),
    packed_case(2, 9, 2, 16, "scale 0", scale=0.0),
]
# Each width of the CUDA kernels' tiles, and widths between and beyond them; tokens that fill tiles, and do not.
WIDTHS = [(66, 32), (16, 48), (130, 64), (9, 68), (63, 72), (64, 80), (65, 96), (63, 128), (20, 130), (3, 300)]
PACKED += [packed_case(2, t, 2, d) for t, d in WIDTHS]
BLOCK = [block_case(2, 17, 3, 8), block_case(2, 5, 1, 12, bias=False)]
SMALL = [packed_case(2, 5, 3, 4), block_case(2, 5, 3, 4)]


@pytest.mark.parametrize("case", PACKED + BLOCK, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", PACKED + BLOCK, ids=str)
def test_error_rule(case, dtype):
    plain = plain_block if case in BLOCK else plain_attention
    harness.assert_error_rule(replace(case, reference=plain), dtype, whole_gradients=case in BLOCK)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


@pytest.mark.parametrize("case", SMALL[:1], ids=str)
def test_any_strides_and_alignment(case):
    harness.assert_any_strides(case)


@pytest.mark.parametrize("case", [packed_case(2, 65, 6, 64), packed_case(4, 300, 2, 24)], ids=str)
def test_repeats_bitwise_for_any_number_of_threads(case):
    harness.assert_repeats_for_any_threads(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_compiles_without_a_graph_break(case):
    harness.assert_compiles(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_exports(case):
    harness.assert_exports(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_vmap_equals_loop(case):
    harness.assert_vmap_equals_loop(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
def test_scores_far_below_zero(dtype):
    # exp(0 - log_sum_exp) overflows: whatever fills up a tile beyond the last token must not be taken for a key
    qkv = torch.randn(2, 40, 3, 2, 16) * torch.tensor([0.1, 0.1, 1.0]).view(3, 1, 1)
    qkv = (qkv + torch.tensor([3.0, -3.0, 0.0]).view(3, 1, 1)).to(dtype).flatten(2).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    out, expected = ops.packed_attention(qkv, 2, scale=1.0), reference.packed_attention(exact, 2, scale=1.0)
    (grad,), (expected_grad,) = torch.autograd.grad(out.sum(), qkv), torch.autograd.grad(expected.sum(), exact)
    torch.testing.assert_close(out.double(), expected, rtol=0.05, atol=0.05)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=0.1, atol=0.2)


@pytest.mark.parametrize("d", [5, 64])
@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
def test_rows_that_are_not_finite_stay_apart(dtype, d):
    qkv = torch.randn(2, 70, 3, 2, d)
    qkv[0, 3, 0, 1, 0] = torch.nan  # a query: its own row alone
    qkv[0, 8, 2, 0, 0] = torch.inf  # a value: one column of its head
    qkv[1, 66, 1, 0] = 1e30  # a key that one query scores as -inf, and no other as more than the rest
    qkv[1, :, 0, 0] = 0
    qkv[1, 5, 0, 0] = -1e30
    if dtype == torch.float16:
        qkv = qkv.nan_to_num(nan=torch.nan, posinf=torch.inf).clamp(-6e4, 6e4)
    qkv = qkv.to(dtype).flatten(2)
    out, expected = ops.packed_attention(qkv, 2), reference.packed_attention(qkv.float(), 2)
    torch.testing.assert_close(out.float(), expected, equal_nan=True, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("shape", [(0, 5, 24), (2, 0, 24), (2, 5, 0), (0, 0, 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_empty_inputs_keep_shape_and_autograd(shape, dtype):
    qkv = torch.zeros(shape, dtype=dtype, requires_grad=True)
    out = ops.packed_attention(qkv, 2)
    assert out.shape == (*shape[:2], shape[2] // 3) and out.dtype == dtype
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


def test_equal_keys_average_the_values():
    qkv = torch.randn(2, 9, 3, 8)
    qkv[:, :, 1] = 1.5
    out = ops.packed_attention(qkv.flatten(2), 2)
    torch.testing.assert_close(out, qkv[:, :, 2].mean(1, keepdim=True).expand_as(out))


def test_result_may_be_changed_in_place():
    out = ops.packed_attention(torch.randn(2, 3, 24), 2)
    assert out.is_contiguous() and not out._is_view()


def test_slice_of_a_wider_tensor_is_read_in_place():
    wide = torch.randn(2, 7, 40)
    torch.testing.assert_close(ops.packed_attention(wide[..., 3:27], 2), reference.packed_attention(wide[..., 3:27], 2))


def test_autocast_casts_as_pytorch_casts_attention():
    qkv = torch.randn(2, 5, 24)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.packed_attention(qkv, 2)
        assert out.dtype == F.scaled_dot_product_attention(*qkv.view(2, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)).dtype
    assert out.dtype == torch.bfloat16


def test_autocast_keeps_the_dtype_of_the_residual_stream():
    args = harness.inputs(SMALL[1], torch.float32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.adaln_zero_attention(*args, num_heads=3)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out, reference.adaln_zero_attention(*args, num_heads=3), rtol=0.05, atol=0.1)
    out.sum().backward()
    assert all(a.grad is not None and a.grad.dtype == torch.float32 for a in args)


def test_flops_count_two_matrix_products_forward_and_five_backward():
    qkv = torch.randn(2, 5, 24, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        ops.packed_attention(qkv, 2).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * 2 * 5 * 5 * 8


def test_opcheck():
    for dtype in (torch.float32, torch.float16):
        qkv = torch.randn(2, 5, 24).to(dtype)
        for forward in (library.packed_attention_fwd, library.packed_attention_fwd_save):
            torch.library.opcheck(forward.default, (qkv, 2, 0.5))
        out, *saved = library.packed_attention_fwd_save(qkv, 2, 0.5)
        torch.library.opcheck(library.packed_attention_bwd.default, (out, qkv, out, *saved, 2, 0.5))


@pytest.mark.parametrize(
    "qkv, heads, error, message",
    [
        (torch.zeros(5, 24), 2, ValueError, r"qkv: expected shape \(B, T, 3 D\), got \(5, 24\)"),
        (torch.zeros(2, 5, 24), 5, ValueError, "num_heads: expected a number of heads that divides D = 8, got 5"),
        (torch.zeros(2, 5, 25), 2, ValueError, "num_heads: .*got 2"),
        (torch.zeros(2, 5, 24), 0, ValueError, "num_heads: .*got 0"),
        (torch.zeros(2, 5, 24), 2.0, ValueError, "num_heads: .*got 2.0"),
        (torch.zeros(2, 5, 24, dtype=torch.int32), 2, TypeError, "qkv: expected float32.*got int32"),
        (None, 2, TypeError, "qkv: expected a tensor, got NoneType"),
    ],
)
def test_bad_arguments_are_named(qkv, heads, error, message):
    with pytest.raises(error, match=message):
        ops.packed_attention(qkv, heads)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(5, 8)), ValueError, r"x: expected shape \(B, T, D\), got \(5, 8\)"),
        (dict(modulation=torch.zeros(2, 2, 8)), ValueError, r"modulation: expected shape \(2, 3, 8\), got \(2, 2, 8\)"),
        (dict(modulation=torch.zeros(2, 24)), ValueError, r"modulation: expected shape \(2, 3, 8\), got \(2, 24\)"),
        (dict(num_heads=3), ValueError, "num_heads: .*got 3"),
        (dict(modulation=torch.zeros(2, 3, 8).double()), TypeError, "shift: expected the dtype of x"),
    ],
)
def test_bad_arguments_of_the_block_are_named(change, error, message):
    good = dict(x=torch.zeros(2, 5, 8), modulation=torch.zeros(2, 3, 8), num_heads=2)
    good |= dict(qkv_weight=torch.zeros(24, 8), qkv_bias=None, proj_weight=torch.zeros(8, 8), proj_bias=None)
    with pytest.raises(error, match=message):
        ops.adaln_zero_attention(**(good | change))


def test_every_cpu_level():
    # Without fused multiply-adds large scores are rounded otherwise than PyTorch's: test_attention_cpu.py has those.
    tests = "(error_rule and not (scores and float32)) or finite or below_zero or threads"
    harness.assert_every_cpu_level(__file__, tests, CONVDIT_PRODUCTS="convdit")
