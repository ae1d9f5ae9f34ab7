"""The adaptive LayerNorm operators against the same in plain PyTorch, eager and compiled, at DiT-S/2 and DiT-XL/2."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from convdit import ops, reference

from . import rivals
from .harness import Comparison, Work, backward, without_grad

SHAPES = {"S/2": (8, 256, 384), "XL/2": (8, 256, 1152)}
# name: (number of (B, T, D) inputs, number of (B, D) inputs, (B, T, D) tensors read or written: forward, backward)
OPERATORS = {
    "layer_norm_modulate": (1, 2, 2, 3),
    "gated_residual": (2, 1, 3, 3),
    "gated_residual_layer_norm_modulate": (2, 3, 4, 6),
}


def comparisons() -> Iterator[Comparison]:
    for label, size in SHAPES.items():
        for name in OPERATORS:
            for what in ("forward", "backward"):
                shape, build = f"{label}; {'x'.join(map(str, size))}", partial(adaln, name, what, *size)
                quick = label == "S/2" and name == "gated_residual_layer_norm_modulate"
                yield Comparison(name, what, shape, torch.float32, build, quick=quick)


def adaln(name: str, what: str, b: int, t: int, d: int) -> Work:
    maps, vectors, forward_maps, backward_maps = OPERATORS[name]
    eager = getattr(reference, name)
    functions = {"ours": getattr(ops, name), "eager": eager, "compile": rivals.compiled(eager)}
    args = [torch.randn(b, t, d) for _ in range(maps)] + [torch.randn(b, d) for _ in range(vectors)]
    if what == "forward":
        calls = {k: without_grad(f, *args) for k, f in functions.items()}
        return Work(calls.pop("ours"), calls, bytes=forward_maps * args[0].nbytes)
    leaves = [a.requires_grad_() for a in args]
    grads = [torch.randn(b, t, d) for _ in range(2 if name == "gated_residual_layer_norm_modulate" else 1)]
    calls = {k: backward(f, leaves, leaves, grads) for k, f in functions.items()}
    return Work(calls.pop("ours"), calls, bytes=backward_maps * args[0].nbytes)
