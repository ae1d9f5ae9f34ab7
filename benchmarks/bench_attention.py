"""Attention on the packed qkv of the Linear against scaled_dot_product_attention on strided views of it.

On the CPU ours calls the same kernel of PyTorch; what is compared is the packing around it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from benchmarks.harness import Comparison, backward
from convdit import ops

SHAPES = {"S/2": (8, 256, 384, 6), "XL/2": (8, 256, 1152, 16)}


def sdpa(qkv: torch.Tensor, heads: int) -> torch.Tensor:
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def comparisons() -> Iterator[Comparison]:
    for label, (b, t, d, heads) in SHAPES.items():
        qkv = torch.randn(b, t, 3 * d)
        flops, size, shape = 4.0 * b * t * t * d, 4 * b * t * d, f"{label} {b}x{t}x{d}"
        yield Comparison(
            "packed_attention", "forward", shape, qkv.dtype,
            lambda q=qkv, h=heads: ops.packed_attention(q, h),
            {"sdpa": lambda q=qkv, h=heads: sdpa(q, h)},
            flops, 4 * size,
        )  # fmt: skip
        leaf = qkv.clone().requires_grad_()
        grad = torch.randn(b, t, d)
        yield Comparison(
            "packed_attention", "backward", shape, qkv.dtype,
            backward(ops.packed_attention(leaf, heads), leaf, grad),
            {"sdpa": backward(sdpa(leaf, heads), leaf, grad)},
            2.5 * flops, 8 * size,
        )  # fmt: skip
