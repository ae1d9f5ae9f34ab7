"""convnext_block, with gradients and without: few images at a time either way."""

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from convdit import ops, reference
from tests.ops import harness
from tests.ops.harness import Case, randn

library = torch.ops.convdit
block_module = importlib.import_module("convdit.ops.convnext_block")
NAMES = (
    "dwconv_weight dwconv_bias norm_weight norm_bias pwconv1_weight pwconv1_bias"
    " grn_weight grn_bias pwconv2_weight pwconv2_bias"
).split()
BIASES = ("dwconv_bias", "pwconv1_bias", "pwconv2_bias")


def parameters(g, channels, kernel=7, hidden=None, bias=True):
    """Drawn so that every part of the block matters; at initialisation GRN would be the identity."""
    hidden = 4 * channels if hidden is None else hidden
    values = [
        randn(g, channels, 1, kernel, kernel, scale=1 / kernel),
        randn(g, channels),
        randn(g, channels),
        randn(g, channels),
        randn(g, hidden, channels, scale=max(channels, 1) ** -0.5),
        randn(g, hidden),
        randn(g, hidden),
        randn(g, hidden),
        randn(g, channels, hidden, scale=max(hidden, 1) ** -0.5),
        randn(g, channels),
    ]
    return [None if name in BIASES and not bias else v for name, v in zip(NAMES, values, strict=True)]


def block_case(*shape, label="", change=None, offset=0.0, **p):
    def make(g):
        x = randn(g, *shape, offset=offset)
        return change(x) if change else x, *parameters(g, shape[-1], **p)

    name = f"convnext_block {'x'.join(map(str, shape))} {label}"
    return Case(name, ops.convnext_block, reference.convnext_block, make)


def dead_hidden_channels(g, *shape):
    """Every third hidden channel is zero at every site: its norm is zero, and so is that norm's gradient."""
    x, *rest = block_case(*shape).make(g)
    named = dict(zip(NAMES, rest, strict=True))
    named["pwconv1_weight"][::3] = 0
    named["pwconv1_bias"][::3] = 0
    return x, *named.values()


def without_gradients(case):
    """The same case on the operator that runs where nothing requires a gradient."""
    return tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in harness.inputs(case, torch.float64))


CASES = [
    block_case(2, 9, 8, 13, label="scaled in place"),
    block_case(3, 30, 29, 20, label="folded, image by image"),
    block_case(5, 20, 19, 16, label="three parts of two, two and one"),
    block_case(3, 21, 20, 9, label="backward in two parts", hidden=1500, kernel=3),
    block_case(1, 3, 1, 40, label="one narrow map"),
    block_case(2, 1, 1, 24, label="one site"),
    block_case(2, 6, 5, 8, label="no biases", bias=False),
    block_case(2, 6, 5, 8, label="5x5, twice as wide", kernel=5, hidden=16),
    block_case(2, 30, 31, 24, label="constant maps", change=lambda x: x[:, :1, :1].expand_as(x).clone()),
    block_case(2, 6, 5, 16, label="large mean", offset=30.0),
    Case(
        "convnext_block dead hidden channels",
        ops.convnext_block,
        reference.convnext_block,
        lambda g: dead_hidden_channels(g, 3, 6, 5, 8),
    ),
]
SMALL = block_case(2, 4, 5, 6, kernel=3)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_reference_in_float64(case):
    harness.assert_equals_reference(case)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients_equals_reference_in_float64(case):
    args = without_gradients(case)
    torch.testing.assert_close(case.op(*args), case.reference(*args), rtol=1e-9, atol=1e-10)


# Halves are computed in float32 where the CPU has no products of halves: the rule must hold either way.
PRODUCTS = [(torch.float32, ()), *((d, w) for d in (torch.bfloat16, torch.float16) for w in ((), (d,)))]
each_product = pytest.mark.parametrize("dtype, widened", PRODUCTS, ids=lambda v: str(v).replace("torch.", ""))


@each_product
@pytest.mark.parametrize("case", CASES, ids=str)
def test_error_rule(case, dtype, widened, monkeypatch):
    monkeypatch.setattr(block_module, "_WIDENED", widened)
    harness.assert_error_rule(case, dtype, whole_gradients=True)


