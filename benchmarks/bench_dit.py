"""The adaLN-Zero block of DiT against the public one in timm's layers, and diffusers': eager and compiled."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn

from convdit.nn import DiTBlock

from . import rivals
from .harness import Comparison, Work, without_grad

SIZES = {"S/2": (8, 256, 384, 6), "XL/2": (2, 256, 1152, 16)}  # sequences, tokens, width, heads


def comparisons() -> Iterator[Comparison]:
    for label, size in SIZES.items():
        shape = f"{label}; {'x'.join(map(str, size[:3]))}"
        yield Comparison(
            "DiT block", "forward", shape, torch.float32, partial(forward, *size), quick=label == "S/2", heavy=True
        )
        yield Comparison("DiT block", "step", shape, torch.float32, partial(step, *size))


def pair(
    b: int, t: int, d: int, heads: int, autotune: bool = False
) -> tuple[DiTBlock, dict[str, nn.Module], dict[str, Callable], list[Tensor]]:
    """Our block; each rival, and how to call it; x and the condition."""
    ours = rivals.randomise(DiTBlock(d, heads))
    modules = rivals.eager_and_compiled("DiT", rivals.DiTBlock(ours, heads), autotune)
    modules |= rivals.eager_and_compiled("diffusers", rivals.diffusers_dit_block(ours, heads))
    calls = {k: (lambda x, c, m=m: m(x, timestep=c)) if k.startswith("diffusers") else m for k, m in modules.items()}
    return ours, modules, calls, [torch.randn(b, t, d), torch.randn(b, d)]


def cost(b: int, t: int, d: int) -> dict[str, float]:
    """Of the forward pass: four matrix products of the tokens, attention's two, the condition's one."""
    return {"matrix": 24.0 * b * t * d * d + 4.0 * b * t * t * d + 12.0 * b * d * d, "bytes": 8.0 * b * t * d}


def forward(b: int, t: int, d: int, heads: int) -> Work:
    ours, _, calls, inputs = pair(b, t, d, heads, autotune=d < 1000)
    functions = {k: without_grad(f, *inputs) for k, f in calls.items()}
    return Work(without_grad(ours, *inputs), functions, **cost(b, t, d))


def step(b: int, t: int, d: int, heads: int) -> Work:
    ours, modules, calls, leaves = pair(b, t, d, heads)
    grad, leaves = torch.randn(b, t, d), [leaf.requires_grad_() for leaf in leaves]

    def both(function: Callable, module: nn.Module) -> Callable:
        inputs = [*leaves, *module.parameters()]
        return lambda: torch.autograd.grad(function(*leaves), inputs, grad)[
            :2
        ]  # diffusers splits qkv: other parameters

    functions = {k: both(f, modules[k]) for k, f in calls.items()}
    return Work(both(ours, ours), functions, **{k: 3 * v for k, v in cost(b, t, d).items()})
