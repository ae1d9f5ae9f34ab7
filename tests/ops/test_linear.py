"""linear: right at every size and layout, differentiable, and our own product where this machine takes it."""

import sys
from dataclasses import replace

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import convdit
from convdit.nn import Linear
from tests.ops import harness
from tests.ops.harness import Case, randn

library, module = torch.ops.convdit, sys.modules["convdit.ops.linear"]


@pytest.fixture(autouse=True)
def take_every_size(monkeypatch):
    monkeypatch.setattr(module, "HERE", True)
    monkeypatch.setattr(module, "FEWEST", 1)


def linear_case(rows, k, n, bias=True, **x):
    def make(g):
        rows_of_x = rows if isinstance(rows, tuple) else (rows,)
        values = randn(g, *rows_of_x, k, **x), randn(g, n, k) / max(k, 1) ** 0.5
        return (*values, randn(g, n)) if bias else values

    return Case(f"linear {rows} x {k} to {n}{'' if bias else ', no bias'}", module.linear, F.linear, make)


# One row, one column, one term; tiles and panels of every remainder; sums of several parts, of sections side by side in
# the forward and in the weight's gradient; several blocks of rows; too few values to be worth the way to PyTorch.
CASES = [
    linear_case(1, 300, 300),
    linear_case(300, 300, 1),
    linear_case(300, 1, 300),
    linear_case((2, 7, 5), 33, 47),
    linear_case((3, 49), 96, 384, bias=False),
    linear_case(113, 385, 33),
    linear_case(15, 1700, 31),
    linear_case(33, 270, 2500),
    linear_case(500, 40, 160),
    linear_case(29, 64, 40, offset=30.0),
    linear_case(20, 3100, 40),
    linear_case(3301, 24, 40),
    linear_case(1601, 70, 300),
    linear_case((3, 5), 20, 30),
    linear_case(2, 3, 5),
]
EMPTY = [linear_case(0, 5, 7), linear_case((2, 0), 5, 7), linear_case(4, 5, 0)]