@each_product
@pytest.mark.parametrize("case", CASES, ids=str)
def test_without_gradients_error_rule(case, dtype, widened, monkeypatch):
    monkeypatch.setattr(block_module, "_WIDENED", widened)
    low = harness.inputs(case, dtype)
    exact = tuple(a.double() if isinstance(a, torch.Tensor) else a for a in low)
    ours = case.op(*low)
    assert ours.dtype == dtype
    harness.assert_rows_close(ours, case.reference(*low), case.reference(*exact), dtype, f"{case}, {dtype}")


@pytest.mark.parametrize("case", [SMALL, CASES[2], CASES[-1]], ids=str)
def test_gradcheck(case):
    harness.assert_gradcheck(case)


FROZEN = [
    ("pwconv1_weight", "pwconv2_weight"),
    ("x", "dwconv_weight", "dwconv_bias", "norm_weight", "norm_bias"),
    ("x",),
]


@pytest.mark.parametrize("frozen", [*FROZEN, NAMES, ("x", *NAMES[:-1])], ids=lambda v: f"{v[0]}_{len(v)}")
def test_gradients_only_where_asked(frozen):
    names = ("x", *NAMES)
    right = harness.run(SMALL.op, SMALL, harness.inputs(SMALL, torch.float32, requires_grad=True))[1]
    args = harness.inputs(SMALL, torch.float32)
    for name, a in zip(names, args, strict=True):
        a.requires_grad_(name not in frozen)
    value = ops.convnext_block(*args)
    value.backward(harness._cotangents((value,))[0].to(value.dtype))
    for name, a, expected in zip(names, args, right, strict=True):
        if name in frozen:
            assert a.grad is None
        else:
            assert torch.equal(a.grad, expected), name


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (False,) * 3])
def test_backward_skips_the_products_that_nobody_needs(needed):
    *given, _, _, _ = backward_arguments()
    full, some = library.convnext_mlp_bwd(*given, True, True, True), library.convnext_mlp_bwd(*given, *needed)
    for i, (a, b) in enumerate(zip(full, some, strict=True)):
        wanted = {0: needed[0], 1: needed[1], 5: needed[2]}.get(i, True)
        assert torch.equal(b, a) if wanted else b.numel() == 0


def backward_arguments(case=SMALL, dtype=torch.float32):
    x, *rest = harness.inputs(case, dtype)
    u = torch.randn_like(x)
    _, hidden, norm = library.convnext_mlp_fwd(x, u, *rest[4:], 1e-6)
    return torch.randn_like(u), u, hidden, norm, *rest[4:9], 1e-6, True, True, True


@pytest.mark.parametrize("change", [harness.strided, harness.permuted], ids=lambda f: f.__name__)
def test_any_strides_and_alignment(change):
    args = harness.inputs(SMALL, torch.float32)
    moved = [change(a) for a in args]
    assert torch.equal(ops.convnext_block(*moved), ops.convnext_block(*args))
    # With gradients the matrix products are PyTorch's own, which may sum strided factors in another order.
    leaves, moved = ([a.requires_grad_() for a in them] for them in (args, moved))
    expected, got = (harness.run(SMALL.op, SMALL, tuple(them)) for them in (leaves, moved))
    for g, e in zip([*got[0], *got[1]], [*expected[0], *expected[1]], strict=True):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
