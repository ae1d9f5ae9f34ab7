"""PyTorch's features over every operator, from one table: compilers, exporters, transforms, tools, processes.

Over 400 lines because every feature reads that table.
"""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch
import torch._dynamo.testing
import torch.autograd.forward_ad as forward_ad
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import convdit
from convdit import ops, reference
from convdit.sparse import ActiveSites, random_patch_mask

from .harness import PACKAGE_ROOT

D, HIDDEN, H, W, TOKENS = 8, 24, 5, 6, 7
VECTOR, WIDE = (D,), (HIDDEN,)
CONV = {"weight": (D, 1, 3, 3), "bias": VECTOR}
NORM = {"ln_weight": VECTOR, "ln_bias": VECTOR}
AFFINE = {"weight": VECTOR, "bias": VECTOR}
BLOCK = {
    "dwconv_weight": (D, 1, 7, 7), "dwconv_bias": VECTOR, "norm_weight": VECTOR, "norm_bias": VECTOR,
    "pwconv1_weight": (HIDDEN, D), "pwconv1_bias": WIDE, "grn_weight": WIDE, "grn_bias": WIDE,
    "pwconv2_weight": (D, HIDDEN), "pwconv2_bias": VECTOR,
}  # fmt: skip
HALF_BLOCK = {"qkv_weight": (3 * D, D), "qkv_bias": (3 * D,), "proj_weight": (D, D), "proj_bias": VECTOR}
# operator: (shapes of one sample's inputs, shapes of parameters, other arguments); a map, tokens, or "M" visible sites
MAP, TOKEN, ROW = (H, W, D), (TOKENS, D), (D,)
TABLE = {
    "depthwise_conv2d": ({"x": MAP}, CONV, {}),
    "depthwise_conv2d_layer_norm": ({"x": MAP}, CONV | NORM, {}),
    "convnext_block": ({"x": MAP}, BLOCK, {}),
    "grn": ({"x": MAP}, AFFINE, {}),
    "gelu_grn": ({"x": MAP}, AFFINE, {}),
    "sparse_depthwise_conv2d": ({"features": "M"}, CONV, {}),
    "sparse_grn": ({"features": "M"}, AFFINE, {}),
    "sparse_gelu_grn": ({"features": "M"}, AFFINE, {"scope": "batch"}),
    "layer_norm_modulate": ({"x": TOKEN, "shift": ROW, "scale": ROW}, {}, {}),
    "gated_residual": ({"x": TOKEN, "y": TOKEN, "gate": ROW}, {}, {}),
    "gated_residual_layer_norm_modulate": (
        {"x": TOKEN, "y": TOKEN, "gate": ROW, "shift": ROW, "scale": ROW}, {}, {}),
    "gelu_tanh": ({"x": TOKEN}, {"bias": VECTOR}, {}),
    "packed_attention": ({"qkv": (TOKENS, 3 * D)}, {}, {"num_heads": 2}),
    "adaln_zero_attention": ({"x": TOKEN, "modulation": (3, D)}, HALF_BLOCK, {"num_heads": 2}),
}  # fmt: skip
NAMES = list(TABLE)
DENSE = [name for name in NAMES if "sparse" not in name]
SLOW = pytest.mark.slow


def mask_of(n):
    return random_patch_mask(n, (3, 4), 0.5, torch.Generator().manual_seed(n))


def sites_of(mask):
    return ActiveSites.from_patch_mask(mask, 2, visible_per_image=6)


