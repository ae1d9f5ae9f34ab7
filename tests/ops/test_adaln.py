"""layer_norm_modulate, gated_residual and the two fused: right, differentiable, and at home in PyTorch."""

import pytest
import torch

from convdit import ops, reference
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit


def modulate_case(b, t, d, name="", **x):
    return Case(
        f"layer_norm_modulate {b}x{t}x{d} {name}",
        ops.layer_norm_modulate,
        reference.layer_norm_modulate,
        lambda g: (randn(g, b, t, d, **x), randn(g, b, d), randn(g, b, d)),
    )


def gated_case(b, t, d):
    return Case(
        f"gated_residual {b}x{t}x{d}",
        ops.gated_residual,
        reference.gated_residual,
        lambda g: (randn(g, b, t, d), randn(g, b, t, d), randn(g, b, d)),
    )


def fused_case(b, t, d, name="", **x):
    return Case(
        f"gated_residual_layer_norm_modulate {b}x{t}x{d} {name}",
        ops.gated_residual_layer_norm_modulate,
        reference.gated_residual_layer_norm_modulate,
        lambda g: (randn(g, b, t, d, **x), randn(g, b, t, d), *(randn(g, b, d) for _ in range(3))),
    )


SHAPES = [(2, 5, 384), (3, 33, 100), (2, 65, 17), (1, 1, 1152), (2, 4, 1), (2, 37, 40), (5, 1, 7)]
CASES = [make(*shape) for shape in SHAPES for make in (modulate_case, gated_case, fused_case)]
CASES += [
    modulate_case(2, 7, 768, "large mean", offset=100.0),
    modulate_case(2, 7, 40, "small values", scale=1e-4),
    modulate_case(2, 7, 6, "narrow, large mean", offset=1000.0),
    fused_case(2, 7, 384, "huge mean", offset=1e4),
    fused_case(2, 7, 768, "large mean", offset=100.0),
]
SMALL = [make(2, 5, 19) for make in (modulate_case, gated_case, fused_case)]
EMPTY = [
    make(*shape) for shape in [(0, 5, 8), (2, 0, 8), (2, 5, 0)] for make in (modulate_case, gated_case, fused_case)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(case, dtype)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_any_strides_and_alignment(case):
    harness.assert_any_strides(case)


@pytest.mark.parametrize("case", CASES[:6], ids=str)
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


@pytest.mark.parametrize("case", EMPTY, ids=str)
def test_empty_inputs_keep_shape_and_autograd(case):
    args = harness.inputs(case, torch.float32, requires_grad=True)
    values, gradients = harness.run(case.op, case, args)
    assert all(v.shape == args[0].shape for v in values)
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, args, strict=True))


def test_constant_rows_give_the_shift():
    x, shift, scale = torch.full((2, 3, 100), 7.25), torch.randn(2, 100), torch.randn(2, 100)
    out = ops.layer_norm_modulate(x, shift, scale)
    torch.testing.assert_close(out, shift[:, None].expand_as(x), rtol=0, atol=1e-6)


@pytest.mark.parametrize("branch", [torch.bfloat16, torch.float16])
def test_float32_residual_takes_a_branch_of_halves(branch):
    g = torch.Generator().manual_seed(0)
    x = randn(g, 2, 9, 40).float().requires_grad_()
    y = randn(g, 2, 9, 40).to(branch).requires_grad_()
    gate, shift, scale = (randn(g, 2, 40).to(branch).requires_grad_() for _ in range(3))
    residual, out = ops.gated_residual_layer_norm_modulate(x, y, gate, shift, scale)
    wide = [t.detach().double().requires_grad_() for t in (x, y, gate, shift, scale)]
    right_residual, right_out = reference.gated_residual_layer_norm_modulate(*wide)
    assert residual.dtype == out.dtype == torch.float32
    torch.testing.assert_close(residual.double(), right_residual, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out.double(), right_out, rtol=1e-5, atol=1e-5)
    (residual.sum() + (out * out).sum()).backward()
    (right_residual.sum() + (right_out * right_out).sum()).backward()
    for t, w in zip((x, y, gate, shift, scale), wide, strict=True):
        assert t.grad.dtype == t.dtype
        bound = 2 * torch.finfo(t.dtype).eps * w.grad.abs().max().item() + 1e-4
        torch.testing.assert_close(t.grad.double(), w.grad, rtol=0, atol=bound)