@pytest.mark.parametrize("case", CASES + EMPTY, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_error_rule(case, dtype):
    harness.assert_error_rule(case, dtype)


@pytest.mark.parametrize("case", [linear_case((2, 3), 5, 7), linear_case(4, 5, 7, bias=False)], ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


def layouts(*shape):
    """Such a matrix with unit strides along one axis, along the other, along none, and not where vectors start."""
    x = torch.randn(shape)
    yield x
    yield x.t().contiguous().t()
    yield torch.stack((x, torch.full_like(x, torch.nan)), -1)[..., 0]
    yield torch.cat((torch.full((1,), torch.nan), x.flatten()))[1:].view(shape)


@pytest.mark.parametrize("sizes", [(70, 50, 40), (130, 400, 33)], ids=str)
def test_any_strides_and_alignment(sizes):
    m, k, n = sizes
    for x, weight, grad in zip(layouts(m, k), layouts(n, k), layouts(m, n), strict=True):
        for turned in (False, True):
            w = next(v for v in layouts(n, k)) if turned else weight
            torch.testing.assert_close(library.linear_fwd(x, w, None), F.linear(x, w), rtol=1e-4, atol=1e-4)
            grads = library.linear_bwd(grad, x, w, True, True)
            for got, right in zip(grads, (grad @ w, grad.t() @ x), strict=True):
                torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)


def test_only_wanted_gradients_are_computed():
    x, weight, grad = torch.randn(70, 50), torch.randn(40, 50), torch.randn(70, 40)
    for wanted in ((True, False), (False, True), (False, False)):
        sizes = [g.numel() for g in library.linear_bwd(grad, x, weight, *wanted)]
        assert sizes == [t.numel() * w for t, w in zip((x, weight), wanted, strict=True)]


@pytest.mark.parametrize("case", [linear_case(300, 400, 70), linear_case(3301, 24, 40)], ids=str)
def test_repeats_for_any_number_of_threads(case):
    # PyTorch's product, where this machine takes that, may have other bits with more threads.
    assert not harness.depends_on_threads(case) or harness.depends_on_threads(replace(case, op=F.linear))


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_what_is_not_a_number_stays_in_its_row(value):
    x, weight = torch.randn(60, 50), torch.randn(40, 50)
    right = library.linear_fwd(x, weight, None)
    x[7, 3] = value
    got = library.linear_fwd(x, weight, None)
    assert not got[7].isfinite().any()
    got[7] = right[7]
    assert torch.equal(got, right)


@pytest.mark.parametrize("bias", [True, False])
def test_opcheck_and_vmap(bias):
    case = linear_case((2, 9), 60, 70, bias=bias)
    x, weight, *b = harness.inputs(case, torch.float32)
    b = b[0] if b else None
    torch.library.opcheck(library.linear_fwd.default, (x, weight, b))
    torch.library.opcheck(library.linear_bwd.default, (torch.randn(2, 9, 70), x, weight, True, bias))
    harness.assert_vmap_equals_loop(case)


def test_compiles_once_for_all_sizes_and_counts_its_work():
    torch._dynamo.reset()
    layer = Linear(60, 70)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    for n in (2, 30, 50):
        x = torch.randn(n, 60, requires_grad=True)
        got = torch.autograd.grad(compiled(x).square().sum(), [x, *layer.parameters()])
        right = torch.autograd.grad(F.linear(x, layer.weight, layer.bias).square().sum(), [x, *layer.parameters()])
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1
    with torch.utils.flop_counter.FlopCounterMode(display=False) as flops:
        layer(x).sum().backward()
    assert flops.get_total_flops() == 3 * 2 * 50 * 60 * 70


def test_exports_as_a_plain_operator():
    program = torch.export.export(Linear(60, 70), (torch.randn(50, 60),))
    assert "convdit" not in str(program.graph) and "aten.linear" in str(program.graph)


def test_autocast_is_pytorchs():
    with torch.autocast("cpu", torch.bfloat16):
        assert Linear(60, 70)(torch.randn(50, 60)).dtype == torch.bfloat16


def test_bad_arguments_are_named():
    x, weight = torch.randn(2, 3), torch.randn(5, 3)
    for given, message in (
        ((x, x[0], None), r"weight: expected 2 dimensions \(N, K\), got shape \(3\)"),
        ((x, weight.t(), None), r"weight: expected shape \(3, 3\), got \(3, 5\)"),
        ((x, weight.double(), None), "weight: expected dtype float32, got float64"),
        ((x, weight, x[0]), r"bias: expected shape \(5\), got \(3\)"),
        ((x[0, 0], weight, None), r"x: expected at least 1 dimension, got shape \(\)"),
    ):
        with pytest.raises(RuntimeError, match=message):
            library.linear_fwd(*given)
    for grad, shape in ((x, r"\(2, 3\)"), (torch.randn(5, 2), r"\(5, 2\)")):  # the second has as many values
        with pytest.raises(RuntimeError, match=f"grad: expected the shape of the result, got {shape}"):
            library.linear_bwd(grad, x, weight, True, True)


def qkv_arguments(sizes=(8, 8, 8), bias=True, rows=(3, 5), k=12):
    layers = [(torch.randn(n, k), torch.randn(n) if bias else None) for n in sizes]
    return [torch.randn(*rows, k), *(t for layer in layers for t in layer)]


@pytest.mark.parametrize("sizes", [(40, 40, 40), (33, 5, 1), (0, 8, 8)], ids=str)
@pytest.mark.parametrize("rows", [(3, 50), (1,), (0, 7)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_packed_qkv_is_three_linears_side_by_side(sizes, rows, dtype):
    for bias in (False, True):
        x, *layers = (t if t is None else t.to(dtype) for t in qkv_arguments(sizes, bias, rows, 70))
        right = torch.cat([F.linear(x, w, b) for w, b in zip(layers[::2], layers[1::2], strict=True)], -1)
        parameters = [t if t is None else t.clone().requires_grad_() for t in layers]
        tolerance = 1e-2 if dtype == torch.bfloat16 else 1e-4
        for given in (x, harness.strided(x)):
            with torch.no_grad():
                out = library.packed_qkv(given, *parameters)
            assert out.is_contiguous()
            torch.testing.assert_close(out, right, rtol=tolerance, atol=tolerance)


def test_packed_qkv_is_known_to_pytorch():
    for bias in (False, True):
        torch.library.opcheck(library.packed_qkv.default, qkv_arguments(bias=bias))
    with FlopCounterMode(display=False) as counter:
        library.packed_qkv(*qkv_arguments())
    assert counter.get_total_flops() == 2 * 15 * 12 * 24


@pytest.mark.parametrize(
    "change, message",
    [
        ({0: torch.zeros(3, 5, 4)}, r"weight: expected shape \(8, 4\), got \(8, 12\)"),
        ({3: torch.zeros(8, 12).double()}, "weight: expected dtype float32, got float64"),
        ({6: torch.zeros(7)}, r"bias: expected shape \(8\), got \(7\)"),
    ],
)
def test_packed_qkv_names_bad_arguments(change, message):
    with pytest.raises(RuntimeError, match=message):
        library.packed_qkv(*(change.get(i, t) for i, t in enumerate(qkv_arguments())))


def test_every_level():
    harness.assert_every_cpu_level(__file__, "error_rule or strides", CONVDIT_PRODUCTS="convdit")


def test_every_other_product():
    """The tests above are of the one that this machine takes."""
    other = "pytorch" if convdit.build_info()["cpu_products"] == "convdit" else "convdit"
    harness.assert_in_own_process(__file__, "not every", CONVDIT_PRODUCTS=other)