class Layer(nn.Module):
    """An operator with its parameters."""

    def __init__(self, name, functions=ops, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.function, (_, shapes, self.options) = getattr(functions, name), TABLE[name]
        for key, shape in shapes.items():
            values = torch.randn(shape, generator=generator, dtype=torch.float64) / max(shape[1:], default=4) ** 0.5
            setattr(self, key, nn.Parameter(values.to(dtype)))

    def forward(self, *inputs):
        places = {"sites": sites_of(inputs[-1])} if inputs[-1].dtype == torch.bool else {}
        tensors = inputs[:-1] if places else inputs
        return self.function(*tensors, **dict(self.named_parameters()), **places, **self.options)


def inputs(name, n=2, dtype=torch.float32, requires_grad=False):
    """One tensor an entry of the table; then, for an operator of visible sites, the mask of n images."""
    generator, shapes = torch.Generator().manual_seed(n), TABLE[name][0].values()
    shapes = [(n * 24, D) if shape == "M" else (n, *shape) for shape in shapes]
    made = [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]
    return [t.requires_grad_(requires_grad) for t in made] + ([mask_of(n)] if "sparse" in name else [])


def floating(args):
    return [a for a in args if a.is_floating_point()]


def tuple_of(out):
    return out if isinstance(out, tuple) else (out,)


def loss(out):
    return sum((o.float() * torch.linspace(-1, 2, o.numel()).view(o.shape)).sum() for o in tuple_of(out))


def gradients(function, layer, args):
    leaves = floating(args) + list(layer.parameters())
    return torch.autograd.grad(loss(function(*args)), leaves)


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def test_the_table_holds_every_operator():
    assert set(NAMES) == set(ops.__all__) - {"neighbors"}  # which has no floating tensors; see test_sites.py


# ---- compilers and exporters ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_once_for_all_batches(name):
    torch._dynamo.reset()
    counter, layer = torch._dynamo.testing.CompileCounterWithBackend("aot_eager"), Layer(name)
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    counts = []
    for n in (2, 3, 5):
        args = inputs(name, n, requires_grad=True)
        assert_same(gradients(compiled, layer, args), gradients(layer, layer, args), rtol=1e-5, atol=1e-5)
        counts.append(counter.frame_count)  # the first compilation may start over, on finding eps in no arithmetic
    assert counts[0] > 0 and set(counts) == {counts[0]}


@pytest.mark.parametrize("name", NAMES)
def test_compiled_without_gradients_it_runs_what_eager_mode_runs(name, monkeypatch):
    """Not the forward that keeps values for a backward."""
    monkeypatch.setattr("convdit.ops.linear.HERE", False)  # compiled for any size, it takes an operator for small ones
    torch._dynamo.reset()
    graphs, layer, args = [], Layer(name), inputs(name)

    def keep(module, _):
        graphs.append({node.target for node in module.graph.nodes if "convdit" in str(node.target)})
        return module

    with torch.no_grad():
        torch.compile(layer, backend=keep, fullgraph=True)(*args)
        with Calls() as calls:
            layer(*args)
    ran = {func._schema.name.replace("::", ".") for func, _ in calls.made}
    assert {str(target).removesuffix(".default") for graph in graphs for target in graph} == ran


@pytest.mark.parametrize("name", NAMES)
def test_compiled_transforms_are_right_or_refuse(name):
    layer, (x, *rest) = Layer(name).requires_grad_(False), inputs(name)
    transforms = {
        "grad": lambda x: torch.func.grad(lambda x: loss(layer(x, *rest)))(x),
        "jvp": lambda x: torch.func.jvp(lambda x: layer(x, *rest), (x,), (x,)),
    }
    for key, function in transforms.items():
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported):
            torch.compile(function, backend="aot_eager", fullgraph=True)(x)
        torch._dynamo.reset()
        compiled = torch.compile(function, backend="aot_eager")
        if key == "grad":
            torch.testing.assert_close(compiled(x), function(x))
        else:
            with pytest.raises(NotImplementedError, match="jvp"):
                compiled(x)


def export(name, layer):
    args, n = inputs(name), torch.export.Dim("n", min=2, max=64)
    shapes = ({0: 24 * n if "sparse" in name else n}, *({0: n},) * (len(args) - 1))
    # len(sites) is an int in Python, and a size of the program only where the compiler reads the code.
    return torch.export.export(layer.eval(), tuple(args), dynamic_shapes=(shapes,), strict="sparse" in name), args


LOAD = """
import sys, torch, convdit
for path in sys.argv[2:]:
    program = {load}
    args, expected = torch.load(path + ".values")
    got = program(*args)
    for a, b in zip(got if isinstance(got, (tuple, list)) else (got,), expected, strict=True):
        torch.testing.assert_close(a, b)
    print("right")
"""


