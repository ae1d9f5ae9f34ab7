"""The attention half of an adaLN-Zero block as one operator; its parts together are tested in test_attention.py."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convdit import ops, reference
from tests.ops import harness
from tests.ops.test_attention import block_case, plain_block

library = torch.ops.convdit
FUSED = (library.adaln_zero_attention_fwd, library.adaln_zero_attention_fwd_save)
# Several sequences go through together, with a rest; one alone is more than that; heads of an odd width.
CASES = [block_case(5, 300, 2, 8), block_case(2, 900, 1, 16, bias=False), block_case(3, 40, 3, 7)]
SMALL = block_case(2, 5, 3, 4)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case):
    harness.assert_error_rule(replace(case, reference=plain_block), torch.float32, whole_gradients=True)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_without_gradients(case):
    args = harness.inputs(case, torch.float32)
    expected = reference.adaln_zero_attention(*args, **case.kwargs)
    torch.testing.assert_close(case.op(*args, **case.kwargs), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [False, True])
def test_is_one_operator_in_float32(grad):
    x, *rest = harness.inputs(CASES[0], torch.float32)
    with FlopCounterMode(display=False) as counter:
        ops.adaln_zero_attention(x.requires_grad_(grad), *rest, num_heads=2)
    assert counter.get_flop_counts()["Global"].keys() == {FUSED[grad]}


@pytest.mark.parametrize("grad", [False, True])
def test_counts_as_many_flops_as_its_parts(grad):
    counts = []
    for dtype in (torch.float32, torch.float64):
        x, *rest = harness.inputs(SMALL, dtype)
        with FlopCounterMode(display=False) as counter:
            out = ops.adaln_zero_attention(x.requires_grad_(grad), *(r.requires_grad_(grad) for r in rest), num_heads=3)
            if grad:
                out.sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_gradients_of_some_arguments_alone():
    case = block_case(2, 7, 2, 8)
    for wanted in range(6):
        args = harness.inputs(case, torch.float32)
        args[wanted].requires_grad_()
        exact = [a.detach().double() for a in args]
        exact[wanted].requires_grad_()
        (grad,) = torch.autograd.grad(case.op(*args, **case.kwargs).sum(), args[wanted])
        (expected,) = torch.autograd.grad(case.reference(*exact, **case.kwargs).sum(), exact[wanted])
        torch.testing.assert_close(grad, expected.float(), rtol=1e-4, atol=1e-4)


def test_any_strides_and_alignment():
    harness.assert_any_strides(SMALL)


def test_repeats_bitwise():
    # With another number of threads PyTorch's own products may have other bits.
    harness.depends_on_threads(CASES[0])


@pytest.mark.parametrize("shape", [(0, 5, 8), (2, 0, 8), (2, 5, 0)])
def test_empty_inputs_keep_shape_and_autograd(shape):
    b, _, d = shape
    for grad in (False, True):
        args = [torch.zeros(s) for s in (shape, (b, 3, d), (3 * d, d), (3 * d,), (d, d), (d,))]
        out = ops.adaln_zero_attention(args[0].requires_grad_(grad), *(a.requires_grad_(grad) for a in args[1:]), 2)
        assert out.shape == shape
        if grad:
            out.sum().backward()
            assert all(a.grad is not None and a.grad.shape == a.shape for a in args)


def test_parameters_of_another_dtype_go_by_the_parts():
    x, modulation, *rest = harness.inputs(SMALL, torch.float32)
    out = ops.adaln_zero_attention(x, modulation.bfloat16(), *rest, num_heads=3)
    expected = ops.adaln_zero_attention(x, modulation.bfloat16().float(), *rest, num_heads=3)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wrong", ["modulation", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias"])
@pytest.mark.parametrize("grad", [False, True])
def test_an_argument_on_meta_is_refused(wrong, grad):
    names = ("x", "modulation", "qkv_weight", "qkv_bias", "proj_weight", "proj_bias")
    args = dict(zip(names, harness.inputs(SMALL, torch.float32, requires_grad=grad), strict=True))
    with pytest.raises(RuntimeError, match=rf"{wrong}: expected the device of x \(cpu\), got meta"):
        ops.adaln_zero_attention(**args | {wrong: args[wrong].to("meta")}, **SMALL.kwargs)
    with pytest.raises(TypeError, match=f"{wrong}: expected a tensor, got str"):
        ops.adaln_zero_attention(**args | {wrong: "weight"}, **SMALL.kwargs)


def test_opcheck():
    args = (*harness.inputs(SMALL, torch.float32), 3, 1e-6)
    for operator in FUSED:
        torch.library.opcheck(operator.default, args)
        torch.library.opcheck(operator.default, (*args[:3], None, args[4], None, *args[6:]))


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(5, 8)}, r"x: expected 3 dimensions \(B, T, D\), got shape \(5, 8\)"),
        ({1: torch.zeros(2, 2, 8)}, r"modulation: expected shape \(2, 3, 8\), got \(2, 2, 8\)"),
        ({2: torch.zeros(8, 8)}, r"qkv_weight: expected shape \(24, 8\), got \(8, 8\)"),
        ({3: torch.zeros(8)}, r"qkv_bias: expected shape \(24\), got \(8\)"),
        ({4: torch.zeros(8, 8).double()}, "proj_weight: expected dtype float32, got float64"),
        ({5: torch.zeros(9)}, r"proj_bias: expected shape \(8\), got \(9\)"),
        ({6: 3}, "num_heads: expected a number of heads that divides D = 8, got 3"),
    ],
)
def test_bad_arguments_of_the_operators_are_named(change, message):
    good = [torch.zeros(s) for s in ((2, 5, 8), (2, 3, 8), (24, 8), (24,), (8, 8), (8,))] + [2, 1e-6]
    for operator in FUSED:
        with pytest.raises(RuntimeError, match=message):
            operator(*(change.get(i, value) for i, value in enumerate(good)))


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "error_rule or without_gradients")