def test_repeats_bitwise(case, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        args, leaves = harness.inputs(case, torch.float32), harness.inputs(case, torch.float32, requires_grad=True)
        assert torch.equal(case.op(*args), case.op(*args))
        (value, gradients), (other, others) = (harness.run(case.op, case, leaves) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip([*value, *gradients], [*other, *others], strict=True))
    finally:
        torch.set_num_threads(before)


# Large enough for each thread to take images through by itself: one at a time, folded; several; an odd number; in the
# backward one sum a thread or sums of several parts.
SHARED = [
    block_case(8, 30, 29, 12, label="folded"),
    block_case(8, 14, 13, 20, label="several images a part"),
    block_case(9, 16, 16, 24, label="odd"),
    block_case(8, 21, 20, 9, label="several parts a thread", hidden=1000, kernel=3),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", SHARED, ids=str)
def test_threads_that_share_out_images_equal_one(case, dtype):
    before = torch.get_num_threads()
    results = []
    args, leaves = harness.inputs(case, dtype), harness.inputs(case, dtype, requires_grad=True)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with torch.no_grad():
                inference = case.op(*args)
                assert torch.equal(inference, case.op(*args))
            (value, gradients), (other, others) = (harness.run(case.op, case, leaves) for _ in range(2))
            assert all(torch.equal(a, b) for a, b in zip([*value, *gradients], [*other, *others], strict=True))
            results.append([inference, *value, *gradients])
    finally:
        torch.set_num_threads(before)
    rounding = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 2e-2}[dtype]
    for got in results[1:]:
        for g, e in zip(got, results[0], strict=True):
            torch.testing.assert_close(g, e, rtol=0, atol=rounding * e.abs().max().item())


def test_compiles_without_a_graph_break():
    harness.assert_compiles(SMALL)
    args = harness.inputs(SMALL, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(ops.convnext_block, fullgraph=True)
    torch.testing.assert_close(compiled(*args), ops.convnext_block(*args))


def test_exports():
    harness.assert_exports(SMALL)


def test_vmap_equals_loop():
    harness.assert_vmap_equals_loop(SMALL)


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 4, 0)], ids=str)
def test_empty_maps_keep_shape_and_autograd(shape):
    case = block_case(*shape)
    args = harness.inputs(case, torch.float32, requires_grad=True)
    (value,), gradients = harness.run(case.op, case, args)
    assert value.shape == shape
    assert all(g.shape == a.shape and not g.any() for g, a in zip(gradients, args, strict=True))
    assert ops.convnext_block(*harness.inputs(case, torch.float32)).shape == shape


@pytest.mark.parametrize("case", [CASES[0], CASES[2]], ids=str)
def test_images_do_not_mix(case):
    x, *rest = without_gradients(case)
    together = case.op(x, *rest)
    for i in range(x.shape[0]):
        torch.testing.assert_close(together[i : i + 1], case.op(x[i : i + 1], *rest), rtol=1e-9, atol=1e-10)


def test_needs_no_hidden_tensor_of_the_batch():
    x, *rest = (a.float() for a in without_gradients(block_case(16, 32, 32, 16)))
    hidden = x.numel() * 4 * 4
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.convnext_block(x, *rest)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest < hidden / 2


def bytes_saved_for_backward(function, args):
    saved = {}

    def pack(t):
        saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function(*args)
    return sum(saved.values())


def test_keeps_one_hidden_tensor_for_the_backward():
    case = block_case(4, 16, 16, 32)
    args = harness.inputs(case, torch.float32, requires_grad=True)
    map_bytes, parameter_bytes = args[0].nbytes, sum(a.nbytes for a in args[1:])
    saved = bytes_saved_for_backward(case.op, args)
    # x, the convolution's output, the normalised map, four maps for the hidden tensor; statistics and norms are small.
    assert 4 * map_bytes < saved < 7.2 * map_bytes + parameter_bytes
    assert saved < bytes_saved_for_backward(case.reference, args) / 2


def test_weights_that_require_gradients_run_under_no_grad():
    x, *rest = harness.inputs(SMALL, torch.float32, requires_grad=True)
    with torch.no_grad():
        out = ops.convnext_block(x, *rest)
    assert not out.requires_grad
    torch.testing.assert_close(out, ops.convnext_block(x, *rest).detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_casts_the_branch_and_keeps_the_residual(grad):
    x, *rest = (a.float().requires_grad_(grad) for a in without_gradients(CASES[1]))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.convnext_block(x, *rest)
    assert out.dtype == torch.float32
    branch = out - x
    right = reference.convnext_block(x, *rest) - x
    assert (branch - right).norm() < 0.02 * right.norm()
    # A residual that had been rounded to bfloat16 would differ from x by more than this where the branch is zero.
    rest[-1], rest[-2] = torch.zeros_like(rest[-1]), torch.zeros_like(rest[-2])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ops.convnext_block(x, *rest), x)


@pytest.mark.parametrize("grad", [False, True])
def test_autocast_of_the_other_half_keeps_the_dtype_of_x(grad):
    x, *rest = (a.half().requires_grad_(grad) for a in without_gradients(CASES[0]))
    with torch.autocast("cpu", torch.bfloat16):
        out = ops.convnext_block(x, *rest)
    assert out.dtype == torch.float16
    right = reference.convnext_block(x.float(), *(a.float() for a in rest))
    assert (out - right).norm() < 0.03 * right.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("grad", [False, True])