def assert_right_in_a_fresh_process(load, paths):
    command = [sys.executable, "-c", LOAD.format(load=load), "-", *map(str, paths)]
    done = subprocess.run(command, env=dict(os.environ, PYTHONPATH=PACKAGE_ROOT), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.split() == ["right"] * len(paths), done.stderr[-3000:]


def save_values(path, name, layer):
    args = inputs(name, 5)  # another batch than that of the export
    with torch.no_grad():
        expected = tuple_of(layer(*args))
    torch.save((args, expected), f"{path}.values")


def test_exported_programs_run_in_a_fresh_process(tmp_path):
    paths = [tmp_path / f"{name}.pt2" for name in NAMES]
    for name, path in zip(NAMES, paths, strict=True):
        layer = Layer(name)
        torch.export.save(export(name, layer)[0], path)
        save_values(path, name, layer)
    assert_right_in_a_fresh_process("torch.export.load(path).module()", paths)


REPRESENTATIVE = ("convnext_block", "sparse_grn")


@pytest.mark.parametrize("name", [n if n in REPRESENTATIVE else pytest.param(n, marks=SLOW) for n in NAMES])
def test_aotinductor_packages_run_in_a_fresh_process(name, tmp_path):
    layer, path = Layer(name), tmp_path / f"{name}.pt2"
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(export(name, layer)[0], package_path=str(path))
    save_values(path, name, layer)
    assert_right_in_a_fresh_process("torch._inductor.aoti_load_package(path)", [path])


@pytest.mark.parametrize("name", DENSE)
def test_reference_path_leaves_no_operator_of_ours(name):
    layer = Layer(name).requires_grad_(False)
    program, args = export(name, layer)
    plain = program.run_decompositions(reference.decompositions())
    assert "convdit" in str(program.graph) and "convdit" not in str(plain.graph)
    assert_same(tuple_of(plain.module()(*args)), tuple_of(layer(*args)), rtol=1e-4, atol=1e-5)


# ---- transforms and autograd ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_refuses_and_never_gives_zeros(name):
    layer, args = Layer(name).requires_grad_(False), inputs(name)
    x, *rest = args
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: layer(x, *rest), (x,), (x,))
    for grad in (True, False):
        with torch.set_grad_enabled(grad), forward_ad.dual_level(), pytest.raises(NotImplementedError, match="jvp"):
            layer(forward_ad.make_dual(x, x), *rest)


