"""The adaptive LayerNorm operators against the same in plain PyTorch, eager and compiled, at DiT-S/2 and DiT-XL/2."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.harness import Comparison, backward
from convdit import ops, reference

SHAPES = {"S/2": (8, 256, 384), "XL/2": (8, 256, 1152)}
# name: (number of (B, T, D) inputs, number of (B, D) inputs, (B, T, D) tensors read or written: forward, backward)
OPERATORS = {
    "layer_norm_modulate": (1, 2, 2, 3),
    "gated_residual": (2, 1, 3, 3),
    "gated_residual_layer_norm_modulate": (2, 3, 4, 6),
}


def comparisons() -> Iterator[Comparison]:
    for label, (b, t, d) in SHAPES.items():
        for name, (maps, vectors, forward_maps, backward_maps) in OPERATORS.items():
            ours, eager = getattr(ops, name), getattr(reference, name)
            compiled = torch.compile(eager)
            args = [torch.randn(b, t, d) for _ in range(maps)] + [torch.randn(b, d) for _ in range(vectors)]
            shape, size = f"{label} {b}x{t}x{d}", 4 * b * t * d
            yield Comparison(
                name,
                "forward",
                shape,
                torch.float32,
                lambda f=ours, a=args: f(*a),
                {"eager": lambda f=eager, a=args: f(*a), "compile": lambda f=compiled, a=args: f(*a)},
                0,
                forward_maps * size,
            )
            leaves = [a.clone().requires_grad_() for a in args]

            def graph(function, leaves=leaves):
                outputs = function(*leaves)
                outputs = outputs if isinstance(outputs, tuple) else (outputs,)
                return backward(outputs, leaves, [torch.ones_like(o) for o in outputs])

            rivals = {"eager": graph(eager), "compile": graph(compiled)}
            yield Comparison(name, "backward", shape, torch.float32, graph(ours), rivals, 0, backward_maps * size)