def test_halves_take_float32_parameters(dtype, grad):
    x, *rest = (a.float() for a in without_gradients(CASES[0]))
    x = x.to(dtype).requires_grad_(grad)
    out = ops.convnext_block(x, *rest)
    assert out.dtype == dtype
    right = reference.convnext_block(x.float(), *rest)
    assert (out - right).norm() < 8 * torch.finfo(dtype).eps * right.norm()


def test_opcheck():
    args = harness.inputs(SMALL, torch.float32)
    torch.library.opcheck(library.convnext_block_fwd.default, (*args, 1e-6))
    none = [None if name in BIASES else a for name, a in zip(NAMES, args[1:], strict=True)]
    torch.library.opcheck(library.convnext_block_fwd.default, (args[0], *none, 1e-6))
    torch.library.opcheck(library.convnext_mlp_fwd.default, (args[0], args[0] + 1, *args[5:], 1e-6))
    torch.library.opcheck(library.convnext_mlp_bwd.default, backward_arguments())
    torch.library.opcheck(library.convnext_mlp_bwd.default, (*backward_arguments()[:-3], False, False, False))


def test_flops_are_the_same_with_and_without_gradients():
    args = harness.inputs(SMALL, torch.float32)
    counts = []
    for grad in (False, True):
        with FlopCounterMode(display=False) as counter:
            ops.convnext_block(args[0].clone().requires_grad_(grad), *args[1:])
        counts.append(counter.get_total_flops())
    n, h, w, c = args[0].shape
    assert counts == [2 * n * h * w * (c * 3 * 3 + 2 * c * 4 * c)] * 2


BAD = [
    ("x", lambda t: t[0], ValueError, r"x: expected shape \(N, H, W, C\), got \(4, 5, 6\)"),
    ("x", lambda t: t.long(), TypeError, "x: expected float32.*got int64"),
    ("dwconv_weight", lambda t: t[:, 0], ValueError, r"dwconv_weight: expected shape \(6, 1, K, K\), got \(6, 3, 3\)"),
    (
        "dwconv_weight",
        lambda t: t[..., :2],
        ValueError,
        r"dwconv_weight: expected shape \(6, 1, K, K\), got \(6, 1, 3, 2\)",
    ),
    ("dwconv_weight", lambda t: t[..., :2, :2], Exception, "weight: expected an odd kernel size.*got 2"),
    ("norm_bias", lambda t: None, TypeError, "norm_bias: expected a tensor, got NoneType"),
    ("norm_weight", lambda t: t.double(), TypeError, r"norm_weight: expected the dtype of x \(float32\), got float64"),
    ("pwconv1_weight", lambda t: t.T, ValueError, r"pwconv1_weight: expected shape \(D, 6\), got \(6, 24\)"),
    ("pwconv1_bias", lambda t: t[1:], ValueError, r"pwconv1_bias: expected shape \(24\), got \(23,\)"),
    ("grn_weight", lambda t: t.view(1, 1, 1, -1), ValueError, r"grn_weight: expected shape \(24\)"),
    ("pwconv2_weight", lambda t: t[:, 1:], ValueError, r"pwconv2_weight: expected shape \(6, 24\), got \(6, 23\)"),
    ("pwconv2_bias", lambda t: t.to("meta"), ValueError, r"pwconv2_bias: expected the device of x \(cpu\), got meta"),
]


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name, change, error, message", BAD, ids=lambda v: v if isinstance(v, str) else "")
def test_bad_arguments_are_named(name, change, error, message, grad):
    args = dict(zip(("x", *NAMES), harness.inputs(SMALL, torch.float32, requires_grad=grad), strict=True))
    args[name] = change(args[name])
    with pytest.raises(error, match=message):
        ops.convnext_block(**args)


def test_eager_autograd_sees_no_output_that_only_the_backward_uses():
    out = ops.convnext_block(*harness.inputs(SMALL, torch.float32, requires_grad=True))
    assert len(out.grad_fn._input_metadata) == 1


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_parameter_on_meta_is_refused(name, grad):
    args = dict(zip(("x", *NAMES), harness.inputs(SMALL, torch.float32, requires_grad=grad), strict=True))
    with pytest.raises(ValueError, match=rf"{name}: expected the device of x \(cpu\), got meta"):
        ops.convnext_block(**args | {name: args[name].to("meta")})


def test_every_cpu_level():
    harness.assert_every_cpu_level(__file__, "equals_reference or error_rule")
