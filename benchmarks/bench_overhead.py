"""Call overhead, in microseconds: every operator on tensors of a few values, beside what a call may cost.

Process CPU time, and the quickest of many short runs of calls: work beside can only lengthen one, twofold on a busy
machine, through the caches and the clock that it shares. With autograd it is the forward call that records a graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from .bench_grid import CASES
from .clock import Function, seconds_a_call
from .harness import Comparison, Work

RUNS, CALLS, WARM_UP = 40, 100, 100
ALLOWED = {"forward": 6.0, "forward with autograd": 25.0}  # microseconds
SHAPE = (1, 2, 2, 16)


def comparisons() -> Iterator[Comparison]:
    for name in CASES:
        for what, allowed in ALLOWED.items():
            shape, build = "x".join(map(str, SHAPE)), partial(overhead, name, what)
            against, quick = f"{allowed:g} us", name == "layer_norm_modulate"
            yield Comparison(name, what, shape, torch.float32, build, against, quick, malloc=("default",), unit="us")


def overhead(name: str, what: str) -> Work:
    ours, _, tensors = CASES[name](lambda *shape: torch.randn(shape), *SHAPE)
    grad = what != "forward"
    call = partial(ours, *(t.requires_grad_(grad) for t in tensors))
    return Work(partial(microseconds, call, grad), {"allowed": lambda: ALLOWED[what]})


def microseconds(call: Function, grad: bool) -> float:
    """Autograd is switched on or off around all calls: torch.no_grad() itself takes 2 us."""
    with torch.set_grad_enabled(grad):
        seconds_a_call(call, WARM_UP, wall=False)
        return 1e6 * min(seconds_a_call(call, CALLS, wall=False) for _ in range(RUNS))
