"""The operators at a GPU's batch sizes, in float32 and bfloat16: rows only where there is a GPU.

Rivals are those of the operators' own benches, and of attention each kernel that PyTorch has. In the dry run of
`make gpu-check` (CONVDIT_GPU_CHECK=dry) the rows are tiny, and run on the executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from . import bench_adaln, bench_attention, bench_depthwise_conv, bench_grn, bench_sparse_depthwise_conv
from .harness import Comparison, Work, without_grad

DTYPES = (torch.float32, torch.bfloat16)
GRADIENTS, BOTH = ("forward", "input_grad", "weight_grad"), ("forward", "backward")


def comparisons() -> Iterator[Comparison]:
    dry = os.environ.get("CONVDIT_GPU_CHECK") == "dry"
    if not (dry or torch.cuda.is_available()):
        return
    n, maps = (1, [(7, 8)]) if dry else (64, [(56, 96), (14, 384)])
    sizes = {"tiny": (1, 9, 64, 1)} if dry else {"S/2": (64, 256, 384, 6), "XL/2": (64, 256, 1152, 16)}
    rows: list[tuple[str, str, str, Callable[[], Work]]] = []
    for side, c in maps:
        conv, sparse = bench_depthwise_conv.depthwise_conv, bench_sparse_depthwise_conv.sparse_conv
        shape, hidden = f"{n}x{side}x{side}x{c}", f"{n}x{side}x{side}x{4 * c}"
        rows += [("depthwise_conv2d", what, shape, partial(conv, what, side, c, n)) for what in GRADIENTS]
        rows += [
            ("sparse_depthwise_conv2d", what, shape, partial(sparse, what, "own dense", side, c, n))
            for what in GRADIENTS
        ]
        rows += [("gelu_grn", what, hidden, partial(bench_grn.gelu_grn, what, side, 4 * c, n)) for what in BOTH]
    for label, (b, t, d, heads) in sizes.items():
        shape = f"{label}; {b}x{t}x{d}"
        rows += [
            (name, what, shape, partial(bench_adaln.adaln, name, what, b, t, d))
            for name in bench_adaln.OPERATORS
            for what in BOTH
        ]
        rows += [("packed_attention", what, shape, partial(attention, what, b, t, d, heads)) for what in BOTH]
    for dtype in DTYPES:
        for operator, what, shape, build in rows:
            yield Comparison(
                f"{operator}, GPU", what, shape, dtype, partial(in_dtype, dtype, build), malloc=("tuned",), effort=0.2
            )


def in_dtype(dtype: torch.dtype, build: Callable[[], Work]) -> Work:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return build()
    finally:
        torch.set_default_dtype(before)


def attention(what: str, b: int, t: int, d: int, heads: int) -> Work:
    """Beside PyTorch's choice, every kernel of its that takes these tensors."""
    work = bench_attention.attention(what, b, t, d, heads)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
        call = pinned(backend, work.rivals["sdpa"])
        qkv = torch.randn(1, 1, 3 * d)
        try:
            with sdpa_kernel(backend):
                without_grad(bench_attention.sdpa, qkv, heads)()
        except RuntimeError:  # not for this dtype, or not on this device
            continue
        work.rivals[backend.name.lower()] = call
    return work


def pinned(backend: SDPBackend, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    def with_backend() -> Tensor:
        with sdpa_kernel(backend):
            return call()

    return with_backend
