"""GELU and global response normalisation in one operator against the same in plain PyTorch, eager and compiled."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Comparison, backward
from convdit import ops, reference

SHAPES = [(8, 56, 384), (8, 28, 768), (8, 14, 1536), (8, 7, 3072), (8, 56, 160)]  # images, side, hidden channels


def comparisons() -> Iterator[Comparison]:
    compiled = torch.compile(reference.gelu_grn, dynamic=False)
    functions = {"ours": ops.gelu_grn, "eager": reference.gelu_grn, "compile": compiled}
    for n, side, channels in SHAPES:
        x, weight, bias = torch.randn(n, side, side, channels), torch.randn(channels), torch.randn(channels)
        shape, size = f"C={channels}, {side}x{side}", 4 * x.numel()
        forward = {k: (lambda f=f, a=(x, weight, bias): f(*a)) for k, f in functions.items()}
        yield Comparison("gelu_grn", "forward", shape, x.dtype, forward.pop("ours"), forward, 0, 3 * size)
        leaves = [a.clone().requires_grad_() for a in (x, weight, bias)]
        grad = torch.randn_like(x)
        passes = {k: backward(f(*leaves), leaves, grad) for k, f in functions.items()}
        yield Comparison("gelu_grn", "backward", shape, x.dtype, passes.pop("ours"), passes, 0, 5 * size)
