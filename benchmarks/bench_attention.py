"""Attention on the packed qkv of the Linear against scaled_dot_product_attention on strided views of it."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
import torch.nn.functional as F

from convdit import ops

from .harness import Comparison, Work, backward, without_grad

SHAPES = {"S/2": (8, 256, 384, 6), "XL/2": (8, 256, 1152, 16)}


def comparisons() -> Iterator[Comparison]:
    for label, size in SHAPES.items():
        for what in ("forward", "backward"):
            shape, build = f"{label}; {'x'.join(map(str, size[:3]))}", partial(attention, what, *size)
            yield Comparison("packed_attention", what, shape, torch.float32, build, quick=label == "S/2")


def sdpa(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def attention(what: str, b: int, t: int, d: int, heads: int) -> Work:
    qkv = torch.randn(b, t, 3 * d, requires_grad=what == "backward")
    functions = {"ours": ops.packed_attention, "sdpa": sdpa}
    flops, size = 4.0 * b * t * t * d, qkv.nbytes // 3
    if what == "forward":
        calls = {k: without_grad(f, qkv, heads) for k, f in functions.items()}
        return Work(calls.pop("ours"), calls, matrix=flops, bytes=4 * size)
    grad = torch.randn(b, t, d)
    calls = {k: backward(f, (qkv, heads), qkv, grad) for k, f in functions.items()}
    return Work(calls.pop("ours"), calls, matrix=2.5 * flops, bytes=8 * size)
