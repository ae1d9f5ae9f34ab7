"""gelu_tanh: right everywhere on the line, differentiable, and at home in PyTorch."""

import pytest
import torch
import torch.nn.functional as F

from convdit import ops, reference
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit


def gelu_case(*shape, label="", bias=False, **x):
    def make(g):
        value = randn(g, *shape, **x) if shape else randn(g, 1, **x)[0]
        return (value, randn(g, shape[-1])) if bias else (value,)

    label = f"gelu_tanh {'x'.join(map(str, shape))} {label}{' bias' if bias else ''}"
    return Case(label, ops.gelu_tanh, reference.gelu_tanh, make)


SHAPES = [(2, 5, 7, 13), (3, 100), (17,), (1, 3, 1, 1536), (2, 40000), (3, 0, 5), (2, 3, 1)]
CASES = [gelu_case(*shape, bias=bias) for shape in SHAPES for bias in (False, True)] + [gelu_case()]
CASES += [
    gelu_case(4, 33, label="large", scale=100.0),
    gelu_case(4, 33, label="small", scale=1e-4),
    gelu_case(4, 33, label="far below zero", scale=0.5, offset=-5.0),
    gelu_case(4, 33, label="far above zero", scale=0.5, offset=5.0),
]
SMALL = [gelu_case(), *(gelu_case(3, 5, 7, bias=bias) for bias in (False, True)), gelu_case(17, bias=True)]


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_ends_of_the_line(dtype):
    """Zero and the identity from where they round to that; no NaN for a finite value."""
    most = torch.finfo(dtype).max
    x = torch.tensor([-most, -most / 2, -1e4, -100, 0, 100, 1e4, most / 2, most, torch.inf, torch.nan], dtype=dtype)
    x = x.repeat(3).requires_grad_()
    y = ops.gelu_tanh(x)
    (grad,) = torch.autograd.grad(y.sum(), x)
    finite = x.isfinite()
    assert torch.equal(y[finite], torch.where(x > 0, x, 0)[finite])
    torch.testing.assert_close(grad[finite], torch.where(x > 0, 1.0, torch.where(x < 0, 0.0, 0.5)).to(dtype)[finite])
    assert torch.equal(y == torch.inf, x == torch.inf) and torch.equal(y.isnan(), x.isnan())
    assert torch.equal(grad.isnan(), x.isnan())


def test_relative_error_of_small_results():
    """Where 1 + tanh cancels PyTorch keeps no digit of float32; a logistic function keeps nearly all."""
    x = torch.linspace(-8, -2, 1001)
    wide = x.double()
    exact = wide / (1 + torch.exp(-2 * (2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide**3)))
    assert float(((ops.gelu_tanh(x).double() - exact) / exact).abs().max()) < 2e-5


@pytest.mark.parametrize("case", CASES, ids=str)
def test_vmap_equals_loop(case):
    harness.assert_vmap_equals_loop(case)


