"""Coverage: every operator in float32 and bfloat16, over batches, channels and map sizes, against eager PyTorch.

No cell should be slower than 0.95 of eager; shapes are not chosen to suit the kernels. A cell of which one call takes
more than half a second is left out, and said so: products of large matrices, which are PyTorch's on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from convdit import ops, reference
from convdit.sparse import ActiveSites

from .bench_attention import sdpa
from .bench_depthwise_conv import eager as conv
from .harness import Comparison, Work, without_grad

DTYPES = (torch.float32, torch.bfloat16)
BATCHES = (1, 8)
CHANNELS = (40, 96, 100, 768)
MAPS = ((7, 7), (14, 14), (56, 56), (33, 47))
HEADS = 4  # divides all of CHANNELS
VISIBLE = 0.4  # of sites, drawn one by one

Function = Callable[..., object]
Make = Callable[..., Tensor]


def comparisons() -> Iterator[Comparison]:
    for name, what in product(CASES, ("forward", "backward")):
        for dtype, n, c, (h, w) in product(DTYPES, BATCHES, CHANNELS, MAPS):
            yield Comparison(
                name,
                what,
                f"{n}x{h}x{w}x{c}",
                dtype,
                partial(cell, name, what, n, h, w, c, dtype),
                against="eager",
                quick=(dtype, n, c, h) == (torch.float32, 1, 96, 14),
                malloc=("tuned",),
                effort=0.05,
                limit=0.5,
            )


def cell(name: str, what: str, n: int, h: int, w: int, c: int, dtype: torch.dtype) -> Work:
    """Ours and eager on the same random tensors; backward is that of all of them."""

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype) * 0.5

    ours, eager, tensors = CASES[name](make, n, h, w, c)
    functions = {"ours": ours, "eager": eager}
    if what == "forward":
        calls = {k: without_grad(f, *tensors) for k, f in functions.items()}
    else:
        leaves = [t.requires_grad_() for t in tensors]
        graphs = {k: f(*leaves) for k, f in functions.items()}
        grads = [torch.randn_like(y) for y in _tuple(graphs["ours"])]
        calls = {k: partial(torch.autograd.grad, y, leaves, grads, retain_graph=True) for k, y in graphs.items()}
    return Work(calls.pop("ours"), calls)


def _tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


# ---- eager PyTorch, where convdit.reference is not how one would write it for speed --------------------------------


def grn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    norm = x.norm(p=2, dim=(1, 2), keepdim=True)
    return x + torch.addcmul(bias, weight, x * (norm / (norm.mean(-1, keepdim=True) + 1e-6)))


def gelu_grn(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return grn(F.gelu(x), weight, bias)


def conv_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
    return F.layer_norm(conv(x, weight, bias), (x.shape[-1],), norm_weight, norm_bias, 1e-6)


def block(x: Tensor, *parameters: Tensor) -> Tensor:
    *first, weight1, bias1, gamma, beta, weight2, bias2 = parameters
    y = F.linear(conv_layer_norm(x, *first), weight1, bias1)
    return x + F.linear(gelu_grn(y, gamma, beta), weight2, bias2)


def attention_half(x, modulation, qkv_weight, qkv_bias, proj_weight, proj_bias) -> Tensor:
    shift, scale, gate = modulation.unbind(1)
    y = sdpa(F.linear(reference.layer_norm_modulate(x, shift, scale), qkv_weight, qkv_bias), HEADS)
    return reference.gated_residual(x, F.linear(y, proj_weight, proj_bias), gate)


# ---- the operators: (make, n, h, w, c) -> ours, eager, tensors -----------------------------------------------------


def _maps(ours: Function, eager: Function, shapes: Callable[[int], Sequence[tuple[int, ...]]]):
    """An operator on a map and parameters of the shapes given."""
    return lambda make, n, h, w, c: (ours, eager, [make(n, h, w, c), *(make(*s) for s in shapes(c))])


def _tokens(ours: Function, eager: Function, maps: int, vectors: int):
    """An operator on sequences (B, T, D) and vectors (B, D): the sites of a map are tokens."""
    return lambda make, n, h, w, c: (
        ours,
        eager,
        [make(n, h * w, c) for _ in range(maps)] + [make(n, c) for _ in range(vectors)],
    )


def _packed(ours: Function, eager: Function, parameters: int):
    """An operator on visible sites, against its reference on the same rows."""

    def case(make: Make, n: int, h: int, w: int, c: int):
        sites = ActiveSites.from_mask(torch.rand(n, h, w) < VISIBLE)
        tensors = [make(len(sites), c), *(make(c) for _ in range(parameters))]
        return partial(ours, sites=sites), partial(eager, sites=sites), tensors

    return case


def _sparse_conv(make: Make, n: int, h: int, w: int, c: int):
    """Against the dense convolution of the zero-filled map, as one would do without sparse operators."""
    visible = torch.rand(n, h, w) < VISIBLE
    sites = ActiveSites.from_mask(visible)

    def eager(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return conv(features.new_zeros(n, h, w, c).index_put((visible,), features), weight, bias)[visible]

    return partial(ops.sparse_depthwise_conv2d, sites=sites), eager, [make(len(sites), c), make(c, 1, 7, 7), make(c)]


def _attention(make: Make, n: int, h: int, w: int, c: int):
    return partial(ops.packed_attention, num_heads=HEADS), partial(sdpa, heads=HEADS), [make(n, h * w, 3 * c)]


def _attention_half(make: Make, n: int, h: int, w: int, c: int):
    shapes = [(n, h * w, c), (n, 3, c), (3 * c, c), (3 * c,), (c, c), (c,)]
    return partial(ops.adaln_zero_attention, num_heads=HEADS), attention_half, [make(*s) for s in shapes]


def _conv_shapes(c: int) -> list[tuple[int, ...]]:
    return [(c, 1, 7, 7), (c,)]


def _block_shapes(c: int) -> list[tuple[int, ...]]:
    return [*_conv_shapes(c), (c,), (c,), (4 * c, c), (4 * c,), (4 * c,), (4 * c,), (c, 4 * c), (c,)]


CASES = {
    "depthwise_conv2d": _maps(ops.depthwise_conv2d, conv, _conv_shapes),
    "depthwise_conv2d_layer_norm": _maps(
        ops.depthwise_conv2d_layer_norm, conv_layer_norm, lambda c: [*_conv_shapes(c), (c,), (c,)]
    ),
    "sparse_depthwise_conv2d": _sparse_conv,
    "grn": _maps(ops.grn, grn, lambda c: [(c,), (c,)]),
    "gelu_grn": _maps(ops.gelu_grn, gelu_grn, lambda c: [(c,), (c,)]),
    "sparse_grn": _packed(ops.sparse_grn, reference.sparse_grn, 2),
    "sparse_gelu_grn": _packed(ops.sparse_gelu_grn, reference.sparse_gelu_grn, 2),
    "convnext_block": _maps(ops.convnext_block, block, _block_shapes),
    "layer_norm_modulate": _tokens(ops.layer_norm_modulate, reference.layer_norm_modulate, 1, 2),
    "gated_residual": _tokens(ops.gated_residual, reference.gated_residual, 2, 1),
    "gated_residual_layer_norm_modulate": _tokens(
        ops.gated_residual_layer_norm_modulate, reference.gated_residual_layer_norm_modulate, 2, 3
    ),
    "gelu_tanh": _maps(ops.gelu_tanh, reference.gelu_tanh, lambda c: [(c,)]),
    "packed_attention": _attention,
    "adaln_zero_attention": _attention_half,
}