@pytest.mark.parametrize("name", NAMES)
def test_double_backward_refuses(name):
    layer, args = Layer(name), inputs(name, requires_grad=True)
    (grad,) = torch.autograd.grad(sum(o.square().sum() for o in tuple_of(layer(*args))), args[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("name", NAMES)
def test_func_grad_equals_autograd(name):
    layer, args = Layer(name), inputs(name, requires_grad=True)
    parameters = {k: p.detach() for k, p in layer.named_parameters()}
    count = len(TABLE[name][0])

    def value(tensors, parameters):
        return loss(torch.func.functional_call(layer, parameters, (*tensors, *args[count:])))

    got, of_parameters = torch.func.grad(value, argnums=(0, 1))([a.detach() for a in args[:count]], parameters)
    assert_same([*got, *of_parameters.values()], gradients(layer, layer, args))


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_gradients_are_the_same(name):
    layer, args = Layer(name), inputs(name, requires_grad=True)
    for reentrant in (False, True):
        function = partial(checkpoint, layer, use_reentrant=reentrant)
        if reentrant:  # it works with backward only
            loss(function(*args)).backward()
            leaves = floating(args) + list(layer.parameters())
            got = [leaf.grad for leaf in leaves]
        else:
            got = gradients(function, layer, args)
        assert all(torch.equal(a, b) for a, b in zip(got, gradients(layer, layer, args), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_deterministic_mode_changes_nothing(name):
    layer, args = Layer(name), inputs(name, requires_grad=True)
    expected = gradients(layer, layer, args)
    torch.use_deterministic_algorithms(True)
    try:
        got = gradients(layer, layer, args)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# Keep x's dtype, as their docstrings say.
KEEP = ("convnext_block", "gated_residual", "layer_norm_modulate", "adaln_zero", "gelu_tanh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_autocast_rounds_and_gives_gradients_in_the_parameters_dtype(name, dtype):
    layer, args = Layer(name), inputs(name, requires_grad=True)
    expected = tuple_of(layer(*args))
    with torch.autocast("cpu", dtype):
        out = tuple_of(layer(*args))
    keeps = any(text in name for text in KEEP)
    assert {o.dtype for o in out} == {torch.float32 if keeps else dtype}
    assert_same([o.float() for o in out], expected, rtol=0.05, atol=0.1)
    leaves = floating(args) + list(layer.parameters())
    assert {g.dtype for g in torch.autograd.grad(loss(out), leaves)} == {torch.float32}


# ---- tools ---------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    """The calls of our operators: [(operator, arguments)]."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "convdit":
            self.made.append((func, args))
        return func(*args, **(kwargs or {}))


def calls_of(name, dtype=torch.float32):
    layer = Layer(name, dtype=dtype)
    with Calls() as calls:
        gradients(layer, layer, inputs(name, dtype=dtype, requires_grad=True))
        with torch.no_grad():
            layer(*inputs(name, dtype=dtype))
    return calls.made


def test_the_table_reaches_every_registered_operator():
    reached = {func._schema.name for name in NAMES for func, _ in calls_of(name)}
    registered = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("convdit::")}
    # The first measures the CPU for the benchmark and computes nothing; the second overwrites: see test_gelu_tanh.py;
    # the third is of accelerated models: see tests/dropin/test_products.py; the last two are of large products and of
    # some processors: see test_linear.py.
    elsewhere = ("fma_probe", "gelu_tanh_", "packed_linear", "linear_fwd", "linear_bwd")
    assert registered - reached == {f"convdit::{name}" for name in elsewhere}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype):
    """Schema, fake shapes and strides, and dispatch of each registered operator that a forward and backward call."""
    for func, args in calls_of(name, dtype):
        args = [a.detach() if isinstance(a, torch.Tensor) else a for a in args]
        torch.library.opcheck(func, tuple(args))


@pytest.mark.parametrize("name", NAMES)
def test_flop_counter_counts_what_it_counts_in_the_reference(name):
    counts = []
    for functions in (ops, reference):
        layer, args = Layer(name, functions), inputs(name)
        if (
            "sparse_depthwise" in name and functions is reference
        ):  # the reference gathers and sums; it has no convolution
            counts.append(2 * args[0].numel() * 9)
            continue
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(*args)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]
    has_products = any(text in name for text in ("conv", "attention"))
    assert (counts[0] > 0) == has_products
    if has_products:
        layer, args = Layer(name), inputs(name, requires_grad=True)
        with FlopCounterMode(display=False) as counter:
            loss(layer(*args)).backward()
        assert counter.get_total_flops() >= 2.5 * counts[0]


@pytest.mark.parametrize("name", NAMES)
def test_profiler_names_forward_and_backward(name):
    layer = Layer(name)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        gradients(layer, layer, inputs(name, requires_grad=True))
    seen = {event.key for event in profiled.key_averages() if event.key.startswith("convdit::")}
    assert any("fwd" in key for key in seen) and any("bwd" in key or "grad" in key for key in seen)


@pytest.mark.parametrize(
    ("thing", "text"),
    [
        (lambda: convdit.nn.DepthwiseConv2d(8, 5), "DepthwiseConv2d(8, kernel_size=5, bias=True)"),
        (lambda: convdit.nn.GlobalResponseNorm(8), "GlobalResponseNorm(8, eps=1e-06, scope='sample')"),
        (lambda: convdit.nn.ConvNeXtBlock(8, drop_path=0.1), "version=2, drop_path=0.1"),
        (lambda: sites_of(mask_of(2)), "ActiveSites(48 sites in blocks of 2x2, batch_size=2, spatial_shape=(6, 8))"),
    ],
)
def test_repr_says_what_it_is(thing, text):
    assert text in repr(thing())


# ---- processes -----------------------------------------------------------------------------------

DISTRIBUTED = """
import os, sys, torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from tests.ops.test_integration import NAMES, Layer, inputs, loss
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
mesh = init_device_mesh("cpu", (2,))
for name in NAMES:
    args = [inputs(name, n) for n in (2, 3)]
    alone = Layer(name)
    parameters = list(alone.parameters())
    if not parameters:  # these wrappers are for parameters
        continue
    for a in args:
        (loss(alone(*a)) / 2).backward()
    for wrapper in ("DDP", "FSDP2"):
        layer = Layer(name)
        wrapped = DistributedDataParallel(layer) if wrapper == "DDP" else fully_shard(layer, mesh=mesh)
        loss(wrapped(*args[rank])).backward()
        for key, p in layer.named_parameters():
            grad = p.grad.full_tensor() if wrapper == "FSDP2" else p.grad
            torch.testing.assert_close(grad, dict(alone.named_parameters())[key].grad, msg=f"{name} {wrapper} {key}")
    print(name)
dist.destroy_process_group()
"""


def test_gradients_of_two_processes_are_averaged_by_ddp_and_fsdp2(tmp_path):
    rendezvous = f"file://{tmp_path}/rendezvous"
    environment = dict(os.environ, PYTHONPATH=PACKAGE_ROOT, OMP_NUM_THREADS="1")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    ranks = [
        subprocess.Popen([sys.executable, "-c", DISTRIBUTED, str(rank), rendezvous], env=environment, **pipes)
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=300)
        assert rank.returncode == 0, err[-3000:]
        assert out.split() == [name for name in NAMES if TABLE[name][1]]