@pytest.mark.parametrize("axes", [(0, None, None), (None, 0, None), (1, 2, None), (0, 0, 0), (None, None, 0)], ids=str)
def test_vmap_over_other_axes(axes):
    """Sizes are those of (grad, x, bias), with 4 where the mapped axis is."""
    shapes = [[2, 5], [2, 5], [5]]
    for shape, axis in zip(shapes, axes, strict=True):
        if axis is not None:
            shape.insert(axis, 4)
    given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    rows = [[t if a is None else t.select(a, k) for t, a in zip(given, axes, strict=True)] for k in range(4)]
    got = torch.vmap(library.gelu_tanh_bwd, in_dims=axes)(*given)
    torch.testing.assert_close(got, torch.stack([library.gelu_tanh_bwd(*row) for row in rows]))
    if axes[1:] != (None, None):
        got = torch.vmap(library.gelu_tanh_fwd, in_dims=axes[1:])(*given[1:])
        torch.testing.assert_close(got, torch.stack([library.gelu_tanh_fwd(*row[1:]) for row in rows]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    grad, x = torch.randn(2, 3, 21).to(dtype), torch.randn(2, 3, 21).to(dtype)
    for bias in (None, torch.randn(21)):
        torch.library.opcheck(library.gelu_tanh_fwd.default, (x, bias))
        torch.library.opcheck(library.gelu_tanh_.default, (x.clone(), bias))
        torch.library.opcheck(library.gelu_tanh_bwd.default, (grad, x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_overwrites_where_it_may_and_nothing_sees_it(dtype):
    x, bias = torch.randn(3, 5, 21).to(dtype), torch.randn(21)
    right = ops.gelu_tanh(x, bias)
    kept = x.clone()
    y = ops.gelu_tanh(x, bias, overwrite=True)
    assert y is x and torch.equal(y, right)
    # Not where autograd, a transform or a compiler looks on, and not in memory with gaps.
    ops.gelu_tanh(leaf := kept.clone().requires_grad_(), bias, overwrite=True)
    assert torch.equal(leaf, kept)
    torch.vmap(lambda row: ops.gelu_tanh(row, bias, overwrite=True))(again := kept.clone())
    torch.compile(lambda t: ops.gelu_tanh(t, bias, overwrite=True), backend="aot_eager")(again)
    ops.gelu_tanh(turned := kept.clone().transpose(0, 1), bias, overwrite=True)
    assert torch.equal(again, kept) and torch.equal(turned, kept.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_bias_in_halves_is_taken_as_it_is(dtype):
    x, bias = torch.randn(3, 5, 21).to(dtype), torch.randn(21).to(dtype)
    grad = torch.randn_like(x)
    leaves = [(x.clone().requires_grad_(), b.requires_grad_()) for b in (bias, bias.float())]
    narrow, wide = (ops.gelu_tanh(*pair) for pair in leaves)
    assert torch.equal(narrow, wide) and torch.equal(ops.gelu_tanh(x, bias.detach()), wide)
    assert [type(f).__name__ for f, _ in narrow.grad_fn.next_functions] == ["AccumulateGrad"] * 2  # none casts
    grads = [torch.autograd.grad(y, pair, grad) for y, pair in zip((narrow, wide), leaves, strict=True)]
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1].dtype == dtype and torch.equal(grads[0][1], grads[1][1].to(dtype))


def test_repeats_for_any_number_of_threads():
    harness.assert_repeats_for_any_threads(gelu_case(300, 500, bias=True))


def test_autocast_leaves_it():
    x = torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.gelu_tanh(x).dtype == torch.float32
        assert ops.gelu_tanh(x.bfloat16()).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="x: expected float32, float64, bfloat16 or float16, got int64"):
        ops.gelu_tanh(torch.arange(3))
    with pytest.raises(TypeError, match="x: expected a tensor, got list"):
        ops.gelu_tanh([1.0])
    x = torch.randn(2, 3)
    with pytest.raises(RuntimeError, match=r"grad: expected the shape of x, \(2, 3\), got \(3, 2\)"):
        library.gelu_tanh_bwd(x.t(), x, None)
    with pytest.raises(RuntimeError, match="grad: expected dtype float32, got float64"):
        library.gelu_tanh_bwd(x.double(), x, None)
    with pytest.raises(RuntimeError, match=r"bias: expected shape \(3\), got \(2\)"):
        ops.gelu_tanh(x, x[:, 0])
    with pytest.raises(RuntimeError, match=r"x: expected at least 1 dimension beside a bias, got shape \(\)"):
        ops.gelu_tanh(x[0, 0], x[0])
    with pytest.raises(TypeError, match="bias: expected the dtype of x"):
        ops.gelu_tanh(x, x[0].double())


def test_on_other_devices_it_is_pytorchs():
    x = torch.randn(2, 3, device="meta", requires_grad=True)
    y = ops.gelu_tanh(x)
    assert y.shape == x.shape and "Gelu" in type(y.grad_fn).__name__ and "Tanh" not in type(y.grad_fn).__name__
    assert torch.equal(reference.gelu_tanh(torch.ones(1)), F.gelu(torch.ones(1), approximate="tanh"))


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule or ends_of or relative_error")