def test_autocast_keeps_the_dtype_of_the_residual():
    x, y = torch.randn(2, 5, 16), torch.randn(2, 5, 16, dtype=torch.bfloat16)
    gate = torch.randn(2, 16, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.gated_residual(x, y, gate).dtype == torch.float32


def test_opcheck():
    g = torch.Generator().manual_seed(0)
    x, y = randn(g, 2, 5, 19).float(), randn(g, 2, 5, 19).float()
    gate, shift, scale = (randn(g, 2, 19).float() for _ in range(3))
    out, mean, rstd = library.layer_norm_modulate_fwd_save(x, shift, scale, 1e-6)
    calls = {
        "layer_norm_modulate_fwd": (x, shift, scale, 1e-6),
        "layer_norm_modulate_fwd_save": (x, shift, scale, 1e-6),
        "layer_norm_modulate_bwd": (out, x, scale, mean, rstd),
        "gated_residual_fwd": (x, y, gate),
        "gated_residual_bwd": (x, y, gate),
        "gated_residual_layer_norm_modulate_fwd": (x, y, gate, shift, scale, 1e-6),
        "gated_residual_layer_norm_modulate_fwd_save": (x, y, gate, shift, scale, 1e-6),
        "gated_residual_layer_norm_modulate_bwd": (x, out, x, y, gate, scale, mean, rstd),
    }
    for name, args in calls.items():
        torch.library.opcheck(getattr(library, name).default, args)


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(x=torch.zeros(3, 8)), RuntimeError, r"x: expected 3 dimensions \(B, T, D\), got shape \(3, 8\)"),
        (dict(x=torch.zeros(2, 3, 8, dtype=torch.int64)), TypeError, "x: expected float32.*got int64"),
        (dict(x=[1.0]), TypeError, "x: expected a tensor, got list"),
        (dict(shift=torch.zeros(2, 9)), RuntimeError, r"shift: expected shape \(2, 8\), got \(2, 9\)"),
        (dict(scale=torch.zeros(3, 8)), RuntimeError, r"scale: expected shape \(2, 8\), got \(3, 8\)"),
        (dict(gate=torch.zeros(2, 8, dtype=torch.float64)), TypeError, "gate: expected the dtype of x.*got float64"),
        (dict(y=torch.zeros(2, 4, 8)), RuntimeError, r"y: expected shape \(2, 3, 8\), got \(2, 4, 8\)"),
        (dict(y=torch.zeros(2, 3, 8, dtype=torch.float64)), RuntimeError, "y: expected the dtype of x.*got float64"),
        (
            dict(shift=torch.zeros(2, 8, device="meta")),
            RuntimeError,
            r"shift: expected the device of x \(cpu\), got meta",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message):
    good = dict(x=torch.zeros(2, 3, 8), y=torch.zeros(2, 3, 8))
    good |= {name: torch.zeros(2, 8) for name in ("gate", "shift", "scale")}
    with pytest.raises(error, match=message):
        ops.gated_residual_layer_norm_modulate(**(good | change))


@pytest.mark.parametrize("dtype", harness.LOW_DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 384])
def test_a_row_whose_variance_lies_in_few_channels(width, dtype):
    """The worst that a mean guessed from some of the channels can meet: all large values among them, or none."""

    def make(g):
        x = randn(g, 2, 6, width, scale=0.01)
        x[:, ::2, : width // 8] += 1000
        x[:, 1::2, width // 8 : width // 4] += 1000
        return x, randn(g, 2, width), randn(g, 2, width)

    case = Case("few channels", ops.layer_norm_modulate, reference.layer_norm_modulate, make)
    harness.assert_error_rule(case, dtype)


def test_results_streamed_past_the_cache():
    """With no cache to fill every result is streamed that can be; the other tests hold all the same."""
    expression = "error_rule or threads or float32_residual"
    harness.assert_in_own_process(__file__, expression, CONVDIT_CACHE_BYTES="0")


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_gate_in_halves_is_what_it_is_in_float(dtype):
    """The kernels take it as it is, with gaps or without; its gradient has its dtype."""
    x, y = (torch.randn(2, 37, 41).to(dtype).requires_grad_() for _ in range(2))
    rows = torch.randn(2, 3, 41).to(dtype)
    grad = torch.randn(2, 37, 41).to(dtype)
    for gate in (rows[:, 1], rows[:, 1].contiguous()):
        narrow, wide = gate.detach().requires_grad_(), gate.float().requires_grad_()
        results = [ops.gated_residual(x, y, g) for g in (narrow, wide)]
        assert torch.equal(*results)
        (grad_y, grad_gate), (wide_y, wide_gate) = (
            torch.autograd.grad(r, (y, g), grad) for r, g in zip(results, (narrow, wide), strict=True)
        )
        assert torch.equal(grad_y, wide_y) and grad_gate.dtype == dtype
        assert torch.equal(grad_gate, wide_gate.to(dtype))
        with torch.no_grad():
            assert torch.equal(ops.gated_residual(x, y, gate), results[0])
